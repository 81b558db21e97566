"""A disk that is full: first for tables, then for the log too."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import psycopg
import pytest

from peculium_server.embedded import EmbeddedPostgres
from peculium_server.store import migrate
from tests.server import StartServer
from tests.system.calls import OUTAGE, granted, spend_of
from tests.system.health import NOT_SERVING, SERVING, becomes
from tests.system.wire import AioWire, Wire, id_text, new_id, retry_seconds, told

pytestmark = pytest.mark.timeout(240)

DISK_BYTES = 256 * 1024 * 1024
SPENDS_MAX = 500
"""More entries than fit into what a table has in reserve."""


@pytest.fixture
def small_disk(own_postgres: Path) -> Iterator[Path]:
    """A data directory on a file system of its own."""
    own_postgres.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0755", "tmpfs"]
    mounted = subprocess.run([*mount, str(own_postgres)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"not allowed to mount a file system: {mounted.stderr.decode().strip()}")
    try:
        yield own_postgres
    finally:
        (own_postgres / "ballast").unlink(missing_ok=True)
        EmbeddedPostgres.start(own_postgres).stop()
        subprocess.run(["umount", str(own_postgres)], check=True)
        own_postgres.rmdir()


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Nothing is left of a file system, for the time of the block."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        ballast.unlink()


class Spender:
    """Spends without the SDK, which would try again until the disk has room."""

    def __init__(self, connection: AioWire, root_id: bytes) -> None:
        self._connection = connection
        self._root_id = root_id
        self.done: set[str] = set()
        """What was acknowledged."""

    async def spend(self, operation_id: bytes | None = None) -> None:
        request = spend_of(self._root_id, operation_id)
        await self._connection.ledger.Spend(request)
        self.done.add(id_text(request.header.operation_id))

    async def fail(self) -> bytes:
        """Spend until there is no answer: the id of the operation that has none."""
        for _ in range(SPENDS_MAX):
            operation_id = new_id()
            try:
                await self.spend(operation_id)
            except grpc.aio.AioRpcError as error:
                failure, retry = told(error), retry_seconds(error)
                break
        else:
            raise AssertionError("the disk is not full")
        assert (failure, retry) == (OUTAGE, 1)
        return operation_id


async def fill_log(dsn: str) -> None:
    """Let the database's log need another file."""
    with contextlib.suppress(psycopg.Error):
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
            for _ in range(8):
                await admin.execute("SELECT pg_logical_emit_message(true, '', 'x')")
                await admin.execute("SELECT pg_switch_wal()")


async def test_a_full_disk_is_survived_and_nothing_acknowledged_is_lost(
    start_server: StartServer, small_disk: Path
) -> None:
    with EmbeddedPostgres.start(small_disk, settings={"max_wal_size": "32MB"}) as postgres:
        await asyncio.to_thread(migrate.upgrade, postgres.dsn)
        server = await asyncio.to_thread(start_server, "--database-url", postgres.dsn)
        async with AioWire(server.address) as connection:
            root_id = await granted(connection, "acme")
            spender = Spender(connection, root_id)
            await spender.spend()
            with filled(small_disk):
                unknown = await spender.fail()
                await becomes(server.address, NOT_SERVING)
            await becomes(server.address, SERVING)
            await spender.spend(unknown)
            with filled(small_disk):
                # Now the database panics, and may not be able to recover for want of disk.
                await fill_log(postgres.dsn)
                unknown = await spender.fail()
                await becomes(server.address, NOT_SERVING)
    with EmbeddedPostgres.start(small_disk):
        async with AioWire(server.address) as connection:
            await becomes(server.address, SERVING)
            await Spender(connection, root_id).spend(unknown)
        await asyncio.to_thread(_check, server.address, root_id, spender.done)
        assert server.stop() == 0


def _check(address: str, root_id: bytes, done: set[str]) -> None:
    with Wire(address) as wire:
        recorded = [id_text(entry.operation_id) for entry in wire.entries(root_id)]
        assert len(recorded) == len(set(recorded))
        assert done <= set(recorded)
        assert wire.verified()
