"""A server on a real database, and the store behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.rpc.wire import Stored, storing


@pytest.fixture
async def stored(database: str) -> AsyncIterator[Stored]:
    async with storing(database) as running:
        yield running
