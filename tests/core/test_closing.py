"""Closed budgets: Return, Revoke, Expire and Collect, and money that moves below a closed level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from peculium_server.core.limits import EAGER_COLLECTIONS_MAX
from peculium_server.core.operations import Operation
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.state import Balances, BudgetState, HoldState
from tests.core.ledger import HOUR, MINUTE, Ledger, Node

EAGER, LAZY = 64, 0


def _collect_all(ledger: Ledger, root_id: bytes) -> None:
    """Empty every budget below a closed one, in no particular order."""
    for budget in ledger.trees[root_id].known_budgets():
        node = Node(ledger, root_id, budget.budget_id)
        closed = any(level.closed for level in node.tree.line(budget))
        if closed and node.money.available:
            ledger.do(node.collect())


# -- Who may be closed, and what closing does ---------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """root 100 > top 80 > middle 60 > bottom 40; 20 are available in each but the last."""

    ledger: Ledger
    root: Node
    top: Node
    middle: Node
    bottom: Node

    @property
    def line(self) -> tuple[Node, ...]:
        return self.root, self.top, self.middle, self.bottom

    def told(self, name: str) -> tuple[int, ...]:
        return tuple(getattr(node.money, name) for node in self.line)


def _family(ledger: Ledger, **changes: int) -> Family:
    root = ledger.grant(100)
    top = root.child(80, **changes)
    middle = top.child(60, **changes)
    return Family(ledger, root, top, middle, middle.child(40, **changes))


@pytest.fixture(params=[EAGER, LAZY], ids=["eager", "lazy"])
def family(request: pytest.FixtureRequest) -> Family:
    return _family(Ledger(eager=request.param), overrun_factor=9)


def test_revoking_returns_what_is_available_below_at_once_or_by_and_by(family: Family) -> None:
    ledger = family.ledger
    outcome = ledger.do(family.root.revoke(family.top))
    assert outcome.returned + outcome.pending == 80
    assert outcome.returned == (80 if ledger.eager else 20)
    assert family.root.money.available == 20 + outcome.returned
    _collect_all(ledger, family.root.id)
    assert family.told("granted") == (100, 0, 0, 0)
    assert family.told("available") == (100, 0, 0, 0)
    assert ledger.verify(family.root.id) is None


def test_from_a_revocation_on_nothing_below_can_spend(family: Family) -> None:
    ledger = family.ledger
    hold = family.bottom.hold(5)
    ledger.do(family.root.revoke(family.top))
    for node in family.line[1:]:
        for operation in (
            node.reserve(1),
            node.spend(1),
            node.delegate(node.spec(0)),
            node.accept(),
            node.renew(),
            node.give_back(1),
            node.return_all(),
            node.freeze(),
        ):
            facts = ledger.refuse(operation, Refusal.BUDGET_CLOSED)
            assert facts["closed"].replace("-", "") == family.top.id.hex()
    ledger.refuse(hold.extend(), Refusal.BUDGET_CLOSED)
    ledger.refuse(hold.settle(1, keep_open=True), Refusal.BUDGET_CLOSED)
    ledger.refuse(family.root.fund(family.bottom, 1), Refusal.BUDGET_CLOSED)
    ledger.refuse(family.root.revoke(family.middle), Refusal.BUDGET_CLOSED)
    family.root.hold(1)


def test_only_the_top_of_what_is_closed_says_so(family: Family) -> None:
    family.ledger.do(family.root.revoke(family.top))
    assert [node.budget.closed for node in family.line] == [False, True, False, False]
    assert family.top.budget.state(family.ledger.now) is BudgetState.CLOSED


def test_any_ancestor_may_revoke_at_any_depth(family: Family) -> None:
    family.ledger.do(family.root.revoke(family.bottom))
    assert family.bottom.budget.closed
    assert family.middle.money.available == 60
    family.middle.hold(60)


@pytest.mark.parametrize("of", ["itself", "its parent", "its sibling", "nothing"])
def test_what_is_not_below_is_not_revoked_or_funded(family: Family, of: str) -> None:
    sibling = family.top.child(1)
    unknown = Node(family.ledger, family.root.id, family.ledger.id())
    target = {
        "itself": family.middle,
        "its parent": family.top,
        "its sibling": sibling,
        "nothing": unknown,
    }[of]
    for operation in (family.middle.revoke(target), family.middle.fund(target, 1)):
        facts = family.ledger.refuse(operation, Refusal.DESCENDANT_UNKNOWN)
        assert facts["descendant"].replace("-", "") == target.id.hex()


def test_a_return_of_everything_closes_and_leaves_no_token(family: Family) -> None:
    outcome = family.ledger.do(family.bottom.return_all())
    assert (outcome.returned, outcome.pending, outcome.state) == (40, 0, BudgetState.CLOSED)
    assert family.bottom.budget.token is None
    assert family.bottom.money == Balances()
    assert family.middle.money.available == 60 - 40 + 40


def test_a_return_of_everything_waits_for_live_holds(family: Family) -> None:
    hold = family.bottom.hold(5)
    facts = family.ledger.refuse(family.bottom.return_all(), Refusal.LIVE_HOLDS)
    assert (facts["holds_live"], facts["held"]) == ("1", "5")
    family.ledger.pass_time(11 * MINUTE)
    family.ledger.do(hold.lapse())
    family.ledger.do(family.bottom.return_all())
    assert family.bottom.money == Balances(granted=5, forfeited=5)


def test_a_return_of_everything_waits_for_open_children(family: Family) -> None:
    facts = family.ledger.refuse(family.middle.return_all(), Refusal.OPEN_CHILDREN)
    assert facts["child"].replace("-", "") == family.bottom.id.hex()
    family.ledger.do(family.bottom.return_all())
    family.ledger.do(family.middle.return_all())
    assert family.told("available") == (20, 80, 0, 0)


def test_a_child_with_nothing_available_is_open_too(family: Family) -> None:
    family.bottom.hold(40)
    family.ledger.refuse(family.middle.return_all(), Refusal.OPEN_CHILDREN)


def test_what_is_below_a_closed_child_does_not_keep_its_parent_open(family: Family) -> None:
    ledger = family.ledger
    below = family.bottom.child(15)
    ledger.do(family.middle.revoke(family.bottom))
    outcome = ledger.do(family.middle.return_all())
    _collect_all(ledger, family.root.id)
    assert outcome.state is BudgetState.CLOSED
    assert below.money == Balances()
    assert family.told("available") == (20, 80, 0, 0)


def test_a_child_whose_lease_has_ended_is_open_until_it_expires(family: Family) -> None:
    ledger = family.ledger
    leased = family.bottom.child(10, lease_us=HOUR)
    ledger.pass_time(HOUR)
    ledger.refuse(family.bottom.return_all(), Refusal.OPEN_CHILDREN)
    ledger.do(leased.expire())
    ledger.do(family.bottom.return_all())
    assert family.middle.money.available == 60


def test_a_cascade_closes_over_live_holds_and_open_children(family: Family) -> None:
    """The calls in flight still end, and what they free goes to the nearest open ancestor."""
    ledger = family.ledger
    hold = family.bottom.hold(10)
    outcome = ledger.do(family.middle.return_all(cascade=True))
    assert outcome.returned + outcome.pending == 50
    _collect_all(ledger, family.root.id)
    assert family.told("available") == (20, 70, 0, 0)
    ledger.do(hold.settle(4))
    assert family.told("available") == (20, 76, 0, 0)
    assert family.told("granted") == (100, 80, 4, 4)
    assert ledger.verify(family.root.id) is None


def test_what_was_closed_before_is_emptied_with_what_closes_above_it(family: Family) -> None:
    ledger = family.ledger
    ledger.do(family.top.revoke(family.middle))
    ledger.do(family.root.revoke(family.top))
    _collect_all(ledger, family.root.id)
    assert family.told("available") == (100, 0, 0, 0)


def test_a_collection_of_nothing_is_recorded_and_moves_nothing(family: Family) -> None:
    ledger = family.ledger
    ledger.do(family.root.revoke(family.top))
    _collect_all(ledger, family.root.id)
    outcome = ledger.do(family.bottom.collect())
    assert (outcome.returned, family.told("available")) == (0, (100, 0, 0, 0))


def test_nothing_is_collected_where_everything_is_open(family: Family) -> None:
    family.ledger.refuse(family.bottom.collect(), Refusal.NOT_DUE)


def test_only_so_many_are_emptied_with_the_closing_itself() -> None:
    ledger = Ledger(eager=EAGER_COLLECTIONS_MAX, checked=False)
    root = ledger.grant(1_000)
    top = root.child(500)
    children = EAGER_COLLECTIONS_MAX + 7
    ledger.do(top.delegate(*[top.spec(2) for _ in range(children)]))
    outcome = ledger.do(root.revoke(top))
    assert outcome.returned == 500 - 2 * 7
    assert outcome.pending == 2 * 7
    _collect_all(ledger, root.id)
    ledger.check(root.id)
    assert root.money.available == 1_000
    assert ledger.verify(root.id) is None


@pytest.mark.parametrize("others", [0, 3])
def test_what_other_operations_of_the_batch_load_is_emptied_too_as_far_as_the_bound_allows(
    others: int,
) -> None:
    """More than the bound are loaded: those of the lowest ids are emptied, the rest is pending."""
    ledger = Ledger(eager=EAGER_COLLECTIONS_MAX, checked=False)
    root = ledger.grant(10_000)
    top = root.child(5_000)
    chain = top.child(4_000).child(3_000)
    leaves = [chain.child(10) for _ in range(EAGER_COLLECTIONS_MAX + 10)]
    named: list[Operation] = [leaf.spend(1) for leaf in leaves[len(leaves) - others :]]
    *_, outcome = ledger.batch([*named, root.revoke(top)])
    assert not isinstance(outcome, Refused)
    assert outcome.returned + outcome.pending == 5_000 - others
    ledger.check(root.id)
    assert ledger.verify(root.id) is None
    _collect_all(ledger, root.id)
    assert root.money.available == 10_000 - others


# -- Money below a closed level ------------------------------------------------------------------------------


def test_a_settle_below_a_closed_level_takes_nothing_from_closed_levels(family: Family) -> None:
    """What it bills beyond its hold comes from the nearest open ancestor."""
    ledger = family.ledger
    hold = family.bottom.hold(10)
    ledger.do(family.root.revoke(family.top))
    ledger.do(hold.settle(25))
    _collect_all(ledger, family.root.id)
    assert family.told("granted") == (100, 25, 25, 25)
    assert family.told("advanced") == (0, 0, 0, 0)
    assert family.root.money.available == 75
    assert ledger.verify(family.root.id) is None


def test_what_the_nearest_open_ancestor_lacks_is_lent_by_its_own(family: Family) -> None:
    ledger = family.ledger
    hold = family.bottom.hold(10)
    ledger.do(family.top.revoke(family.middle))
    _collect_all(ledger, family.root.id)
    ledger.do(family.top.spend(70))
    ledger.do(hold.settle(25))
    assert family.told("advanced") == (0, 15, 0, 0)
    assert family.told("available") == (5, 0, 0, 0)


def test_a_release_below_a_closed_level_pays_back_what_closed_levels_owed(family: Family) -> None:
    """A closed level's own debt was written off by its parent: the money is the parent's anyway."""
    ledger = family.ledger
    freed = family.bottom.hold(30)
    ledger.do(family.middle.hold(20).settle(25))
    ledger.do(family.bottom.hold(10).settle(17))
    assert family.told("advanced") == (0, 0, 12, 7)
    assert family.top.money.available == 8
    ledger.do(family.root.revoke(family.top))
    ledger.do(freed.settle(20))
    _collect_all(ledger, family.root.id)
    assert family.told("advanced") == (0, 0, 2, 0)
    assert family.told("granted") == (100, 62, 62, 37)
    assert family.root.money.available == 38
    assert ledger.verify(family.root.id) is None


def test_a_hold_is_settled_after_its_budget_and_its_parent_were_closed(family: Family) -> None:
    ledger = family.ledger
    late = family.bottom.hold(10)
    ledger.do(family.middle.revoke(family.bottom))
    ledger.do(family.top.revoke(family.middle))
    ledger.pass_time(11 * MINUTE)
    ledger.do(late.lapse())
    ledger.do(late.settle(4))
    _collect_all(ledger, family.root.id)
    assert family.told("granted") == (100, 80, 4, 4)
    assert family.top.money.available == 76
    assert late.hold.state is HoldState.SETTLED


@pytest.mark.parametrize("ending", ["settle", "release", "resolve", "dispute"])
def test_below_a_closed_level_holds_end_in_every_way(family: Family, ending: str) -> None:
    ledger = family.ledger
    hold = family.bottom.hold(10)
    ledger.do(family.root.revoke(family.middle))
    ends: dict[str, tuple[Callable[[], Operation], int]] = {
        "settle": (lambda: hold.settle(3), 3),
        "release": (hold.release, 0),
        "resolve": (lambda: family.bottom.resolve(hold, 7), 7),
        "dispute": (lambda: hold.settle(1_000), 100),
    }
    end, spent = ends[ending]
    ledger.do(end())
    _collect_all(ledger, family.root.id)
    assert family.bottom.money == Balances(granted=spent, spent=spent)
    assert family.top.money.available == max(0, 80 - spent)
    assert family.top.money.advanced == max(0, spent - 80)
    ledger.do(family.bottom.admin_resolve(hold, 1))
    assert family.top.money.available == 79
    assert family.middle.money.granted == 1


def test_a_closed_level_in_the_middle_passes_on_what_is_below_it(family: Family) -> None:
    """The root is open, the top closed, the middle not marked: all below is the root's."""
    ledger = family.ledger
    hold = family.middle.hold(10)
    ledger.do(family.root.revoke(family.top))
    ledger.do(hold.settle(2))
    _collect_all(ledger, family.root.id)
    assert family.told("granted") == (100, 2, 2, 0)
    assert family.root.money.available == 98


def test_frozen_and_expired_ancestors_still_receive_and_still_owe() -> None:
    ledger = Ledger()
    root = ledger.grant(100)
    leased = root.child(80, lease_us=HOUR, overrun_factor=9)
    frozen = leased.child(60, overrun_factor=9)
    hold, beyond = frozen.hold(30), frozen.hold(10)
    closed = frozen.child(5)
    late = closed.hold(5)
    ledger.do(frozen.freeze())
    ledger.pass_time(HOUR)
    ledger.do(leased.revoke(closed))
    ledger.do(late.release())
    assert frozen.money.available == 20
    ledger.do(beyond.settle(60))
    assert (frozen.money.advanced, leased.money.advanced) == (30, 10)
    ledger.do(hold.release())
    assert (frozen.money.advanced, leased.money.advanced) == (0, 0)
    assert (frozen.money.available, leased.money.available, root.money.available) == (0, 20, 20)


def test_the_debt_of_a_budget_that_returns_everything_stays_with_its_parent() -> None:
    ledger = Ledger()
    root = ledger.grant(100)
    child = root.child(20, overrun_factor=9)
    ledger.do(child.hold(20).settle(50))
    assert (child.money.advanced, root.money.available) == (30, 50)
    outcome = ledger.do(child.return_all())
    assert outcome.returned == 0
    assert child.money == Balances(granted=50, spent=50, advanced=30)
    assert root.money == Balances(granted=100, available=50, delegated=50)


# -- Expire -----------------------------------------------------------------------------------------------


def test_an_expired_lease_closes_as_a_revocation_does(family: Family) -> None:
    ledger = family.ledger
    leased = family.bottom.child(30, lease_us=HOUR)
    below = leased.child(10)
    ledger.refuse(leased.expire(), Refusal.NOT_DUE)
    ledger.pass_time(HOUR - 1)
    facts = ledger.refuse(leased.expire(), Refusal.NOT_DUE)
    assert facts["due_at"].endswith("Z")
    ledger.pass_time(1)
    outcome = ledger.do(leased.expire())
    assert outcome.returned + outcome.pending == 30
    _collect_all(ledger, family.root.id)
    assert family.bottom.money.available == 40
    ledger.refuse(below.spend(1), Refusal.BUDGET_CLOSED)
    ledger.refuse(leased.expire(), Refusal.BUDGET_CLOSED)


def test_what_has_no_lease_does_not_expire(family: Family) -> None:
    family.ledger.pass_time(1_000 * HOUR)
    facts = family.ledger.refuse(family.bottom.expire(), Refusal.NOT_DUE)
    assert "due_at" not in facts


def test_a_root_is_never_closed(family: Family) -> None:
    ledger = family.ledger
    ledger.refuse(family.root.return_all(), Refusal.NOT_FOR_ROOTS)
    ledger.refuse(family.root.return_all(cascade=True), Refusal.NOT_FOR_ROOTS)
    ledger.refuse(family.root.give_back(1), Refusal.NOT_FOR_ROOTS)
    ledger.refuse(family.root.expire(), Refusal.NOT_DUE)


# -- Eager and lazy collection end alike ------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(5))
def test_whatever_is_collected_when_ends_in_the_same_balances(after: int) -> None:
    """Collect everything after so many of the operations that follow a revocation."""

    def run(eager: int) -> dict[str, Balances]:
        ledger = Ledger(eager=eager)
        family = _family(ledger, overrun_factor=9)
        extra = family.middle.child(10, overrun_factor=9)
        holds = [family.top.hold(5), family.middle.hold(6), family.bottom.hold(7), extra.hold(8)]
        settled = [12, 0, 60, 20]
        ledger.do(family.root.revoke(family.top))
        for index, (hold, actual) in enumerate(zip(holds, settled, strict=True)):
            if index == after:
                _collect_all(ledger, family.root.id)
            ledger.do(hold.settle(actual))
        _collect_all(ledger, family.root.id)
        assert ledger.verify(family.root.id) is None
        nodes = {"extra": extra} | {str(index): node for index, node in enumerate(family.line)}
        return {name: node.money for name, node in nodes.items()}

    assert run(EAGER) == run(LAZY) == run(1)
