"""Where the money goes: reserves, settles within and beyond a hold, debts, disputes, bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from peculium_server.core.limits import AMOUNT_MAX, BALANCE_MAX
from peculium_server.core.operations import ByToken, Release
from peculium_server.core.refusals import Refusal
from peculium_server.core.state import Balances, BudgetState, HoldState
from tests.core.ledger import ADMIN, MINUTE, HoldRef, Ledger, Node


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def root(ledger: Ledger) -> Node:
    return ledger.grant(100)


def _line(ledger: Ledger, *amounts: int, **changes: int) -> list[Node]:
    """A root and its descendants, each with so much available after it has delegated."""
    level = ledger.grant(sum(amounts))
    line = [level]
    for index in range(1, len(amounts)):
        level = level.child(sum(amounts[index:]), **changes)
        line.append(level)
    return line


def _told(node: Node, *names: str) -> tuple[int, ...]:
    return tuple(getattr(node.money, name) for name in names)


# -- The plain moves ------------------------------------------------------------------------------


def test_a_grant_is_available(root: Node) -> None:
    assert root.money == Balances(granted=100, available=100)


def test_a_reserve_moves_from_available_to_held(ledger: Ledger, root: Node) -> None:
    hold = root.hold(30)
    assert root.money == Balances(granted=100, available=70, held=30)
    assert (hold.hold.amount, hold.hold.remaining, hold.hold.state) == (30, 30, HoldState.LIVE)


def test_a_reserve_may_take_all_that_is_available_and_no_more(ledger: Ledger, root: Node) -> None:
    ledger.refuse(root.reserve(101), Refusal.BUDGET_EXHAUSTED)
    root.hold(100)
    assert root.money.available == 0
    ledger.refuse(root.reserve(1), Refusal.BUDGET_EXHAUSTED)


@pytest.mark.parametrize(
    ("requested", "remedy"), [(71, "wait_for_holds"), (100, "wait_for_holds"), (101, "top_up")]
)
def test_who_asks_for_too_much_is_told_what_there_is_and_what_would_help(
    ledger: Ledger, root: Node, requested: int, remedy: str
) -> None:
    root.hold(30)
    facts = ledger.refuse(root.spend(requested), Refusal.BUDGET_EXHAUSTED)
    assert facts["available"] == "70"
    assert facts["held"] == "30"
    assert facts["requested"] == str(requested)
    assert facts["remedy"] == remedy


def test_a_spend_moves_from_available_to_spent(ledger: Ledger, root: Node) -> None:
    ledger.do(root.spend(100))
    assert root.money == Balances(granted=100, spent=100)


def test_a_delegation_moves_to_all_children_or_to_none(ledger: Ledger, root: Node) -> None:
    refused = root.delegate(root.spec(60), root.spec(41))
    ledger.refuse(refused, Refusal.BUDGET_EXHAUSTED)
    done = ledger.do(root.delegate(root.spec(60), root.spec(40), root.spec(0)))
    assert root.money == Balances(granted=100, delegated=100)
    assert [child.granted for child in done.children] == [60, 40, 0]


def test_a_return_takes_back_without_closing(ledger: Ledger, root: Node) -> None:
    child = root.child(50)
    outcome = ledger.do(child.give_back(20))
    assert child.money == Balances(granted=30, available=30)
    assert root.money == Balances(granted=100, available=70, delegated=30)
    assert (outcome.returned, outcome.state) == (20, BudgetState.OPEN)


def test_a_return_gives_no_more_than_is_available(ledger: Ledger, root: Node) -> None:
    child = root.child(50)
    child.hold(20)
    ledger.refuse(child.give_back(31), Refusal.BUDGET_EXHAUSTED)


def test_a_top_up_and_a_withdrawal_change_what_was_granted(ledger: Ledger, root: Node) -> None:
    ledger.do(root.top_up(20))
    assert root.money == Balances(granted=120, available=120)
    ledger.do(root.withdraw(50))
    assert root.money == Balances(granted=70, available=70)
    ledger.refuse(root.withdraw(71), Refusal.BUDGET_EXHAUSTED)


def test_money_is_funded_through_every_level_and_is_available_in_the_last_only(
    ledger: Ledger,
) -> None:
    top, middle, bottom = _line(ledger, 50, 10, 5)
    ledger.do(top.fund(bottom, 30))
    assert _told(top, "available", "delegated") == (20, 45)
    assert _told(middle, "granted", "available", "delegated") == (45, 10, 35)
    assert _told(bottom, "granted", "available") == (35, 35)


def test_a_fund_of_nothing_moves_nothing(ledger: Ledger) -> None:
    top, bottom = _line(ledger, 10, 5)
    before = top.money, bottom.money
    ledger.do(top.fund(bottom, 0))
    assert (top.money, bottom.money) == before


# -- Settle ---------------------------------------------------------------------------------------

SETTLES = [
    # actual, factor: available, spent, advanced, disputed of the child; available of the root
    pytest.param(0, 1, (50, 0, 0, 0, 50), id="nothing was billed"),
    pytest.param(7, 1, (43, 7, 0, 0, 50), id="within the hold"),
    pytest.param(10, 1, (40, 10, 0, 0, 50), id="the whole hold"),
    pytest.param(None, 1, (40, 10, 0, 0, 50), id="the whole hold, unsaid"),
    pytest.param(11, 1, (39, 11, 0, 0, 50), id="beyond the hold, from available"),
    pytest.param(20, 1, (30, 20, 0, 0, 50), id="as far as the factor allows"),
    pytest.param(21, 1, (30, 20, 0, 1, 50), id="one beyond the factor is disputed"),
    pytest.param(10**18, 1, (30, 20, 0, 10**18 - 20, 50), id="nonsense is disputed"),
    pytest.param(AMOUNT_MAX, 1, (30, 20, 0, AMOUNT_MAX - 20, 50), id="the largest nonsense"),
    pytest.param(10, 0, (40, 10, 0, 0, 50), id="factor 0, the whole hold"),
    pytest.param(11, 0, (40, 10, 0, 1, 50), id="factor 0, anything beyond is disputed"),
    pytest.param(40, 3, (10, 40, 0, 0, 50), id="factor 3, as far as it allows"),
    pytest.param(41, 3, (10, 40, 0, 1, 50), id="factor 3, one beyond is disputed"),
    pytest.param(50, 4, (0, 50, 0, 0, 50), id="all that the child has"),
    pytest.param(60, 9, (0, 60, 10, 0, 40), id="more than the child has is lent by the root"),
    pytest.param(100, 9, (0, 100, 50, 0, 0), id="all that the root has is lent"),
]


@pytest.mark.parametrize(("actual", "factor", "after"), SETTLES)
def test_a_settle_books_what_was_billed(
    ledger: Ledger, actual: int | None, factor: int, after: tuple[int, ...]
) -> None:
    root, child = _line(ledger, 50, 50, overrun_factor=factor)
    hold = child.hold(10)
    outcome = ledger.do(hold.settle(actual))
    available, spent, advanced, disputed, of_root = after
    assert _told(child, "available", "spent", "advanced", "held") == (available, spent, advanced, 0)
    assert child.budget.disputed == disputed
    assert _told(root, "available", "overrun") == (of_root, 0)
    assert hold.hold.booked == spent
    assert hold.hold.state is (HoldState.DISPUTED if disputed else HoldState.SETTLED)
    assert outcome.hold == hold.hold._replace(token=b"")
    assert outcome.state is (BudgetState.FROZEN if disputed else BudgetState.OPEN)
    assert ledger.verify(root.id) is None


@pytest.mark.parametrize("factor", [0, 1, 1000])
def test_a_factor_times_any_amount_is_reckoned_without_a_bound(ledger: Ledger, factor: int) -> None:
    child = _line(ledger, 0, AMOUNT_MAX, overrun_factor=factor)[1]
    hold = child.hold(AMOUNT_MAX)
    ledger.do(hold.settle(AMOUNT_MAX))
    assert child.money.spent == AMOUNT_MAX
    assert child.budget.disputed == 0


def test_a_child_that_settles_within_its_hold_does_not_touch_its_parent(
    ledger: Ledger, root: Node
) -> None:
    child = root.child(50)
    before = root.budget
    ledger.do(child.hold(10).settle(4))
    ledger.do(child.hold(10).release())
    ledger.do(child.spend(3))
    assert root.budget == before


def test_what_is_lent_comes_from_the_nearest_that_has_it(ledger: Ledger) -> None:
    top, middle, bottom = _line(ledger, 50, 10, 5, overrun_factor=100)
    ledger.do(bottom.hold(5).settle(25))
    assert _told(bottom, "granted", "available", "spent", "advanced") == (25, 0, 25, 20)
    assert _told(middle, "granted", "available", "delegated", "advanced") == (25, 0, 25, 10)
    assert _told(top, "available", "delegated", "overrun") == (40, 25, 0)


def test_what_nobody_has_becomes_the_roots_overrun(ledger: Ledger) -> None:
    top, middle, bottom = _line(ledger, 3, 10, 5, overrun_factor=100)
    ledger.do(bottom.hold(5).settle(25))
    assert _told(top, "granted", "available", "delegated", "overrun") == (18, 0, 25, 7)
    assert _told(middle, "advanced", "overrun") == (10, 0)
    assert _told(bottom, "advanced", "overrun") == (20, 0)


def test_a_root_has_no_limit_since_there_is_nobody_elses_money_to_protect(
    ledger: Ledger, root: Node
) -> None:
    ledger.do(root.hold(1).settle(10**18))
    assert root.money.spent == 10**18
    assert root.money.overrun == 10**18 - 100
    assert root.budget.disputed == 0


def test_a_dispute_freezes_the_child_and_nobody_else(ledger: Ledger) -> None:
    root, child = _line(ledger, 60, 40)
    sibling = root.child(30)
    ledger.do(child.hold(10).settle(10**18))
    facts = ledger.refuse(child.reserve(1), Refusal.BUDGET_FROZEN)
    assert facts["by"] == "dispute"
    sibling.hold(10)
    root.hold(10)
    assert root.money.available == 20
    assert child.money.spent == 20


def test_a_delegated_budget_is_never_lent_more_than_its_factor_times_what_was_put_into_it(
    ledger: Ledger,
) -> None:
    root, child = _line(ledger, 1_000, 10, overrun_factor=3)
    holds = [child.hold(amount) for amount in (1, 2, 3, 4)]
    for hold in holds:
        ledger.do(hold.settle(AMOUNT_MAX // 8))
    assert child.money.advanced == 30
    assert root.money.available == 970


# -- Tree overrun -----------------------------------------------------------------------------------


def test_while_a_root_has_overrun_nobody_in_its_tree_reserves_spends_delegates_or_funds(
    ledger: Ledger,
) -> None:
    root, middle, bottom = _line(ledger, 10, 10, 10)
    ledger.do(root.hold(10).settle(11))
    for operation in (
        root.reserve(1),
        middle.reserve(1),
        bottom.reserve(1),
        bottom.spend(1),
        bottom.delegate(bottom.spec(0)),
        middle.fund(bottom, 0),
    ):
        facts = ledger.refuse(operation, Refusal.TREE_OVERRUN)
        assert facts["overrun"] == "1"
        assert facts["root"].replace("-", "") == root.id.hex()
    ledger.do(middle.give_back(1))
    bottom.hold(10)


def test_another_tree_goes_on(ledger: Ledger, root: Node) -> None:
    ledger.do(root.hold(1).settle(1_000))
    ledger.grant(10).hold(10)


# -- Debts are repaid first -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Indebted:
    """The bottom owes 20 to the middle, which owes 10 to the top; each has 30 in a hold."""

    ledger: Ledger
    top: Node
    middle: Node
    bottom: Node
    holds: tuple[HoldRef, HoldRef, HoldRef]

    def told(self, name: str) -> tuple[int, ...]:
        return tuple(getattr(node.money, name) for node in (self.top, self.middle, self.bottom))


@pytest.fixture
def indebted(ledger: Ledger) -> Indebted:
    top, middle, bottom = _line(ledger, 50, 40, 35, overrun_factor=100)
    holds = top.hold(30), middle.hold(30), bottom.hold(30)
    ledger.do(bottom.hold(5).settle(25))
    told = Indebted(ledger, top, middle, bottom, holds)
    assert told.told("advanced") == (0, 10, 20)
    assert told.told("available") == (10, 0, 0)
    assert told.told("granted") == (125, 85, 55)
    return told


@pytest.mark.parametrize(
    ("freed", "advanced", "available"),
    [
        (0, (0, 10, 20), (10, 0, 0)),
        (1, (0, 9, 19), (11, 0, 0)),
        (10, (0, 0, 10), (20, 0, 0)),
        (12, (0, 0, 8), (20, 2, 0)),
        (20, (0, 0, 0), (20, 10, 0)),
        (30, (0, 0, 0), (20, 10, 10)),
    ],
)
def test_what_is_freed_repays_level_by_level_before_it_is_available(
    indebted: Indebted, freed: int, advanced: tuple[int, ...], available: tuple[int, ...]
) -> None:
    indebted.ledger.do(indebted.holds[2].settle(30 - freed))
    assert indebted.told("advanced") == advanced
    assert indebted.told("available") == available
    assert indebted.ledger.verify(indebted.top.id) is None


def test_a_release_repays_too(indebted: Indebted) -> None:
    indebted.ledger.do(indebted.holds[2].release())
    assert indebted.told("available") == (20, 10, 10)


def test_a_release_in_the_middle_repays_what_the_middle_owes(indebted: Indebted) -> None:
    indebted.ledger.do(indebted.holds[1].release())
    assert indebted.told("advanced") == (0, 0, 20)
    assert indebted.told("available") == (20, 20, 0)


def test_a_fund_forgives_debt_first(indebted: Indebted) -> None:
    """What the bottom repays flows to the middle, and what that repays back to the top."""
    indebted.ledger.do(indebted.top.fund(indebted.bottom, 8))
    assert indebted.told("advanced") == (0, 2, 12)
    assert indebted.told("available") == (10, 0, 0)
    assert indebted.told("granted") == (125, 85, 55)


def test_what_a_child_returns_repays_what_its_parent_owes(ledger: Ledger, root: Node) -> None:
    middle = root.child(50, overrun_factor=9)
    bottom = middle.child(30)
    ledger.do(middle.hold(20).settle(45))
    assert _told(middle, "advanced", "available") == (25, 0)
    ledger.do(bottom.give_back(10))
    assert _told(middle, "advanced", "available") == (15, 0)
    ledger.do(bottom.return_all())
    assert _told(middle, "advanced", "available") == (0, 5)
    assert root.money.available == 50


def test_a_child_that_owes_has_nothing_to_spend_return_or_delegate(indebted: Indebted) -> None:
    bottom = indebted.bottom
    for operation in (
        bottom.reserve(1),
        bottom.spend(1),
        bottom.give_back(1),
        bottom.delegate(bottom.spec(1)),
    ):
        indebted.ledger.refuse(operation, Refusal.BUDGET_EXHAUSTED)


@pytest.mark.parametrize(("amount", "overrun", "available"), [(1, 6, 0), (7, 0, 0), (10, 0, 3)])
def test_a_top_up_repays_the_overrun_first(
    ledger: Ledger, root: Node, amount: int, overrun: int, available: int
) -> None:
    ledger.do(root.hold(100).settle(107))
    ledger.do(root.top_up(amount))
    assert _told(root, "overrun", "available") == (overrun, available)
    assert root.money.granted == 100 + amount


def test_what_is_freed_in_a_root_repays_its_overrun_first(ledger: Ledger, root: Node) -> None:
    freed = root.hold(60)
    ledger.do(root.hold(40).settle(60))
    assert root.money.overrun == 20
    ledger.do(freed.release())
    assert _told(root, "overrun", "available") == (0, 40)


def test_what_is_freed_below_repays_the_overrun_through_every_level(ledger: Ledger) -> None:
    top, middle, bottom = _line(ledger, 3, 10, 45, overrun_factor=100)
    freed = bottom.hold(40)
    ledger.do(bottom.hold(5).settle(25))
    assert top.money.overrun == 7
    ledger.do(freed.release())
    assert _told(top, "overrun", "available") == (0, 3)
    assert _told(middle, "advanced", "available") == (0, 10)
    assert _told(bottom, "advanced", "available") == (0, 20)


# -- Increments -----------------------------------------------------------------------------------------


def test_increments_are_booked_and_leave_the_rest_held(ledger: Ledger, root: Node) -> None:
    hold = root.hold(30)
    ledger.do(hold.settle(10, keep_open=True))
    ledger.do(hold.settle(0, keep_open=True))
    assert _told(root, "held", "spent") == (20, 10)
    assert (hold.hold.remaining, hold.hold.booked, hold.hold.state) == (20, 10, HoldState.LIVE)
    ledger.do(hold.settle(20, keep_open=True))
    assert (hold.hold.remaining, hold.hold.booked, hold.hold.state) == (0, 30, HoldState.LIVE)
    ledger.do(hold.settle())
    assert (hold.hold.booked, hold.hold.state) == (30, HoldState.SETTLED)
    assert root.money == Balances(granted=100, available=70, spent=30)


def test_an_increment_beyond_what_is_left_is_booked_and_closes_the_hold(
    ledger: Ledger, root: Node
) -> None:
    hold = root.hold(30)
    ledger.do(hold.settle(10, keep_open=True))
    outcome = ledger.do(hold.settle(25, keep_open=True))
    assert outcome.hold is not None
    assert (outcome.hold.state, outcome.hold.booked) == (HoldState.SETTLED, 35)
    assert root.money == Balances(granted=100, available=65, spent=35)


def test_the_factor_bounds_what_all_increments_of_a_hold_book_together(ledger: Ledger) -> None:
    child = _line(ledger, 500, 100)[1]
    hold = child.hold(100)
    ledger.do(hold.settle(90, keep_open=True))
    ledger.do(hold.settle(200))
    assert _told(child, "spent", "advanced") == (200, 100)
    assert (hold.hold.booked, hold.hold.disputed) == (200, 90)


def test_a_release_after_increments_gives_back_only_what_is_left(
    ledger: Ledger, root: Node
) -> None:
    hold = root.hold(30)
    ledger.do(hold.settle(10, keep_open=True))
    ledger.do(hold.release())
    assert root.money == Balances(granted=100, available=90, spent=10)
    assert hold.hold.state is HoldState.SETTLED


def test_a_released_hold_was_not_billed(ledger: Ledger, root: Node) -> None:
    hold = root.hold(30)
    ledger.do(hold.release())
    assert root.money == Balances(granted=100, available=100)
    assert (hold.hold.state, hold.hold.booked) == (HoldState.RELEASED, 0)


# -- Lapses -----------------------------------------------------------------------------------------------


def _lapsed(ledger: Ledger, hold: HoldRef) -> HoldRef:
    ledger.pass_time(11 * MINUTE)
    ledger.do(hold.lapse())
    return hold


def test_a_lapsed_hold_is_not_refunded(ledger: Ledger, root: Node) -> None:
    hold = _lapsed(ledger, root.hold(30))
    assert root.money == Balances(granted=100, available=70, forfeited=30)
    assert (hold.hold.state, hold.hold.remaining) == (HoldState.LAPSED, 30)


@pytest.mark.parametrize(
    ("actual", "available", "spent"), [(None, 70, 30), (0, 100, 0), (12, 88, 12), (45, 55, 45)]
)
def test_a_late_settle_books_what_was_billed(
    ledger: Ledger, root: Node, actual: int | None, available: int, spent: int
) -> None:
    hold = _lapsed(ledger, root.hold(30))
    ledger.do(hold.settle(actual))
    assert root.money == Balances(granted=100, available=available, spent=spent)
    ledger.refuse(hold.settle(), Refusal.TOKEN_CONSUMED)


def test_a_late_release_gives_everything_back(ledger: Ledger, root: Node) -> None:
    hold = _lapsed(ledger, root.hold(30))
    ledger.do(hold.release())
    assert root.money == Balances(granted=100, available=100)


def test_a_lapsed_hold_of_increments_forfeits_only_what_was_left(
    ledger: Ledger, root: Node
) -> None:
    hold = root.hold(30)
    ledger.do(hold.settle(10, keep_open=True))
    _lapsed(ledger, hold)
    assert _told(root, "spent", "forfeited") == (10, 20)
    ledger.do(hold.settle(5))
    assert root.money == Balances(granted=100, available=85, spent=15)


def test_a_lapsed_hold_can_neither_be_kept_open_nor_extended(ledger: Ledger, root: Node) -> None:
    hold = _lapsed(ledger, root.hold(30))
    ledger.refuse(hold.settle(1, keep_open=True), Refusal.HOLD_LAPSED)
    ledger.refuse(hold.extend(), Refusal.HOLD_LAPSED)


def test_a_hold_ends_when_its_lapse_commits_and_not_before(ledger: Ledger, root: Node) -> None:
    hold = root.hold(30)
    ledger.pass_time(11 * MINUTE)
    ledger.do(hold.settle(1, keep_open=True))
    ledger.do(hold.extend())
    ledger.refuse(hold.lapse(), Refusal.NOT_DUE)


# -- Resolve ------------------------------------------------------------------------------------------------


def _state(ledger: Ledger, hold: HoldRef, state: HoldState) -> HoldRef:
    """Bring a live hold of 20 into a state."""
    if state is HoldState.LAPSED:
        return _lapsed(ledger, hold)
    if state is HoldState.SETTLED:
        ledger.do(hold.settle(15))
    if state is HoldState.RELEASED:
        ledger.do(hold.release())
    if state is HoldState.DISPUTED:
        ledger.do(hold.settle(100))
    return hold


@pytest.mark.parametrize("actual", [0, 5, 15, 20, 40, 55, 70, 130])
@pytest.mark.parametrize("state", HoldState)
def test_an_admin_resolves_a_hold_in_every_state_to_what_it_has_cost_in_all(
    ledger: Ledger, state: HoldState, actual: int
) -> None:
    """The child has 50, the root 50 more; what both lack is the root's overrun."""
    root, child = _line(ledger, 50, 50)
    hold = _state(ledger, child.hold(20), state)
    token = hold.hold.token
    was_open = hold.hold.settleable
    ledger.do(child.admin_resolve(hold, actual))
    assert hold.hold._replace(token=token, created_at=0, expires_at=0) == hold.hold._replace(
        state=HoldState.SETTLED,
        remaining=0,
        booked=actual,
        disputed=0,
        token=token,
        created_at=0,
        expires_at=0,
    )
    assert _told(child, "spent", "held", "forfeited") == (actual, 0, 0)
    assert child.money.available == max(0, 50 - actual)
    assert child.money.advanced == max(0, actual - 50)
    assert root.money.available == max(0, min(50, 100 - actual))
    assert root.money.overrun == max(0, actual - 100)
    assert child.budget.state(ledger.now) is BudgetState.OPEN
    assert (child.budget.disputes, child.budget.disputed) == (0, 0)
    if was_open:
        ledger.refuse(
            child.make(Release, {"authority": ByToken(token), "hold_id": hold.id}),
            Refusal.TOKEN_CONSUMED,
        )
    assert ledger.verify(root.id) is None


@pytest.mark.parametrize("state", HoldState)
def test_a_budgets_own_authority_resolves_its_live_and_lapsed_holds_only(
    ledger: Ledger, state: HoldState
) -> None:
    child = _line(ledger, 50, 50)[1]
    hold = _state(ledger, child.hold(20), state)
    if state in (HoldState.LIVE, HoldState.LAPSED):
        ledger.do(child.resolve(hold, 12))
        assert child.money == Balances(granted=50, available=38, spent=12)
        assert hold.hold.state is HoldState.SETTLED
        ledger.refuse(child.resolve(hold, 12), Refusal.HOLD_ENDED)
    else:
        facts = ledger.refuse(child.resolve(hold, 12), Refusal.HOLD_ENDED)
        assert facts["state"] == state.name


def test_a_budgets_own_authority_consumes_its_token_and_the_holds(ledger: Ledger) -> None:
    root, child = _line(ledger, 50, 50)
    hold = child.hold(20)
    stale, token = child.spend(1), hold.release()
    ledger.do(child.resolve(hold, 12))
    ledger.refuse(stale, Refusal.TOKEN_CONSUMED)
    ledger.refuse(token, Refusal.TOKEN_CONSUMED)
    assert ledger.verify(root.id) is None


def test_a_budgets_own_authority_is_bound_by_its_factor(ledger: Ledger) -> None:
    child = _line(ledger, 50, 50)[1]
    hold = child.hold(20)
    ledger.do(child.resolve(hold, 41))
    assert (hold.hold.booked, hold.hold.disputed) == (40, 1)
    ledger.refuse(child.spend(1), Refusal.BUDGET_FROZEN)
    ledger.do(child.admin_resolve(hold, 41))
    assert child.money.spent == 41
    ledger.do(child.spend(1))


def test_resolving_to_less_than_the_increments_takes_them_back(ledger: Ledger) -> None:
    child = _line(ledger, 50, 50)[1]
    hold = child.hold(20)
    ledger.do(hold.settle(15, keep_open=True))
    ledger.do(child.resolve(hold, 4))
    assert child.money == Balances(granted=50, available=46, spent=4)


def test_a_bill_that_says_less_repays_what_was_lent_for_the_report(ledger: Ledger) -> None:
    root, child = _line(ledger, 50, 20)
    hold = child.hold(20)
    ledger.do(hold.settle(40))
    assert (child.money.advanced, root.money.available) == (20, 30)
    ledger.do(child.admin_resolve(hold, 25))
    assert (child.money.advanced, root.money.available) == (5, 45)
    ledger.do(child.admin_resolve(hold, 0))
    assert child.money == Balances(granted=20, available=20)


def test_two_disputes_are_resolved_one_by_one(ledger: Ledger) -> None:
    child = _line(ledger, 500, 50)[1]
    first, second = child.hold(10), child.hold(10)
    ledger.do(first.settle(100))
    ledger.do(second.settle(50))
    assert (child.budget.disputes, child.budget.disputed) == (2, 110)
    ledger.do(child.admin_resolve(first, 10))
    assert (child.budget.disputes, child.budget.disputed) == (1, 30)
    ledger.refuse(child.spend(1), Refusal.BUDGET_FROZEN)
    ledger.do(child.admin_resolve(second, 10))
    assert (child.budget.disputes, child.budget.disputed) == (0, 0)
    ledger.do(child.spend(1))


def test_an_unfreeze_clears_the_flag_and_not_the_dispute(ledger: Ledger) -> None:
    child = _line(ledger, 500, 50)[1]
    hold = child.hold(10)
    ledger.do(hold.settle(100))
    ledger.do(child.freeze())
    facts = ledger.refuse(child.spend(1), Refusal.BUDGET_FROZEN)
    assert facts["by"] == "admin"
    ledger.do(child.unfreeze())
    facts = ledger.refuse(child.spend(1), Refusal.BUDGET_FROZEN)
    assert facts["by"] == "dispute"


# -- The largest amounts ----------------------------------------------------------------------------------------


def test_a_balance_may_be_2_to_the_62_and_no_more(ledger: Ledger) -> None:
    root = ledger.grant(AMOUNT_MAX)
    ledger.do(root.top_up(1))
    assert root.money.granted == BALANCE_MAX
    facts = ledger.refuse(root.top_up(1), Refusal.AMOUNT_OVERFLOW)
    assert facts["balance"] == "granted"
    assert facts["budget"].replace("-", "") == root.id.hex()


def test_an_overrun_has_the_same_bound(ledger: Ledger, root: Node) -> None:
    first, second = root.hold(1), root.hold(1)
    ledger.do(first.settle(AMOUNT_MAX))
    facts = ledger.refuse(second.settle(AMOUNT_MAX), Refusal.AMOUNT_OVERFLOW)
    assert facts["balance"] == "spent"
    ledger.do(second.settle(1))
    assert root.money.spent == BALANCE_MAX
    assert root.money.overrun == BALANCE_MAX - 100


def test_a_dispute_has_the_same_bound(ledger: Ledger) -> None:
    child = _line(ledger, 10, 10, overrun_factor=0)[1]
    first, second = child.hold(1), child.hold(1)
    ledger.do(first.settle(AMOUNT_MAX))
    facts = ledger.refuse(second.settle(AMOUNT_MAX), Refusal.AMOUNT_OVERFLOW)
    assert facts["balance"] == "disputed"


def test_what_overflows_is_told_with_the_budget_where_it_does(ledger: Ledger) -> None:
    root, child = _line(ledger, 10, 10)
    hold = child.hold(5)
    ledger.do(root.hold(1).settle(AMOUNT_MAX))
    facts = ledger.refuse(child.admin_resolve(hold, AMOUNT_MAX), Refusal.AMOUNT_OVERFLOW)
    assert facts["budget"].replace("-", "") == root.id.hex()
    assert facts["balance"] == "overrun"


# -- A dry run ------------------------------------------------------------------------------------------------


def test_a_dry_run_decides_and_records_nothing(ledger: Ledger, root: Node) -> None:
    tried = root.reserve(30, dry_run=True)
    outcome = ledger.do(tried)
    assert (outcome.dry_run, outcome.replayed, outcome.money.held) == (True, False, 30)
    assert root.money == Balances(granted=100, available=100)
    ledger.refuse(root.reserve(101, dry_run=True), Refusal.BUDGET_EXHAUSTED)
    done = ledger.do(replace(tried, dry_run=False))
    assert done == outcome._replace(dry_run=False)


def test_an_agent_settles_and_an_admin_may_use_a_token_too(ledger: Ledger, root: Node) -> None:
    hold = root.hold(10)
    ledger.do(hold.settle(), ADMIN)
    assert root.money.spent == 10
