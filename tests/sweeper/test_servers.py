"""Servers that sweep by themselves, seen from outside."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
from pathlib import Path

import psutil
import psycopg
import pytest
from psycopg import sql

import peculium
import peculium_migrations
from peculium import BudgetState
from peculium_server.embedded import EmbeddedPostgres
from peculium_server.store import migrate
from peculium_server.store.schema import metadata
from tests.server import RunningServer, StartServer
from tests.sweeper.fleet import Fleet, until

FIRST_TABLES = {"budgets", "entries", "holds", "lanes", "ledger", "roots"}
"""Those that the first migration makes."""

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
HOLDS = 2_000
STOP_SECONDS_MAX = 30


def complaints(server: RunningServer) -> list[str]:
    """What a server has logged."""
    return [line for line in server.said if re.search(r" (WARNING|ERROR|CRITICAL) ", line)]


async def test_a_hold_lapses_and_a_lease_ends_without_anybody_asking(
    running_server: RunningServer,
) -> None:
    """And the hold is settled late, after its budget was closed."""
    with peculium.connect(running_server.address) as client:
        client.admin.grant("acme", unit="calls", amount=1_000, holder="dev")
        acme = client.open("acme")
        [run] = acme.delegate([peculium.Child("run", 500, lease=2.0)])
        budget = client.accept(run.capability)
        hold = budget.reserve(100, ttl=1.0)

        async def ended() -> bool:
            info = client.audit.budget("acme/run")
            return info.state is BudgetState.CLOSED and info.balances.held == 0

        await until(ended)
        assert client.audit.budget("acme/run").balances.forfeited == 100
        assert acme.balances().available == 900
        receipt = hold.settle(40)
        assert receipt.balances.spent == 40
        assert acme.balances().available == 960
        kinds = [(entry.kind, entry.actor) for entry in client.audit.entries("acme/run")]
        assert ("LAPSE", "system") in kinds
        assert ("EXPIRE", "system") in kinds
        *_, verdict = client.audit.verify()
        assert verdict.verified
    assert complaints(running_server) == []


async def test_two_servers_lapse_thousands_of_holds_once_each_and_complain_of_nothing(
    start_server: StartServer, database: str
) -> None:
    """The holds became due while no server ran."""
    async with Fleet.opened(database) as fleet:
        roots = [await fleet.root() for _ in range(2)]
        for root in roots:
            await fleet.holds(root, HOLDS)
        await fleet.wait_until_due(2 * HOLDS)
        servers = await asyncio.gather(
            *(asyncio.to_thread(start_server, "--database-url", database) for _ in range(2))
        )
        await until(fleet.nothing_due)
        for root in roots:
            assert (await fleet.verified(root)).total() == 1 + HOLDS + HOLDS
            assert (await fleet.budget(root)).money.forfeited == HOLDS
    for server in servers:
        assert await asyncio.to_thread(server.stop) == 0
        assert complaints(server) == []


async def test_a_database_that_restarts_in_the_middle_is_swept_to_the_end(
    start_server: StartServer, own_postgres: Path
) -> None:
    postgres = await asyncio.to_thread(EmbeddedPostgres.start, own_postgres)
    await asyncio.to_thread(migrate.upgrade, postgres.dsn)
    async with Fleet.opened(postgres.dsn) as fleet:
        root = await fleet.root()
        [top] = await fleet.children(root, root, 1, 100_000)
        await fleet.children(root, top, HOLDS, 10)
        await fleet.holds(root, HOLDS)
        await fleet.wait_until_due(HOLDS)
        pending = (await fleet.revoke(root, top)).pending
        assert pending > 0
        server = await asyncio.to_thread(start_server, "--database-url", postgres.dsn)

        async def begun() -> bool:
            return await fleet.overdue() > 0

        await until(begun)
        os.kill(postgres.pid, signal.SIGQUIT)
        await asyncio.to_thread(psutil.Process(postgres.pid).wait, STOP_SECONDS_MAX)
        postgres = await asyncio.to_thread(EmbeddedPostgres.start, own_postgres)
    async with Fleet.opened(postgres.dsn) as fleet:
        assert await fleet.overdue() > 0
        await until(fleet.nothing_due)
        money = (await fleet.budget(root)).money
        assert (money.available, money.forfeited) == (1_000_000 - HOLDS, HOLDS)
        await fleet.verified(root)
    assert server.process.poll() is None
    assert await asyncio.to_thread(server.stop) == 0
    await asyncio.to_thread(postgres.stop)


def test_a_server_that_does_not_sweep_says_so(start_server: StartServer, database: str) -> None:
    server = start_server("--database-url", database, "--sweep-seconds", "0")
    server.stop()
    assert any("does not sweep" in line for line in server.said)


# -- The list of collections ----------------------------------------------------------------------


def fill() -> str:
    """What the migration fills the list with."""
    [versions] = peculium_migrations.__path__
    path = Path(versions) / "versions" / "0002_expand_collections.py"
    spec = importlib.util.spec_from_file_location("collections_revision", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    statement: str = module.FILL
    return statement


async def test_what_was_closed_before_there_was_a_list_is_listed_by_the_migration(
    database: str,
) -> None:
    async with Fleet.opened(database) as fleet:
        root = await fleet.root(10_000)
        tops = await fleet.children(root, root, 3, 1_000)
        await fleet.children(root, tops[0], 70)
        await fleet.children(root, tops[1], 60)
        await fleet.children(root, tops[2], 70)
        for top in tops[:2]:
            await fleet.revoke(root, top)
        lane = fleet.store.lane_of(root)
        listed = await fleet.store.collections(lane, limit=10)
        assert listed == [(root, tops[0])]
        async with await psycopg.AsyncConnection.connect(database) as connection:
            await connection.execute("DROP SCHEMA audit CASCADE")
            later = [name for name in metadata.tables if name not in FIRST_TABLES]
            await connection.execute(
                sql.SQL("DROP TABLE {}").format(sql.SQL(", ").join(map(sql.Identifier, later)))
            )
            await connection.execute("ALTER TABLE ledger DROP COLUMN serves_from")
            await connection.execute("UPDATE alembic_version SET version_num = '0001'")
        await asyncio.to_thread(migrate.upgrade, database)
        assert await fleet.store.collections(lane, limit=10) == listed
        await fleet.sweep_until(fleet.nothing_due)
        # Once more does no harm: nothing is left.
        async with await psycopg.AsyncConnection.connect(database) as connection:
            cursor = await connection.execute(fill())
            assert cursor.rowcount == 0
        await fleet.verified(root)


def test_the_page_for_operators_has_the_statement_of_the_migration() -> None:
    page = (ROOT / "docs" / "operating" / "sweeper.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```sql\n(.*?)```", page, flags=re.DOTALL)
    assert block.strip().removesuffix(";") == fill().strip()
