"""The tables of the ledger, a partition of each for every lane, and the ledger's own row.

Why: there is nothing yet. The keys, the number of lanes and the entry encoding are fixed with this
step (docs/reference/schema.md, docs/decisions/0003-keys-and-retention.md).
Locks: none that anyone could wait for; all tables are new.
Duration: under a second.
Undo: drop the database. There is no way back that keeps a ledger, so `downgrade` refuses.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import Boolean, SmallInteger, column, table

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

LEDGER = table(
    "ledger",
    column("singleton", Boolean),
    column("lanes", SmallInteger),
    column("encoding_version", SmallInteger),
)
LANES = 16
ENCODING_VERSION = 1

TABLES = """
CREATE TABLE ledger (
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    singleton boolean NOT NULL,
    lanes smallint NOT NULL,
    encoding_version smallint NOT NULL,
    incarnation uuid NOT NULL DEFAULT gen_random_uuid(),
    CONSTRAINT pk_ledger PRIMARY KEY (singleton),
    CONSTRAINT ck_ledger_singleton CHECK (singleton),
    CONSTRAINT ck_ledger_lanes CHECK (lanes > 0)
);

CREATE TABLE lanes (
    position bigint NOT NULL,
    lane smallint NOT NULL,
    CONSTRAINT pk_lanes PRIMARY KEY (lane),
    CONSTRAINT ck_lanes_position CHECK (position >= 0)
) PARTITION BY LIST (lane);

CREATE TABLE roots (
    lane smallint NOT NULL,
    root_id uuid NOT NULL,
    name text COLLATE "C" NOT NULL,
    CONSTRAINT pk_roots PRIMARY KEY (name)
);

CREATE TABLE budgets (
    granted bigint NOT NULL,
    available bigint NOT NULL,
    held bigint NOT NULL,
    delegated bigint NOT NULL,
    spent bigint NOT NULL,
    forfeited bigint NOT NULL,
    overrun bigint NOT NULL,
    advanced bigint NOT NULL,
    disputed bigint NOT NULL,
    disputes bigint NOT NULL,
    holds_live bigint NOT NULL,
    version bigint NOT NULL,
    seq bigint NOT NULL,
    created_at timestamptz NOT NULL,
    last_at timestamptz NOT NULL,
    lease_until timestamptz,
    lease_latest timestamptz,
    lane smallint NOT NULL,
    custody smallint NOT NULL,
    overrun_factor smallint,
    closed boolean NOT NULL,
    frozen boolean NOT NULL,
    root_id uuid NOT NULL,
    budget_id uuid NOT NULL,
    parent_id uuid,
    token bytea,
    head bytea NOT NULL,
    holder text,
    ancestors uuid[] NOT NULL,
    name text COLLATE "C" NOT NULL,
    unit text NOT NULL,
    labels jsonb NOT NULL,
    CONSTRAINT pk_budgets PRIMARY KEY (lane, root_id, budget_id),
    CONSTRAINT uq_budgets_name UNIQUE (lane, root_id, parent_id, name),
    CONSTRAINT ck_budgets_balanced CHECK (
        granted - available - held - delegated - spent - forfeited + overrun = 0
    ),
    CONSTRAINT ck_budgets_signed CHECK (
        granted BETWEEN 0 AND 4611686018427387904
        AND available BETWEEN 0 AND 4611686018427387904
        AND held BETWEEN 0 AND 4611686018427387904
        AND delegated BETWEEN 0 AND 4611686018427387904
        AND spent BETWEEN 0 AND 4611686018427387904
        AND forfeited BETWEEN 0 AND 4611686018427387904
        AND overrun BETWEEN 0 AND 4611686018427387904
        AND advanced BETWEEN 0 AND 4611686018427387904
    ),
    CONSTRAINT ck_budgets_advanced CHECK (advanced <= granted),
    CONSTRAINT ck_budgets_overrun CHECK (overrun = 0 OR budget_id = root_id),
    CONSTRAINT ck_budgets_counters CHECK (
        disputed BETWEEN 0 AND 4611686018427387904
        AND disputes >= 0 AND holds_live >= 0 AND version >= 0 AND seq >= 1
    ),
    CONSTRAINT ck_budgets_held CHECK (holds_live > 0 OR held = 0),
    CONSTRAINT ck_budgets_disputed CHECK (disputes > 0 OR disputed = 0),
    CONSTRAINT ck_budgets_custody CHECK (
        CASE custody
            WHEN 1 THEN token IS NOT NULL OR closed
            WHEN 2 THEN token IS NULL AND holder IS NOT NULL
            ELSE false
        END
    ),
    CONSTRAINT ck_budgets_ancestors CHECK (
        CASE WHEN parent_id IS NULL
            THEN budget_id = root_id AND cardinality(ancestors) = 0
            ELSE budget_id <> root_id AND cardinality(ancestors) BETWEEN 1 AND 15
                AND parent_id = ancestors[1] AND ancestors[cardinality(ancestors)] = root_id
        END
    ),
    CONSTRAINT ck_budgets_overrun_factor CHECK (
        CASE WHEN parent_id IS NULL
            THEN overrun_factor IS NULL
            ELSE overrun_factor IS NOT NULL AND overrun_factor BETWEEN 0 AND 1000
        END
    ),
    CONSTRAINT ck_budgets_times CHECK (
        (lease_until IS NULL) = (lease_latest IS NULL) AND created_at <= last_at
    ),
    CONSTRAINT ck_budgets_token CHECK (octet_length(token) = 32),
    CONSTRAINT ck_budgets_head CHECK (octet_length(head) = 32),
    CONSTRAINT ck_budgets_labels CHECK (jsonb_typeof(labels) = 'object')
) PARTITION BY LIST (lane);

CREATE INDEX ix_budgets_due ON budgets (lane, lease_until)
    WHERE lease_until IS NOT NULL AND NOT closed;

CREATE TABLE holds (
    amount bigint NOT NULL,
    remaining bigint NOT NULL,
    booked bigint NOT NULL,
    disputed bigint NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    lane smallint NOT NULL,
    state smallint NOT NULL,
    root_id uuid NOT NULL,
    budget_id uuid NOT NULL,
    hold_id uuid NOT NULL,
    token bytea NOT NULL,
    CONSTRAINT pk_holds PRIMARY KEY (lane, root_id, hold_id),
    CONSTRAINT ck_holds_state CHECK (state BETWEEN 1 AND 5),
    CONSTRAINT ck_holds_amounts CHECK (
        amount > 0 AND remaining >= 0 AND booked >= 0
        AND disputed BETWEEN 0 AND 4611686018427387904 AND remaining <= amount
    ),
    CONSTRAINT ck_holds_ended CHECK (
        (remaining = 0 OR state IN (1, 2)) AND (disputed > 0) = (state = 5)
    ),
    CONSTRAINT ck_holds_token CHECK (octet_length(token) = 32)
) PARTITION BY LIST (lane);

CREATE UNIQUE INDEX uq_holds_token ON holds (lane, root_id, budget_id, token)
    WHERE state IN (1, 2);
CREATE INDEX ix_holds_due ON holds (lane, expires_at) WHERE state = 1;

CREATE TABLE entries (
    position bigint NOT NULL,
    seq bigint NOT NULL,
    at timestamptz NOT NULL,
    amount bigint NOT NULL,
    granted bigint NOT NULL,
    available bigint NOT NULL,
    held bigint NOT NULL,
    delegated bigint,
    spent bigint NOT NULL,
    forfeited bigint,
    overrun bigint,
    advanced bigint,
    lane smallint NOT NULL,
    part smallint NOT NULL,
    parts smallint NOT NULL,
    kind smallint NOT NULL,
    root_id uuid NOT NULL,
    budget_id uuid NOT NULL,
    operation_id uuid NOT NULL,
    trace_id bytea,
    consumed bytea,
    hash bytea NOT NULL,
    digest bytea,
    principal text NOT NULL,
    effect bytea NOT NULL,
    request bytea,
    CONSTRAINT pk_entries PRIMARY KEY (lane, root_id, operation_id, part),
    CONSTRAINT ck_entries_balanced CHECK (
        granted - available - held - coalesce(delegated, 0) - spent - coalesce(forfeited, 0)
        + coalesce(overrun, 0) = 0
    ),
    CONSTRAINT ck_entries_signed CHECK (
        granted BETWEEN 0 AND 4611686018427387904
        AND available BETWEEN 0 AND 4611686018427387904
        AND held BETWEEN 0 AND 4611686018427387904
        AND delegated BETWEEN 0 AND 4611686018427387904
        AND spent BETWEEN 0 AND 4611686018427387904
        AND forfeited BETWEEN 0 AND 4611686018427387904
        AND overrun BETWEEN 0 AND 4611686018427387904
        AND advanced BETWEEN 0 AND 4611686018427387904
    ),
    CONSTRAINT ck_entries_advanced CHECK (advanced <= granted),
    CONSTRAINT ck_entries_overrun CHECK (overrun = 0 OR budget_id = root_id),
    CONSTRAINT ck_entries_counters CHECK (
        position >= 1 AND seq >= 1 AND amount >= 0 AND kind >= 1
    ),
    CONSTRAINT ck_entries_parts CHECK (
        0 <= part AND part < parts
        AND (part = 0) = (request IS NOT NULL) AND (parts > 1) = (digest IS NOT NULL)
    ),
    CONSTRAINT ck_entries_digests CHECK (
        octet_length(hash) = 32 AND octet_length(coalesce(consumed, hash)) = 32
        AND octet_length(coalesce(digest, hash)) = 32
    )
) PARTITION BY LIST (lane);

CREATE UNIQUE INDEX uq_entries_consumed ON entries (lane, root_id, budget_id, consumed)
    WHERE consumed IS NOT NULL;
CREATE INDEX ix_entries_budget ON entries (lane, root_id, budget_id, (seq >> 6));
CREATE INDEX ix_entries_position ON entries
    USING brin (position) WITH (pages_per_range = 16, autosummarize = true);
"""

PARTITIONS = """
CREATE TABLE lanes_{lane:02} PARTITION OF lanes FOR VALUES IN ({lane}) WITH (fillfactor = 50);
CREATE TABLE budgets_{lane:02} PARTITION OF budgets FOR VALUES IN ({lane}) WITH (fillfactor = 70);
CREATE TABLE holds_{lane:02} PARTITION OF holds FOR VALUES IN ({lane})
    WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000);
CREATE TABLE entries_{lane:02} PARTITION OF entries FOR VALUES IN ({lane});
INSERT INTO lanes (lane, position) VALUES ({lane}, 0);
"""
"""What is left free of a page takes the next versions of its rows (HOT). Each hold leaves one dead row
behind when it ends; collected early, their room is used again."""

DISTINCT: dict[str, dict[str, float]] = {
    "budgets_{lane:02}": {"lane": 1, "root_id": 1, "parent_id": -0.5},
    "holds_{lane:02}": {"lane": 1, "root_id": 1, "budget_id": -0.1},
    "entries_{lane:02}": {"lane": 1, "root_id": 1, "budget_id": 1},
}
"""How many values the planner shall believe a column to have; below zero, as a fraction of the rows.

Every lookup gives a whole key. While a table is small, or has not been analyzed since it was, any
index that shares the key's beginning looks as good to the planner, and a plan that reads half of a
tree for each token would be kept for long after. So it is told that what keys begin with selects
nothing, and that what follows does, whatever a sample of the rows would say. A row that comes and goes
gives each partition statistics to say it in.
"""

EXAMPLES = """
INSERT INTO budgets (
    granted, available, held, delegated, spent, forfeited, overrun, advanced, disputed, disputes,
    holds_live, version, seq, created_at, last_at, lane, custody, closed, frozen,
    root_id, budget_id, token, head, ancestors, name, unit, labels
) SELECT
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, now(), now(), lane, 1, false, false,
    id, id, sha256(''), sha256(''), '{}', '', '', '{}'
FROM lanes, gen_random_uuid() AS id;

INSERT INTO holds (
    amount, remaining, booked, disputed, created_at, expires_at, lane, state,
    root_id, budget_id, hold_id, token
) SELECT 1, 1, 0, 0, now(), now(), lane, 1, id, id, id, sha256('')
FROM lanes, gen_random_uuid() AS id;

INSERT INTO entries (
    position, seq, at, amount, granted, available, held, delegated, spent, forfeited, overrun,
    advanced, lane, part, parts, kind, root_id, budget_id, operation_id, consumed, hash, principal,
    effect, request
) SELECT
    1, 1, now(), 0, 0, 0, 0, 0, 0, 0, 0, 0, lane, 0, 1, 1, id, id, id, sha256(''), sha256(''), '', '', ''
FROM lanes, gen_random_uuid() AS id;
"""


def upgrade() -> None:
    """Make everything."""
    op.execute(TABLES)
    for lane in range(LANES):
        op.execute(PARTITIONS.format(lane=lane))
    _teach_the_planner()
    ledger = {"singleton": True, "lanes": LANES, "encoding_version": ENCODING_VERSION}
    op.bulk_insert(LEDGER, [ledger])


def _teach_the_planner() -> None:
    op.execute(EXAMPLES)
    for lane in range(LANES):
        for name, columns in DISTINCT.items():
            partition = name.format(lane=lane)
            for key, count in columns.items():
                op.execute(f"ALTER TABLE {partition} ALTER COLUMN {key} SET (n_distinct = {count})")
            op.execute(f"ANALYZE {partition}")
    # In a subtransaction of its own, or Postgres would keep the files and the count of their rows.
    with op.get_bind().begin_nested():
        op.execute("TRUNCATE budgets, holds, entries")


def downgrade() -> None:
    """Refuse: it would destroy the ledger."""
    raise NotImplementedError("there is no way back from a ledger: drop the database")
