"""What the handles of both clients share: where their authority is, and that it exists once."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType

from peculium.capability import Affine
from peculium.errors import CapabilityMoved

_PACKAGE = str(Path(__file__).parent) + os.sep
# Frames of these stand between a coroutine and the code that had it run.
_MACHINERY = (_PACKAGE, f"{os.sep}asyncio{os.sep}", f"{os.sep}contextlib.py")


class _Here:
    """Stands for this process: a forked child gets another one."""


_here = _Here()


def _forget() -> None:
    # As a number that each check compares, the process's id would be a system call each time.
    global _here  # noqa: PLW0603 - one per process
    _here = _Here()


os.register_at_fork(after_in_child=_forget)


class Process:
    """The process that a client was made in. A fork copies memory, and so it would copy authority."""

    def __init__(self) -> None:
        self._id = os.getpid()
        self._here = _here

    def check(self, what: str) -> None:
        """Refuse to go on in a forked child.

        Raises:
            CapabilityMoved: This is another process.
        """
        if self._here is not _here:
            raise CapabilityMoved(
                f"the {what} stayed in process {self._id}, this is process {os.getpid()}, forked "
                "from it: connect after the fork, and hand budgets over as capabilities"
            )


class Handle(Affine):
    """Authority that is in this object, until it moves."""

    def __init__(self, process: Process, name: str) -> None:
        self._process = process
        self._name = name
        """What it is, for errors."""
        self._moved: str | None = None
        self._moving_lock = threading.Lock()

    @property
    def moved(self) -> bool:
        """Whether the authority is not in this handle any more."""
        return self._moved is not None

    def _check(self) -> None:
        """Refuse to go on without authority, before anything is sent.

        Raises:
            CapabilityMoved: It has moved, or this is a forked child.
        """
        self._process.check(self._name)
        if self._moved is not None:
            raise CapabilityMoved(f"the {self._name} {self._moved}", budget=self._about)

    @property
    def _about(self) -> str | None:
        """The budget concerned, for errors."""
        raise NotImplementedError

    def _move(self, how: str) -> None:
        """Take the authority out of the handle; of several threads, one succeeds.

        Raises:
            CapabilityMoved: It has moved, or this is a forked child.
        """
        with self._moving_lock:
            self._check()
            self._moved = f"{how} at {caller()}"

    @contextmanager
    def _moving(self, how: str) -> Iterator[None]:
        """Take the authority out of the handle, and put it back if that fails.

        If it is not known whether it failed, the line knows what is unresolved, and says so to the
        next verb.
        """
        self._move(how)
        try:
            yield
        except BaseException:
            self._moved = None
            raise


@lru_cache(maxsize=1024)
def _is_machinery(name: str) -> bool:
    return any(part in name for part in _MACHINERY)


def caller() -> str:
    """Where in the caller's own code we are, as file:line."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the documented way to the frame
    while frame is not None:
        name = frame.f_code.co_filename
        if not _is_machinery(name):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place (in a task of its own)"
