"""Clients that are many and idle, slow to ask, or slow to listen: the others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator, Callable, Iterator

import psutil
import pytest

from peculium.v1 import audit_service_pb2 as audit, ledger_service_pb2 as ledger
from tests.server import RunningServer, StartServer
from tests.system.calls import granted, spend_of
from tests.system.http2 import DATA, END_STREAM, HEADERS, Peer, frame, message
from tests.system.wire import AioWire

pytestmark = pytest.mark.timeout(120)

IDLE_CLIENTS = 1_000
FILES_ALLOWED = 256
"""Fewer than there are clients; what a server is started with may be as few."""
BYTES_OF_IDLE_MAX = 100_000
"""Of the server's memory, for each client."""
SLOW_CLIENTS = 20
SPEND = "/peculium.v1.LedgerService/Spend"
VERIFY = "/peculium.v1.AuditService/Verify"


@contextlib.contextmanager
def allowed_files(count: int) -> Iterator[None]:
    """How many files may be open, here and in what is started meanwhile."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, most), most))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


@contextlib.asynccontextmanager
async def peers(
    address: str, count: int, *, window: int | None = None
) -> AsyncIterator[list[Peer]]:
    async with contextlib.AsyncExitStack() as connected:
        made = [await Peer.connect(address, window=window) for _ in range(count)]
        for peer in made:
            connected.callback(peer.close)
        yield made


async def becomes_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nobody tells when
            await asyncio.sleep(0.05)


async def work(connection: AioWire, root_id: bytes) -> None:
    """What others do meanwhile."""
    for _ in range(10):
        await connection.ledger.Spend(spend_of(root_id), timeout=20)
    answers = [each async for each in connection.audit.Verify(audit.VerifyRequest(), timeout=20)]
    assert answers[-1].verdict.verified


async def test_a_thousand_idle_clients_cost_little_and_hold_up_nobody(
    start_server: StartServer, database: str
) -> None:
    with allowed_files(FILES_ALLOWED):
        server = await asyncio.to_thread(start_server, "--database-url", database)
    process = psutil.Process(server.process.pid)
    async with AioWire(server.address) as connection:
        root_id = await granted(connection, "acme")
        await work(connection, root_id)
        files, memory = process.num_fds(), process.memory_info().rss
        with allowed_files(4 * IDLE_CLIENTS):
            async with peers(server.address, IDLE_CLIENTS):
                assert process.num_fds() >= files + IDLE_CLIENTS
                assert process.memory_info().rss - memory < IDLE_CLIENTS * BYTES_OF_IDLE_MAX
                await work(connection, root_id)
        await becomes_true(lambda: process.num_fds() < files + IDLE_CLIENTS // 10)
        await work(connection, root_id)


async def test_who_is_slow_to_ask_is_answered_and_holds_up_nobody(
    running_server: RunningServer,
) -> None:
    async with AioWire(running_server.address) as connection:
        root_id = await granted(connection, "acme")
        request = spend_of(root_id)
        body = message(request.SerializeToString())
        async with peers(running_server.address, SLOW_CLIENTS) as slow:
            for peer in slow:
                await peer.begin(1, SPEND)
            # A byte at a time, each a frame of its own; the last one is kept back.
            for start in range(len(body) - 1):
                for peer in slow:
                    await peer.send(frame(DATA, 0, 1, body[start : start + 1]))
            await work(connection, root_id)
            for peer in slow:
                await peer.send(frame(DATA, END_STREAM, 1, body[-1:]))
            answers = [await peer.until(DATA) for peer in slow]
        outcomes = [ledger.SpendResponse.FromString(answer[5:]).outcome for answer in answers]
        # All of them have asked for the same operation.
        assert sorted(outcome.replayed for outcome in outcomes) == [False] + [True] * (
            len(slow) - 1
        )


async def test_who_does_not_take_its_answer_holds_up_nobody(
    start_server: StartServer, served_database: str
) -> None:
    """More of them verify than may at a time, and none has room for a single byte of the answer."""
    flags = ("--database-url", served_database, "--principal-streams-max", "0")
    server = await asyncio.to_thread(start_server, *flags)
    async with AioWire(server.address) as connection:
        root_id = await granted(connection, "acme")
        async with peers(server.address, SLOW_CLIENTS, window=0) as deaf:
            for peer in deaf:
                await peer.begin(1, VERIFY)
                await peer.ask(1, audit.VerifyRequest().SerializeToString())
            for peer in deaf:
                # It is answered, but for what the client has no room for.
                await peer.until(HEADERS)
            await work(connection, root_id)
