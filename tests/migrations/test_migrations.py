"""Migrations: they lead to the schema that the code is written for, once, and never back."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import create_engine

from peculium_server.core.encoding import ENCODING_VERSION
from peculium_server.store import migrate, schema
from peculium_server.store.errors import StoreError, StoreUnavailable

ROOT = Path(__file__).parents[2]
PARTITIONED = ("lanes", "budgets", "holds", "entries", "collections", "checkpoint_leaves")

CATALOG = """
    SELECT 'column', c.relname, a.attname,
        format('%%s %%s %%s %%s %%s', a.attnum, format_type(a.atttypid, a.atttypmod), a.attnotnull,
            a.attcollation::regcollation, pg_get_expr(d.adbin, d.adrelid))
    FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relname = ANY (%(tables)s) AND c.relkind IN ('r', 'p')
    UNION ALL
    SELECT 'constraint', c.relname, k.conname, pg_get_constraintdef(k.oid)
    FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
    WHERE c.relname = ANY (%(tables)s) AND k.contype <> 'n'
    UNION ALL
    SELECT 'index', c.relname, i.indexrelid::regclass::text,
        replace(pg_get_indexdef(i.indexrelid), ' ON ONLY ', ' ON ')
    FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
    WHERE c.relname = ANY (%(tables)s)
    ORDER BY 1, 2, 3
"""


def catalog(dsn: str) -> list[tuple[str, str, str, str]]:
    """What Postgres says of the ledger's tables, their partitions aside."""
    with psycopg.connect(dsn) as connection:
        tables = [table.name for table in schema.metadata.sorted_tables]
        found = connection.execute(CATALOG, {"tables": tables}).fetchall()
    return [(kind, table, name, text) for kind, table, name, text in found]


@pytest.fixture
def scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(migrate._config())


def test_an_empty_database_becomes_what_the_code_is_written_for(
    empty_database: str, database: str
) -> None:
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(empty_database))
    with engine.begin() as connection:
        schema.metadata.create_all(connection)
    engine.dispose()
    wanted = catalog(empty_database)
    assert {kind for kind, *_ in wanted} == {"column", "constraint", "index"}
    assert catalog(database) == wanted


def test_each_lane_has_a_partition_of_each_table_with_all_its_indexes(database: str) -> None:
    with psycopg.connect(database) as connection:
        for table in PARTITIONED:
            partitions = connection.execute(
                "SELECT c.relname, pg_get_expr(c.relpartbound, c.oid),"
                " (SELECT count(*) FROM pg_index WHERE indrelid = c.oid),"
                " (SELECT count(*) FROM pg_index WHERE indrelid = i.inhparent)"
                " FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
                " WHERE i.inhparent = %s::regclass ORDER BY 1",
                [table],
            ).fetchall()
            assert [(name, bound) for name, bound, *_ in partitions] == [
                (f"{table}_{lane:02}", f"FOR VALUES IN ('{lane}')") for lane in range(schema.LANES)
            ]
            assert all(indexes == wanted for *_, indexes, wanted in partitions)


def test_a_new_ledger_is_empty_and_has_all_its_lanes(database: str) -> None:
    with psycopg.connect(database) as connection:
        for table in ("roots", "budgets", "holds", "entries"):
            query = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))
            assert connection.execute(query).fetchone() == (0,)
        positions = connection.execute("SELECT lane, position FROM lanes ORDER BY lane").fetchall()
        assert positions == [(lane, 0) for lane in range(schema.LANES)]
        ledger = connection.execute("SELECT lanes, encoding_version FROM ledger").fetchall()
        assert ledger == [(schema.LANES, ENCODING_VERSION)]


def test_every_ledger_has_an_incarnation_of_its_own(database: str, empty_database: str) -> None:
    migrate.upgrade(empty_database)
    incarnations = set()
    for dsn in (database, empty_database):
        with psycopg.connect(dsn) as connection:
            incarnations.update(connection.execute("SELECT incarnation FROM ledger").fetchall())
    assert len(incarnations) == 2


def test_what_is_current_is_told_before_and_after(empty_database: str) -> None:
    assert migrate.current(empty_database) is None
    migrate.upgrade(empty_database)
    assert migrate.current(empty_database) == migrate.head()


def test_migrating_twice_changes_nothing(empty_database: str) -> None:
    migrate.upgrade(empty_database)
    with psycopg.connect(empty_database) as connection:
        before = connection.execute("SELECT * FROM ledger").fetchall()
    migrate.upgrade(empty_database)
    with psycopg.connect(empty_database) as connection:
        assert connection.execute("SELECT * FROM ledger").fetchall() == before


def test_a_migration_that_fails_leaves_nothing_behind(empty_database: str) -> None:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("CREATE TABLE entries (mine int)")
    with pytest.raises(StoreError):
        migrate.upgrade(empty_database)
    assert migrate.current(empty_database) is None
    with psycopg.connect(empty_database) as connection:
        found = connection.execute(
            "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p')"
            " AND relnamespace = 'public'::regnamespace"
        ).fetchall()
    assert found == [("entries",)]


def test_a_database_that_cannot_be_reached_is_told_so() -> None:
    with pytest.raises(StoreUnavailable):
        migrate.upgrade("host=127.0.0.1 port=1 dbname=none")


def test_there_is_one_way_forward(scripts: ScriptDirectory) -> None:
    assert len(scripts.get_heads()) == len(scripts.get_bases()) == 1


def test_there_is_no_way_back(database: str) -> None:
    config = migrate._config()
    with migrate._connected(database) as connection:
        config.attributes["connection"] = connection
        with pytest.raises(NotImplementedError, match="no way back"):
            command.downgrade(config, "base")
    assert migrate.current(database) == migrate.head()


def _revisions() -> Iterator[tuple[str, str]]:
    versions = importlib.resources.files("peculium_migrations") / "versions"
    for file in versions.iterdir():
        if file.name.endswith(".py"):
            yield file.name, file.read_text()


@pytest.mark.parametrize(("name", "text"), sorted(_revisions()))
def test_a_revision_says_what_operators_have_to_know(
    name: str, text: str, scripts: ScriptDirectory
) -> None:
    assert re.fullmatch(r"\d{4}_(expand|contract)_[a-z_]+\.py", name)
    assert f'revision = "{name[:4]}"' in text
    header = text.split('"""')[1]
    for said in ("\nWhy: ", "\nLocks: ", "\nDuration: ", "\nUndo: "):
        assert said in header


def test_migrating_says_which_servers_may_go_on(empty_database: str) -> None:
    migrate.upgrade(empty_database)
    with psycopg.connect(empty_database) as connection:
        connection.execute("UPDATE ledger SET serves_from = '0000'")
    migrate.upgrade(empty_database)
    with psycopg.connect(empty_database) as connection:
        assert connection.execute("SELECT serves_from FROM ledger").fetchall() == [
            (schema.SERVES_FROM,)
        ]


def test_the_reference_names_every_table_column_and_index() -> None:
    reference = (ROOT / "docs" / "reference" / "schema.md").read_text(encoding="utf-8")
    said = set(re.findall(r"`([^`]+)`", reference)) | set(re.findall(r"\*\*(\w+)\*\*", reference))
    for table in schema.metadata.sorted_tables:
        assert table.name in said
        for index in table.indexes:
            assert index.name in said
        if table.name in PARTITIONED[1:]:
            keys = {"lane", "root_id", "budget_id", "hold_id"}
            assert {column.name for column in table.columns} - keys - said == set()
