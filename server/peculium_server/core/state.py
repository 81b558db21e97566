"""What the ledger knows: budgets, holds, and the part of one tree that a decision may look at.

Times are microseconds since the Unix epoch, amounts integers of the tree's unit. The values are
named tuples because a decision copies a few of them for every operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from peculium_server.core.limits import BALANCE_MAX
from peculium_server.core.operations import ByToken

if TYPE_CHECKING:
    from peculium_server.core.operations import Actor, Kind, Labels, Operation

new = tuple.__new__
"""Make a named tuple of all its fields, in their order: half as dear as to call its class."""

GENESIS = bytes(32)
"""The hash before a budget's first entry."""


class Custody(IntEnum):
    """How a budget is held. Numbers are those of the wire and of the rows."""

    TOKEN = 1
    PRINCIPAL = 2


class HoldState(IntEnum):
    """Where a hold is in its life. Numbers are part of the entry encoding."""

    LIVE = 1
    LAPSED = 2
    SETTLED = 3
    RELEASED = 4
    DISPUTED = 5


class BudgetState(IntEnum):
    """What a budget allows by itself, its ancestors aside. Numbers are those of the wire."""

    OPEN = 1
    FROZEN = 2
    EXPIRED = 3
    CLOSED = 4


class Balances(NamedTuple):
    """The money of one budget.

    Always: granted = available + held + delegated + spent + forfeited - overrun, every one of them
    0 to 2^62, advanced at most granted, and overrun above zero in a root only.
    """

    granted: int = 0
    available: int = 0
    held: int = 0
    delegated: int = 0
    spent: int = 0
    forfeited: int = 0
    overrun: int = 0
    advanced: int = 0

    def overflowing(self) -> str | None:
        """Name a balance that would pass 2^62, or None."""
        for name, value in zip(self._fields, self, strict=True):
            if value > BALANCE_MAX:
                return name
        return None

    def balanced(self) -> bool:
        """Say whether the money equation and the signs hold."""
        granted, available, held, delegated, spent, forfeited, overrun, advanced = self
        return (
            granted == available + held + delegated + spent + forfeited - overrun
            and min(self) >= 0
            and advanced <= granted
        )


class Budget(NamedTuple):
    """A node of a tree: the fold of its entries."""

    root_id: bytes
    budget_id: bytes
    ancestors: tuple[bytes, ...]
    """The parent first, the root last; empty for a root."""
    name: str
    unit: str
    custody: Custody
    holder: str | None
    """The principal that it belongs to; None while its token is a bearer's."""
    token: bytes | None
    """The live token's id; None if principal-held, or after everything was returned."""
    overrun_factor: int | None
    """How many times its amount a hold may bill beyond it; None for a root: no limit."""
    labels: Labels
    created_at: int
    money: Balances
    disputed: int = 0
    """Reported beyond what the overrun factor allows, booked to nobody."""
    disputes: int = 0
    """Holds whose dispute is open; above zero the budget is frozen."""
    holds_live: int = 0
    closed: bool = False
    frozen: bool = False
    """The admin's flag."""
    lease_until: int | None = None
    lease_latest: int | None = None
    """The latest end to which the holder may renew; set whenever `lease_until` is."""
    version: int = 0
    """Raised by freeze, close, lease, overrun: all that a decision below reads of it."""
    seq: int = 0
    last_at: int = 0
    head: bytes = GENESIS
    """The hash of the last entry."""

    @property
    def parent_id(self) -> bytes | None:
        """The parent's id; None for a root."""
        return self.ancestors[0] if self.ancestors else None

    @property
    def is_root(self) -> bool:
        """Say whether this is the top of its tree."""
        return not self.ancestors

    def expired(self, at: int) -> bool:
        """Say whether its lease has ended at a time."""
        return self.lease_until is not None and self.lease_until <= at

    def state(self, at: int) -> BudgetState:
        """What it allows by itself at a time, its ancestors aside."""
        if self.closed:
            return BudgetState.CLOSED
        if self.expired(at):
            return BudgetState.EXPIRED
        if self.frozen or self.disputes:
            return BudgetState.FROZEN
        return BudgetState.OPEN


class Hold(NamedTuple):
    """Money set aside for one call."""

    budget_id: bytes
    hold_id: bytes
    token: bytes
    """The id of its token; the last one once the hold has ended."""
    state: HoldState
    amount: int
    """As reserved."""
    remaining: int
    """Still in the budget's held (live) or forfeited (lapsed)."""
    booked: int
    """Booked as spent over its life."""
    disputed: int
    created_at: int
    expires_at: int

    @property
    def settleable(self) -> bool:
        """Say whether its token is live: it was neither settled nor released."""
        return self.state in _SETTLEABLE


_SETTLEABLE = (HoldState.LIVE, HoldState.LAPSED)


class Consumption(NamedTuple):
    """Who consumed a token, and when."""

    operation_id: bytes
    kind: Kind
    at: int
    principal: str
    part: int
    """Of the operation: of several tokens the first part consumes the budget's, the others holds'."""
    shown: bool
    """Its secret was shown; else it was ended on the word of the holder, an admin, or the budget's owner."""


class Effect(NamedTuple):
    """What an operation did to one budget, beside its balances: the state after it."""

    changes: Balances
    """Differences of the balances; these may be negative."""
    disputed: int = 0
    disputes: int = 0
    holds_live: int = 0
    closed: bool = False
    frozen: bool = False
    lease_until: int | None = None
    lease_latest: int | None = None
    version: int = 0
    versions: tuple[int, ...] = ()
    """The ancestors' versions that the decision read, the parent first."""
    hold: Hold | None = None
    """The hold concerned, after the operation. Its token is not part of the encoding: the request has
    it."""
    returned: int = 0
    pending: int = 0
    holds: tuple[Hold, ...] = ()
    """By Recover: the holds that can still be settled."""
    holds_truncated: bool = False


class Entry(NamedTuple):
    """The immutable record of an operation's effect on one budget.

    An operation on n budgets has n entries, its parts; part 0 is the budget concerned. An entry
    consumes at most one token: an operation that ends several (Recover that rotates holds, Resolve
    by token) has one more part on the same budget for each.
    """

    root_id: bytes
    budget_id: bytes
    seq: int
    position: int
    part: int
    parts: int
    operation_id: bytes
    kind: Kind
    at: int
    principal: str
    trace_id: bytes | None
    consumed: bytes | None
    amount: int
    """The operation's headline amount, by kind."""
    money: Balances
    effect: Effect
    request: bytes | None
    """The operation as requested, in the canonical encoding; in part 0 only."""
    effect_bytes: bytes
    digest: bytes
    previous_hash: bytes
    hash: bytes


class Recorded(NamedTuple):
    """An operation that the ledger has accepted before."""

    operation: Operation
    principal: str
    entries: tuple[Entry, ...]


class Accepted(NamedTuple):
    """A decision to do what was asked, and all that it changes: nothing else is to be saved."""

    operation: Operation
    actor: Actor
    entries: tuple[Entry, ...]
    budgets: tuple[Budget, ...]
    """After the operation; a budget with seq equal to its number of new entries is new."""
    holds: tuple[Hold, ...]


class Tree:
    """The part of one tree that the operations of a batch may look at.

    Every key that a footprint names is present, with None where the ledger has nothing under it.
    Reading a key that no footprint named raises KeyError: a bug, never a missing row.
    """

    def __init__(self, root_id: bytes) -> None:
        self.root_id = root_id
        self.budgets: dict[bytes, Budget | None] = {}
        """Named budgets and all their ancestors."""
        self.holds: dict[bytes, Hold | None] = {}
        self.consumed: dict[tuple[bytes, bytes], Consumption | None] = {}
        """By (budget, token id)."""
        self.hold_tokens: dict[tuple[bytes, bytes], bytes | None] = {}
        """The hold that has the token id, in whatever state, by (budget, token id)."""
        self.recorded: dict[bytes, Recorded | None] = {}
        self.names: dict[tuple[bytes | None, str], bytes | None] = {}
        """The budget that has the name, by (parent, name)."""
        self.open_child: dict[bytes, bytes | None] = {}
        """An open child that is not among `budgets`, by parent."""
        self.pending: dict[bytes, int] = {}
        """What is available below a budget in those that are not among `budgets`."""
        self.open_holds: dict[bytes, tuple[Hold, ...]] = {}
        """Live and lapsed holds, of the lowest ids `OPEN_HOLDS_MAX`, by budget."""
        self.restored = False
        """The ledger was restored, and nobody has said yet that it may go on: all trees are as frozen."""

    def copy(self) -> Tree:
        """The same, to be changed apart from it: all values are frozen."""
        other = copy(self)
        for name, known in vars(self).items():
            setattr(other, name, copy(known))
        return other

    def budget(self, budget_id: bytes) -> Budget:
        """The budget, which is known to exist."""
        budget = self.budgets[budget_id]
        assert budget is not None
        return budget

    def line(self, budget: Budget) -> list[Budget]:
        """The budget and its ancestors, upwards."""
        return [budget, *map(self.budget, budget.ancestors)]

    def below(self, budget_id: bytes) -> Iterator[Budget]:
        """The descendants of a budget that are among `budgets`, in no order."""
        for budget in self.budgets.values():
            if budget is not None and budget_id in budget.ancestors:
                yield budget

    def apply(self, accepted: Accepted) -> None:
        """Take over what an operation changed, so that the next of the batch sees it."""
        for budget in accepted.budgets:
            budget_id = budget.budget_id
            if self.budgets.get(budget_id) is None:
                self.names[budget.parent_id, budget.name] = budget_id
            self.budgets[budget_id] = budget
        for hold in accepted.holds:
            budget_id, hold_id, token = hold[:3]
            self.holds[hold_id] = hold
            self.hold_tokens[budget_id, token] = hold_id
            if budget_id in self.open_holds:
                others = tuple(
                    other for other in self.open_holds[budget_id] if other.hold_id != hold_id
                )
                self.open_holds[budget_id] = (*others, hold) if hold.settleable else others
        by_token = isinstance(accepted.operation.authority, ByToken)
        for entry in accepted.entries:
            if entry.consumed is not None:
                shown = by_token and not entry.part
                self.consumed[entry.budget_id, entry.consumed] = new(
                    Consumption,
                    (entry.operation_id, entry.kind, entry.at, entry.principal, entry.part, shown),
                )
        self.recorded[accepted.operation.operation_id] = new(
            Recorded, (accepted.operation, accepted.actor.principal, accepted.entries)
        )
