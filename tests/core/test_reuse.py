"""When a refusal is the sign of a secret that two principals know, and what that freezes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from peculium_server.core.operations import After, ByToken, Kind, Operation
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.reuse import GUARD, Reuse, ReuseKind, freeze, freezes
from peculium_server.core.state import BudgetState
from tests.core.ledger import ADMIN, AGENT, MINUTE, SECOND, HoldRef, Ledger, Node
from tests.core.test_authority import ALICE, BOB

R = Refusal
CONSUMED, HOLD, BOUND = ReuseKind


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def run(ledger: Ledger) -> Node:
    """A bearer's budget, which another has made."""
    return ledger.grant(1_000).child(500)


def sign(answer: Outcome | Refused) -> Reuse | None:
    assert isinstance(answer, Refused)
    return answer.reuse


def kind_of(answer: Outcome | Refused) -> ReuseKind | None:
    reuse = sign(answer)
    return None if reuse is None else reuse.kind


# -- Whose token it was --------------------------------------------------------------------------------


CONSUMING: dict[Kind, Callable[[Node], Operation]] = {
    Kind.RESERVE: lambda node: node.reserve(1),
    Kind.SPEND: lambda node: node.spend(1),
    Kind.DELEGATE: lambda node: node.delegate(node.spec(1)),
    Kind.ACCEPT: lambda node: node.accept(),
    Kind.FUND: lambda node: node.fund(node.child(1), 1),
    Kind.RENEW: lambda node: node.renew(),
    Kind.RETURN: lambda node: node.return_all(cascade=True),
    Kind.REVOKE: lambda node: node.revoke(node.child(1)),
    Kind.RESOLVE: lambda node: node.resolve(node.hold(1), 1),
}


@pytest.mark.parametrize("kind", CONSUMING)
def test_a_token_that_another_principal_consumed_is_a_sign_whatever_it_was_consumed_by(
    ledger: Ledger, kind: Kind
) -> None:
    leased = {"lease_us": MINUTE, "lease_latest_us": 5 * MINUTE}
    run = ledger.grant(1_000).child(500, **leased)
    asked = CONSUMING[kind](run)
    stale = run.spend(1, authority=asked.authority)
    ledger.do(asked, ALICE)
    ledger.pass_time(SECOND)
    answer = ledger.ask(stale, BOB)
    assert isinstance(answer, Refused)
    assert answer.reason is R.TOKEN_CONSUMED
    reuse = sign(answer)
    assert reuse is not None
    assert (reuse.kind, reuse.at) == (CONSUMED, ledger.now)
    consumption = reuse.consumption
    assert consumption is not None
    assert (consumption.operation_id, consumption.kind) == (asked.operation_id, kind)
    assert (consumption.principal, consumption.at) == ("alice", ledger.now - SECOND)
    # What the caller is told is what it was told before.
    assert "alice" not in str(answer.facts) or answer.facts["fenced_by"] == "alice"
    assert kind_of(ledger.ask(stale, ALICE)) is None


def test_the_owner_who_comes_after_the_thief_is_a_sign_like_the_thief_after_the_owner(
    ledger: Ledger, run: Node
) -> None:
    ledger.do(run.accept(), ALICE)
    # Alice's token is bound, so nobody else can consume it; a bearer's is not.
    bearers = ledger.grant(100).child(50)
    owners, thiefs = bearers.spend(1), bearers.accept()
    ledger.do(thiefs, BOB)
    reuse = sign(ledger.ask(owners, ALICE))
    assert reuse is not None
    assert (reuse.kind, reuse.holder) == (CONSUMED, "bob")


def test_a_chain_behind_a_consumed_token_is_as_many_signs(ledger: Ledger, run: Node) -> None:
    stale = run.spend(1)
    ledger.do(run.spend(1), ALICE)
    chained = run.spend(1, authority=After(0))
    answers = ledger.batch([stale, chained], BOB)
    assert [kind_of(each) for each in answers] == [CONSUMED, CONSUMED]


def test_a_dry_run_and_an_atomic_batch_show_a_secret_too(ledger: Ledger, run: Node) -> None:
    stale = run.spend(1)
    ledger.do(run.spend(1), ALICE)
    assert kind_of(ledger.ask(replace(stale, dry_run=True), BOB)) is CONSUMED
    other = ledger.grant(10)
    first, second = ledger.atomic([stale, other.spend(1)], actor=BOB)
    assert kind_of(first) is CONSUMED
    assert kind_of(second) is None


def test_anothers_request_sent_once_more_is_a_sign_though_its_id_is_what_is_refused(
    ledger: Ledger, run: Node
) -> None:
    spend = run.spend(1)
    ledger.do(spend, ALICE)
    answer = ledger.ask(spend, BOB)
    assert isinstance(answer, Refused)
    assert answer.reason is R.OPERATION_ID_REUSED
    assert kind_of(answer) is CONSUMED
    again = ledger.ask(spend, ALICE)
    assert isinstance(again, Outcome)
    assert again.replayed


# -- Of nothing ---------------------------------------------------------------------------------------------


def test_ones_own_retries_are_no_sign_whatever_they_ask(ledger: Ledger, run: Node) -> None:
    stale = run.spend(1)
    other = run.reserve(1, authority=stale.authority)
    differs = replace(stale, amount=2)
    ledger.do(stale)
    assert kind_of(ledger.ask(other)) is None
    assert kind_of(ledger.ask(differs)) is None


def test_a_secret_that_nobody_has_consumed_is_no_sign(ledger: Ledger, run: Node) -> None:
    foreign = ledger.grant(100)
    stale = foreign.spend(1)
    ledger.do(foreign.spend(1), ALICE)
    made_up = run.spend(1, authority=ByToken(ledger.token()))
    foreigns = run.spend(1, authority=stale.authority)
    malformed = run.spend(0, authority=stale.authority)
    for operation in (made_up, foreigns, malformed):
        assert kind_of(ledger.ask(operation, BOB)) is None


def test_what_was_refused_has_consumed_nothing(ledger: Ledger, run: Node) -> None:
    dear = run.spend(10_000)
    assert kind_of(ledger.ask(dear, ALICE)) is None
    assert kind_of(ledger.ask(dear, BOB)) is None


def test_whom_an_admin_has_fenced_is_no_thief(ledger: Ledger, run: Node) -> None:
    ledger.do(run.accept(), ALICE)
    older = run.spend(1)
    ledger.do(run.admin_recover(holder="bob"))
    assert kind_of(ledger.ask(older, ALICE)) is None
    # Nor is a bearer, of whom nobody knows who it was.
    bearers = ledger.grant(10).child(5)
    older = bearers.spend(1)
    ledger.do(bearers.admin_recover(holder="bob"))
    assert kind_of(ledger.ask(older, ALICE)) is None
    # And who has the budget now is fenced by the admin's next one.
    older = bearers.spend(1)
    ledger.do(bearers.admin_recover(holder="bob"))
    assert kind_of(ledger.ask(older, BOB)) is None


def test_what_a_holder_has_recovered_was_the_holders_and_nobody_elses(
    ledger: Ledger, run: Node
) -> None:
    ledger.do(run.accept(), ALICE)
    older = run.spend(1)
    ledger.do(run.recover(), ALICE)
    assert kind_of(ledger.ask(older, ALICE)) is None
    assert kind_of(ledger.ask(older, BOB)) is CONSUMED
    # Once the budget is another's, it is not known any more whether it was the holder's own Recover.
    ledger.do(run.admin_recover(holder="carol"))
    assert kind_of(ledger.ask(older, BOB)) is None


# -- Tokens of holds, and live ones -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end", [HoldRef.settle, HoldRef.release, HoldRef.extend], ids=["settle", "release", "extend"]
)
def test_a_holds_token_is_told_from_its_budgets(
    ledger: Ledger, run: Node, end: Callable[[HoldRef], Operation]
) -> None:
    hold = run.hold(10)
    late = hold.release()
    as_budgets = run.spend(1, authority=late.authority)
    ledger.do(end(hold), ALICE)
    assert kind_of(ledger.ask(late, BOB)) is HOLD
    assert kind_of(ledger.ask(as_budgets, BOB)) is HOLD
    assert kind_of(ledger.ask(late, ALICE)) is None


ENDED_ON_A_WORD: dict[str, Callable[[Node, HoldRef], Operation]] = {
    "resolved by the owner": lambda node, hold: node.resolve(hold, 1),
    "resolved by an admin": lambda node, hold: node.admin_resolve(hold, 1),
    "rotated by the holder": lambda node, hold: node.recover(holds=(hold.rotation(),)),
    "rotated by an admin": lambda node, hold: node.admin_recover(holds=(hold.rotation(),)),
}


@pytest.mark.parametrize("how", ENDED_ON_A_WORD)
def test_a_holds_token_that_was_ended_without_its_secret_is_no_sign(
    ledger: Ledger, run: Node, how: str
) -> None:
    ledger.do(run.accept(), ALICE)
    hold = run.hold(10)
    late = hold.settle(1)
    # Whoever has it may try it as the budget's: it is none.
    as_budgets = run.spend(1, authority=late.authority)
    asked = ENDED_ON_A_WORD[how](run, hold)
    ledger.do(asked, ADMIN if "admin" in how else ALICE)
    for operation in (late, as_budgets):
        answer = ledger.ask(operation, BOB)
        assert isinstance(answer, Refused)
        assert answer.reason is R.TOKEN_CONSUMED
        assert kind_of(answer) is None


def test_a_live_token_that_is_bound_to_another_is_a_sign_and_answered_like_a_wrong_one(
    ledger: Ledger, run: Node
) -> None:
    ledger.do(run.accept(), ALICE)
    stolen = ledger.ask(run.spend(1), BOB)
    wrong = ledger.ask(run.spend(1, authority=ByToken(ledger.token())), BOB)
    assert isinstance(stolen, Refused)
    assert isinstance(wrong, Refused)
    assert (stolen.reason, stolen.facts) == (wrong.reason, wrong.facts)
    assert stolen.reason is R.CAPABILITY_UNKNOWN
    assert (kind_of(stolen), kind_of(wrong)) == (BOUND, None)
    reuse = sign(stolen)
    assert reuse is not None
    assert (reuse.holder, reuse.consumption) == ("alice", None)


# -- What it freezes ------------------------------------------------------------------------------------------------


def reused(ledger: Ledger, run: Node, later: int = SECOND) -> Reuse:
    stale = run.spend(1)
    ledger.do(run.spend(1), ALICE)
    ledger.pass_time(later)
    reuse = sign(ledger.ask(stale, BOB))
    assert reuse is not None
    return reuse


def test_a_token_freezes_for_so_long_after_it_was_consumed(ledger: Ledger, run: Node) -> None:
    reuse = reused(ledger, run, later=MINUTE)
    assert freezes(reuse, MINUTE)
    assert not freezes(reuse, MINUTE - 1)


def test_what_is_frozen_is_not_frozen_again(ledger: Ledger, run: Node) -> None:
    ledger.do(run.freeze())
    stale = run.give_back(1)
    ledger.do(run.give_back(1), ALICE)
    reuse = sign(ledger.ask(stale, BOB))
    assert reuse is not None
    assert reuse.kind is CONSUMED
    assert not freezes(reuse, MINUTE)


def test_a_holds_token_and_a_bound_one_freeze_nothing(ledger: Ledger, run: Node) -> None:
    hold = run.hold(10)
    late = hold.release()
    ledger.do(hold.settle(1), ALICE)
    ledger.do(run.accept(), ALICE)
    for operation in (late, run.spend(1)):
        reuse = sign(ledger.ask(operation, BOB))
        assert reuse is not None
        assert not freezes(reuse, MINUTE)


def test_the_freeze_of_a_token_is_one_and_an_unfreeze_stands(ledger: Ledger, run: Node) -> None:
    consumption = reused(ledger, run).consumption
    assert consumption is not None
    made = freeze(run.root_id, run.id, consumption)
    ledger.do(made, GUARD)
    assert run.budget.state(ledger.now) is BudgetState.FROZEN
    [entry] = [entry for entry in ledger.journal if entry.operation_id == made.operation_id]
    assert entry.principal == "system"
    ledger.do(run.unfreeze())
    again = ledger.ask(freeze(run.root_id, run.id, consumption), GUARD)
    assert isinstance(again, Outcome)
    assert again.replayed
    assert run.budget.state(ledger.now) is BudgetState.OPEN
    other = reused(ledger, run).consumption
    assert other is not None
    assert freeze(run.root_id, run.id, other).operation_id != made.operation_id
    assert ledger.verify(run.root_id) is None


def test_nobody_takes_the_id_of_what_the_ledger_would_freeze(ledger: Ledger, run: Node) -> None:
    consumption = reused(ledger, run).consumption
    assert consumption is not None
    taken = freeze(run.root_id, run.id, consumption).operation_id
    facts = ledger.refuse(run.freeze(operation_id=taken), R.MALFORMED, ADMIN)
    assert facts == {"field": "operation_id", "problem": "must be a UUIDv7"}
    facts = ledger.refuse(run.spend(1, operation_id=taken), R.MALFORMED, AGENT)
    assert facts["field"] == "operation_id"
