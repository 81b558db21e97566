"""Chains within a request: `after` names the token that an earlier operation left."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from peculium_server.core.operations import After, ByHolder, ByRole, ByToken, Operation, Spend
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from tests.core.ledger import AUDITOR, MINUTE, OTHER, Answer, HoldRef, Ledger, Node


def _chained(operations: list[Operation]) -> list[Operation]:
    """Each but the first consumes what the one before it left."""
    return [
        replace(operation, authority=After(index - 1)) if index else operation
        for index, operation in enumerate(operations)
    ]


def _refusals(answers: list[Answer]) -> list[Refusal | None]:
    return [answer.reason if isinstance(answer, Refused) else None for answer in answers]


def _facts(answer: Answer) -> dict[str, str]:
    assert isinstance(answer, Refused)
    return answer.facts


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def root(ledger: Ledger) -> Node:
    return ledger.grant(100)


# -- Near the end of a budget ---------------------------------------------------------------------


@given(
    granted=st.integers(0, 400),
    amounts=st.lists(st.integers(1, 40), min_size=50, max_size=50),
    tried=st.sets(st.integers(0, 49), max_size=10),
)
def test_fifty_chained_reserves_are_each_told_what_one_after_the_other_would_be(
    granted: int, amounts: list[int], tried: set[int]
) -> None:
    ledger = Ledger(checked=False)
    root = ledger.grant(granted)
    operations = [
        root.reserve(amount, dry_run=index in tried) for index, amount in enumerate(amounts)
    ]
    available = granted
    for index, answer in enumerate(ledger.batch(_chained([*operations]))):
        amount = amounts[index]
        if amount > available:
            assert isinstance(answer, Refused)
            assert answer.reason is Refusal.BUDGET_EXHAUSTED
            assert answer.facts["available"] == str(available)
            assert answer.facts["held"] == str(granted - available)
            assert answer.facts["requested"] == str(amount)
        else:
            assert isinstance(answer, Outcome)
            assert answer.money.available == available - amount
            if index not in tried:
                available -= amount
    ledger.check(root.root_id)
    assert root.money.available == available
    assert ledger.verify(root.root_id) is None


@given(
    granted=st.integers(0, 200),
    amounts=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    tried=st.sets(st.integers(0, 7), max_size=2),
)
def test_a_chain_that_is_sent_again_finds_everything_that_was_accepted(
    granted: int, amounts: list[int], tried: set[int]
) -> None:
    ledger = Ledger()
    root = ledger.grant(granted)
    operations = _chained(
        [root.reserve(amount, dry_run=index in tried) for index, amount in enumerate(amounts)]
    )
    first = ledger.batch(operations)
    entries = len(ledger.journal)
    again = ledger.batch(operations)
    assert len(ledger.journal) == entries
    for index, (was, is_now) in enumerate(zip(first, again, strict=True)):
        if isinstance(was, Outcome) and index not in tried:
            assert is_now == was._replace(replayed=True)
        elif isinstance(was, Refused):
            # It left no record, and if the chain went on without it, its token has gone.
            assert isinstance(is_now, Refused)
            assert is_now.reason in (was.reason, Refusal.TOKEN_CONSUMED)


# -- What an operation leaves -----------------------------------------------------------------------


def test_a_chain_goes_on_where_a_refused_operation_left_the_token(
    ledger: Ledger, root: Node
) -> None:
    answers = ledger.batch(_chained([root.reserve(60), root.reserve(60), root.spend(40)]))
    assert _refusals(answers) == [None, Refusal.BUDGET_EXHAUSTED, None]
    assert root.money.available == 0


def test_a_chain_goes_on_where_a_dry_run_left_the_token(ledger: Ledger, root: Node) -> None:
    answers = ledger.batch(_chained([root.reserve(60, dry_run=True), root.reserve(60)]))
    assert _refusals(answers) == [None, None]
    assert root.money.held == 60


def test_a_chain_goes_on_where_a_malformed_operation_left_the_token(
    ledger: Ledger, root: Node
) -> None:
    answers = ledger.batch(_chained([root.spend(1), root.reserve(0), root.spend(2)]))
    assert _refusals(answers) == [None, Refusal.MALFORMED, None]
    assert root.money.spent == 3


def test_after_everything_was_returned_the_token_is_consumed(ledger: Ledger, root: Node) -> None:
    child = root.child(50)
    close = child.return_all()
    answers = ledger.batch(_chained([close, child.reserve(1)]))
    assert _refusals(answers) == [None, Refusal.TOKEN_CONSUMED]
    assert _facts(answers[1])["consumed_by"].replace("-", "") == close.operation_id.hex()
    assert _facts(answers[1])["kind"] == "RETURN"


@pytest.mark.parametrize("ending", ["settle", "release", "resolve"])
def test_after_a_hold_has_ended_its_token_is_consumed(
    ledger: Ledger, root: Node, ending: str
) -> None:
    hold = root.hold(10)
    ends: Operation = hold.settle(10) if ending == "settle" else hold.release()
    if ending == "resolve":
        ends = root.admin_resolve(hold, 10)
        again: Operation = hold.release()
    else:
        again = hold.release(authority=After(0))
    assert _refusals(ledger.batch([ends, again])) == [None, Refusal.TOKEN_CONSUMED]


@pytest.mark.parametrize(
    "authority", [ByHolder(), ByRole()], ids=["the holder's name", "the admin's role"]
)
def test_an_operation_without_a_token_leaves_none(
    ledger: Ledger, authority: ByHolder | ByRole
) -> None:
    root = ledger.grant(100, by_token=False, holder="agent")
    first = root.spend(1) if authority == ByHolder() else root.top_up(1)
    later = root.reserve(1, authority=After(0), next_token_id=ledger.token())
    assert _refusals(ledger.batch([first, later])) == [None, Refusal.CAPABILITY_UNKNOWN]


def test_an_operation_on_another_budget_leaves_no_token_of_this_one(
    ledger: Ledger, root: Node
) -> None:
    other = root.child(10)
    answers = ledger.batch(_chained([root.spend(1), other.spend(1)]))
    assert _refusals(answers) == [None, Refusal.CAPABILITY_UNKNOWN]


def test_an_operation_on_another_root_leaves_no_token_of_this_one(
    ledger: Ledger, root: Node
) -> None:
    other = ledger.grant(10)
    answers = ledger.batch(_chained([root.spend(1), other.spend(1)]))
    assert _refusals(answers) == [None, Refusal.CAPABILITY_UNKNOWN]


def test_an_unknown_token_leaves_nothing_that_could_be_used(ledger: Ledger, root: Node) -> None:
    guess = root.spend(1, authority=ByToken(ledger.token()))
    answers = ledger.batch(_chained([guess, root.spend(1)]))
    assert _refusals(answers) == [Refusal.CAPABILITY_UNKNOWN] * 2


def test_a_consumed_token_is_consumed_for_the_whole_chain(ledger: Ledger, root: Node) -> None:
    stale = root.spend(1)
    ledger.do(root.spend(1))
    answers = ledger.batch(_chained([stale, root.spend(1)]))
    assert _refusals(answers) == [Refusal.TOKEN_CONSUMED] * 2


def test_two_operations_after_the_same_one_are_one_too_many(ledger: Ledger, root: Node) -> None:
    operations = [root.spend(1), root.spend(2), root.spend(3)]
    operations[1] = replace(operations[1], authority=After(0))
    operations[2] = replace(operations[2], authority=After(0))
    assert _refusals(ledger.batch(operations)) == [None, None, Refusal.TOKEN_CONSUMED]


# -- Which index may be named -------------------------------------------------------------------------


@pytest.mark.parametrize("index", [1, 2, 255, 256, -1])
def test_only_an_earlier_operation_may_be_named(ledger: Ledger, root: Node, index: int) -> None:
    later = root.spend(1, authority=After(index))
    answers = ledger.batch([root.spend(1), later])
    assert _refusals(answers) == [None, Refusal.MALFORMED]
    assert _facts(answers[1])["field"] == "authority.after"


def test_a_malformed_operation_is_told_so_before_it_is_told_that_none_was_left(
    ledger: Ledger, root: Node
) -> None:
    other = root.child(10)
    answers = ledger.batch(_chained([root.spend(1), other.spend(0)]))
    assert _refusals(answers) == [None, Refusal.MALFORMED]


def test_who_may_not_operate_is_told_so_before_it_is_told_that_none_was_left(
    ledger: Ledger, root: Node
) -> None:
    other = root.child(10)
    answers = ledger.batch(_chained([root.spend(1), other.spend(1)]), AUDITOR)
    assert _refusals(answers) == [Refusal.PERMISSION_DENIED] * 2


# -- Chains of every kind -------------------------------------------------------------------------------


def test_a_hold_is_reserved_used_extended_and_settled_in_one_chain(
    ledger: Ledger, root: Node
) -> None:
    reserve = root.reserve(30)
    hold = HoldRef(root, reserve.hold_id)
    operations: list[Operation] = [
        reserve,
        hold.settle(10, keep_open=True, authority=After(0)),
        hold.extend(20 * MINUTE, authority=After(1)),
        root.spend(5, authority=After(0)),
        hold.settle(10, authority=After(2)),
    ]
    first = ledger.batch(operations)
    assert _refusals(first) == [None] * 5
    assert (root.money.available, root.money.spent, root.money.held) == (75, 25, 0)
    again = ledger.batch(operations)
    assert again == [
        answer._replace(replayed=True) for answer in first if isinstance(answer, Outcome)
    ]


def test_children_are_used_in_the_chain_that_makes_them(ledger: Ledger, root: Node) -> None:
    specs = [root.spec(20), root.spec(30), root.spec(5, by_token=False, holder="agent")]
    first, second, named = [Node(ledger, root.root_id, spec.budget_id) for spec in specs]
    operations: list[Operation] = [
        root.delegate(*specs),
        first.reserve(7, authority=After(0)),
        second.spend(30, authority=After(0)),
        root.spend(45, authority=After(0)),
        second.return_all(authority=After(2)),
        named.spend(5, authority=ByHolder()),
        root.fund(first, 1, authority=After(3)),
        named.spend(5, authority=After(0), next_token_id=ledger.token()),
    ]
    answers = ledger.batch(operations)
    assert _refusals(answers) == [
        *[None] * 6,
        Refusal.BUDGET_EXHAUSTED,
        Refusal.CAPABILITY_UNKNOWN,
    ]
    again = ledger.batch(operations)
    assert again[:6] == [
        answer._replace(replayed=True) for answer in answers[:6] if isinstance(answer, Outcome)
    ]
    assert _refusals(again)[6:] == [Refusal.BUDGET_EXHAUSTED, Refusal.CAPABILITY_UNKNOWN]


def test_an_accepted_token_is_used_in_the_chain_that_accepts_it(ledger: Ledger, root: Node) -> None:
    answers = ledger.batch(_chained([root.accept(), root.spend(1)]), OTHER)
    assert _refusals(answers) == [None, None]
    assert root.budget.holder == "other"


def test_recovered_tokens_are_used_in_the_chain_that_recovers_them(ledger: Ledger) -> None:
    root = ledger.grant(100, holder="agent")
    hold = root.hold(10)
    answers = ledger.batch(
        [
            root.recover(holds=(hold.rotation(),)),
            hold.settle(4, authority=After(0)),
            root.spend(1, authority=After(0)),
        ]
    )
    assert _refusals(answers) == [None, None, None]
    assert root.money.spent == 5


def test_a_root_is_used_in_the_chain_that_grants_it(ledger: Ledger) -> None:
    grant = ledger.ask_grant(10)
    root = Node(ledger, grant.root_id, grant.root_id)
    token = ledger.token()
    spend = root.make(Spend, {"authority": After(0), "amount": 10, "next_token_id": token})
    first = ledger.batch([grant, spend])
    assert _refusals(first) == [None, None]
    assert _refusals(ledger.batch([grant, spend])) == [None, None]


def test_a_hold_of_one_budget_is_not_settled_in_the_name_of_another(
    ledger: Ledger, root: Node
) -> None:
    other = root.child(10)
    reserve = root.reserve(5)
    settle = HoldRef(other, reserve.hold_id).settle(5, authority=After(0))
    rotated = ledger.grant(20, holder="agent")
    hold, small = rotated.hold(5), rotated.child(5)
    in_the_name_of_the_child = HoldRef(small, hold.id).settle(5, authority=After(0))
    assert _refusals(ledger.batch([reserve, settle])) == [None, Refusal.CAPABILITY_UNKNOWN]
    assert _refusals(
        ledger.batch([rotated.recover(holds=(hold.rotation(),)), in_the_name_of_the_child])
    ) == [None, Refusal.CAPABILITY_UNKNOWN]


def test_a_malformed_authority_leaves_only_what_is_malformed(ledger: Ledger, root: Node) -> None:
    operations = _chained([root.spend(1, authority=ByToken(b"short")), root.spend(1)])
    assert _refusals(ledger.batch(operations)) == [Refusal.MALFORMED] * 2


def test_one_operation_of_a_batch_is_refused_and_touches_no_other(
    ledger: Ledger, root: Node
) -> None:
    other = ledger.grant(10)
    answers = ledger.batch([root.spend(1), other.spend(11), other.spend(10), root.spend(1)])
    assert _refusals(answers) == [None, Refusal.BUDGET_EXHAUSTED, None, Refusal.TOKEN_CONSUMED]


# -- Several requests in one transaction ------------------------------------------------------------------


def test_requests_of_one_transaction_see_what_the_earlier_ones_did(
    ledger: Ledger, root: Node
) -> None:
    first, second = ledger.transaction([[root.reserve(60)], [root.reserve(60)]])
    assert _refusals(first) == [None]
    assert _refusals(second) == [Refusal.TOKEN_CONSUMED]


def test_a_chain_does_not_reach_into_another_request(ledger: Ledger, root: Node) -> None:
    first, second = ledger.transaction(
        [[root.spend(1)], [root.freeze(), root.spend(1, authority=After(0))]]
    )
    assert _refusals(first) == [None]
    assert _refusals(second) == [None, Refusal.CAPABILITY_UNKNOWN]


def test_two_roots_of_one_name_are_not_made_in_one_transaction(ledger: Ledger) -> None:
    first, second = ledger.transaction(
        [[ledger.ask_grant(1, name="acme")], [ledger.ask_grant(1, name="acme")]]
    )
    assert _refusals(first) == [None]
    assert _refusals(second) == [Refusal.NAME_TAKEN]


def test_two_children_of_one_name_are_not_made_in_one_transaction(ledger: Ledger) -> None:
    root = ledger.grant(10, by_token=False, holder="agent")
    first, second = ledger.transaction(
        [
            [root.delegate(root.spec(1, name="run-7"))],
            [root.delegate(root.spec(1, name="run-7"))],
        ]
    )
    assert _refusals(first) == [None]
    assert _refusals(second) == [Refusal.NAME_TAKEN]


def test_an_operation_that_is_twice_in_a_transaction_is_done_once(
    ledger: Ledger, root: Node
) -> None:
    spend = root.spend(10)
    (first,), (second,) = ledger.transaction([[spend], [spend]])
    assert isinstance(first, Outcome)
    assert second == first._replace(replayed=True)
    assert root.money.spent == 10


# -- A request in several transactions ----------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_chain_goes_on_over_a_cut_and_is_found_again_wherever_it_was_cut(
    ledger: Ledger, root: Node, cut: int
) -> None:
    reserve, spec = root.reserve(30), root.spec(20)
    hold = HoldRef(root, reserve.hold_id)
    child = Node(ledger, root.root_id, spec.budget_id)
    operations: list[Operation] = [
        reserve,
        root.delegate(spec, authority=After(0)),
        root.spend(90, authority=After(1)),
        root.spend(10, authority=After(2)),
        hold.settle(5, authority=After(0)),
        child.spend(20, authority=After(1)),
        child.return_all(authority=After(5)),
    ]
    first = ledger.cut_batch(operations, cut)
    assert _refusals(first) == [None, None, Refusal.BUDGET_EXHAUSTED, *[None] * 4]
    for again in (
        ledger.batch(operations),
        *(ledger.cut_batch(operations, other) for other in range(1, 7)),
    ):
        for was, is_now in zip(first, again, strict=True):
            if isinstance(was, Outcome):
                assert is_now == was._replace(replayed=True)
        assert _refusals(again)[2] is Refusal.TOKEN_CONSUMED


def test_a_cut_chain_is_told_when_somebody_came_between(ledger: Ledger) -> None:
    root = ledger.grant(100, holder="agent")
    operations = _chained([root.spend(1), root.spend(2)])
    ledger.cut_batch(operations[:1], 1)
    ledger.do(root.recover())
    answers = ledger.cut_batch(operations, 1)
    assert _refusals(answers) == [None, Refusal.TOKEN_CONSUMED]
    assert _facts(answers[1])["fenced_by"] == "agent"
