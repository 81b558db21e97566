"""Who may have a file with a private key, so that it is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peculium_server.files import PrivateFileUnusable, ownership_problem, read_private

SERVER, OTHER, ROOT = 1000, 1001, 0


@pytest.mark.parametrize(
    ("owner", "mode"),
    [
        (SERVER, 0o600),
        (SERVER, 0o400),
        (ROOT, 0o600),
        # As systemd hands a credential over, and Kubernetes a secret.
        (ROOT, 0o440),
        (ROOT, 0o640),
    ],
)
def test_a_file_of_the_servers_user_alone_or_of_root_is_used(owner: int, mode: int) -> None:
    assert ownership_problem(owner, mode, user=SERVER) is None


@pytest.mark.parametrize(
    ("owner", "mode"),
    [
        (SERVER, 0o640),
        (SERVER, 0o604),
        (SERVER, 0o440),
        (ROOT, 0o660),
        (ROOT, 0o450),
        (ROOT, 0o644),
        (ROOT, 0o601),
        (OTHER, 0o600),
        (OTHER, 0o440),
    ],
)
def test_a_file_that_others_may_read_or_exchange_is_not(owner: int, mode: int) -> None:
    assert ownership_problem(owner, mode, user=SERVER) is not None


@pytest.mark.parametrize(("mode", "used"), [(0o600, True), (0o640, True), (0o644, False)])
def test_roots_own_server_takes_roots_files_as_others_do(mode: int, used: bool) -> None:
    assert (ownership_problem(ROOT, mode, user=ROOT) is None) is used


def test_a_file_is_read_by_that_rule(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    assert read_private(path) == b"secret"
    path.chmod(0o666)
    with pytest.raises(PrivateFileUnusable, match=r"others may use it \(mode 666\)"):
        read_private(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    os.chown(path, OTHER, OTHER)
    with pytest.raises(PrivateFileUnusable, match="belongs to another user"):
        read_private(path)


def test_a_file_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(PrivateFileUnusable, match="cannot be read: No such file"):
        read_private(tmp_path / "none")
