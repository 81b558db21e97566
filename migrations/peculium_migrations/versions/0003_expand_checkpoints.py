"""Sealed checkpoints, their leaves, and the public keys that they are signed with.

Why: an auditor who has a checkpoint's hash finds whatever was altered before it, even if every hash was
made again (docs/reference/checkpoints.md). Rows are added by the sealer, and never changed.
Locks: none that anyone could wait for; all tables are new, and no other one gets a column or an index.
Duration: under a second. What the ledger has recorded before is sealed afterwards, in steps, by the
servers that have a key.
Undo: DROP TABLE checkpoints, checkpoint_leaves, checkpoint_keys, and set alembic_version to 0002. What
was sealed cannot be shown any more; sealing begins anew. `downgrade` refuses: there is one way.

A server of the schema before that still runs seals nothing, and is not disturbed.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

LANES = 16

TABLES = """
CREATE TABLE checkpoint_keys (
    added_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    key_id bytea NOT NULL,
    public_key bytea NOT NULL,
    CONSTRAINT pk_checkpoint_keys PRIMARY KEY (key_id),
    CONSTRAINT ck_checkpoint_keys_lengths CHECK (
        octet_length(key_id) = 8 AND octet_length(public_key) = 32
    )
);

CREATE TABLE checkpoints (
    number bigint NOT NULL,
    leaves bigint NOT NULL,
    sealed_at timestamptz NOT NULL,
    merkle_root bytea NOT NULL,
    previous_hash bytea NOT NULL,
    hash bytea NOT NULL,
    key_id bytea NOT NULL,
    signature bytea NOT NULL,
    positions bigint[] NOT NULL,
    CONSTRAINT pk_checkpoints PRIMARY KEY (number),
    CONSTRAINT ck_checkpoints_counters CHECK (number >= 1 AND leaves >= 1),
    CONSTRAINT ck_checkpoints_lengths CHECK (
        octet_length(merkle_root) = 32 AND octet_length(previous_hash) = 32
        AND octet_length(hash) = 32 AND octet_length(key_id) = 8 AND octet_length(signature) = 64
    )
);

CREATE TABLE checkpoint_leaves (
    number bigint NOT NULL,
    seq bigint NOT NULL,
    lane smallint NOT NULL,
    root_id uuid NOT NULL,
    budget_id uuid NOT NULL,
    head bytea NOT NULL,
    CONSTRAINT pk_checkpoint_leaves PRIMARY KEY (lane, root_id, budget_id, seq),
    CONSTRAINT ck_checkpoint_leaves_counters CHECK (number >= 1 AND seq >= 1),
    CONSTRAINT ck_checkpoint_leaves_head CHECK (octet_length(head) = 32)
) PARTITION BY LIST (lane);

CREATE INDEX ix_checkpoint_leaves_number ON checkpoint_leaves (lane, number);
"""

PARTITION = """
CREATE TABLE checkpoint_leaves_{lane:02} PARTITION OF checkpoint_leaves FOR VALUES IN ({lane})
"""


def upgrade() -> None:
    """Make the tables."""
    op.execute(TABLES)
    for lane in range(LANES):
        op.execute(PARTITION.format(lane=lane))


def downgrade() -> None:
    """Refuse."""
    raise NotImplementedError("there is no way back: see what the revision says of undoing it")
