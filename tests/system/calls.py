"""Calls of every kind, as an outage is told to them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import grpc

from peculium.v1 import audit_service_pb2 as audit, ledger_service_pb2 as ledger, types_pb2
from tests.system.wire import HOLDER, AioWire, Told, grant_of, header, retry_seconds, told

OUTAGE = Told(grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE", {})


def ref_of(root_id: bytes) -> types_pb2.BudgetRef:
    return types_pb2.BudgetRef(root_id=root_id, budget_id=root_id)


def spend_of(root_id: bytes, operation_id: bytes | None = None) -> ledger.SpendRequest:
    return ledger.SpendRequest(
        header=header(root_id, root_id, HOLDER, operation_id=operation_id), amount=1
    )


async def granted(connection: AioWire, name: str) -> bytes:
    request = grant_of(name, 10**9, holder="dev")
    await connection.admin.Grant(request)
    return request.header.root_id


async def calls(connection: AioWire, root_id: bytes) -> list[Any]:
    """One call of each kind, without a deadline of its own."""
    spend = ledger.Operation(spend=spend_of(root_id))
    ref = types_pb2.BudgetRef(root_id=root_id, budget_id=root_id)

    async def verify() -> None:
        async for _ in connection.audit.Verify(audit.VerifyRequest()):
            pass

    async def batch() -> Any:
        response = await connection.ledger.Batch(ledger.BatchRequest(operations=[spend]))
        return response.results[0]

    asked: list[Awaitable[Any]] = [
        connection.ledger.Spend(spend_of(root_id)),
        batch(),
        connection.audit.GetBudget(audit.GetBudgetRequest(budget=ref)),
        connection.audit.ListEntries(audit.ListEntriesRequest(budget=ref)),
        verify(),
    ]
    return await asyncio.gather(*asked, return_exceptions=True)


async def all_unavailable(address: str, root_id: bytes) -> None:
    """Every kind of call is told at once that there is no answer now, and when to come back."""
    async with AioWire(address) as connection:
        spend, batched, *reads = await calls(connection, root_id)
    for failed in (spend, *reads):
        assert isinstance(failed, grpc.aio.AioRpcError)
        assert told(failed) == OUTAGE
        assert retry_seconds(failed) == 1
    assert batched.unavailable.reason == types_pb2.UNAVAILABLE_REASON_DATABASE_UNAVAILABLE
    assert batched.unavailable.retry_delay.seconds == 1
