"""A TCP proxy on loopback that does to connections what networks do, when it is told to.

It knows nothing of what it carries, but for one fault that has to strike at the worst moment: it sees
where a PostgreSQL frontend sends its COMMIT.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Self

CHUNK_BYTES = 65_536
BIND_SECONDS_MAX = 30
_LINGER_NOT = struct.pack("ii", 1, 0)
"""SO_LINGER on with no time: closing sends RST, and what was not sent is dropped."""
_GONE = (ConnectionError, TimeoutError, OSError)


class CommitCut(Enum):
    """When a connection is cut that has carried a COMMIT."""

    AT_ONCE = "at once"
    """As soon as it was forwarded: the database still works on it while its caller is gone."""
    BEFORE_REPLY = "before reply"
    """When the database replies: it was committed, or refused, and nobody is told."""


@dataclass
class Faults:
    """What befalls the bytes that go one way. The default: nothing."""

    latency_seconds: float = 0.0
    """Each chunk waits so long."""
    jitter_seconds: float = 0.0
    """And up to so much longer, by chance."""
    slice_bytes: int = 0
    """Above 0: they arrive in pieces of that size, each of them a segment of its own."""
    swallow: bool = False
    """They go nowhere, as if the other side were off. A connection that lost some can never be whole
    again: it is reset when the fault ends."""
    held: bool = False
    """They wait until the fault ends, and arrive then: what TCP makes of a partition that heals."""
    cut_after_bytes: int | None = None
    """A connection is reset once it has carried so many since the fault began."""


@dataclass(eq=False)
class _Link:
    """One connection through the proxy."""

    downstream: asyncio.StreamWriter
    """To whoever connected."""
    upstream: asyncio.StreamWriter | None = None
    """To the target; None for one that was swallowed from its beginning."""
    lost: bool = False
    """Bytes of it were swallowed."""
    counted: bool = False
    """It was counted among those that were cut or silenced."""
    carried: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    """Since the fault that counts them began."""
    doomed: bool = False
    """Its COMMIT was forwarded: the reply is its end."""

    def reset(self) -> None:
        for writer in (self.downstream, self.upstream):
            if writer is not None:
                _abort(writer)


def _abort(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    writer.transport.abort()


class Proxy:
    """Listens on a port of its own, and carries each connection to a target that may be changed.

    A context manager. `up` are the faults from those who connect to the target, `down` those back.
    """

    def __init__(self, target: str, chance: Random) -> None:
        self.target = target
        """Where new connections go, as host:port or the path of a socket."""
        self.up = Faults()
        self.down = Faults()
        self.cuts = 0
        """Connections that were cut or silenced."""
        self.commits_cut = 0
        self.carried = {"up": 0, "down": 0}
        """Bytes that have arrived, each way."""
        self._chance = chance
        self._commit_cut: tuple[CommitCut, float] | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """Where it listens, as host:port."""
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._socket = _bound(0)
        self.port = self._socket.getsockname()[1]
        await self._listen()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._deafen()
        if self._socket is not None:
            self._socket.close()
        for link in list(self._links):
            link.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- Faults ---------------------------------------------------------------------------------------

    def trouble(self, *, up: Faults | None = None, down: Faults | None = None) -> None:
        """From now on these faults befall all connections, those that are there included."""
        self.up, self.down = up or Faults(), down or Faults()
        for link in list(self._links):
            link.carried = {"up": 0, "down": 0}
            if link.lost and not (self.up.swallow or self.down.swallow):
                link.reset()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def cut_commits(self, when: CommitCut, chance: float = 1.0) -> None:
        """From now on cut connections that carry a COMMIT, each with a chance."""
        self._commit_cut = when, chance

    async def refuse(self) -> None:
        """From now on refuse connections; those that are there are left alone."""
        await self._deafen()

    def reset(self, chance: float = 1.0) -> int:
        """Reset connections that are there, each with a chance: how many."""
        struck = [link for link in self._links if self._chance.random() < chance]
        for link in struck:
            self._count(link)
            link.reset()
        return len(struck)

    async def heal(self) -> None:
        """Let everything through again, from now on."""
        self._commit_cut = None
        self.trouble()
        await self._listen()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._links)

    # -- Listening ------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        if self._server is None:
            assert self._socket is not None
            if self._socket.fileno() < 0:
                # Whoever refused connections was interrupted.
                self._socket = await _bound_again(self.port)
            self._server = await asyncio.start_server(self._accepted, sock=self._socket)

    async def _deafen(self) -> None:
        """Keep the port, and refuse who connects: a socket that is bound and does not listen."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._socket = await _bound_again(self.port)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        link = _Link(writer)
        self._links.add(link)
        try:
            await self._carry(link, reader)
        except asyncio.CancelledError:
            # Only by the end of the proxy itself.
            link.reset()
        finally:
            link.reset()
            self._links.discard(link)
            self._tasks.discard(task)

    async def _carry(self, link: _Link, reader: asyncio.StreamReader) -> None:
        if self.up.swallow and self.down.swallow:
            await self._swallow_all(link, reader)
            return
        try:
            back, link.upstream = await self._connect()
        except _GONE:
            link.reset()
            return
        commits = _Commits()
        ways = (
            asyncio.create_task(self._pump(link, "up", reader, link.upstream, commits.seen)),
            asyncio.create_task(self._pump(link, "down", back, link.downstream, None)),
        )
        try:
            await asyncio.gather(*ways)
        except _GONE:
            link.reset()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.target.startswith("/"):
            return await asyncio.open_unix_connection(self.target)
        host, _, port = self.target.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _swallow_all(self, link: _Link, reader: asyncio.StreamReader) -> None:
        link.lost = True
        self._count(link)
        with contextlib.suppress(*_GONE):
            while await reader.read(CHUNK_BYTES):
                pass

    async def _pump(
        self,
        link: _Link,
        way: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        commits: Callable[[bytes], bool] | None,
    ) -> None:
        while data := await reader.read(CHUNK_BYTES):
            if link.doomed and way == "down":
                self._cut_commit(link)
                return
            # Whether a fault asks for it or not: what a frontend sends can only be read from its start.
            committed = commits is not None and commits(data)
            cut = self._commit_cut if committed else None
            struck = cut is not None and self._chance.random() < cut[1]
            # Before it is forwarded, so that no reply is faster.
            link.doomed = link.doomed or struck
            if not await self._deliver(link, way, data, writer):
                return
            if struck and cut is not None and cut[0] is CommitCut.AT_ONCE:
                self._cut_commit(link)
                return
        with contextlib.suppress(*_GONE):
            if writer.can_write_eof():
                writer.write_eof()

    async def _deliver(
        self, link: _Link, way: str, data: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """Forward a chunk as the faults of the moment have it: whether the connection goes on."""
        await self._delay(link, way)
        faults: Faults = getattr(self, way)
        if faults.swallow:
            link.lost = True
            self._count(link)
            return True
        left = self._left(link, way)
        if left is not None and len(data) >= left:
            writer.write(data[:left])
            self.carried[way] += left
            with contextlib.suppress(*_GONE):
                await writer.drain()
            self._count(link)
            link.reset()
            return False
        link.carried[way] += len(data)
        size = faults.slice_bytes or len(data)
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            writer.write(piece)
            await writer.drain()
            self.carried[way] += len(piece)
            if size < len(data):
                # Each piece is sent before the next: TCP_NODELAY is on, asyncio's default.
                await asyncio.sleep(0)
        return True

    def _left(self, link: _Link, way: str) -> int | None:
        """How many bytes a connection may still carry; None: any number."""
        faults: Faults = getattr(self, way)
        if faults.cut_after_bytes is None:
            return None
        return max(0, faults.cut_after_bytes - link.carried[way])

    async def _delay(self, link: _Link, way: str) -> None:
        faults: Faults = getattr(self, way)
        wait = faults.latency_seconds + faults.jitter_seconds * self._chance.random()
        if wait:
            await asyncio.sleep(wait)
        while getattr(self, way).held:
            self._count(link)
            await self._changed.wait()

    def _cut_commit(self, link: _Link) -> None:
        self.commits_cut += 1
        self._count(link)
        if link.upstream is not None:
            # Not by RST, which would take back what the database has not read yet.
            link.upstream.close()
            link.upstream = None
        link.reset()

    def _count(self, link: _Link) -> None:
        if not link.counted:
            link.counted = True
            self.cuts += 1


def _bound(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    return sock


async def _bound_again(port: int) -> socket.socket:
    """Bind a port that was given up just now; somebody else's connection may have it for a moment."""
    async with asyncio.timeout(BIND_SECONDS_MAX):
        while True:
            try:
                return _bound(port)
            except OSError:
                await asyncio.sleep(0.01)


class _Commits:
    """Follows what a PostgreSQL frontend sends, to see where its COMMIT ends."""

    _SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
    STATEMENT = b"commit"
    """The name under which the store prepares it."""

    def __init__(self) -> None:
        self._pending = b""
        self._started = False
        self._bound = False
        self._lost = False

    def seen(self, data: bytes) -> bool:
        """Say whether these bytes end a flight that has a COMMIT: its Sync is among them."""
        if self._lost:
            return False
        self._pending += data
        ended = False
        while message := self._next():
            kind, body = message
            if kind == b"B":
                _, _, rest = body.partition(b"\0")
                self._bound = self._bound or rest.partition(b"\0")[0] == self.STATEMENT
            elif kind == b"S" and self._bound:
                self._bound, ended = False, True
        return ended

    def _next(self) -> tuple[bytes, bytes] | None:
        head = 1 if self._started else 0
        if len(self._pending) < head + 4:
            return None
        length = int.from_bytes(self._pending[head : head + 4])
        if not 4 <= length <= 1 << 30:
            # No PostgreSQL frontend: nothing to be seen here.
            self._lost = True
            return None
        if len(self._pending) < head + length:
            return None
        kind = self._pending[:head]
        body = self._pending[head + 4 : head + length]
        self._pending = self._pending[head + length :]
        if not self._started:
            code = int.from_bytes(body[:4])
            self._started = code not in (self._SSL_REQUEST, self._GSS_REQUEST)
        return kind or b"startup", body
