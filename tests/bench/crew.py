"""Client processes, started once, that wait for jobs and all begin at the same moment.

They are forked from a server process that has imported everything and done nothing, least of all gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, Self

import grpc
import psutil

from peculium.v1 import ledger_service_pb2 as ledger
from tests.bench.jobs import EMPTY, LEDGER, Counted, Job, Window, clock, take_turns

READY_SECONDS_MAX = 300.0
"""Until a process is ready for its job."""
OVER_SECONDS_MAX = 240.0
"""Beyond the window, until it has told what it counted."""
_AHEAD_SECONDS = 0.05
"""What a window is announced ahead, so that all know of it when it begins."""


class BenchBroken(Exception):
    """Something that is measured, or measures, does not go on; says what is known of it."""


def fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Uvloop's where there is one, for clients and servers alike."""
    found = importlib.util.find_spec("uvloop")
    return None if found is None else importlib.import_module("uvloop").new_event_loop


# --- in a client process ---


def _work(connection: Connection) -> None:
    """Do one job after the other, until nobody asks any more."""
    with asyncio.Runner(loop_factory=fastest_loop()) as runner, contextlib.suppress(EOFError):
        while True:
            job = connection.recv()
            try:
                counted = runner.run(_do(job, connection))
            except Exception:  # noqa: BLE001 - whatever it is, it is told, and the process goes on
                connection.send(traceback.format_exc())
            else:
                connection.send(counted)


async def _do(job: Job, connection: Connection) -> Counted:
    counted = Counted()
    async with job.ready() as turns:
        connection.send(None)
        # In a thread: the client's connection has to be kept alive meanwhile.
        window = await asyncio.to_thread(connection.recv)
        if window is None:
            return counted
        async with asyncio.timeout(max(0.0, window.end - clock()) + OVER_SECONDS_MAX / 2):
            await take_turns(turns, window, counted)
    counted.billed = job.billed()
    return counted


# --- in the process that measures ---


@dataclass
class Spans:
    """What was used within a window, by who used it."""

    cpu_seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class _Member:
    process: ForkServerProcess
    connection: Connection


class Crew:
    """A number of client processes, more of them when more are asked for."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.bench.crew", "peculium.aio", "uvloop"])
        self._members: list[_Member] = []

    def __enter__(self) -> Self:
        """Nobody is started yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all."""
        for member in self._members:
            member.connection.close()
        for member in self._members:
            member.process.join(5.0)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
        self._members.clear()

    def grow(self, size: int) -> None:
        """Have at least so many processes."""
        while len(self._members) < size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._members.append(_Member(process, ours))

    @property
    def pids(self) -> list[int]:
        """Of the processes, in the order in which they get jobs."""
        return [member.process.pid or 0 for member in self._members]

    def work(
        self,
        jobs: Sequence[Job],
        *,
        warm_up: float,
        seconds: float,
        watched: dict[str, Sequence[int]] | None = None,
    ) -> tuple[list[Counted], Spans]:
        """Have each job done by a process of its own, all at the same time.

        Args:
            jobs: One for each process.
            warm_up: Seconds before it counts.
            seconds: How long it counts.
            watched: Process ids by a name for them, whose use of the processors is told; their
                children count with them.

        Raises:
            BenchBroken: A process failed, or hangs.
        """
        with self.prepared(jobs) as members:
            begin = clock() + _AHEAD_SECONDS + warm_up
            window = Window(begin, begin + seconds)
            for member in members:
                member.connection.send(window)
            spans = _watch(watched or {}, window)
            counted = [_receive(member, OVER_SECONDS_MAX) for member in members]
        return counted, spans

    @contextlib.contextmanager
    def prepared(self, jobs: Sequence[Job]) -> Iterator[Sequence[_Member]]:
        """Processes that are ready for their jobs. Whoever was sent no window is told to leave it.

        Raises:
            BenchBroken: A process failed, or hangs.
        """
        self.grow(len(jobs))
        members = self._members[: len(jobs)]
        try:
            for member, job in zip(members, jobs, strict=True):
                member.connection.send(job)
            for member in members:
                _receive(member, READY_SECONDS_MAX)
            yield members
        except BaseException:
            # What they are at is unknown: others take their places.
            for member in members:
                member.process.kill()
                member.process.join()
                member.connection.close()
                self._members.remove(member)
            raise

    @contextlib.contextmanager
    def stay(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Have jobs prepared, and nothing more, for the time of the block."""
        with self.prepared(jobs) as members:
            yield
            for member in members:
                member.connection.send(None)
            for member in members:
                _receive(member, OVER_SECONDS_MAX)


def _receive(member: _Member, seconds: float) -> Counted:
    """What a process says, which is nothing at all when it is ready."""
    if not member.connection.poll(seconds):
        raise BenchBroken(f"a client process said nothing for {seconds:g} s")
    try:
        said: Any = member.connection.recv()
    except EOFError:
        raise BenchBroken("a client process ended") from None
    if isinstance(said, str):
        raise BenchBroken(said)
    return said if isinstance(said, Counted) else Counted()


def _watch(watched: dict[str, Sequence[int]], window: Window) -> Spans:
    time.sleep(max(0.0, window.begin - clock()))
    before = {name: _cpu(pids) for name, pids in watched.items()}
    time.sleep(max(0.0, window.end - clock()))
    spans = Spans()
    for name, pids in watched.items():
        spans.cpu_seconds[name] = sum(
            after - before[name].get(pid, 0.0) for pid, after in _cpu(pids).items()
        )
    return spans


def _cpu(pids: Sequence[int]) -> dict[int, float]:
    """Seconds of the processors that processes and their children have used, by process."""
    used = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = one.cpu_times()
                    used[one.pid] = times.user + times.system
    return used


# --- the handler that does nothing ---


@contextlib.contextmanager
def empty_server() -> Iterator[tuple[str, int]]:
    """A gRPC server in a process of its own whose only handler does nothing: its address and pid."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_nothing, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(READY_SECONDS_MAX):
            raise BenchBroken("the empty server does not start")
        yield ours.recv(), process.pid or 0
    finally:
        process.kill()
        process.join()


def _serve_nothing(connection: Connection) -> None:
    with asyncio.Runner(loop_factory=fastest_loop()) as runner:
        runner.run(_serve(connection))


async def _serve(connection: Connection) -> None:
    server = grpc.aio.server()

    async def nothing(_request: bytes, _context: Any) -> bytes:
        return b""

    async def reserve(_request: ledger.ReserveRequest, _context: Any) -> ledger.ReserveResponse:
        return ledger.ReserveResponse()

    by_service = {
        EMPTY: {"Call": grpc.unary_unary_rpc_method_handler(nothing)},
        LEDGER: {
            "Reserve": grpc.unary_unary_rpc_method_handler(
                reserve,
                request_deserializer=ledger.ReserveRequest.FromString,
                response_serializer=ledger.ReserveResponse.SerializeToString,
            )
        },
    }
    server.add_generic_rpc_handlers(
        tuple(starmap(grpc.method_handlers_generic_handler, by_service.items()))
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    connection.send(f"127.0.0.1:{port}")
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing tells when another process ends
        await asyncio.sleep(5.0)


def billed(counted: Sequence[Counted]) -> Counter[bytes]:
    """What was billed to all processes."""
    total: Counter[bytes] = Counter()
    for one in counted:
        total.update(one.billed)
    return total
