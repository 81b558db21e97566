"""Secrets that were shown by another than whose they were, and the view of them for auditors.

Why: a capability that was stolen shows when two principals present the same secret. A refusal writes nothing
to the ledger, and a count of refusals tells of no principal (docs/concepts/authority.md).
Locks: none that anyone could wait for; table and view are new, and no other one is touched.
Duration: well under a second.
Undo: DROP VIEW audit.security_events; DROP TABLE security_events, and set alembic_version to 0009. The events are
lost. `downgrade` refuses: there is one way.

A server of the schema before that still runs records none, and is not disturbed.
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE security_events (
    at timestamptz NOT NULL,
    consumed_at timestamptz,
    number bigint NOT NULL,
    lane smallint NOT NULL,
    kind smallint NOT NULL,
    consumed_kind smallint,
    event_id uuid NOT NULL,
    root_id uuid NOT NULL,
    budget_id uuid NOT NULL,
    operation_id uuid NOT NULL,
    consumed_operation_id uuid,
    freeze_id uuid,
    principal text NOT NULL,
    consumed_by text,
    holder text,
    CONSTRAINT pk_security_events PRIMARY KEY (at, event_id),
    CONSTRAINT ck_security_events_number CHECK (number >= 1),
    CONSTRAINT ck_security_events_kind CHECK (kind BETWEEN 1 AND 3),
    CONSTRAINT ck_security_events_consumed CHECK (
        (consumed_operation_id IS NULL) = (consumed_by IS NULL)
        AND (consumed_operation_id IS NULL) = (consumed_at IS NULL)
        AND (consumed_operation_id IS NULL) = (consumed_kind IS NULL)
    )
);

CREATE INDEX ix_security_events_root ON security_events (root_id, at);
"""

VIEW = """
CREATE VIEW audit.security_events AS
SELECT
    r.name AS root,
    (
        SELECT p.path FROM audit.paths AS p
        WHERE p.lane = s.lane AND p.root_id = s.root_id AND p.budget_id = s.budget_id
    ) AS path,
    s.lane, s.root_id, s.budget_id, s.event_id, s.at,
    (ARRAY['CONSUMED_TOKEN', 'CONSUMED_HOLD_TOKEN', 'BOUND_TOKEN'])[s.kind] AS kind,
    s.number,
    nullif(s.principal, '') AS principal,
    s.operation_id, s.consumed_by, s.consumed_operation_id,
    audit.kind(s.consumed_kind) AS consumed_kind, s.consumed_at, s.holder, s.freeze_id
FROM security_events AS s
LEFT JOIN roots AS r ON r.lane = s.lane AND r.root_id = s.root_id
"""

COMMENT = (
    "Secrets of tokens that were shown by another principal than whose they were: signs of theft."
)
COLUMNS = {
    "root": "The name of the tree; NULL where it is not told.",
    "path": "The names from the root to the budget, separated by slashes.",
    "lane": "The lane that the tree belongs to.",
    "root_id": "The id of the tree's root; all zeros: there were too many at once to tell which.",
    "budget_id": "The budget that was asked of.",
    "event_id": "The event.",
    "at": "When it was noticed, by the database's clock.",
    "kind": "CONSUMED_TOKEN, CONSUMED_HOLD_TOKEN (of a hold) or BOUND_TOKEN (live, and another's).",
    "number": "How often, within a minute.",
    "principal": "Who has shown the secret; NULL: there were too many at once to tell.",
    "operation_id": "What they have asked; the first one.",
    "consumed_by": "Who had consumed the token; NULL: nobody.",
    "consumed_operation_id": "The operation that had consumed it.",
    "consumed_kind": "Its kind: RESERVE, ACCEPT, …",
    "consumed_at": "When that was.",
    "holder": "Whom the budget was bound to; NULL: nobody.",
    "freeze_id": "The Freeze that it has led to; NULL: to none.",
}


def upgrade() -> None:
    """Make the table and the view, and say what everything in it is."""
    op.execute(TABLE)
    op.execute(VIEW)
    _comment("VIEW", "audit.security_events", COMMENT)
    for column, text in COLUMNS.items():
        _comment("COLUMN", f"audit.security_events.{column}", text)


def _comment(what: str, name: str, text: str) -> None:
    quoted = text.replace("'", "''")
    op.execute(f"COMMENT ON {what} {name} IS '{quoted}'")


def downgrade() -> None:
    """Refuse."""
    raise NotImplementedError("there is no way back: see what the revision says of undoing it")
