"""A footprint names everything that a decision looks at: what is absent from it raises KeyError."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peculium_server.core.operations import After, ByHolder, ByRole, ByToken, Kind, Operation
from peculium_server.core.outcome import tell
from peculium_server.core.refusals import Refused
from peculium_server.core.rules import decide
from peculium_server.core.state import Accepted, Tree
from tests.core.every_kind import MAKE, World
from tests.core.ledger import ADMIN, AGENT, HoldRef, Node


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_is_decided_on_what_its_footprint_names(kind: Kind) -> None:
    """And the same is decided as on the whole tree."""
    world = World()
    ledger = world.ledger
    operation = MAKE[kind](world)
    actor = ledger.actor(operation)
    tree = ledger.load([operation])[operation.root_id]
    whole = ledger.trees.get(operation.root_id)
    decision = decide(tree, operation, actor, ledger.now, 1)
    assert isinstance(decision, Accepted)
    if whole is not None and kind is not Kind.RECOVER:
        known = set(whole.budgets)
        whole.pending = dict.fromkeys(known, 0)
        whole.open_child = dict.fromkeys(known, None)
        again = decide(whole, operation, actor, ledger.now, 1)
        assert isinstance(again, Accepted)
        assert tell(operation, again.entries) == tell(operation, decision.entries)


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_is_refused_on_what_its_footprint_names(kind: Kind) -> None:
    """Whatever is named exists nowhere, or elsewhere, or is not the caller's."""
    world = World()
    ledger = world.ledger
    operation = MAKE[kind](world)
    elsewhere = world.root.id if operation.budget_id != world.root.id else world.below.id
    unknown = ledger.id()
    wrong: list[Operation] = [replace(operation, budget_id=unknown)]
    if kind is not Kind.GRANT:
        wrong.append(replace(operation, budget_id=elsewhere))
    authorities = (ByHolder(), ByRole(), ByToken(world.token))
    wrong += [replace(operation, authority=authority) for authority in authorities]
    for field in ("hold_id", "descendant_id"):
        if hasattr(operation, field):
            changes: list[dict[str, Any]] = [{field: unknown}, {field: world.below.id}]
            wrong += [replace(operation, **change) for change in changes]
    for each in wrong:
        for actor in (ledger.actor(operation), AGENT, ADMIN):
            tree = ledger.load([each])[each.root_id]
            decision = decide(tree, each, actor, ledger.now, 1)
            assert isinstance(decision, Accepted | Refused)


def test_what_no_footprint_names_is_not_looked_at() -> None:
    world = World()
    spend = world.child.spend(1)
    tree = Tree(spend.root_id)
    with pytest.raises(KeyError):
        decide(tree, spend, AGENT, world.ledger.now, 1)


def test_what_a_chain_may_come_to_name_is_in_the_footprints_of_its_batch() -> None:
    """Also when the batch is sent again, and everything that it made exists already."""
    world = World()
    ledger = world.ledger
    reserve = world.child.reserve(5)
    hold = HoldRef(world.child, reserve.hold_id)
    spec = world.child.spec(10)
    made = Node(ledger, world.root.id, spec.budget_id)
    operations: list[Operation] = [
        reserve,
        hold.settle(1, keep_open=True, authority=After(0)),
        hold.extend(authority=After(1)),
        hold.release(authority=After(2)),
        world.child.delegate(spec, authority=After(0)),
        made.accept(authority=After(4)),
        made.give_back(1, authority=After(5)),
        made.return_all(authority=After(6)),
        world.child.renew(authority=After(4)),
        world.child.spend(1, authority=After(8)),
        world.child.resolve(world.hold, 1, authority=After(9)),
        world.child.revoke(world.below, authority=After(10)),
        world.child.recover(holds=()),
        world.child.fund(world.below, 1, authority=After(12)),
    ]
    first = ledger.batch(operations)
    assert [type(answer).__name__ for answer in first] == ["Outcome"] * 13 + ["Refused"]
    again = ledger.batch(operations)
    for was, is_now in zip(first[:13], again[:13], strict=True):
        assert not isinstance(was, Refused)
        assert is_now == was._replace(replayed=True)
