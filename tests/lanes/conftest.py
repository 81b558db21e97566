"""A ledger in memory."""

from __future__ import annotations

import pytest

from peculium_server.lanes.ledger import Ledger
from tests.lanes.memory import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def ledger(store: MemoryStore) -> Ledger:
    return Ledger(store, queue_rows_max=1_000)
