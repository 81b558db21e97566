"""Clocks that are off and that jump: of servers, of clients, of the database. Only the last one counts.

Holds and leases end by the database's time, whatever a server believes; recorded times are the
database's, and never go back within a budget; how old an operation is, is told by the database; and
whatever a caller waits for is measured by clocks that cannot be set.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import psycopg

import peculium
from peculium import Child, HoldState, OutcomeUnknown, Unavailable, aio
from peculium._ids import new_id
from peculium.v1 import ledger_service_pb2 as ledger
from peculium.values import BudgetState, EntryInfo
from peculium_server.embedded import EmbeddedPostgres
from peculium_server.store import migrate
from tests.faults.cluster import ROOT, Cluster
from tests.faults.liar import Liar, library
from tests.faults.tally import Setting, Tally
from tests.server import starting
from tests.system.load import check, under_load
from tests.system.wire import HOLDER, AioWire, header, told

HOUR = 3600.0
OFF = (HOUR, -HOUR)
"""What the clocks of servers are off by; a further server's jumps between these and more."""

WAIT_SECONDS_MAX = 120.0
"""For what has to come about: longer than a busy machine takes, and far from an hour."""

_POLL_SECONDS = 0.1
_SHORT_SECONDS = 2.0
_LONG_SECONDS = 600.0
_BLOCKED_SECONDS = 1.0


class Wrong(Exception):
    """Something is not as it has to be; says what."""


def expect(condition: bool, sentence: str) -> None:
    """Raise what is wrong, if it is."""
    if not condition:
        raise Wrong(sentence)


@dataclass(frozen=True)
class Fleet:
    """Servers of one ledger, each with a clock of its own."""

    addresses: Sequence[str]
    dsn: str
    jumping: Liar | None = None
    """The clock of one of them, which is set while it runs."""

    async def now(self) -> datetime:
        """What the database's clock says."""
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            cursor = await connection.execute("SELECT clock_timestamp()")
            [(now,)] = await cursor.fetchall()
        assert isinstance(now, datetime)
        return now.astimezone(UTC)

    def jump(self, seconds: float) -> None:
        """Set the clock that can be set."""
        if self.jumping is not None:
            self.jumping.set(seconds)


# -- Servers whose clocks are off -----------------------------------------------------------------------


async def money_moves_while_clocks_jump(fleet: Fleet, name: str) -> int:
    """Agents at all servers: nothing acknowledged is lost or done twice. How much was acknowledged."""
    async with contextlib.AsyncExitStack() as open_:
        loads = [
            await open_.enter_async_context(under_load(address, f"{name}-{number}", budgets=2))
            for number, address in enumerate(fleet.addresses)
        ]
        for seconds in (HOUR, -HOUR, 2 * HOUR, -1.0, 0.0):
            fleet.jump(seconds)
            await asyncio.gather(*(load.progress(10) for load in loads))
    for number, load in enumerate(loads):
        # By another server than the one that it worked with.
        await check(fleet.addresses[number - 1], load)
    return sum(len(load.acknowledged) for load in loads)


async def recorded_times_are_the_databases(fleet: Fleet, name: str) -> int:
    """One budget, served by each server in turn."""
    before = await fleet.now()
    async with aio.connect(fleet.addresses[0], timeout=WAIT_SECONDS_MAX) as client:
        await client.admin.grant(name, unit="calls", amount=100, holder="dev")
    for address in (*fleet.addresses, *fleet.addresses):
        async with aio.connect(address, timeout=WAIT_SECONDS_MAX) as client:
            service = await client.open(name)
            await service.spend(1)
            fleet.jump(-HOUR)
            async with service.reserve(1) as hold:
                await hold.settle(1)
            fleet.jump(HOUR)
    after = await fleet.now()
    entries = await entries_of(fleet.addresses[0], name)
    for entry in entries:
        expect(before <= entry.at <= after, f"{entry.kind} was recorded as of {entry.at}")
    never_back(entries)
    return len(entries)


async def age_is_told_by_the_database(fleet: Fleet, name: str) -> int:
    """An operation of now is taken by every server, one of an hour ago or ahead by none."""
    async with aio.connect(fleet.addresses[0], timeout=WAIT_SECONDS_MAX) as client:
        granted = await client.admin.grant(name, unit="calls", amount=100, holder="dev")
    root_id = granted.ref.root_id
    for address in fleet.addresses:
        async with AioWire(address) as wire:
            spend = ledger.SpendRequest(header=header(root_id, root_id, HOLDER), amount=1)
            await wire.ledger.Spend(spend)
            for seconds in (-HOUR, HOUR):
                spend.header.operation_id = _made(seconds)
                try:
                    await wire.ledger.Spend(spend)
                except grpc.aio.AioRpcError as error:
                    refused = told(error)
                    expect(refused.reason == "OPERATION_TOO_OLD", f"refused as {refused}")
                    age = int(refused.facts["age_seconds"])
                    expect(abs(age + seconds) < WAIT_SECONDS_MAX, f"{age} s old, not {-seconds}")
                else:
                    raise Wrong(f"an operation that is off by {seconds} s was taken by {address}")
    return len(fleet.addresses)


async def waiting_is_not_measured_by_clocks_that_jump(fleet: Fleet, name: str) -> int:
    """A call that the database keeps waiting ends at its deadline, and its outcome is found out."""
    async with aio.connect(fleet.addresses[0], timeout=WAIT_SECONDS_MAX) as client:
        await client.admin.grant(name, unit="calls", amount=100, holder="dev")
    for address in fleet.addresses:
        async with aio.connect(address, timeout=WAIT_SECONDS_MAX) as client:
            service = await client.open(name)
            begun = time.monotonic()
            async with await psycopg.AsyncConnection.connect(fleet.dsn) as hoarder:
                await hoarder.execute("SELECT FROM lanes FOR UPDATE")
                spending = asyncio.create_task(service.spend(1, timeout=_BLOCKED_SECONDS))
                for seconds in (-HOUR, HOUR, 0.0):
                    await asyncio.sleep(_BLOCKED_SECONDS / 5)
                    fleet.jump(seconds)
                done, _ = await asyncio.wait([spending], timeout=WAIT_SECONDS_MAX)
                await hoarder.rollback()
            expect(bool(done), f"a call outlived its deadline of {_BLOCKED_SECONDS} s by minutes")
            expect(time.monotonic() - begun >= _BLOCKED_SECONDS, "a call ended before its deadline")
            expect(
                isinstance(spending.exception(), Unavailable | OutcomeUnknown),
                f"a call that was kept waiting ended as {spending!r}",
            )
            # What is asked afterwards finds out what became of it.
            receipt = await service.spend(1)
            expect(receipt.balances.spent >= 1, "nothing was spent")
    return 2 * len(fleet.addresses)


async def holds_and_leases_end_by_the_database(fleet: Fleet, name: str) -> int:
    """Short ones end when the database says so; long ones outlast a server that is an hour ahead."""
    async with aio.connect(fleet.addresses[-1], timeout=WAIT_SECONDS_MAX) as client:
        granted = await client.admin.grant(name, unit="calls", amount=1_000)
        root = await client.accept(granted.capability)
        short = await root.reserve(10, ttl=_SHORT_SECONDS)
        long = await root.reserve(10, ttl=_LONG_SECONDS)
        await root.delegate(
            [
                Child("short", 10, lease=_SHORT_SECONDS),
                Child("long", 10, lease=_LONG_SECONDS),
            ]
        )

        async def ended() -> bool:
            leased = await client.audit.budget(f"{name}/short")
            holds = {hold.hold_id: hold.state for hold in await root.holds()}
            return leased.state is BudgetState.CLOSED and holds[short.hold_id] is HoldState.LAPSED

        for seconds in (HOUR, -HOUR, 0.0):
            fleet.jump(seconds)
            await asyncio.sleep(_POLL_SECONDS)
        await until(ended, "a hold and a lease of two seconds do not end")
        await _outlast(root, long.hold_id)
        leased = await client.audit.budget(f"{name}/long")
        expect(leased.state is BudgetState.OPEN, "a lease of ten minutes ended at once")
        _ended_in_time(await entries_of(fleet.addresses[0], name), short.info.expires_at)
        await short.settle(3)
        await long.settle(4)
        never_back(await entries_of(fleet.addresses[0], name))
    return 8


async def _outlast(root: aio.Budget, hold_id: bytes) -> None:
    """See the long hold live while further short ones lapse, by whichever server."""
    for _ in range(2):
        short = await root.reserve(1, ttl=1.0)

        async def lapsed(short_id: bytes = short.hold_id) -> bool:
            holds = {hold.hold_id: hold.state for hold in await root.holds()}
            expect(holds[hold_id] is HoldState.LIVE, "a hold of ten minutes ended at once")
            return holds[short_id] is HoldState.LAPSED

        await until(lapsed, "a hold of a second does not lapse")
        await short.release()


def _ended_in_time(entries: Sequence[EntryInfo], expires_at: datetime) -> None:
    [lapsed] = [entry for entry in entries if entry.kind == "LAPSE" and entry.amount == 10]
    [made] = [entry.at for entry in entries if entry.kind == "DELEGATE" and entry.part == 0]
    [expired] = {entry.at for entry in entries if entry.kind == "EXPIRE"}
    for kind, at, due in (
        ("hold", lapsed.at, expires_at),
        ("lease", expired, made + timedelta(seconds=_SHORT_SECONDS)),
    ):
        late = (at - due).total_seconds()
        expect(0 <= late < WAIT_SECONDS_MAX, f"a {kind} ended {late} s after its time")


# -- A client whose clock is off ------------------------------------------------------------------------


async def a_client_whose_clock_is_off_is_told_so(
    fleet: Fleet, name: str, seconds: float, liar: Liar
) -> int:
    """By token it spends all the same; by name it is told what is wrong, and goes on once it is set."""
    liar.set(seconds)
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.skewed", fleet.addresses[0], name),
        cwd=ROOT,
        env={**os.environ, **liar.environment()},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    try:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            by_token = json.loads(await client.stdout.readline())
            by_name = json.loads(await client.stdout.readline())
            liar.set(0)
            client.stdin.write(b"\n")
            corrected = json.loads(await client.stdout.readline())
            await client.wait()
    finally:
        if client.returncode is None:
            client.kill()
            await client.wait()
    expect(by_token == {"spent": 7}, f"by token: {by_token}")
    expect(by_name.get("refused") == "OPERATION_TOO_OLD", f"by name: {by_name}")
    expect(abs(by_name["age_seconds"] + seconds) < WAIT_SECONDS_MAX, f"told as {by_name}")
    expect("clock" in by_name["remedy"] and "clock" in by_name["told"], f"told as {by_name}")
    expect(corrected == {"spent": 1}, f"after its clock was set right: {corrected}")
    return 6


# -- A database whose clock goes back -------------------------------------------------------------------


@contextlib.contextmanager
def lying_postgres(folder: Path, liar: Liar) -> Iterator[str]:
    """A migrated database whose server believes a clock; its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    data = folder / "postgres"
    with EmbeddedPostgres.start(data) as truthful:
        migrate.upgrade(truthful.dsn)
        programs = truthful._place.bin_dir
    # Where the user who runs the server can read it, too.
    preload = folder / library().name
    shutil.copyfile(library(), preload)
    preload.chmod(0o755)
    bin_dir = folder / "bin"
    bin_dir.mkdir(exist_ok=True)
    variables = " ".join(f"{name}='{value}'" for name, value in liar.environment(preload).items())
    for program in ("initdb", "pg_ctl", "postgres"):
        script = bin_dir / program
        script.write_text(f'#!/bin/sh\n{variables} exec "{programs / program}" "$@"\n')
        script.chmod(0o755)
    try:
        with EmbeddedPostgres.start(data, bin_dir=bin_dir) as postgres:
            yield postgres.dsn
    finally:
        shutil.rmtree(data, ignore_errors=True)


async def times_do_not_go_back_with_the_database(fleet: Fleet, name: str, liar: Liar) -> int:
    """Entries keep their order in time, and operations of now are still taken as such."""
    liar.set(0)
    async with aio.connect(fleet.addresses[0], timeout=WAIT_SECONDS_MAX) as client:
        granted = await client.admin.grant(f"{name}-token", unit="calls", amount=100)
        root = await client.accept(granted.capability)
        await client.admin.grant(f"{name}-service", unit="calls", amount=100, holder="dev")
        service = await client.open(f"{name}-service")
        async with root.delegate_here(50, name="run", lease=_LONG_SECONDS) as run:
            for seconds in (0.0, -HOUR, -2 * HOUR, -60.0):
                liar.set(seconds)
                off = (await fleet.now()).timestamp() - time.time()
                expect(abs(off - seconds) < WAIT_SECONDS_MAX, "the database is told another time")
                await root.spend(1)
                await service.spend(1)
                async with run.reserve(2) as hold:
                    await hold.settle(1)
        for seconds in (0.0, HOUR, 0.0):
            liar.set(seconds)
            await root.spend(1)
        # Nobody used this one while the database was ahead.
        await service.spend(1)
    for each in (f"{name}-token", f"{name}-service"):
        never_back(await entries_of(fleet.addresses[0], each))
    async with aio.connect(fleet.addresses[0], timeout=WAIT_SECONDS_MAX) as client:
        verdicts = [progress.verified async for progress in client.audit.verify()]
    expect(verdicts[-1] is True, "it does not verify")
    return 24


# -- Looking --------------------------------------------------------------------------------------------


async def entries_of(address: str, root: str) -> list[EntryInfo]:
    """All entries of a tree, in the order of the ledger."""
    async with aio.connect(address, timeout=WAIT_SECONDS_MAX) as client:
        return [entry async for entry in client.audit.entries(root, reach=peculium.Reach.TREE)]


def never_back(entries: Sequence[EntryInfo]) -> None:
    """Within each budget, times follow the order of the ledger."""
    last: dict[bytes, EntryInfo] = {}
    for entry in entries:
        before = last.get(entry.budget_id)
        if before is not None:
            expect(before.at <= entry.at, f"{entry.kind} of {entry.at} follows one of {before.at}")
        last[entry.budget_id] = entry


async def until(condition: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    """Wait for what has to come about."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not await condition():
        expect(time.monotonic() < deadline, otherwise)
        await asyncio.sleep(_POLL_SECONDS)


def _made(seconds: float) -> bytes:
    """An id as it would be made so long from now."""
    made = new_id()
    return (int.from_bytes(made[:6]) + int(seconds * 1000)).to_bytes(6) + made[6:]


# -- The campaign's part --------------------------------------------------------------------------------

_FLAGS = ("--sweep-seconds", "1")

_BY_SERVERS: tuple[Callable[[Fleet, str], Awaitable[int]], ...] = (
    money_moves_while_clocks_jump,
    recorded_times_are_the_databases,
    age_is_told_by_the_database,
    waiting_is_not_measured_by_clocks_that_jump,
    holds_and_leases_end_by_the_database,
)


async def run(setting: Setting) -> Tally:
    """Let clocks of servers, clients and databases be off and jump, again and again."""
    tally = Tally()
    end = time.monotonic() + setting.seconds
    folder = setting.folder / "clock"
    folder.mkdir(parents=True, exist_ok=True)
    liars = [
        Liar.off_by(seconds, folder / f"clock-{number}")
        for number, seconds in enumerate((*OFF, 0.0))
    ]
    async with Cluster.running(
        folder / "servers",
        setting.random("clock"),
        servers=len(liars),
        environments=[liar.environment() for liar in liars],
        flags=_FLAGS,
    ) as cluster:
        fleet = Fleet([node.address for node in cluster.nodes], cluster.dsn, liars[-1])
        number = 0
        while not number or time.monotonic() < end:
            await _round(tally, fleet, folder, number)
            number += 1
    return tally


async def _round(tally: Tally, fleet: Fleet, folder: Path, number: int) -> None:
    for part in _BY_SERVERS:
        name = f"{part.__name__}-{number}"
        await _examine(tally, name, part(fleet, name))
    for seconds in OFF:
        name = f"client-{seconds:+.0f}-{number}"
        liar = Liar.off_by(seconds, folder / name)
        await _examine(
            tally, name, a_client_whose_clock_is_off_is_told_so(fleet, name, seconds, liar)
        )
    name = f"database-{number}"
    await _examine(tally, name, _database_goes_back(folder / name, name))


async def _database_goes_back(folder: Path, name: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    liar = Liar.off_by(0, folder / "clock")
    with contextlib.ExitStack() as open_:
        dsn = await asyncio.to_thread(open_.enter_context, lying_postgres(folder, liar))
        start = open_.enter_context(starting(folder))
        server = await asyncio.to_thread(start, "--database-url", dsn)
        return await times_do_not_go_back_with_the_database(
            Fleet([server.address], dsn), name, liar
        )


async def _examine(tally: Tally, name: str, part: Awaitable[int]) -> None:
    """Do a part, and note what is wrong with it."""
    tally.rounds += 1
    try:
        tally.operations += await part
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        tally.wrong_totals += 1
        tally.problems.append(f"{name}: {type(error).__name__}: {error}")
