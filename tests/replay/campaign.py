"""Plays scenarios: processes, barriers, strikes, trials, and what the provider's own meter says."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self

from tests.bench.ledgers import Postgres
from tests.faults.proxy import Faults
from tests.forked import PRELOADED, Forked
from tests.replay import agents, litellm
from tests.replay.agents import Job, Told, clock
from tests.replay.contestants import Contestant
from tests.replay.counters import CheckThenAdd, EqualSplit, Locked
from tests.replay.in_redis import InRedis, redis_program
from tests.replay.ledgered import Peculium
from tests.replay.plays import (
    CUT_OFF_SECONDS_MAX,
    DISTURBED,
    PROCESSES,
    STORE_SECONDS_MAX,
    Act,
    Agent,
    Custody,
    Scenario,
    Strike,
)
from tests.replay.provider import HOST, METER, Running, running
from tests.replay.scenarios import all_scenarios
from tests.server import starting

TRIALS = 30
_AGAIN = 100_000
"""Added to the seed of a trial that broke for a reason that is not part of the play."""
_AHEAD_SECONDS = 0.004
"""How long before the moment all are told of it."""
_CUTS_SECONDS_MAX = 1.0
_POLL_SECONDS = 0.005
_LAPSE_SECONDS_MAX = 30.0
_SETTINGS = {"max_connections": "400"}
"""Agents' processes keep their connections, and those of trials with a clock of their own have more."""
_PRELOADED = ("agents", "counters", "in_redis", "ledgered", "litellm")


class TrialBroken(Exception):
    """An agent's process failed for a reason that is not part of the play."""


@dataclass
class Trial:
    """What came of one trial."""

    billed: int
    """By the provider's own meter."""
    calls: int
    """That were answered, and whose agents lived to use the answer."""
    refused: list[int]
    """What refused calls would have cost."""
    left: int | None
    """What is free at the end by the contestant's own books; None: nobody keeps them."""
    left_later: int | None = None
    """The same after holds have lapsed and the bill was gone through."""
    lapse_seconds: float | None = None
    """How long after the end money was still held for calls that nobody ended."""
    seconds: list[float] = field(default_factory=list)
    """What permission and settlement of each permitted call have taken."""

    def told(self) -> dict[str, Any]:
        """As it is kept."""
        return {name: value for name, value in vars(self).items() if name != "seconds"}


# --- agents' processes ---


class Member:
    """A process that agents run in."""

    def __init__(self, process: ForkServerProcess, connection: Connection) -> None:
        self.process = process
        self._connection = connection
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Queue[tuple[str, Any]]] = {}
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError, RuntimeError):
            while True:
                number, what, content = self._connection.recv()
                self._loop.call_soon_threadsafe(self._hand, number, what, content)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended)

    def _hand(self, number: int, what: str, content: object) -> None:
        self._waiting[number].put_nowait((what, content))

    def _ended(self) -> None:
        for waiting in self._waiting.values():
            waiting.put_nowait(("ended", None))

    def begin(self, job: Job) -> Playing:
        """Give it a job."""
        number = next(self._numbers)
        heard = self._waiting[number] = asyncio.Queue()
        self._connection.send((number, job))
        return Playing(self, number, heard)

    def go(self, number: int, at: float) -> None:
        """Tell when the job's agents begin."""
        self._connection.send((number, at))

    def kill(self) -> None:
        """End it without giving it a chance to do anything about it."""
        self.process.kill()
        self.process.join()
        self._connection.close()


@dataclass
class Playing:
    """A job on its way."""

    member: Member
    number: int
    heard: asyncio.Queue[tuple[str, Any]]

    async def ready(self) -> None:
        """Wait until its agents can begin."""
        what, content = await self.heard.get()
        if what != "ready":
            raise TrialBroken(f"{what}: {content}")

    async def told(self, doomed: int) -> list[Told]:
        """Wait until its agents are through; or until all that are doomed are where they die."""
        arrived = 0
        while True:
            what, content = await self.heard.get()
            if what == "done":
                told: list[Told] = content
                return told
            if what != "doomed":
                raise TrialBroken(f"{what}: {content}")
            arrived += 1
            if arrived == doomed:
                self.member.kill()
                return []


class Crew:
    """Processes that live for the whole campaign, and others that are made to be killed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        # The same process forks servers.
        self._context.set_forkserver_preload(
            [*PRELOADED, *(f"tests.replay.{name}" for name in _PRELOADED)]
        )
        self.members: list[Member] = []

    async def __aenter__(self) -> Self:
        self.members = [self.member() for _ in range(PROCESSES)]
        return self

    async def __aexit__(self, *error: object) -> None:
        for member in self.members:
            member.kill()

    def member(self) -> Member:
        """Another one."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=agents.main, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return Member(process, ours)


# --- the campaign ---


@dataclass
class Stage:
    """Everything that trials need."""

    crew: Crew
    postgres: Postgres
    provider: Running
    contestants: Sequence[Contestant]

    async def meter(self, trial: str) -> dict[str, int]:
        """The true bill of a trial so far."""
        reader, writer = await asyncio.open_connection(HOST, self.provider.port)
        writer.write(f"GET {METER}{trial} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        told: dict[str, int] = json.loads(await reader.readexactly(length))
        writer.close()
        return told


@contextlib.asynccontextmanager
async def stage(
    folder: Path, against: Sequence[str] = (), *, with_litellm: bool = False
) -> AsyncIterator[Stage]:
    """Start everything; LiteLLM, which is installed by then, if it is to take part."""
    async with contextlib.AsyncExitStack() as open_:
        crew = await open_.enter_async_context(Crew())
        postgres = open_.enter_context(Postgres.running(folder, _SETTINGS))
        provider = open_.enter_context(running())
        contestants: list[Contestant] = [CheckThenAdd(postgres), Locked()]
        if redis_program() is not None:
            contestants.append(InRedis(folder))
        start = open_.enter_context(starting(folder, Forked))
        contestants.append(EqualSplit())
        if with_litellm:
            contestants += await open_.enter_async_context(
                litellm.contestants(folder, provider.url)
            )
        contestants.append(Peculium(postgres, start))
        contestants = [each for each in contestants if not against or each.name in against]
        for contestant in contestants:
            await open_.enter_async_context(contestant.running())
        yield Stage(crew, postgres, provider, contestants)


async def play(scene: Stage, contestant: Contestant, scenario: Scenario, seed: int) -> Trial:
    """One trial."""
    trial = f"{scenario.name}-{contestant.name}-{seed}".replace(" ", "-")
    seats = await contestant.seats(trial, scenario)
    done = 0
    refused: list[int] = []
    seconds: list[float] = []
    for number, act in enumerate(scenario.acts):
        if act.after_bill:
            await _go_through(contestant, trial, (await scene.meter(trial))["billed"])
        for told in await _act(
            scene, contestant, scenario, act, trial, seats, seed + 1000 * number
        ):
            done += told.done
            refused += told.refused
            seconds += told.seconds
    billed = (await scene.meter(trial))["billed"]
    result = Trial(billed, done, refused, None, seconds=seconds)
    # Where a copy is used, the books are the parent's, who has more than the cap.
    if scenario.custody is not Custody.COPIED:
        result.left = await contestant.left(trial)
        await _wind_up(contestant, trial, billed, result)
    return result


async def _act(
    scene: Stage,
    contestant: Contestant,
    scenario: Scenario,
    act: Act,
    trial: str,
    seats: Sequence[Any],
    seed: int,
) -> list[Told]:
    by_process: dict[int, list[Agent]] = {}
    for agent in act.agents:
        by_process.setdefault(agent.process, []).append(agent)
    playing: list[tuple[Playing, int]] = []
    for process, company in by_process.items():
        doomed = sum(any(call.dies for call in agent.calls) for agent in company)
        apart = doomed or scenario.skew_seconds
        member = scene.crew.member() if apart else scene.crew.members[process]
        job = Job(
            trial=trial,
            seat=seats[process],
            process=process,
            agents=company,
            provider=scene.provider.url,
            seed=seed * PROCESSES + process,
            patience=(CUT_OFF_SECONDS_MAX if act.strike is Strike.CUT_OFF else STORE_SECONDS_MAX),
            skew_seconds=scenario.skew_seconds,
        )
        playing.append((member.begin(job), doomed))
    try:
        for one, _ in playing:
            await one.ready()
        async with _striking(scene, contestant, act, trial):
            at = clock() + _AHEAD_SECONDS
            for one, _ in playing:
                one.member.go(one.number, at)
            told = await asyncio.gather(*(one.told(doomed) for one, doomed in playing))
    finally:
        for one, _ in playing:
            if one.member not in scene.crew.members and one.member.process.is_alive():
                one.member.kill()
    return [each for some in told for each in some]


@contextlib.asynccontextmanager
async def _striking(
    scene: Stage, contestant: Contestant, act: Act, trial: str
) -> AsyncIterator[None]:
    """Let what has to befall the contestant befall it while the block runs."""
    proxy = contestant.proxy
    if act.strike is Strike.NONE or (act.strike in DISTURBED and proxy is None):
        yield
        return
    if act.strike is Strike.CUT_OFF:
        assert proxy is not None
        await proxy.refuse()
        proxy.reset()
        try:
            yield
        finally:
            await proxy.heal()
        return
    if act.strike is Strike.RESERVE_REPLY_LOST:
        assert proxy is not None
        proxy.trouble(down=Faults(cut_after_bytes=0))
    over = asyncio.Event()
    strike = asyncio.create_task(_strike(scene, contestant, act, trial, over))
    try:
        yield
    finally:
        over.set()
        await strike


async def _strike(
    scene: Stage, contestant: Contestant, act: Act, trial: str, over: asyncio.Event
) -> None:
    """Strike as soon as so many calls are in flight; at the latest when the act is over."""
    proxy = contestant.proxy
    if act.strike is not Strike.RESERVE_REPLY_LOST:
        while (await scene.meter(trial))["working"] < act.strikes_at and not over.is_set():
            await asyncio.sleep(_POLL_SECONDS)
    if act.strike is Strike.KILLED:
        await contestant.kill()
    elif act.strike is Strike.REVOKED:
        await contestant.revoke(trial)
    elif proxy is not None:
        cuts = proxy.cuts
        if act.strike is Strike.SETTLE_REPLY_LOST:
            proxy.trouble(down=Faults(cut_after_bytes=0))
        # Each process has a connection, or a few: one reply at least is lost on each.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CUTS_SECONDS_MAX):
                while proxy.cuts < cuts + PROCESSES and not over.is_set():
                    await asyncio.sleep(_POLL_SECONDS / 5)
        await proxy.heal()


async def _wind_up(contestant: Contestant, trial: str, billed: int, result: Trial) -> None:
    """See what is free after everything that is done about calls that nobody has ended."""
    result.lapse_seconds = await _go_through(contestant, trial, billed)
    result.left_later = await contestant.left(trial)


async def _go_through(contestant: Contestant, trial: str, billed: int) -> float | None:
    """Let holds lapse, and resolve them by the bill: only a ledger has holds. The seconds it took."""
    if not isinstance(contestant, Peculium):
        return None
    begun = clock()
    took = None
    while await contestant.held(trial):
        if clock() - begun > _LAPSE_SECONDS_MAX:
            raise TrialBroken(f"{trial}: holds do not lapse")
        await asyncio.sleep(_POLL_SECONDS * 4)
        took = round(clock() - begun, 3)
    await contestant.reconcile(trial, billed)
    return took


async def play_cell(
    scene: Stage,
    contestant: Contestant,
    scenario: Scenario,
    trials: int,
    tell: Callable[[str], None],
) -> list[Trial]:
    """One contestant's trials of one scenario."""
    struck = any(act.strike is not Strike.NONE for act in scenario.acts)
    turns = asyncio.Semaphore(1 if struck else scenario.at_once)

    async def one(seed: int) -> Trial:
        async with turns:
            try:
                return await play(scene, contestant, scenario, seed)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                # Told as it is: an hour of other trials must not be lost for one that is played again.
                tell(f"{scenario.name} {contestant.name}: trial {seed} broke: {error!r}")
                return await play(scene, contestant, scenario, seed + _AGAIN)

    return list(await asyncio.gather(*(one(seed) for seed in range(trials))))


# --- money stranded after a crash ---

_DEAD = 4
"""Agents that die with their process."""
_SECONDS = 4.0
_BILL_SECONDS = 3.0
"""When the bill comes, after the crash."""
CRASH = replace(
    next(scenario for scenario in all_scenarios() if scenario.name == "D1"),
    name="crash",
    cap=992,
    hold_seconds=1.0,
    lease_seconds=2.0,
)


async def stranded_over_time(scene: Stage) -> list[dict[str, Any]]:
    """What is neither billed nor free, from the moment on when a process died with four calls reserved."""
    played = [
        (contestant, custody)
        for contestant in scene.contestants
        if contestant.plays(CRASH)
        for custody in (Custody.SHARED, Custody.SHARES)
        if custody is Custody.SHARED or isinstance(contestant, Peculium)
    ]
    points = await asyncio.gather(*(_crash(scene, *each) for each in played))
    names = [
        contestant.name if custody is Custody.SHARED else f"{contestant.name}, in shares"
        for contestant, custody in played
    ]
    return [{"name": name, "points": each} for name, each in zip(names, points, strict=True)]


async def _crash(scene: Stage, contestant: Contestant, custody: Custody) -> list[list[float]]:
    scenario = replace(CRASH, custody=custody)
    trial = f"crash-{contestant.name}-{custody}".replace(" ", "-")
    seats = await contestant.seats(trial, scenario)
    await _act(scene, contestant, scenario, scenario.acts[0], trial, seats, 0)
    begun = clock()
    billed = (await scene.meter(trial))["billed"]
    points: list[list[float]] = []
    resolved = False
    while (now := clock() - begun) < _SECONDS:
        if now >= _BILL_SECONDS and not resolved:
            resolved = True
            await contestant.reconcile(trial, billed)
        left = await contestant.left(trial)
        # A part that died with its agent is nobody's any more.
        gone = (
            _DEAD * (scenario.cap // scenario.agents)
            if left is None
            else scenario.cap - left - billed
        )
        points.append([round(now, 2), max(0, gone)])
        await asyncio.sleep(0.1)
    return points
