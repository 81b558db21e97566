"""API keys in the ledger's database: what was done to them, and a view of it for auditors.

Why: keys in a file of each server are revoked when every server was started anew. From this table each
server learns within a second what was done to a key anywhere (docs/operating/identity.md).
Locks: none that anyone could wait for; the table and the view are new, and no other one is touched.
Duration: well under a second.
Undo: DROP VIEW audit.key_acts; DROP TABLE key_acts; and set alembic_version to 0004. Nobody can call with a
key of the database any more. `downgrade` refuses: there is one way.

A server of the schema before that still runs knows the keys of its file only, and is not disturbed.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE key_acts (
    number bigint NOT NULL,
    at timestamptz NOT NULL,
    lifetime_us bigint,
    overlap_us bigint,
    kind smallint NOT NULL,
    operation_id uuid NOT NULL,
    key_id uuid NOT NULL,
    by_key uuid,
    digest bytea,
    by_principal text NOT NULL,
    principal text NOT NULL,
    label text NOT NULL,
    reason text NOT NULL,
    roles smallint[] NOT NULL,
    roots uuid[],
    CONSTRAINT pk_key_acts PRIMARY KEY (number),
    CONSTRAINT uq_key_acts_operation_id UNIQUE (operation_id),
    CONSTRAINT uq_key_acts_digest UNIQUE (digest),
    CONSTRAINT ck_key_acts_number CHECK (number >= 1),
    CONSTRAINT ck_key_acts_kind CHECK (
        CASE kind
            WHEN 1 THEN digest IS NOT NULL AND principal <> '' AND cardinality(roles) >= 1
            WHEN 2 THEN digest IS NOT NULL AND overlap_us IS NOT NULL
            WHEN 3 THEN digest IS NULL
            ELSE false
        END
    ),
    CONSTRAINT ck_key_acts_digest CHECK (octet_length(digest) = 32),
    CONSTRAINT ck_key_acts_roots CHECK (cardinality(roots) >= 1),
    CONSTRAINT ck_key_acts_times CHECK (lifetime_us > 0 AND overlap_us >= 0)
);

CREATE INDEX ix_key_acts_key ON key_acts (key_id, number);

CREATE UNIQUE INDEX uq_key_acts_created ON key_acts (key_id) WHERE kind = 1;

CREATE UNIQUE INDEX uq_key_acts_revoked ON key_acts (key_id) WHERE kind = 3;
"""

VIEW = """
CREATE VIEW audit.key_acts AS
SELECT
    number, at, (ARRAY['CREATE', 'ROTATE', 'REVOKE'])[kind] AS kind, key_id, operation_id,
    by_principal, by_key,
    nullif(principal, '') AS principal,
    CASE WHEN kind = 1 THEN (
        SELECT array_agg((ARRAY['AGENT', 'ADMIN', 'AUDITOR'])[role] ORDER BY role)
        FROM unnest(roles) AS role
    ) END AS roles,
    roots,
    nullif(label, '') AS label,
    at + lifetime_us * interval '1 microsecond' AS expires_at,
    at + overlap_us * interval '1 microsecond' AS overlap_until,
    nullif(reason, '') AS reason
FROM key_acts
"""

COLUMNS = {
    "number": "1, 2, 3, … in the whole ledger, without a gap.",
    "at": "When, by the database's clock.",
    "kind": "CREATE, ROTATE or REVOKE.",
    "key_id": "The key.",
    "operation_id": "The request that asked for it.",
    "by_principal": "Who did it; database: and a user of the database if it was done directly.",
    "by_key": "The key that they called with; NULL: none of the ledger's.",
    "principal": "CREATE: who calls with the key.",
    "roles": "CREATE: as what.",
    "roots": "CREATE: the roots that the key is limited to; NULL: it is for all.",
    "label": "CREATE: what it is for.",
    "expires_at": "CREATE: when it expires; NULL: never. ROTATE: the same from then on; NULL: as before.",
    "overlap_until": "ROTATE: until when the text before stays valid.",
    "reason": "REVOKE: why.",
}


def upgrade() -> None:
    """Make the table and the view, and say what is in it."""
    op.execute(TABLE)
    op.execute(VIEW)
    op.execute(
        "COMMENT ON VIEW audit.key_acts IS 'What was done to API keys, and by whom; without their digests.'"
    )
    for column, text in COLUMNS.items():
        quoted = text.replace("'", "''")
        op.execute(f"COMMENT ON COLUMN audit.key_acts.{column} IS '{quoted}'")


def downgrade() -> None:
    """Refuse."""
    raise NotImplementedError("there is no way back: see what the revision says of undoing it")
