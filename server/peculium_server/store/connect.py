"""Connections to the ledger's database: always to a primary, with settings of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus

from peculium_server.config import DATABASE_WANTED, ConfigInvalid
from peculium_server.store.errors import StoreUnavailable
from peculium_server.store.incarnations import Memory, check
from peculium_server.store.wire import Connection, Statement, Step

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

READER_WAIT_SECONDS_MAX = 5.0
"""How long a read waits for one of the connections that reads share."""

_READER_SETTINGS = {
    # Of a read whose caller has gone the database would not know.
    "statement_timeout": "10s",
    "lock_timeout": "1s",
}
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
    # What counts is how many rows are looked at, and locked: for a small table the planner would else
    # rather go through all of it, and keep to that when it has grown.
    "seq_page_cost": "0",
    "random_page_cost": "0",
    "cpu_tuple_cost": "1",
    "cpu_index_tuple_cost": "1",
    "jit": "off",
}


def conninfo(dsn: str) -> str:
    """The connection string to use for what an operator configured.

    Raises:
        ConfigInvalid: It is not a connection string.
    """
    given = _parsed(dsn)
    return make_conninfo("", **{**_DEFAULTS, **given, **_FIXED})


def named(dsn: str) -> str:
    """The database that a connection string names; nothing if it leaves that to others.

    Raises:
        ConfigInvalid: It is not a connection string.
    """
    return _parsed(dsn).get("dbname", "")


def _parsed(dsn: str) -> dict[str, str]:
    try:
        parsed = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        # Not what is wrong with it: libpq repeats a part, which may be one of the password.
        raise ConfigInvalid([f"the database's address {DATABASE_WANTED}"]) from None
    return {name: str(value) for name, value in parsed.items() if value is not None}


def is_postgres(connection: Connection) -> bool:
    """The one switch for what only PostgreSQL has: without it everything is slower, nothing wrong."""
    return connection.pgconn.parameter_status(b"crdb_version") is None


async def connect_writer(dsn: str, memory: Memory) -> Connection:
    """A connection for one lane of a ledger.

    Raises:
        psycopg.Error: It cannot be had.
        LedgerRestored: There is another incarnation of the ledger now.
    """
    return await _connect(dsn, memory, _WRITER_SETTINGS, _WRITER_SETTINGS_POSTGRES)


async def connect_reader(dsn: str, memory: Memory | None) -> Connection:
    """A connection for reads, to a ledger, or to whichever is there.

    Raises:
        psycopg.Error: It cannot be had.
        LedgerRestored: There is another incarnation of the ledger now.
    """
    return await _connect(dsn, memory, _READER_SETTINGS, {})


class Connecting:
    """Makes one connection at a time, and goes on when whoever waits for it is cancelled.

    Of several hosts the one that answers may be the last: an attempt that ended with its caller's
    deadline might never get there.
    """

    def __init__(self, connect: Callable[[], Coroutine[Any, Any, Connection]]) -> None:
        self._connect = connect
        self._attempt: asyncio.Task[Connection] | None = None

    async def connection(self) -> Connection:
        """A new connection, or the one that nobody waited for any more."""
        if self._attempt is None:
            self._attempt = asyncio.create_task(self._connect(), name="connect")
            self._attempt.add_done_callback(self._forget_failed)
        connection = await asyncio.shield(self._attempt)
        self._attempt = None
        return connection

    async def close(self) -> None:
        """End an attempt that nobody waits for."""
        if self._attempt is not None:
            self._attempt.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await self._attempt).pgconn.finish()

    def _forget_failed(self, attempt: asyncio.Task[Connection]) -> None:
        if attempt.cancelled() or attempt.exception() is not None:
            self._attempt = None


class _Reader:
    """Place for one connection."""

    def __init__(self, dsn: str, memory: Memory) -> None:
        self._connecting = Connecting(lambda: connect_reader(dsn, memory))
        self._connection: Connection | None = None

    async def connection(self) -> Connection:
        """A connection that works."""
        if self._connection is not None:
            # It may have been dead for long.
            with contextlib.suppress(psycopg.Error):
                await self._connection.fly([])
            self.keep_if_whole()
        if self._connection is None:
            self._connection = await self._connecting.connection()
        return self._connection

    def keep_if_whole(self) -> None:
        """Drop the connection if it is in the middle of something, or broken."""
        connection = self._connection
        if connection and connection.pgconn.transaction_status != TransactionStatus.IDLE:
            connection.pgconn.finish()
            self._connection = None

    async def close(self) -> None:
        await self._connecting.close()
        if self._connection is not None:
            await self._connection.close()


class Readers:
    """The connections for reads, each made when it is needed, and made again when it is lost."""

    def __init__(self, dsn: str, memory: Memory, size: int) -> None:
        self._readers = [_Reader(dsn, memory) for _ in range(size)]
        # The last one used is the next: the others may never be needed.
        self._free: asyncio.LifoQueue[_Reader] = asyncio.LifoQueue()
        for reader in self._readers:
            self._free.put_nowait(reader)

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection for the time of the block; dropped after an error, or unless it is idle.

        Raises:
            StoreUnavailable: Others use all of them.
            psycopg.Error: None can be had.
            LedgerRestored: There is another incarnation of the ledger now.
        """
        try:
            async with asyncio.timeout(READER_WAIT_SECONDS_MAX):
                reader = await self._free.get()
        except TimeoutError:
            raise StoreUnavailable("all connections for reads are in use") from None
        try:
            connection = await reader.connection()
            try:
                yield connection
            except psycopg.Error:
                # Prepared statements that a change of the schema has spoilt go with it.
                connection.pgconn.finish()
                raise
        finally:
            reader.keep_if_whole()
            self._free.put_nowait(reader)

    def use(self) -> tuple[int, int]:
        """How many are used, and how many are not."""
        idle = self._free.qsize()
        return len(self._readers) - idle, idle

    async def close(self) -> None:
        """Close all of them, in use or not."""
        for reader in self._readers:
            await reader.close()


async def _connect(
    dsn: str,
    memory: Memory | None,
    settings: Mapping[str, str],
    settings_postgres: Mapping[str, str],
) -> Connection:
    connection = await Connection.connect(conninfo(dsn), autocommit=True)
    try:
        postgres = is_postgres(connection)
        wanted = {**settings, **(settings_postgres if postgres else {})}
        await connection.fetch(Step(Statement(b"settings", _settings_as_sql(wanted))))
        if memory is not None:
            # The database may have been restored while there was none.
            await check(connection, memory, postgres=postgres)
    except BaseException:
        connection.pgconn.finish()
        raise
    return connection


def _settings_as_sql(settings: Mapping[str, str]) -> bytes:
    # A single statement, whose answer is waited for no longer than any other's.
    set_all = (f"set_config('{name}', '{value}', false)" for name, value in settings.items())
    return f"SELECT {', '.join(set_all)}".encode()
