"""The demonstration's processes: each starts with a log of its own, and none outlives the block."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Self

from peculium_server.demo.channel import Channel
from peculium_server.embedded import EmbeddedPostgres

START_SECONDS_MAX: Final = 180
STOP_SECONDS_MAX: Final = 60
_POLL_SECONDS: Final = 0.05
_LOG_TAIL_LINES: Final = 15


class ProcessFailed(Exception):
    """A process did not start, or could not go on; the message ends with what it logged last."""


@dataclass(frozen=True, slots=True)
class _Started:
    name: str
    process: Process
    log: Path

    def failed(self, sentence: str) -> ProcessFailed:
        tail = self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return ProcessFailed("\n".join([sentence, *tail]))


class Processes:
    """A context manager: at its end the processes end, the last one first."""

    def __init__(self, folder: Path) -> None:
        """`folder` is where they log."""
        self._folder = folder
        self._ready_file = folder / "ready.json"
        self._started: list[_Started] = []
        self._server: asyncio.Future[_Started] = asyncio.get_running_loop().create_future()
        self._data_dir: Path | None = None

    async def server(self, data_dir: Path) -> None:
        """Start a ledger with a PostgreSQL of its own in `data_dir`."""
        # An empty flag beats a variable of the environment, which means another server.
        settings = {
            "database-url": "",
            "keys-file": "",
            "data-dir": str(data_dir),
            "listen": "127.0.0.1:0",
            "ready-file": str(self._ready_file),
        }
        flags = [f"--{name}={value}" for name, value in settings.items()]
        self._data_dir = data_dir
        server = await self._start("server", "peculium_server", "serve", *flags, stdin=DEVNULL)
        self._server.set_result(server)

    async def listening(self) -> str:
        """Wait until the server that was started is ready; where it listens, as host:port.

        Raises:
            ProcessFailed: It does not come up.
        """
        server = await self._server
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                while not self._ready_file.exists():  # noqa: ASYNC110 - it is another process's
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise server.failed("the server did not become ready") from None
        address: str = json.loads(self._ready_file.read_text())["listening"]
        return address

    async def member(self, name: str, module: str) -> Channel:
        """Start a module of the demonstration as a process, with a channel to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            await self._start(name, module, stdin=theirs.fileno())
        return await Channel.over(ours, name)

    async def server_ended(self) -> NoReturn:
        """Wait until the server ends, which it should not.

        Raises:
            ProcessFailed: It did.
        """
        server = await self._server
        await server.process.wait()
        when = "in the middle of the run" if self._ready_file.exists() else "before it was ready"
        raise server.failed(f"the server ended {when}")

    def failed(self, name: str, sentence: str) -> ProcessFailed:
        """What to raise if a process cannot go on: the sentence, and what the process has logged."""
        (started,) = (started for started in self._started if started.name == name)
        return started.failed(sentence)

    async def _start(self, name: str, module: str, *arguments: str, stdin: int) -> _Started:
        log = self._folder / f"{name}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                # -P: a folder that we happen to be started in does not hide our packages.
                *(sys.executable, "-P", "-m", module, *arguments),
                stdin=stdin,
                stdout=output,
                stderr=STDOUT,
                # A Ctrl-C is for this process alone: it ends the others in order.
                start_new_session=True,
            )
        started = _Started(name, process, log)
        self._started.append(started)
        return started

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for started in reversed(self._started):
            await _stop(started.process)
        if self._data_dir is not None:
            await asyncio.to_thread(_stop_orphaned_postgres, self._data_dir)


async def _stop(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_SECONDS_MAX):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _stop_orphaned_postgres(data_dir: Path) -> None:
    """Stop the PostgreSQL that a server leaves behind if it is killed."""
    if (data_dir / "cluster" / "postmaster.pid").exists():
        EmbeddedPostgres.start(data_dir).stop()
