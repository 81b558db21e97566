from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from peculium_server.core.operations import Role
from peculium_server.identity import DEV, Identities, Identity, KeysInvalid

KEY = "k" * 43


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def table(principal: str = "svc", role: str = "agent", sha256: str = digest(KEY)) -> str:
    return f'[[keys]]\nprincipal = "{principal}"\nrole = "{role}"\nsha256 = "{sha256}"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def problems(file: Path, content: str | bytes) -> list[str]:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KeysInvalid) as caught:
        Identities.load(file)
    assert caught.value.path == file
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "role"),
    [("agent", Role.AGENT), ("admin", Role.ADMIN), ("auditor", Role.AUDITOR)],
)
def test_a_key_is_its_principals(file: Path, name: str, role: Role) -> None:
    file.write_text(table(role=name))
    identities = Identities.load(file)
    identity = identities.identify(KEY)
    assert identity is not None
    assert identity == Identity("svc", frozenset({role}))
    assert not identities.dev_mode


@pytest.mark.parametrize("key", [None, "", "nobody's", digest(KEY), KEY + " ", "\ud800"])
def test_a_key_that_nobody_has_is_nobodys(file: Path, key: str | None) -> None:
    file.write_text(table())
    assert Identities.load(file).identify(key) is None


def test_a_principal_may_have_an_old_key_and_a_new_one(file: Path) -> None:
    file.write_text(table() + table(sha256=digest("new")))
    identities = Identities.load(file)
    assert identities.identify(KEY) == identities.identify("new")


def test_without_a_file_everybody_is_dev_and_may_do_everything() -> None:
    identities = Identities.dev()
    assert identities.dev_mode
    for key in (None, "whatever"):
        assert identities.identify(key) == DEV
    assert DEV.principal == "dev"
    assert DEV.roles == {Role.AGENT, Role.ADMIN, Role.AUDITOR}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "has no [[keys]]"),
        ("keys = []", "has no [[keys]]"),
        ("keys = 3", "has no [[keys]]"),
        ("keys = [3]", "key 1: is not a table"),
        (table(principal="system"), "key 1: principal 'system' is reserved"),
        (table(principal=""), "key 1: principal must be 1 to 256 bytes of printable text"),
        (table(principal="é" * 129), "key 1: principal must be 1 to 256 bytes of printable text"),
        (table(principal="a\\u0000b"), "key 1: principal must be 1 to 256 bytes of printable text"),
        (table(role="root"), "key 1: role must be one of agent, admin, auditor"),
        (table(sha256="ab"), "key 1: sha256 must be 64 hexadecimal digits in lower case"),
        (table(sha256="A" * 64), "key 1: sha256 must be 64 hexadecimal digits in lower case"),
        (table() + 'colour = "red"\n', "key 1: 'colour' is not a field of a key"),
        (table() + table("other"), "key 2: its sha256 is that of another key"),
        (
            table() + table(role="admin", sha256=digest("new")),
            "key 2: 'svc' is agent by another key",
        ),
        ("version = 1\n" + table(), "'version' is not a setting of a key file"),
    ],
)
def test_a_problem_of_the_file_says_which_key_has_it(
    file: Path, content: str, problem: str
) -> None:
    assert problems(file, content) == [problem]


def test_every_problem_is_told_at_once(file: Path) -> None:
    told = problems(file, "[[keys]]\nrole = [1]\n" + table(role="root", sha256="xyz"))
    assert [problem.split(":")[0] for problem in told] == ["key 1"] * 3 + ["key 2"] * 2


@pytest.mark.parametrize("content", ["[[keys", b"\xff\xfe"])
def test_what_is_not_toml_is_told_so(file: Path, content: str | bytes) -> None:
    [problem] = problems(file, content)
    assert problem.startswith("is not TOML")


def test_a_file_that_is_not_there_is_told_so(file: Path) -> None:
    with pytest.raises(KeysInvalid, match="cannot be read"):
        Identities.load(file)
