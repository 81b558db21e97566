"""The same operation id: the recorded outcome again, or the first field that differs."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from peculium_server.core.admission import NOT_COMPARED
from peculium_server.core.operations import (
    Actor,
    AtomicBatch,
    ByHolder,
    ByToken,
    Child,
    Delegate,
    Kind,
    Operation,
    Recover,
    Role,
    Rotation,
    Usage,
)
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal
from peculium_server.core.state import Balances
from tests.core.every_kind import MAKE, USAGE, World
from tests.core.ledger import ADMIN, HOUR, SYSTEM_KINDS, Answer, HoldRef, Ledger, Node


def _otherwise(world: World, field: str, was: Any) -> Any:  # noqa: PLR0911 - one for each type
    """Another value of a field."""
    match was:
        case bytes():
            return world.token if field.endswith("token_id") else world.id
        case bool():
            return not was
        case int():
            return was + 1
        case Usage():
            return replace(was, cached_tokens=2)
        case str():
            return "another"
        case None if field == "batch":
            return AtomicBatch(world.id, 2)
        case _:
            return (("another", "label"),) if field == "labels" else was[1:]


def _with(operation: Operation, **changes: Any) -> Operation:
    return replace(operation, **changes)


TOGETHER = {
    (Kind.SETTLE, "keep_open"): {"next_hold_token_id": None},
    (Kind.RETURN, "cascade"): {"amount": None, "next_token_id": None},
}
"""What has to change with a field, since the request would be malformed otherwise."""

HEADER = {"operation_id", "root_id", "budget_id", "authority"}


def _cases() -> list[Any]:
    return [
        pytest.param(kind, field.name, id=f"{kind.name}.{field.name}")
        for kind in Kind
        for field in fields(MAKE[kind](World()))
        if field.name not in HEADER | NOT_COMPARED
    ]


def _done(world: World, kind: Kind) -> tuple[Operation, Actor, Outcome]:
    operation = MAKE[kind](world)
    actor = world.ledger.actor(operation)
    return operation, actor, world.ledger.do(operation, actor)


@pytest.mark.parametrize("kind", Kind)
def test_the_same_operation_gives_the_recorded_outcome_again(kind: Kind) -> None:
    world = World()
    operation, actor, outcome = _done(world, kind)
    assert not outcome.replayed
    entries = len(world.ledger.journal)
    assert world.ledger.do(operation, actor) == outcome._replace(replayed=True)
    world.ledger.pass_time(1_000 * HOUR)
    assert world.ledger.do(operation, actor) == outcome._replace(replayed=True)
    assert len(world.ledger.journal) == entries
    assert world.ledger.verify(operation.root_id) is None


@pytest.mark.parametrize("kind", Kind)
def test_it_does_whatever_has_become_of_its_budget_since(kind: Kind) -> None:
    world = World()
    operation, actor, outcome = _done(world, kind)
    ledger = world.ledger
    if not world.child.budget.closed:
        ledger.do(world.child.freeze())
        ledger.do(world.root.revoke(world.child))
    ledger.do(world.root.hold(1).settle(100_000))
    ledger.pass_time(1_000 * HOUR)
    assert ledger.do(operation, actor) == outcome._replace(replayed=True)


@pytest.mark.parametrize(("kind", "field"), _cases())
def test_another_content_is_refused_and_the_first_field_that_differs_is_named(
    kind: Kind, field: str
) -> None:
    world = World()
    operation, actor, _ = _done(world, kind)
    other = _otherwise(world, field, getattr(operation, field))
    changes = TOGETHER.get((kind, field), {}) | {field: other}
    facts = world.ledger.refuse(replace(operation, **changes), Refusal.OPERATION_ID_REUSED, actor)
    names = [each.name for each in fields(operation)]
    assert facts["field"] == min(changes, key=names.index)
    assert facts["operation"].replace("-", "") == operation.operation_id.hex()


CHILD_FIELDS: dict[str, Any] = {
    "name": "another",
    "amount": 11,
    "token_id": bytes(32),
    "holder": "another",
    "lease_us": HOUR + 1,
    "lease_latest_us": 2 * HOUR + 1,
    "labels": (),
    "overrun_factor": 4,
}
USAGE_FIELDS: dict[str, Any] = {
    "provider": "another",
    "model": "another",
    "input_tokens": 4,
    "output_tokens": 4,
    "cached_tokens": 4,
}


@pytest.mark.parametrize("field", [field.name for field in fields(Child)])
def test_a_child_that_differs_in_anything_is_another_content(field: str) -> None:
    world = World()
    operation, actor, _ = _done(world, Kind.DELEGATE)
    other: Any = world.id if field == "budget_id" else CHILD_FIELDS[field]
    assert isinstance(operation, Delegate)
    first, *rest = operation.children
    children = (replace(first, **{field: other}), *rest)
    again = _with(operation, children=children)
    facts = world.ledger.refuse(again, Refusal.OPERATION_ID_REUSED, actor)
    assert facts["field"] == "children"


@pytest.mark.parametrize(
    "usage", [None, *(replace(USAGE, **{k: v}) for k, v in USAGE_FIELDS.items())]
)
@pytest.mark.parametrize("kind", [Kind.SETTLE, Kind.SPEND])
def test_usage_that_differs_in_anything_is_another_content(kind: Kind, usage: Usage | None) -> None:
    world = World()
    operation, actor, _ = _done(world, kind)
    again = _with(operation, usage=usage)
    facts = world.ledger.refuse(again, Refusal.OPERATION_ID_REUSED, actor)
    assert facts["field"] == "usage"


@pytest.mark.parametrize("field", ["hold_id", "next_token_id"])
def test_a_rotation_that_differs_in_anything_is_another_content(field: str) -> None:
    world = World()
    operation, actor, _ = _done(world, Kind.RECOVER)
    other = world.id if field == "hold_id" else world.token
    assert isinstance(operation, Recover)
    (rotation,) = operation.holds
    changed: Rotation = replace(rotation, **{field: other})
    again = _with(operation, holds=(changed,))
    facts = world.ledger.refuse(again, Refusal.OPERATION_ID_REUSED, actor)
    assert facts["field"] == "holds"


@pytest.mark.parametrize(("was", "now"), [(None, 10), (10, None), (0, None), (None, 0), (50, None)])
def test_what_was_left_unsaid_is_another_content_than_what_was_said(
    was: int | None, now: int | None
) -> None:
    world = World()
    settle = world.hold.settle(was)
    world.ledger.do(settle)
    facts = world.ledger.refuse(replace(settle, actual=now), Refusal.OPERATION_ID_REUSED)
    assert facts["field"] == "actual"


def test_absent_usage_is_another_content_than_usage_of_nothing() -> None:
    world = World()
    spend = world.child.spend(1, usage=Usage())
    outcome = world.ledger.do(spend)
    assert world.ledger.do(spend) == outcome._replace(replayed=True)
    world.ledger.refuse(replace(spend, usage=None), Refusal.OPERATION_ID_REUSED)


# -- What identifies it ---------------------------------------------------------------------------------


def test_the_kind_is_named_before_any_field() -> None:
    world = World()
    spend = world.child.spend(1)
    world.ledger.do(spend)
    renew = world.child.renew(operation_id=spend.operation_id)
    assert world.ledger.refuse(renew, Refusal.OPERATION_ID_REUSED)["field"] == "kind"


def test_another_principal_is_named_before_any_field() -> None:
    world = World()
    hold, other = world.root.hold(1), Actor("other", Role.AGENT)
    settle = hold.settle(1)
    world.ledger.do(settle)
    for operation in (settle, replace(settle, actual=0)):
        facts = world.ledger.refuse(operation, Refusal.OPERATION_ID_REUSED, other)
        assert facts["field"] == "principal"


def test_the_same_id_on_another_budget_is_another_content() -> None:
    world = World()
    spend = world.child.spend(1)
    world.ledger.do(spend)
    elsewhere = world.root.spend(1, operation_id=spend.operation_id)
    assert world.ledger.refuse(elsewhere, Refusal.OPERATION_ID_REUSED)["field"] == "budget_id"


def test_the_same_id_in_another_root_is_another_operation() -> None:
    world = World()
    spend = world.child.spend(1)
    world.ledger.do(spend)
    elsewhere = world.ledger.grant(10).spend(1, operation_id=spend.operation_id)
    assert not world.ledger.do(elsewhere).replayed


def test_another_token_is_another_content() -> None:
    world = World()
    spend = world.child.spend(1)
    world.ledger.do(spend)
    again = replace(spend, authority=world.child.authority)
    assert world.ledger.refuse(again, Refusal.OPERATION_ID_REUSED)["field"] == "authority"


def test_another_kind_of_authority_is_another_content() -> None:
    world = World()
    recover = world.child.recover()
    world.ledger.do(recover)
    facts = world.ledger.refuse(
        replace(world.child.admin_recover(), **_content(recover)),
        Refusal.OPERATION_ID_REUSED,
        Actor("agent", Role.ADMIN),
    )
    assert facts["field"] == "authority"
    assert recover.authority == ByHolder()


def _content(operation: Operation) -> dict[str, Any]:
    return {
        each.name: getattr(operation, each.name)
        for each in fields(operation)
        if each.name != "authority"
    }


def test_a_retry_may_have_another_trace() -> None:
    world = World()
    spend = world.child.spend(1, trace_id=bytes(16))
    outcome = world.ledger.do(spend)
    again = replace(spend, trace_id=bytes(15) + b"\x01")
    assert world.ledger.do(again) == outcome._replace(replayed=True)
    assert world.ledger.journal[-1].trace_id == bytes(16)


def test_a_dry_run_of_what_was_recorded_tells_what_was_recorded() -> None:
    world = World()
    spend = world.child.spend(1)
    outcome = world.ledger.do(spend)
    assert world.ledger.do(replace(spend, dry_run=True)) == outcome._replace(replayed=True)


# -- What was not recorded ---------------------------------------------------------------------------------


def test_the_id_of_a_refused_operation_may_still_win() -> None:
    world = World()
    spend = world.child.spend(400)
    world.ledger.refuse(spend, Refusal.BUDGET_EXHAUSTED)
    world.ledger.do(world.root.fund(world.child, 400))
    assert not world.ledger.do(spend).replayed


def test_the_id_of_a_dry_run_may_still_be_used() -> None:
    world = World()
    spend = world.child.spend(1)
    world.ledger.do(replace(spend, dry_run=True))
    assert not world.ledger.do(spend).replayed


def test_only_who_had_the_token_is_told_what_was_recorded() -> None:
    world = World()
    spend = world.child.spend(1)
    world.ledger.do(spend)
    guess = replace(spend, authority=ByToken(world.token))
    world.ledger.refuse(guess, Refusal.CAPABILITY_UNKNOWN)


def test_only_the_holder_is_told_what_was_recorded() -> None:
    ledger = Ledger()
    root = ledger.grant(10, by_token=False, holder="alice")
    spend = root.spend(1)
    ledger.do(spend)
    ledger.refuse(spend, Refusal.CAPABILITY_UNKNOWN, Actor("bob", Role.AGENT))


# -- The outcome itself ----------------------------------------------------------------------------------------


def _told(answer: Answer) -> Outcome:
    assert isinstance(answer, Outcome)
    return answer


def test_an_outcome_tells_the_budget_as_the_operation_left_it() -> None:
    ledger = Ledger()
    root = ledger.grant(100)
    child = root.child(40, lease_us=HOUR)
    reserve = child.reserve(15)
    outcome = _told(ledger.ask(reserve))
    assert outcome.operation_id == reserve.operation_id
    assert outcome.kind is Kind.RESERVE
    assert outcome.budget_id == child.id
    assert outcome.money == Balances(granted=40, available=25, held=15)
    assert (outcome.seq, outcome.at) == (2, ledger.now)
    assert outcome.lease_until == child.budget.lease_until
    assert outcome.hold == HoldRef(child, reserve.hold_id).hold._replace(token=b"")
    assert (outcome.children, outcome.holds, outcome.descendant_id) == ((), (), None)


def test_an_outcome_tells_the_children_that_were_made_and_the_descendant_concerned() -> None:
    ledger = Ledger()
    root = ledger.grant(100)
    delegate = root.delegate(root.spec(10), root.spec(20))
    outcome = _told(ledger.ask(delegate))
    assert [child.budget_id for child in outcome.children] == [
        child.budget_id for child in delegate.children
    ]
    first = Node(ledger, root.id, delegate.children[0].budget_id)
    assert _told(ledger.ask(root.fund(first, 1))).descendant_id == first.id
    assert _told(ledger.ask(root.revoke(first))).descendant_id == first.id


def test_an_operations_entries_name_its_principal_kind_and_trace() -> None:
    world = World()
    world.ledger.do(world.child.give_back(1, trace_id=bytes(range(16))))
    first, second = world.ledger.journal[-2:]
    for part, entry in enumerate((first, second)):
        assert (entry.part, entry.parts, entry.kind) == (part, 2, Kind.RETURN)
        assert (entry.principal, entry.trace_id) == ("agent", bytes(range(16)))
        assert entry.amount == 1
    assert (first.budget_id, second.budget_id) == (world.child.id, world.root.id)
    world.ledger.do(world.root.top_up(1), ADMIN)
    assert world.ledger.journal[-1].principal == "admin"


def test_what_the_ledger_does_by_itself_is_the_systems() -> None:
    for kind in SYSTEM_KINDS:
        world = World()
        _done(world, kind)
        assert world.ledger.journal[-1].principal == "system"
