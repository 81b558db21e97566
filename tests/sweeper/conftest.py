"""A ledger on a database of the test's own, and what sweeps it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.sweeper.fleet import Fleet


@pytest.fixture
async def fleet(database: str) -> AsyncIterator[Fleet]:
    """One server's ledger, and a sweeper that works when it is told to."""
    async with Fleet.opened(database) as opened:
        yield opened
