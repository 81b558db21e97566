"""The checkers find what is wrong with a history made by hand: one that finds nothing proves nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from peculium._ids import new_id, new_secret, token_id
from peculium.v1 import types_pb2
from peculium_server.core.encoding import TOKEN_DOMAIN
from peculium_server.core.operations import Actor, ByToken, Operation, Role, Spend
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refused
from peculium_server.rpc.responses import write_outcome
from tests.core.ledger import SECOND, Answer, HoldRef, Ledger, requested
from tests.faults.__main__ import COUNTS, PARTS, Result, Verdict, report
from tests.faults.bank import Row, wrong_totals
from tests.faults.checks import (
    SLACK_US,
    Asked,
    Attempt,
    Journal,
    Problem,
    Refusal,
    check,
    leaked,
    overshoot,
    tallied,
    unswept,
)
from tests.faults.crash import judged
from tests.faults.history import History, told
from tests.faults.planted import PLANTED
from tests.faults.tally import Tally
from tests.system.load import Load

LANE = 1
"""All roots of a ledger in memory are in one."""


class Written:
    """A ledger in memory, and who was told what."""

    def __init__(self) -> None:
        self.ledger = Ledger(checked=False)
        self.asked: list[Asked] = []
        self.root = self.ledger.grant(1_000)
        (granted,) = self.ledger.journal
        asked = Asked(0, requested(granted), Actor(granted.principal, Role.ADMIN))
        # Of which nobody knows.
        asked.attempts.append(Attempt(asked.operation, granted.at, 0))
        self.asked.append(asked)

    def ask(self, operation: Operation, process: int = 1) -> Asked:
        """One operation, sent once and answered at once."""
        actor = self.ledger.actor(operation)
        floor, sent_at = self.ledger.position, self.ledger.now
        answer = self.ledger.ask(operation, actor)
        asked = Asked(process, operation, actor)
        asked.attempts.append(
            Attempt(operation, sent_at, floor, self.ledger.now, self._wire(answer))
        )
        self.asked.append(asked)
        self.ledger.pass_time(3 * SLACK_US)
        return asked

    def _wire(self, answer: Answer) -> types_pb2.Outcome | Refusal:
        if isinstance(answer, Refused):
            return Refusal(answer.reason.name, dict(answer.facts))
        message = types_pb2.Outcome()
        write_outcome(answer, None, message)
        message.ledger.position = self.ledger.position
        return message

    def journal(self) -> Journal:
        trees = self.ledger.trees
        return Journal(
            entries=list(self.ledger.journal),
            budgets=[budget for tree in trees.values() for budget in tree.known_budgets()],
            holds=[(id_, hold) for id_, tree in trees.items() for hold in tree.known_holds()],
            positions={0: self.ledger.position},
            roots={id_: tree.budget(id_).name for id_, tree in trees.items()},
        )

    def rules(self, journal: Journal | None = None) -> set[str]:
        """The rules that are broken."""
        found = check(journal or self.journal(), self.asked, lanes=LANE)
        return {problem.rule for problem in found}


@pytest.fixture
def written() -> Written:
    """A short history in which everything is right."""
    made = Written()
    made.ask(made.root.reserve(300))
    made.ask(made.root.spend(200))
    made.ask(made.root.delegate(made.root.spec(100)))
    made.ask(made.root.spend(5_000))
    hold = made.ledger.trees[made.root.id].known_holds()[0]
    made.ask(HoldRef(made.root, hold.hold_id).settle(120))
    return made


def _spend(written: Written) -> Asked:
    return next(each for each in written.asked if each.operation.kind.name == "SPEND")


def _outcome(asked: Asked) -> types_pb2.Outcome:
    (answer,) = asked.acknowledged
    return answer


def test_a_history_in_which_everything_is_right_has_no_problem(written: Written) -> None:
    assert check(written.journal(), written.asked, lanes=LANE) == []


def test_an_acknowledged_operation_that_is_not_there_is_lost(written: Written) -> None:
    journal = written.journal()
    last = journal.entries[-1].operation_id
    journal.entries = [entry for entry in journal.entries if entry.operation_id != last]
    assert "lost" in written.rules(journal)


def test_an_operation_that_is_recorded_twice_is_found(written: Written) -> None:
    journal = written.journal()
    spent = next(e for e in journal.entries if e.operation_id == _spend(written).id)
    again = spent._replace(position=written.ledger.position + 1)
    journal.entries.append(again)
    journal.positions[0] += 1
    assert {"operation twice", "token twice"} <= written.rules(journal)


def test_a_token_that_is_consumed_twice_is_found(written: Written) -> None:
    journal = written.journal()
    spent = next(e for e in journal.entries if e.operation_id == _spend(written).id)
    other = spent._replace(
        operation_id=new_id(), position=written.ledger.position + 1, seq=spent.seq + 5
    )
    journal.entries.append(other)
    journal.positions[0] += 1
    rules = written.rules(journal)
    assert {"token twice", "unasked"} <= rules
    assert "operation twice" not in rules


def test_two_entries_that_follow_the_same_one_are_a_lost_update(written: Written) -> None:
    journal = written.journal()
    last = journal.entries[-1]
    journal.entries[-1] = last._replace(seq=last.seq - 1)
    assert "seq" in written.rules(journal)


def test_two_operations_at_one_position_are_found(written: Written) -> None:
    journal = written.journal()
    last = journal.entries[-1]
    journal.entries[-1] = last._replace(position=last.position - 1)
    assert "position" in written.rules(journal)


def test_a_position_that_nothing_is_at_is_found(written: Written) -> None:
    journal = written.journal()
    journal.positions[0] += 1
    assert written.rules(journal) == {"position"}


def test_an_operation_that_lacks_a_part_is_found(written: Written) -> None:
    journal = written.journal()
    part = next(entry for entry in journal.entries if entry.part == 1)
    journal.entries.remove(part)
    assert "partial" in written.rules(journal)


@pytest.mark.parametrize("balance", ["available", "held", "spent", "granted"])
def test_a_balance_of_an_entry_that_no_decision_makes_is_found(
    written: Written, balance: str
) -> None:
    journal = written.journal()
    last = journal.entries[-1]
    money = last.money._replace(**{balance: getattr(last.money, balance) + 1})
    journal.entries[-1] = last._replace(money=money)
    assert written.rules(journal) == {"decision"}


def test_a_row_that_is_not_what_the_entries_say_is_found(written: Written) -> None:
    journal = written.journal()
    root = next(budget for budget in journal.budgets if budget.is_root)
    moved = root.money._replace(available=root.money.available - 1, spent=root.money.spent + 1)
    journal.budgets = [
        budget._replace(money=moved) if budget is root else budget for budget in journal.budgets
    ]
    # It still adds up.
    assert written.rules(journal) == {"row"}


def test_a_hold_that_is_not_what_the_entries_say_is_found(written: Written) -> None:
    journal = written.journal()
    ((root_id, hold),) = journal.holds
    journal.holds = [(root_id, hold._replace(booked=hold.booked + 1))]
    assert written.rules(journal) == {"row"}


@pytest.mark.parametrize("rows", ["budgets", "holds"])
def test_a_row_that_is_missing_is_found(written: Written, rows: str) -> None:
    journal = written.journal()
    getattr(journal, rows).pop()
    assert "row" in written.rules(journal)


def test_a_tree_that_does_not_add_up_is_found(written: Written) -> None:
    journal = written.journal()
    child = next(budget for budget in journal.budgets if not budget.is_root)
    journal.budgets.remove(child)
    assert "row" in written.rules(journal)


def _more_spent(outcome: types_pb2.Outcome) -> None:
    outcome.balances.spent += 1


def _later_seq(outcome: types_pb2.Outcome) -> None:
    outcome.seq += 1


def _frozen(outcome: types_pb2.Outcome) -> None:
    outcome.state = types_pb2.BUDGET_STATE_FROZEN


def _returned(outcome: types_pb2.Outcome) -> None:
    outcome.returned = 1


def _held(outcome: types_pb2.Outcome) -> None:
    outcome.hold.remaining = 1


@pytest.mark.parametrize("change", [_more_spent, _later_seq, _frozen, _returned, _held])
def test_an_answer_that_is_not_the_models_is_found(
    written: Written, change: Callable[[types_pb2.Outcome], None]
) -> None:
    change(_outcome(_spend(written)))
    assert written.rules() == {"answer"}


def test_an_operation_that_was_new_twice_is_found(written: Written) -> None:
    spent = _spend(written)
    spent.attempts.append(replace(spent.attempts[0]))
    assert written.rules() == {"acknowledged twice"}
    again = types_pb2.Outcome()
    again.CopyFrom(_outcome_of(spent, 0))
    again.replayed = True
    spent.attempts[1].answer = again
    assert written.rules() == set()


def _outcome_of(asked: Asked, attempt: int) -> types_pb2.Outcome:
    answer = asked.attempts[attempt].answer
    assert isinstance(answer, types_pb2.Outcome)
    return answer


def test_an_operation_of_unknown_outcome_may_be_there_or_not(written: Written) -> None:
    spent = _spend(written)
    spent.attempts[0].answer = None
    absent = Asked(2, written.root.spend(1), spent.actor)
    absent.attempts.append(Attempt(absent.operation, written.ledger.now, written.ledger.position))
    written.asked.append(absent)
    assert written.rules() == set()


def test_a_refused_operation_that_is_there_is_found_unless_a_copy_of_it_may_have_won(
    written: Written,
) -> None:
    spent = _spend(written)
    attempt = spent.attempts[0]
    done = attempt.answer
    facts = {"available": "1000", "held": "0", "requested": "200"}
    attempt.answer = Refusal("BUDGET_EXHAUSTED", facts)
    assert "refused" in written.rules()
    spent.attempts.append(replace(attempt, answer=None))
    assert "refused" not in written.rules()
    spent.attempts[1].answer = done
    assert "refused" not in written.rules()


def _refused(written: Written) -> Attempt:
    return next(
        attempt
        for each in written.asked
        for attempt in each.attempts
        if isinstance(attempt.answer, Refusal)
    )


@pytest.mark.parametrize("fact", ["available", "held", "requested", "remedy"])
def test_a_refusal_whose_facts_were_never_so_is_found(written: Written, fact: str) -> None:
    attempt = _refused(written)
    assert isinstance(attempt.answer, Refusal)
    attempt.answer = Refusal(attempt.answer.reason, {**attempt.answer.facts, fact: "7"})
    assert written.rules() == {"refusal"}


def test_a_refusal_for_another_reason_than_the_models_is_found(written: Written) -> None:
    attempt = _refused(written)
    attempt.answer = Refusal("TREE_OVERRUN", {})
    assert written.rules() == {"refusal"}


def test_a_refusal_that_was_right_only_before_it_was_asked_is_found(written: Written) -> None:
    attempt = _refused(written)
    # Held was 300 then; it was settled later, and asking after that has to tell so.
    operation = attempt.operation
    root = written.ledger.trees[written.root.id].budget(written.root.id)
    assert root.token is not None
    attempt.operation = replace(operation, authority=ByToken(root.token))
    attempt.floor = written.ledger.position
    attempt.sent_at = attempt.answered_at = written.ledger.now
    assert written.rules() == {"refusal"}


def test_an_operation_that_nobody_asked_for_is_found(written: Written) -> None:
    written.asked.remove(_spend(written))
    assert written.rules() == {"unasked"}


def test_an_operation_that_is_recorded_as_another_than_was_asked_is_found(written: Written) -> None:
    spent = _spend(written)
    assert isinstance(spent.operation, Spend)
    spent.operation = replace(spent.operation, amount=201)
    assert written.rules() == {"content"}


def test_an_operation_that_took_its_place_before_what_was_known_is_found(written: Written) -> None:
    spent = _spend(written)
    spent.attempts[0].floor = written.ledger.position
    assert "order" in written.rules()


def test_an_answer_that_goes_back_in_time_is_found(written: Written) -> None:
    _outcome(_spend(written)).ledger.position = 1
    assert written.rules() == {"order"}


def test_a_dry_run_that_tells_what_would_not_be_is_found(written: Written) -> None:
    asked = written.ask(written.root.reserve(10, dry_run=True))
    assert written.rules() == set()
    answer = asked.attempts[0].answer
    assert isinstance(answer, types_pb2.Outcome)
    answer.balances.held += 1
    assert written.rules() == {"refusal"}


def test_what_is_spent_beyond_all_that_was_granted_is_overshoot(written: Written) -> None:
    journal = written.journal()
    assert overshoot(journal) == 0
    root = next(budget for budget in journal.budgets if budget.is_root)
    spent = root.money._replace(spent=root.money.granted + 7)
    journal.budgets = [
        budget._replace(money=spent) if budget is root else budget for budget in journal.budgets
    ]
    assert overshoot(journal) == 7


def test_a_hold_that_outlives_its_time_is_leaked(written: Written) -> None:
    written.ask(written.root.reserve(10, ttl_us=SECOND))
    assert len(leaked(written.journal(), written.ledger.now)) == 1
    written.ask(written.root.reserve(10, ttl_us=3600 * SECOND))
    assert len(leaked(written.journal(), written.ledger.now)) == 1


def test_a_lease_that_outlives_its_time_is_found(written: Written) -> None:
    child = written.root.spec(1, lease_us=SECOND, lease_latest_us=SECOND)
    written.ask(written.root.delegate(child))
    found = unswept(written.journal(), written.ledger.now)
    assert [problem.rule for problem in found] == ["unswept"]
    assert unswept(written.journal(), written.ledger.now - 10 * SECOND) == []


def test_money_that_is_left_below_a_closed_budget_is_found(written: Written) -> None:
    journal = written.journal()
    assert unswept(journal, written.ledger.now) == []
    journal.budgets = [budget._replace(closed=budget.is_root) for budget in journal.budgets]
    assert {problem.rule for problem in unswept(journal, 0)} == {"unswept"}


def test_problems_count_as_what_they_are() -> None:
    tally = tallied(
        [
            Problem("lost", "a"),
            Problem("token twice", "b"),
            Problem("row", "c"),
            Problem("leaked", "d"),
        ]
    )
    assert (tally.acked_lost, tally.applied_twice, tally.wrong_totals) == (1, 1, 1)
    assert tally.problems == ["lost: a", "token twice: b", "row: c", "leaked: d"]
    assert not tally.clean


# -- Bank ---------------------------------------------------------------------------------------------


def _rows() -> list[Row]:
    return [
        ("tree", True, 1_000, 500, 100, 300, 100, 0, 0, 0),
        ("tree", False, 300, 250, 0, 0, 50, 0, 0, 0),
    ]


def test_a_read_in_which_all_is_there_is_right() -> None:
    assert wrong_totals(_rows(), {"tree": 1_000}) == []


def test_a_read_in_which_money_is_nowhere_is_wrong() -> None:
    (top, child) = _rows()
    # Balanced, and less than the parent delegated.
    less = (*child[:2], 299, 249, *child[4:])
    assert [problem.rule for problem in wrong_totals([top, less], {"tree": 1_000})] == ["total"]


def test_a_read_in_which_the_root_was_granted_something_else_is_wrong() -> None:
    assert wrong_totals(_rows(), {"tree": 999})


def test_a_read_with_a_row_out_of_balance_is_wrong() -> None:
    (top, child) = _rows()
    more = (*child[:3], 251, *child[4:])
    assert wrong_totals([top, more], {"tree": 1_000})


# -- Crash --------------------------------------------------------------------------------------------


def _load(written: Written, *, billed: int, calls: int) -> Load:
    name = written.ledger.trees[written.root.id].budget(written.root.id).name
    load = Load((name, "another"))
    load.provider.billed, load.provider.calls = billed, calls
    return load


def test_what_was_billed_is_what_has_to_be_spent(written: Written) -> None:
    # The spending of 200 is billed as well as the hold.
    assert judged(written.journal(), [_load(written, billed=320, calls=1)]) == []
    wrong = judged(written.journal(), [_load(written, billed=319, calls=1)])
    assert [problem.rule for problem in wrong] == ["billed"]


def test_a_call_that_is_settled_twice_or_never_is_found(written: Written) -> None:
    twice = judged(written.journal(), [_load(written, billed=320, calls=0)])
    never = judged(written.journal(), [_load(written, billed=320, calls=2)])
    assert [problem.rule for problem in twice + never] == ["operation twice", "unfinished"]


def test_money_that_is_held_when_everybody_is_done_is_found(written: Written) -> None:
    written.ask(written.root.reserve(10))
    found = judged(written.journal(), [_load(written, billed=320, calls=1)])
    assert [problem.rule for problem in found] == ["held"]


# -- The verdict, and histories -----------------------------------------------------------------------


def test_the_verdict_is_one_line_with_exactly_the_keys_that_readers_know() -> None:
    line = json.loads(Verdict(Tally(rounds=3, problems=["x: y"]), 4, 4, 12.34).line())
    assert list(line) == [*COUNTS, "planted_faults_found", "planted_faults", "seconds"]
    assert (line["rounds"], line["planted_faults"], line["seconds"]) == (3, 4, 12.3)


def test_the_verdict_is_clean_only_without_a_problem_and_with_all_planted_faults_found() -> None:
    assert Verdict(Tally(), 4, 4, 1).clean
    assert not Verdict(Tally(), 3, 4, 1).clean
    assert not Verdict(Tally(problems=["x: y"]), 4, 4, 1).clean
    assert not Verdict(Tally(overshoot=1), 4, 4, 1).clean


def test_the_report_has_the_counts_of_every_part_and_what_became_of_planted_faults() -> None:
    results = [
        Result("race", Tally(rounds=3, cuts=5), 9.6),
        Result("planted", Tally(rounds=2), 20.2, found=["a", "b"], masked=["c"]),
    ]
    text = report(Verdict(Tally(rounds=5), 2, 4, 30.0), results, 17)
    assert "Seed 17;" in text
    assert "| `race` | 10 | 3 | 0 | 0 | 5 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "found: `a`, `b`." in text
    assert "made up for: `c`." in text
    assert '"planted_faults_found": 2, "planted_faults": 4' in text


def test_a_history_has_its_seed_first_then_events_and_never_a_secret(tmp_path: Path) -> None:
    secret = new_secret()
    ledger = Ledger()
    spend = replace(ledger.grant().spend(5), authority=ByToken(token_id(secret)))
    with History(tmp_path / "h.jsonl", "modelled", 17) as history:
        history.invoke(3, "SPEND", told(spend))
        history.ok(3, "SPEND", {"seq": 2})
    text = (tmp_path / "h.jsonl").read_text()
    first, invoked, done = map(json.loads, text.splitlines())
    assert first == {"part": "modelled", "seed": 17}
    assert (invoked["process"], invoked["type"], invoked["f"]) == (3, "invoke", "SPEND")
    assert invoked["value"]["authority"] == token_id(secret).hex()
    assert done["type"] == "ok"
    assert done["time"] >= invoked["time"]
    assert secret.hex() not in text
    assert TOKEN_DOMAIN.decode() not in text


def test_an_outcome_is_what_the_ledger_in_memory_says(written: Written) -> None:
    # The history above is made of real answers, not of what the test imagines.
    assert isinstance(written.ledger.ask(written.root.spend(1)), Outcome)


def test_the_page_for_readers_names_every_part_and_every_planted_fault() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    names = [part.name for part in PARTS] + list(PLANTED)
    assert [name for name in names if f"`{name}`" not in page] == []
