"""Counters as most would write them: check and then add, reserve and refund in memory or in Redis, an equal split.

The name of a counter is all the authority there is: whoever knows it spends from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import psutil
import psycopg
import psycopg.conninfo

from peculium_server.embedded import EmbeddedPostgres
from tests.bench.ledgers import Postgres
from tests.faults.proxy import Proxy
from tests.replay.agents import Gate, Seat
from tests.replay.contestants import (
    ROOT,
    Contestant,
    CounterGate,
    Store,
    proxied,
    twice,
)
from tests.replay.plays import CHILD, PARENT, PARENTS_PARTS, PROCESSES, Custody, Scenario
from tests.replay.pool import Pool

_START_SECONDS_MAX = 60.0
_CONNECTIONS_MAX = 4


@dataclass(frozen=True)
class Budgets:
    """A trial's counters, and who spends from which."""

    made: Mapping[str, int]
    """What is in them at first, by name."""
    names: Sequence[str]
    """By process, the one that it spends from."""
    shares: Sequence[int | None]
    """By process, what it takes out of it at once and keeps in its memory; None: it asks for each call."""

    @classmethod
    def of(cls, trial: str, scenario: Scenario) -> Budgets:
        """As the scenario has it."""
        cap = scenario.cap
        made, names = {trial: cap}, [trial] * PROCESSES
        shares: list[int | None] = [None] * PROCESSES
        if scenario.custody is Custody.SHARES:
            shares = [cap // PROCESSES] * PROCESSES
        elif scenario.custody is Custody.GIVEN:
            shares = [None if process == PARENT else cap // PARENT for process in range(PROCESSES)]
        elif scenario.custody is Custody.COPIED:
            names[CHILD] = f"{trial}/child"
            made = {trial: cap * (PARENTS_PARTS - 1), names[CHILD]: cap}
        return cls(made, names, shares)


# --- check, then add ---

_COUNTERS = (
    "CREATE TABLE counters (name text PRIMARY KEY, cap bigint NOT NULL, spent bigint NOT NULL)"
)


class CheckThenAdd(Contestant):
    """N1: what was spent is read before a call, and added to after it."""

    name = "check-then-add"
    title = "N1: check, then add, in PostgreSQL"

    def __init__(self, postgres: Postgres) -> None:
        super().__init__()
        self._postgres = postgres
        self._dsn = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Make the table."""
        self._dsn = self._postgres.create("counters")
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(_COUNTERS)
        found = psycopg.conninfo.conninfo_to_dict(self._dsn)
        target = f"{found['host']}/.s.PGSQL.{found.get('port', 5432)}"
        async with Proxy(target, Random(0)) as self.proxy:
            yield

    async def seats(self, trial: str, scenario: Scenario) -> Sequence[Seat]:
        """Make a row; shares are not known to it."""
        budgets = Budgets.of(trial, scenario)
        for name, cap in budgets.made.items():
            await self._do("INSERT INTO counters VALUES (%s, %s, 0)", (name, cap))
        dsn = self._dsn
        if proxied(scenario):
            assert self.proxy is not None
            port = str(self.proxy.port)
            dsn = psycopg.conninfo.make_conninfo(
                dsn, host="127.0.0.1", port=port, sslmode="disable"
            )
        return [CheckThenAddSeat(dsn, name) for name in budgets.names]

    async def left(self, trial: str) -> int | None:
        """What is not spent."""
        return await self._do("SELECT cap - spent FROM counters WHERE name = %s", (trial,))

    async def kill(self) -> None:
        """Kill PostgreSQL, and start it again."""
        await asyncio.to_thread(restart, self._postgres)

    async def revoke(self, trial: str) -> None:
        """Take away what is not spent."""
        await self._do("UPDATE counters SET cap = 0 WHERE name = %s", (trial,))

    async def _do(self, query: str, values: Sequence[Any]) -> int | None:
        async with await psycopg.AsyncConnection.connect(self._dsn, autocommit=True) as connection:
            cursor = await connection.execute(query.encode(), values)
            row = await cursor.fetchone() if cursor.description else None
        return None if row is None else int(row[0])


def restart(postgres: Postgres) -> None:
    """Kill a PostgreSQL, and have it back."""
    postmaster = psutil.Process(postgres.pid)
    postmaster.kill()
    postmaster.wait(_START_SECONDS_MAX)
    # Counted as gone, so that the next start finds nobody in its place.
    postgres.server.stop()
    postgres.server = EmbeddedPostgres.start(postgres.folder / "postgres", settings=postgres.told)


@dataclass(frozen=True)
class CheckThenAddSeat:
    """Where the row is."""

    dsn: str
    trial: str

    @asynccontextmanager
    async def sit(self, process: int) -> AsyncIterator[Gate]:
        """Use the process's connections."""
        del process
        yield CounterGate(_Row(_pools.setdefault(self.dsn, _Connections(self.dsn)), self.trial))


class _Connections:
    """A small pool."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._free: list[psycopg.AsyncConnection] = []
        self._turns = asyncio.Semaphore(_CONNECTIONS_MAX)

    async def do(self, query: str, values: Sequence[Any]) -> tuple[Any, ...] | None:
        async with self._turns:
            connection = self._free.pop() if self._free else None
            if connection is None:
                connection = await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)
            try:
                cursor = await connection.execute(query.encode(), values)
                row = await cursor.fetchone() if cursor.description else None
            except BaseException:
                # Others that are idle are likely to be lost as well.
                for lost in (connection, *self._free):
                    await lost.close()
                self._free.clear()
                raise
            self._free.append(connection)
            return row


_pools: dict[str, _Connections] = {}


@dataclass
class _Row(Store):
    connections: _Connections
    trial: str

    async def ask(self, estimate: int, agent: str) -> bool:
        query = "SELECT spent + %s <= cap FROM counters WHERE name = %s"
        row = await self._do(query, (estimate, self.trial))
        return row is not None and bool(row[0])

    async def book(self, estimate: int, actual: int, agent: str) -> None:
        query = "UPDATE counters SET spent = spent + %s WHERE name = %s"
        await self._do(query, (actual, self.trial))

    async def _do(self, query: str, values: Sequence[Any]) -> tuple[Any, ...] | None:
        return await twice(lambda: self.connections.do(query, values), psycopg.Error, OSError)


# --- reserve and refund ---


class Counter(ABC):
    """Where a reserve-and-refund counter is kept, as agents and campaign reach it."""

    @abstractmethod
    async def do(self, verb: str, name: str, amount: int) -> int:
        """Make it, reserve, refund or stop: what is available then, below zero for a refusal."""


@dataclass
class _Reserved(Store):
    """Reserves the estimate, and gives back what was not used."""

    counter: Counter
    trial: str

    async def ask(self, estimate: int, agent: str) -> bool:
        return await self.counter.do("reserve", self.trial, estimate) >= 0

    async def book(self, estimate: int, actual: int, agent: str) -> None:
        await self.counter.do("refund", self.trial, estimate - actual)


class Locked(Contestant):
    """N2: reserve and refund under a lock, in the memory of one process."""

    name = "locked counter"
    title = "N2: reserve and refund, in one process"

    def __init__(self) -> None:
        super().__init__()
        self._processes: list[subprocess.Popen[str]] = []
        self._ports: list[int] = []
        self._caps: dict[str, int] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start two of them; the second is for replicas only."""
        try:
            for _ in range(2):
                self._start(0)
            async with Proxy(f"127.0.0.1:{self._ports[0]}", Random(0)) as self.proxy:
                yield
        finally:
            for process in self._processes:
                process.kill()
                process.communicate()

    async def seats(self, trial: str, scenario: Scenario) -> Sequence[Seat]:
        """Make a counter; in each replica, where there are two."""
        budgets = Budgets.of(trial, scenario)
        self._caps.update(budgets.made)
        for port in self._ports:
            for name, cap in budgets.made.items():
                await _line(port).do("make", name, cap)
        ports = [self._ports[0]] * PROCESSES
        if proxied(scenario):
            assert self.proxy is not None
            ports = [self.proxy.port] * PROCESSES
        elif scenario.custody is Custody.REPLICAS:
            ports = [self._ports[process % 2] for process in range(PROCESSES)]
        return [
            LockedSeat(*each) for each in zip(ports, budgets.names, budgets.shares, strict=True)
        ]

    async def left(self, trial: str) -> int | None:
        """What is available in the first of them."""
        return await _line(self._ports[0]).do("look", trial, 0)

    async def kill(self) -> None:
        """Kill it. It starts again with what is configured."""
        process = self._processes[0]
        process.kill()
        process.communicate()
        del self._processes[0]
        self._start(self._ports.pop(0), first=True)
        for trial, cap in self._caps.items():
            await _line(self._ports[0]).do("make", trial, cap)

    async def revoke(self, trial: str) -> None:
        """Leave nothing to be reserved."""
        await _line(self._ports[0]).do("stop", trial, 0)

    def _start(self, port: int, *, first: bool = False) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.replay.pool", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None
        place = 0 if first else len(self._processes)
        self._processes.insert(place, process)
        self._ports.insert(place, int(process.stdout.readline()))


@dataclass(frozen=True)
class LockedSeat:
    """Where the counter is."""

    port: int
    trial: str
    share: int | None

    @asynccontextmanager
    async def sit(self, process: int) -> AsyncIterator[Gate]:
        """Use the process's connection; take the share, if there are shares, and bring the rest back."""
        del process
        async with taken(_line(self.port), self.trial, self.share) as store:
            yield CounterGate(store)


@asynccontextmanager
async def taken(counter: Counter, trial: str, share: int | None) -> AsyncIterator[Store]:
    if share is None:
        yield _Reserved(counter, trial)
        return
    own = _Memory()
    taken = await counter.do("reserve", trial, share) >= 0
    await own.do("make", trial, share if taken else 0)
    yield _Reserved(own, trial)
    await counter.do("refund", trial, await own.do("look", trial, 0))


class _Memory(Counter):
    """In this process's memory."""

    def __init__(self) -> None:
        self._pool = Pool()

    async def do(self, verb: str, name: str, amount: int) -> int:
        return self._pool.do(verb, name, amount)


class _Line(Counter):
    """A connection to a `pool`, which any number of agents share."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()

    async def do(self, verb: str, name: str, amount: int) -> int:
        return await twice(lambda: self._ask(verb, name, amount), OSError)

    async def _ask(self, verb: str, name: str, amount: int) -> int:
        async with self._connecting:
            if self._writer is None:
                reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
                self._reading = asyncio.create_task(self._read(reader))
        number = next(self._numbers)
        write(self._writer, json.dumps([number, verb, name, amount]).encode() + b"\n")
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        return int(await answer)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                number, answer = json.loads(line)
                self._waiting.pop(number).set_result(answer)
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionResetError())
        self._waiting.clear()


def write(writer: asyncio.StreamWriter, content: bytes) -> None:
    """Send something, and raise what lost connections raise if it cannot be sent."""
    if writer.is_closing():
        raise ConnectionResetError
    writer.write(content)


_lines: dict[int, _Line] = {}


def _line(port: int) -> _Line:
    return _lines.setdefault(port, _Line(port))


# --- a static split ---


class EqualSplit(Contestant):
    """N3: each agent has an equal part, and asks nobody."""

    name = "equal split"
    title = "N3: an equal part for each agent"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """It needs nothing."""
        yield

    async def seats(self, trial: str, scenario: Scenario) -> Sequence[Seat]:
        """Divide, also what is handed out twice, and once more by whoever is handed it."""
        by_process = [
            max(sum(agent.process == process for agent in act.agents) for act in scenario.acts)
            for process in range(PROCESSES)
        ]
        parts = [scenario.cap] * PROCESSES
        among = [max(len(act.agents) for act in scenario.acts)] * PROCESSES
        if scenario.custody is Custody.TWICE:
            among = by_process
        elif scenario.custody is Custody.GIVEN:
            parts[PARENT], among = 0, [sum(by_process[:PARENT])] * PROCESSES
        elif scenario.custody is Custody.COPIED:
            parts = [scenario.cap * (PARENTS_PARTS - 1)] * PROCESSES
            parts[CHILD], among = scenario.cap, by_process
        return [
            EqualSplitSeat(trial, part // max(each, 1))
            for part, each in zip(parts, among, strict=True)
        ]


@dataclass(frozen=True)
class EqualSplitSeat:
    """Each agent's part."""

    trial: str
    part: int

    @asynccontextmanager
    async def sit(self, process: int) -> AsyncIterator[Gate]:
        """Ask nobody."""
        del process
        yield CounterGate(_Parts(self.trial, self.part))


class _Parts(Store):
    """The parts of this process's agents, in its memory."""

    def __init__(self, trial: str, part: int) -> None:
        self._trial = trial
        self._part = part

    async def ask(self, estimate: int, agent: str) -> bool:
        return await self._do("reserve", agent, estimate) >= 0

    async def book(self, estimate: int, actual: int, agent: str) -> None:
        await self._do("refund", agent, estimate - actual)

    async def _do(self, verb: str, agent: str, amount: int) -> int:
        name = f"{self._trial}/{agent}"
        await _memory.do("make", name, self._part)
        return await _memory.do(verb, name, amount)


_memory = _Memory()
