"""The cells of a run: each is set up once and then measured in every repetition, in turn with all others."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psycopg

from tests.bench.crew import BenchBroken, Crew, Spans, billed
from tests.bench.jobs import (
    BATCHES_AT_ONCE,
    ROW_LOCK_SCHEMA,
    CallNothing,
    Commit,
    Counted,
    Job,
    Place,
    Redis,
    RowLock,
    Spend,
    SpendAlone,
)
from tests.bench.ledgers import Ledger, Postgres, Trees, programs
from tests.server import RunningServer

PGBENCH_SCALE = 10
_PROGRAM_SECONDS_MAX = 300.0
_TPS = re.compile(r"^tps = ([\d.]+) \(without initial connection time\)$", re.MULTILINE)
_LATENCY = re.compile(r"^latency average = ([\d.]+) ms$", re.MULTILINE)
_REDIS = ("redis-server", "valkey-server")

Measured = dict[str, Any]


@dataclass
class Times:
    """How long things are measured."""

    warm_up: float
    seconds: float


@dataclass
class Bench:
    """Everything that cells share."""

    postgres: Postgres
    crew: Crew
    times: Times
    ledger: Ledger
    server: RunningServer
    trees: Trees
    empty: tuple[str, int]
    """Address and process id of the server that does nothing."""
    open_: contextlib.ExitStack
    """What has to end with the run."""
    agents_max: int
    """The largest number of agents in a cell, for which one tree is made."""
    log_seen: int = 0

    def work(
        self,
        jobs: Sequence[Job],
        *,
        ledger: Ledger | None = None,
        servers: Sequence[int] = (),
        turns: int = 1,
    ) -> Measured:
        """Have jobs done at once: what came of it.

        Args:
            jobs: One for each client process.
            ledger: Which they spend from.
            servers: Process ids of the servers, whose use of the processors is told.
            turns: How many of what is counted a turn is.
        """
        _, self.log_seen = self.postgres.conflicts(self.log_seen)
        watched: dict[str, Sequence[int]] = {
            "server": servers,
            "postgres": [self.postgres.pid],
        }
        counted, spans = self.crew.work(
            jobs, warm_up=self.times.warm_up, seconds=self.times.seconds, watched=watched
        )
        if ledger is not None:
            ledger.billed.update(billed(counted))
        conflicts, self.log_seen = self.postgres.conflicts(self.log_seen)
        return {**summary(counted, spans, self.times.seconds, turns), **conflicts}


def summary(counted: Sequence[Counted], spans: Spans, seconds: float, turns: int = 1) -> Measured:
    """The figures of one window."""
    latencies = array("d")
    for one in counted:
        latencies.extend(one.latencies)
    done = sum(one.turns for one in counted) * turns
    clients = [one.cpu_seconds / seconds for one in counted]
    return {
        "count": round(done),
        "per_s": round(done / seconds, 2),
        **percentiles(latencies),
        "cpu": {
            "clients": round(sum(clients), 3),
            "client_max": round(max(clients, default=0.0), 3),
            **{name: round(used / seconds, 3) for name, used in spans.cpu_seconds.items()},
        },
    }


def percentiles(latencies: Sequence[float]) -> dict[str, float | None]:
    """In milliseconds, by nearest rank."""
    names = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}
    if not latencies:
        return dict.fromkeys(names)
    ranked = sorted(latencies)
    return {
        name: round(1000 * ranked[min(len(ranked) - 1, int(part * len(ranked)))], 3)
        for name, part in names.items()
    }


def pids(servers: Sequence[RunningServer]) -> list[int]:
    """The processes of servers."""
    return [server.process.pid for server in servers]


@dataclass
class Cell(ABC):
    """One thing to be measured."""

    name: str
    part: str

    def prepare(self, bench: Bench) -> None:  # noqa: B027 - most need nothing
        """Set up, once."""

    @abstractmethod
    def measure(self, bench: Bench) -> Measured:
        """Measure, once."""


def share(places: Sequence[Place], agents: int, processes: int) -> Iterator[Sequence[Place]]:
    """The places of each process's agents; a single place is everybody's."""
    for number in range(processes):
        yield places if len(places) == 1 else places[:agents][number::processes]


@dataclass
class Stack(Cell):
    """Ours: agents that reserve and settle as fast as they can."""

    agents: int
    trees: Literal["one root", "own roots", "shared"]
    """Each has a budget of its own, below one root or as a root; or all use the same."""
    coalesced: bool = True
    processes: int = 1
    servers: int = 1

    def measure(self, bench: Bench) -> Measured:
        """Measure, with servers of its own if it needs more than one."""
        places = self._places(bench)
        kind = Spend if self.coalesced else SpendAlone
        with contextlib.ExitStack() as open_:
            servers = [bench.server]
            if self.servers > 1:
                servers += open_.enter_context(bench.ledger.serving(self.servers - 1))
            jobs = [
                kind(servers[number % len(servers)].address, part, self.agents // self.processes)
                for number, part in enumerate(share(places, self.agents, self.processes))
            ]
            return bench.work(jobs, ledger=bench.ledger, servers=pids(servers))

    def prepare(self, bench: Bench) -> None:
        """Make the budgets, and start the clients."""
        self._places(bench)
        bench.crew.grow(self.processes)

    def _places(self, bench: Bench) -> Sequence[Place]:
        if self.trees == "shared":
            return bench.trees.shared("everybodys")
        if self.trees == "one root":
            return bench.trees.children("one", bench.agents_max)[: self.agents]
        return bench.trees.roots("own", self.agents)


@dataclass
class Lanes(Cell):
    """Agents in two client processes, on one tree or on two of different lanes."""

    agents: int
    lanes: int
    servers: int = 1

    def measure(self, bench: Bench) -> Measured:
        """Measure."""
        half = self.agents // 2
        first, second = self._trees(bench)
        with contextlib.ExitStack() as open_:
            servers = [bench.server]
            if self.servers > 1:
                servers += open_.enter_context(bench.ledger.serving(self.servers - 1))
            jobs = [
                Spend(servers[0].address, first[:half], half),
                Spend(servers[-1].address, second[-half:], half),
            ]
            return bench.work(jobs, ledger=bench.ledger, servers=pids(servers))

    def prepare(self, bench: Bench) -> None:
        """Make the trees."""
        self._trees(bench)

    def _trees(self, bench: Bench) -> tuple[Sequence[Place], Sequence[Place]]:
        one = bench.trees.children("lane-one", self.agents)
        other = bench.trees.children("lane-other", self.agents, other_lane_than="lane-one")
        return (one, one) if self.lanes == 1 else (one, other)


@dataclass
class Tree(Cell):
    """A constant number of agents at work at once, in a tree of some size or on a level of it."""

    working: int
    budgets: int
    depth: int = 2

    def measure(self, bench: Bench) -> Measured:
        """Measure."""
        job = Spend(bench.server.address, self._places(bench), self.working)
        return bench.work([job], ledger=bench.ledger, servers=pids([bench.server]))

    def prepare(self, bench: Bench) -> None:
        """Make the tree."""
        self._places(bench)

    def _places(self, bench: Bench) -> Sequence[Place]:
        return bench.trees.deep(f"tree-{self.depth}-{self.budgets}", self.depth, self.budgets)


# --- what it is compared with ---


@dataclass
class Empty(Cell):
    """The transport alone: a handler that does nothing."""

    callers: int
    operations: int = 0
    """Whose bytes each call carries; 0: a Reserve as ours, with its messages."""

    def measure(self, bench: Bench) -> Measured:
        """Measure."""
        job = CallNothing(bench.empty[0], self.callers, self.operations)
        return bench.work([job], servers=[bench.empty[1]], turns=self.operations or 1)


@dataclass
class Pgbench(Cell):
    """PostgreSQL's own simple transactions, by its own program, which has no warm-up."""

    scale: int
    clients: int = 16
    dsn: str = ""

    def prepare(self, bench: Bench) -> None:
        """Make the tables."""
        self.dsn = bench.postgres.create("pgbench")
        _run(programs() / "pgbench", "-i", "-q", "-s", str(self.scale), self.dsn)

    def measure(self, bench: Bench) -> Measured:
        """Measure."""
        seconds = max(1, round(bench.times.seconds))
        said = _run(
            *(programs() / "pgbench", "-N", "-M", "prepared", "-n"),
            *("-c", str(self.clients), "-j", "2", "-T", str(seconds), self.dsn),
        )
        tps, latency = _TPS.search(said), _LATENCY.search(said)
        if tps is None or latency is None:
            raise BenchBroken(f"pgbench said: {said}")
        return {"per_s": float(tps[1]), "mean_ms": float(latency[1])}


@dataclass
class RowLocks(Cell):
    """A ledger as most would write it: a row lock, an update, an insert and a commit per operation."""

    tasks: int
    hot: bool
    processes: int = 1

    def measure(self, bench: Bench) -> Measured:
        """Measure."""
        dsn = bench.postgres.url_of("rowlock")
        rows = [0 if self.hot else number for number in range(self.tasks)]
        jobs = [RowLock(dsn, rows[number :: self.processes]) for number in range(self.processes)]
        return bench.work(jobs)

    def prepare(self, bench: Bench) -> None:
        """Make the tables."""
        _make_row_lock(bench.postgres)


@dataclass
class Commits(Cell):
    """One PostgreSQL commit after the other."""

    def measure(self, bench: Bench) -> Measured:
        """Measure."""
        return bench.work([Commit(bench.postgres.url_of("rowlock"))])

    def prepare(self, bench: Bench) -> None:
        """Make the tables."""
        _make_row_lock(bench.postgres)


def _make_row_lock(postgres: Postgres) -> None:
    with (
        contextlib.suppress(psycopg.errors.DuplicateDatabase),
        psycopg.connect(postgres.create("rowlock"), autocommit=True) as connection,
    ):
        connection.execute(ROW_LOCK_SCHEMA)


@dataclass
class RedisCounter(Cell):
    """A counter checked by a script in Redis, which syncs its log before it answers."""

    connections: int
    pairs: int
    """That each connection has on their way at once."""
    path: str = ""
    pid: int = 0

    def prepare(self, bench: Bench) -> None:
        """Start the server."""
        program = redis_program()
        assert program is not None
        folder = Path(tempfile.mkdtemp(prefix="peculium-bench-"))
        bench.open_.callback(shutil.rmtree, folder, ignore_errors=True)
        self.path = str(folder / "socket")
        process = subprocess.Popen(
            [
                *(program, "--port", "0", "--unixsocket", self.path, "--dir", str(folder)),
                *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        bench.open_.enter_context(process)
        bench.open_.callback(process.kill)
        self.pid = process.pid
        _wait_until(lambda: Path(self.path).exists(), "redis does not start")

    def measure(self, bench: Bench) -> Measured:
        """Measure."""
        job = Redis(self.path, self.connections, self.pairs)
        return bench.work([job], servers=[self.pid], turns=self.pairs)


def redis_program() -> str | None:
    """Where a Redis is, if there is one."""
    return next(filter(None, map(shutil.which, _REDIS)), None)


def _run(*words: object) -> str:
    done = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        timeout=_PROGRAM_SECONDS_MAX,
        check=False,
    )
    if done.returncode:
        raise BenchBroken(f"{words[0]} failed: {done.stderr}")
    return done.stdout


def _wait_until(condition: Callable[[], bool], otherwise: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchBroken(otherwise)
        time.sleep(0.02)


# --- all of them ---

AGENTS = (1, 10, 50, 200, 1_000)


def all_cells(*, small: bool) -> list[Cell]:
    """The cells that are measured in turn; few and small ones for a look whether all that runs."""
    agents: Sequence[int] = (1, 20) if small else AGENTS
    processes = 4 if small else 200
    many = agents[-1] if small else 200
    cells: list[Cell] = [
        *(Stack(f"one root, {n} agents", "stack", n, "one root") for n in agents),
        *(Stack(f"own roots, {n} agents", "stack", n, "own roots") for n in agents),
        *(Stack(f"shared root, {n} agents", "stack", n, "shared") for n in agents),
        Stack(f"two clients, one root, {many} agents", "stack", many, "one root", processes=2),
        Stack(
            f"two clients, own roots, {agents[-1]} agents",
            *("stack", agents[-1], "own roots"),
            processes=2,
        ),
        *(
            Stack(f"unary, one root, {n} agents", "unary", n, "one root", coalesced=False)
            for n in agents
        ),
        *(
            Stack(f"unary, own roots, {n} agents", "unary", n, "own roots", coalesced=False)
            for n in agents
        ),
        Stack(
            f"cluster, one root, {processes} processes",
            *("cluster", processes, "one root", True, processes, 2),
        ),
        Stack(
            f"cluster, shared root, {processes} processes",
            *("cluster", processes, "shared", True, processes, 2),
        ),
        *(Empty(f"empty handler, {n} callers", "baselines", n) for n in agents[1:4]),
        Empty("bytes to the empty handler", "baselines", 50, 1),
        Empty("batches to the empty handler", "baselines", 4, BATCHES_AT_ONCE),
        Pgbench("pgbench", "baselines", 1 if small else PGBENCH_SCALE),
        *(
            RowLocks(f"row locks, {name}, {tasks} tasks", "baselines", tasks, hot, processes)
            for hot, name in ((True, "hot"), (False, "spread"))
            for tasks, processes in ((16, 1), (48, 2))
        ),
    ]
    if redis_program() is not None:
        cells += [
            RedisCounter("redis, not pipelined", "baselines", 50, 1),
            RedisCounter("redis, pipelined", "baselines", 4, 50),
        ]
    cells += [
        Stack("unloaded, Reserve", "unloaded", 1, "one root"),
        Empty("unloaded, empty call", "unloaded", 1),
        Commits("unloaded, commit", "unloaded"),
        Lanes("one lane", "lanes", many, 1),
        Lanes("two lanes", "lanes", many, 2),
        Lanes("two lanes, two servers", "lanes", many, 2, 2),
        *(
            Tree(f"tree of {n} agents", "trees", min(n, many), n)
            for n in ((10, 30) if small else (10, 100, 1_000, 10_000))
        ),
        *(
            Tree(f"depth {depth}", "depth", 20 if small else 50, 20 if small else 50, depth)
            for depth in ((2, 4) if small else (1, 2, 4, 8, 16))
        ),
    ]
    return cells


def in_turn(cells: Sequence[Cell]) -> list[Cell]:
    """In which order a repetition measures them.

    A machine's speed changes within minutes. So whatever is compared is measured close together: pgbench, row
    locks and Redis among the cells of many coalesced agents, and empty calls among those that travel alone.
    """

    def place(cell: Cell) -> tuple[int, float]:
        match cell:
            case Stack(part="stack", agents=agents):
                return 0, agents
            case RowLocks(tasks=tasks):
                return 0, tasks
            case Pgbench() | RedisCounter():
                return 0, AGENTS[-1] - 1
            case Stack(part="unary", agents=agents):
                return 1, agents
            case Empty(part="baselines", callers=callers):
                return 1, callers
            case _:
                return 2, 0

    return sorted(cells, key=place)
