"""A database that was restored to its past, as the runbook says it: by its log, and from a dump.

What the commands are is in docs/operating/restore.md; they are run here as they stand there.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import psycopg
import pytest

from peculium import BudgetFrozen, Checkpoint, Child, LedgerWentBack
from peculium.aio import Budget, Client, connect
from peculium.exports import ExportHeader
from peculium_server.archive.verifying import verify_file
from peculium_server.embedded import EmbeddedPostgres, _wheel_programs
from peculium_server.signing import is_signed
from peculium_server.store import migrate
from tests.cli.test_cli import Cli, Finished
from tests.postgres import Server
from tests.sealer.sealing import new_key
from tests.server import RunningServer, StartServer

pytestmark = pytest.mark.timeout(240)

BACKUP = "backup"
POINT = "noon"
WAIT_SECONDS_MAX = 60


@dataclass
class Archived:
    """A PostgreSQL whose log is kept, so that it can be put back to any moment."""

    data_dir: Path
    log: Path
    """Where the log goes."""
    running: EmbeddedPostgres

    @classmethod
    def start(cls, data_dir: Path) -> Self:
        log = data_dir.parent / "log"
        log.mkdir()
        log.chmod(0o777)
        settings = {
            "archive_mode": "on",
            "archive_command": f"test ! -f {log}/%f && cp %p {log}/%f",
        }
        return cls(data_dir, log, EmbeddedPostgres.start(data_dir, settings=settings))

    def back_up(self) -> None:
        """What can be put back."""
        self.running._place._run(
            *("pg_basebackup", "--pgdata", BACKUP, "--checkpoint", "fast"),
            *("--dbname", self.running.dsn),
        )

    def name_point(self) -> None:
        """Name the moment that is put back to, and let everything until now be kept."""
        with psycopg.connect(self.running.dsn, autocommit=True) as admin:
            admin.execute(f"SELECT pg_create_restore_point('{POINT}')".encode())

    def put_back(self) -> None:
        """Put the backup in the place of what there is, and follow the log up to the moment."""
        # Which hands the rest of the log over.
        self.running.stop()
        cluster = self.data_dir / "cluster"
        owner = cluster.stat()
        cluster.rename(self.data_dir / "lost")
        (self.data_dir / BACKUP).rename(cluster)
        wanted = cluster / "recovery.signal"
        wanted.touch()
        shutil.chown(wanted, owner.st_uid, owner.st_gid)
        settings = {
            "restore_command": f"cp {self.log}/%f %p",
            "recovery_target_name": POINT,
            "recovery_target_action": "promote",
            # Nobody reads before it has arrived there.
            "hot_standby": "off",
        }
        self.running = EmbeddedPostgres.start(self.data_dir, settings=settings)


@pytest.fixture
def archived(own_postgres: Path) -> Iterator[Archived]:
    started = Archived.start(own_postgres)
    migrate.upgrade(started.running.dsn)
    yield started
    started.running.stop()


async def thawed(ask: Callable[[], Awaitable[Any]]) -> None:
    """Ask until it is no longer refused because the ledger is frozen."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while True:
            try:
                await ask()
            except BudgetFrozen:
                await asyncio.sleep(0.05)
            else:
                return


async def sealed(client: Client) -> list[Checkpoint]:
    """The checkpoints, once everything that was done is sealed."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while True:
            listed = [each async for each in client.audit.checkpoints()]
            header, *_ = [piece async for piece in client.audit.export()]
            assert isinstance(header, ExportHeader)
            if listed and listed[-1].positions == header.positions:
                return listed
            await asyncio.sleep(0.05)


async def verifies(client: Client) -> bool:
    *_, last = [each async for each in client.audit.verify()]
    assert last.findings == ()
    return bool(last.verified)


async def is_frozen(budget: Budget) -> None:
    """Nothing new is spent, in whatever way; what there is can be seen, and is told why."""
    asked: list[Awaitable[Any]] = [
        budget.reserve(1),
        budget.spend(1),
        budget.delegate([Child("new", 1)]),
    ]
    for each in asked:
        with pytest.raises(BudgetFrozen) as refused:
            await each
        assert refused.value.by == "restore"
        assert "peculium_restored" in refused.value.remedy
    assert (await budget.balances()).available > 0


def cli(server: RunningServer, *arguments: str) -> Finished:
    return Cli(server.address).run(*arguments)


async def run_program(program: str, *arguments: str) -> None:
    """Run one of PostgreSQL's programs for clients."""
    command = [str(_wheel_programs() / program), *arguments]
    await asyncio.to_thread(subprocess.run, command, check=True)


async def confirmed(database: str, *flags: str) -> str:
    """What the operator is told who says that the ledger may go on."""
    command = ("restored", "--database-url", database, "--by", "ops", *flags)
    told = await asyncio.to_thread(Cli("").run, *command, "--reason", "disk lost; bills reconciled")
    assert told.code == 0, told.err
    return told.out


@dataclass
class Lost:
    """What those have seen whose ledger was put back, and how."""

    acme: Budget
    run: Budget
    slept: Budget
    """Of a client that asks for nothing for a long time."""
    kept: list[Checkpoint]
    """Sealed before the moment that was put back to."""
    published: list[Checkpoint]
    """Sealed after it, too."""


async def lived(archived: Archived, client: Client, agent: Client, sleeper: Client) -> Lost:
    """Spend, and go on spending after the moment that is put back to later."""
    await client.admin.grant("acme", unit="calls", amount=100, holder="dev")
    acme, slept = await client.open("acme"), await sleeper.open("acme")
    [made] = await acme.delegate([Child("run", 10)])
    run = await agent.accept(made.capability)
    await acme.reserve(2)
    kept = await sealed(client)
    await asyncio.to_thread(archived.back_up)
    await acme.spend(1)
    archived.name_point()
    await run.spend(3)
    await acme.spend(30)
    await slept.spend(1)
    return Lost(acme, run, slept, kept, await sealed(client))


async def goes_on(database: str, budget: Budget, lost: Lost) -> None:
    """An operator says so, and it does, beyond all that was known of it before."""
    assert "timeline" in await confirmed(database)
    await thawed(lambda: budget.spend(1))
    for _ in range(10):
        await budget.spend(1)
    # Only the incarnation tells now.
    with pytest.raises(LedgerWentBack, match="incarnation") as caught:
        await lost.slept.spend(1)
    assert caught.value.told > caught.value.seen


async def is_proven(client: Client, server: RunningServer, lost: Lost, file: Path) -> None:
    """What was sealed before holds; what was published of the lost time is not there; all verifies."""
    now = await sealed(client)
    assert now[: len(lost.kept)] == lost.kept
    forgotten = {each.hash for each in lost.published} - {each.hash for each in lost.kept}
    assert forgotten
    assert forgotten.isdisjoint(each.hash for each in now)
    assert now[0].incarnation != now[-1].incarnation
    assert await verifies(client)
    exported = await asyncio.to_thread(cli, server, "audit", "export", "--output", str(file))
    assert exported.code == 0, exported.err
    verified = verify_file(file, public_keys=None, is_signed=is_signed, decide=True)
    assert verified.findings == ()
    assert verified.unsealed == 0


async def test_a_ledger_that_was_put_back_to_an_earlier_moment(
    archived: Archived, start_server: StartServer, tmp_path: Path
) -> None:
    """The whole walk: what is lost, who says so, who lets it go on, and what is proven afterwards."""
    new_key(tmp_path)
    flags = ("--signing-key-file", str(tmp_path / "key.pem"), "--seal-seconds", "1")
    database = archived.running.dsn
    server = await asyncio.to_thread(start_server, "--database-url", database, *flags)
    address = server.address
    async with (
        connect(address, timeout=60) as client,
        connect(address, timeout=60) as agent,
        connect(address, timeout=60) as sleeper,
        connect(address, timeout=60) as anew,
    ):
        lost = await lived(archived, client, agent, sleeper)
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(archived.put_back)
        server = await asyncio.to_thread(
            start_server, "--database-url", database, *flags, listen=address
        )
        assert any("peculium restored" in line for line in server.said)
        # Whoever has seen what is lost says so, and goes no further.
        with pytest.raises(LedgerWentBack, match="incarnation"):
            await lost.run.spend(1)
        with pytest.raises(LedgerWentBack):
            await lost.run.reserve(1)
        budget = await anew.open("acme")
        assert (await budget.balances()).spent == 1
        await is_frozen(budget)
        # What was in flight is settled all the same.
        [held] = await budget.holds()
        await budget.resolve(held.hold_id, 1, "the provider's bill")
        assert await verifies(anew)
        await goes_on(database, budget, lost)
        await is_proven(anew, server, lost, tmp_path / "ledger.jsonl")


async def test_a_ledger_that_was_restored_from_a_dump(
    postgres: Server, start_server: StartServer, tmp_path: Path
) -> None:
    """It is put into a new database of the same name: one cannot be put over the old one's tables."""
    dump = tmp_path / "ledger.dump"
    with postgres.fresh_database(postgres.migrated_template()) as url:
        server = await asyncio.to_thread(start_server, "--database-url", url)
        address = server.address
        async with connect(address, timeout=60) as client:
            await client.admin.grant("acme", unit="calls", amount=100, holder="dev")
            acme = await client.open("acme")
            await acme.spend(1)
            await run_program("pg_dump", "--format", "custom", "--file", str(dump), url)
            await acme.spend(30)
            await asyncio.to_thread(server.stop)
            name = urlsplit(url).path.removeprefix("/")
            await asyncio.to_thread(postgres.drop, name)
            await asyncio.to_thread(postgres.create, name)
            await run_program("pg_restore", "--single-transaction", "--dbname", url, str(dump))
            server = await asyncio.to_thread(start_server, "--database-url", url, listen=address)
            with pytest.raises(LedgerWentBack):
                await acme.spend(1)
            async with connect(address, timeout=60) as anew:
                again = await anew.open("acme")
                await is_frozen(again)
                assert "its database has oid" in await confirmed(url)
                await thawed(lambda: again.spend(1))
                assert await verifies(anew)
        await asyncio.to_thread(server.stop)
