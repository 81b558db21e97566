"""What reads all entries does not hold them all: as many bytes at a time as for a few of them."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from peculium.v1 import audit_service_pb2 as audit, types_pb2
from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
from tests.audit.large import multiply
from tests.audit.world import USAGES
from tests.rpc.wire import Stored
from tests.store.stored import StoredLedger

pytestmark = pytest.mark.timeout(120)

SPENDS = 50
COPIES = 100
ENTRIES = 1 + SPENDS * COPIES
SAMPLE = 500


@pytest.fixture
async def root_id(stored: Stored, database: str) -> bytes:
    """A tree of many entries, most of them copies of a few: here nobody looks at their hashes."""
    ledger = StoredLedger(stored.store)
    root = await ledger.root(10**12, holder="agent", by_token=False)
    await ledger.accept(*(root.spend(1, usage=USAGES[1]) for _ in range(SPENDS)))
    assert multiply(database, SPENDS, SPENDS, COPIES) == ENTRIES
    return root.id


async def listed(stub: Any, top: types_pb2.BudgetRef) -> int:
    request = audit.ListEntriesRequest(budget=top, page_size=1_000)
    count = 0
    while True:
        page = await stub.ListEntries(request)
        count += len(page.entries)
        request.page_token = page.next_page_token
        if not page.next_page_token:
            return count


async def stated(stub: Any, top: types_pb2.BudgetRef) -> int:
    statement = await stub.GetStatement(audit.GetStatementRequest(budget=top))
    return sum(movement.entries for movement in statement.movements)


async def used(stub: Any, top: types_pb2.BudgetRef) -> int:
    by = [audit.UsageGrouping(by=audit.UsageGrouping.BY_DAY)]
    usage = await stub.GetUsage(audit.GetUsageRequest(budget=top, group_by=by))
    return 1 + int(usage.total.operations)


async def exported(stub: Any, top: types_pb2.BudgetRef) -> int:
    count = 0
    async for piece in stub.Export(audit.ExportRequest(tree=top)):
        count += len(piece.entries.entries)
    return count


async def watched(stub: Any, top: types_pb2.BudgetRef) -> int:
    request = audit.WatchEntriesRequest(budget=top, from_beginning=True)
    messages = stub.WatchEntries(request)
    count = 0
    async for message in messages:
        count += len(message.entries)
        if count >= ENTRIES:
            messages.cancel()
            break
    return count


READS: dict[Callable[[Any, types_pb2.BudgetRef], Awaitable[int]], int] = {
    listed: 2_000,
    stated: 100,
    used: 1_000,
    exported: 1_000,
    watched: 2_000,
}
"""Entries of which the bytes may be held at once: more than any portion, and far from all."""


async def bytes_of_one(stored: Stored, root_id: bytes) -> float:
    """What it takes to hold an entry, by holding some."""
    gc.collect()  # what is let go of meanwhile, left over from before, would be taken off
    before, _ = tracemalloc.get_traced_memory()
    held = []
    async with stored.store.snapshot() as snapshot:
        async for entry in snapshot.entries_in_order(root_id):
            held.append(entry)
            if len(held) == SAMPLE:
                break
    gc.collect()
    now, _ = tracemalloc.get_traced_memory()
    return (now - before) / len(held)


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
async def test_a_read_of_all_entries_holds_a_few_at_a_time(stored: Stored, root_id: bytes) -> None:
    stub = AuditServiceStub(stored.channel)
    top = types_pb2.BudgetRef(root_id=root_id, budget_id=root_id)
    one = await bytes_of_one(stored, root_id)
    for read, most_at_once in READS.items():
        gc.collect()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        assert await read(stub, top) == ENTRIES
        _, most = tracemalloc.get_traced_memory()
        assert (most - before) / one < most_at_once, read.__name__
