"""The incarnations of the ledger, the place that it was found in, and the auditors' view of them.

Why: a database that was restored has forgotten what it had acknowledged, and no row of it can tell. It
is noticed by the place that the ledger is in, and the ledger is another incarnation from then on, frozen
until an operator has said that it may go on (docs/operating/restore.md). A checkpoint is of the
incarnation that it was sealed in.
Locks: checkpoints for an instant, to add a column that may be NULL; nothing waits but a sealer.
Duration: well under a second. The place is the one that the database is in while this runs.
Undo: the view audit.checkpoints as 0004 has it, DROP VIEW audit.incarnations, DROP TABLE incarnations, ALTER TABLE checkpoints DROP COLUMN
incarnation, and set alembic_version to 0008. Checkpoints that were sealed after a restore do not verify
any more. `downgrade` refuses: there is one way.

A server of the schema before that still runs tells the first incarnation, and notices no restore.
"""

from __future__ import annotations

import importlib.resources

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE incarnations (
    number bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    system_identifier bigint,
    timeline bigint,
    database_oid bigint,
    xid bigint,
    incarnation uuid NOT NULL,
    frozen boolean NOT NULL,
    event text NOT NULL,
    reason text,
    principal text,
    positions bigint[] NOT NULL,
    CONSTRAINT pk_incarnations PRIMARY KEY (number),
    CONSTRAINT ck_incarnations_number CHECK (number >= 1),
    CONSTRAINT ck_incarnations_event CHECK (
        event IN ('made', 'moved', 'noticed', 'confirmed')
    )
);

ALTER TABLE checkpoints ADD COLUMN incarnation uuid;

INSERT INTO incarnations (
    number, incarnation, frozen, event, positions, system_identifier, timeline, database_oid, xid
)
SELECT
    1,
    incarnation,
    false,
    'made',
    (SELECT array_agg(position ORDER BY lane) FROM lanes),
    (SELECT system_identifier FROM pg_control_system()),
    ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint,
    (SELECT oid FROM pg_database WHERE datname = current_database()),
    pg_current_xact_id()::text::bigint
FROM ledger;
"""

VIEW = """
CREATE VIEW audit.incarnations AS
SELECT number, at, event, incarnation, frozen, reason, principal, positions FROM incarnations
"""

CHECKPOINTS = "0009_checkpoints.sql"

COLUMNS = {
    "number": "1, 2, 3, …; the last one says what is so.",
    "at": "When it was noticed, or said.",
    "event": "made; moved: a standby took over; noticed: restored or copied; confirmed: may go on.",
    "incarnation": "Of the ledger from then on.",
    "frozen": "Nothing new may be spent from then on.",
    "reason": "What was found, or what the operator has said.",
    "principal": "The operator who has confirmed it; NULL: a server has noticed it.",
    "positions": "Operations committed in each lane then.",
}


def upgrade() -> None:
    """Make the table and the view, and let the view of the checkpoints say what each is of."""
    op.execute(TABLES)
    op.execute(VIEW)
    folder = importlib.resources.files("peculium_migrations") / "audit"
    op.execute((folder / CHECKPOINTS).read_text(encoding="utf-8"))
    _comment("VIEW", "audit.incarnations", "The ledger as it was made, moved and restored.")
    for column, text in COLUMNS.items():
        _comment("COLUMN", f"audit.incarnations.{column}", text)


def _comment(what: str, name: str, text: str) -> None:
    quoted = text.replace("'", "''")
    op.execute(f"COMMENT ON {what} {name} IS '{quoted}'")


def downgrade() -> None:
    """Refuse."""
    raise NotImplementedError("there is no way back: see what the revision says of undoing it")
