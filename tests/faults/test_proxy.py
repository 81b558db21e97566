"""The fault proxy does to connections what it says: a broken one would let any campaign pass."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from random import Random

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from peculium_server.store.wire import Connection, Statement, Step
from tests.faults.proxy import CommitCut, Faults, Proxy
from tests.postgres import Server as PostgresServer

LONG_SECONDS = 30
"""No test waits so long for something that happens."""


class Echo:
    """A server that sends back what it receives, and keeps it."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.address = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                self.received.append(data)
                writer.write(data)
                await writer.drain()
        writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    served = Echo()
    server = await asyncio.start_server(served.serve, "127.0.0.1", 0)
    served.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield served
    server.close()


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    async with Proxy(echo.address, Random(1)) as running:
        yield running


class Caller:
    """One connection through the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, data: bytes) -> bytes:
        """Send, and wait for as much."""
        self.writer.write(data)
        async with asyncio.timeout(LONG_SECONDS):
            return await self.reader.readexactly(len(data))

    async def end(self) -> bytes | None:
        """What comes until the connection ends; None if it is reset."""
        async with asyncio.timeout(LONG_SECONDS):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return None


@contextlib.asynccontextmanager
async def calling(proxy: Proxy) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _until(true: object) -> None:
    """Wait until a condition holds."""
    assert callable(true)
    async with asyncio.timeout(LONG_SECONDS):
        while not true():
            await asyncio.sleep(0.005)


async def test_without_a_fault_everything_arrives_as_it_was_sent(proxy: Proxy) -> None:
    data = Random(2).randbytes(300_000)
    async with calling(proxy) as caller:
        assert await caller.ask(data) == data
    assert proxy.cuts == 0
    assert proxy.carried == {"up": len(data), "down": len(data)}


async def test_latency_holds_up_what_goes_its_way(proxy: Proxy) -> None:
    async with calling(proxy) as caller:
        proxy.trouble(up=Faults(latency_seconds=0.2), down=Faults(latency_seconds=0.1))
        begun = time.monotonic()
        await caller.ask(b"hello")
        assert time.monotonic() - begun >= 0.3


async def test_jitter_is_never_the_same_twice(proxy: Proxy) -> None:
    async with calling(proxy) as caller:
        proxy.trouble(up=Faults(latency_seconds=0.01, jitter_seconds=0.05))
        took = set()
        for _ in range(5):
            begun = time.monotonic()
            await caller.ask(b"hello")
            took.add(time.monotonic() - begun)
        assert min(took) >= 0.01
        assert max(took) - min(took) > 0.002


async def test_slices_arrive_one_by_one_and_whole(proxy: Proxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        proxy.trouble(up=Faults(slice_bytes=1, latency_seconds=0.001))
        assert await caller.ask(b"hello, world") == b"hello, world"
    assert b"".join(echo.received) == b"hello, world"
    assert len(echo.received) > 1


async def test_a_black_hole_swallows_on_connections_that_are_there_and_on_new_ones(
    proxy: Proxy, echo: Echo
) -> None:
    async with calling(proxy) as old:
        await old.ask(b"before")
        proxy.trouble(up=Faults(swallow=True), down=Faults(swallow=True))
        async with calling(proxy) as new:
            for caller in (old, new):
                caller.writer.write(b"lost")
                await caller.writer.drain()
            await _until(lambda: proxy.cuts == 2)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await old.reader.read(1)
            assert echo.received == [b"before"]
            await proxy.heal()
            # They lost bytes, and can never be whole again.
            assert await old.end() is None
            assert await new.end() is None
        async with calling(proxy) as later:
            assert await later.ask(b"after") == b"after"


async def test_an_answer_alone_can_be_swallowed(proxy: Proxy, echo: Echo) -> None:
    proxy.trouble(down=Faults(swallow=True))
    async with calling(proxy) as caller:
        caller.writer.write(b"heard")
        await _until(lambda: proxy.cuts == 1)
        assert echo.received == [b"heard"]
        await proxy.heal()
        assert await caller.end() is None


async def test_what_is_held_arrives_when_the_fault_ends(proxy: Proxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        await caller.ask(b"before")
        proxy.trouble(up=Faults(held=True))
        asked = asyncio.create_task(caller.ask(b"later"))
        await _until(lambda: proxy.cuts == 1)
        assert echo.received == [b"before"]
        await proxy.heal()
        assert await asked == b"later"


async def test_a_connection_is_cut_after_as_many_bytes_as_said(proxy: Proxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        await caller.ask(b"not counted")
        proxy.trouble(up=Faults(cut_after_bytes=7))
        assert await caller.ask(b"hello") == b"hello"
        caller.writer.write(b"world")
        assert await caller.end() is None
    await _until(lambda: b"".join(echo.received) == b"not countedhellowo")
    assert proxy.cuts == 1


async def test_a_reset_ends_connections_by_rst_at_both_ends(proxy: Proxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        await caller.ask(b"hello")
        assert proxy.reset() == 1
        assert await caller.end() is None
    await _until(lambda: proxy.connections == 0)
    assert proxy.cuts == 1


async def test_connections_are_refused_until_it_heals_and_the_port_stays(proxy: Proxy) -> None:
    port = proxy.port
    async with calling(proxy) as caller:
        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        assert await caller.ask(b"still there") == b"still there"
    await proxy.heal()
    async with calling(proxy) as caller:
        assert await caller.ask(b"back") == b"back"
    assert proxy.port == port


async def test_new_connections_go_where_the_target_is_now(proxy: Proxy) -> None:
    other = Echo()
    server = await asyncio.start_server(other.serve, "127.0.0.1", 0)
    proxy.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with calling(proxy) as caller:
        await caller.ask(b"hello")
    assert other.received == [b"hello"]
    server.close()


async def test_a_target_that_is_gone_ends_the_connection(proxy: Proxy) -> None:
    async with Proxy("127.0.0.1:1", Random(1)) as nowhere, calling(nowhere) as caller:
        assert await caller.end() in {None, b""}


# -- COMMIT ------------------------------------------------------------------------------------------

_BEGIN = Step(Statement(b"begin", b"BEGIN"))
_COMMIT = Step(Statement(b"commit", b"COMMIT"))


def _noted(number: int) -> Step:
    return Step(
        Statement(f"note{number}".encode(), f"INSERT INTO noted VALUES ({number})".encode())
    )


@pytest.fixture
async def through(postgres: PostgresServer, empty_database: str) -> AsyncIterator[Proxy]:
    """A proxy before a database with an empty table."""
    facts = conninfo_to_dict(empty_database)
    host, port = str(facts["host"]), facts.get("port", 5432)
    target = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else f"{host}:{port}"
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("CREATE TABLE noted (number integer)")
    async with Proxy(target, Random(1)) as running:
        yield running


def _dsn(proxy: Proxy, database: str) -> str:
    return make_conninfo(database, host="127.0.0.1", port=proxy.port)


def _numbers(database: str) -> list[int]:
    with psycopg.connect(database) as connection:
        return [number for (number,) in connection.execute("SELECT number FROM noted")]


async def test_a_commit_is_carried_out_and_its_reply_is_cut(
    through: Proxy, empty_database: str
) -> None:
    connection = await Connection.connect(_dsn(through, empty_database), autocommit=True)
    await connection.fly([_BEGIN, _noted(1), _COMMIT])
    through.cut_commits(CommitCut.BEFORE_REPLY)
    with pytest.raises(psycopg.OperationalError):
        await connection.fly([_BEGIN, _noted(2), _COMMIT])
    assert _numbers(empty_database) == [1, 2]
    assert (through.commits_cut, through.cuts) == (1, 1)


async def test_a_connection_that_is_cut_at_its_commit_leaves_the_database_at_work(
    through: Proxy, empty_database: str
) -> None:
    connection = await Connection.connect(_dsn(through, empty_database), autocommit=True)
    await connection.fly([_BEGIN, _noted(1)])
    through.cut_commits(CommitCut.AT_ONCE)
    with pytest.raises(psycopg.OperationalError):
        await connection.fly([_noted(2), _COMMIT])
    await _until(lambda: _numbers(empty_database) == [1, 2])
    assert through.commits_cut == 1


async def test_what_is_not_a_commit_is_not_cut(through: Proxy, empty_database: str) -> None:
    through.cut_commits(CommitCut.BEFORE_REPLY)
    connection = await Connection.connect(_dsn(through, empty_database), autocommit=True)
    # It says so in a text, not as a statement of that name.
    await connection.fly([Step(Statement(b"look", b"SELECT 'commit'"))])
    await connection.fly([_noted(1)])
    assert through.commits_cut == 0
    await through.heal()
    await connection.fly([_BEGIN, _noted(2), _COMMIT])
    assert through.commits_cut == 0
    await connection.close()


async def test_a_commit_is_recognised_however_it_is_sliced(
    through: Proxy, empty_database: str
) -> None:
    # Two proxies: the first one slices what the second one has to understand.
    async with Proxy(through.address, Random(1)) as slicing:
        slicing.trouble(up=Faults(slice_bytes=3))
        connection = await Connection.connect(_dsn(slicing, empty_database), autocommit=True)
        await connection.fly([_BEGIN, _noted(1)])
        through.cut_commits(CommitCut.BEFORE_REPLY)
        with pytest.raises(psycopg.OperationalError):
            await connection.fly([_noted(2), _COMMIT])
    assert _numbers(empty_database) == [1, 2]


async def test_the_store_names_its_commit_as_the_proxy_expects() -> None:
    from peculium_server.store import lane
    from tests.faults.proxy import _Commits

    assert lane._COMMIT.statement.name == _Commits.STATEMENT
