"""The reserve-and-refund counter in Redis, and a Redis of one's own."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.faults.proxy import Proxy
from tests.replay.agents import Gate, Seat
from tests.replay.contestants import AGAIN_SECONDS, Contestant, CounterGate, proxied, twice
from tests.replay.counters import Budgets, Counter, taken, write
from tests.replay.plays import Scenario

_SCRIPTS = {
    "make": "redis.call('SET', KEYS[1], ARGV[1], 'NX') return redis.call('GET', KEYS[1])",
    "reserve": (
        "if tonumber(redis.call('GET', KEYS[1]) or 0) < tonumber(ARGV[1]) then return -1 end"
        " return redis.call('DECRBY', KEYS[1], ARGV[1])"
    ),
    "refund": "return redis.call('INCRBY', KEYS[1], ARGV[1])",
    "stop": (
        "if tonumber(redis.call('GET', KEYS[1]) or 0) > 0 then redis.call('SET', KEYS[1], 0) end"
        " return 0"
    ),
    "look": "return redis.call('GET', KEYS[1]) or 0",
}


def redis_program() -> str | None:
    """Where a Redis is, if there is one."""
    return next(filter(None, map(shutil.which, ("redis-server", "valkey-server"))), None)


class Redis:
    """A Redis with the settings that it comes with."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start it, and end it."""
        try:
            self.start()
            yield
        finally:
            self.kill()

    def start(self) -> None:
        """Start it with what it has saved, and wait until it can be reached."""
        program = redis_program()
        assert program is not None
        self._process = subprocess.Popen(
            [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            time.sleep(AGAIN_SECONDS)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class InRedis(Contestant):
    """N2 in Redis: the check and the change are one script. Its settings are those it comes with."""

    name = "Redis script"
    title = "N2: reserve and refund, by a script in Redis"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._server = Redis(folder / "redis")
        self._caps: dict[str, int] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start it."""
        with self._server.running():
            async with Proxy(f"127.0.0.1:{self._server.port}", Random(0)) as self.proxy:
                yield

    async def seats(self, trial: str, scenario: Scenario) -> Sequence[Seat]:
        """Make a counter."""
        budgets = Budgets.of(trial, scenario)
        self._caps.update(budgets.made)
        for name, cap in budgets.made.items():
            await connection(self._server.port).do("make", name, cap)
        port = self._server.port
        if proxied(scenario):
            assert self.proxy is not None
            port = self.proxy.port
        return [
            RedisSeat(port, name, share)
            for name, share in zip(budgets.names, budgets.shares, strict=True)
        ]

    async def left(self, trial: str) -> int | None:
        """What is available."""
        return await connection(self._server.port).do("look", trial, 0)

    async def kill(self) -> None:
        """Kill it. It starts again with what it has saved, and counters are made that are not there."""
        self._server.kill()
        await asyncio.to_thread(self._server.start)
        for trial, cap in self._caps.items():
            await connection(self._server.port).do("make", trial, cap)

    async def revoke(self, trial: str) -> None:
        """Leave nothing to be reserved."""
        await connection(self._server.port).do("stop", trial, 0)


@dataclass(frozen=True)
class RedisSeat:
    """Where the counter is."""

    port: int
    trial: str
    share: int | None

    @asynccontextmanager
    async def sit(self, process: int) -> AsyncIterator[Gate]:
        """Use the process's connection; take the share, if there are shares, and bring the rest back."""
        del process
        async with taken(connection(self.port), self.trial, self.share) as store:
            yield CounterGate(store)


class Connection(Counter):
    """A connection, on which commands follow each other without waiting."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._waiting: list[asyncio.Future[int]] = []
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()

    async def do(self, verb: str, name: str, amount: int) -> int:
        return await self.run(_SCRIPTS[verb], name, amount)

    async def run(self, script: str, name: str, amount: int = 0) -> int:
        """What a script says of a key."""
        return await twice(lambda: self._ask(script, name, amount), OSError)

    async def _ask(self, script: str, name: str, amount: int) -> int:
        async with self._connecting:
            if self._writer is None:
                reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
                self._reading = asyncio.create_task(self._read(reader))
        write(self._writer, _command("EVAL", script, "1", name, str(amount)))
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        return await answer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                if line.startswith(b"$"):
                    line = b":" + await reader.readline()
                if not line.startswith(b":"):
                    raise ValueError(line)
                self._waiting.pop(0).set_result(int(line[1:]))
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(ConnectionResetError())
        self._waiting.clear()


def _command(*words: str) -> bytes:
    parts = [f"*{len(words)}\r\n".encode()]
    for word in words:
        content = word.encode()
        parts.append(b"$%d\r\n%s\r\n" % (len(content), content))
    return b"".join(parts)


_connections: dict[int, Connection] = {}


def connection(port: int) -> Connection:
    """This process's to a Redis."""
    return _connections.setdefault(port, Connection(port))
