"""The two roles: each may do what it has to, and nothing more."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Delete, Executable, Insert, SmallInteger, Table, Update, literal_column
from sqlalchemy.sql import visitors

from peculium_server import store as package
from peculium_server.cli import serving
from peculium_server.store import migrate, roles, statements
from peculium_server.store.schema import metadata
from peculium_server.store.store import Store
from tests.audit_sql.filling import fill
from tests.core.every_kind import lived
from tests.postgres import Server
from tests.server import StartServer

SERVED = {
    "ledger": {"SELECT"},
    "incarnations": {"SELECT", "INSERT"},
    "lanes": {"SELECT", "UPDATE position"},
    "roots": {"SELECT", "INSERT"},
    "budgets": {"SELECT", "INSERT"}
    | {
        f"UPDATE {column}"
        for column in (
            *("granted", "available", "held", "delegated", "spent", "forfeited", "overrun"),
            *("advanced", "disputed", "disputes", "holds_live", "version", "seq", "last_at"),
            *("lease_until", "lease_latest", "custody", "closed", "frozen", "token", "head"),
            "holder",
        )
    },
    "holds": {"SELECT", "INSERT"}
    | {
        f"UPDATE {column}"
        for column in ("token", "state", "remaining", "booked", "disputed", "expires_at")
    },
    "entries": {"SELECT", "INSERT"},
    "collections": {"SELECT", "INSERT", "DELETE"},
    "checkpoints": {"SELECT", "INSERT"},
    "checkpoint_leaves": {"SELECT", "INSERT"},
    "checkpoint_keys": {"SELECT", "INSERT"},
    "key_acts": {"SELECT", "INSERT"},
    "refusals": {"SELECT", "INSERT", "UPDATE number", "DELETE"},
    "security_events": {"SELECT", "INSERT"},
    "alert_progress": {"SELECT"}
    | {f"UPDATE {name}" for name in ("positions", "alerts", "changes", "looked_at", "more")},
    "alert_rules": {"SELECT", "INSERT", "DELETE"}
    | {f"UPDATE {column}" for column in ("armed", "due", "crossings", "deleted_at", "deleted_by")},
    "alerts": {"SELECT", "INSERT", "DELETE"},
    "webhooks": {"SELECT", "INSERT", "DELETE"}
    | {f"UPDATE {column}" for column in ("deleted_at", "deleted_by")},
    "webhook_deliveries": {"SELECT", "INSERT", "DELETE"}
    | {
        f"UPDATE {column}"
        for column in ("state", "attempts", "next_at", "last_at", "last_status", "last_problem")
    },
    "alembic_version": {"SELECT"},
}
"""What a server may do to each table; nothing else to these, and nothing to others."""

FORBIDDEN = (
    "CREATE TABLE mine ()",
    "CREATE TABLE audit.mine ()",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION mine() RETURNS int LANGUAGE sql RETURN 1",
    "CREATE VIEW audit.mine AS SELECT 1 AS one",
    "CREATE OR REPLACE VIEW audit.paths AS SELECT * FROM audit.paths",
    "CREATE OR REPLACE FUNCTION audit.fingerprint(token_id bytea) RETURNS text LANGUAGE sql RETURN ''",
    "ALTER TABLE entries DISABLE TRIGGER ALL",
    "ALTER TABLE entries DROP CONSTRAINT ck_entries_signed",
    "CREATE INDEX ON entries (at)",
    "CREATE RULE mine AS ON INSERT TO entries DO INSTEAD NOTHING",
    "CREATE TRIGGER mine BEFORE INSERT ON roots EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "ALTER VIEW audit.holds RENAME TO mine",
    "DROP VIEW audit.holds",
    "DROP TABLE entries",
    "CREATE ROLE mine",
    "GRANT peculium_server TO CURRENT_USER",
    "COPY entries TO PROGRAM 'cat'",
    "COPY entries TO '/tmp/mine'",
    "SET session_replication_role = replica",
    "LOCK TABLE entries IN ACCESS EXCLUSIVE MODE",
)


@pytest.fixture(scope="module")
def filled(postgres: Server) -> Iterator[str]:
    """A database with a ledger in it, by its owner's URL."""
    with postgres.fresh_database(postgres.migrated_template()) as dsn:
        fill(dsn, lived()[0])
        yield dsn


@contextmanager
def login(dsn: str, attributes: str) -> Iterator[str]:
    """The URL for a new login of the same database."""
    name, password = f"peculium_test_{secrets.token_hex(4)}", secrets.token_hex(8)
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}' {attributes}".encode())
        try:
            url = urlsplit(dsn)
            host = url.netloc.rpartition("@")[2]
            yield url._replace(netloc=f"{name}:{password}@{host}").geturl()
        finally:
            owner.execute(f"DROP OWNED BY {name}".encode())
            owner.execute(f"DROP ROLE {name}".encode())


@pytest.fixture(scope="module", params=roles.ROLES)
def session(filled: str, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection]:
    """A session of somebody who is a member of the role, and of nothing else."""
    with login(filled, f"IN ROLE {request.param}") as dsn, psycopg.connect(dsn) as connection:
        yield connection


def role_of(session: psycopg.Connection) -> str:
    query = "SELECT roleid::regrole::text FROM pg_auth_members WHERE member = current_user::regrole"
    ((role,),) = session.execute(query).fetchall()
    session.rollback()
    return str(role)


def allowed(session: psycopg.Connection, statement: str) -> bool:
    """Whether the right is there; whether more than that is wrong does not matter."""
    try:
        session.execute(statement.encode())
    except InsufficientPrivilege:
        return False
    except psycopg.IntegrityError:
        # Rights are looked at before rows are.
        return True
    finally:
        session.rollback()
    return True


def attempts(table: str, columns: list[str]) -> dict[str, str]:
    """A statement for each thing that can be done to a table."""
    return {
        "SELECT": f"SELECT * FROM {table}",
        "INSERT": f"INSERT INTO {table} DEFAULT VALUES",
        "DELETE": f"DELETE FROM {table} WHERE false",
        "TRUNCATE": f"TRUNCATE {table} CASCADE",
        **{
            f"UPDATE {name}": f"UPDATE {table} SET {name} = DEFAULT WHERE false" for name in columns
        },
    }


def relations(dsn: str, schema: str) -> dict[str, list[str]]:
    """Tables, partitions and views of a schema, with their columns."""
    with psycopg.connect(dsn) as connection:
        found = connection.execute(
            "SELECT c.relname, array_agg(a.attname::text) FROM pg_class c"
            " JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
            " WHERE c.relnamespace = %s::regnamespace AND c.relkind IN ('r', 'p', 'v')"
            " GROUP BY 1",
            [schema],
        ).fetchall()
    return dict(found)


def test_tables_allow_what_the_role_has_to_do_and_nothing_else(
    session: psycopg.Connection, filled: str
) -> None:
    may = SERVED if role_of(session) == roles.SERVER else {}
    tables = relations(filled, "public")
    assert tables.keys() > may.keys()
    assert tables.keys() >= {table.name for table in metadata.sorted_tables}
    for table, columns in tables.items():
        tried = attempts(table, columns)
        granted = {verb for verb, statement in tried.items() if allowed(session, statement)}
        assert granted == may.get(table, set()), table


def test_views_are_read_by_the_auditor_alone(session: psycopg.Connection, filled: str) -> None:
    may = {"SELECT"} if role_of(session) == roles.AUDITOR else set()
    views = relations(filled, "audit")
    assert len(views) > 5
    for view, columns in views.items():
        # Whoever may not write to a view is told that it cannot be written to, which is as good.
        granted = allowed(session, f"SELECT * FROM audit.{view}")
        assert granted is bool(may), view
        for verb, statement in attempts(f"audit.{view}", columns).items():
            if verb != "SELECT":
                with pytest.raises(psycopg.Error):
                    session.execute(statement.encode())
                session.rollback()


@pytest.mark.parametrize(
    "call", ["subtree('root-2')", "as_of('root-2', now())", "statement('root-2')"]
)
def test_functions_are_called_by_the_auditor_alone(session: psycopg.Connection, call: str) -> None:
    granted = role_of(session) == roles.AUDITOR
    assert allowed(session, f"SELECT * FROM audit.{call}") is granted


@pytest.mark.parametrize("statement", FORBIDDEN)
def test_nothing_can_be_made_or_altered(session: psycopg.Connection, statement: str) -> None:
    assert not allowed(session, statement)


def test_a_function_of_ones_own_sees_nothing_but_what_the_view_shows(filled: str) -> None:
    """A filter that is cheap is applied first: it must not be given what a view leaves out."""
    with login(filled, f"IN ROLE {roles.AUDITOR}") as dsn, psycopg.connect(dsn) as connection:
        connection.execute(
            "CREATE FUNCTION pg_temp.seen(value anyelement) RETURNS boolean LANGUAGE plpgsql COST 0.0001"
            " AS $$ BEGIN RAISE NOTICE '%', value; RETURN true; END $$"
        )
        noticed: list[str] = []
        connection.add_notice_handler(lambda notice: noticed.append(notice.message_primary or ""))
        connection.execute("SELECT 1 FROM audit.holds WHERE pg_temp.seen(holds)")
        connection.execute("SELECT 1 FROM audit.budgets WHERE pg_temp.seen(budgets)")
        connection.execute("SELECT 1 FROM audit.entries WHERE pg_temp.seen(request)")
    with psycopg.connect(filled) as owner:
        tokens = owner.execute(
            "SELECT encode(token, 'hex') FROM budgets WHERE token IS NOT NULL"
            " UNION SELECT encode(token, 'hex') FROM holds WHERE state IN (1, 2)"
        ).fetchall()
    assert len(noticed) > 20
    assert tokens
    assert not [line for line in noticed for (token,) in tokens if token in line]


# -- What is granted is what the statements need ----------------------------------------------------------


def _executables() -> Iterator[Executable]:
    yield statements._ledger()
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        for executable, _ in getattr(module, "RECIPES", {}).values():
            yield executable
    for recipe in statements.LANE_RECIPES.values():
        yield recipe.build(literal_column("0", SmallInteger))


def _name(change: Insert | Update | Delete) -> str:
    assert isinstance(change.table, Table)
    return change.table.name


def _changed_on_conflict(change: Insert) -> set[str]:
    """The columns that an insertion updates where there is a row already."""
    clause: Any = change._post_values_clause
    # None if the row that is there stays as it is, or there is no such clause.
    return {name for name, _ in getattr(clause, "update_values_to_set", ())}


def test_the_rights_of_a_server_are_those_that_its_statements_need() -> None:
    needed: dict[str, set[str]] = {}
    for executable in _executables():
        for element in visitors.iterate(executable):  # type: ignore[arg-type]
            if isinstance(element, Table):
                needed.setdefault(element.name, set()).add("SELECT")
            if isinstance(element, Insert):
                rights = needed.setdefault(_name(element), set())
                rights.add("INSERT")
                rights |= {f"UPDATE {name}" for name in _changed_on_conflict(element)}
            if isinstance(element, Delete):
                needed.setdefault(_name(element), set()).add("DELETE")
            if isinstance(element, Update):
                columns = {getattr(key, "name", key) for key in element._values or {}}
                needed.setdefault(_name(element), set()).update(
                    f"UPDATE {name}" for name in columns
                )
    # What the statements only write to is read by whoever verifies.
    for rights in needed.values():
        rights.add("SELECT")
    assert needed == {
        table: rights for table, rights in SERVED.items() if table != "alembic_version"
    }


async def test_a_member_of_the_role_serves(filled: str, start_server: StartServer) -> None:
    with login(filled, f"IN ROLE {roles.SERVER}") as dsn:
        server = await asyncio.to_thread(start_server, "--database-url", dsn)
        assert server.stop() == 0
        store = await Store.open(dsn)
        await store.probe()
        await store.close()


# -- Making the roles -------------------------------------------------------------------------------------


@pytest.fixture
def new_roles(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Names for the roles that nobody has yet."""
    server, auditor = names = tuple(
        f"peculium_test_{kind}_{secrets.token_hex(4)}" for kind in ("server", "auditor")
    )
    monkeypatch.setattr(roles, "SERVER", server)
    monkeypatch.setattr(roles, "AUDITOR", auditor)
    monkeypatch.setattr(roles, "ROLES", names)
    yield server, auditor
    with psycopg.connect(postgres.dsn, autocommit=True) as connection:
        for name in names:
            connection.execute(f"DROP ROLE IF EXISTS {name}".encode())


@pytest.fixture
def two_databases(new_roles: tuple[str, str], postgres: Server) -> Iterator[tuple[str, str]]:
    """Empty databases, gone before the roles are."""
    with postgres.fresh_database() as first, postgres.fresh_database() as second:
        yield first, second


def rights(dsn: str, role: str) -> set[tuple[str, str]]:
    with psycopg.connect(dsn) as connection:
        found = connection.execute(
            "SELECT table_name::text, privilege_type::text"
            " FROM information_schema.role_table_grants WHERE grantee = %s",
            [role],
        ).fetchall()
    return set(found)


def test_roles_are_made_once_for_all_ledgers_and_granted_in_each(
    two_databases: tuple[str, str], new_roles: tuple[str, str]
) -> None:
    server, auditor = new_roles
    for dsn in two_databases:
        assert migrate.upgrade(dsn) == ()
        assert ("entries", "INSERT") in rights(dsn, server)
        assert ("entries", "SELECT") in rights(dsn, auditor)
        before = rights(dsn, server), rights(dsn, auditor)
        assert migrate.upgrade(dsn) == ()
        assert (rights(dsn, server), rights(dsn, auditor)) == before


def test_whoever_may_not_make_roles_migrates_all_the_same_and_is_told(
    two_databases: tuple[str, str],
    new_roles: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    dsn, _ = two_databases
    name = urlsplit(dsn).path[1:]
    with login(dsn, "") as url:
        owner = urlsplit(url).username
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} OWNER TO {owner}".encode())
        serving.migrate(database_url=url)
        told = capsys.readouterr().err
        assert migrate.current(url) == migrate.head()
        statements_told = [line.strip() for line in told.splitlines() if "CREATE ROLE" in line]
        assert statements_told == [f"CREATE ROLE {role} NOLOGIN;" for role in new_roles]
        with psycopg.connect(dsn, autocommit=True) as connection:
            for statement in statements_told:
                connection.execute(statement.encode())
        serving.migrate(database_url=url)
        assert "CREATE ROLE" not in capsys.readouterr().err
        assert ("entries", "INSERT") in rights(dsn, new_roles[0])
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} OWNER TO CURRENT_USER".encode())


def test_another_ledgers_migration_may_make_the_roles_meanwhile(
    two_databases: tuple[str, str], new_roles: tuple[str, str]
) -> None:
    dsn, elsewhere = two_databases
    missing: list[tuple[str, ...]] = []
    with psycopg.connect(elsewhere) as other, psycopg.connect(elsewhere, autocommit=True) as watch:
        for name in new_roles:
            other.execute(f"CREATE ROLE {name}".encode())
        migrating = threading.Thread(target=lambda: missing.append(migrate.upgrade(dsn)))
        migrating.start()
        waiting = sql.SQL(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = {} AND wait_event_type = 'Lock'"
        ).format(sql.Literal(urlsplit(dsn).path[1:]))
        while watch.execute(waiting).fetchone() == (0,):
            assert migrating.is_alive()
        other.commit()
        migrating.join()
    assert missing == [()]
    assert ("entries", "INSERT") in rights(dsn, new_roles[0])
