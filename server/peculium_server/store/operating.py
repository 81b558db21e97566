"""What operators do with the database itself, beside any server: as the owner of its tables."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import NamedTuple

import psycopg

from peculium_server.store import incarnations
from peculium_server.store.connect import connect_reader, is_postgres
from peculium_server.store.errors import translate
from peculium_server.store.incarnations import State
from peculium_server.store.wire import Connection


class Restored(NamedTuple):
    """A ledger that may go on."""

    before: State
    """As it was found."""
    after: State


async def restored(dsn: str, *, principal: str, reason: str, nothing_lost: bool) -> Restored:
    """Let a ledger that was restored go on; see `incarnations.confirm`.

    Raises:
        StoreError: The database cannot be used, or nothing was changed in it.
    """
    async with _connected(dsn) as connection:
        postgres = is_postgres(connection)
        before = await incarnations.read_state(connection, postgres=postgres)
        after = await incarnations.confirm(
            connection,
            principal=principal,
            reason=reason,
            nothing_lost=nothing_lost,
            postgres=postgres,
        )
    return Restored(before, after)


@contextlib.asynccontextmanager
async def _connected(dsn: str) -> AsyncIterator[Connection]:
    try:
        connection = await connect_reader(dsn, None)
        try:
            yield connection
        finally:
            await connection.close()
    except psycopg.Error as error:
        raise translate(error) from error
