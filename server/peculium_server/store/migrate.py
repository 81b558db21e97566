"""Bringing a database to this version's schema. A step of its own: serving never migrates."""

from __future__ import annotations

import contextlib
import importlib.resources
from collections.abc import Iterator

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from peculium_server.store import roles
from peculium_server.store.connect import conninfo
from peculium_server.store.errors import SchemaOutdated, ServerOutdated, translate
from peculium_server.store.schema import SERVES_FROM, ledger


def upgrade(dsn: str) -> tuple[str, ...]:
    """Run all revisions that the database lacks, as one transaction, then grant the roles their rights.

    Returns:
        The roles that are missing, because whoever migrates may not make any (`store.roles`).

    Raises:
        StoreError: The database cannot be used or migrated; it is as it was.
    """
    with _connected(dsn) as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        with connection.begin():
            connection.execute(update(ledger).values(serves_from=SERVES_FROM))
        return roles.provide(connection)


def check(dsn: str) -> str:
    """Make sure that a server of this version may serve a database, and return its revision.

    It may be newer than this version's, if nothing was taken away that this version uses: so a database
    is migrated first, and its servers are replaced one after another.

    Raises:
        SchemaOutdated: It has no schema, or an older one.
        ServerOutdated: It has a schema that this version is too old for.
        StoreError: The database cannot be used.
    """
    with _connected(dsn) as connection:
        found = MigrationContext.configure(connection).get_current_revision()
        expected = head()
        # Revisions are numbers of four digits.
        if found is None or found < expected:
            raise SchemaOutdated(found, expected)
        if found > expected:
            serves_from = connection.execute(select(ledger.c.serves_from)).scalar_one()
            if expected < serves_from:
                raise ServerOutdated(found, serves_from, expected)
        return found


def current(dsn: str) -> str | None:
    """The revision that the database is at; None if it has no schema.

    Raises:
        StoreError: The database cannot be used.
    """
    with _connected(dsn) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def head() -> str:
    """The revision that this version was written for."""
    (revision,) = ScriptDirectory.from_config(_config()).get_heads()
    return revision


def _config() -> Config:
    config = Config()
    location = str(importlib.resources.files("peculium_migrations"))
    config.set_main_option("script_location", location.replace("%", "%%"))
    return config


@contextlib.contextmanager
def _connected(dsn: str) -> Iterator[Connection]:
    def connect() -> psycopg.Connection:
        return psycopg.connect(conninfo(dsn))

    engine = create_engine("postgresql+psycopg://", creator=connect, poolclass=NullPool)
    try:
        with engine.connect() as connection:
            yield connection
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.Error):
            raise translate(error.orig) from error
        raise
    finally:
        engine.dispose()
