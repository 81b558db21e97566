from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest

from peculium import BudgetState, CapabilityMoved, HoldState, Usage
from peculium.aio import Budget, Client
from peculium.errors import Malformed, OutcomeUnknown, PermissionDenied, TokenConsumed
from peculium_server.core.operations import Settle
from tests.client.ledger import Fault, Ledger, Serving


class RateLimited(Exception):
    """The provider did not bill."""


class Cut(Exception):
    """The provider may have billed."""


def money(ledger: Ledger, path: str = "acme") -> tuple[int, int, int]:
    """Available, held, spent."""
    found = ledger.budget(path).money
    return found.available, found.held, found.spent


def last_settle(ledger: Ledger) -> Settle:
    """The last settle that was recorded, as it was asked for."""
    tree = ledger.trees[ledger.budget("acme").root_id]
    recorded = [each.operation for each in tree.recorded.values() if each is not None]
    return [operation for operation in recorded if isinstance(operation, Settle)][-1]


async def test_a_settle_says_the_labels_of_its_reservation_unless_it_has_its_own(
    ledger: Ledger, root: Budget
) -> None:
    labels = {"run": "7"}
    async with root.reserve(10, labels=labels) as hold:
        labels["run"] = "8"
        await hold.settle(1, keep_open=True)
        assert last_settle(ledger).labels == (("run", "7"),)
        await hold.settle(1, keep_open=True, labels={"team": "x"})
        assert last_settle(ledger).labels == (("team", "x"),)
        await hold.settle(1, labels={})
        assert last_settle(ledger).labels == ()
    async with root.reserve(10, labels={"run": "9"}):
        pass
    assert last_settle(ledger).labels == (("run", "9"),)
    async with root.reserve(10) as hold:
        await hold.settle(1)
    assert last_settle(ledger).labels == ()


async def test_a_settle_books_what_it_says_and_the_rest_flows_back(
    ledger: Ledger, root: Budget
) -> None:
    async with root.reserve(100, ttl=60, labels={"run": "7"}) as hold:
        assert money(ledger) == (900, 100, 0)
        assert hold.amount == 100
        assert (hold.info.expires_at - hold.info.created_at).total_seconds() == 60
        receipt = await hold.settle(
            40,
            reference="call-1",
            usage=Usage(input_tokens=10, output_tokens=5, model="m", provider="p"),
        )
    assert money(ledger) == (960, 0, 40)
    asked = last_settle(ledger)
    assert asked.reference == "call-1"
    assert asked.usage is not None
    assert (asked.usage.model, asked.usage.output_tokens) == ("m", 5)
    assert not asked.estimated
    assert receipt.hold is not None
    assert (receipt.hold.state, receipt.hold.booked) == (HoldState.SETTLED, 40)
    assert receipt.state is BudgetState.OPEN


async def test_a_hold_can_be_made_without_a_block(ledger: Ledger, root: Budget) -> None:
    hold = await root.reserve(100)
    await hold.settle(40)
    assert money(ledger) == (960, 0, 40)
    async with await root.reserve(100) as hold:
        await hold.release()
    assert money(ledger) == (960, 0, 40)


async def test_what_is_billed_beyond_the_hold_is_booked_too(ledger: Ledger, root: Budget) -> None:
    async with root.reserve(100) as hold:
        await hold.settle(150)
    assert money(ledger) == (850, 0, 150)


async def test_leaving_without_a_settle_spends_the_whole_hold(ledger: Ledger, root: Budget) -> None:
    async with root.reserve(100):
        pass
    assert money(ledger) == (900, 0, 100)
    assert last_settle(ledger).estimated


async def test_an_exception_that_says_unbilled_releases(ledger: Ledger, root: Budget) -> None:
    with pytest.raises(RateLimited):
        async with root.reserve(100, unbilled=(RateLimited, ConnectionRefusedError)):
            raise RateLimited
    assert money(ledger) == (1000, 0, 0)


async def test_any_other_exception_spends_the_whole_hold_as_an_estimate(
    ledger: Ledger, root: Budget
) -> None:
    with pytest.raises(Cut):
        async with root.reserve(100, unbilled=(RateLimited,)):
            raise Cut
    assert money(ledger) == (900, 0, 100)
    assert last_settle(ledger).estimated


async def test_an_exception_after_the_settle_changes_nothing(ledger: Ledger, root: Budget) -> None:
    async def call() -> None:
        async with root.reserve(100, unbilled=(RateLimited,)) as hold:
            await hold.settle(40)
            raise RateLimited

    with pytest.raises(RateLimited):
        await call()
    assert money(ledger) == (960, 0, 40)


@pytest.mark.parametrize("unbilled", [(), (Cut,)], ids=["spent", "released"])
async def test_the_original_exception_is_never_masked(
    ledger: Ledger,
    root: Budget,
    caplog: pytest.LogCaptureFixture,
    unbilled: tuple[type[Exception], ...],
) -> None:
    async def call() -> None:
        async with root.reserve(100, unbilled=unbilled) as hold:
            await root.resolve(hold.hold_id, 10, "somebody else knew better")
            raise Cut

    with caplog.at_level(logging.WARNING), pytest.raises(Cut) as caught:
        await call()
    assert caught.value.__notes__[0].startswith("peculium: TokenConsumed:")
    assert "on the way out of a block" in caplog.text


async def test_without_an_exception_a_failure_to_end_the_hold_is_raised(root: Budget) -> None:
    async def call() -> None:
        async with root.reserve(100) as hold:
            await root.resolve(hold.hold_id, 10, "somebody else knew better")

    with pytest.raises(TokenConsumed):
        await call()


async def test_a_cancelled_call_goes_on_at_once_and_its_hold_is_spent_in_the_background(
    served: Serving, client: Client, root: Budget
) -> None:
    entered = asyncio.Event()

    async def call() -> None:
        async with root.reserve(100):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await entered.wait()
    gate = served.ledger.hold_up()
    task.cancel()
    await asyncio.wait({task}, timeout=2)
    assert task.cancelled()
    await asyncio.to_thread(gate.reached.wait, 10)
    assert gate.until is not None
    gate.until.set()
    await client.close()
    assert money(served.ledger) == (900, 0, 100)


async def test_a_cancelled_reserve_leaves_no_hold(
    served: Serving, client: Client, root: Budget
) -> None:
    gate = served.ledger.hold_up()

    async def call() -> None:
        await root.reserve(100)

    task = asyncio.create_task(call())
    await asyncio.to_thread(gate.reached.wait, 10)
    assert money(served.ledger) == (900, 100, 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.until is not None
    gate.until.set()
    await client.close()
    assert money(served.ledger) == (1000, 0, 0)


async def test_a_cancelled_settle_is_done_all_the_same(
    served: Serving, client: Client, root: Budget
) -> None:
    async with asyncio.timeout(10):
        hold = await root.reserve(100)
        gate = served.ledger.hold_up(done=False)
        task = asyncio.create_task(hold.settle(40))
        await asyncio.to_thread(gate.reached.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gate.until is not None
        gate.until.set()
        with pytest.raises(CapabilityMoved):
            await asyncio.wait_for(hold.release(), 5)
        await client.close()
    assert money(served.ledger) == (960, 0, 40)


async def test_a_finished_hold_is_not_used_again_and_says_where_it_ended(
    ledger: Ledger, root: Budget
) -> None:
    hold = await root.reserve(100)
    await hold.settle(40)
    before = len(ledger.batches)
    ended = r"was settled at .*test_hold\.py:\d+"
    with pytest.raises(CapabilityMoved, match=ended):
        await hold.settle(1)
    with pytest.raises(CapabilityMoved, match=ended):
        await hold.release()
    with pytest.raises(CapabilityMoved, match=ended):
        await hold.extend(60)
    assert len(ledger.batches) == before, "nothing was sent"


async def test_a_hold_whose_settle_was_refused_can_still_be_settled(
    ledger: Ledger, root: Budget
) -> None:
    hold = await root.reserve(100)
    with pytest.raises(Malformed):
        await hold.settle(-1)
    with pytest.raises(Malformed):
        await hold.settle(1, reference="x" * 300)
    await hold.settle(40)
    assert money(ledger) == (960, 0, 40)


async def test_a_hold_whose_settle_the_ledger_refused_can_still_be_settled(
    ledger: Ledger, root: Budget
) -> None:
    async with root.reserve(100) as hold:
        ledger.faults.append(Fault(done=False, code=grpc.StatusCode.PERMISSION_DENIED))
        with pytest.raises(PermissionDenied):
            await hold.settle(40)
        await hold.settle(40)
    assert money(ledger) == (960, 0, 40)


async def test_a_reserve_that_is_cancelled_as_its_answer_comes_leaves_no_hold(
    served: Serving, client: Client, root: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    brain = client._sender._brain
    completed = brain.completed
    task = asyncio.create_task(root.reserve(100))

    def complete_and_cancel(*answer: Any) -> None:
        completed(*answer)
        task.cancel()

    monkeypatch.setattr(brain, "completed", complete_and_cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.undo()
    await client.close()
    assert money(served.ledger) == (1000, 0, 0)


async def test_a_streaming_call_is_settled_in_increments(ledger: Ledger, root: Budget) -> None:
    async with root.reserve(100) as hold:
        for _ in range(3):
            receipt = await hold.settle(10, keep_open=True)
            assert receipt.hold is not None
            assert receipt.hold.state is HoldState.LIVE
        await hold.settle(5)
    assert money(ledger) == (965, 0, 35)


async def test_increments_at_the_same_time_go_in_order(ledger: Ledger, root: Budget) -> None:
    hold = await root.reserve(100)
    await asyncio.gather(*(hold.settle(10, keep_open=True) for _ in range(5)))
    assert money(ledger) == (900, 50, 50)


async def test_what_a_stream_has_not_settled_at_its_end_is_spent(
    ledger: Ledger, root: Budget
) -> None:
    async with root.reserve(100) as hold:
        await hold.settle(30, keep_open=True)
    assert money(ledger) == (900, 0, 100)


async def test_an_increment_beyond_what_is_left_ends_the_hold(ledger: Ledger, root: Budget) -> None:
    async with root.reserve(100) as hold:
        await hold.settle(130, keep_open=True)
        with pytest.raises(CapabilityMoved, match="beyond what it had left"):
            await hold.settle(1, keep_open=True)
    assert money(ledger) == (870, 0, 130)


async def test_an_increment_says_how_much(root: Budget) -> None:
    hold = await root.reserve(100)
    with pytest.raises(Malformed, match="increment"):
        await hold.settle(keep_open=True)


async def test_a_hold_gets_more_time(root: Budget) -> None:
    hold = await root.reserve(100, ttl=60)
    receipt = await hold.extend(3600)
    assert receipt.hold is not None
    assert receipt.hold.expires_at > hold.info.expires_at
    await hold.settle(1)


async def test_an_unknown_settle_is_found_out_by_settling_again(
    ledger: Ledger, root: Budget
) -> None:
    hold = await root.reserve(100)
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown) as caught:
        await hold.settle(40, timeout=0.2)
    assert caught.value.budget == "acme"
    assert gate.until is not None
    gate.until.set()
    receipt = await hold.settle(40)
    assert receipt.balances.spent == 40
    with pytest.raises(CapabilityMoved):
        await hold.settle(40)


async def test_an_unknown_settle_is_not_replaced_by_another(ledger: Ledger, root: Budget) -> None:
    hold = await root.reserve(100)
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        await hold.settle(40, timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    with pytest.raises(CapabilityMoved, match="was settled at"):
        await hold.release()
    assert money(ledger) == (960, 0, 40)


async def test_leaving_after_an_unknown_settle_leaves_it_to_the_background(
    served: Serving, client: Client, root: Budget
) -> None:
    async def call() -> None:
        async with root.reserve(100) as hold:
            served.ledger.hold_up(done=False)
            await hold.settle(40, timeout=0.2)

    with pytest.raises(OutcomeUnknown):
        await call()
    await client.close()
    assert money(served.ledger) == (960, 0, 40)


async def test_two_cannot_settle_one_hold_at_the_same_time(ledger: Ledger, root: Budget) -> None:
    hold = await root.reserve(100)
    asked = await asyncio.gather(hold.settle(40), hold.settle(50), return_exceptions=True)
    assert isinstance(asked[1], CapabilityMoved)
    assert money(ledger) == (960, 0, 40)


async def test_a_hold_shows_nothing_secret(root: Budget) -> None:
    hold = await root.reserve(100)
    assert str(hold) == repr(hold)
    assert repr(hold).startswith("<Hold 0")
    assert "of acme" in repr(hold)
