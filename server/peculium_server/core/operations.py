"""What may be asked of the ledger: one frozen value for each kind of operation.

Ids are 16 bytes, token ids 32 bytes, durations and times integers of microseconds, amounts integers
of the tree's unit. A secret never gets here: who presents one is known by its token id.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar


class Kind(IntEnum):
    """Kinds of operation. Numbers are part of the entry encoding and never reused."""

    GRANT = 1
    TOP_UP = 2
    WITHDRAW = 3
    RESERVE = 4
    SETTLE = 5
    RELEASE = 6
    EXTEND = 7
    SPEND = 8
    DELEGATE = 9
    ACCEPT = 10
    RECOVER = 11
    FUND = 12
    RENEW = 13
    RETURN = 14
    REVOKE = 15
    RESOLVE = 16
    FREEZE = 17
    UNFREEZE = 18
    LAPSE = 19
    EXPIRE = 20
    COLLECT = 21

    # An enumeration's own is a function in Python, and every operation is looked up by its kind many times.
    __hash__ = int.__hash__


class Role(IntEnum):
    """What a principal may do."""

    AGENT = 1
    ADMIN = 2
    AUDITOR = 3
    SYSTEM = 4


@dataclass(frozen=True, slots=True)
class Actor:
    """The authenticated caller, or the ledger itself."""

    principal: str
    role: Role


SYSTEM = Actor("system", Role.SYSTEM)


@dataclass(frozen=True, slots=True)
class ByToken:
    """The caller presented the secret of this token."""

    token_id: bytes


@dataclass(frozen=True, slots=True)
class After:
    """The token that the budget or hold has after this earlier operation of the same batch."""

    index: int


@dataclass(frozen=True, slots=True)
class ByHolder:
    """The caller is the budget's holder."""


@dataclass(frozen=True, slots=True)
class ByRole:
    """The caller's role, admin or system, is the authority."""


Authority = ByToken | After | ByHolder | ByRole
Labels = tuple[tuple[str, str], ...]
"""Sorted by key, keys distinct."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the provider reported for a call."""

    provider: str = ""
    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AtomicBatch:
    """The batch that an operation is accepted with, or not at all."""

    batch_id: bytes
    size: int
    """How many operations it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What every operation carries."""

    operation_id: bytes
    root_id: bytes
    budget_id: bytes
    authority: Authority
    labels: Labels = ()
    dry_run: bool = False
    trace_id: bytes | None = None
    batch: AtomicBatch | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant(Header):
    """Make a root: world -> available."""

    kind: ClassVar[Kind] = Kind.GRANT
    name: str
    unit: str
    amount: int
    token_id: bytes | None = None
    holder: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TopUp(Header):
    """Put more into a root, by the inflow rule."""

    kind: ClassVar[Kind] = Kind.TOP_UP
    amount: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw(Header):
    """Take out of a root what is available."""

    kind: ClassVar[Kind] = Kind.WITHDRAW
    amount: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve(Header):
    """Set money aside for one call: available -> held."""

    kind: ClassVar[Kind] = Kind.RESERVE
    amount: int
    ttl_us: int
    next_token_id: bytes | None = None
    hold_id: bytes
    hold_token_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle(Header):
    """Book what a call has cost: held -> spent, the rest flows back."""

    kind: ClassVar[Kind] = Kind.SETTLE
    hold_id: bytes
    actual: int | None = None
    keep_open: bool = False
    next_hold_token_id: bytes | None = None
    reference: str = ""
    usage: Usage | None = None
    estimated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(Header):
    """End a hold whose call was not billed: held -> available."""

    kind: ClassVar[Kind] = Kind.RELEASE
    hold_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Extend(Header):
    """Give a hold more time."""

    kind: ClassVar[Kind] = Kind.EXTEND
    hold_id: bytes
    ttl_us: int
    next_hold_token_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend(Header):
    """Book a cost that was known before: available -> spent."""

    kind: ClassVar[Kind] = Kind.SPEND
    amount: int
    next_token_id: bytes | None = None
    reference: str = ""
    usage: Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A child to be made by Delegate."""

    budget_id: bytes
    name: str
    amount: int
    token_id: bytes | None = None
    holder: str | None = None
    lease_us: int | None = None
    lease_latest_us: int | None = None
    labels: Labels = ()
    overrun_factor: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegate(Header):
    """Make children, all or none: available -> delegated."""

    kind: ClassVar[Kind] = Kind.DELEGATE
    next_token_id: bytes | None = None
    children: tuple[Child, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept(Header):
    """Rotate a token that was handed over, and bind it to the caller."""

    kind: ClassVar[Kind] = Kind.ACCEPT
    next_token_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """A new token for a hold."""

    hold_id: bytes
    next_token_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Recover(Header):
    """Give a budget a new token on its holder's word; by an admin also a new holder or custody."""

    kind: ClassVar[Kind] = Kind.RECOVER
    next_token_id: bytes | None = None
    holder: str | None = None
    holds: tuple[Rotation, ...] = ()
    if_seq: int | None = None
    """Only if the budget has so many entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fund(Header):
    """Move money to a descendant: available -> delegated, on each level."""

    kind: ClassVar[Kind] = Kind.FUND
    next_token_id: bytes | None = None
    descendant_id: bytes
    amount: int
    lease_us: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew(Header):
    """Prolong a lease, up to the latest end that the parent set."""

    kind: ClassVar[Kind] = Kind.RENEW
    next_token_id: bytes | None = None
    lease_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Return(Header):
    """Give money back to the parent. Without an amount: all of it, and close."""

    kind: ClassVar[Kind] = Kind.RETURN
    next_token_id: bytes | None = None
    amount: int | None = None
    cascade: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke(Header):
    """Close a descendant."""

    kind: ClassVar[Kind] = Kind.REVOKE
    next_token_id: bytes | None = None
    descendant_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolve(Header):
    """Say what a hold has cost over its whole life, without the hold's secret."""

    kind: ClassVar[Kind] = Kind.RESOLVE
    next_token_id: bytes | None = None
    hold_id: bytes
    actual: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze(Header):
    """Set the admin's flag that blocks new spending in a subtree."""

    kind: ClassVar[Kind] = Kind.FREEZE
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfreeze(Header):
    """Clear the admin's flag; a dispute still freezes."""

    kind: ClassVar[Kind] = Kind.UNFREEZE
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lapse(Header):
    """A hold's time is over: held -> forfeited."""

    kind: ClassVar[Kind] = Kind.LAPSE
    hold_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Expire(Header):
    """A lease is over: close the budget."""

    kind: ClassVar[Kind] = Kind.EXPIRE


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect(Header):
    """Empty one budget below a closed one: available -> nearest open ancestor."""

    kind: ClassVar[Kind] = Kind.COLLECT


Operation = (
    Grant
    | TopUp
    | Withdraw
    | Reserve
    | Settle
    | Release
    | Extend
    | Spend
    | Delegate
    | Accept
    | Recover
    | Fund
    | Renew
    | Return
    | Revoke
    | Resolve
    | Freeze
    | Unfreeze
    | Lapse
    | Expire
    | Collect
)

OPERATIONS: dict[Kind, type[Operation]] = {
    operation.kind: operation
    for operation in (
        Grant,
        TopUp,
        Withdraw,
        Reserve,
        Settle,
        Release,
        Extend,
        Spend,
        Delegate,
        Accept,
        Recover,
        Fund,
        Renew,
        Return,
        Revoke,
        Resolve,
        Freeze,
        Unfreeze,
        Lapse,
        Expire,
        Collect,
    )
}

HOLD_OPERATIONS = (Settle, Release, Extend)
"""Their token is the hold's, not the budget's."""

PRODUCING = {
    kind: tuple(
        name
        for name in ("next_token_id", "hold_token_id", "next_hold_token_id", "token_id")
        if hasattr(operation, name)
    )
    for kind, operation in OPERATIONS.items()
}
"""The fields of each kind that name a token to be produced."""
