"""Leases, the ends of holds, freezing, and the time of a decision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peculium_server.core.limits import HOLD_AGE_US_MAX, OPERATION_AGE_US_MAX
from peculium_server.core.operations import Operation
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.state import BudgetState
from tests.core.ledger import DAY, HOUR, MINUTE, SECOND, START, Ledger, Node


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def root(ledger: Ledger) -> Node:
    return ledger.grant(100)


def _lease(node: Node) -> tuple[int | None, int | None]:
    """When its lease ends, and the latest time to which it may be renewed, in hours from the start."""
    budget = node.budget
    until, latest = budget.lease_until, budget.lease_latest
    return (
        None if until is None else (until - START) // HOUR,
        None if latest is None else (latest - START) // HOUR,
    )


def _given(lease: tuple[int | None, int | None]) -> dict[str, Any]:
    """Such a lease, asked for at the start."""
    until, latest = (None if end is None else end * HOUR for end in lease)
    return {"lease_us": until, "lease_latest_us": latest}


# -- Leases are clipped to the parent's -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("parents", "own", "clipped"),
    [
        ((None, None), (None, None), (None, None)),
        ((None, None), (2, None), (2, 2)),
        ((None, None), (2, 5), (2, 5)),
        ((4, 8), (None, None), (4, 8)),
        ((4, 8), (2, None), (2, 2)),
        ((4, 8), (2, 6), (2, 6)),
        ((4, 8), (2, 20), (2, 8)),
        ((4, 8), (5, None), (4, 5)),
        ((4, 8), (5, 20), (4, 8)),
        ((4, 4), (5, 20), (4, 4)),
    ],
)
def test_a_childs_lease_and_its_latest_end_are_clipped_to_its_parents(
    ledger: Ledger,
    root: Node,
    parents: tuple[int | None, int | None],
    own: tuple[int | None, int | None],
    clipped: tuple[int | None, int | None],
) -> None:
    parent = root.child(50, **_given(parents))
    spec = parent.spec(10, **_given(own))
    outcome = ledger.do(parent.delegate(spec))
    child = Node(ledger, root.id, spec.budget_id)
    assert _lease(child) == clipped
    assert outcome.children[0].lease_until == child.budget.lease_until


def test_leases_count_from_the_decision(ledger: Ledger, root: Node) -> None:
    ledger.pass_time(3 * HOUR)
    assert _lease(root.child(1, lease_us=HOUR, lease_latest_us=2 * HOUR)) == (4, 5)


# -- Renew ------------------------------------------------------------------------------------------------


def test_a_lease_is_renewed_up_to_the_latest_end_that_the_parent_set(
    ledger: Ledger, root: Node
) -> None:
    child = root.child(10, lease_us=2 * HOUR, lease_latest_us=5 * HOUR)
    ledger.pass_time(HOUR)
    outcome = ledger.do(child.renew(3 * HOUR))
    assert _lease(child) == (4, 5)
    assert outcome.lease_until == START + 4 * HOUR
    ledger.do(child.renew(100 * HOUR))
    assert _lease(child) == (5, 5)


def test_a_lease_may_be_renewed_to_an_earlier_end(ledger: Ledger, root: Node) -> None:
    child = root.child(10, lease_us=5 * HOUR)
    ledger.do(child.renew(HOUR))
    assert _lease(child) == (1, 5)
    ledger.do(child.renew(3 * HOUR))
    assert _lease(child) == (3, 5)


def test_what_has_no_lease_gets_none_by_renewing(ledger: Ledger, root: Node) -> None:
    ledger.do(root.renew(HOUR))
    assert _lease(root) == (None, None)


# -- Fund renews ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parents", "before", "given", "after"),
    [
        ((None, None), (2, 5), 3, (3, 5)),
        ((None, None), (2, 5), 8, (8, 8)),
        ((None, None), (None, None), 8, (8, 8)),
        ((4, 10), (2, 3), 3, (3, 3)),
        ((4, 10), (2, 3), 20, (4, 4)),
        ((4, 10), (2, 8), 20, (4, 8)),
    ],
)
def test_a_fund_gives_a_lease_as_long_as_the_parents(
    ledger: Ledger,
    root: Node,
    parents: tuple[int | None, int | None],
    before: tuple[int | None, int | None],
    given: int,
    after: tuple[int, int],
) -> None:
    parent = root.child(50, **_given(parents))
    child = parent.child(10, **_given(before))
    ledger.do(root.fund(child, 5, lease_us=given * HOUR))
    assert _lease(child) == after
    assert child.money.available == 15


def test_a_fund_without_a_lease_leaves_it(ledger: Ledger, root: Node) -> None:
    child = root.child(10, lease_us=2 * HOUR, lease_latest_us=5 * HOUR)
    ledger.do(root.fund(child, 5))
    assert _lease(child) == (2, 5)


def test_a_fund_of_nothing_renews_a_lease(ledger: Ledger, root: Node) -> None:
    child = root.child(10, lease_us=2 * HOUR)
    ledger.pass_time(HOUR)
    ledger.do(root.fund(child, 0, lease_us=3 * HOUR))
    assert _lease(child) == (4, 4)
    assert child.money.available == 10


# -- A lease binds by the clock ------------------------------------------------------------------------------


def _asked(child: Node, below: Node) -> dict[str, Operation]:
    """By kind, what could be asked of a leased budget with something below it."""
    hold = child.hold(5)
    return {
        "reserve": child.reserve(1),
        "spend": child.spend(1),
        "delegate": child.delegate(child.spec(0)),
        "fund": child.fund(below, 1),
        "accept": child.accept(),
        "renew": child.renew(),
        "extend": hold.extend(),
        "keep open": hold.settle(1, keep_open=True),
        "settle": hold.settle(1),
        "release": hold.release(),
        "return some": child.give_back(1),
        "return all": child.return_all(cascade=True),
        "revoke": child.revoke(below),
        "recover": child.admin_recover(),
        "resolve": child.resolve(hold, 1),
        "resolve by an admin": child.admin_resolve(hold, 1),
        "freeze": child.freeze(),
        "unfreeze": child.unfreeze(),
        "lapse": hold.lapse(),
    }


SPENDING = {"reserve", "spend", "delegate", "fund"}
FROZEN = SPENDING | {"accept", "extend", "keep open"}
EXPIRED = FROZEN | {"renew"}


def _refused(ledger: Ledger, asked: dict[str, Operation], reason: Refusal) -> set[str]:
    """What is refused for a reason; all else has to be accepted."""
    refused = set()
    for name, operation in asked.items():
        if isinstance(ledger.ask(replace(operation, dry_run=True)), Refused):
            ledger.refuse(replace(operation, dry_run=True), reason)
            refused.add(name)
    return refused


@pytest.mark.parametrize("ancestor", [False, True], ids=["its own", "an ancestor's"])
def test_a_lease_that_has_ended_binds_at_once(ledger: Ledger, root: Node, ancestor: bool) -> None:
    leased = root.child(50, lease_us=HOUR, lease_latest_us=5 * HOUR)
    child = leased.child(40, lease_us=HOUR) if ancestor else leased
    below = child.child(10)
    asked = _asked(child, below)
    ledger.pass_time(HOUR - 1)
    assert _refused(ledger, asked, Refusal.BUDGET_EXPIRED) == set()
    ledger.pass_time(1)
    assert _refused(ledger, asked, Refusal.BUDGET_EXPIRED) == EXPIRED
    assert child.budget.state(ledger.now) is BudgetState.EXPIRED
    if not ancestor:
        tried = ledger.do(replace(asked["release"], dry_run=True))
        assert tried.state is BudgetState.EXPIRED
    ledger.refuse(root.fund(child, 1, lease_us=HOUR), Refusal.BUDGET_EXPIRED)
    facts = ledger.refuse(below.spend(1), Refusal.BUDGET_EXPIRED)
    assert facts["lease_expires_at"] == "2027-01-15T09:00:00.000000Z"
    assert facts["expired"].replace("-", "") == below.id.hex()


def test_a_short_lease_of_an_ancestor_binds_a_longer_one_below(ledger: Ledger, root: Node) -> None:
    parent = root.child(50, lease_us=5 * HOUR)
    child = parent.child(40)
    ledger.do(parent.renew(HOUR))
    ledger.pass_time(HOUR)
    assert child.budget.state(ledger.now) is BudgetState.OPEN
    facts = ledger.refuse(child.spend(1), Refusal.BUDGET_EXPIRED)
    assert facts["expired"].replace("-", "") == parent.id.hex()


@pytest.mark.parametrize("ancestor", [False, True], ids=["itself", "an ancestor"])
def test_a_frozen_budget_ends_its_calls_and_starts_none(
    ledger: Ledger, root: Node, ancestor: bool
) -> None:
    frozen = root.child(50, lease_us=10 * HOUR)
    child = frozen.child(40) if ancestor else frozen
    below = child.child(10)
    asked = _asked(child, below)
    ledger.pass_time(HOUR)
    ledger.do(frozen.freeze(reason="somebody has to look"))
    assert _refused(ledger, asked, Refusal.BUDGET_FROZEN) == FROZEN
    assert frozen.budget.state(ledger.now) is BudgetState.FROZEN
    facts = ledger.refuse(below.spend(1), Refusal.BUDGET_FROZEN)
    assert facts["frozen"].replace("-", "") == frozen.id.hex()
    ledger.do(frozen.unfreeze())
    assert _refused(ledger, asked, Refusal.BUDGET_FROZEN) == set()


def test_all_of_a_restored_ledger_is_as_frozen(ledger: Ledger, root: Node) -> None:
    child = root.child(50, lease_us=10 * HOUR)
    below = child.child(10)
    asked = _asked(child, below)
    ledger.pass_time(HOUR)
    ledger.restored = True
    assert _refused(ledger, asked, Refusal.BUDGET_FROZEN) == FROZEN
    facts = ledger.refuse(below.spend(1), Refusal.BUDGET_FROZEN)
    assert facts["frozen"].replace("-", "") == root.id.hex()
    assert facts["by"] == "restore"
    # No admin's key lifts it.
    ledger.do(root.freeze())
    ledger.do(root.unfreeze())
    ledger.refuse(child.spend(1), Refusal.BUDGET_FROZEN)
    ledger.do(root.top_up(10))
    ledger.restored = False
    assert _refused(ledger, asked, Refusal.BUDGET_FROZEN) == set()


def test_a_frozen_root_is_topped_up_and_withdrawn_from(ledger: Ledger, root: Node) -> None:
    ledger.do(root.freeze())
    ledger.do(root.top_up(10))
    ledger.do(root.withdraw(10))


def test_a_closed_budget_refuses_what_it_has_no_money_or_time_for(
    ledger: Ledger, root: Node
) -> None:
    child = root.child(50)
    below = child.child(10)
    asked = _asked(child, below)
    ledger.pass_time(HOUR)
    ledger.do(root.revoke(child))
    refused = _refused(ledger, asked, Refusal.BUDGET_CLOSED)
    still = {"settle", "release", "recover", "resolve", "resolve by an admin", "lapse"}
    assert refused == asked.keys() - still


# -- Holds ------------------------------------------------------------------------------------------------


def test_a_hold_lives_for_its_time(ledger: Ledger, root: Node) -> None:
    hold = root.hold(1, ttl_us=MINUTE)
    assert (hold.hold.created_at, hold.hold.expires_at) == (START, START + MINUTE)
    ledger.pass_time(MINUTE - 1)
    facts = ledger.refuse(hold.lapse(), Refusal.NOT_DUE)
    assert facts["due_at"] == "2027-01-15T08:01:00.000000Z"
    ledger.pass_time(1)
    ledger.do(hold.lapse())
    assert ledger.refuse(hold.lapse(), Refusal.HOLD_ENDED)["state"] == "LAPSED"


def test_a_hold_is_extended_up_to_its_largest_age(ledger: Ledger, root: Node) -> None:
    hold = root.hold(1, ttl_us=MINUTE)
    ledger.pass_time(30 * SECOND)
    ledger.do(hold.extend(5 * MINUTE))
    assert hold.hold.expires_at == START + 5 * MINUTE + 30 * SECOND
    ledger.do(hold.extend(SECOND))
    assert hold.hold.expires_at == START + 31 * SECOND
    ledger.pass_time(6 * DAY)
    ledger.do(hold.extend(6 * DAY))
    assert hold.hold.expires_at == START + HOLD_AGE_US_MAX
    assert root.money.held == 1


# -- The time of a decision -----------------------------------------------------------------------------------


def test_time_never_runs_backwards_for_a_budget(ledger: Ledger, root: Node) -> None:
    child = root.child(50)
    ledger.pass_time(HOUR)
    ledger.do(root.spend(1))
    ledger.pass_time(-30 * MINUTE)
    outcome = ledger.do(child.spend(1))
    assert outcome.at == START + HOUR
    assert child.budget.last_at == START + HOUR


def test_a_fund_is_decided_at_a_time_not_before_the_descendants_last_entry(
    ledger: Ledger, root: Node
) -> None:
    """Else an auditor, who decides again at the entry's time, would find the lease ended."""
    child = root.child(50, lease_us=HOUR)
    hold = child.hold(10)
    ledger.pass_time(HOUR + MINUTE)
    ledger.do(hold.settle())
    ledger.pass_time(-30 * MINUTE)
    ledger.refuse(root.fund(child, 1), Refusal.BUDGET_EXPIRED)
    assert ledger.verify(root.id) is None


@pytest.mark.parametrize("closing", ["revoke", "return all", "expire"])
def test_a_closing_is_decided_at_a_time_not_before_that_of_anything_it_empties(
    ledger: Ledger, closing: str
) -> None:
    """Else an auditor, who decides again at the entry's time, would find the operation too old."""
    root = ledger.grant(100, by_token=False, holder="alice")
    child = root.child(50, by_token=False, holder="alice", lease_us=HOUR)
    below = child.child(20)
    hold = below.hold(5)
    ledger.pass_time(HOUR)
    operations: dict[str, Operation] = {
        "revoke": root.revoke(child),
        "return all": child.return_all(cascade=True),
        "expire": child.expire(),
    }
    operation = operations[closing]
    ledger.pass_time(2 * OPERATION_AGE_US_MAX)
    ledger.do(hold.settle(1))
    ledger.pass_time(-2 * OPERATION_AGE_US_MAX)
    if closing == "expire":
        ledger.do(operation)
    else:
        ledger.refuse(operation, Refusal.OPERATION_TOO_OLD)
        ledger.pass_time(2 * OPERATION_AGE_US_MAX)
        ledger.do(replace(operation, operation_id=ledger.id()))
    assert root.budget.last_at == below.budget.last_at == START + HOUR + 2 * OPERATION_AGE_US_MAX
    assert ledger.verify(root.id) is None
