"""What both clients do when the connection or the ledger fails."""

from __future__ import annotations

import asyncio
import socket
import time

import grpc
import pytest

import peculium
from peculium import BudgetExhausted, Child, LedgerUnavailable, OutcomeUnknown
from peculium.aio import Budget, Client, Hold
from peculium.errors import DeadlineExceeded, NotSupported
from tests.client.ledger import Fault, Ledger, Serving


async def test_a_lost_answer_is_asked_for_again_under_the_same_id(
    ledger: Ledger, run: Budget
) -> None:
    ledger.lose_answers(2)
    before = len(ledger.batches)
    hold = await run.reserve(10)
    assert hold.receipt.replayed
    sent = ledger.batches[before:]
    assert len(sent) == 3
    assert len({batch.SerializeToString() for batch in sent}) == 1
    assert len(ledger.live_holds("acme/run")) == 1


async def test_a_lost_request_is_sent_again(ledger: Ledger, run: Budget) -> None:
    ledger.lose_requests(2)
    hold = await run.reserve(10)
    assert not hold.receipt.replayed
    await hold.settle(5)


async def test_results_of_a_replayed_chain_are_the_same_but_for_replayed(
    ledger: Ledger, run: Budget
) -> None:
    ledger.lose_answers()
    asked = await asyncio.gather(
        *(run.reserve(amount) for amount in (40, 70, 30, 5)), return_exceptions=True
    )
    assert [isinstance(each, Hold) for each in asked] == [True, False, True, True]
    holds = [each for each in asked if isinstance(each, Hold)]
    assert all(hold.receipt.replayed for hold in holds)
    assert isinstance(asked[1], BudgetExhausted)
    assert [hold.receipt.balances.available for hold in holds] == [60, 30, 25]


async def test_one_operation_without_an_answer_does_not_trouble_the_others(
    ledger: Ledger, root: Budget
) -> None:
    ledger.faults.append(Fault(done=True, code=None, unanswered=lambda index: index == 1))
    holds = await asyncio.gather(*(root.reserve(10) for _ in range(3)))
    assert [hold.receipt.replayed for hold in holds] == [False, True, False]
    assert len(ledger.live_holds("acme")) == 3


async def test_the_callers_deadline_bounds_all_attempts(ledger: Ledger, run: Budget) -> None:
    ledger.lose_requests(1000)
    started = time.monotonic()
    with pytest.raises(OutcomeUnknown) as caught:
        await run.reserve(10, timeout=0.5)
    assert time.monotonic() - started < 1.5
    assert caught.value.operation_id is not None
    ledger.faults.clear()


async def test_each_caller_is_told_when_its_own_time_is_over(ledger: Ledger, root: Budget) -> None:
    ledger.lose_requests(1000)
    told: list[float] = []

    async def wait(seconds: float) -> None:
        with pytest.raises(OutcomeUnknown):
            await root.spend(1, timeout=seconds)
        told.append(seconds)

    async with asyncio.timeout(10):
        await asyncio.gather(*(wait(seconds) for seconds in (0.3, 0.1, 0.2)))
    assert told == [0.1, 0.2, 0.3]
    ledger.faults.clear()


async def test_a_ledger_that_is_not_there_is_unavailable_and_nothing_was_done() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        async with peculium.aio.connect(target, timeout=0.3) as client:
            with pytest.raises(LedgerUnavailable):
                await client.open("acme")
            with pytest.raises(LedgerUnavailable):
                await client.accept(capability())


def capability() -> peculium.Capability:
    return peculium.Capability(root_id=bytes(16), budget_id=bytes(16), secret=bytes(32))


async def test_a_reserve_at_a_ledger_that_went_away_was_surely_not_done(
    served: Serving, root: Budget
) -> None:
    # Nobody listens there; the connection fails before anything is sent.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        async with peculium.aio.connect(target) as elsewhere:
            stranger = Budget(elsewhere._sender, root.ref, root._target, root._line)
            with pytest.raises(LedgerUnavailable):
                await stranger.reserve(1, timeout=0.3)


async def test_an_unknown_outcome_is_resolved_before_the_next_verb(
    ledger: Ledger, run: Budget
) -> None:
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        await run.spend(10, timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    receipt = await run.spend(5)
    assert receipt.balances.spent == 15
    assert ledger.recorded() == 5  # grant, delegate, accept, and both spends


async def test_a_reserve_of_unknown_outcome_does_not_leave_its_hold(
    ledger: Ledger, client: Client, run: Budget
) -> None:
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        await run.reserve(90, timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    hold = await run.reserve(50, wait=5)
    assert [each.hold_id for each in ledger.live_holds("acme/run")] == [hold.hold_id]


async def test_an_unknown_delegation_does_not_leave_children_that_nobody_can_reach(
    ledger: Ledger, client: Client, run: Budget
) -> None:
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        await run.delegate([Child("lost", 90)], timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    await client.close()
    assert ledger.budget("acme/run/lost").closed
    assert ledger.budget("acme/run").money.available == 100


async def test_an_unknown_accept_is_found_out_by_accepting_again(
    ledger: Ledger, client: Client, root: Budget
) -> None:
    [made] = await root.delegate([Child("run", 100)])
    text = made.capability.reveal()
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        await client.accept(text, timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    run = await client.accept(text)
    assert (await run.balances()).available == 100
    await run.spend(1)


async def test_an_unknown_recovery_does_not_fence_its_own_successor(
    ledger: Ledger, client: Client, run: Budget
) -> None:
    gate = ledger.hold_up(done=False)
    with pytest.raises(OutcomeUnknown):
        await client.recover("acme/run", timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    again = await client.recover("acme/run")
    for _ in range(3):
        await again.spend(1)


async def test_an_unknown_return_is_found_out_by_the_next_verb(
    ledger: Ledger, root: Budget, run: Budget
) -> None:
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        await run.give_back(timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    with pytest.raises(peculium.CapabilityMoved):
        await run.spend(1)
    assert (await root.balances()).available == 1000


async def test_a_verb_that_waits_for_another_ones_answer_has_its_own_deadline(
    ledger: Ledger, run: Budget
) -> None:
    gate = ledger.hold_up()
    first = asyncio.create_task(run.spend(1))
    await asyncio.to_thread(gate.reached.wait, 10)
    with pytest.raises(DeadlineExceeded):
        await run.spend(2, timeout=0.2)
    with pytest.raises(DeadlineExceeded):
        await run.info(timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    assert (await first).balances.spent == 1
    assert (await run.balances()).spent == 1


async def test_a_grant_whose_answer_was_lost_is_found_out(ledger: Ledger, client: Client) -> None:
    ledger.lose_answers()
    made = await client.admin.grant("acme", unit="calls", amount=10, holder="dev")
    assert made.receipt.replayed
    ledger.lose_requests(1000)
    with pytest.raises(OutcomeUnknown):
        await client.admin.top_up(made.ref, 5, timeout=0.3)
    ledger.faults.clear()


async def test_what_the_ledger_does_not_do_is_said(ledger: Ledger, run: Budget) -> None:
    ledger.faults.append(Fault(done=False, code=grpc.StatusCode.UNIMPLEMENTED))
    with pytest.raises(NotSupported):
        await run.spend(1)
    await run.spend(1)


async def test_too_large_an_answer_is_not_asked_for_again_and_again(
    ledger: Ledger, run: Budget
) -> None:
    ledger.faults.append(Fault(done=True, code=grpc.StatusCode.RESOURCE_EXHAUSTED))
    before = len(ledger.batches)
    with pytest.raises(OutcomeUnknown):
        await run.spend(1)
    assert len(ledger.batches) == before + 1
    assert (await run.spend(2)).balances.spent == 3


async def test_a_reserve_waits_for_holds_of_its_own_process(ledger: Ledger, run: Budget) -> None:
    hold = await run.reserve(80)
    before = len(ledger.batches)
    waiting = asyncio.create_task(run.reserve(50, wait=30))
    await asyncio.to_thread(ledger.wait_for_batches, before + 1)
    await hold.settle(10)
    waited = await waiting
    assert waited.amount == 50
    assert len(ledger.batches) == before + 3, "no polling"
    assert (await waited.settle(20)).balances.spent == 30


async def test_waiting_is_bounded_and_then_tells_the_refusal(run: Budget) -> None:
    await run.reserve(80)
    started = time.monotonic()
    with pytest.raises(BudgetExhausted) as caught:
        await run.reserve(50, wait=0.2)
    assert 0.15 < time.monotonic() - started < 2
    assert caught.value.available == 20
