"""Settle, Release, Lapse and TopUp commute: in whatever order they come, they end in the same balances.

Hypothesis draws a small tree with holds in it, and operations on them; then every order is tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import assume, event, given, settings, strategies as st

from peculium_server.core.operations import Kind, Operation
from peculium_server.core.refusals import Refusal
from peculium_server.core.rules import decide
from peculium_server.core.state import Accepted, HoldState, Tree
from tests.core.ledger import MINUTE, HoldRef, Ledger, Node, WholeTree

OPERATIONS_MAX = 6
"""720 orders; as many as are drawn in a hundred scenarios within a few seconds."""


class Scenario(NamedTuple):
    ledger: Ledger
    root: Node
    operations: tuple[Operation, ...]


def _built(data: st.DataObject) -> Scenario:
    """A tree of up to five budgets with little money left, of which some levels may be closed."""
    ledger = Ledger(eager=data.draw(st.sampled_from([0, 64]), "eager"), checked=False)
    root = ledger.grant(1_000)
    nodes = [root]
    for _ in range(data.draw(st.integers(0, 4), "budgets below the root")):
        parent = data.draw(st.sampled_from(nodes), "parent")
        factor = data.draw(st.sampled_from([0, 1, 3, 100]), "factor")
        nodes.append(parent.child(parent.money.available // 2, overrun_factor=factor))
    holds = []
    for _ in range(data.draw(st.integers(2, 5), "holds")):
        node = data.draw(st.sampled_from(nodes), "holder")
        assume(node.money.available)
        hold = node.hold(data.draw(st.integers(1, min(30, node.money.available)), "amount"))
        if data.draw(st.booleans(), "with an increment"):
            ledger.do(hold.settle(hold.hold.amount // 3, keep_open=True))
        holds.append(hold)
    for node in nodes:
        left = data.draw(st.integers(0, min(20, node.money.available)), "left")
        if node.money.available > left:
            ledger.do(node.spend(node.money.available - left))
    ledger.pass_time(11 * MINUTE)
    for hold in holds:
        if data.draw(st.integers(0, 3), "lapsed before") == 0:
            ledger.do(hold.lapse())
    for node in data.draw(st.lists(st.sampled_from(nodes), max_size=2, unique=True), "closed"):
        line = node.tree.line(node.budget)
        if node is not root and not any(level.closed for level in line):
            ledger.do(root.revoke(node))
    operations = tuple(_drawn(data, ledger, root, nodes, holds))
    return Scenario(ledger, root, operations[:OPERATIONS_MAX])


def _drawn(
    data: st.DataObject, ledger: Ledger, root: Node, nodes: list[Node], holds: list[HoldRef]
) -> Iterator[Operation]:
    actual = st.none() | st.integers(0, 40) | st.integers(0, 500) | st.just(10**18)
    for hold in holds:
        if data.draw(st.integers(0, 4), "released") == 0:
            yield hold.release()
        else:
            yield hold.settle(data.draw(actual, "actual"))
        if hold.hold.state is HoldState.LIVE and data.draw(st.booleans(), "lapses too"):
            yield hold.lapse()
    for _ in range(data.draw(st.integers(0, 2), "top-ups")):
        yield root.top_up(data.draw(st.integers(1, 300), "top-up"))
    if not ledger.eager:
        # What is still to be collected below a closed level may be collected at any time.
        for node in nodes:
            if any(level.closed for level in node.tree.line(node.budget)):
                yield node.collect()


def _copied(tree: WholeTree) -> WholeTree:
    copy = WholeTree(tree.root_id)
    copy.budgets.update(tree.budgets)
    copy.holds.update(tree.holds)
    copy.consumed.update(tree.consumed)
    copy.hold_tokens.update(tree.hold_tokens)
    return copy


Ending = frozenset[tuple[object, ...]]


def _ending(tree: WholeTree) -> Ending:
    budgets = {
        (each.budget_id, each.money, each.disputed, each.disputes, each.holds_live)
        for each in tree.known_budgets()
    }
    holds = {hold._replace(token=b"") for hold in tree.known_holds()}
    return frozenset({*budgets, *holds})


def _endings(ledger: Ledger, tree: WholeTree, left: tuple[Operation, ...]) -> set[Ending]:
    """All the ways in which a tree can end when these operations come in any order."""
    if not left:
        return {_ending(tree)}
    endings: set[Ending] = set()
    for index, operation in enumerate(left):
        after = _copied(tree)
        _do(ledger, after, operation)
        endings |= _endings(ledger, after, left[:index] + left[index + 1 :])
    return endings


def _do(ledger: Ledger, tree: Tree, operation: Operation) -> None:
    decision = decide(tree, operation, ledger.actor(operation), ledger.now, 1)
    if isinstance(decision, Accepted):
        tree.apply(decision)
        return
    # Whether a Lapse finds its hold still live is a matter of order; where the money ends is not.
    assert operation.kind is Kind.LAPSE
    assert getattr(decision, "reason", None) is Refusal.HOLD_ENDED


@pytest.mark.timeout(300)
@settings(max_examples=100)
@given(st.data())
def test_every_order_ends_in_the_same_balances(data: st.DataObject) -> None:
    ledger, root, operations = _built(data)
    tree = ledger.trees[root.id]
    endings = _endings(ledger, tree, operations)
    assert len(endings) == 1
    for operation in operations:
        ledger.ask(operation)
    event(f"{len(operations)} operations")
    for budget in tree.known_budgets():
        for name in ("overrun", "advanced", "forfeited"):
            if getattr(budget.money, name):
                event(name)
        if budget.disputes:
            event("disputed")
        if budget.closed:
            event("closed")
    ledger.check(root.id)
    assert _ending(tree) == endings.pop()
    assert ledger.verify(root.id) is None
