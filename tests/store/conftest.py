"""A store on a database of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from peculium_server.store.known import Known
from peculium_server.store.store import Store
from tests.store.spender import Spender
from tests.store.stored import StoredLedger


@pytest.fixture
async def store(served_database: str) -> AsyncIterator[Store]:
    opened = await Store.open(served_database)
    yield opened
    await opened.close()


@pytest.fixture
async def other_store(served_database: str) -> AsyncIterator[Store]:
    """Another server's."""
    opened = await Store.open(served_database)
    yield opened
    await opened.close()


@pytest.fixture(params=["loads everything", "guesses"])
def ledger(
    store: Store, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> StoredLedger:
    """Whether its writers load everything or guess what they can: the same is decided."""
    if request.param == "guesses":
        monkeypatch.setattr(Known, "ALONE_AFTER", 0)
    return StoredLedger(store)


@pytest.fixture
def spender() -> Spender:
    return Spender()
