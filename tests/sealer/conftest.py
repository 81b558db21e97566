"""A ledger on a database of the test's own, and what seals it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
from peculium_server.signing import SigningKey
from tests.rpc.wire import storing
from tests.sealer.sealing import Sealing, new_key
from tests.sweeper.fleet import Fleet


@pytest.fixture
async def fleet(database: str) -> AsyncIterator[Fleet]:
    """Who writes."""
    async with Fleet.opened(database) as opened:
        yield opened


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return new_key(tmp_path)


@pytest.fixture
async def sealing(database: str, key: SigningKey) -> AsyncIterator[Sealing]:
    async with Sealing.opened(database, key) as opened:
        yield opened


@pytest.fixture
async def other_sealing(database: str, key: SigningKey) -> AsyncIterator[Sealing]:
    """Another server's, with the same key."""
    async with Sealing.opened(database, key) as opened:
        yield opened


@pytest.fixture
async def auditor(database: str) -> AsyncIterator[Any]:
    """Who asks a server of the same ledger."""
    async with storing(database) as stored:
        yield AuditServiceStub(stored.channel)
