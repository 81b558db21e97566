"""Connections to the ledger's database: always to a primary, with settings of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus

from peculium_server.store.errors import LedgerCorrupt, StoreUnavailable
from peculium_server.store.statements import LEDGER
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
    return await _connect(dsn, incarnation, _WRITER_SETTINGS, _WRITER_SETTINGS_POSTGRES)


async def connect_reader(dsn: str, incarnation: bytes | None) -> Connection:
    """A connection for reads, to a ledger, or to whichever is there.

    Raises:
        psycopg.Error: It cannot be had.
        LedgerCorrupt: There is another ledger now.
    """
    return await _connect(dsn, incarnation, _READER_SETTINGS, {})


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

    def __init__(self, dsn: str, incarnation: bytes) -> None:
        self._connecting = Connecting(lambda: connect_reader(dsn, incarnation))
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

    def __init__(self, dsn: str, incarnation: bytes, size: int) -> None:
        self._readers = [_Reader(dsn, incarnation) for _ in range(size)]
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
            LedgerCorrupt: There is another ledger now.
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

    async def close(self) -> None:
        """Close all of them, in use or not."""
        for reader in self._readers:
            await reader.close()


async def _connect(
    dsn: str,
    incarnation: bytes | None,
    settings: Mapping[str, str],
    settings_postgres: Mapping[str, str],
) -> Connection:
    connection = await Connection.connect(conninfo(dsn), autocommit=True)
    try:
        wanted = {**settings, **(settings_postgres if is_postgres(connection) else {})}
        await connection.fetch(Step(Statement(b"settings", _settings_as_sql(wanted))))
        if incarnation is not None:
            await _check_same_ledger(connection, incarnation)
    except BaseException:
        connection.pgconn.finish()
        raise
    return connection


async def _check_same_ledger(connection: Connection, incarnation: bytes) -> None:
    if [ledger.incarnation for ledger in await connection.fetch(Step(LEDGER))] != [incarnation]:
        raise LedgerCorrupt("the database holds another ledger than the one that was opened")


def _settings_as_sql(settings: Mapping[str, str]) -> bytes:
    # A single statement, whose answer is waited for no longer than any other's.
    set_all = (f"set_config('{name}', '{value}', false)" for name, value in settings.items())
    return f"SELECT {', '.join(set_all)}".encode()
