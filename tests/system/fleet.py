"""Agents in processes of their own, which do one step of a call at a time and can be killed in between."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import peculium
from peculium import Budget, BudgetExhausted, Hold

PROCESSES = 4
AGENTS_OF_A_PROCESS = 4
AGENTS = PROCESSES * AGENTS_OF_A_PROCESS
ESTIMATE = 31
ACTUAL = 23
"""What a call may cost, and what it does cost: the figures of the race in arXiv 2606.04056."""
ANSWER_SECONDS_MAX = 60


class _Process:
    """Some agents that spend from one budget; each step is done for all of them."""

    def __init__(self, address: str, path: str, meter: Any) -> None:
        self._client = peculium.connect(address)
        self._budget: Budget = self._client.open(path)
        self._meter = meter
        self._holds: list[Hold] = []

    def reserve(self, ttl: float) -> int:
        """How many were admitted."""
        for _ in range(AGENTS_OF_A_PROCESS):
            with contextlib.suppress(BudgetExhausted):
                self._holds.append(self._budget.reserve(ESTIMATE, ttl=ttl))
        return len(self._holds)

    def call(self) -> int:
        """How many calls the provider has billed."""
        with self._meter.get_lock():
            self._meter.value += ACTUAL * len(self._holds)
        return len(self._holds)

    def settle(self) -> int:
        """How many holds were settled."""
        settled = 0
        while self._holds:
            self._holds.pop().settle(ACTUAL)
            settled += 1
        return settled


def _work(connection: Connection, address: str, path: str, meter: Any) -> None:
    process = _Process(address, path, meter)
    while (step := connection.recv()) is not None:
        verb, arguments = step
        connection.send(getattr(process, verb)(*arguments))


@dataclass
class Fleet:
    """Processes with agents, and the provider's own bill."""

    processes: Sequence[SpawnProcess]
    connections: Sequence[Connection]
    meter: Any

    @property
    def billed(self) -> int:
        """What the provider has billed: nobody's ledger."""
        return int(self.meter.value)

    async def all(self, verb: str, *arguments: Any) -> int:
        """Let every process do a step at the same time; the sum of their answers."""
        return await asyncio.to_thread(self._all, verb, arguments)

    def _all(self, verb: str, arguments: tuple[Any, ...]) -> int:
        for connection in self.connections:
            connection.send((verb, arguments))
        total = 0
        for connection in self.connections:
            assert connection.poll(ANSWER_SECONDS_MAX), "a process of agents does not answer"
            total += connection.recv()
        return total

    def die(self) -> None:
        """Kill every process, with whatever its agents are at."""
        for process in self.processes:
            process.kill()
            process.join(ANSWER_SECONDS_MAX)


@contextlib.contextmanager
def fleet(address: str, path: str) -> Iterator[Fleet]:
    """Four processes of four agents each, which spend from a budget that their principal holds."""
    context = multiprocessing.get_context("spawn")
    meter = context.Value("q", 0)
    with contextlib.ExitStack() as running:
        processes, connections = [], []
        for _ in range(PROCESSES):
            ours, theirs = context.Pipe()
            running.enter_context(ours)
            process = context.Process(
                target=_work, args=(theirs, address, path, meter), daemon=True
            )
            process.start()
            theirs.close()
            running.callback(_end, process)
            processes.append(process)
            connections.append(ours)
        yield Fleet(processes, connections, meter)


def _end(process: SpawnProcess) -> None:
    process.kill()
    process.join(ANSWER_SECONDS_MAX)
    process.close()
