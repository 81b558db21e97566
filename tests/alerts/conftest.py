"""A ledger on a database of the test's own, and what looks for alerts in it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from peculium_server import alerter
from tests.alerts.watched import Watched
from tests.sweeper.fleet import Fleet


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum up a subtree however short a time ago that was done."""
    monkeypatch.setattr(alerter, "SUM_SHARE", 0)


@pytest.fixture
async def fleet(database: str) -> AsyncIterator[Fleet]:
    """Who writes."""
    async with Fleet.opened(database) as opened:
        yield opened


@pytest.fixture
async def watched(database: str, fleet: Fleet) -> AsyncIterator[Watched]:
    """One server's alerter; it looks when it is told to."""
    async with Watched.opened(database, fleet) as opened:
        yield opened


@pytest.fixture
async def other(database: str, fleet: Fleet) -> AsyncIterator[Watched]:
    """Another server's."""
    async with Watched.opened(database, fleet) as opened:
        yield opened
