"""Runs the revisions on the connection that `peculium_server.store.migrate` hands over.

All revisions of a run are one transaction: it ends at the newest schema or where it began. A step
waits a short while for its locks, and fails rather than hold up a ledger that is in use.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, text

LOCK_TIMEOUT = "5s"
MIGRATION_LOCK = 0x7065636D
"""Advisory: of two who migrate at once, the second waits, and finds everything done."""


def run() -> None:
    """Run what alembic was asked for."""
    connection: Connection = context.config.attributes["connection"]
    with connection.begin():
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
        context.configure(connection=connection)
        context.run_migrations()


run()
