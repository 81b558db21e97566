"""A server that is told to stop while its database says nothing."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from random import Random

import grpc
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.faults.proxy import Faults, Proxy
from tests.server import RunningServer, StartServer
from tests.system.calls import granted, spend_of
from tests.system.wire import AioWire

STOP_SECONDS_MAX = 10
"""Much less than an operation without a deadline would be waited for."""


@pytest.fixture
async def between(database: str) -> AsyncIterator[Proxy]:
    """What the database is reached by."""
    found = conninfo_to_dict(database)
    host = str(found["host"])
    target = (
        f"{host}/.s.PGSQL.{found['port']}" if host.startswith("/") else f"{host}:{found['port']}"
    )
    chance = Random(11)  # noqa: S311 - nothing is left to it
    async with Proxy(target, chance) as proxy:
        yield proxy


@pytest.mark.parametrize("told", [1, 2], ids=["once", "twice"])
async def test_a_server_that_is_told_to_stop_does_not_wait_for_a_silent_database(
    between: Proxy, database: str, start_server: StartServer, told: int
) -> None:
    dsn = make_conninfo(database, host="127.0.0.1", port=between.port)
    # Told twice it does not even wait for what it has accepted.
    drain = "1" if told == 1 else "60"
    server = await asyncio.to_thread(start_server, "--database-url", dsn, "--drain-seconds", drain)
    async with AioWire(server.address) as connection:
        root_id = await granted(connection, "acme")
        between.trouble(up=Faults(swallow=True), down=Faults(swallow=True))
        spending = asyncio.ensure_future(connection.ledger.Spend(spend_of(root_id)))
        await carried(between)
        server.process.send_signal(signal.SIGTERM)
        if told == 2:
            await stopping(server)
            server.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.process.wait, STOP_SECONDS_MAX) == 0
        with pytest.raises(grpc.aio.AioRpcError):
            await spending


async def carried(proxy: Proxy) -> None:
    """Wait until something was swallowed."""
    async with asyncio.timeout(30):
        while not proxy.cuts:  # noqa: ASYNC110 - nobody tells when
            await asyncio.sleep(0.01)


async def stopping(server: RunningServer) -> None:
    """Wait until it has said so."""
    async with asyncio.timeout(30):
        while not any(line.startswith("stopping") for line in server.said):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
