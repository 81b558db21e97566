"""A small model of a tree's money, told in another way than the core tells it.

The core moves amounts from balance to balance, level by level. The model keeps one signed number for
each budget, what it would have of its own if nobody lent anything, and derives the balances: what is
below zero in a child its parent has lent, what is below zero in the root is overrun.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peculium_server.core.operations import Kind
from peculium_server.core.refusals import Refusal
from peculium_server.core.state import Balances, HoldState

STARTS_CALLS = {Kind.RESERVE, Kind.SPEND, Kind.DELEGATE, Kind.FUND}
STOPPED_BY_FREEZING = STARTS_CALLS | {Kind.ACCEPT, Kind.EXTEND}
STOPPED_BY_THE_LEASE = STOPPED_BY_FREEZING | {Kind.RENEW}
ON_CLOSED = {
    Kind.SETTLE, Kind.RELEASE, Kind.RECOVER, Kind.RESOLVE, Kind.LAPSE, Kind.COLLECT,
    Kind.TOP_UP, Kind.WITHDRAW,
}  # fmt: skip


@dataclass
class ModelBudget:
    parent: bytes | None
    own: int
    factor: int | None = None
    spent: int = 0
    closed: bool = False
    frozen: bool = False
    lease: int | None = None
    latest: int | None = None
    left: int = 0
    """Available when a level above or this one was closed, and not collected yet."""
    owed: int = 0
    """Advanced when a level above or this one was closed, and not paid back yet."""


@dataclass
class ModelHold:
    budget: bytes
    amount: int
    remaining: int
    created: int
    expires: int
    booked: int = 0
    disputed: int = 0
    state: HoldState = HoldState.LIVE


@dataclass
class Model:
    """Budgets and holds by id."""

    root: bytes
    granted: int
    budgets: dict[bytes, ModelBudget] = field(default_factory=dict)
    holds: dict[bytes, ModelHold] = field(default_factory=dict)

    # -- Balances -----------------------------------------------------------------------------------

    def line(self, budget_id: bytes) -> list[ModelBudget]:
        budget = self.budgets[budget_id]
        return [budget, *(self.line(budget.parent) if budget.parent else [])]

    def below(self, budget_id: bytes) -> list[bytes]:
        children = [key for key, each in self.budgets.items() if each.parent == budget_id]
        return [*children, *(one for child in children for one in self.below(child))]

    def closed(self, budget_id: bytes) -> bool:
        return any(level.closed for level in self.line(budget_id))

    def net(self, budget_id: bytes) -> int:
        """What an open budget has; below zero: what it owes."""
        lent = (
            min(0, self.net(key))
            for key, each in self.budgets.items()
            if each.parent == budget_id and not self.closed(key)
        )
        return self.budgets[budget_id].own + sum(lent)

    def balances(self, budget_id: bytes) -> Balances:
        budget = self.budgets[budget_id]
        available, owed = budget.left, budget.owed
        if not self.closed(budget_id):
            available, owed = max(0, self.net(budget_id)), max(0, -self.net(budget_id))
        holds = [hold for hold in self.holds.values() if hold.budget == budget_id]
        held = sum(hold.remaining for hold in holds if hold.state is HoldState.LIVE)
        forfeited = sum(hold.remaining for hold in holds if hold.state is HoldState.LAPSED)
        delegated = sum(
            self.balances(key).granted
            for key, each in self.budgets.items()
            if each.parent == budget_id
        )
        overrun = owed if budget_id == self.root else 0
        used = held + delegated + budget.spent + forfeited
        granted = available + used - overrun
        return Balances(
            granted, available, held, delegated, budget.spent, forfeited, overrun, owed - overrun
        )

    def disputes(self, budget_id: bytes) -> int:
        return sum(
            hold.budget == budget_id and hold.state is HoldState.DISPUTED
            for hold in self.holds.values()
        )

    # -- What is refused ----------------------------------------------------------------------------

    def state_refuses(self, kind: Kind, budget_id: bytes, now: int) -> Refusal | None:
        line = self.line(budget_id)
        ids = [budget_id, *self.above(budget_id)]
        closed = line[0].closed if kind is Kind.EXPIRE else any(level.closed for level in line)
        if kind not in ON_CLOSED and closed:
            return Refusal.BUDGET_CLOSED
        if kind in STOPPED_BY_THE_LEASE and any(
            level.lease and level.lease <= now for level in line
        ):
            return Refusal.BUDGET_EXPIRED
        stopped = any(level.frozen for level in line) or any(map(self.disputes, ids))
        if kind in STOPPED_BY_FREEZING and stopped:
            return Refusal.BUDGET_FROZEN
        if kind in STARTS_CALLS and self.net(self.root) < 0:
            return Refusal.TREE_OVERRUN
        return None

    def above(self, budget_id: bytes) -> list[bytes]:
        parent = self.budgets[budget_id].parent
        return [parent, *self.above(parent)] if parent else []

    def lacks(self, budget_id: bytes, amount: int) -> Refusal | None:
        enough = amount <= self.balances(budget_id).available
        return None if enough else Refusal.BUDGET_EXHAUSTED

    # -- What moves -----------------------------------------------------------------------------------

    def free(self, budget_id: bytes, amount: int) -> None:
        """Let money become free (or, below zero, be missing) where the nearest open level is."""
        budget = self.budgets[budget_id]
        if self.closed(budget_id):
            assert budget.parent is not None
            budget.owed -= min(budget.owed, max(0, amount))
            self.free(budget.parent, amount)
        else:
            budget.own += amount

    def end(self, hold_id: bytes, total: int, *, limited: bool) -> None:
        """Book what a hold has cost over its whole life, as far as its budget's factor allows."""
        hold = self.holds[hold_id]
        budget = self.budgets[hold.budget]
        most = total
        if limited and budget.factor is not None:
            most = min(total, hold.amount * (1 + budget.factor))
        more = most - hold.booked
        budget.spent += more
        self.free(hold.budget, hold.remaining - more)
        hold.remaining, hold.booked, hold.disputed = 0, most, total - most
        hold.state = HoldState.DISPUTED if hold.disputed else HoldState.SETTLED

    def close(self, budget_id: bytes, eager: int) -> tuple[int, int]:
        """Close a budget; what came back at once, and what is still to be collected."""
        closing = [key for key in (budget_id, *self.below(budget_id)) if not self.closed(key)]
        nets = {key: self.net(key) for key in closing}
        for key, net in nets.items():
            self.budgets[key].left, self.budgets[key].owed = max(0, net), max(0, -net)
        top = self.budgets[budget_id]
        assert top.parent is not None
        self.budgets[top.parent].own -= top.owed
        top.closed = True
        below = [key for key in self.below(budget_id) if self.budgets[key].left]
        below.sort(key=lambda key: (len(self.line(key)), key))
        returned = self.collect(budget_id) + sum(self.collect(key) for key in below[:eager])
        return returned, sum(self.budgets[key].left for key in below[eager:])

    def collect(self, budget_id: bytes) -> int:
        budget = self.budgets[budget_id]
        amount, budget.left = budget.left, 0
        self.free(budget_id, amount)
        return amount
