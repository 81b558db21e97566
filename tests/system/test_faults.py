"""Servers and databases that die and drain under load: nothing acknowledged is lost or done twice."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import grpc
import pytest

from peculium.v1 import ledger_service_pb2 as ledger
from tests.server import StartServer
from tests.system.load import check, under_load
from tests.system.wire import (
    HOLDER,
    AioWire,
    Told,
    Wire,
    grant_of,
    header,
    id_text,
    told,
)

pytestmark = pytest.mark.timeout(240)

STOP_SECONDS_MAX = 30
BUSY_CALLS = 500


async def test_agents_survive_a_server_that_is_killed_and_nothing_is_lost_or_done_twice(
    start_server: StartServer, database: str
) -> None:
    server = start_server("--database-url", database)
    address = server.address
    async with under_load(address) as load:
        for _ in range(3):
            await load.progress(100)
            server.kill()
            server = await asyncio.to_thread(
                start_server, "--database-url", database, listen=address
            )
        await load.progress(100)
    await check(address, load)


async def test_agents_do_not_notice_that_their_server_is_replaced(
    start_server: StartServer, database: str
) -> None:
    server = start_server("--database-url", database)
    address = server.address
    async with under_load(address) as load:
        await load.progress(100)
        assert await asyncio.to_thread(server.stop) == 0
        await asyncio.to_thread(start_server, "--database-url", database, listen=address)
        await load.progress(100)
    await check(address, load)


async def test_a_server_that_is_stopped_in_its_tracks_holds_nobody_up_for_long(
    start_server: StartServer, database: str
) -> None:
    paused, other = (start_server("--database-url", database) for _ in range(2))
    async with (
        under_load(paused.address, "first") as first,
        under_load(other.address, "second") as second,
    ):
        await first.progress(100)
        for _ in range(2):
            paused.process.send_signal(signal.SIGSTOP)
            await second.progress(200)
            paused.process.send_signal(signal.SIGCONT)
            await first.progress(100)
    await check(other.address, first)
    await check(paused.address, second)


class Impolite:
    """Spends without the SDK, which would try again, until there is no answer."""

    def __init__(self, root_id: bytes) -> None:
        self._root_id = root_id
        self.answered: set[str] = set()
        self.failures: list[Told] = []
        self.busy = asyncio.Event()
        """Set when much was answered."""

    async def spend(self, connection: AioWire) -> None:
        while True:
            request = ledger.SpendRequest(
                header=header(self._root_id, self._root_id, HOLDER), amount=1
            )
            try:
                await connection.ledger.Spend(request, timeout=STOP_SECONDS_MAX)
            except grpc.aio.AioRpcError as error:
                self.failures.append(told(error))
                return
            self.answered.add(id_text(request.header.operation_id))
            if len(self.answered) == BUSY_CALLS:
                self.busy.set()


async def test_a_server_that_drains_answers_everything_that_it_has_done(
    start_server: StartServer, database: str
) -> None:
    server = start_server("--database-url", database)
    grant = grant_of("acme", 10**9, holder="dev")
    with Wire(server.address) as wire:
        wire.admin.Grant(grant)
    impolite = Impolite(grant.header.root_id)
    async with contextlib.AsyncExitStack() as open_, asyncio.TaskGroup() as working:
        for _ in range(8):
            connection = await open_.enter_async_context(AioWire(server.address))
            for _ in range(8):
                working.create_task(impolite.spend(connection))
        await impolite.busy.wait()
        assert await asyncio.to_thread(server.stop) == 0

    # What the transport has not handed over by then, it cancels itself.
    ends = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert {failure.code for failure in impolite.failures} <= ends
    assert {failure.reason for failure in impolite.failures} <= {"", "DRAINING"}
    with Wire(start_server("--database-url", database).address) as wire:
        entries = wire.entries(grant.header.root_id)
        recorded = {id_text(entry.operation_id) for entry in entries}
        assert recorded == impolite.answered | {id_text(grant.header.operation_id)}
        assert wire.verified()
