"""A ledger on a socket, and clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

import peculium
from tests.client.ledger import PRINCIPAL, Ledger, Serving, serving

ROOT_AMOUNT = 1000


@pytest.fixture
def served() -> Iterator[Serving]:
    with serving() as running:
        yield running


@pytest.fixture
def ledger(served: Serving) -> Ledger:
    return served.ledger


@pytest.fixture
async def client(served: Serving) -> AsyncIterator[peculium.aio.Client]:
    async with peculium.aio.connect(served.target) as connected:
        yield connected


@pytest.fixture
async def root(client: peculium.aio.Client) -> peculium.aio.Budget:
    """A budget of a thousand calls, held by its principal."""
    await client.admin.grant("acme", unit="calls", amount=ROOT_AMOUNT, holder=PRINCIPAL)
    return await client.open("acme")


@pytest.fixture
async def run(client: peculium.aio.Client, root: peculium.aio.Budget) -> peculium.aio.Budget:
    """A budget of a hundred calls, held by token."""
    [made] = await root.delegate([peculium.Child("run", 100)])
    return await client.accept(made.capability)


@pytest.fixture
def blocking(served: Serving) -> Iterator[peculium.Client]:
    with peculium.connect(served.target) as connected:
        yield connected


@pytest.fixture
def blocking_root(blocking: peculium.Client) -> peculium.Budget:
    blocking.admin.grant("acme", unit="calls", amount=ROOT_AMOUNT, holder=PRINCIPAL)
    return blocking.open("acme")


@pytest.fixture
def blocking_run(blocking: peculium.Client, blocking_root: peculium.Budget) -> peculium.Budget:
    [made] = blocking_root.delegate([peculium.Child("run", 100)])
    return blocking.accept(made.capability)
