"""What an accepted operation did, told from its entries alone: a replay tells the same again."""

from __future__ import annotations

from typing import NamedTuple

from peculium_server.core.operations import Delegate, Fund, Kind, Operation, Revoke
from peculium_server.core.state import Balances, BudgetState, Entry, Hold, new


class ChildOutcome(NamedTuple):
    """A child as Delegate made it."""

    budget_id: bytes
    granted: int
    lease_until: int | None


class Outcome(NamedTuple):
    """What an accepted operation did. Times are microseconds since the Unix epoch."""

    operation_id: bytes
    kind: Kind
    replayed: bool
    dry_run: bool
    at: int
    budget_id: bytes
    money: Balances
    state: BudgetState
    seq: int
    lease_until: int | None
    hold: Hold | None
    children: tuple[ChildOutcome, ...]
    returned: int
    pending: int
    holds: tuple[Hold, ...]
    holds_truncated: bool
    descendant_id: bytes | None


def tell(operation: Operation, entries: tuple[Entry, ...], *, replayed: bool = False) -> Outcome:
    """The outcome of an operation that these entries record, part 0 first."""
    first = entries[0]
    effect = first.effect
    children: tuple[ChildOutcome, ...] = ()
    if isinstance(operation, Delegate):
        made = {child.budget_id for child in operation.children}
        children = tuple(
            ChildOutcome(entry.budget_id, entry.money.granted, entry.effect.lease_until)
            for entry in entries
            if entry.budget_id in made
        )
    return new(
        Outcome,
        (
            first.operation_id,
            first.kind,
            replayed,
            operation.dry_run,
            first.at,
            first.budget_id,
            first.money,
            _state(first),
            first.seq,
            effect.lease_until,
            effect.hold,
            children,
            effect.returned,
            effect.pending,
            effect.holds,
            effect.holds_truncated,
            operation.descendant_id if isinstance(operation, _ON_DESCENDANTS) else None,
        ),
    )


_ON_DESCENDANTS = (Fund, Revoke)


def _state(entry: Entry) -> BudgetState:
    effect = entry.effect
    if effect.closed:
        return BudgetState.CLOSED
    if effect.lease_until is not None and effect.lease_until <= entry.at:
        return BudgetState.EXPIRED
    if effect.frozen or effect.disputes:
        return BudgetState.FROZEN
    return BudgetState.OPEN
