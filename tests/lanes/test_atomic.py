"""Atomic batches over lanes: accepted whole or not at all, many in one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from peculium_server.core.batch import Request
from peculium_server.core.limits import CHILDREN_MAX
from peculium_server.core.operations import AtomicBatch, ByHolder, Child, Delegate, Operation
from peculium_server.lanes.lane import DeadlinePassed
from peculium_server.lanes.ledger import Ledger
from peculium_server.lanes.weight import GROUP_ROWS_MAX
from tests.lanes.memory import MemoryStore, chain, granted, new_id, reasons, spend


def together(operations: Sequence[Operation]) -> list[Request]:
    batch = AtomicBatch(new_id(), len(operations))
    return chain([replace(operation, batch=batch) for operation in operations])


async def test_operations_of_two_lanes_are_answered_with_the_position_of_their_own(
    ledger: Ledger, store: MemoryStore
) -> None:
    even, odd = await granted(ledger, lane=0), await granted(ledger, lane=1)
    await ledger.execute(chain([spend(odd)]), None)
    answers = await ledger.execute_atomic(together([spend(even), spend(odd), spend(even)]), None)
    assert reasons(answers) == ["ok"] * 3
    positions = [answer.position for answer in answers]
    assert [(each.lane, each.number) for each in positions if each] == [(0, 3), (1, 3), (0, 3)]
    assert store.wide.transactions == [3]


async def test_batches_that_wait_share_a_transaction_and_a_refused_one_touches_no_other(
    ledger: Ledger, store: MemoryStore
) -> None:
    even, odd = await granted(ledger, 10, lane=0), await granted(ledger, 100, lane=1)
    store.wide.gate.clear()
    first = asyncio.create_task(ledger.execute_atomic(together([spend(even), spend(odd)]), None))
    await asyncio.sleep(0)
    amounts = [(4, 4), (6, 6), (5, 5)]
    others = [
        asyncio.create_task(
            ledger.execute_atomic(together([spend(odd, large), spend(even, small)]), None)
        )
        for large, small in amounts
    ]
    await asyncio.sleep(0)
    store.wide.gate.set()
    assert reasons(await first) == ["ok", "ok"]
    assert [reasons(await other) for other in others] == [
        ["ok", "ok"],
        ["BATCH_REFUSED", "BUDGET_EXHAUSTED"],
        ["ok", "ok"],
    ]
    assert store.wide.transactions == [2, 4]
    [left] = await ledger.execute(chain([spend(odd, 90)]), None)
    assert reasons([left]) == ["ok"]


async def test_a_batch_whose_transaction_is_repeated_happens_once(
    ledger: Ledger, store: MemoryStore
) -> None:
    even, odd = await granted(ledger, lane=0), await granted(ledger, lane=1)
    store.wide.conflicts = 2
    answers = await ledger.execute_atomic(together([spend(even, 60), spend(odd, 60)]), None)
    assert reasons(answers) == ["ok", "ok"]
    assert store.wide.transactions == [2]


async def test_a_malformed_operation_refuses_its_batch_without_a_transaction(
    ledger: Ledger, store: MemoryStore
) -> None:
    even, odd = await granted(ledger, lane=0), await granted(ledger, lane=1)
    answers = await ledger.execute_atomic(together([spend(even), spend(odd, -1)]), None)
    assert reasons(answers) == ["BATCH_REFUSED", "MALFORMED"]
    assert store.wide.transactions == []


async def test_a_batch_that_no_transaction_could_hold_is_too_large(
    ledger: Ledger, store: MemoryStore
) -> None:
    root = await granted(ledger, 10_000)
    delegates = [
        Delegate(
            operation_id=new_id(),
            root_id=root.root_id,
            budget_id=root.budget_id,
            authority=ByHolder(),
            children=tuple(
                Child(budget_id=new_id(), name=new_id().hex(), amount=1, holder="a")
                for _ in range(CHILDREN_MAX)
            ),
        )
        for _ in range(1 + GROUP_ROWS_MAX // CHILDREN_MAX)
    ]
    answers = await ledger.execute_atomic(together(delegates), None)
    assert reasons(answers) == ["TOO_LARGE"] * len(delegates)
    assert store.wide.transactions == []


async def test_a_batch_whose_time_is_over_is_never_decided(
    ledger: Ledger, store: MemoryStore
) -> None:
    even, odd = await granted(ledger, lane=0), await granted(ledger, lane=1)
    past = asyncio.get_running_loop().time() - 1
    with pytest.raises(DeadlinePassed):
        await ledger.execute_atomic(together([spend(even), spend(odd)]), past)
    assert store.wide.transactions == []


async def test_a_draining_ledger_finishes_the_batches_that_it_has_and_takes_no_more(
    ledger: Ledger, store: MemoryStore
) -> None:
    even, odd = await granted(ledger, lane=0), await granted(ledger, lane=1)
    store.wide.gate.clear()
    taken = asyncio.create_task(ledger.execute_atomic(together([spend(even), spend(odd)]), None))
    await asyncio.sleep(0)
    drained = asyncio.create_task(ledger.drain())
    await asyncio.sleep(0)
    late = await ledger.execute_atomic(together([spend(even), spend(odd)]), None)
    assert reasons(late) == ["DRAINING"] * 2
    assert not drained.done()
    store.wide.gate.set()
    await drained
    assert reasons(await taken) == ["ok", "ok"]
