"""What is particular to threads; the verbs themselves are those of the client for asyncio."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import peculium
from peculium import Budget, BudgetExhausted, Child, Client, Hold, Invalid, OutcomeUnknown
from peculium.errors import DeadlineExceeded, NameTaken
from tests.client.ledger import Ledger


class RateLimited(Exception):
    """The provider did not bill."""


def money(ledger: Ledger, path: str = "acme") -> tuple[int, int, int]:
    """Available, held, spent."""
    found = ledger.budget(path).money
    return found.available, found.held, found.spent


def test_money_is_reserved_and_settled(ledger: Ledger, blocking_root: Budget) -> None:
    with blocking_root.reserve(100) as hold:
        hold.settle(40)
    hold = blocking_root.reserve(100)
    hold.release()
    with blocking_root.reserve(100):
        pass
    with pytest.raises(RateLimited), blocking_root.reserve(100, unbilled=(RateLimited,)):
        raise RateLimited
    with pytest.raises(ZeroDivisionError), blocking_root.reserve(100):
        raise ZeroDivisionError
    assert money(ledger) == (760, 0, 240)


def test_a_block_has_a_child_of_its_own(ledger: Ledger, blocking_root: Budget) -> None:
    with blocking_root.delegate_here(100) as step:
        step.spend(30)
        with peculium.use(step):
            peculium.current().spend(5)
    with pytest.raises(ZeroDivisionError), blocking_root.delegate_here(100) as step:
        raise ZeroDivisionError
    assert money(ledger) == (965, 0, 0)
    assert ledger.budget("acme").money.delegated == 35


def test_fifty_threads_share_a_handle_and_a_handful_of_requests(
    ledger: Ledger, blocking_run: Budget
) -> None:
    start = threading.Barrier(50)
    gate = ledger.hold_up()
    before = len(ledger.batches)

    def reserve(index: int) -> Hold | BudgetExhausted:
        start.wait()
        try:
            return blocking_run.reserve(1 + index % 7)
        except BudgetExhausted as error:
            return error

    with ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(reserve, index) for index in range(50)]
        gate.reached.wait(10)
        while len(blocking_run._line.queue) + blocking_run._line.flying < 50:
            time.sleep(0.001)
        assert gate.until is not None
        gate.until.set()
        answers = [each.result() for each in asked]
    assert len(ledger.batches) - before <= 2
    held = [each for each in answers if isinstance(each, Hold)]
    assert sum(hold.amount for hold in held) == ledger.budget("acme/run").money.held <= 100
    with ThreadPoolExecutor(50) as pool:
        list(pool.map(lambda hold: hold.settle(1), held))
    assert ledger.budget("acme/run").money.spent == len(held)


def test_a_lost_answer_is_asked_for_again(ledger: Ledger, blocking_run: Budget) -> None:
    ledger.lose_answers(2)
    assert blocking_run.reserve(10).receipt.replayed
    ledger.lose_requests(2)
    assert blocking_run.spend(10).balances.spent == 10


def test_an_unknown_outcome_is_resolved_before_the_next_verb(
    ledger: Ledger, blocking_run: Budget
) -> None:
    gate = ledger.hold_up()
    started = time.monotonic()
    with pytest.raises(OutcomeUnknown):
        blocking_run.reserve(90, timeout=0.2)
    assert time.monotonic() - started < 1
    assert gate.until is not None
    gate.until.set()
    hold = blocking_run.reserve(50, wait=5)
    assert [each.hold_id for each in ledger.live_holds("acme/run")] == [hold.hold_id]


def test_an_unknown_settle_is_found_out_by_settling_again(
    ledger: Ledger, blocking_root: Budget
) -> None:
    hold = blocking_root.reserve(100)
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        hold.settle(40, timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    assert hold.settle(40).balances.spent == 40


def test_an_unknown_accept_is_found_out_by_accepting_again(
    ledger: Ledger, blocking: Client, blocking_root: Budget
) -> None:
    [made] = blocking_root.delegate([Child("run", 100)])
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        blocking.accept(made.capability, timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    assert blocking.accept(made.capability).balances().available == 100


def test_a_verb_that_was_never_sent_says_so(ledger: Ledger, blocking_run: Budget) -> None:
    gate = ledger.hold_up()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(blocking_run.spend, 1)
        gate.reached.wait(10)
        with pytest.raises(DeadlineExceeded):
            blocking_run.spend(2, timeout=0.2)
        assert gate.until is not None
        gate.until.set()
        assert first.result().balances.spent == 1


def test_a_reserve_waits_for_a_hold_of_another_thread(blocking_run: Budget) -> None:
    hold = blocking_run.reserve(80)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(blocking_run.reserve, 50, wait=30)
        while not hold._sender._brain._waiting.pool(hold._target.budget_id).queue:
            time.sleep(0.001)
        hold.settle(10)
        assert waiting.result().amount == 50
    with pytest.raises(BudgetExhausted):
        blocking_run.reserve(50, wait=0.1)


def test_an_interrupted_call_is_spent_and_an_interrupted_reserve_leaves_no_hold(
    ledger: Ledger, blocking: Client, blocking_root: Budget
) -> None:
    with pytest.raises(KeyboardInterrupt), blocking_root.reserve(100):
        raise KeyboardInterrupt
    # The interrupted call is settled in the background: the gate is for the reserve after it.
    ledger.wait_for_batches(2)
    gate = ledger.hold_up()
    main_thread = threading.get_ident()

    def interrupt() -> None:
        if gate.reached.wait(10):
            signal.pthread_kill(main_thread, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        blocking_root.reserve(200)
    interrupter.join()
    assert gate.until is not None
    gate.until.set()
    blocking.close()
    assert money(ledger) == (900, 0, 100)


class Interrupted:
    """The future of a caller that is interrupted as its answer comes."""

    def exception(self, _: float) -> None:
        raise KeyboardInterrupt

    def cancel(self) -> None:
        """Too late."""

    def done(self) -> bool:
        return True


def test_a_reserve_that_is_interrupted_as_its_answer_comes_leaves_no_hold(
    ledger: Ledger, blocking: Client, blocking_root: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = blocking._sender
    wait = sender.wait

    def interrupted(ticket: Any) -> Any:
        wait(ticket)
        ticket.future = Interrupted()
        return wait(ticket)

    monkeypatch.setattr(sender, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        blocking_root.reserve(100)
    monkeypatch.undo()
    blocking.close()
    assert money(ledger) == (1000, 0, 0)


def test_a_budget_is_read_between_operations(blocking_run: Budget) -> None:
    blocking_run.spend(1)
    assert blocking_run.info().balances.spent == 1
    hold = blocking_run.reserve(5)
    assert [each.hold_id for each in blocking_run.holds()] == [hold.hold_id]
    blocking_run.spend(1)
    capability = blocking_run.hand_over()
    assert capability.ref == blocking_run.ref


def test_closing_finishes_what_is_on_its_way(
    ledger: Ledger, blocking: Client, blocking_root: Budget
) -> None:
    def call() -> None:
        with blocking_root.reserve(100):
            ledger.lose_requests(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call()
    blocking.close()
    blocking.close()
    assert money(ledger) == (900, 0, 100)
    with pytest.raises(Invalid, match="closed"):
        blocking_root.spend(1)


def test_operators_and_auditors_have_their_verbs(blocking: Client, blocking_root: Budget) -> None:
    with pytest.raises(NameTaken):
        blocking.admin.grant("acme", unit="calls", amount=1)
    assert blocking.admin.top_up("acme", 10).balances.available == 1010
    assert blocking.admin.withdraw(blocking_root.ref, 10).balances.available == 1000
    blocking.admin.freeze("acme", "a test")
    blocking.admin.unfreeze("acme")
    assert [budget.path for budget in blocking.audit.budgets()] == ["acme"]
    assert list(blocking.audit.verify())[-1].verified


def test_a_client_that_was_never_used_closes() -> None:
    peculium.connect("127.0.0.1:1").close()
