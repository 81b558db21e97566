"""One decision being made: the budgets that it changes, how money flows, and the entries it leaves.

Nothing here decides whether an operation is allowed; `rules` does. A draft is dropped on refusal.
"""

from __future__ import annotations

from operator import attrgetter, sub

from peculium_server.core.encoding import (
    Part,
    encode_effect,
    encode_request,
    entry_hash,
    operation_digest,
)
from peculium_server.core.limits import BALANCE_MAX
from peculium_server.core.operations import Actor, Operation
from peculium_server.core.state import Accepted, Balances, Budget, Effect, Entry, Hold, Tree, new


class AmountOverflow(Exception):
    """A balance would pass 2^62."""

    def __init__(self, budget_id: bytes, balance: str) -> None:
        super().__init__(balance)
        self.budget_id = budget_id
        self.balance = balance


class Touched:
    """A budget while an operation is decided: what may change of it is changed here, in place.

    The names are those of `Budget` and `Balances`.
    """

    __slots__ = (
        "advanced",
        "available",
        "before",
        "before_gate",
        "closed",
        "custody",
        "delegated",
        "disputed",
        "disputes",
        "forfeited",
        "frozen",
        "granted",
        "head",
        "held",
        "holder",
        "holds_live",
        "is_new",
        "lease_latest",
        "lease_until",
        "money",
        "overrun",
        "seq",
        "spent",
        "token",
        "version",
    )

    def __init__(self, budget: Budget, *, is_new: bool) -> None:
        self.before = budget
        self.is_new = is_new
        self.custody, self.holder, self.token = budget[5:8]
        self.money = budget.money
        """As they were, until `settle`."""
        (
            self.granted,
            self.available,
            self.held,
            self.delegated,
            self.spent,
            self.forfeited,
            self.overrun,
            self.advanced,
        ) = budget.money
        (
            self.disputed,
            self.disputes,
            self.holds_live,
            self.closed,
            self.frozen,
            self.lease_until,
            self.lease_latest,
            self.version,
            self.seq,
            _,
            self.head,
        ) = budget[12:]
        self.before_gate = self.gate()

    def gate(self) -> tuple[bool, bool, int | None, bool]:
        """Everything of it that a decision below may read; `version` counts its changes."""
        return self.closed, self.frozen or self.disputes > 0, self.lease_until, self.overrun > 0

    def settle(self) -> Balances:
        """Take the balances and the version as final.

        Returns:
            By how much the balances have changed.

        Raises:
            AmountOverflow: A balance would pass 2^62.
        """
        before = self.before
        money = self.money = new(Balances, _balances(self))
        if max(money) > BALANCE_MAX or self.disputed > BALANCE_MAX:
            raise AmountOverflow(before.budget_id, money.overflowing() or "disputed")
        assert money.balanced(), money
        assert not (self.overrun and before.ancestors)
        if self.is_new:
            return money
        if self.gate() != self.before_gate:
            self.version += 1
        return new(Balances, map(sub, money, before.money))

    def after(self, at: int) -> Budget:
        """The budget as the operation leaves it."""
        before = self.before
        return new(
            Budget,
            (
                *before[:5],
                self.custody,
                self.holder,
                self.token,
                *before[8:11],
                self.money,
                self.disputed,
                self.disputes,
                self.holds_live,
                self.closed,
                self.frozen,
                self.lease_until,
                self.lease_latest,
                self.version,
                self.seq,
                at,
                self.head,
            ),
        )


_balances = attrgetter(*Balances._fields)


class Draft:
    """The budgets and holds after an operation, while it is decided."""

    def __init__(self, tree: Tree, at: int) -> None:
        self.tree = tree
        self.at = at
        self.holds: dict[bytes, Hold] = {}
        self._touched: dict[bytes, Touched] = {}
        """In order of the first touch."""

    def touch(self, budget_id: bytes) -> Touched:
        """The budget as the operation has left it so far, to be changed: it gets an entry."""
        touched = self._touched.get(budget_id)
        if touched is None:
            budget = self.tree.budget(budget_id)
            touched = self._touched[budget_id] = Touched(budget, is_new=False)
        return touched

    def add(self, budget: Budget) -> None:
        """Take over a budget that the operation makes."""
        self._touched[budget.budget_id] = Touched(budget, is_new=True)

    def put_hold(self, hold: Hold) -> None:
        """Take over a changed hold."""
        self.holds[hold.hold_id] = hold

    def closed_level(self, budget: Touched) -> bool:
        """Say whether the budget or any ancestor is closed."""
        if budget.closed:
            return True
        for above in budget.before.ancestors:
            touched = self._touched.get(above)
            if self.tree.budget(above).closed if touched is None else touched.closed:
                return True
        return False

    def inflow(self, budget_id: bytes, amount: int) -> None:
        """Let money that left the held, spent or delegated of a budget become free again.

        It repays first: at a root the overrun; at a child what its ancestors advanced, which flows on
        upwards. Below a closed level it belongs to the nearest open ancestor.
        """
        while amount:
            budget = self.touch(budget_id)
            parent_id = budget.before.parent_id
            if parent_id is None:
                repaid = min(budget.overrun, amount)
                budget.overrun -= repaid
                budget.available += amount - repaid
                return
            advanced = min(budget.advanced, amount)
            repaid = amount if self.closed_level(budget) else advanced
            budget.granted -= repaid
            budget.advanced -= advanced
            budget.available += amount - repaid
            if repaid:
                self.touch(parent_id).delegated -= repaid
            budget_id, amount = parent_id, repaid

    def outflow(self, budget_id: bytes, amount: int) -> None:
        """Find the money for what a settle has billed beyond its hold.

        It comes from the budget's available, then from its ancestors' in turn, each of which lends it
        on; what they lack becomes the root's overrun. A closed level has no money of its own.
        """
        while amount:
            budget = self.touch(budget_id)
            own_level_closed = self.closed_level(budget)
            taken = 0 if own_level_closed else min(budget.available, amount)
            amount -= taken
            budget.available -= taken
            parent_id = budget.before.parent_id
            if parent_id is None:
                budget.overrun += amount
                return
            budget.granted += amount
            budget.advanced += 0 if own_level_closed else amount
            if amount:
                self.touch(parent_id).delegated += amount
            budget_id = parent_id

    def collect(self, budget_id: bytes) -> int:
        """Empty a budget at a closed level into the nearest open ancestor."""
        touched = self._touched.get(budget_id)
        amount = (self.tree.budget(budget_id).money if touched is None else touched).available
        if amount:
            self.touch(budget_id).available = 0
            self.inflow(budget_id, amount)
        return amount

    def accept(
        self,
        operation: Operation,
        actor: Actor,
        position: int,
        *,
        amount: int,
        consumed: bytes | None,
        hold: Hold | None = None,
        also_consumed: tuple[tuple[bytes, Hold], ...] = (),
        returned: int = 0,
        pending: int = 0,
        holds: tuple[Hold, ...] = (),
        holds_truncated: bool = False,
    ) -> Accepted:
        """Write the entries of the operation: the budget concerned first, then the others touched.

        Args:
            operation: What was asked, its authority resolved.
            actor: By whom.
            position: The operation's place in its lane.
            amount: Its headline amount.
            consumed: The token that it consumed on the budget concerned.
            hold: The hold concerned, after the operation.
            also_consumed: Tokens of holds that it consumed beside that, each with its hold afterwards:
                one more part each.
            returned: What came back to the nearest open ancestor.
            pending: What is still to be collected.
            holds: The holds that a Recover lists.
            holds_truncated: There are more.

        Raises:
            AmountOverflow: A balance would pass 2^62.
        """
        concerned = self.touch(operation.budget_id)
        effect = self._effect(
            concerned,
            None if hold is None else _bare(hold),
            returned,
            pending,
            tuple(map(_bare, holds)),
            holds_truncated,
        )
        steps = [(concerned, consumed, effect)]
        for token, ended in also_consumed:
            rotated = effect._replace(
                changes=Balances(),
                hold=_bare(ended),
                returned=0,
                pending=0,
                holds=(),
                holds_truncated=False,
            )
            steps.append((concerned, token, rotated))
        touched = [concerned]
        for other in self._touched.values():
            if other is not concerned:
                touched.append(other)
                steps.append((other, None, self._effect(other)))
        entries = self._entries(operation, actor, position, amount, steps)
        budgets = tuple([each.after(self.at) for each in touched])
        return new(Accepted, (operation, actor, entries, budgets, tuple(self.holds.values())))

    def _effect(
        self,
        budget: Touched,
        hold: Hold | None = None,
        returned: int = 0,
        pending: int = 0,
        holds: tuple[Hold, ...] = (),
        holds_truncated: bool = False,
    ) -> Effect:
        """What an entry tells of a budget, beside its balances."""
        changes = budget.settle()
        tree = self.tree
        return new(
            Effect,
            (
                changes,
                budget.disputed,
                budget.disputes,
                budget.holds_live,
                budget.closed,
                budget.frozen,
                budget.lease_until,
                budget.lease_latest,
                budget.version,
                tuple([tree.budget(above).version for above in budget.before.ancestors]),
                hold,
                returned,
                pending,
                holds,
                holds_truncated,
            ),
        )

    def _entries(
        self,
        operation: Operation,
        actor: Actor,
        position: int,
        amount: int,
        steps: list[tuple[Touched, bytes | None, Effect]],
    ) -> tuple[Entry, ...]:
        """One entry for each step, which counts on and chains the budget of the step."""
        request = encode_request(operation)
        parts: list[Part] = []
        for budget, consumed, effect in steps:
            budget.seq += 1
            encoded = encode_effect(effect)
            parts.append(
                new(Part, (budget.before.budget_id, budget.seq, consumed, budget.money, encoded))
            )
        digest = operation_digest(
            kind=operation.kind,
            root_id=operation.root_id,
            operation_id=operation.operation_id,
            position=position,
            at=self.at,
            principal=actor.principal,
            trace_id=operation.trace_id,
            amount=amount,
            request=request,
            parts=parts,
        )
        entries: list[Entry] = []
        for number, (step, part) in enumerate(zip(steps, parts, strict=True)):
            budget, consumed, effect = step
            budget_id, seq, _, money, encoded = part
            previous = budget.head
            budget.head = entry_hash(previous, digest, number)
            entries.append(
                new(
                    Entry,
                    (
                        operation.root_id,
                        budget_id,
                        seq,
                        position,
                        number,
                        len(steps),
                        operation.operation_id,
                        operation.kind,
                        self.at,
                        actor.principal,
                        operation.trace_id,
                        consumed,
                        amount,
                        money,
                        effect,
                        request if number == 0 else None,
                        encoded,
                        digest,
                        previous,
                        budget.head,
                    ),
                )
            )
        return tuple(entries)


def _bare(hold: Hold) -> Hold:
    """A hold as an entry tells it: who reads an entry needs no token."""
    return new(Hold, (*hold[:2], b"", *hold[3:]))
