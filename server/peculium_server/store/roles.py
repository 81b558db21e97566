"""The two roles that a ledger is used by: each may do what it has to, and nothing more.

They are groups that nobody logs in as: logins are their members (docs/operating/roles.md). Roles belong
to all databases of a PostgreSQL, so they may be there already, for another ledger too; what they may do
is said in each database by itself. Each `peculium migrate` says it again, so that it is true of the
newest tables, of a ledger that was restored elsewhere, and of roles that somebody else has made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psycopg
from sqlalchemy import Connection, Table, text
from sqlalchemy.exc import DBAPIError

from peculium_server.store import rows
from peculium_server.store.alerts import RULE_CHANGES, Progress
from peculium_server.store.schema import (
    alert_progress,
    alert_rules,
    alerts,
    budgets,
    checkpoint_keys,
    checkpoint_leaves,
    checkpoints,
    collections,
    entries,
    holds,
    incarnations,
    key_acts,
    lanes,
    ledger,
    refusals,
    roots,
    security_events,
    webhook_deliveries,
    webhooks,
)

SERVER = "peculium_server"
"""Serves: adds entries, which it can neither change nor take away, and keeps the rows beside them."""

AUDITOR = "peculium_auditor"
"""Reads the views of the schema `audit`, and no table."""

ROLES = (SERVER, AUDITOR)


def _update(columns: Sequence[str]) -> str:
    return f"UPDATE ({', '.join(columns)})"


_DELETED = ("deleted_at", "deleted_by")
_TRIED = ("state", "attempts", "next_at", "last_at", "last_status", "last_problem")

SERVER_MAY: dict[Table, tuple[str, ...]] = {
    ledger: ("SELECT",),
    incarnations: ("SELECT", "INSERT"),
    lanes: ("SELECT", _update(("position",))),
    roots: ("SELECT", "INSERT"),
    budgets: ("SELECT", "INSERT", _update(rows.BUDGET_CHANGES)),
    holds: ("SELECT", "INSERT", _update(rows.HOLD_CHANGES)),
    entries: ("SELECT", "INSERT"),
    collections: ("SELECT", "INSERT", "DELETE"),
    checkpoints: ("SELECT", "INSERT"),
    checkpoint_leaves: ("SELECT", "INSERT"),
    checkpoint_keys: ("SELECT", "INSERT"),
    key_acts: ("SELECT", "INSERT"),
    refusals: ("SELECT", "INSERT", _update(("number",)), "DELETE"),
    security_events: ("SELECT", "INSERT"),
    alert_progress: ("SELECT", _update(Progress._fields)),
    alert_rules: ("SELECT", "INSERT", "DELETE", _update((*RULE_CHANGES, *_DELETED))),
    alerts: ("SELECT", "INSERT", "DELETE"),
    webhooks: ("SELECT", "INSERT", "DELETE", _update(_DELETED)),
    webhook_deliveries: ("SELECT", "INSERT", "DELETE", _update(_TRIED)),
}
"""What the statements of the store do, table by table. Of a partitioned table this covers its partitions,
as long as they are reached through it."""

_LOCK = text(f"SELECT pg_advisory_xact_lock({0x70656372})")
"""Of two who grant at once the second waits: PostgreSQL would refuse one of them."""

_FOUND = text("SELECT rolname FROM pg_roles WHERE rolname = ANY (:names)")
_SCHEMA = text(
    "SELECT quote_ident(nspname) FROM pg_namespace"
    " WHERE oid = (SELECT relnamespace FROM pg_class WHERE oid = 'entries'::regclass)"
)


def provide(connection: Connection) -> tuple[str, ...]:
    """Make the roles that are missing, if that is allowed, and grant what all of them need.

    Returns:
        The roles that are missing still, because whoever migrates may not make any.
    """
    with connection.begin():
        connection.execute(_LOCK)
        found = {name for (name,) in connection.execute(_FOUND, {"names": list(ROLES)})}
        there = [name for name in ROLES if name in found or _made(connection, name)]
        schema = connection.execute(_SCHEMA).scalar_one()
        for role in there:
            for grant in _grants(role, schema):
                connection.execute(text(grant))
    return tuple(name for name in ROLES if name not in there)


def _made(connection: Connection, name: str) -> bool:
    """Make a role; say whether it is there then."""
    try:
        with connection.begin_nested():
            connection.execute(text(f"CREATE ROLE {name} NOLOGIN"))
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            return False
        # Another ledger's migration was quicker.
        if not isinstance(
            error.orig, psycopg.errors.DuplicateObject | psycopg.errors.UniqueViolation
        ):
            raise
    return True


def _grants(role: str, schema: str) -> Iterator[str]:
    if role == AUDITOR:
        yield f"GRANT USAGE ON SCHEMA audit TO {role}"
        yield f"GRANT SELECT ON ALL TABLES IN SCHEMA audit TO {role}"
        yield f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA audit TO {role}"
        return
    yield f"GRANT USAGE ON SCHEMA {schema} TO {role}"
    yield f"GRANT SELECT ON alembic_version TO {role}"
    for table, rights in SERVER_MAY.items():
        yield f"GRANT {', '.join(rights)} ON {table.name} TO {role}"
