"""Files that operators hand out and exchange; those with private keys are read only if nobody else can.

The rule is PostgreSQL's for its own key: a file of the server's user is for that user alone; a file of root may be
readable by a group, which is how systemd hands credentials over (`LoadCredential=`) and Kubernetes secrets.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

PRIVATE_MODE: Final = 0o600
_BYTES_MAX: Final = 64 * 1024
_OF_OWN: Final = stat.S_IRWXG | stat.S_IRWXO
_OF_ROOT: Final = stat.S_IWGRP | stat.S_IXGRP | stat.S_IRWXO


class PrivateFileUnusable(Exception):
    """A file with a private key cannot be used; says why, and nothing of what is in it."""


def read_private(path: Path) -> bytes:
    """What is in a file with a private key.

    Raises:
        PrivateFileUnusable: It cannot be read, is another user's, or too many may use it.
    """
    try:
        with path.open("rb") as file:
            # Of what was opened, whatever the name leads to a moment later.
            status = os.fstat(file.fileno())
            content = file.read(_BYTES_MAX)
    except OSError as error:
        raise PrivateFileUnusable(f"cannot be read: {error.strerror}") from error
    problem = ownership_problem(status.st_uid, status.st_mode, user=os.geteuid())
    if problem is not None:
        raise PrivateFileUnusable(problem)
    return content


def ownership_problem(owner: int, mode: int, *, user: int) -> str | None:
    """Why a file must not be used by a user; None: it may be."""
    said = f"mode {mode & 0o777:03o}"
    if owner not in (user, 0):
        return f"belongs to another user (id {owner}), who could exchange it: it must be the server's, or root's"
    if owner == user != 0 and mode & _OF_OWN:
        return f"others may use it ({said}): chmod 600 it"
    if owner == 0 and mode & _OF_ROOT:
        return f"others may use it ({said}): chmod 600 it, or 640 for the server's group"
    return None


def write_private(path: Path, content: bytes) -> None:
    """Make a new file that is for its owner only.

    Raises:
        OSError: It exists, or cannot be made.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, PRIVATE_MODE), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def make_private(path: Path, content: bytes) -> None:
    """Make a new file with a private key, whole or not at all.

    Raises:
        PrivateFileUnusable: It exists, or cannot be made.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        try:
            write_private(unfinished, content)
            # Of several who make the same one exactly one succeeds, and never with half a file.
            os.link(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise PrivateFileUnusable(f"cannot be made: {error.strerror}") from error


class Version(NamedTuple):
    """Differs when a file was written again, or another one has its name."""

    mtime_ns: int
    size: int
    inode: int


def version_of(path: Path) -> Version | None:
    """The version of the file that is there now; None: it cannot be told."""
    try:
        return _version(path.stat())
    except OSError:
        return None


def version_of_open(file: BinaryIO) -> Version:
    """The version of a file that was opened, whatever its name leads to a moment later."""
    return _version(os.fstat(file.fileno()))


def _version(status: os.stat_result) -> Version:
    return Version(status.st_mtime_ns, status.st_size, status.st_ino)
