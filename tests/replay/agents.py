"""What runs in the agents' processes: the provider's client, the agents, and the process itself."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import json
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing.connection import Connection
from random import Random
from typing import Any, Protocol

import httpx

from tests.replay.plays import Agent, Call, Point
from tests.replay.provider import PATHS, Script, Stream

patience: ContextVar[float] = ContextVar("patience", default=10.0)
"""How many seconds to wait for what keeps the budget."""
clock = time.monotonic
"""The same for all processes of a machine."""
TRIAL_SECONDS_MAX = 180.0
JITTER_SECONDS = 0.003
"""How far agents that begin at the same moment are apart, by chance."""
_CALL_SECONDS_MAX = 30.0
MODEL = "m"
WORDS_MAX = 4_096
"""What is written has as many words as it is billed for, but not more than these."""


class Result(StrEnum):
    """What a call came to."""

    DONE = "done"
    REFUSED = "refused"
    """Not permitted, and not made."""
    FAILED = "failed"
    """Made, and come to nothing."""


@dataclass
class Told:
    """What an agent tells at the end."""

    done: int = 0
    failed: int = 0
    refused: list[int] = field(default_factory=list)
    """What the calls would have cost that were refused."""
    seconds: list[float] = field(default_factory=list)
    """Of each permitted call, what it took beside the provider's part."""


class _Now:
    """The call that a task is about."""

    def __init__(self, call: Call, doomed: Callable[[], None]) -> None:
        self.call = call
        self.wire_seconds = 0.0
        self._doomed = doomed

    async def reach(self, point: Point) -> None:
        """Die here, if that is this call's fate: whoever kills is told, and nothing more happens."""
        if self.call.dies is point:
            self._doomed()
            await asyncio.Event().wait()


_now: ContextVar[_Now] = ContextVar("now")


class Wire(httpx.AsyncBaseTransport):
    """The way to the provider: for all contestants the same."""

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport(
            verify=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one attempt."""
        now = _now.get()
        await now.reach(Point.RESERVED)
        begun = clock()
        try:
            response = await self._inner.handle_async_request(request)
            content = await response.aread()
        finally:
            now.wire_seconds += clock() - begun
        await now.reach(Point.ANSWERED)
        return httpx.Response(response.status_code, headers=response.headers, content=content)


class CallFailed(Exception):
    """No attempt was answered."""


class Llm:
    """The provider's client as libraries have it: it tries again by itself."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport) -> None:
        self._url = f"{url}{PATHS[0]}"
        self._http = httpx.AsyncClient(
            transport=transport, timeout=_CALL_SECONDS_MAX, trust_env=False
        )

    async def complete(self, script: Script, attempts: int) -> int | None:
        """Make a call, in as many attempts as it takes: the tokens that the answer tells.

        Raises:
            CallFailed: None was answered.
        """
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": script.prompt()}],
        }
        if script.stream is not Stream.NO:
            body["stream"] = True
        if script.stream is Stream.WITH_USAGE:
            body["stream_options"] = {"include_usage": True}
        for _ in range(attempts):
            try:
                answer = await self._http.post(self._url, json=body)
            except httpx.TransportError:
                continue
            if answer.is_success:
                usage = told_usage(answer)
                return None if usage is None else int(usage["total_tokens"])
        raise CallFailed


def told_usage(answer: httpx.Response) -> dict[str, Any] | None:
    """What the answer tells; of a stream, what its last event with usage does."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        told: dict[str, Any] | None = answer.json().get("usage")
        return told
    found = None
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            found = json.loads(line.removeprefix("data: ")).get("usage") or found
    return found


class Gate(ABC):
    """How one contestant guards calls, in one process."""

    carries = False
    """It makes the calls itself, so that its part is all that is not the provider's."""

    def transport(self, wire: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
        """What the provider's client sends by."""
        return wire

    @abstractmethod
    async def call(self, llm: Llm, script: Script, attempts: int, agent: str) -> Result:
        """Make a call if it is permitted."""


class Seat(Protocol):
    """What a process needs to get at a trial's budget. It is sent there, so it is data."""

    def sit(self, process: int) -> AbstractAsyncContextManager[Gate]:
        """Get at it."""
        ...


@dataclass(frozen=True)
class Job:
    """One act's agents of one process."""

    trial: str
    seat: Seat
    process: int
    agents: Sequence[Agent]
    provider: str
    seed: int
    patience: float
    skew_seconds: float = 0.0


_wires: list[Wire] = []


def wire() -> Wire:
    """The process's own."""
    if not _wires:
        _wires.append(Wire())
    return _wires[0]


async def _act(
    agent: Agent, job: Job, gate: Gate, llm: Llm, free: Llm, doomed: Callable[[], None]
) -> Told:
    told = Told()
    for number, call in enumerate(agent.calls):
        script = Script(
            trial=job.trial,
            call=f"{agent.name}-{number}",
            estimate=call.estimate,
            cost=call.cost,
            reports=call.told,
            fates=call.fates,
            seconds=call.seconds,
            words=min(call.cost, WORDS_MAX),
            stream=call.stream,
        )
        now = _Now(call, doomed)
        _now.set(now)
        begun = clock()
        result = await gate.call(llm, script, call.attempts, agent.name)
        if result is Result.DONE:
            told.done += 1
            others = script.seconds if gate.carries else now.wire_seconds
            told.seconds.append(clock() - begun - others)
        elif result is Result.FAILED:
            told.failed += 1
        else:
            told.refused.append(call.cost)
            if not agent.obeys:
                await free.complete(script, call.attempts)
            elif not agent.goes_on:
                break
    return told


# --- the process ---


def fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Uvloop's where there is one."""
    found = importlib.util.find_spec("uvloop")
    return None if found is None else importlib.import_module("uvloop").new_event_loop


def main(connection: Connection) -> None:
    """Do jobs, any number at once, until nobody asks any more."""
    with asyncio.Runner(loop_factory=fastest_loop()) as runner:
        runner.run(_Process(connection).serve())


class _Process:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._begins: dict[int, asyncio.Future[float]] = {}
        self._jobs: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Take what is sent."""
        incoming: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def receive() -> None:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    message = self._connection.recv()
                    loop.call_soon_threadsafe(incoming.put_nowait, message)
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(incoming.put_nowait, None)

        threading.Thread(target=receive, daemon=True).start()
        while (message := await incoming.get()) is not None:
            number, content = message
            if isinstance(content, Job):
                self._begins[number] = loop.create_future()
                job = asyncio.create_task(self._do(number, content))
                self._jobs.add(job)
                job.add_done_callback(self._jobs.discard)
            else:
                self._begins[number].set_result(content)

    async def _do(self, number: int, job: Job) -> None:
        def tell(what: str, content: object = None) -> None:
            self._connection.send((number, what, content))

        try:
            if job.skew_seconds:
                _skew(job.skew_seconds)
            patience.set(job.patience)
            async with asyncio.timeout(TRIAL_SECONDS_MAX), job.seat.sit(job.process) as gate:
                llm = Llm(job.provider, gate.transport(wire()))
                free = Llm(job.provider, wire())
                tell("ready")
                at = await self._begins[number]
                chance = Random(job.seed)
                delays = [chance.uniform(0, JITTER_SECONDS) for _ in job.agents]

                async def run(agent: Agent, delay: float) -> Told:
                    await asyncio.sleep(at + delay - clock())
                    return await _act(agent, job, gate, llm, free, lambda: tell("doomed"))

                told = await asyncio.gather(*map(run, job.agents, delays))
            tell("done", told)
        except Exception:  # noqa: BLE001 - whatever it is, it is told, and the process goes on
            tell("failed", traceback.format_exc())


def _skew(seconds: float) -> None:
    """Let this process's clock be off, as the SDK sees it: it makes ids of operations by it."""
    ids = importlib.import_module("peculium._ids")
    real = time.time_ns

    class Time:
        @staticmethod
        def time_ns() -> int:
            return real() + int(seconds * 1e9)

    ids.time = Time  # type: ignore[attr-defined]
