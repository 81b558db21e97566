"""One decision being made: the budgets that it changes, how money flows, and the entries it leaves.

Nothing here decides whether an operation is allowed; `rules` does. A draft is dropped on refusal.
"""

from __future__ import annotations

from operator import sub

from peculium_server.core.encoding import (
    Part,
    encode_effect,
    encode_request,
    entry_hash,
    operation_digest,
)
from peculium_server.core.limits import BALANCE_MAX
from peculium_server.core.operations import Actor, Operation
from peculium_server.core.state import Accepted, Balances, Budget, Effect, Entry, Hold, Tree


class AmountOverflow(Exception):
    """A balance would pass 2^62."""

    def __init__(self, budget_id: bytes, balance: str) -> None:
        super().__init__(balance)
        self.budget_id = budget_id
        self.balance = balance


class Draft:
    """The budgets and holds after an operation, while it is decided."""

    def __init__(self, tree: Tree, at: int) -> None:
        self.tree = tree
        self.at = at
        self.budgets: dict[bytes, Budget] = {}
        """What was touched, in order of the first touch."""
        self.holds: dict[bytes, Hold] = {}

    def budget(self, budget_id: bytes) -> Budget:
        """The budget as the operation has left it so far."""
        return self.budgets.get(budget_id) or self.tree.budget(budget_id)

    def put(self, budget: Budget) -> None:
        """Take over a changed budget."""
        self.budgets[budget.budget_id] = budget

    def put_hold(self, hold: Hold) -> None:
        """Take over a changed hold."""
        self.holds[hold.hold_id] = hold

    def move(
        self,
        budget_id: bytes,
        *,
        granted: int = 0,
        available: int = 0,
        held: int = 0,
        delegated: int = 0,
        spent: int = 0,
        forfeited: int = 0,
        overrun: int = 0,
        advanced: int = 0,
    ) -> None:
        """Add to balances of a budget, by name."""
        budget = self.budget(budget_id)
        money = budget.money
        moved = Balances(
            money.granted + granted,
            money.available + available,
            money.held + held,
            money.delegated + delegated,
            money.spent + spent,
            money.forfeited + forfeited,
            money.overrun + overrun,
            money.advanced + advanced,
        )
        self.put(budget.with_money(moved))

    def closed_level(self, budget: Budget) -> bool:
        """Say whether the budget or any ancestor is closed."""
        return budget.closed or any(self.budget(above).closed for above in budget.ancestors)

    def inflow(self, budget_id: bytes, amount: int) -> None:
        """Let money that left the held, spent or delegated of a budget become free again.

        It repays first: at a root the overrun; at a child what its ancestors advanced, which flows on
        upwards. Below a closed level it belongs to the nearest open ancestor.
        """
        while amount:
            budget = self.budget(budget_id)
            money = budget.money
            parent_id = budget.parent_id
            if parent_id is None:
                repaid = min(money.overrun, amount)
                self.move(budget_id, overrun=-repaid, available=amount - repaid)
                return
            if self.closed_level(budget):
                repaid = amount
                advanced = min(money.advanced, amount)
            else:
                repaid = advanced = min(money.advanced, amount)
            self.move(budget_id, granted=-repaid, advanced=-advanced, available=amount - repaid)
            if repaid:
                self.move(parent_id, delegated=-repaid)
            budget_id, amount = parent_id, repaid

    def outflow(self, budget_id: bytes, amount: int) -> None:
        """Find the money for what a settle has billed beyond its hold.

        It comes from the budget's available, then from its ancestors' in turn, each of which lends it
        on; what they lack becomes the root's overrun. A closed level has no money of its own.
        """
        while amount:
            budget = self.budget(budget_id)
            own_level_closed = self.closed_level(budget)
            taken = 0 if own_level_closed else min(budget.money.available, amount)
            amount -= taken
            parent_id = budget.parent_id
            if parent_id is None:
                self.move(budget_id, available=-taken, overrun=amount)
                return
            lent = 0 if own_level_closed else amount
            self.move(budget_id, available=-taken, granted=amount, advanced=lent)
            if amount:
                self.move(parent_id, delegated=amount)
            budget_id = parent_id

    def collect(self, budget_id: bytes) -> int:
        """Empty a budget at a closed level into the nearest open ancestor."""
        amount = self.budget(budget_id).money.available
        if amount:
            self.move(budget_id, available=-amount)
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
        concerned = self.budget(operation.budget_id)
        self.budgets = {operation.budget_id: concerned} | self.budgets
        shared = Effect(
            changes=Balances(),
            hold=None if hold is None else _bare(hold),
            returned=returned,
            pending=pending,
            holds=tuple(map(_bare, holds)),
            holds_truncated=holds_truncated,
        )
        steps: list[tuple[Budget, bytes | None, Effect]] = []
        for budget in self.budgets.values():
            first = budget.budget_id == operation.budget_id
            changed, effect = self._next(budget, shared if first else _NOTHING)
            steps.append((changed, consumed if first else None, effect))
            if not first:
                continue
            for token, ended in also_consumed:
                changed = changed._replace(seq=changed.seq + 1)
                rotated = effect._replace(
                    changes=Balances(),
                    hold=_bare(ended),
                    returned=0,
                    pending=0,
                    holds=(),
                    holds_truncated=False,
                )
                steps.append((changed, token, rotated))
        return self._seal(operation, actor, position, amount, steps)

    def _next(self, budget: Budget, shared: Effect) -> tuple[Budget, Effect]:
        """The budget with its counters raised, and the effect that its entry tells."""
        money = budget.money
        if max(*money, budget.disputed) > BALANCE_MAX:
            raise AmountOverflow(budget.budget_id, money.overflowing() or "disputed")
        assert money.balanced(), money
        assert budget.is_root or not money.overrun
        before = self.tree.budgets[budget.budget_id]
        raised = before is not None and before.gate() != budget.gate()
        version = budget.version + raised
        changed = budget.stepped(version, budget.seq + 1, self.at, budget.head)
        # Built from scratch: to replace most fields of a named tuple costs several times as much.
        effect = Effect(
            changes=Balances._make(map(sub, money, _NO_MONEY if before is None else before.money)),
            disputed=budget.disputed,
            disputes=budget.disputes,
            holds_live=budget.holds_live,
            closed=budget.closed,
            frozen=budget.frozen,
            lease_until=budget.lease_until,
            lease_latest=budget.lease_latest,
            version=version,
            versions=tuple([self.tree.budget(above).version for above in budget.ancestors]),
            hold=shared.hold,
            returned=shared.returned,
            pending=shared.pending,
            holds=shared.holds,
            holds_truncated=shared.holds_truncated,
        )
        return changed, effect

    def _seal(
        self,
        operation: Operation,
        actor: Actor,
        position: int,
        amount: int,
        steps: list[tuple[Budget, bytes | None, Effect]],
    ) -> Accepted:
        request = encode_request(operation)
        encoded = [encode_effect(effect) for _, _, effect in steps]
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
            parts=[
                Part(budget.budget_id, budget.seq, consumed, budget.money, effect)
                for (budget, consumed, _), effect in zip(steps, encoded, strict=True)
            ],
        )
        entries: list[Entry] = []
        heads: dict[bytes, Budget] = {}
        for part, ((budget, consumed, effect), effect_bytes) in enumerate(
            zip(steps, encoded, strict=True)
        ):
            previous = heads.get(budget.budget_id, budget).head
            chained = entry_hash(previous, digest, part)
            heads[budget.budget_id] = budget.stepped(
                budget.version, budget.seq, budget.last_at, chained
            )
            entries.append(
                Entry(
                    root_id=operation.root_id,
                    budget_id=budget.budget_id,
                    seq=budget.seq,
                    position=position,
                    part=part,
                    parts=len(steps),
                    operation_id=operation.operation_id,
                    kind=operation.kind,
                    at=self.at,
                    principal=actor.principal,
                    trace_id=operation.trace_id,
                    consumed=consumed,
                    amount=amount,
                    money=budget.money,
                    effect=effect,
                    request=request if part == 0 else None,
                    effect_bytes=effect_bytes,
                    digest=digest,
                    previous_hash=previous,
                    hash=chained,
                )
            )
        return Accepted(
            operation, actor, tuple(entries), tuple(heads.values()), tuple(self.holds.values())
        )


def _bare(hold: Hold) -> Hold:
    """A hold as an entry tells it: who reads an entry needs no token."""
    return hold._replace(token=b"")


_NO_MONEY = Balances()
_NOTHING = Effect(changes=_NO_MONEY)
