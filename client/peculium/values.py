"""What the ledger answers, as frozen values. Amounts are in the tree's unit, times are the ledger's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum

from peculium._unread import Unread
from peculium.capability import BudgetRef, Capability, Receiver
from peculium.errors import Invalid
from peculium.v1 import types_pb2


class Custody(Enum):
    """How a budget is held."""

    TOKEN = types_pb2.CUSTODY_TOKEN
    """By a token that each operation consumes and renews: one owner, in one place."""
    PRINCIPAL = types_pb2.CUSTODY_PRINCIPAL
    """By a principal, all of whose processes may use it."""


class BudgetState(Enum):
    """What a budget allows."""

    OPEN = types_pb2.BUDGET_STATE_OPEN
    FROZEN = types_pb2.BUDGET_STATE_FROZEN
    EXPIRED = types_pb2.BUDGET_STATE_EXPIRED
    CLOSED = types_pb2.BUDGET_STATE_CLOSED
    UNKNOWN = types_pb2.BUDGET_STATE_UNSPECIFIED
    """A state that this version of the client does not know."""

    @classmethod
    def _missing_(cls, _: object) -> BudgetState:
        return cls.UNKNOWN


class HoldState(Enum):
    """Where a hold is in its life."""

    LIVE = types_pb2.HOLD_STATE_LIVE
    LAPSED = types_pb2.HOLD_STATE_LAPSED
    SETTLED = types_pb2.HOLD_STATE_SETTLED
    RELEASED = types_pb2.HOLD_STATE_RELEASED
    DISPUTED = types_pb2.HOLD_STATE_DISPUTED
    UNKNOWN = types_pb2.HOLD_STATE_UNSPECIFIED
    """A state that this version of the client does not know."""

    @classmethod
    def _missing_(cls, _: object) -> HoldState:
        return cls.UNKNOWN


class IfHeld(Enum):
    """What `claim` does about a budget that somebody holds."""

    FENCE = "fence"
    """Take it over: whoever holds it cannot use it any more."""
    SKIP = "skip"
    """Leave it alone: raise `BudgetHeld`."""


FENCE = IfHeld.FENCE
SKIP = IfHeld.SKIP


@dataclass(frozen=True, slots=True)
class Balances:
    """The money of one budget.

    Always: granted = available + held + delegated + spent + forfeited - overrun.

    Attributes:
        granted: Put in so far, less what was taken back.
        available: Free to reserve, spend and delegate.
        held: In live holds.
        delegated: The sum of the children's `granted`.
        spent: Settled.
        forfeited: In lapsed holds whose call may have been billed.
        overrun: Billed beyond what the budgets concerned had; above zero in a root only.
        advanced: The part of `granted` that ancestors lent for settles beyond their holds.
    """

    granted: int
    available: int
    held: int
    delegated: int
    spent: int
    forfeited: int
    overrun: int
    advanced: int


@dataclass(frozen=True, slots=True)
class LedgerPosition:
    """Where in the ledger's history an answer stands.

    Attributes:
        incarnation: Changes when the ledger is restored from a backup, 16 bytes.
        lane: The serial order that the budget's tree belongs to.
        position: Number of operations committed in the lane.
    """

    incarnation: bytes
    lane: int
    position: int


@dataclass(frozen=True, slots=True)
class BudgetInfo:
    """A budget as a read found it.

    Attributes:
        ref: Its path and ids.
        parent_id: None for a root.
        name: Unique among its siblings.
        unit: What is counted, for example "usd_nanos".
        custody: Held by token or by principal.
        holder: The principal it belongs to; None while a token is a bearer's.
        state: What it allows.
        balances: The money.
        disputed: Reported beyond what the overrun factors allow, booked to nobody.
        holds_live: How many holds are live.
        overrun_factor: How many times its amount a hold may bill beyond it; None: no limit.
        lease_expires_at: Until when it lives; None: for ever.
        lease_latest_at: How far its holder may renew the lease.
        labels: Given when it was made.
        seq: Number of its entries.
        created_at: When it was made.
        ledger: Where in the ledger's history the answer stands; None where it was not said.
        subtree_used: Spent and forfeited in it and everything below; None unless it was asked for.
        subtree_disputed: Disputed beside that; None unless it was asked for.
        subtree_held: Held in it and everything below; None unless it was asked for, and of the past.
        subtree_holds_live: How many holds these are; None unless it was asked for, and of the past.
    """

    ref: BudgetRef
    parent_id: bytes | None
    name: str
    unit: str
    custody: Custody
    holder: str | None
    state: BudgetState
    balances: Balances
    disputed: int
    holds_live: int
    overrun_factor: int | None
    lease_expires_at: datetime | None
    lease_latest_at: datetime | None
    labels: Mapping[str, str]
    seq: int
    created_at: datetime
    ledger: LedgerPosition | None = None
    subtree_used: int | None = None
    subtree_disputed: int | None = None
    subtree_held: int | None = None
    subtree_holds_live: int | None = None

    @property
    def path(self) -> str:
        """Names from the root downwards, joined by "/"."""
        return self.ref.path


@dataclass(frozen=True, slots=True)
class HoldInfo:
    """Money set aside for one call, as an operation left it or as a read found it.

    Attributes:
        hold_id: Its id, 16 bytes.
        budget_id: The budget it was reserved from.
        state: Where it is in its life.
        amount: As reserved.
        remaining: Still set aside; after a lapse: forfeited.
        booked: Booked as spent over its life.
        disputed: Reported, but booked to nobody.
        created_at: When it was reserved.
        expires_at: When it becomes due to lapse.
    """

    hold_id: bytes
    budget_id: bytes
    state: HoldState
    amount: int
    remaining: int
    booked: int
    disputed: int
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Receipt(Unread):
    """What an accepted operation did.

    Attributes:
        operation_id: A UUID, as entries and logs name the operation.
        replayed: It was recorded before, by an attempt whose answer was lost.
        dry_run: Nothing was recorded; this is what would have happened.
        at: The ledger's time of the decision.
        budget_id: The budget concerned.
        balances: Its money directly after the operation.
        state: Its own state directly after the operation.
        seq: Its number of entries directly after the operation.
        lease_expires_at: Until when it lives; None: for ever.
        hold: The hold concerned.
        returned: What came back to the nearest open ancestor.
        pending: What is still to be collected below.
        holds: By a recovery: what can still be settled.
        holds_truncated: There are more such holds; `holds()` lists them all.
        ledger: Where in the ledger's history the answer stands.
    """

    operation_id: str
    replayed: bool
    dry_run: bool
    at: datetime
    budget_id: bytes
    balances: Balances
    state: BudgetState
    seq: int
    lease_expires_at: datetime | None
    hold: HoldInfo | None
    returned: int
    pending: int
    holds: tuple[HoldInfo, ...]
    holds_truncated: bool
    ledger: LedgerPosition


@dataclass(frozen=True, slots=True)
class Delegated:
    """A budget that was made: a child by `delegate`, or a root by `grant`.

    Attributes:
        ref: Its path (where known) and ids.
        name: Its name.
        granted: What it was given.
        lease_expires_at: Until when it lives; None: for ever.
        receipt: What the operation did.
        carrier: The W3C trace context that it was made in, to send beside it, for `accept` or `open` in
            another process; empty if there was none.
    """

    ref: BudgetRef
    name: str
    granted: int
    lease_expires_at: datetime | None
    receipt: Receipt
    _capability: Capability | None = field(default=None, repr=False, compare=False)
    carrier: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def capability(self) -> Capability:
        """The right to spend from it, to be handed over.

        Raises:
            Invalid: It is held by a principal, or its receiver made the secret: there is nothing to
                hand over but `ref`.
        """
        if self._capability is None:
            raise Invalid(
                "the budget's secret was not made here: send its `ref` to its receiver or holder",
                budget=str(self.ref),
            )
        return self._capability


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """The immutable record of an operation's effect on one budget.

    Attributes:
        root_id: The tree.
        budget_id: The budget.
        seq: 1, 2, 3, ... within the budget.
        lane: The serial order that the tree belongs to.
        position: The operation's place in it.
        part: Which part of the operation this is, from 0.
        parts: How many it has.
        operation_id: A UUID.
        kind: For example "RESERVE".
        at: The ledger's time of the decision.
        actor: The principal, or "system".
        amount: The operation's headline amount.
        balances: After the operation.
        changes: The same fields as differences, which may be negative.
        trace_id: The W3C trace id as 32 hexadecimal digits, or None.
        consumed: The token id that it consumed, or None.
        request: The operation as requested, in the canonical encoding; in part 0 only.
        effect: The rest of the effect, in the canonical encoding.
        digest: SHA-256 over the operation and all its parts.
        previous_hash: SHA-256 of the budget's entry before.
        hash: SHA-256 of this entry.
    """

    root_id: bytes
    budget_id: bytes
    seq: int
    lane: int
    position: int
    part: int
    parts: int
    operation_id: str
    kind: str
    at: datetime
    actor: str
    amount: int
    balances: Balances
    changes: Balances
    trace_id: str | None
    consumed: bytes | None
    request: bytes
    effect: bytes
    digest: bytes
    previous_hash: bytes
    hash: bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that verification found wrong.

    Attributes:
        root_id: The tree.
        budget_id: The budget; None if it is about the tree.
        seq: The first broken entry of the budget; 0 if it is about the budget's row.
        rule: The rule that it breaks, for example "chain", "fold", "digest".
        detail: For people.
    """

    root_id: bytes
    budget_id: bytes | None
    seq: int
    rule: str
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """How far a verification is; the last one has the verdict.

    Attributes:
        entries: Entries checked so far.
        trees: Trees checked so far.
        verified: Nothing is wrong; None until the end.
        findings: What is wrong, the first finding of each tree.
    """

    entries: int
    trees: int
    verified: bool | None
    findings: tuple[Finding, ...]


Seconds = float | timedelta
"""A length of time: seconds, or a timedelta."""


@dataclass(frozen=True, slots=True)
class Child:
    """A child budget to be made by `delegate`.

    How it is held: by default by a token whose secret is made here and handed over as a capability;
    with `receiver` by the token that the receiver made; with `holder` alone by that principal. With
    `holder` and a token (`receiver`, or `token=True`) only that principal may use the token.

    Attributes:
        name: Unique among its siblings: 1 to 128 bytes of UTF-8 without "/" and control characters.
        amount: Moved from the parent's available, in the tree's unit. 0 is allowed.
        holder: A principal.
        receiver: A `Receiver` or the token id that it showed.
        token: Held by token although a holder is named.
        lease: How long it lives; absent: as long as its parent.
        lease_latest: How far its holder may renew the lease, from now; absent: not at all.
        labels: Labels that stay with the budget.
        overrun_factor: How many times its amount a hold may bill beyond it, 0 to 1000; absent: 1.
    """

    name: str
    amount: int
    holder: str | None = field(default=None, kw_only=True)
    receiver: Receiver | bytes | None = field(default=None, kw_only=True)
    token: bool = field(default=False, kw_only=True)
    lease: Seconds | None = field(default=None, kw_only=True)
    lease_latest: Seconds | None = field(default=None, kw_only=True)
    labels: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    overrun_factor: int | None = field(default=None, kw_only=True)
