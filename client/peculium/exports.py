"""What an export consists of, as `client.audit.export()` gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from peculium.proofs import Checkpoint
from peculium.values import Balances, Custody, EntryInfo, HoldInfo


@dataclass(frozen=True, slots=True)
class ExportHeader:
    """What is exported.

    Attributes:
        encoding_version: Of requests, effects and hashes.
        incarnation: Of the ledger, 16 bytes.
        at: When the snapshot was taken, by the database's clock.
        positions: Each lane's position at that instant, by lane.
        root_id: The root of the only tree that is exported; None: the whole ledger.
        earlier_incarnations: Those that the ledger had before it was restored, the first one first.
    """

    encoding_version: int
    incarnation: bytes
    at: datetime
    positions: tuple[int, ...]
    root_id: bytes | None
    earlier_incarnations: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class ExportedBudget:
    """A budget's row.

    Attributes:
        root_id: Its tree.
        budget_id: The budget.
        ancestors: The ids of its ancestors, the parent first.
        name: Its name.
        unit: What is counted.
        custody: By token or by principal.
        holder: The principal that holds it, if any.
        token_digest: SHA-256 of the live token's id; None if there is none.
        overrun_factor: How many times its amount a hold may bill beyond it; None for a root.
        labels: The labels that it was made with.
        created_at: When it was made.
        balances: Its money.
        disputed: Reported beyond what was allowed, booked to nobody.
        disputes: How many of its holds are disputed.
        holds_live: How many of its holds are live.
        closed: It was closed.
        frozen: The admin's flag.
        lease_until: When its lease ends; None: never.
        lease_latest: Until when it may be renewed.
        version: Counts what a decision below may read.
        seq: How many entries it has.
        last_at: When the last of them was decided.
        head: The hash of the last of them.
    """

    root_id: bytes
    budget_id: bytes
    ancestors: tuple[bytes, ...]
    name: str
    unit: str
    custody: Custody
    holder: str | None
    token_digest: bytes | None
    overrun_factor: int | None
    labels: Mapping[str, str]
    created_at: datetime
    balances: Balances
    disputed: int
    disputes: int
    holds_live: int
    closed: bool
    frozen: bool
    lease_until: datetime | None
    lease_latest: datetime | None
    version: int
    seq: int
    last_at: datetime
    head: bytes


@dataclass(frozen=True, slots=True)
class ExportedHold:
    """A hold's row.

    Attributes:
        root_id: Its tree.
        hold: The hold.
        token_digest: SHA-256 of its token's id, live or ended.
    """

    root_id: bytes
    hold: HoldInfo
    token_digest: bytes


@dataclass(frozen=True, slots=True)
class ExportedLeaf:
    """A budget's head that a checkpoint has sealed.

    Attributes:
        checkpoint: The checkpoint's number.
        root_id: The tree.
        budget_id: The budget.
        seq: The sealed head's.
        head: The hash of that entry.
    """

    checkpoint: int
    root_id: bytes
    budget_id: bytes
    seq: int
    head: bytes


@dataclass(frozen=True, slots=True)
class ExportTrailer:
    """The end: what has no trailer is cut.

    Attributes:
        entries: How many entries there were.
        budgets: How many budgets.
        holds: How many holds.
        checkpoints: How many checkpoints.
    """

    entries: int
    budgets: int
    holds: int
    checkpoints: int


ExportPiece = (
    ExportHeader
    | EntryInfo
    | ExportedBudget
    | ExportedHold
    | Checkpoint
    | ExportedLeaf
    | ExportTrailer
)
"""First the header, then entries by lane, position and part, budgets, holds, checkpoints each with its
leaves, the trailer."""
