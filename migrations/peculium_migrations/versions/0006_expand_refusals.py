"""How often budgets were refused what, by minute, and the view of it for auditors.

Why: "why was it stopped at 14:03?" has to have an answer, though a refusal writes nothing when it happens.
Servers add up what they have counted, every few seconds, and forget it after some days.
Locks: none that anyone could wait for; table and view are new, and no other one is touched.
Duration: well under a second.
Undo: DROP VIEW audit.refusals; DROP TABLE refusals, and set alembic_version to 0005. The counts are lost,
which are no part of the record. `downgrade` refuses: there is one way.

A server of the schema before that still runs counts nothing, and is not disturbed.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE refusals (
    minute timestamptz NOT NULL,
    number bigint NOT NULL,
    lane smallint NOT NULL,
    root_id uuid NOT NULL,
    budget_id uuid NOT NULL,
    reason text COLLATE "C" NOT NULL,
    CONSTRAINT pk_refusals PRIMARY KEY (minute, root_id, budget_id, reason),
    CONSTRAINT ck_refusals_number CHECK (number >= 1)
);

CREATE INDEX ix_refusals_root ON refusals (root_id, minute);
"""

VIEW = """
CREATE VIEW audit.refusals AS
SELECT
    r.name AS root,
    (
        SELECT p.path FROM audit.paths AS p
        WHERE p.lane = f.lane AND p.root_id = f.root_id AND p.budget_id = f.budget_id
    ) AS path,
    f.lane, f.root_id, f.budget_id, f.minute, f.reason, f.number
FROM refusals AS f
LEFT JOIN roots AS r ON r.lane = f.lane AND r.root_id = f.root_id
"""

COMMENT = "How often budgets were refused what, by minute; forgotten after some days."
COLUMNS = {
    "root": "The name of the tree; NULL where it is not told, or there is none.",
    "path": "The names from the root to the budget, separated by slashes.",
    "lane": "The lane that the tree belongs to.",
    "root_id": "The id of the tree's root; all zeros: too many budgets were refused at once to tell which.",
    "budget_id": "The budget that was asked of.",
    "minute": "When the minute began, by the database's clock.",
    "reason": "Why: BUDGET_EXHAUSTED, TOKEN_CONSUMED, …",
    "number": "How often.",
}


def upgrade() -> None:
    """Make the table and the view, and say what everything in it is."""
    op.execute(TABLE)
    op.execute(VIEW)
    _comment("VIEW", "audit.refusals", COMMENT)
    for column, text in COLUMNS.items():
        _comment("COLUMN", f"audit.refusals.{column}", text)


def _comment(what: str, name: str, text: str) -> None:
    quoted = text.replace("'", "''")
    op.execute(f"COMMENT ON {what} {name} IS '{quoted}'")


def downgrade() -> None:
    """Refuse."""
    raise NotImplementedError("there is no way back: see what the revision says of undoing it")
