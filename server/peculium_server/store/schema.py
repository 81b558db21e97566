"""The tables, as the newest migration leaves them. `docs/reference/schema.md` explains them.

Every key of what a tree is made of begins with the lane, then the root: a lane is written by one writer
at a time, and a tree lies within one lane. The migrations partition each table whose key begins so by
lane; that, and what else only PostgreSQL has, is not needed for anything to be right. Nothing needs a trigger, a sequence,
a stored procedure or a foreign key. Columns are in order of their alignment, the widest first,
because millions of entries would otherwise carry padding.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    TextClause,
    UniqueConstraint,
    Uuid,
    column,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP

from peculium_server.core.alerts import (
    BASIS_POINTS_MAX,
    URL_BYTES_MAX,
    AlertKind,
    DeliveryState,
)
from peculium_server.core.keys import KeyActKind
from peculium_server.core.limits import BALANCE_MAX, DEPTH_MAX, OVERRUN_FACTOR_MAX
from peculium_server.core.reuse import ReuseKind
from peculium_server.core.state import Balances, Custody, HoldState

LANES = 16
"""Lanes of a new ledger; how many an existing one has is fixed in its `ledger` row."""

SEQ_GROUP_BITS = 6
"""A budget's entries are indexed in groups of this many bits of their seq.

All entries of a group have the same key, which a B-tree stores once: a tenth of the bytes.
"""

SERVES_FROM = "0008"
"""Servers that were written for this revision, or a newer one, may serve the newest one.

An expansion leaves this as it is. A contraction, which takes away what older servers use, raises it to
the oldest revision whose servers do without that: one of a release before (docs/operating/upgrades.md).
"""

metadata = MetaData(
    naming_convention={
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(constraint_name)s",
    }
)

_ID = Uuid(as_uuid=False)
_NAME = Text(collation="C").with_variant(Text(), "cockroachdb")
"""Compared by its bytes: an upgrade of the system's locales must not reorder a unique index."""
_TIME = TIMESTAMP(timezone=True)


SPARSE = ("delegated", "forfeited", "overrun", "advanced")
"""Balances that are zero in nearly every entry, which therefore says NULL: that takes no room."""


def _money(sparse: Collection[str] = ()) -> list[Column[int]]:
    return [Column(name, BigInteger, nullable=name in sparse) for name in Balances._fields]


# Subtracted one after another: the sum of a side could pass 2^63.
_BALANCED = text("granted - available - held - delegated - spent - forfeited + overrun = 0")
_SPARSE_BALANCED = text(
    "granted - available - held - coalesce(delegated, 0) - spent - coalesce(forfeited, 0)"
    " + coalesce(overrun, 0) = 0"
)
_SIGNED = text(" AND ".join(f"{name} BETWEEN 0 AND {BALANCE_MAX}" for name in Balances._fields))
_ADVANCED = text("advanced <= granted")
_OVERRUN = text("overrun = 0 OR budget_id = root_id")


def _digest(column: str) -> TextClause:
    return text(f"octet_length({column}) = 32")


ledger = Table(
    "ledger",
    metadata,
    Column("created_at", _TIME, nullable=False, server_default=text("clock_timestamp()")),
    Column("singleton", Boolean, nullable=False),
    Column("lanes", SmallInteger, nullable=False),
    Column("encoding_version", SmallInteger, nullable=False),
    Column("incarnation", _ID, nullable=False, server_default=text("gen_random_uuid()")),
    Column("serves_from", Text, nullable=False, server_default=text("'0008'")),
    PrimaryKeyConstraint("singleton"),
    CheckConstraint(text("singleton"), name="singleton"),
    CheckConstraint(text("lanes > 0"), name="lanes"),
)

incarnations = Table(
    "incarnations",
    metadata,
    Column("number", BigInteger, autoincrement=False, nullable=False),
    Column("at", _TIME, nullable=False, server_default=text("clock_timestamp()")),
    Column("system_identifier", BigInteger),
    Column("timeline", BigInteger),
    Column("database_oid", BigInteger),
    Column("xid", BigInteger),
    Column("incarnation", _ID, nullable=False),
    Column("frozen", Boolean, nullable=False),
    Column("event", Text, nullable=False),
    Column("reason", Text),
    Column("principal", Text),
    Column("positions", ARRAY(BigInteger), nullable=False),
    PrimaryKeyConstraint("number"),
    CheckConstraint(text("number >= 1"), name="number"),
    CheckConstraint(
        text("event IN ('made', 'moved', 'noticed', 'confirmed')"),
        name="event",
    ),
)
"""Rows are added, and never changed; the last one says what is so. A place is NULL where none can be told."""

lanes = Table(
    "lanes",
    metadata,
    Column("position", BigInteger, nullable=False),
    Column("lane", SmallInteger, autoincrement=False, nullable=False),
    PrimaryKeyConstraint("lane"),
    CheckConstraint(text("position >= 0"), name="position"),
)

roots = Table(
    "roots",
    metadata,
    Column("lane", SmallInteger, nullable=False),
    Column("root_id", _ID, nullable=False),
    Column("name", _NAME, nullable=False),
    PrimaryKeyConstraint("name"),
)

budgets = Table(
    "budgets",
    metadata,
    *_money(),
    Column("disputed", BigInteger, nullable=False),
    Column("disputes", BigInteger, nullable=False),
    Column("holds_live", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("created_at", _TIME, nullable=False),
    Column("last_at", _TIME, nullable=False),
    Column("lease_until", _TIME),
    Column("lease_latest", _TIME),
    Column("lane", SmallInteger, nullable=False),
    Column("custody", SmallInteger, nullable=False),
    Column("overrun_factor", SmallInteger),
    Column("closed", Boolean, nullable=False),
    Column("frozen", Boolean, nullable=False),
    Column("root_id", _ID, nullable=False),
    Column("budget_id", _ID, nullable=False),
    Column("parent_id", _ID),
    Column("token", LargeBinary),
    Column("head", LargeBinary, nullable=False),
    Column("holder", Text),
    Column("ancestors", ARRAY(_ID), nullable=False),
    Column("name", _NAME, nullable=False),
    Column("unit", Text, nullable=False),
    Column("labels", JSONB, nullable=False),
    PrimaryKeyConstraint("lane", "root_id", "budget_id"),
    UniqueConstraint("lane", "root_id", "parent_id", "name", name="name"),
    CheckConstraint(_BALANCED, name="balanced"),
    CheckConstraint(_SIGNED, name="signed"),
    CheckConstraint(_ADVANCED, name="advanced"),
    CheckConstraint(_OVERRUN, name="overrun"),
    CheckConstraint(
        text(
            f"disputed BETWEEN 0 AND {BALANCE_MAX} AND disputes >= 0 AND holds_live >= 0"
            " AND version >= 0 AND seq >= 1"
        ),
        name="counters",
    ),
    CheckConstraint(text("holds_live > 0 OR held = 0"), name="held"),
    CheckConstraint(text("disputes > 0 OR disputed = 0"), name="disputed"),
    CheckConstraint(
        text(
            # Nobody's token and nobody by name: only what was returned in full is held by nobody.
            f"CASE custody WHEN {Custody.TOKEN:d} THEN token IS NOT NULL OR closed"
            f" WHEN {Custody.PRINCIPAL:d} THEN token IS NULL AND holder IS NOT NULL"
            " ELSE false END"
        ),
        name="custody",
    ),
    CheckConstraint(
        text(
            "CASE WHEN parent_id IS NULL"
            " THEN budget_id = root_id AND cardinality(ancestors) = 0"
            f" ELSE budget_id <> root_id AND cardinality(ancestors) BETWEEN 1 AND {DEPTH_MAX - 1}"
            " AND parent_id = ancestors[1] AND ancestors[cardinality(ancestors)] = root_id END"
        ),
        name="ancestors",
    ),
    CheckConstraint(
        text(
            "CASE WHEN parent_id IS NULL THEN overrun_factor IS NULL"
            f" ELSE overrun_factor IS NOT NULL AND overrun_factor BETWEEN 0 AND {OVERRUN_FACTOR_MAX}"
            " END"
        ),
        name="overrun_factor",
    ),
    CheckConstraint(
        text("(lease_until IS NULL) = (lease_latest IS NULL) AND created_at <= last_at"),
        name="times",
    ),
    CheckConstraint(_digest("token"), name="token"),
    CheckConstraint(_digest("head"), name="head"),
    CheckConstraint(text("jsonb_typeof(labels) = 'object'"), name="labels"),
    Index(
        "ix_budgets_due",
        "lane",
        "lease_until",
        postgresql_where=text("lease_until IS NOT NULL AND NOT closed"),
    ),
)
"""Updates stay within a page where they can (HOT): no index has a column that operations change."""

OPEN_HOLD = text(f"state IN ({HoldState.LIVE:d}, {HoldState.LAPSED:d})")
LIVE_HOLD = text(f"state = {HoldState.LIVE:d}")

holds = Table(
    "holds",
    metadata,
    Column("amount", BigInteger, nullable=False),
    Column("remaining", BigInteger, nullable=False),
    Column("booked", BigInteger, nullable=False),
    Column("disputed", BigInteger, nullable=False),
    Column("created_at", _TIME, nullable=False),
    Column("expires_at", _TIME, nullable=False),
    Column("lane", SmallInteger, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("root_id", _ID, nullable=False),
    Column("budget_id", _ID, nullable=False),
    Column("hold_id", _ID, nullable=False),
    Column("token", LargeBinary, nullable=False),
    PrimaryKeyConstraint("lane", "root_id", "hold_id"),
    CheckConstraint(text(f"state BETWEEN {min(HoldState):d} AND {max(HoldState):d}"), name="state"),
    CheckConstraint(
        text(
            "amount > 0 AND remaining >= 0 AND booked >= 0"
            f" AND disputed BETWEEN 0 AND {BALANCE_MAX} AND remaining <= amount"
        ),
        name="amounts",
    ),
    CheckConstraint(
        text(
            f"(remaining = 0 OR state IN ({HoldState.LIVE:d}, {HoldState.LAPSED:d}))"
            f" AND (disputed > 0) = (state = {HoldState.DISPUTED:d})"
        ),
        name="ended",
    ),
    CheckConstraint(_digest("token"), name="token"),
    Index(
        "uq_holds_token",
        "lane",
        "root_id",
        "budget_id",
        "token",
        unique=True,
        postgresql_where=OPEN_HOLD,
    ),
    Index("ix_holds_due", "lane", "expires_at", postgresql_where=LIVE_HOLD),
)

collections = Table(
    "collections",
    metadata,
    Column("closed_at", _TIME, nullable=False),
    Column("lane", SmallInteger, nullable=False),
    Column("root_id", _ID, nullable=False),
    Column("budget_id", _ID, nullable=False),
    PrimaryKeyConstraint("lane", "root_id", "budget_id"),
)
"""Closed budgets below which something is to be collected. An accelerator: no part of the fold."""


def seq_group(seq: ColumnElement[int]) -> ColumnElement[int]:
    """The group of a seq in the index of a budget's entries."""
    return seq.bitwise_rshift(literal_column(str(SEQ_GROUP_BITS)))


entries = Table(
    "entries",
    metadata,
    Column("position", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("at", _TIME, nullable=False),
    Column("amount", BigInteger, nullable=False),
    *_money(SPARSE),
    Column("lane", SmallInteger, nullable=False),
    Column("part", SmallInteger, nullable=False),
    Column("parts", SmallInteger, nullable=False),
    Column("kind", SmallInteger, nullable=False),
    Column("root_id", _ID, nullable=False),
    Column("budget_id", _ID, nullable=False),
    Column("operation_id", _ID, nullable=False),
    Column("trace_id", LargeBinary),
    Column("consumed", LargeBinary),
    Column("hash", LargeBinary, nullable=False),
    Column("digest", LargeBinary),
    Column("principal", Text, nullable=False),
    Column("effect", LargeBinary, nullable=False),
    Column("request", LargeBinary),
    PrimaryKeyConstraint("lane", "root_id", "operation_id", "part"),
    CheckConstraint(_SPARSE_BALANCED, name="balanced"),
    CheckConstraint(_SIGNED, name="signed"),
    CheckConstraint(_ADVANCED, name="advanced"),
    CheckConstraint(_OVERRUN, name="overrun"),
    CheckConstraint(
        text("position >= 1 AND seq >= 1 AND amount >= 0 AND kind >= 1"), name="counters"
    ),
    CheckConstraint(
        text(
            "0 <= part AND part < parts"
            " AND (part = 0) = (request IS NOT NULL) AND (parts > 1) = (digest IS NOT NULL)"
        ),
        name="parts",
    ),
    CheckConstraint(
        text(
            "octet_length(hash) = 32 AND octet_length(coalesce(consumed, hash)) = 32"
            " AND octet_length(coalesce(digest, hash)) = 32"
        ),
        name="digests",
    ),
    Index(
        "uq_entries_consumed",
        "lane",
        "root_id",
        "budget_id",
        "consumed",
        unique=True,
        postgresql_where=text("consumed IS NOT NULL"),
    ),
    Index(
        "ix_entries_budget",
        "lane",
        "root_id",
        "budget_id",
        seq_group(column("seq", BigInteger)),
    ),
    # Entries lie on disk in order of their position, so that a summary of each few pages finds them.
    Index(
        "ix_entries_position",
        "position",
        postgresql_using="brin",
        postgresql_with={"pages_per_range": 16, "autosummarize": True},
    ).ddl_if(dialect="postgresql"),
    Index("ix_entries_position", "lane", "position").ddl_if(dialect="cockroachdb"),
)

checkpoint_keys = Table(
    "checkpoint_keys",
    metadata,
    Column("added_at", _TIME, nullable=False, server_default=text("clock_timestamp()")),
    Column("key_id", LargeBinary, nullable=False),
    Column("public_key", LargeBinary, nullable=False),
    PrimaryKeyConstraint("key_id"),
    CheckConstraint(
        text("octet_length(key_id) = 8 AND octet_length(public_key) = 32"), name="lengths"
    ),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("number", BigInteger, autoincrement=False, nullable=False),
    Column("leaves", BigInteger, nullable=False),
    Column("sealed_at", _TIME, nullable=False),
    Column("merkle_root", LargeBinary, nullable=False),
    Column("previous_hash", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("key_id", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("positions", ARRAY(BigInteger), nullable=False),
    Column("incarnation", _ID),
    PrimaryKeyConstraint("number"),
    CheckConstraint(text("number >= 1 AND leaves >= 1"), name="counters"),
    CheckConstraint(
        text(
            "octet_length(merkle_root) = 32 AND octet_length(previous_hash) = 32"
            " AND octet_length(hash) = 32 AND octet_length(key_id) = 8"
            " AND octet_length(signature) = 64"
        ),
        name="lengths",
    ),
)

checkpoint_leaves = Table(
    "checkpoint_leaves",
    metadata,
    Column("number", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("lane", SmallInteger, nullable=False),
    Column("root_id", _ID, nullable=False),
    Column("budget_id", _ID, nullable=False),
    Column("head", LargeBinary, nullable=False),
    PrimaryKeyConstraint("lane", "root_id", "budget_id", "seq"),
    CheckConstraint(text("number >= 1 AND seq >= 1"), name="counters"),
    CheckConstraint(_digest("head"), name="head"),
    Index("ix_checkpoint_leaves_number", "lane", "number"),
)
"""Rows of checkpoints are added, and never changed."""

key_acts = Table(
    "key_acts",
    metadata,
    Column("number", BigInteger, autoincrement=False, nullable=False),
    Column("at", _TIME, nullable=False),
    Column("lifetime_us", BigInteger),
    Column("overlap_us", BigInteger),
    Column("kind", SmallInteger, nullable=False),
    Column("operation_id", _ID, nullable=False),
    Column("key_id", _ID, nullable=False),
    Column("by_key", _ID),
    Column("digest", LargeBinary),
    Column("by_principal", Text, nullable=False),
    Column("principal", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("roles", ARRAY(SmallInteger), nullable=False),
    Column("roots", ARRAY(_ID)),
    PrimaryKeyConstraint("number"),
    UniqueConstraint("operation_id", name="operation_id"),
    UniqueConstraint("digest", name="digest"),
    CheckConstraint(text("number >= 1"), name="number"),
    CheckConstraint(
        text(
            f"CASE kind WHEN {KeyActKind.CREATE:d} THEN digest IS NOT NULL AND principal <> ''"
            " AND cardinality(roles) >= 1"
            f" WHEN {KeyActKind.ROTATE:d} THEN digest IS NOT NULL AND overlap_us IS NOT NULL"
            f" WHEN {KeyActKind.REVOKE:d} THEN digest IS NULL"
            " ELSE false END"
        ),
        name="kind",
    ),
    CheckConstraint(_digest("digest"), name="digest"),
    # Limited to no tree would be taken for limited to none.
    CheckConstraint(text("cardinality(roots) >= 1"), name="roots"),
    CheckConstraint(text("lifetime_us > 0 AND overlap_us >= 0"), name="times"),
    Index("ix_key_acts_key", "key_id", "number"),
    Index(
        "uq_key_acts_created",
        "key_id",
        unique=True,
        postgresql_where=text(f"kind = {KeyActKind.CREATE:d}"),
    ),
    Index(
        "uq_key_acts_revoked",
        "key_id",
        unique=True,
        postgresql_where=text(f"kind = {KeyActKind.REVOKE:d}"),
    ),
)
"""What was done to API keys. Rows are added, and never changed: a key is what they say."""

refusals = Table(
    "refusals",
    metadata,
    Column("minute", _TIME, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("lane", SmallInteger, nullable=False),
    Column("root_id", _ID, nullable=False),
    Column("budget_id", _ID, nullable=False),
    Column("reason", _NAME, nullable=False),
    PrimaryKeyConstraint("minute", "root_id", "budget_id", "reason"),
    CheckConstraint(text("number >= 1"), name="number"),
    Index("ix_refusals_root", "root_id", "minute"),
)
"""How often budgets were refused what, by minute. No part of the record; rows are forgotten after days."""

security_events = Table(
    "security_events",
    metadata,
    Column("at", _TIME, nullable=False),
    Column("consumed_at", _TIME),
    Column("number", BigInteger, nullable=False),
    Column("lane", SmallInteger, nullable=False),
    Column("kind", SmallInteger, nullable=False),
    Column("consumed_kind", SmallInteger),
    Column("event_id", _ID, nullable=False),
    Column("root_id", _ID, nullable=False),
    Column("budget_id", _ID, nullable=False),
    Column("operation_id", _ID, nullable=False),
    Column("consumed_operation_id", _ID),
    Column("freeze_id", _ID),
    Column("principal", Text, nullable=False),
    Column("consumed_by", Text),
    Column("holder", Text),
    PrimaryKeyConstraint("at", "event_id"),
    CheckConstraint(text("number >= 1"), name="number"),
    CheckConstraint(text(f"kind BETWEEN {min(ReuseKind):d} AND {max(ReuseKind):d}"), name="kind"),
    CheckConstraint(
        text(
            "(consumed_operation_id IS NULL) = (consumed_by IS NULL)"
            " AND (consumed_operation_id IS NULL) = (consumed_at IS NULL)"
            " AND (consumed_operation_id IS NULL) = (consumed_kind IS NULL)"
        ),
        name="consumed",
    ),
    Index("ix_security_events_root", "root_id", "at"),
)
"""Secrets that were shown by another than whose they were. Rows are added, and never changed."""

alert_progress = Table(
    "alert_progress",
    metadata,
    Column("alerts", BigInteger, nullable=False),
    Column("changes", BigInteger, nullable=False),
    Column("looked_at", _TIME, nullable=False),
    Column("singleton", Boolean, nullable=False),
    Column("more", Boolean, nullable=False),
    Column("positions", ARRAY(BigInteger), nullable=False),
    PrimaryKeyConstraint("singleton"),
    CheckConstraint(text("singleton"), name="singleton"),
    CheckConstraint(text("alerts >= 0 AND changes >= 0"), name="counters"),
)
"""One row, which every transaction about alerts writes: they are in one order, and alerts numbered in it."""

alert_rules = Table(
    "alert_rules",
    metadata,
    Column("amount", BigInteger, nullable=False),
    Column("since", BigInteger, nullable=False),
    Column("crossings", BigInteger, nullable=False),
    Column("basis_points", BigInteger, nullable=False),
    Column("created_at", _TIME, nullable=False),
    Column("deleted_at", _TIME),
    Column("lane", SmallInteger, nullable=False),
    Column("kind", SmallInteger, nullable=False),
    Column("armed", Boolean, nullable=False),
    Column("due", Boolean, nullable=False),
    Column("rule_id", _ID, nullable=False),
    Column("root_id", _ID, nullable=False),
    Column("budget_id", _ID, nullable=False),
    Column("line", ARRAY(_ID), nullable=False),
    Column("path", Text, nullable=False),
    Column("unit", Text, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("deleted_by", Text),
    PrimaryKeyConstraint("rule_id"),
    CheckConstraint(
        text(
            f"kind BETWEEN {min(AlertKind):d} AND {max(AlertKind):d}"
            f" AND basis_points BETWEEN 0 AND {BASIS_POINTS_MAX} AND amount BETWEEN 0 AND {BALANCE_MAX}"
            f" AND (kind = {AlertKind.USED:d}) = (basis_points > 0 OR amount > 0)"
            " AND (basis_points = 0 OR amount = 0)"
        ),
        name="threshold",
    ),
    CheckConstraint(text("since >= 0 AND crossings >= 0"), name="counters"),
    CheckConstraint(text("line[1] = budget_id AND line[cardinality(line)] = root_id"), name="line"),
    CheckConstraint(text("(deleted_at IS NULL) = (deleted_by IS NULL)"), name="deleted"),
    Index("ix_alert_rules_root", "lane", "root_id"),
)

alerts = Table(
    "alerts",
    metadata,
    Column("number", BigInteger, autoincrement=False, nullable=False),
    Column("at", _TIME, nullable=False),
    Column("recorded_at", _TIME, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("threshold", BigInteger, nullable=False),
    Column("granted", BigInteger, nullable=False),
    Column("lane", SmallInteger, nullable=False),
    Column("kind", SmallInteger, nullable=False),
    Column("alert_id", _ID, nullable=False),
    Column("rule_id", _ID, nullable=False),
    Column("root_id", _ID, nullable=False),
    Column("budget_id", _ID, nullable=False),
    Column("source_id", _ID, nullable=False),
    Column("operation_id", _ID),
    Column("hold_id", _ID),
    Column("line", ARRAY(_ID), nullable=False),
    Column("path", Text, nullable=False),
    Column("source_path", Text, nullable=False),
    Column("unit", Text, nullable=False),
    Column("principal", Text),
    PrimaryKeyConstraint("number"),
    UniqueConstraint("alert_id", name="id"),
    CheckConstraint(
        text("number >= 1 AND amount >= 0 AND threshold >= 0 AND granted >= 0"), name="counters"
    ),
    CheckConstraint(text(f"kind BETWEEN {min(AlertKind):d} AND {max(AlertKind):d}"), name="kind"),
    Index("ix_alerts_root", "root_id", "number"),
)
"""Rows are added, and go when they are old; they never change."""

webhooks = Table(
    "webhooks",
    metadata,
    Column("created_at", _TIME, nullable=False),
    Column("deleted_at", _TIME),
    Column("webhook_id", _ID, nullable=False),
    Column("root_id", _ID),
    Column("budget_id", _ID),
    Column("url", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("deleted_by", Text),
    PrimaryKeyConstraint("webhook_id"),
    CheckConstraint(text(f"octet_length(url) BETWEEN 1 AND {URL_BYTES_MAX}"), name="url"),
    CheckConstraint(text("(root_id IS NULL) = (budget_id IS NULL)"), name="budget"),
    CheckConstraint(text("(deleted_at IS NULL) = (deleted_by IS NULL)"), name="deleted"),
)
"""Where alerts are sent to. What they are signed with is not in the database."""

PENDING = text(f"state = {DeliveryState.PENDING:d}")

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("number", BigInteger, autoincrement=False, nullable=False),
    Column("next_at", _TIME, nullable=False),
    Column("last_at", _TIME),
    Column("attempts", SmallInteger, nullable=False),
    Column("last_status", SmallInteger, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("webhook_id", _ID, nullable=False),
    Column("last_problem", Text, nullable=False),
    PrimaryKeyConstraint("webhook_id", "number"),
    CheckConstraint(
        text(
            f"number >= 1 AND attempts >= 0 AND last_status >= 0"
            f" AND state BETWEEN {min(DeliveryState):d} AND {max(DeliveryState):d}"
        ),
        name="counters",
    ),
    Index("ix_webhook_deliveries_due", "webhook_id", "next_at", postgresql_where=PENDING),
    Index("ix_webhook_deliveries_number", "number"),
)
"""The outbox: an alert for a webhook, made in the transaction that records the alert."""
