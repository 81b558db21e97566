"""A primary that dies, and a standby that takes its place."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import psutil
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from peculium_server.embedded import EmbeddedPostgres
from peculium_server.store import migrate
from tests.server import ServerFailed, StartServer
from tests.system.calls import all_unavailable, granted, spend_of
from tests.system.health import NOT_SERVING, SERVING, becomes
from tests.system.load import check, under_load
from tests.system.wire import AioWire

pytestmark = pytest.mark.timeout(240)

STANDBY = "standby"


@dataclass
class Pair:
    """A primary that commits nothing which its standby does not have."""

    primary: EmbeddedPostgres
    standby_dir: Path
    standby_port: int

    @property
    def dsn(self) -> str:
        """Both, as one connection string."""
        return make_conninfo(
            self.standby_dsn,
            host="127.0.0.1,127.0.0.1",
            port=f"{self.standby_port},{urlsplit(self.primary.tcp_dsn).port}",
        )

    @property
    def standby_dsn(self) -> str:
        """The standby alone."""
        return make_conninfo(self.primary.tcp_dsn, port=self.standby_port)

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as its user, in the primary's data directory."""
        self.primary._place._run(program, *arguments)

    def control_standby(self, verb: str, *arguments: str) -> None:
        """Start it, stop it, or make it the primary."""
        self.run("pg_ctl", verb, "--wait", "--pgdata", str(self.standby_dir), *arguments)

    def start_standby(self) -> None:
        """Start it, and wait until it can be read from."""
        options = f"-c port={self.standby_port} -c listen_addresses=127.0.0.1"
        options += " -c unix_socket_directories=''"
        self.control_standby("start", "--log", "standby.log", "--options", options)

    def stop_standby(self) -> None:
        """Stop it at once."""
        self.control_standby("stop", "--mode", "immediate")

    def end_standby(self) -> None:
        """Stop it if it runs."""
        if (self.standby_dir / "postmaster.pid").exists():
            self.stop_standby()

    def stop_primary(self) -> None:
        """Stop whichever runs now."""
        self.primary.stop()

    def restart_primary(self) -> None:
        """Let it crash, and come back where it was."""
        port = urlsplit(self.primary.tcp_dsn).port
        self.kill_primary()
        self.primary.stop()
        self.primary = EmbeddedPostgres.start(self.primary._place.data_dir, port=port)

    def kill_primary(self) -> None:
        """Without a word, and for good."""
        processes = [psutil.Process(self.primary.pid)]
        processes += processes[0].children()
        for process in processes:
            # Without a postmaster the others end by themselves.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, 30)


@pytest.fixture
async def pair(own_postgres: Path) -> AsyncIterator[Pair]:
    with contextlib.ExitStack() as started:
        primary = EmbeddedPostgres.start(own_postgres, port=_free_port())
        both = Pair(primary, own_postgres / "standby", _free_port())
        started.callback(both.stop_primary)
        migrate.upgrade(primary.dsn)
        followed = make_conninfo(primary.tcp_dsn, application_name=STANDBY)
        both.run(
            *("pg_basebackup", "--pgdata", str(both.standby_dir), "--write-recovery-conf"),
            *("--checkpoint", "fast", "--dbname", followed),
        )
        both.start_standby()
        started.callback(both.end_standby)
        async with await psycopg.AsyncConnection.connect(primary.dsn, autocommit=True) as admin:
            await admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{STANDBY}'")
            await admin.execute("SELECT pg_reload_conf()")
            await synchronous(admin)
        yield both


async def synchronous(admin: psycopg.AsyncConnection) -> None:
    """Wait until the standby is waited for."""
    async with asyncio.timeout(60):
        while True:
            cursor = await admin.execute("SELECT sync_state FROM pg_stat_replication")
            if await cursor.fetchall() == [("sync",)]:
                return
            await asyncio.sleep(0.05)


async def test_a_server_goes_over_to_the_standby_that_was_promoted_and_loses_nothing(
    pair: Pair, start_server: StartServer
) -> None:
    """The standby comes first in the connection string, and is never spoken to before."""
    with pytest.raises(ServerFailed, match="exit code 3"):
        await asyncio.to_thread(start_server, "--database-url", pair.standby_dsn)
    server = await asyncio.to_thread(start_server, "--database-url", pair.dsn)
    async with AioWire(server.address) as connection:
        root_id = await granted(connection, "bystander")
    async with under_load(server.address) as load:
        await load.progress(100)
        await asyncio.to_thread(pair.kill_primary)
        # The standby has all of it, and would answer reads.
        await all_unavailable(server.address, root_id)
        await becomes(server.address, NOT_SERVING)
        await asyncio.to_thread(pair.control_standby, "promote")
        await becomes(server.address, SERVING)
        await load.progress(100)
    await check(server.address, load)
    assert server.process.poll() is None


async def test_what_only_the_primary_has_is_not_acknowledged_by_it(
    pair: Pair, start_server: StartServer
) -> None:
    """What waits for the standby can be seen here once the wait is cancelled, or the primary crashes."""
    server = await asyncio.to_thread(start_server, "--database-url", pair.dsn)
    async with AioWire(server.address) as connection:
        root_id = await granted(connection, "acme")
        await asyncio.to_thread(pair.stop_standby)
        request = spend_of(root_id)
        asking = asyncio.ensure_future(connection.ledger.Spend(request, timeout=8))
        async with await psycopg.AsyncConnection.connect(
            pair.primary.dsn, autocommit=True
        ) as admin:
            await cancel_waits_for_standby(admin)
        await asyncio.to_thread(pair.restart_primary)
        with pytest.raises(grpc.aio.AioRpcError):
            await asking
        async with await psycopg.AsyncConnection.connect(pair.primary.dsn) as admin:
            assert await entries(admin) == 2
        with pytest.raises(grpc.aio.AioRpcError):
            await connection.ledger.Spend(request, timeout=2)
        await asyncio.to_thread(pair.start_standby)
        assert (await connection.ledger.Spend(request)).outcome.replayed


async def cancel_waits_for_standby(admin: psycopg.AsyncConnection) -> None:
    """Cancel commits that wait, until an operation can be seen that was not acknowledged."""
    async with asyncio.timeout(30):
        while await entries(admin) < 2:
            await admin.execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            )


async def entries(admin: psycopg.AsyncConnection) -> int:
    """How many can be seen."""
    cursor = await admin.execute("SELECT count(*) FROM entries")
    [(count,)] = await cursor.fetchall()
    return int(count)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
