"""What a client process does while it is measured: the same closed loop for everything that is compared.

A job makes *turns*, one for each agent or task. Each is taken again and again, as soon as the one before
is done, and tells how long the part of it took that is of interest.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import grpc
import psycopg

from peculium import BudgetRef, _requests as requests, aio
from peculium._requests import Asked, HoldTarget, Target
from peculium.aio import Budget, Client
from peculium.v1 import ledger_service_pb2 as ledger, ledger_service_pb2_grpc

ESTIMATE = 20
"""What a Reserve asks for; a call costs from 1 to this."""
TIMEOUT_SECONDS = 60.0
"""Of one operation: beyond anything that is not broken."""
_TAKEN_AT_ONCE = 250
"""How many budgets a process takes over before it goes on to the next."""
BATCHES_AT_ONCE = 50
"""How many operations a client of the empty handler puts into one call, where it does."""
EMPTY = "peculium.bench.Empty"
"""The service of the handler that does nothing, for bytes."""
LEDGER = "peculium.v1.LedgerService"
"""As which it takes a Reserve, too."""

Turn = Callable[[], Awaitable[float | None]]
"""Something to be done over and over: in seconds, how long it took as its caller sees it; None if it was
refused."""

clock = time.monotonic
"""The same for all processes of a machine."""


class Window(NamedTuple):
    """When it counts, on the clock."""

    begin: float
    end: float


@dataclass
class Counted:
    """What one process has done within a window."""

    turns: float = 0.0
    """Those that the window cuts by their part in it."""
    refused: float = 0.0
    latencies: array[float] = field(default_factory=lambda: array("d"))
    """In seconds, of each turn that ended within the window."""
    billed: Counter[bytes] = field(default_factory=Counter)
    """What the provider has billed by budget, before and after the window, too."""
    cpu_seconds: float = 0.0
    """What the process used of the processors within the window."""


class Job(Protocol):
    """Work for a client process. It is sent there, so it is data."""

    def ready(self) -> contextlib.AbstractAsyncContextManager[Sequence[Turn]]:
        """Prepare what is not to be measured; leaving takes it down again."""
        ...

    def billed(self) -> Counter[bytes]:
        """What a provider has billed for it, by budget."""
        ...


async def take_turns(turns: Sequence[Turn], window: Window, counted: Counted) -> None:
    """Let all take their turns at once until the window is over.

    Agents whose operations travel together end together, so few ends fall into a short window, and whether
    one more does is chance. So a turn counts by the part of it that lies within. Until the last of those
    that the window's end has cut is over, everybody goes on: otherwise it would have less beside it.
    """
    begin, end = window
    cut = len(turns)

    async def repeat(turn: Turn) -> None:
        nonlocal cut
        while (begun := clock()) < end:
            took = await turn()
            ended = clock()
            if begin <= begun and ended < end:
                part = 1.0
            else:
                part = max(0.0, min(ended, end) - max(begun, begin)) / (ended - begun)
            if took is None:
                counted.refused += part
            else:
                counted.turns += part
                if begin <= ended < end:
                    counted.latencies.append(took)
        cut -= 1
        while cut:
            await turn()

    async def use() -> None:
        await asyncio.sleep(begin - clock())
        before = time.process_time()
        await asyncio.sleep(end - clock())
        counted.cpu_seconds = time.process_time() - before

    async with asyncio.TaskGroup() as working:
        working.create_task(use())
        for turn in turns:
            working.create_task(repeat(turn))


class Place(NamedTuple):
    """A budget to spend from."""

    root_id: bytes
    budget_id: bytes
    path: str
    by_token: bool

    @property
    def ref(self) -> BudgetRef:
        """As the SDK names it."""
        return BudgetRef(self.path, self.root_id, self.budget_id)


def _costs() -> Iterator[int]:
    """What one call after the other costs."""
    return itertools.cycle(range(1, ESTIMATE + 1))


@dataclass
class Spend:
    """Agents of one process that reserve and settle through one SDK client, which coalesces."""

    address: str
    places: Sequence[Place]
    """One for each agent, or several, which it then uses in turn."""
    agents: int
    bill: Counter[bytes] = field(default_factory=Counter)

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[Sequence[Turn]]:
        """Connect, and take the budgets over: whoever had them before is fenced."""
        async with aio.connect(self.address, timeout=TIMEOUT_SECONDS) as client:
            budgets = await take(client, self.places)
            yield [
                self._turn(
                    itertools.cycle(
                        list(zip(self.places, budgets, strict=True))[number :: self.agents]
                        or [(self.places[0], budgets[0])]
                    )
                )
                for number in range(self.agents)
            ]

    def billed(self) -> Counter[bytes]:
        """What the provider has billed."""
        return self.bill

    def _turn(self, budgets: itertools.cycle[tuple[Place, Budget]]) -> Turn:
        costs, bill = _costs(), self.bill

        async def turn() -> float:
            place, budget = next(budgets)
            cost = next(costs)
            began = clock()
            hold = await budget.reserve(ESTIMATE)
            took = clock() - began
            bill[place.budget_id] += cost
            await hold.settle(cost)
            return took

        return turn


async def take(client: Client, places: Sequence[Place]) -> list[Budget]:
    """Take budgets over, some after the others: thousands at once would wait longer than one may."""
    taken: list[Budget] = []
    for first in range(0, len(places), _TAKEN_AT_ONCE):
        some = places[first : first + _TAKEN_AT_ONCE]
        taken += await asyncio.gather(*(_take(client, place) for place in some))
    return taken


async def _take(client: Client, place: Place) -> Budget:
    if place.by_token:
        return await client.recover(place.ref)
    return await client.open(place.path)


@dataclass
class SpendAlone:
    """Agents of one process whose operations travel alone: unary calls on the stubs over one channel.

    The SDK always coalesces what is asked at once. So its own builder makes the requests, and the stubs
    send them.
    """

    address: str
    places: Sequence[Place]
    agents: int
    bill: Counter[bytes] = field(default_factory=Counter)

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[Sequence[Turn]]:
        """Connect, and take the budgets over."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = ledger_service_pb2_grpc.LedgerServiceStub(channel)
            yield await asyncio.gather(
                *(
                    self._turn(stub, self.places[number % len(self.places)])
                    for number in range(self.agents)
                )
            )

    def billed(self) -> Counter[bytes]:
        """What the provider has billed."""
        return self.bill

    async def _turn(
        self, stub: ledger_service_pb2_grpc.LedgerServiceAsyncStub, place: Place
    ) -> Turn:
        target = Target(place.root_id, place.budget_id, by_token=place.by_token)
        secret: bytes | None = None
        if place.by_token:
            by_name = Target(place.root_id, place.budget_id, by_token=False)
            recovery = requests.recover(by_name, Asked())
            await stub.Recover(recovery.message.recover, timeout=TIMEOUT_SECONDS)
            secret = recovery.produced
        costs = _costs()

        async def turn() -> float:
            nonlocal secret
            cost = next(costs)
            began = clock()
            reserve = requests.reserve(target, Asked(), amount=ESTIMATE, ttl=None)
            if secret is not None:
                reserve.header.authority.secret = secret
            await stub.Reserve(reserve.message.reserve, timeout=TIMEOUT_SECONDS)
            took = clock() - began
            secret = reserve.produced
            self.bill[place.budget_id] += cost
            settle = requests.settle(
                HoldTarget(place.root_id, place.budget_id, reserve.hold_id),
                Asked(),
                actual=cost,
                keep_open=False,
                reference="",
                usage=None,
                estimated=False,
            )
            assert reserve.hold_secret is not None
            settle.header.authority.secret = reserve.hold_secret
            await stub.Settle(settle.message.settle, timeout=TIMEOUT_SECONDS)
            return took

        return turn


def reserve_bytes() -> bytes:
    """A Reserve of a token-held budget, as it travels."""
    target = Target(b"r" * 16, b"b" * 16, by_token=True)
    operation = requests.reserve(target, Asked(), amount=ESTIMATE, ttl=None)
    operation.header.authority.secret = b"s" * 32
    return operation.message.reserve.SerializeToString()


def batch_bytes(operations: int) -> bytes:
    """A batch of them, as it travels."""
    request = ledger.BatchRequest()
    for _ in range(operations):
        request.operations.add().reserve.ParseFromString(reserve_bytes())
    return request.SerializeToString()


@dataclass
class _NothingBilled:
    """A job that spends nothing."""

    def billed(self) -> Counter[bytes]:
        """Nothing."""
        return Counter()


@dataclass
class CallNothing(_NothingBilled):
    """Calls of a handler that does nothing.

    A Reserve as ours, with its messages on both sides; or the bytes of many operations, with no messages.
    """

    address: str
    callers: int
    operations: int = 0
    """Whose bytes each call carries; 0: a Reserve as ours."""

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[Sequence[Turn]]:
        """Connect."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            yield [self._bytes(channel) if self.operations else _reserve(channel)] * self.callers

    def _bytes(self, channel: grpc.aio.Channel) -> Turn:
        content = reserve_bytes() if self.operations == 1 else batch_bytes(self.operations)
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{EMPTY}/Call")

        async def turn() -> float:
            began = clock()
            await call(content, timeout=TIMEOUT_SECONDS)
            return clock() - began

        return turn


def _reserve(channel: grpc.aio.Channel) -> Turn:
    call = ledger_service_pb2_grpc.LedgerServiceStub(channel).Reserve
    request = ledger.ReserveRequest.FromString(reserve_bytes())

    async def turn() -> float:
        began = clock()
        await call(request, timeout=TIMEOUT_SECONDS)
        return clock() - began

    return turn


@dataclass
class StayConnected(_NothingBilled):
    """Clients with a connection each, which have asked for something once, and stay."""

    address: str
    place: Place
    connections: int

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[Sequence[Turn]]:
        """Connect all of them."""
        request = ledger.LedgerServiceGetBudgetRequest(authority=requests.authority(None))
        request.budget.root_id = self.place.root_id
        request.budget.budget_id = self.place.budget_id
        # Otherwise all channels of a process share one connection.
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with contextlib.AsyncExitStack() as open_:
            for _ in range(self.connections):
                channel = grpc.aio.insecure_channel(self.address, options=options)
                await open_.enter_async_context(channel)
                stub = ledger_service_pb2_grpc.LedgerServiceStub(channel)
                await stub.GetBudget(request, timeout=TIMEOUT_SECONDS)
            yield []


# --- a ledger as most would write it ---

ROW_LOCK_SCHEMA = """
    CREATE TABLE budgets (
        id bigint PRIMARY KEY, available bigint NOT NULL, held bigint NOT NULL, spent bigint NOT NULL);
    CREATE TABLE entries (
        id bigserial PRIMARY KEY, budget_id bigint NOT NULL, kind text NOT NULL, amount bigint NOT NULL,
        available bigint NOT NULL, held bigint NOT NULL, spent bigint NOT NULL,
        at timestamptz NOT NULL DEFAULT now());
    INSERT INTO budgets SELECT id, 1000000000000, 0, 0 FROM generate_series(0, 999) AS id;
"""
_LOOK = "SELECT available, held, spent FROM budgets WHERE id = %s FOR UPDATE"
_CHANGE = "UPDATE budgets SET available = %s, held = %s, spent = %s WHERE id = %s"
_NOTE = (
    "INSERT INTO entries (budget_id, kind, amount, available, held, spent)"
    " VALUES (%s, %s, %s, %s, %s, %s)"
)


@dataclass
class RowLock(_NothingBilled):
    """Tasks that reserve and settle with a lock on the budget's row, a transaction for each operation.

    Each task has a connection of its own, which is the most that a pool can do for it.
    """

    dsn: str
    rows: Sequence[int]
    """The budget of each task."""

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[Sequence[Turn]]:
        """Connect."""
        async with contextlib.AsyncExitStack() as open_:
            turns = []
            for row in self.rows:
                connection = await psycopg.AsyncConnection.connect(self.dsn)
                await open_.enter_async_context(connection)
                turns.append(self._turn(connection, row))
            yield turns

    def _turn(self, connection: psycopg.AsyncConnection, row: int) -> Turn:
        costs = _costs()

        async def operate(kind: str, hold: int, spend: int) -> None:
            async with connection.transaction():
                cursor = await connection.execute(_LOOK, (row,))
                found = await cursor.fetchone()
                assert found is not None
                available, held, spent = found
                if available < hold:
                    raise ValueError("exhausted")
                after = (available - hold - spend, held + hold, spent + spend)
                await connection.execute(_CHANGE, (*after, row))
                await connection.execute(_NOTE, (row, kind, hold or spend, *after))

        async def turn() -> float:
            cost = next(costs)
            began = clock()
            await operate("reserve", ESTIMATE, 0)
            took = clock() - began
            await operate("settle", -ESTIMATE, cost)
            return took

        return turn


@dataclass
class Commit(_NothingBilled):
    """One INSERT after the other over one connection, each of which commits."""

    dsn: str

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[Sequence[Turn]]:
        """Connect."""
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:

            async def turn() -> float:
                began = clock()
                await connection.execute(_NOTE, (0, "commit", 1, 2, 3, 4), prepare=True)
                return clock() - began

            yield [turn]


# --- a counter in Redis ---

_RESERVE = (
    "if tonumber(redis.call('GET', KEYS[1])) < tonumber(ARGV[1]) then return -1 end"
    " redis.call('INCRBY', KEYS[2], ARGV[1]) return redis.call('DECRBY', KEYS[1], ARGV[1])"
)
_SETTLE = (
    "redis.call('DECRBY', KEYS[2], ARGV[1]) redis.call('INCRBY', KEYS[3], ARGV[2])"
    " return redis.call('INCRBY', KEYS[1], ARGV[1] - ARGV[2])"
)


@dataclass
class Redis(_NothingBilled):
    """Connections that reserve and settle on one counter by scripts, many at once where pipelined."""

    path: str
    """Of the server's socket."""
    connections: int
    pairs: int
    """That each connection has on their way at once: a turn is as many pairs."""

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[Sequence[Turn]]:
        """Connect, and load the scripts."""
        async with contextlib.AsyncExitStack() as open_:
            turns = []
            for _ in range(self.connections):
                reader, writer = await asyncio.open_unix_connection(self.path)
                open_.callback(writer.close)
                scripts = []
                for script in (_RESERVE, _SETTLE):
                    writer.write(_command("SCRIPT", "LOAD", script))
                    await reader.readline()
                    scripts.append((await reader.readline()).decode().strip())
                writer.write(_command("SETNX", "available", "1000000000000"))
                await reader.readline()
                turns.append(self._turn(reader, writer, *scripts))
            yield turns

    def _turn(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        reserve: str,
        settle: str,
    ) -> Turn:
        keys = ("3", "available", "held", "spent")
        reserving = _command("EVALSHA", reserve, *keys, str(ESTIMATE)) * self.pairs
        costs = _costs()

        async def ask(content: bytes) -> None:
            writer.write(content)
            for _ in range(self.pairs):
                answer = await reader.readline()
                if not answer.startswith(b":") or answer.startswith(b":-"):
                    raise ValueError(answer.decode())

        async def turn() -> float:
            began = clock()
            await ask(reserving)
            took = clock() - began
            billed = itertools.islice(costs, self.pairs)
            asked = (("EVALSHA", settle, *keys, str(ESTIMATE), str(cost)) for cost in billed)
            await ask(b"".join(itertools.starmap(_command, asked)))
            return took

        return turn


def _command(*words: str) -> bytes:
    parts = [f"*{len(words)}\r\n".encode()]
    for word in words:
        content = word.encode()
        parts.append(b"$%d\r\n%s\r\n" % (len(content), content))
    return b"".join(parts)
