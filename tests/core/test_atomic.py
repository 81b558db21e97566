"""Atomic batches: all of their operations happen, or none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from peculium_server.core.operations import After, AtomicBatch, Operation, Spend
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from tests.core.ledger import Answer, Ledger, Node, requested


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def tokens(ledger: Ledger) -> Node:
    return ledger.grant(1_000)


@pytest.fixture
def money(ledger: Ledger) -> Node:
    return ledger.grant(100)


def _refusals(answers: list[Answer]) -> list[Refusal | None]:
    return [answer.reason if isinstance(answer, Refused) else None for answer in answers]


def _facts(answer: Answer) -> dict[str, str]:
    assert isinstance(answer, Refused)
    return answer.facts


def test_two_budgets_of_different_trees_are_reserved_from_at_once(
    ledger: Ledger, tokens: Node, money: Node
) -> None:
    assert _refusals(ledger.atomic([tokens.reserve(800), money.reserve(60)])) == [None, None]
    assert (tokens.money.held, money.money.held) == (800, 60)
    assert ledger.verify(tokens.id) is None
    assert ledger.verify(money.id) is None


def test_the_first_refusal_is_the_batchs_and_nothing_happens(
    ledger: Ledger, tokens: Node, money: Node
) -> None:
    entries = len(ledger.journal)
    answers = ledger.atomic(
        [tokens.reserve(800), money.reserve(101), money.reserve(102), tokens.spend(1)]
    )
    assert _refusals(answers) == [
        Refusal.BATCH_REFUSED,
        Refusal.BUDGET_EXHAUSTED,
        Refusal.BATCH_REFUSED,
        Refusal.BATCH_REFUSED,
    ]
    assert _facts(answers[1])["requested"] == "101"
    others = [_facts(answers[index]) for index in (0, 2, 3)]
    assert others == [{"index": "1", "reason": "BUDGET_EXHAUSTED"}] * 3
    assert len(ledger.journal) == entries
    assert (tokens.money.held, money.money.held) == (0, 0)


def test_a_refused_batch_leaves_its_tokens_live(ledger: Ledger, tokens: Node, money: Node) -> None:
    batch = [tokens.reserve(800), money.reserve(101)]
    ledger.atomic(batch)
    assert _refusals(ledger.atomic([batch[0], money.reserve(100)])) == [None, None]


def test_each_operation_sees_what_those_before_it_did(ledger: Ledger, money: Node) -> None:
    first = money.reserve(60)
    second = replace(money.reserve(60), authority=After(0))
    answers = ledger.atomic([first, second])
    assert _refusals(answers) == [Refusal.BATCH_REFUSED, Refusal.BUDGET_EXHAUSTED]
    assert _facts(answers[1])["available"] == "40"


def test_a_chain_in_an_atomic_batch_is_accepted_and_replayed_as_a_whole(
    ledger: Ledger, money: Node
) -> None:
    batch: list[Operation] = [money.reserve(60), replace(money.spend(40), authority=After(0))]
    batch_id = ledger.id()
    first = ledger.atomic(batch, batch_id=batch_id)
    assert _refusals(first) == [None, None]
    entries = len(ledger.journal)
    again = ledger.atomic(batch, batch_id=batch_id)
    assert again == [
        answer._replace(replayed=True) for answer in first if isinstance(answer, Outcome)
    ]
    assert len(ledger.journal) == entries


def test_every_operation_is_recorded_with_its_batch(
    ledger: Ledger, tokens: Node, money: Node
) -> None:
    batch_id = ledger.id()
    entries = len(ledger.journal)
    ledger.atomic([tokens.spend(1), money.spend(1)], batch_id=batch_id)
    recorded = [requested(entry).batch for entry in ledger.journal[entries:]]
    assert recorded == [AtomicBatch(batch_id, 2)] * 2


# -- Other content under the same ids ---------------------------------------------------------------


def test_an_operation_of_a_batch_is_another_one_alone(ledger: Ledger, money: Node) -> None:
    operation = money.spend(1)
    ledger.atomic([operation])
    facts = ledger.refuse(operation, Refusal.OPERATION_ID_REUSED)
    assert facts["field"] == "batch"


def test_an_operation_that_happened_alone_is_another_one_in_a_batch(
    ledger: Ledger, tokens: Node, money: Node
) -> None:
    operation = money.spend(1)
    ledger.do(operation)
    answers = ledger.atomic([tokens.spend(1), operation])
    assert _refusals(answers) == [Refusal.BATCH_REFUSED, Refusal.OPERATION_ID_REUSED]
    assert _facts(answers[1])["field"] == "batch"
    assert tokens.money.spent == 0


@pytest.mark.parametrize("changed", [0, 1])
def test_a_batch_of_which_some_is_recorded_has_other_content(
    ledger: Ledger, tokens: Node, money: Node, changed: int
) -> None:
    batch: list[Operation] = [tokens.spend(1), money.spend(1)]
    batch_id = ledger.id()
    ledger.atomic(batch, batch_id=batch_id)
    batch[changed] = (tokens, money)[changed].spend(2)
    answers = ledger.atomic(batch, batch_id=batch_id)
    assert _refusals(answers) == [Refusal.BATCH_REFUSED, Refusal.OPERATION_ID_REUSED]
    assert _facts(answers[1])["field"] == "operations[1].operation_id"
    assert (tokens.money.spent, money.money.spent) == (1, 1)


def test_a_part_of_a_batch_has_other_content(ledger: Ledger, tokens: Node, money: Node) -> None:
    batch = [tokens.spend(1), money.spend(1)]
    batch_id = ledger.id()
    ledger.atomic(batch, batch_id=batch_id)
    [answer] = ledger.atomic(batch[:1], batch_id=batch_id)
    assert _refusals([answer]) == [Refusal.OPERATION_ID_REUSED]
    assert _facts(answer)["field"] == "batch"


def test_the_same_operation_twice_in_a_batch_is_refused(ledger: Ledger, money: Node) -> None:
    operation = money.spend(1)
    answers = ledger.atomic([operation, operation])
    assert _refusals(answers) == [Refusal.BATCH_REFUSED, Refusal.OPERATION_ID_REUSED]
    assert money.money.spent == 0


# -- Dry runs ---------------------------------------------------------------------------------------


def test_a_dry_run_sees_what_those_before_it_would_do_and_records_nothing(
    ledger: Ledger, tokens: Node, money: Node
) -> None:
    entries = len(ledger.journal)
    fits: list[Operation] = [
        money.reserve(60, dry_run=True),
        replace(money.reserve(40, dry_run=True), authority=After(0)),
        tokens.spend(1_000, dry_run=True),
    ]
    assert _refusals(ledger.atomic(fits)) == [None] * 3
    too_much = [*fits[:1], replace(money.reserve(41, dry_run=True), authority=After(0))]
    refusals = _refusals(ledger.atomic(too_much))
    assert refusals == [Refusal.BATCH_REFUSED, Refusal.BUDGET_EXHAUSTED]
    assert len(ledger.journal) == entries
    assert (tokens.money.spent, money.money.held) == (0, 0)


def test_a_batch_is_run_dry_as_a_whole_or_not(ledger: Ledger, tokens: Node, money: Node) -> None:
    answers = ledger.atomic([tokens.spend(1), money.spend(1, dry_run=True)])
    assert _refusals(answers) == [Refusal.BATCH_REFUSED, Refusal.MALFORMED]
    assert _facts(answers[1])["field"] == "dry_run"


# -- Shape --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "field"),
    [
        (AtomicBatch(b"", 1), "batch.operation_id"),
        (AtomicBatch(bytes(16), 1), "batch.operation_id"),
    ],
)
def test_a_batch_has_an_id_of_its_own(
    ledger: Ledger, money: Node, batch: AtomicBatch, field: str
) -> None:
    facts = ledger.refuse(replace(money.spend(1), batch=batch), Refusal.MALFORMED)
    assert facts["field"] == field


@pytest.mark.parametrize("size", [0, -1, 257])
def test_a_batch_has_1_to_256_operations(ledger: Ledger, money: Node, size: int) -> None:
    operation = replace(money.spend(1), batch=AtomicBatch(ledger.id(), size))
    assert ledger.refuse(operation, Refusal.MALFORMED)["field"] == "batch.size"


# -- Against one after the other -----------------------------------------------------------------------


@given(
    granted=st.lists(st.integers(0, 50), min_size=2, max_size=3),
    asked=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30)), min_size=1, max_size=8),
)
def test_a_batch_is_accepted_if_one_after_the_other_all_would_be(
    granted: list[int], asked: list[tuple[int, int]]
) -> None:
    ledger, model = Ledger(checked=False), list(granted)
    roots = [ledger.grant(amount) for amount in granted]
    batch: list[Spend] = []
    last: dict[int, int] = {}
    fits = True
    for index, (which, amount) in enumerate(asked):
        root = which % len(roots)
        operation = roots[root].spend(amount)
        if root in last:
            operation = replace(operation, authority=After(last[root]))
        batch.append(operation)
        last[root] = index
        model[root] -= amount
        fits = fits and model[root] >= 0
    answers = ledger.atomic(batch)
    assert all(isinstance(answer, Outcome) for answer in answers) is fits
    left = [root.money.available for root in roots]
    assert left == (model if fits else granted)
