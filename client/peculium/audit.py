"""What auditors ask and are told, as frozen values. Amounts are in the tree's unit, times the ledger's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

from peculium.alerts import Alert
from peculium.capability import BudgetRef
from peculium.values import Balances, BudgetInfo, BudgetState, EntryInfo, LedgerPosition


class Reach(Enum):
    """How far around a budget a question reaches."""

    BUDGET = 1
    """The budget alone."""
    SUBTREE = 2
    """The budget and everything below it."""
    TREE = 3
    """The whole tree that the budget belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryFilter:
    """Which entries are wanted: those for which everything holds that is said.

    Attributes:
        kinds: Of any of these kinds, for example "SETTLE".
        principals: By any of these; "system" is the ledger itself.
        operation_id: Of this operation: a UUID, as an `EntryInfo` has it.
        trace_id: Of this trace: 32 hexadecimal digits.
        labels: Whose operation has all of these.
        since: Decided at this time or later.
        until: Decided before this time.
        hold_id: That tell of this hold.
        reference: Whose operation has this reference, as a provider's bill names the call.
    """

    kinds: Sequence[str] = ()
    principals: Sequence[str] = ()
    operation_id: str | None = None
    trace_id: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    since: datetime | None = None
    until: datetime | None = None
    hold_id: bytes | None = None
    reference: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetFilter:
    """Which budgets are wanted: those for which everything holds that is said.

    Attributes:
        states: In any of these states, ancestors considered.
        holder: Held by this principal.
        labels: With all of these, as they were given when it was made.
        since: Made at this time or later.
        until: Made before this time.
        depth: At most so many levels below the top; None: any.
        name_prefix: Whose name begins so.
    """

    states: Sequence[BudgetState] = ()
    holder: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    since: datetime | None = None
    until: datetime | None = None
    depth: int | None = None
    name_prefix: str = ""


@dataclass(frozen=True, slots=True)
class Delegation:
    """One budget of a line from the root downwards, and the operation that made it.

    Attributes:
        budget: As it is now.
        made_by: The entry of its making, its own first one.
        amount: What it was made with.
        by: The principal that made it.
        right: By which right: "token", "holder" or "role".
        token: The id of the parent's token that was consumed; None by another right.
    """

    budget: BudgetInfo
    made_by: EntryInfo
    amount: int
    by: str
    right: str
    token: bytes | None


@dataclass(frozen=True, slots=True)
class TokenStep:
    """What one operation did to a budget's token or holder.

    Attributes:
        seq: The budget's entry.
        operation_id: A UUID.
        kind: For example "ACCEPT".
        at: When.
        by: Who.
        consumed: The id of the token that it consumed, or None.
        produced: A fingerprint of the token that it produced, the first 8 bytes of SHA-256 of its id, or
            None: a live token's id is not shown.
        holder: Whoever holds the budget from then on; None: whoever has the token.
    """

    seq: int
    operation_id: str
    kind: str
    at: datetime
    by: str
    consumed: bytes | None
    produced: bytes | None
    holder: str | None


@dataclass(frozen=True, slots=True)
class RefusalCount:
    """How often a budget was refused something within a minute.

    Attributes:
        minute: When the minute began.
        ref: The budget that was asked of, its path empty if there is no such budget; None: too many
            budgets were refused at once to tell which.
        reason: For example "BUDGET_EXHAUSTED".
        count: How often.
    """

    minute: datetime
    ref: BudgetRef | None
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class SecurityEvent:
    """That a secret was shown by another principal than whose it was: a sign that a capability was stolen.

    Attributes:
        event_id: A UUID.
        at: When it was noticed first.
        kind: "CONSUMED_TOKEN" (a budget's that another principal had consumed), "CONSUMED_HOLD_TOKEN"
            (likewise a hold's), or "BOUND_TOKEN" (the live one of a budget that is bound to another).
        ref: The budget that was asked of; None: there were too many at once to tell which, and whose.
        principal: Who has shown the secret; empty: there were too many at once to tell.
        operation_id: What they have asked, the first time, a UUID. It was refused.
        consumed_by: Who had consumed the token; None: nobody.
        consumed_operation_id: The operation that had consumed it, a UUID.
        consumed_kind: Its kind, for example "RESERVE".
        consumed_at: When that was.
        holder: Whom the budget was bound to; None: nobody.
        count: How often, within a minute.
        freeze_id: The Freeze of the budget that it has led to, a UUID; None: none.
    """

    event_id: str
    at: datetime
    kind: str
    ref: BudgetRef | None
    principal: str
    operation_id: str
    consumed_by: str | None
    consumed_operation_id: str | None
    consumed_kind: str | None
    consumed_at: datetime | None
    holder: str | None
    count: int
    freeze_id: str | None


@dataclass(frozen=True, slots=True)
class Movement:
    """What the operations of one kind have moved in a period.

    Attributes:
        kind: For example "SETTLE".
        operations: How many operations touched the budgets concerned.
        entries: How many entries they have there.
        changes: The sum of their changes, which may be negative.
    """

    kind: str
    operations: int
    entries: int
    changes: Balances


@dataclass(frozen=True, slots=True)
class Statement:
    """What moved in a period: opening and all movements add up to closing, balance by balance.

    A subtree is stated as one account: what its budgets have delegated to each other is inside.

    Attributes:
        unit: Of all amounts.
        since: When the period begins.
        until: When it ends; not later than the answer.
        opening: Directly before the period.
        movements: By kind of operation.
        closing: Directly after the period.
        used_opening: Spent and forfeited, before.
        used_closing: Spent and forfeited, after.
        disputed_closing: Beside what was used: reported, and booked to nobody.
        budgets: How many there were at the end, closed ones included.
        ledger: Where in the ledger's history the answer stands.
    """

    unit: str
    since: datetime
    until: datetime
    opening: Balances
    movements: tuple[Movement, ...]
    closing: Balances
    used_opening: int
    used_closing: int
    disputed_closing: int
    budgets: int
    ledger: LedgerPosition


@dataclass(frozen=True, slots=True)
class UsageGroup:
    """What one group has spent.

    Attributes:
        keys: Of each thing grouped by the group's text; empty where there is none.
        operations: Settles, spends and resolves.
        spent: Booked as spent, less what was taken back.
        forfeited: By lapses, less what was settled or released afterwards.
        estimated: Operations whose amount was an estimate, as they said.
        input_tokens: Tokens read, as reported.
        output_tokens: Tokens written, as reported.
        cached_tokens: Of the tokens read, those from a cache.
    """

    keys: tuple[str, ...]
    operations: int
    spent: int
    forfeited: int
    estimated: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class UsageReport:
    """What was spent in a period, by group.

    Attributes:
        unit: Of all amounts.
        groups: In the order of their texts.
        total: The sum over all groups, without keys.
        ledger: Where in the ledger's history the answer stands.
    """

    unit: str
    groups: tuple[UsageGroup, ...]
    total: UsageGroup
    ledger: LedgerPosition


@dataclass(frozen=True, slots=True)
class Watched:
    """What was recorded, as far as it is followed.

    Attributes:
        entries: Whole operations, by position within each lane. None in a heartbeat.
        cursor: To go on behind them, later or elsewhere. Keep it once they are dealt with.
        alerts: By number, if they are followed, each after the entries that it is of.
        alerts_forgotten: So many alerts since the cursor are kept no longer, and are not told.
    """

    entries: tuple[EntryInfo, ...]
    cursor: bytes
    alerts: tuple[Alert, ...] = ()
    alerts_forgotten: int = 0
