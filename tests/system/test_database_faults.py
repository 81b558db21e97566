"""A database that stops, dies, is full, crowded or locked, under a server that has to outlive it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import grpc
import psutil
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from peculium.v1 import audit_service_pb2 as audit
from peculium_server.core.lanes import lane_of
from peculium_server.store import migrate
from peculium_server.store.schema import LANES
from peculium_server.store.store import KEY_READERS
from tests.faults.cluster import Cluster
from tests.postgres import Server as PostgresServer
from tests.server import RunningServer, StartServer
from tests.system.calls import OUTAGE, all_unavailable, granted, ref_of, spend_of
from tests.system.health import NOT_SERVING, SERVING, becomes, health
from tests.system.load import check, under_load
from tests.system.wire import (
    AioWire,
    grant_of,
    retry_seconds,
    told,
)

pytestmark = pytest.mark.timeout(240)


@contextlib.asynccontextmanager
async def alone(folder: Path, *flags: str) -> AsyncIterator[Cluster]:
    """One server on a database of its own."""
    chance = Random(3)  # noqa: S311 - nothing is left to it
    async with Cluster.running(folder, chance, servers=1, flags=flags) as cluster:
        yield cluster


def _signal(cluster: Cluster, number: signal.Signals) -> None:
    """Tell the postmaster, and wait for its end."""
    postmaster = psutil.Process(cluster.postgres.pid)
    postmaster.send_signal(number)
    postmaster.wait(30)


async def test_a_server_outlives_its_database_and_nothing_is_lost_or_done_twice(
    own_postgres: Path,
) -> None:
    """A fast stop, an immediate one, a postmaster that is killed, and a backend that is."""
    async with alone(own_postgres.parent / "cluster") as cluster:
        [node] = cluster.nodes
        address = node.address
        async with AioWire(address) as connection:
            root_id = await granted(connection, "bystander")
        async with under_load(address) as load:
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                await load.progress(50)
                await asyncio.to_thread(_signal, cluster, number)
                await all_unavailable(address, root_id)
                await becomes(address, NOT_SERVING)
                await cluster.start_postgres()
                await becomes(address, SERVING)
            await load.progress(50)
            assert await cluster.kill_backend()
            await load.progress(50)
        await check(address, load)
        assert node.running


@dataclass
class Tenant:
    """A server that comes to its database as an ordinary role, and whoever runs that database."""

    server: RunningServer
    admin: psycopg.AsyncConnection
    dsn: str
    role: str

    @property
    def address(self) -> str:
        return self.server.address

    async def end_sessions(self) -> None:
        """End those of the role."""
        await self.admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s",
            [self.role],
        )

    async def sessions(self) -> int:
        """How many the role has."""
        cursor = await self.admin.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE usename = %s", [self.role]
        )
        [(count,)] = await cursor.fetchall()
        return int(count)


@pytest.fixture
async def tenant(start_server: StartServer, postgres: PostgresServer) -> AsyncIterator[Tenant]:
    role = f"{postgres.prefix}{secrets.token_hex(4)}"
    async with await psycopg.AsyncConnection.connect(postgres.dsn, autocommit=True) as admin:
        await admin.execute(f"CREATE ROLE {role} LOGIN CREATEDB")
        with postgres.fresh_database() as database:
            dsn = make_conninfo(database, user=role)
            name = conninfo_to_dict(database)["dbname"]
            await admin.execute(f"ALTER DATABASE {name} OWNER TO {role}")
            await asyncio.to_thread(migrate.upgrade, dsn)
            server = await asyncio.to_thread(start_server, "--database-url", dsn)
            yield Tenant(server, admin, dsn, role)
            # Before its database: it would say for long that it has none.
            await asyncio.to_thread(server.stop)
        await admin.execute(f"DROP ROLE {role}")


async def test_a_server_that_gets_no_connection_says_so_and_goes_on_when_it_gets_one(
    tenant: Tenant,
) -> None:
    async with AioWire(tenant.address) as connection:
        root_id = await granted(connection, "acme")
        await tenant.admin.execute(f"ALTER ROLE {tenant.role} CONNECTION LIMIT 0")
        await tenant.end_sessions()
        await all_unavailable(tenant.address, root_id)
        await becomes(tenant.address, NOT_SERVING)
        await tenant.admin.execute(f"ALTER ROLE {tenant.role} CONNECTION LIMIT -1")
        await becomes(tenant.address, SERVING)
        await connection.ledger.Spend(spend_of(root_id))


async def test_a_server_that_cannot_read_who_may_call_says_so_until_it_can(tenant: Tenant) -> None:
    async with AioWire(tenant.address) as connection:
        root_id = await granted(connection, "acme")
        async with await psycopg.AsyncConnection.connect(tenant.dsn) as blocker:
            await blocker.execute("LOCK TABLE key_acts IN ACCESS EXCLUSIVE MODE")
            await becomes(tenant.address, NOT_SERVING)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await connection.ledger.Spend(spend_of(root_id))
            assert told(caught.value).reason == "KEYS_OUTDATED"
        await becomes(tenant.address, SERVING)
        await connection.ledger.Spend(spend_of(root_id))


async def test_a_server_holds_one_connection_for_each_lane_and_those_for_reads_and_keys(
    tenant: Tenant,
) -> None:
    async with AioWire(tenant.address) as connection:
        roots = {lane: await granted_in(connection, lane) for lane in range(LANES)}
        ref = audit.ListBudgetsRequest()
        await asyncio.gather(
            *(connection.ledger.Spend(spend_of(root_id)) for root_id in roots.values()),
            *(connection.audit.ListBudgets(ref) for _ in range(100)),
        )
    assert LANES < await tenant.sessions() <= LANES + 4 + KEY_READERS


async def granted_in(connection: AioWire, lane: int) -> bytes:
    """A new root in a lane."""
    while True:
        request = grant_of(f"lane-{lane}", 10**6, holder="dev")
        if lane_of(request.header.root_id, LANES) == lane:
            await connection.admin.Grant(request)
            return request.header.root_id


async def test_a_right_that_is_missing_is_no_outage_and_does_not_ask_to_try_again(
    tenant: Tenant,
) -> None:
    async with (
        AioWire(tenant.address) as connection,
        await psycopg.AsyncConnection.connect(tenant.dsn, autocommit=True) as owner,
    ):
        root_id = await granted(connection, "acme")
        await owner.execute(f"REVOKE INSERT ON entries FROM {tenant.role}")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await connection.ledger.Spend(spend_of(root_id))
        refused = told(raised.value)
        assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert retry_seconds(raised.value) is None
        await owner.execute(f"GRANT INSERT ON entries TO {tenant.role}")
        await connection.ledger.Spend(spend_of(root_id))
    assert any(refused.facts["request"] in line for line in tenant.server.said)


async def test_a_table_that_somebody_keeps_locked_holds_up_its_own_lane_alone(
    tenant: Tenant,
) -> None:
    async with (
        AioWire(tenant.address) as connection,
        await psycopg.AsyncConnection.connect(tenant.dsn) as hoarder,
    ):
        locked, free = await granted_in(connection, 1), await granted_in(connection, 2)
        await hoarder.execute("LOCK TABLE entries_01 IN ACCESS EXCLUSIVE MODE")
        waiting = asyncio.ensure_future(connection.ledger.Spend(spend_of(locked)))
        late = asyncio.ensure_future(connection.ledger.Spend(spend_of(locked), timeout=0.5))
        for _ in range(20):
            await connection.ledger.Spend(spend_of(free))
        assert not waiting.done()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await late
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await waiting
        assert told(raised.value).reason == "CONTENDED"
        assert retry_seconds(raised.value) == 0.05
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await connection.audit.ListEntries(audit.ListEntriesRequest(budget=ref_of(locked)))
        assert told(raised.value) == OUTAGE
        assert await health(tenant.address) == SERVING
        await hoarder.rollback()
        await connection.ledger.Spend(spend_of(locked))
        await connection.audit.ListEntries(audit.ListEntriesRequest(budget=ref_of(locked)))


async def test_a_database_that_takes_no_writes_is_not_said_to_be_healthy(tenant: Tenant) -> None:
    """A standby is told apart by the same: its sessions are read-only."""
    async with AioWire(tenant.address) as connection:
        root_id = await granted(connection, "acme")
        await becomes(tenant.address, SERVING)
        await tenant.admin.execute(
            f"ALTER ROLE {tenant.role} SET default_transaction_read_only = on"
        )
        await tenant.end_sessions()
        await becomes(tenant.address, NOT_SERVING)
        await all_unavailable(tenant.address, root_id)
        await tenant.admin.execute(f"ALTER ROLE {tenant.role} RESET default_transaction_read_only")
        await becomes(tenant.address, SERVING)
        await connection.ledger.Spend(spend_of(root_id))
