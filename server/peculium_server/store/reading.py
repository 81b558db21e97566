"""How everything is read that is outside of the lanes' transactions, and the little that is written there."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import psycopg
from psycopg import AsyncRawCursor

from peculium_server.store.connect import Readers
from peculium_server.store.errors import translate
from peculium_server.store.wire import Connection, Result, Statement, Step

BEGIN: Final = Step(Statement(b"begin", b"BEGIN ISOLATION LEVEL SERIALIZABLE"))
COMMIT: Final = Step(Statement(b"commit", b"COMMIT"))
ROLLBACK: Final = Step(Statement(b"rollback", b"ROLLBACK"))

_STREAM_ROWS: Final = 1_000
"""Rows that are fetched at once: memory stays bounded, and other calls get their turn in between."""


@contextlib.asynccontextmanager
async def reading(readers: Readers) -> AsyncIterator[Connection]:
    """A connection for the time of the block.

    Raises:
        StoreError: What fails in the block, as the store's error.
    """
    try:
        async with readers.connection() as connection:
            yield connection
    except psycopg.Error as error:
        raise translate(error) from error


async def fetch_together(connection: Connection, *steps: Step) -> list[Result]:
    """The rows of each of some statements that are sent together: outside of one, a transaction.

    Raises:
        psycopg.Error: One failed.
    """
    (flown,) = await connection.fly(steps)
    if isinstance(flown, psycopg.Error):
        raise flown
    return flown


async def stream(connection: Connection, statement: Statement, *values: Any) -> AsyncIterator[Any]:
    """The rows of a statement that may have many. Values are psycopg's, in the statement's order.

    Raises:
        psycopg.Error: It failed.
    """
    cursor = AsyncRawCursor(connection)
    async for row in cursor.stream(statement.sql, values, binary=True, size=_STREAM_ROWS):
        yield statement.row(row)
