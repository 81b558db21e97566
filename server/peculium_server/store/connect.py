"""Connections to the ledger's database: always to a primary, with settings of their own."""

from __future__ import annotations

from collections.abc import Mapping

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.statements import LEDGER
from peculium_server.store.wire import Connection, Step

_DEFAULTS = {
    "application_name": "peculium",
    "connect_timeout": "5",
    # A peer that is gone without a word is noticed after about ten seconds.
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
_FIXED = {
    "client_encoding": "utf8",
    # Never a standby: what it answers may be old, and it accepts no writes.
    "target_session_attrs": "read-write",
}

LOCK_WAIT_MS = 100
"""How long a writer waits for the lane's advisory lock, or for another's uncommitted row."""

_WRITER_SETTINGS = {
    "statement_timeout": "10s",
    "lock_timeout": f"{LOCK_WAIT_MS}ms",
    # Of a server that vanished in the middle, so that its lane does not wait for it for long.
    "idle_in_transaction_session_timeout": "5s",
}
_WRITER_SETTINGS_POSTGRES = {
    # Every statement looks rows up by their whole key. A plan that scans would lock whole tables
    # against other writers (SSI), and one that was made for an empty table would be kept.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_material": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}


def conninfo(dsn: str) -> str:
    """The connection string to use for what an operator configured.

    Raises:
        psycopg.ProgrammingError: It is not a connection string.
    """
    given = {name: str(value) for name, value in conninfo_to_dict(dsn).items() if value is not None}
    return make_conninfo("", **{**_DEFAULTS, **given, **_FIXED})


def is_postgres(connection: Connection) -> bool:
    """The one switch for what only PostgreSQL has: without it everything is slower, nothing wrong."""
    return connection.pgconn.parameter_status(b"crdb_version") is None


async def connect_writer(dsn: str, incarnation: bytes) -> Connection:
    """A connection for one lane of a ledger.

    Raises:
        psycopg.Error: It cannot be had.
        LedgerCorrupt: There is another ledger now.
    """
    connection = await Connection.connect(conninfo(dsn), autocommit=True)
    try:
        settings = dict(_WRITER_SETTINGS)
        if is_postgres(connection):
            settings |= _WRITER_SETTINGS_POSTGRES
        await connection.execute(_settings_as_sql(settings))
        await _check_same_ledger(connection, incarnation)
    except BaseException:
        connection.pgconn.finish()
        raise
    return connection


async def _check_same_ledger(connection: Connection, incarnation: bytes) -> None:
    if [ledger.incarnation for ledger in await connection.fetch(Step(LEDGER))] != [incarnation]:
        raise LedgerCorrupt("the database holds another ledger than the one that was opened")


def _settings_as_sql(settings: Mapping[str, str]) -> bytes:
    return ";".join(f"SET {name} = '{value}'" for name, value in settings.items()).encode()
