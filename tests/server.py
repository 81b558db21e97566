"""Fixtures: real server processes, each on a port of its own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from tests.forked import Forked

START_SECONDS_MAX = 30
STOP_SECONDS_MAX = 30
_READY = "listening on "


class ServerFailed(Exception):
    """A server process did not start; carries what it said."""


class Process(Protocol):
    """What runs a server, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...

    @property
    def stderr(self) -> Iterable[str] | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

    def kill(self) -> None: ...


Launch = Callable[[Sequence[str], Mapping[str, str]], AbstractContextManager[Process]]
"""Starts the command line with arguments and an environment."""


@dataclass
class RunningServer:
    """A `peculium serve` of one's own."""

    process: Process
    said: list[str] = field(default_factory=list)
    """Everything that it has written to its error stream, by line."""
    address: str = ""
    """Where it listens, as host:port."""
    reader: threading.Thread | None = None
    """Reads what it says."""

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop, wait until it has, read what it said, and return its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(STOP_SECONDS_MAX)
        self._read_rest()
        return code

    def kill(self) -> None:
        """End it without giving it a chance to do anything about it."""
        self.process.kill()
        self.process.wait(STOP_SECONDS_MAX)

    def end(self) -> None:
        """End it if it still runs, and read the rest of what it has said."""
        self.kill()
        self._read_rest()

    def _read_rest(self) -> None:
        if self.reader is not None:
            self.reader.join(STOP_SECONDS_MAX)


StartServer = Callable[..., RunningServer]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers for one test; see `starting`."""
    with starting(tmp_path, Forked) as start:
        yield start


def program(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start the program as its users do."""
    return subprocess.Popen(
        [sys.executable, "-m", "peculium_server", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def starting(directory: Path, launch: Launch = program) -> Iterator[StartServer]:
    """What starts a server with the given flags, and waits until calls are served.

    It raises ServerFailed if the server ends instead. What still runs at the end is killed.
    """
    with contextlib.ExitStack() as started:

        def start(*flags: str, listen: str = "127.0.0.1:0", **variables: str) -> RunningServer:
            ready_file = directory / f"ready-{secrets.token_hex(4)}.json"
            arguments = ("serve", "--listen", listen, "--ready-file", str(ready_file), *flags)
            process = started.enter_context(launch(arguments, {**os.environ, **variables}))
            server = RunningServer(process)
            started.callback(server.end)
            _wait_until_ready(server)
            server.address = json.loads(ready_file.read_text())["listening"]
            return server

        yield start


@pytest.fixture
def running_server(start_server: StartServer, served_database: str) -> RunningServer:
    """A server in dev mode on a database of its own: whoever calls is `dev`, and may do everything."""
    return start_server("--database-url", served_database)


def _wait_until_ready(server: RunningServer) -> None:
    """Read what the server says until it says that it listens, and keep the rest."""
    ready = threading.Event()
    stderr = server.process.stderr
    assert stderr is not None

    def read() -> None:
        for line in stderr:
            server.said.append(line.rstrip("\n"))
            if _READY in line:
                ready.set()
        ready.set()

    server.reader = threading.Thread(target=read, daemon=True)
    server.reader.start()
    listened = ready.wait(START_SECONDS_MAX)
    if not listened or not any(_READY in line for line in server.said):
        server.process.kill()
        code = server.process.wait(STOP_SECONDS_MAX)
        raise ServerFailed(f"exit code {code}:\n" + "\n".join(server.said))
