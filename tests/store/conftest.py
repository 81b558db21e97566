"""A store on a database of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from peculium_server.store.store import Store
from tests.store.spender import Spender
from tests.store.stored import StoredLedger


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    opened = await Store.open(database)
    yield opened
    await opened.close()


@pytest.fixture
async def other_store(database: str) -> AsyncIterator[Store]:
    """Another server's."""
    opened = await Store.open(database)
    yield opened
    await opened.close()


@pytest.fixture
def ledger(store: Store) -> StoredLedger:
    return StoredLedger(store)


@pytest.fixture
def spender() -> Spender:
    return Spender()
