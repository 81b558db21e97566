"""Processes of their own that wait for each other, so that what they do next happens at once."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from typing import Any

WAIT_SECONDS_MAX = 60

Racer = Callable[..., None]
"""What a process does with its connection, the barrier, and whatever is shared: it answers what it
receives, until it receives None."""


@dataclass(frozen=True)
class Race:
    """Some racers that run."""

    connections: Sequence[Connection]

    def start(self, *tasks: Any) -> list[Any]:
        """Give each racer its task, or all the same one, and wait for all their answers."""
        given = tasks * len(self.connections) if len(tasks) == 1 else tasks
        for connection, task in zip(self.connections, given, strict=True):
            connection.send(task)
        answers = []
        for connection in self.connections:
            if not connection.poll(WAIT_SECONDS_MAX):
                raise AssertionError("a racer does not answer")
            answers.append(connection.recv())
        return answers


@contextlib.contextmanager
def racing(racer: Racer, count: int, *shared: Any) -> Iterator[Race]:
    """Run a number of racers, each in a new process."""
    context: SpawnContext = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count, timeout=WAIT_SECONDS_MAX)
    with contextlib.ExitStack() as running:
        connections = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            running.enter_context(ours)
            process = context.Process(target=racer, args=(theirs, barrier, *shared), daemon=True)
            process.start()
            theirs.close()
            running.callback(_end, process)
            connections.append(ours)
        yield Race(connections)
        for connection in connections:
            connection.send(None)


def _end(process: Any) -> None:
    process.join(WAIT_SECONDS_MAX)
    process.kill()
    process.join()
    process.close()
