from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from peculium_server.core.operations import After, ByHolder, ByToken, Child, Delegate, Grant
from peculium_server.core.outcome import Outcome
from peculium_server.lanes.answers import Unanswered, Unavailability
from peculium_server.lanes.ledger import Ledger
from peculium_server.lanes.weight import GROUP_ROWS_MAX
from peculium_server.store.errors import StoreUnavailable
from tests.lanes.memory import (
    ADMIN,
    MemoryStore,
    chain,
    grant,
    granted,
    new_id,
    new_token,
    reasons,
    request,
    reserve,
    spend,
)


async def token_held(ledger: Ledger, amount: int = 100) -> tuple[Grant, bytes]:
    token = new_token()
    root = replace(grant(amount, holder=None), token_id=token)
    [answer] = await ledger.execute([request(root, actor=ADMIN)], None)
    assert isinstance(answer.result, Outcome)
    return root, token


async def test_a_request_is_split_by_lane_and_answered_in_its_own_order(
    ledger: Ledger, store: MemoryStore
) -> None:
    even, odd = await granted(ledger, lane=0), await granted(ledger, lane=1)
    operations = [spend(even, 1), spend(odd, 2), spend(even, 1_000), spend(odd, 3)]
    answers = await ledger.execute(chain(operations), None)
    assert reasons(answers) == ["ok", "ok", "BUDGET_EXHAUSTED", "ok"]
    for operation, answer in zip(operations, answers, strict=True):
        if isinstance(answer.result, Outcome):
            assert answer.result.operation_id == operation.operation_id
            assert answer.position is not None
            assert answer.position.lane == store.lane_of(operation.root_id)
            assert answer.position.incarnation == store.incarnation


async def test_a_lane_without_its_database_does_not_keep_the_other_from_answering(
    ledger: Ledger, store: MemoryStore
) -> None:
    even, odd = await granted(ledger, lane=0), await granted(ledger, lane=1)
    store.writers[0].failures = [StoreUnavailable("gone")]
    answers = await ledger.execute(chain([spend(even), spend(odd)]), None)
    assert reasons(answers) == ["DATABASE_UNAVAILABLE", "ok"]


async def test_a_malformed_operation_costs_no_transaction(
    ledger: Ledger, store: MemoryStore
) -> None:
    root = await granted(ledger)
    before = store.writers[0].attempts
    answers = await ledger.execute(chain([spend(root, 0), spend(root, -5)]), None)
    assert reasons(answers) == ["MALFORMED", "MALFORMED"]
    assert store.writers[0].attempts == before


async def test_a_malformed_operation_touches_nothing_else_in_its_request(
    ledger: Ledger, store: MemoryStore
) -> None:
    root = await granted(ledger)
    answers = await ledger.execute(
        chain([spend(root, 5), replace(spend(root), root_id=b"short"), spend(root, 5)]), None
    )
    assert reasons(answers) == ["ok", "MALFORMED", "ok"]


async def test_a_chain_goes_on_past_a_malformed_operation(ledger: Ledger) -> None:
    root, token = await token_held(ledger, 10)
    operations = [
        reserve(root, 4, ByToken(token)),
        reserve(root, 0, After(0)),
        reserve(root, -1, After(1)),
        reserve(root, 4, After(2)),
        reserve(root, 4, After(3)),
    ]
    answers = await ledger.execute(chain(operations), None)
    assert reasons(answers) == ["ok", "MALFORMED", "MALFORMED", "ok", "BUDGET_EXHAUSTED"]


async def test_a_chain_can_begin_with_a_malformed_operation(ledger: Ledger) -> None:
    root, token = await token_held(ledger, 10)
    operations = [reserve(root, 0, ByToken(token)), reserve(root, 4, After(0))]
    assert reasons(await ledger.execute(chain(operations), None)) == ["MALFORMED", "ok"]


async def test_nobody_chains_to_what_a_holder_did(ledger: Ledger) -> None:
    root = await granted(ledger)
    operations = [reserve(root, 0, ByHolder()), reserve(root, 4, After(0))]
    answers = await ledger.execute(chain(operations), None)
    assert reasons(answers) == ["MALFORMED", "CAPABILITY_UNKNOWN"]


async def test_a_request_that_writes_many_rows_is_several_transactions_and_its_chains_hold(
    ledger: Ledger, store: MemoryStore
) -> None:
    root, token = await token_held(ledger)
    before = store.writers[0].attempts
    authorities: list[ByToken | After] = [ByToken(token), *(After(index) for index in range(4))]
    many = [
        Delegate(
            operation_id=new_id(),
            root_id=root.root_id,
            budget_id=root.budget_id,
            authority=authority,
            next_token_id=new_token(),
            children=tuple(
                Child(budget_id=new_id(), name=f"{index}-{each}", amount=0, holder="agent")
                for each in range(256)
            ),
        )
        for index, authority in enumerate(authorities)
    ]
    assert sum(1 + len(each.children) for each in many) > GROUP_ROWS_MAX
    answers = await ledger.execute(chain(many), None)
    assert reasons(answers) == ["ok"] * 5
    assert store.writers[0].attempts == before + 2


async def test_who_leaves_takes_back_what_waits_in_every_lane(
    ledger: Ledger, store: MemoryStore
) -> None:
    even, odd = await granted(ledger, lane=0), await granted(ledger, lane=1)
    for writer in store.writers:
        writer.gate.clear()
        writer.begun.clear()
    blocking = [
        asyncio.create_task(ledger.execute([request(spend(root))], None)) for root in (even, odd)
    ]
    for writer in store.writers:
        await writer.begun.wait()
    leaving = asyncio.create_task(ledger.execute(chain([spend(even), spend(odd)]), None))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    for writer in store.writers:
        writer.gate.set()
    await asyncio.gather(*blocking)
    assert [writer.position for writer in store.writers] == [2, 2]


async def test_draining_finishes_what_was_accepted_and_takes_nothing_more(
    ledger: Ledger, store: MemoryStore
) -> None:
    root = await granted(ledger)
    [writer, _] = store.writers
    writer.gate.clear()
    writer.begun.clear()
    accepted = [
        asyncio.create_task(ledger.execute([request(spend(root))], None)) for _ in range(20)
    ]
    await writer.begun.wait()
    draining = asyncio.create_task(ledger.drain())
    await asyncio.sleep(0)
    [late] = await ledger.execute([request(spend(root))], None)
    assert isinstance(late.result, Unanswered)
    assert late.result.reason is Unavailability.DRAINING
    assert not draining.done()
    writer.gate.set()
    await draining
    assert [reasons(await task) for task in accepted] == [["ok"]] * 20
    assert writer.position == 21
