"""Whose a budget is: tokens, holders, handing over, fencing, and the age of an operation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from peculium_server.core.limits import OPEN_HOLDS_MAX, OPERATION_AGE_US_MAX, ROTATIONS_MAX
from peculium_server.core.operations import (
    SYSTEM,
    Actor,
    ByHolder,
    ByToken,
    Operation,
    Role,
    Rotation,
)
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.state import Custody
from tests.core.ledger import ADMIN, AGENT, AUDITOR, HOUR, MINUTE, OTHER, HoldRef, Ledger

R = Refusal
ALICE = Actor("alice", Role.AGENT)
BOB = Actor("bob", Role.AGENT)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


# -- Token, holder, or both --------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """How a budget is given, and what who may do with it by which authority; None: it is accepted."""

    by_token: bool
    holder: str | None
    spends: dict[str, Refusal | None]
    accepts: dict[str, Refusal | None]
    recovers: dict[str, Refusal | None]


U, N = R.CAPABILITY_UNKNOWN, R.NOT_TOKEN_HELD
HELD = {
    "by a token alone": Held(
        by_token=True,
        holder=None,
        spends={"alice, token": None, "bob, token": None, "alice, name": U},
        accepts={"alice, token": None, "bob, token": None, "alice, name": U},
        recovers={"alice, name": U, "bob, name": U},
    ),
    "by a principal alone": Held(
        by_token=False,
        holder="alice",
        spends={"alice, name": None, "bob, name": U, "alice, token": U},
        accepts={"alice, name": N, "bob, name": U, "alice, token": U},
        recovers={"alice, name": N, "bob, name": U},
    ),
    "by a token for a principal": Held(
        by_token=True,
        holder="alice",
        spends={"alice, token": None, "bob, token": U, "alice, name": U, "bob, name": U},
        accepts={"alice, token": None, "bob, token": U, "alice, name": U, "bob, name": U},
        recovers={"alice, name": None, "bob, name": U},
    ),
}


def _cases() -> list[object]:
    return [
        pytest.param(held, verb, who, reason, id=f"held {name}: {who} {verb}")
        for name, held in HELD.items()
        for verb in ("spends", "accepts", "recovers")
        for who, reason in getattr(held, verb).items()
    ]


@pytest.mark.parametrize("made_by", ["grant", "delegate", "recover"])
@pytest.mark.parametrize(("held", "verb", "who", "reason"), _cases())
def test_who_may_do_what_with_a_budget(
    ledger: Ledger, made_by: str, held: Held, verb: str, who: str, reason: Refusal | None
) -> None:
    if made_by == "grant":
        node = ledger.grant(10, by_token=held.by_token, holder=held.holder)
    elif made_by == "delegate":
        node = ledger.grant(20).child(10, by_token=held.by_token, holder=held.holder)
    else:
        node = ledger.grant(10, by_token=not held.by_token, holder="somebody")
        token = ledger.token() if held.by_token else None
        ledger.do(node.admin_recover(next_token_id=token, holder=held.holder))
    name, _, by = who.partition(", ")
    authority = ByHolder() if by == "name" else ByToken(node.budget.token or ledger.token())
    operation: Operation
    if verb == "spends":
        operation = node.spend(1, authority=authority)
    elif verb == "accepts":
        operation = node.accept(authority=authority)
    else:
        operation = node.recover()
    actor = Actor(name, Role.AGENT)
    if reason is None:
        ledger.do(operation, actor)
    else:
        ledger.refuse(operation, reason, actor)
    assert node.budget.custody is (Custody.TOKEN if held.by_token else Custody.PRINCIPAL)


def test_an_accepted_token_belongs_to_who_accepted_it(ledger: Ledger) -> None:
    root = ledger.grant(10)
    ledger.do(root.accept(), ALICE)
    assert root.budget.holder == "alice"
    ledger.refuse(root.spend(1), R.CAPABILITY_UNKNOWN, BOB)
    ledger.refuse(root.spend(1), R.CAPABILITY_UNKNOWN, ADMIN)
    ledger.do(root.spend(1), ALICE)


def test_the_senders_copy_dies_when_the_receiver_accepts(ledger: Ledger) -> None:
    root = ledger.grant(10)
    senders = root.spend(1)
    accept = root.accept()
    ledger.do(accept, ALICE)
    facts = ledger.refuse(senders, R.TOKEN_CONSUMED, BOB)
    assert facts["kind"] == "ACCEPT"
    assert facts["fenced_by"] == "alice"
    assert facts["consumed_by"].replace("-", "") == accept.operation_id.hex()


def test_a_hold_is_settled_by_whoever_has_its_token(ledger: Ledger) -> None:
    root = ledger.grant(10, holder="alice")
    hold = root.hold(5)
    ledger.do(hold.settle(5), BOB)
    assert root.money.spent == 5


def test_a_hold_of_another_budget_is_not_settled_in_a_budgets_name(ledger: Ledger) -> None:
    root = ledger.grant(10)
    child = root.child(5)
    hold = root.hold(5)
    settle = HoldRef(child, hold.id).settle(5, authority=ByToken(hold.hold.token))
    ledger.refuse(settle, R.CAPABILITY_UNKNOWN)


def test_a_token_opens_its_own_hold_or_budget_only(ledger: Ledger) -> None:
    root = ledger.grant(10)
    first, second = root.hold(1), root.hold(1)
    budget_token, hold_token = root.authority, ByToken(first.hold.token)
    ledger.refuse(second.settle(1, authority=hold_token), R.CAPABILITY_UNKNOWN)
    ledger.refuse(first.settle(1, authority=budget_token), R.CAPABILITY_UNKNOWN)
    ledger.refuse(root.spend(1, authority=hold_token), R.CAPABILITY_UNKNOWN)
    ledger.refuse(HoldRef(root, ledger.id()).settle(1, authority=hold_token), R.CAPABILITY_UNKNOWN)


def test_unknown_budgets_and_wrong_secrets_are_answered_alike(ledger: Ledger) -> None:
    root = ledger.grant(10)
    guess = root.spend(1, authority=ByToken(ledger.token()))
    elsewhere = replace(root.spend(1), budget_id=ledger.id())
    nowhere = replace(root.spend(1), root_id=ledger.id())
    for operation in (guess, elsewhere, nowhere):
        facts = ledger.refuse(operation, R.CAPABILITY_UNKNOWN)
        assert list(facts) == ["budget"]


def test_an_admin_is_told_which_budget_does_not_exist(ledger: Ledger) -> None:
    root = ledger.grant(10)
    ledger.refuse(replace(root.freeze(), budget_id=ledger.id()), R.BUDGET_UNKNOWN)
    ledger.refuse(replace(root.freeze(), root_id=ledger.id()), R.BUDGET_UNKNOWN)


# -- Roles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actor", "allowed"),
    [(AGENT, "agent"), (ADMIN, "agent admin"), (AUDITOR, ""), (SYSTEM, "system")],
    ids=["agent", "admin", "auditor", "system"],
)
def test_each_role_may_do_what_is_its_own(ledger: Ledger, actor: Actor, allowed: str) -> None:
    root = ledger.grant(100)
    child = root.child(10)
    hold = root.hold(1)
    operations: dict[str, list[Operation]] = {
        "agent": [
            root.reserve(1),
            root.spend(1),
            root.delegate(root.spec(1)),
            root.accept(),
            root.fund(child, 1),
            root.renew(),
            child.give_back(1),
            root.revoke(child),
            root.resolve(hold, 1),
            hold.settle(1),
            hold.release(),
            hold.extend(),
        ],
        "admin": [
            ledger.ask_grant(1),
            root.top_up(1),
            root.withdraw(1),
            root.freeze(),
            root.unfreeze(),
            root.admin_recover(),
            root.admin_resolve(hold, 1),
        ],
        "system": [hold.lapse(), root.expire(), root.collect()],
    }
    for needs, asked in operations.items():
        for operation in asked:
            answer = ledger.ask(replace(operation, dry_run=True), actor)
            denied = isinstance(answer, Refused) and answer.reason is R.PERMISSION_DENIED
            assert denied == (needs not in allowed.split()), operation
            if denied:
                assert isinstance(answer, Refused)
                assert answer.facts["needs"] == needs
                assert answer.facts["role"] == actor.role.name.lower()
                assert answer.facts["principal"] == actor.principal


# -- Fencing ---------------------------------------------------------------------------------------------


def test_recover_fences_the_older_incarnation(ledger: Ledger) -> None:
    root = ledger.grant(10, holder="alice")
    older = root.spend(1)
    ledger.do(root.recover())
    facts = ledger.refuse(older, R.TOKEN_CONSUMED)
    assert facts["kind"] == "RECOVER"
    assert facts["fenced_by"] == "alice"
    ledger.do(root.spend(1))


def test_whatever_else_consumed_a_token_fences_nobody(ledger: Ledger) -> None:
    root = ledger.grant(10, holder="alice")
    older = root.spend(1)
    spend = root.spend(1)
    ledger.do(spend)
    facts = ledger.refuse(older, R.TOKEN_CONSUMED)
    assert "fenced_by" not in facts
    assert facts["kind"] == "SPEND"
    assert facts["consumed_at"] == "2027-01-15T08:00:00.000000Z"


def test_of_two_who_recover_what_they_have_seen_one_does(ledger: Ledger) -> None:
    root = ledger.grant(100, holder="agent")
    seen = root.budget.seq
    first, second = root.recover(if_seq=seen), root.recover(if_seq=seen)
    ledger.do(first)
    facts = ledger.refuse(second, R.BUDGET_CHANGED)
    assert (facts["if_seq"], facts["seq"]) == (str(seen), str(seen + 1))
    assert ledger.do(first).replayed
    ledger.do(root.recover(if_seq=seen + 1))


def test_who_recovers_what_was_used_meanwhile_is_refused(ledger: Ledger) -> None:
    root = ledger.grant(100, holder="agent")
    hold = root.hold(10)
    seen = root.budget.seq
    ledger.do(hold.settle(1))
    ledger.refuse(root.recover(if_seq=seen), R.BUDGET_CHANGED)
    ledger.do(root.recover())


def test_recover_lists_the_holds_that_can_still_be_settled(ledger: Ledger) -> None:
    root = ledger.grant(100, holder="alice")
    live, lapsed, settled, released = (root.hold(1) for _ in range(4))
    other = root.child(10).hold(1)
    ledger.do(settled.settle())
    ledger.do(released.release())
    ledger.pass_time(11 * MINUTE)
    ledger.do(lapsed.lapse())
    outcome = ledger.do(root.recover())
    assert [hold.hold_id for hold in outcome.holds] == [live.id, lapsed.id]
    assert not outcome.holds_truncated
    assert {hold.token for hold in outcome.holds} == {b""}
    assert other.id not in [hold.hold_id for hold in outcome.holds]


def test_recover_rotates_holds_and_fences_who_had_them(ledger: Ledger) -> None:
    root = ledger.grant(100, holder="alice")
    first, second = root.hold(1), root.hold(2)
    older = first.settle(1), second.release()
    outcome = ledger.do(root.recover(holds=(second.rotation(), first.rotation())))
    assert [hold.hold_id for hold in outcome.holds] == [first.id, second.id]
    for operation in older:
        assert ledger.refuse(operation, R.TOKEN_CONSUMED)["fenced_by"] == "alice"
    ledger.do(first.settle(1))
    ledger.do(second.release())
    assert ledger.verify(root.id) is None


def test_recover_rotates_all_holds_or_none(ledger: Ledger) -> None:
    root = ledger.grant(100, holder="alice")
    live, ended = root.hold(1), root.hold(1)
    unknown = Rotation(hold_id=ledger.id(), next_token_id=ledger.token())
    ledger.do(ended.settle())
    ledger.refuse(root.recover(holds=(live.rotation(), ended.rotation())), R.HOLD_ENDED)
    ledger.refuse(root.recover(holds=(live.rotation(), unknown)), R.HOLD_UNKNOWN)
    of_child = root.child(5).hold(1).rotation()
    ledger.refuse(root.recover(holds=(live.rotation(), of_child)), R.HOLD_UNKNOWN)
    ledger.do(live.settle())


@pytest.mark.parametrize("field", ["live", "consumed", "a hold's", "another hold's", "its own"])
def test_a_rotation_makes_no_token_that_was_seen_before(ledger: Ledger, field: str) -> None:
    root = ledger.grant(100, holder="alice")
    first = root.budget.token
    hold, other = root.hold(1), root.hold(1)
    recover = root.recover()
    seen = {
        "live": root.budget.token,
        "consumed": first,
        "a hold's": hold.hold.token,
        "another hold's": other.hold.token,
        "its own": recover.next_token_id,
    }[field]
    assert seen is not None
    rotation = Rotation(hold_id=hold.id, next_token_id=seen)
    facts = ledger.refuse(replace(recover, holds=(rotation,)), R.TOKEN_ID_REUSED)
    assert facts["field"] == "holds[0].next_token_id"


def test_recover_lists_only_so_many_holds_and_says_that_there_are_more(ledger: Ledger) -> None:
    """Also when an earlier operation of the transaction ends one of those that were loaded."""
    ledger.checked = False
    root = ledger.grant(10_000, by_token=False, holder="alice")
    holds = [root.hold(1) for _ in range(OPEN_HOLDS_MAX + 1)]
    ledger.do(root.admin_recover(holder="alice"))
    outcome = ledger.batch([holds[3].settle(), root.recover()])[1]
    assert isinstance(outcome, Outcome)
    ids = sorted(hold.id for hold in holds if hold is not holds[3])
    assert [hold.hold_id for hold in outcome.holds] == ids[:ROTATIONS_MAX]
    assert outcome.holds_truncated
    ledger.do(root.recover(holds=(holds[0].rotation(),)))
    first, second = (entry.effect for entry in ledger.journal[-2:])
    assert (len(first.holds), first.holds_truncated) == (ROTATIONS_MAX, True)
    assert (len(second.holds), second.holds_truncated) == (0, False)
    for hold in holds[ROTATIONS_MAX + 1 :]:
        ledger.do(hold.settle())
    outcome = ledger.do(root.recover())
    assert len(outcome.holds) == ROTATIONS_MAX
    assert not outcome.holds_truncated
    assert ledger.verify(root.id) is None


def test_a_batch_that_ends_as_many_holds_as_it_may_still_lists_the_right_ones(
    ledger: Ledger,
) -> None:
    ledger.checked = False
    root = ledger.grant(10_000, by_token=False, holder="alice")
    holds = [root.hold(1) for _ in range(OPEN_HOLDS_MAX + 5)]
    ledger.do(root.admin_recover(holder="alice"))
    *_, outcome = ledger.batch([*[hold.settle() for hold in holds[:255]], root.recover()])
    assert isinstance(outcome, Outcome)
    assert [hold.hold_id for hold in outcome.holds] == [hold.id for hold in holds[255:511]]
    assert outcome.holds_truncated
    assert ledger.verify(root.id) is None


def test_an_admin_sets_the_holder_and_the_kind(ledger: Ledger) -> None:
    root = ledger.grant(10)
    bearers = root.spend(1)
    ledger.do(root.admin_recover(next_token_id=None, holder="bob"))
    assert (root.budget.custody, root.budget.holder) == (Custody.PRINCIPAL, "bob")
    assert ledger.refuse(bearers, R.TOKEN_CONSUMED)["fenced_by"] == "admin"
    ledger.do(root.spend(1), BOB)
    ledger.do(root.admin_recover())
    assert (root.budget.custody, root.budget.holder) == (Custody.TOKEN, None)
    ledger.refuse(root.spend(1, authority=ByHolder()), R.CAPABILITY_UNKNOWN, BOB)
    ledger.do(root.spend(1), OTHER)
    assert ledger.verify(root.id) is None


def test_a_holder_keeps_its_budget_when_it_recovers_it(ledger: Ledger) -> None:
    root = ledger.grant(10, holder="alice")
    ledger.do(root.recover())
    assert (root.budget.custody, root.budget.holder) == (Custody.TOKEN, "alice")


# -- Tokens to be produced ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", ["live", "consumed", "in a hold", "in a hold that ended"])
@pytest.mark.parametrize("field", ["next_token_id", "hold_token_id", "next_hold_token_id"])
def test_a_token_that_the_budget_ever_saw_is_not_produced_again(
    ledger: Ledger, seen: str, field: str
) -> None:
    root = ledger.grant(100)
    first = root.budget.token
    hold, ended = root.hold(1), root.hold(1)
    token = {
        "live": root.budget.token,
        "consumed": first,
        "in a hold": hold.hold.token,
        "in a hold that ended": ended.hold.token,
    }[seen]
    ledger.do(ended.settle())
    if field == "next_hold_token_id":
        operations: list[Operation] = [hold.extend(), hold.settle(0, keep_open=True)]
    else:
        operations = [root.reserve(1)]
        if field == "next_token_id":
            operations += [root.spend(1), root.delegate(root.spec(1)), root.accept(), root.renew()]
    for operation in operations:
        again: Operation = replace(operation, **{field: token})  # type: ignore[arg-type]
        assert ledger.refuse(again, R.TOKEN_ID_REUSED)["field"] == field


@pytest.mark.parametrize("same", ["two children", "a child and the next", "hold and the next"])
def test_one_request_produces_no_token_twice(ledger: Ledger, same: str) -> None:
    root = ledger.grant(100)
    token = ledger.token()
    requests: dict[str, tuple[Operation, str]] = {
        "two children": (
            root.delegate(root.spec(1, token_id=token), root.spec(1, token_id=token)),
            "children[1].token_id",
        ),
        "a child and the next": (
            root.delegate(root.spec(1, token_id=token), next_token_id=token),
            "children[0].token_id",
        ),
        "hold and the next": (
            root.reserve(1, hold_token_id=token, next_token_id=token),
            "hold_token_id",
        ),
    }
    operation, field = requests[same]
    assert ledger.refuse(operation, R.TOKEN_ID_REUSED)["field"] == field


def test_a_child_does_not_get_the_token_that_makes_it(ledger: Ledger) -> None:
    root = ledger.grant(100)
    operation = root.delegate(root.spec(1, token_id=root.budget.token))
    assert ledger.refuse(operation, R.TOKEN_ID_REUSED)["field"] == "children[0].token_id"


# -- Ids and names -------------------------------------------------------------------------------------------


def test_ids_are_used_once_in_a_root(ledger: Ledger) -> None:
    root = ledger.grant(100)
    child = root.child(10)
    hold = root.hold(1)
    ledger.do(hold.settle())
    assert ledger.refuse(root.reserve(1, hold_id=hold.id), R.ID_TAKEN)["field"] == "hold_id"
    assert ledger.refuse(child.reserve(1, hold_id=hold.id), R.ID_TAKEN)["field"] == "hold_id"
    taken = root.spec(1, budget_id=child.id)
    assert ledger.refuse(root.delegate(taken), R.ID_TAKEN)["field"] == "budget_id"
    own = root.spec(1, budget_id=root.id)
    ledger.refuse(root.delegate(own), R.ID_TAKEN)
    again = replace(ledger.ask_grant(1), root_id=root.id, budget_id=root.id)
    assert ledger.refuse(again, R.ID_TAKEN)["field"] == "budget_id"


def test_names_are_unique_among_siblings_for_ever(ledger: Ledger) -> None:
    root = ledger.grant(100, name="acme")
    child = root.child(10, name="run-7")
    facts = ledger.refuse(root.delegate(root.spec(1, name="run-7")), R.NAME_TAKEN)
    assert facts == {"name": "run-7"}
    child.child(1, name="run-7").child(1, name="run-7")
    ledger.do(root.revoke(child))
    ledger.refuse(root.delegate(root.spec(1, name="run-7")), R.NAME_TAKEN)
    ledger.refuse(ledger.ask_grant(1, name="acme"), R.NAME_TAKEN)


# -- The age of an operation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("late", "accepted"),
    [
        (OPERATION_AGE_US_MAX, True),
        (OPERATION_AGE_US_MAX + 1, False),
        (-OPERATION_AGE_US_MAX, True),
        (-OPERATION_AGE_US_MAX - 1, False),
        (0, True),
    ],
)
def test_where_no_token_fences_it_an_operation_is_made_within_ten_minutes(
    ledger: Ledger, late: int, accepted: bool
) -> None:
    root = ledger.grant(100, by_token=False, holder="alice")
    ledger.pass_time(HOUR)
    spend = root.spend(1)
    ledger.pass_time(late)
    if accepted:
        ledger.do(spend)
    else:
        facts = ledger.refuse(spend, R.OPERATION_TOO_OLD)
        assert facts["limit_seconds"] == "600"
        assert int(facts["age_seconds"]) in {600, -601}


def test_what_was_recorded_is_replayed_however_old_it_is(ledger: Ledger) -> None:
    root = ledger.grant(100, by_token=False, holder="alice")
    spend = root.spend(1)
    first = ledger.do(spend)
    ledger.pass_time(OPERATION_AGE_US_MAX * 100)
    assert ledger.do(spend) == first._replace(replayed=True)
    facts = ledger.refuse(replace(spend, amount=2), R.OPERATION_ID_REUSED)
    assert facts["field"] == "amount"


def test_what_a_token_fences_may_be_of_any_age(ledger: Ledger) -> None:
    root = ledger.grant(100)
    spend = root.spend(1)
    ledger.pass_time(OPERATION_AGE_US_MAX * 100)
    ledger.do(spend)
    principal_held = ledger.grant(100, by_token=False, holder="alice")
    hold = principal_held.hold(1)
    settle = hold.settle()
    ledger.pass_time(OPERATION_AGE_US_MAX * 100)
    ledger.do(settle)


def test_a_recover_may_be_of_any_age_since_it_fences(ledger: Ledger) -> None:
    root = ledger.grant(100, holder="alice")
    recover = root.recover()
    ledger.pass_time(OPERATION_AGE_US_MAX * 2)
    ledger.do(recover)
