"""Servers forked from a process that has imported all they need: a second of work less for each.

They differ from `python -m peculium_server` in nothing but that: the command line, environment, limits,
output and exit code are a program's. What the system's loader reads in the environment comes too late
for them, and is refused.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from peculium_server.cli import main
from peculium_server.config import quieten_grpc

# Whatever a server would import before it serves; nothing of it starts a thread.
PRELOADED = [
    "peculium_server.cli.verbs",
    "peculium_server.app",
    "uvloop",
    "tests.forked",
    "tests.frozen",
]

_LOADED_FIRST = "LD_PRELOAD"

# A program does so before it imports what those that are forked have imported already.
quieten_grpc()
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Forked:
    """The command line in a process of its own. What it has in common with Popen is as there."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        if environment.get(_LOADED_FIRST) != os.environ.get(_LOADED_FIRST):
            raise ValueError(f"{_LOADED_FIRST} says nothing to a process that is forked")
        reading, writing = _context.Pipe(duplex=False)
        with reading, writing:
            self._process = _context.Process(
                target=_run,
                args=(
                    *(list(arguments), dict(environment)),
                    *(resource.getrlimit(resource.RLIMIT_NOFILE), writing),
                ),
                daemon=True,
            )
            self._process.start()
            self.stderr = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("peculium", timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.wait()
        self.stderr.close()
        self._process.close()


def _run(
    arguments: list[str],
    environment: dict[str, str],
    files: tuple[int, int],
    writing: Connection,
) -> None:
    """Be the program, in the forked process."""
    with writing, Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(writing.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_NOFILE, files)
    sys.argv = ["peculium", *arguments]
    main()
