"""A client whose principal has reached a limit of the server: it waits as told, or says so in time."""

from __future__ import annotations

import asyncio

import pytest

import peculium
from peculium import Child
from peculium.errors import LedgerUnavailable
from tests.server import RunningServer, StartServer

AGENTS = 150
CHILDREN = 150
"""As many operations and more: at one a second, minutes of them."""
TIMEOUT_SECONDS = 30


@pytest.fixture
def slow(start_server: StartServer, served_database: str) -> RunningServer:
    """A server that lets a principal ask for two hundred operations a second."""
    return start_server(
        *("--database-url", served_database),
        *("--principal-rate-max", "200", "--principal-burst-max", "1"),
    )


@pytest.fixture
def stingy(start_server: StartServer, served_database: str) -> RunningServer:
    """A server that lets a principal ask for a few operations, and for next to none after them."""
    return start_server(
        *("--database-url", served_database),
        *("--principal-rate-max", "1", "--principal-burst-max", "30"),
    )


async def test_a_fleet_that_asks_for_more_than_it_may_is_served_in_time(
    slow: RunningServer,
) -> None:
    async with peculium.aio.connect(slow.address, timeout=60) as client:
        await client.admin.grant("acme", unit="calls", amount=AGENTS, holder="dev")
        acme = await client.open("acme")
        await asyncio.gather(*(acme.spend(1) for _ in range(AGENTS)))
        assert (await acme.balances()).spent == AGENTS


async def test_who_cannot_wait_as_long_is_told_why_and_that_nothing_was_done(
    stingy: RunningServer,
) -> None:
    async with peculium.aio.connect(stingy.address, timeout=TIMEOUT_SECONDS) as client:
        made = await client.admin.grant("acme", unit="calls", amount=CHILDREN)
        acme = await client.accept(made.capability)
        await acme.delegate([Child(f"run-{number}", 1) for number in range(CHILDREN)])
        with pytest.raises(LedgerUnavailable, match="RESOURCE_EXHAUSTED: The caller asks for more"):
            await client.admin.top_up("acme", 1)


def test_the_blocking_client_is_told_the_same(stingy: RunningServer) -> None:
    with peculium.connect(stingy.address, timeout=TIMEOUT_SECONDS) as client:
        acme = client.accept(client.admin.grant("acme", unit="calls", amount=CHILDREN).capability)
        acme.delegate([Child(f"run-{number}", 1) for number in range(CHILDREN)])
        with pytest.raises(LedgerUnavailable, match="RESOURCE_EXHAUSTED: The caller asks for more"):
            client.admin.top_up("acme", 1)
