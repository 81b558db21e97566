"""Steady load while agents die at random: memory, connections and open holds have to stay flat.

    python -m tests.faults.soak --seconds 900

Client processes are killed with their holds in flight; what they leave behind is ended by their
successors, or lapses and expires by the sweeper. Samples go to `samples.jsonl` in the folder, progress to
stderr, the figures as one line of JSON to stdout. The exit code is 1 if something is not flat, or if
the ledger is not right in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import psycopg

from peculium import Child, aio
from peculium_server.embedded import EmbeddedPostgres
from peculium_server.store import migrate
from tests.faults.cluster import ROOT
from tests.faults.soaker import LEASE_SECONDS, SERVICE, TOKENS, TTL_SECONDS, read
from tests.server import RunningServer, starting

SERVERS = 2
PROCESSES = 4
GRANTED = 10**12

LIFE_SECONDS = (8.0, 25.0)
"""How long a client process lives, by lot."""
SAMPLE_SECONDS = 5.0
WARM_UP_PART = 0.25
WARM_UP_SECONDS_MAX = 180.0
"""Until caches and pools are as large as they become."""
GRACE_SECONDS = 120.0
"""Beyond its time, until a hold has to have lapsed and a lease to have expired: a sweep, on a busy machine."""
STOP_SECONDS_MAX = 120.0

# What counts as flat: bounds that a busy machine keeps, and a leak passes in a quarter of an hour.
GROWTH_PART_MAX = 0.10
MEMORY_MB_MAX = 20.0
CONNECTIONS_MAX = 10
HOLDS_MAX = 30
RATE_PART_MIN = 0.25

_MB = 2**20


@dataclass(frozen=True)
class Sample:
    """How much there is of everything, at a time."""

    at: float
    """In seconds from the start."""
    rss_mb: float
    """Of the servers, and what the processes of PostgreSQL have for themselves: the buffers that they
    share are not theirs, and fill as they are used."""
    connections: int
    """Sessions of the database."""
    descriptors: int
    """Open files and sockets of the servers."""
    holds: int
    """Live."""
    operations: int
    """Recorded so far."""


@dataclass
class Soak:
    """The processes, and what was seen of them."""

    dsn: str
    postmaster: psutil.Process
    servers: Sequence[RunningServer]
    folder: Path
    chance: Random
    deaths: int = 0
    failures: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    @property
    def bills(self) -> list[Path]:
        """A file for each slot."""
        return [self.folder / f"bills-{number}" for number in range(PROCESSES)]

    @property
    def address(self) -> str:
        """Of one of the servers."""
        return self.servers[0].address

    async def grant(self) -> None:
        """Make the roots, and a slot for each process."""
        async with aio.connect(self.address, timeout=STOP_SECONDS_MAX) as client:
            await client.admin.grant(SERVICE, unit="calls", amount=GRANTED, holder="dev")
            tokens = await client.admin.grant(TOKENS, unit="calls", amount=GRANTED)
            root = await client.accept(tokens.capability)
            await root.delegate(
                [
                    Child(f"slot-{number}", GRANTED // 10, holder="dev", token=True)
                    for number in range(PROCESSES)
                ]
            )

    async def keep_alive(self, number: int, stopping: asyncio.Event) -> None:
        """Let one process after the other work in a slot, and kill each in the middle of its work."""
        for server in itertools.cycle((*self.servers[number % SERVERS :], *self.servers)):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.faults.soaker", server.address),
                *(f"slot-{number}", str(self.bills[number])),
                cwd=ROOT,
            )
            try:
                ended = await self._live(process, stopping)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
                raise
            if ended:
                return

    async def _live(self, process: asyncio.subprocess.Process, stopping: asyncio.Event) -> bool:
        """Let a process work for a while, then kill it, or let it end: whether this was the last one."""
        working = asyncio.create_task(process.wait())
        stopped = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait(
                {working, stopped},
                timeout=self.chance.uniform(*LIFE_SECONDS),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            stopped.cancel()
        if working.done():
            self.failures.append(f"a client ended by itself with {working.result()}")
        elif stopping.is_set():
            process.terminate()
            async with asyncio.timeout(STOP_SECONDS_MAX):
                code = await working
            # By the signal itself, if it had not begun to work yet.
            if code not in {0, -signal.SIGTERM}:
                self.failures.append(f"a client that was told to stop ended with {code}")
        else:
            process.kill()
            await working
            self.deaths += 1
        return stopping.is_set()

    # -- Looking --------------------------------------------------------------------------------------

    async def fetch(self, query: str) -> tuple[int, ...]:
        """The only row of a query."""
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            cursor = await connection.execute(query.encode())
            [row] = await cursor.fetchall()
        return tuple(map(int, row))

    async def sample(self) -> Sample:
        """Look at everything once, and write it down."""
        rss, descriptors = self._memory()
        connections, holds, operations = await self.fetch(
            "SELECT (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'peculium'),"
            " (SELECT count(*) FROM holds WHERE state = 1), (SELECT sum(position) FROM lanes)"
        )
        sample = Sample(
            round(time.monotonic() - self.begun, 2),
            round(rss / _MB, 2),
            connections,
            descriptors,
            holds,
            operations,
        )
        self.samples.append(sample)
        with (self.folder / "samples.jsonl").open("a") as file:
            file.write(json.dumps(asdict(sample)) + "\n")
        return sample

    def _memory(self) -> tuple[int, int]:
        servers = [psutil.Process(server.process.pid) for server in self.servers]
        memory = sum(server.memory_info().rss for server in servers)
        for process in [self.postmaster, *self.postmaster.children(recursive=True)]:
            # One that has ended meanwhile has none.
            with contextlib.suppress(psutil.NoSuchProcess):
                memory += process.memory_full_info().uss
        return memory, sum(server.num_fds() for server in servers)


async def soak(seconds: float, seed: int, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Run the load, then look at what is left: the figures, and a sentence for what is wrong."""
    async with _running(folder, seed) as soaked:
        await soaked.grant()
        stopping = asyncio.Event()
        async with asyncio.TaskGroup() as living:
            for number in range(PROCESSES):
                living.create_task(soaked.keep_alive(number, stopping))
            await _watch(soaked, seconds)
            stopping.set()
        left = await _left(soaked)
    steady = warm(soaked.samples)
    start, slope = trend(steady)
    figures = {
        "seconds": round(soaked.samples[-1].at, 1),
        "operations": soaked.samples[-1].operations,
        "deaths": soaked.deaths,
        "rss_start_mb": round(start, 1),
        "rss_end_mb": round(start + slope * (steady[-1].at - steady[0].at), 1),
        "rss_slope_mb_per_h": round(slope * 3600, 1),
        "connections_start": steady[0].connections,
        "connections_end": steady[-1].connections,
        "holds_open_end": left.holds,
        "overshoot": left.overshoot,
        "verified": left.verified,
    }
    return figures, soaked.failures + not_flat(soaked.samples) + not_right(left)


@contextlib.asynccontextmanager
async def _running(folder: Path, seed: int) -> AsyncIterator[Soak]:
    """A database and servers of one's own."""
    data = folder / "postgres"
    with contextlib.ExitStack() as open_:
        open_.callback(shutil.rmtree, data, ignore_errors=True)
        postgres = await asyncio.to_thread(EmbeddedPostgres.start, data)
        open_.enter_context(postgres)
        await asyncio.to_thread(migrate.upgrade, postgres.dsn)
        start = open_.enter_context(starting(folder))
        servers = [
            await asyncio.to_thread(start, "--database-url", postgres.dsn, "--sweep-seconds", "1")
            for _ in range(SERVERS)
        ]
        yield Soak(
            postgres.dsn,
            psutil.Process(postgres.pid),
            servers,
            folder,
            Random(seed),
        )


async def _watch(soaked: Soak, seconds: float) -> None:
    """Take samples until the time is over."""
    clock = time.monotonic
    soaked.begun = clock()
    for number in itertools.count(1):
        due = min(number * SAMPLE_SECONDS, seconds)
        await asyncio.sleep(max(0.0, soaked.begun + due - clock()))
        sample = await soaked.sample()
        _tell(
            f"{sample.at:7.1f} s: {sample.operations} operations, {soaked.deaths} deaths,"
            f" {sample.rss_mb} MB, {sample.connections} sessions, {sample.holds} live holds"
        )
        if due == seconds:
            return


@dataclass(frozen=True)
class Left:
    """What is left in the end."""

    holds: int
    """Live, although the time of all is over."""
    leases: int
    """Open budgets whose leases are over."""
    overshoot: int
    """Billed beyond what the ledger knows of, or beyond what was granted."""
    verified: bool


async def _left(soaked: Soak) -> Left:
    """Wait until everything has ended that has an end, then add up."""
    deadline = time.monotonic() + max(TTL_SECONDS, LEASE_SECONDS) + GRACE_SECONDS
    while True:
        holds, leases = await soaked.fetch(
            "SELECT (SELECT count(*) FROM holds WHERE state = 1), (SELECT count(*) FROM budgets"
            " WHERE lease_until IS NOT NULL AND NOT closed)"
        )
        if not (holds or leases) or time.monotonic() > deadline:
            break
        await asyncio.sleep(1.0)
    known, overrun = await soaked.fetch("SELECT sum(spent + forfeited), sum(overrun) FROM budgets")
    billed = sum(cost for bills in soaked.bills for _, cost in read(bills))
    _tell(f"billed {billed}, spent and forfeited {known}; verifying")
    async with aio.connect(soaked.address) as client:
        verdicts = [progress.verified async for progress in client.audit.verify()]
    return Left(holds, leases, overrun + max(0, billed - known), verdicts[-1] is True)


# -- Judging --------------------------------------------------------------------------------------------


def warm(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Those from the warm-up on."""
    since = min(samples[-1].at * WARM_UP_PART, WARM_UP_SECONDS_MAX)
    return [sample for sample in samples if sample.at >= since]


def trend(steady: Sequence[Sample]) -> tuple[float, float]:
    """Memory by least squares: in MB at the first sample, and in MB a second."""
    slope, start = statistics.linear_regression(
        [sample.at - steady[0].at for sample in steady], [sample.rss_mb for sample in steady]
    )
    return start, slope


def not_flat(samples: Sequence[Sample]) -> list[str]:
    """A sentence for everything that grows, or slows down."""
    steady = warm(samples)
    problems = []
    start, slope = trend(steady)
    growth = slope * (steady[-1].at - steady[0].at)
    if growth > GROWTH_PART_MAX * start + MEMORY_MB_MAX:
        problems.append(f"memory has grown by {growth:.1f} MB from {start:.1f} MB")
    quarter = max(1, len(steady) // 4)
    first, last = steady[:quarter], steady[-quarter:]
    for name, more in (
        ("connections", CONNECTIONS_MAX),
        ("descriptors", CONNECTIONS_MAX),
        ("holds", HOLDS_MAX),
    ):
        before, after = (
            statistics.median(getattr(sample, name) for sample in part) for part in (first, last)
        )
        if after > before * (1 + GROWTH_PART_MAX) + more:
            problems.append(f"there are {after:.0f} {name}, and there were {before:.0f}")
    before, after = rate(first), rate(last)
    if after < before * RATE_PART_MIN:
        problems.append(f"{after:.0f} operations a second, and there were {before:.0f}")
    return problems


def rate(samples: Sequence[Sample]) -> float:
    """Operations a second."""
    seconds = samples[-1].at - samples[0].at
    return (samples[-1].operations - samples[0].operations) / seconds if seconds else 0.0


def not_right(left: Left) -> list[str]:
    """A sentence for everything that the ledger has wrong in the end."""
    problems = []
    if left.holds or left.leases:
        problems.append(f"{left.holds} live holds and {left.leases} leases are left over")
    if left.overshoot:
        problems.append(f"{left.overshoot} was billed beyond what the ledger allowed or knows")
    if not left.verified:
        problems.append("the ledger does not verify")
    return problems


def _tell(sentence: str) -> None:
    sys.stderr.write(f"soak: {sentence}\n")


def main() -> int:
    """The command: its exit code."""
    parser = argparse.ArgumentParser(prog="soak", description="Steady load while agents die.")
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the samples; default: a new one")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="peculium-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    # The user who runs PostgreSQL has to get in.
    folder.chmod(0o755)
    _tell(f"seed {given.seed}, {given.seconds:.0f} s, samples in {folder}")
    figures, problems = asyncio.run(soak(given.seconds, given.seed, folder))
    for problem in problems:
        _tell(f"WRONG: {problem}")
    sys.stdout.write(json.dumps(figures) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
