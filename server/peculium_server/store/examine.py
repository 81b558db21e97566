"""What an operator should know of a ledger's database: looked at, and never changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from enum import StrEnum
from typing import Final, NamedTuple

import psycopg
from psycopg.rows import TupleRow

from peculium_server.core.limits import SECOND_US
from peculium_server.core.refusals import time_text
from peculium_server.store import incarnations, migrate, reads, roles
from peculium_server.store.connect import connect_reader, is_postgres
from peculium_server.store.errors import (
    SchemaOutdated,
    ServerOutdated,
    StoreError,
    translate,
)
from peculium_server.store.reading import fetch_together
from peculium_server.store.seals import unsealed
from peculium_server.store.statements import LEDGER
from peculium_server.store.wire import Connection, Step

VERSION_MIN: Final = 150_000
CLOCK_SECONDS_WARNED: Final = 1.0
CLOCK_SECONDS_MAX: Final = 60.0
"""Operations whose ids are made by a clock that is ten minutes off are refused: that is far from it."""
SWEEP_LAG_SECONDS_MAX: Final = 60.0
SEAL_LAG_SECONDS_MAX: Final = 600.0

ROLES_PAGE: Final = "see docs/operating/roles.md"
RESTORE_PAGE: Final = "see docs/operating/restore.md"


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """It works, and something is missing that it should have."""
    FAILED = "failed"
    """It does not work, or what was promised does not hold."""


class Finding(NamedTuple):
    """What became of one check."""

    check: str
    level: Level
    said: str
    remedy: str = ""
    """What to do; empty if nothing is to be done."""


Check = Callable[[Connection], Awaitable[Finding]]


async def examine(dsn: str, *, embedded: bool = False) -> AsyncIterator[Finding]:
    """Look at a ledger's database, as the user that a server connects as.

    Args:
        dsn: Its connection string.
        embedded: It is the server's own, which is used as its superuser.
    """
    try:
        connection = await connect_reader(dsn, None)
    except psycopg.Error as error:
        yield Finding(
            "database",
            Level.FAILED,
            str(translate(error)),
            "check its address, password and firewall, and that it is a primary; the log has more",
        )
        return
    async with connection:
        yield await _database(connection)
        schema = await asyncio.to_thread(_schema, dsn)
        yield schema
        checks: list[Check] = [_clock, _encryption]
        if is_postgres(connection):
            checks += [_settings, _replication]
        if schema.level is not Level.FAILED:
            checks += [_incarnation, _sweeping, _sealing]
            if is_postgres(connection) and not embedded:
                checks.append(_rights)
        for check in checks:
            yield await _found(check, connection)


async def _found(check: Check, connection: Connection) -> Finding:
    """What a check has found; that it could not look is a finding, too."""
    try:
        return await check(connection)
    except (psycopg.Error, StoreError) as error:
        failure = translate(error) if isinstance(error, psycopg.Error) else error
        name = check.__name__.removeprefix("_")
        return Finding(name, Level.FAILED, str(failure), ROLES_PAGE)


async def _row(connection: Connection, sql: str) -> TupleRow:
    cursor = await connection.execute(sql.encode())
    row = await cursor.fetchone()
    assert row is not None  # noqa: S101 - these statements have one
    return row


async def _database(connection: Connection) -> Finding:
    version, shown, user, name = await _row(
        connection,
        "SELECT current_setting('server_version_num')::int, current_setting('server_version'),"
        " current_user::text, current_database()::text",
    )
    said = f"{name!r} of PostgreSQL {shown}, as {user!r}"
    if version < VERSION_MIN:
        return Finding("database", Level.FAILED, said, "use PostgreSQL 15 or newer")
    return Finding("database", Level.OK, said)


def _schema(dsn: str) -> Finding:
    try:
        found = migrate.check(dsn)
    except SchemaOutdated as error:
        return Finding("schema", Level.FAILED, str(error), "run peculium migrate as its owner")
    except ServerOutdated as error:
        return Finding("schema", Level.FAILED, str(error), "install a newer version")
    except StoreError as error:
        return Finding("schema", Level.FAILED, str(error), ROLES_PAGE)
    if found != migrate.head():
        said = f"at {found}, newer than this version's {migrate.head()}, which may serve it"
        remedy = "replace the servers by the newer version: see docs/operating/upgrades.md"
        return Finding("schema", Level.WARNING, said, remedy)
    return Finding("schema", Level.OK, f"at {found}, this version's")


async def _settings(connection: Connection) -> Finding:
    cursor = await connection.execute(
        "SELECT name FROM pg_settings WHERE setting = 'off'"
        " AND name IN ('fsync', 'full_page_writes', 'synchronous_commit') ORDER BY name"
    )
    off = [name for (name,) in await cursor.fetchall()]
    if off:
        remedy = "; ".join(f"ALTER SYSTEM SET {name} = on" for name in off)
        said = f"{', '.join(off)} off: a crash may lose what was acknowledged"
        return Finding("settings", Level.FAILED, said, f"{remedy}; SELECT pg_reload_conf()")
    return Finding("settings", Level.OK, "what is committed survives a crash")


async def _replication(connection: Connection) -> Finding:
    names, commit, followers = await _row(
        connection,
        "SELECT current_setting('synchronous_standby_names'), current_setting('synchronous_commit'),"
        " (SELECT count(*) FROM pg_stat_replication)",
    )
    if names and commit not in ("on", "remote_write", "remote_apply"):
        return Finding(
            "replication",
            Level.WARNING,
            f"synchronous_commit is {commit}: commits do not wait for {names}",
            "ALTER SYSTEM SET synchronous_commit = on, or let no standby take over",
        )
    if followers and not names:
        return Finding(
            "replication",
            Level.WARNING,
            f"asynchronous, to {followers}: if one of them takes over, what was acknowledged last is"
            " forgotten, and can be spent again",
            "set synchronous_standby_names, or let none of them take over by itself: see"
            " docs/operating/restore.md",
        )
    if names and not followers:
        return Finding(
            "replication",
            Level.WARNING,
            f"commits wait for {names}, and nobody follows: calls do not end",
            "start the standby, or take it off synchronous_standby_names",
        )
    said = f"commits wait for {names}" if names else "no standby follows"
    return Finding("replication", Level.OK, said)


async def _clock(connection: Connection) -> Finding:
    before = time.time()  # noqa: TID251 - this machine's clock is what is looked at
    (told,) = await _row(
        connection, "SELECT extract(epoch FROM clock_timestamp())::double precision"
    )
    after = time.time()  # noqa: TID251 - as above
    # What lies between asking and hearing may all be on one side.
    off = max(0.0, before - told, told - after)
    said = f"the database's and this machine's are {off:.1f} s apart"
    remedy = "let both machines keep their clocks by NTP"
    if off > CLOCK_SECONDS_MAX:
        return Finding("clock", Level.FAILED, said, remedy)
    if off > CLOCK_SECONDS_WARNED:
        return Finding("clock", Level.WARNING, said, remedy)
    return Finding("clock", Level.OK, said)


async def _encryption(connection: Connection) -> Finding:
    pgconn = connection.pgconn
    host = connection.info.host
    if pgconn.ssl_in_use:
        return Finding("encryption", Level.OK, "the connection to the database is encrypted")
    if host.startswith("/") or connection.info.hostaddr in ("127.0.0.1", "::1"):
        return Finding("encryption", Level.OK, "the database is on this machine")
    return Finding(
        "encryption",
        Level.WARNING,
        f"the connection to {host} is not encrypted",
        "add sslmode=verify-full and sslrootcert to the connection string",
    )


async def _incarnation(connection: Connection) -> Finding:
    state = await incarnations.read_state(connection, postgres=is_postgres(connection))
    if state.frozen:
        return Finding(
            "incarnation",
            Level.FAILED,
            f"restored, or copied, and frozen since {time_text(state.at)}: {state.reason}",
            f"reconcile, then run peculium restored: {RESTORE_PAGE}",
        )
    differences = state.recorded.differences(state.found)
    # Of a copy in which nothing was recorded the next server makes a ledger of its own.
    if differences and any(state.positions):
        return Finding(
            "incarnation",
            Level.FAILED,
            f"{'; '.join(differences)}: the next server that starts freezes the ledger",
            f"if it was restored, reconcile, then run peculium restored: {RESTORE_PAGE}",
        )
    said = f"{state.incarnation.hex()}, {state.event} at {time_text(state.at)}"
    return Finding("incarnation", Level.OK, said)


async def _rights(connection: Connection) -> Finding:
    missing = []
    for table, rights in roles.SERVER_MAY.items():
        for right, column in _each(rights):
            name = "has_table_privilege" if column is None else "has_column_privilege"
            on = f"'{table.name}'" if column is None else f"'{table.name}', '{column}'"
            (granted,) = await _row(connection, f"SELECT {name}({on}, '{right}')")
            if not granted:
                missing.append(f"{right} on {table.name}{'' if column is None else f'.{column}'}")
    if missing:
        return Finding(
            "rights",
            Level.FAILED,
            f"this user lacks {', '.join(missing)}",
            f"run peculium migrate, and make the user a member of {roles.SERVER}: {ROLES_PAGE}",
        )
    (rewrites,) = await _row(
        connection,
        "SELECT has_table_privilege('entries', 'UPDATE') OR has_table_privilege('entries', 'DELETE')",
    )
    if rewrites:
        return Finding(
            "rights",
            Level.WARNING,
            "this user may change and remove entries: a server that is broken into could rewrite history",
            f"serve as a member of {roles.SERVER}: {ROLES_PAGE}",
        )
    return Finding("rights", Level.OK, "this user may do what serving needs, and rewrite nothing")


def _each(rights: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """Each right by itself, with the column that it is on, if it is on one."""
    for right in rights:
        verb, _, columns = right.partition(" ")
        if not columns:
            yield verb, None
        for column in columns.strip("()").split(", ") if columns else ():
            yield verb, column


async def _sweeping(connection: Connection) -> Finding:
    [ledger] = await connection.fetch(Step(LEDGER))
    due = reads.STATEMENTS["earliest_due"]
    found = await fetch_together(
        connection, *(Step(due, {"lane": lane}) for lane in range(ledger.lanes))
    )
    late = 0.0
    for [(now, *instants, _)] in found:
        for instant in instants:
            late = late if instant is None else max(late, (now - instant) / SECOND_US)
    if late > SWEEP_LAG_SECONDS_MAX:
        return Finding(
            "sweeping",
            Level.WARNING,
            f"what is due has waited for {late:.0f} s: holds do not lapse, leases do not end",
            "let a server run with sweep_seconds above 0, and look at its log",
        )
    return Finding("sweeping", Level.OK, "nothing that is due waits")


async def _sealing(connection: Connection) -> Finding:
    [ledger] = await connection.fetch(Step(LEDGER))
    found = await unsealed(connection, ledger.lanes)
    waiting = sum(found.waiting)
    remedy = "let a server run with a signing_key_file: see docs/operating/checkpoints.md"
    if found.last is None and waiting:
        return Finding("sealing", Level.WARNING, "nothing was ever sealed", remedy)
    lag = 0.0 if found.since is None else (found.now - found.since) / SECOND_US
    if lag > SEAL_LAG_SECONDS_MAX:
        said = f"{waiting:,} operations are not sealed, the earliest for {lag:.0f} s"
        return Finding("sealing", Level.WARNING, said, remedy)
    return Finding("sealing", Level.OK, f"{waiting:,} operations are not sealed yet")
