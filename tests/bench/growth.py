"""What becomes of a ledger that grows: speed, disk, memory, and how fast it starts and recovers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from peculium import aio
from peculium.errors import Unavailable
from peculium_server.embedded import EmbeddedPostgres
from tests.bench.cells import Bench, Measured, pids
from tests.bench.crew import BenchBroken, billed
from tests.bench.jobs import Place, Spend, StayConnected
from tests.bench.ledgers import Ledger, Trees
from tests.server import RunningServer

_FILL_SECONDS = 30.0
"""How long it is filled before it is counted again."""
_FILLERS = 1_000
_FILLING = 2
"""Client processes: while one works, the server has something of the other's."""
_FILL_SECONDS_MAX = 3_600.0
COPIED_ENTRIES_MAX = 200_000
"""A ledger of up to so many entries is measured as a fresh copy each time: to measure makes it grow."""
_ANSWER_SECONDS_MAX = 180.0
_LOAD_SECONDS_MAX = 1.0
"""How long something is written before a death."""
_MB = 2**20

Tell = Callable[[str], None]


@dataclass
class Grown:
    """A ledger as it was when it had so many entries, and the agents that made them."""

    wanted: int
    entries: int
    ledger: Ledger
    places: Sequence[Place]
    repetitions: list[Measured] = field(default_factory=list)


def grow(bench: Bench, sizes: Sequence[int], agents: int, tell: Tell) -> list[Grown]:
    """Fill one ledger by reserving and settling, and keep a copy of it at each size but the last.

    All entries are in one tree, and so in one lane: the partitions of that lane are as large as they get.
    """
    ledger = Ledger.made(bench.postgres, "growth")
    grown: list[Grown] = []
    places: list[Place] = []
    for size in sorted(sizes):
        with ledger.serving() as [server]:
            if not places:
                places = Trees(server.address, 1).children("grown", max(agents, _fillers(sizes)))
            _fill(bench, ledger, server, places, size, tell)
        # Otherwise it would do so while this size is measured, and not the smaller ones.
        ledger.vacuum()
        entries = ledger.entries
        kept = ledger.copied(f"growth_{size}") if size != max(sizes) else ledger
        grown.append(Grown(size, entries, kept, places[:agents]))
        tell(f"growth: {entries} entries")
    return grown


def _fillers(sizes: Sequence[int]) -> int:
    return min(_FILLERS, max(sizes) // 20)


def _fill(
    bench: Bench,
    ledger: Ledger,
    server: RunningServer,
    places: Sequence[Place],
    size: int,
    tell: Tell,
) -> None:
    deadline = time.monotonic() + _FILL_SECONDS_MAX
    entries, per_s = ledger.entries, 1_000.0
    while entries < size:
        if time.monotonic() > deadline:
            raise BenchBroken(f"after an hour there are {entries} entries")
        seconds = min(_FILL_SECONDS, max(0.2, (size - entries) / per_s))
        jobs = [
            Spend(server.address, places[number::_FILLING], len(places) // _FILLING)
            for number in range(_FILLING)
        ]
        begun = time.monotonic()
        counted, _ = bench.crew.work(jobs, warm_up=0.0, seconds=seconds)
        ledger.billed.update(billed(counted))
        before, entries = entries, ledger.entries
        per_s = max(100.0, (entries - before) / (time.monotonic() - begun))
        tell(f"growth: {entries} of {size} entries, {per_s:.0f} a second")


def measure(bench: Bench, grown: Grown, repetition: int) -> None:
    """Measure at this size, once."""
    small = grown.entries <= COPIED_ENTRIES_MAX
    ledger = grown.ledger.copied(f"{grown.ledger.database}_now") if small else grown.ledger
    with ledger.serving() as [server]:
        job = Spend(server.address, grown.places, len(grown.places))
        measured = bench.work([job], ledger=ledger, servers=pids([server]))
    problems = ledger.wrong()
    grown.repetitions.append(
        {
            "repetition": repetition,
            **measured,
            "mismatches": len(problems),
            "problems": problems[:5],
        }
    )
    if small:
        bench.postgres.drop(ledger.database)


def disk(grown: Grown) -> dict[str, Any]:
    """Bytes on disk, by table and for each operation."""
    grown.ledger.vacuum()
    sizes = grown.ledger.bytes_on_disk()
    operations = grown.ledger.operations
    return {
        "operations": operations,
        "entries": grown.ledger.entries,
        "bytes": sizes,
        "bytes_per_operation": round(sum(sizes.values()) / operations, 1),
    }


def memory(bench: Bench, connections: int, processes: int) -> dict[str, Any]:
    """What a server's memory is with many clients connected, each of which has asked for something."""
    with bench.ledger.serving() as [server]:
        [place] = bench.trees.shared("everybodys")
        own = psutil.Process(server.process.pid)
        before = own.memory_info().rss
        each = connections // processes
        jobs = [StayConnected(server.address, place, each) for _ in range(processes)]
        with bench.crew.stay(jobs):
            connected = sum(
                connection.status == psutil.CONN_ESTABLISHED
                for connection in own.net_connections(kind="tcp")
            )
            after = own.memory_info().rss
    return {
        "connections": connected,
        "server_rss_mb_before": round(before / _MB, 1),
        "server_rss_mb": round(after / _MB, 1),
        "kb_per_connection": round((after - before) / 1024 / max(1, connected), 1),
    }


def start_up(bench: Bench) -> Measured:
    """How long a server takes from its start to the first Reserve that it has answered."""
    begun = time.monotonic()
    with bench.ledger.serving() as [server]:
        listening = time.monotonic() - begun
        asyncio.run(_first_answer(server.address, bench.trees.shared("everybodys")[0]))
        return {"listening_s": round(listening, 3), "answer_s": round(time.monotonic() - begun, 3)}


def server_killed(bench: Bench) -> Measured:
    """How long after a server's death by SIGKILL, under load, another one answers in its place."""
    with bench.ledger.serving() as [server]:
        _load(bench, server)
        begun = time.monotonic()
        server.kill()
    with bench.ledger.serving() as [server]:
        asyncio.run(_first_answer(server.address, bench.trees.shared("everybodys")[0]))
        return {"answer_s": round(time.monotonic() - begun, 3)}


def postgres_killed(bench: Bench) -> Measured:
    """How long after PostgreSQL's death by SIGKILL a server that went on running answers again."""
    _load(bench, bench.server)
    postmaster = psutil.Process(bench.postgres.pid)
    data = bench.postgres.server
    begun = time.monotonic()
    postmaster.kill()
    postmaster.wait(_ANSWER_SECONDS_MAX)
    # Counted as gone, so that the next start finds nobody in its place.
    data.stop()
    bench.postgres.server = EmbeddedPostgres.start(bench.postgres.folder / "postgres")
    started = time.monotonic() - begun
    bench.log_seen = 0
    asyncio.run(_first_answer(bench.server.address, bench.trees.shared("everybodys")[0]))
    return {"postgres_s": round(started, 3), "answer_s": round(time.monotonic() - begun, 3)}


def _load(bench: Bench, server: RunningServer) -> None:
    """Have something written just before a death; what was billed by then is settled."""
    job = Spend(server.address, bench.trees.shared("everybodys"), 50)
    seconds = min(_LOAD_SECONDS_MAX, bench.times.seconds)
    counted, _ = bench.crew.work([job], warm_up=0.0, seconds=seconds)
    bench.ledger.billed.update(counted[0].billed)


async def _first_answer(address: str, place: Place) -> None:
    """Ask until there is an answer, and give back what it has reserved."""
    deadline = time.monotonic() + _ANSWER_SECONDS_MAX
    async with aio.connect(address, timeout=_ANSWER_SECONDS_MAX) as client:
        while True:
            try:
                budget = await client.open(place.path)
                hold = await budget.reserve(1)
                await hold.release()
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.01)
            else:
                return
