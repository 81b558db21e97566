"""A list of the closed budgets below which something is still to be collected.

Why: nothing in a budget's row tells that an ancestor is closed, so what a closing has left to collect
could only be found by searching whole trees. Each closing that leaves something adds a row in its own
transaction; the sweeper takes it out when nothing is left. It is no part of the fold.
Locks: none that anyone could wait for; the table is new, and what exists is only read.
Duration: one pass over `budgets`, to fill in what earlier closings have left: 3 seconds for a million
budgets that all have something available, on 2 cores, and so about half a minute for 10 million.
Undo: DROP TABLE collections, and set alembic_version to 0001. Only the list is lost, and FILL makes
it again. `downgrade` refuses all the same: there is one way.

A server of the schema before that still runs does not list what it closes. Once the last one is
stopped, FILL may be run again, at any time (docs/operating/sweeper.md).
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

LANES = 16

TABLE = """
CREATE TABLE collections (
    closed_at timestamptz NOT NULL,
    lane smallint NOT NULL,
    root_id uuid NOT NULL,
    budget_id uuid NOT NULL,
    CONSTRAINT pk_collections PRIMARY KEY (lane, root_id, budget_id)
) PARTITION BY LIST (lane);
"""

PARTITION = "CREATE TABLE collections_{lane:02} PARTITION OF collections FOR VALUES IN ({lane})"

FILL = """
INSERT INTO collections (lane, root_id, budget_id, closed_at)
SELECT top.lane, top.root_id, top.budget_id, top.last_at
FROM (
    SELECT DISTINCT lane, root_id, above
    FROM budgets, unnest(ancestors) AS above
    WHERE available > 0
) AS below
JOIN budgets AS top
    ON top.lane = below.lane AND top.root_id = below.root_id AND top.budget_id = below.above
WHERE top.closed
ON CONFLICT DO NOTHING
"""


def upgrade() -> None:
    """Make the list, and fill it."""
    op.execute(TABLE)
    for lane in range(LANES):
        op.execute(PARTITION.format(lane=lane))
    op.execute(FILL)


def downgrade() -> None:
    """Refuse."""
    raise NotImplementedError("there is no way back: see what the revision says of undoing it")
