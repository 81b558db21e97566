"""Which servers may serve this schema: those of this one, and of older ones from a certain one on.

Why: a server refuses a database that is not at its schema, so a release with an expansion could not be
migrated while servers of the release before go on. The ledger says which of these the schema still
suits (docs/operating/upgrades.md); `peculium migrate` writes it with each step.
Locks: ledger for an instant, to add a column with a constant default; servers read it when they connect.
Duration: well under a second; the ledger has one row.
Undo: ALTER TABLE ledger DROP COLUMN serves_from, and set alembic_version to 0007. `downgrade` refuses:
there is one way.

A server of the schema before that still runs is not disturbed; none of that version starts any more.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.execute("ALTER TABLE ledger ADD COLUMN serves_from text NOT NULL DEFAULT '0008'")


def downgrade() -> None:
    """Refuse."""
    raise NotImplementedError("there is no way back: see what the revision says of undoing it")
