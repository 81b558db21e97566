"""How much memory a server takes while an auditor reads all that there is: `python -m tests.audit.memory`.

A tree is made in which some budgets have spent, and copied in the database until it is large. At each size
every read that goes through all entries is made from a server of its own, started for it, which is warm
before it is looked at. What is told is how much larger it was at its largest.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

import peculium
from peculium import Child, Client, Reach, Usage, aio
from tests.audit.large import multiply
from tests.bench import machine
from tests.bench.ledgers import HOLDER, Ledger, Postgres
from tests.server import RunningServer

SIZES = (100_000, 1_000_000)
ROOT = "acme"
_BUDGETS = 20
_SPENDS = 100
"""Of each budget, before they are copied."""
_LOOK_SECONDS = 0.01
_MB = 2**20
_TIMEOUT_SECONDS = 3_600
_WARM_UP_ENTRIES = 3_000

Read = Callable[[Client, int], int]
"""Reads the tree, which has so many entries: how many entries, or other things, came."""


def _entries(client: Client, _: int) -> int:
    return _count(client.audit.entries(ROOT, reach=Reach.TREE))


def _statement(client: Client, _: int) -> int:
    told = client.audit.statement(ROOT, timeout=_TIMEOUT_SECONDS)
    return sum(movement.entries for movement in told.movements)


def _usage(client: Client, _: int) -> int:
    by = ("day", "principal", "budget")
    return client.audit.usage(ROOT, by, timeout=_TIMEOUT_SECONDS).total.operations


def _export(client: Client, _: int) -> int:
    return _count(client.audit.export(ROOT))


def _watch(client: Client, entries: int) -> int:
    seen = 0
    for message in client.audit.watch(ROOT, from_beginning=True):
        seen += len(message.entries)
        if seen >= entries:
            break
    return seen


READS: dict[str, Read] = {
    "ListEntries": _entries,
    "GetStatement": _statement,
    "GetUsage": _usage,
    "Export": _export,
    "WatchEntries": _watch,
}


def _count(things: Iterator[object]) -> int:
    return sum(1 for _ in things)


@dataclass(frozen=True)
class Measured:
    """One read."""

    read: str
    entries: int
    """How many the tree has."""
    seconds: float
    before_mb: float
    """The server's memory before the read."""
    largest_mb: float
    """The most that it had during the read."""


class Looking:
    """Looks how much memory a process has, and remembers the most."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.before = self.largest = self._rss()

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            self.largest = max(self.largest, self._rss())

    def _rss(self) -> int:
        return int(self._process.memory_info().rss)


def filled(postgres: Postgres, entries: int) -> tuple[Ledger, int]:
    """A new ledger with a tree of about so many entries; and how many it has."""
    ledger = Ledger.made(postgres, f"memory_{entries}")
    with ledger.serving() as [server]:
        asyncio.run(_spend(server.address))
    spends = _BUDGETS * _SPENDS
    return ledger, multiply(ledger.dsn, spends, _SPENDS, -(-entries // spends))


async def _spend(address: str) -> None:
    async with aio.connect(address, timeout=_TIMEOUT_SECONDS) as client:
        await client.admin.grant(ROOT, unit="calls", amount=10**9, holder=HOLDER)
        root = await client.open(ROOT)
        names = [f"agent-{number}" for number in range(_BUDGETS)]
        await root.delegate([Child(name, 10**6, holder=HOLDER) for name in names])
        budgets = [await client.open(f"{ROOT}/{name}") for name in names]
        usage = Usage(provider="openai", model="m-1", input_tokens=30, output_tokens=7)
        for _ in range(_SPENDS):
            await asyncio.gather(*(budget.spend(1, usage=usage) for budget in budgets))


def measure(ledger: Ledger, entries: int) -> Iterator[Measured]:
    """Make each read once, by a client that keeps nothing."""
    for name, read in READS.items():
        with ledger.serving() as [server], peculium.connect(server.address) as client:
            _warm_up(client)
            yield _measured(name, read, server, client, entries)


def _warm_up(client: Client) -> None:
    """Have the server load all the code that reads need."""
    listed = client.audit.entries(ROOT, reach=Reach.TREE)
    for _ in itertools.islice(listed, _WARM_UP_ENTRIES):
        pass
    client.audit.statement(f"{ROOT}/agent-0", timeout=_TIMEOUT_SECONDS)
    client.audit.usage(f"{ROOT}/agent-0", timeout=_TIMEOUT_SECONDS)
    _watch(client, 1)
    for _ in itertools.islice(client.audit.export(ROOT), 2):
        pass


def _measured(
    name: str, read: Read, server: RunningServer, client: Client, entries: int
) -> Measured:
    begun = time.monotonic()
    with Looking(server.process.pid) as looking:
        read(client, entries)
    seconds = time.monotonic() - begun
    return Measured(name, entries, seconds, looking.before / _MB, looking.largest / _MB)


def table(measured: Sequence[Measured]) -> str:
    """What was measured, for documentation."""
    lines = [
        "| read | entries | seconds | server's memory before (MB) | at most (MB) | more by (MB) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in measured:
        more = each.largest_mb - each.before_mb
        lines.append(
            f"| {each.read} | {each.entries:,} | {each.seconds:.0f} | {each.before_mb:.0f}"
            f" | {each.largest_mb:.0f} | {more:.0f} |"
        )
    return "\n".join(lines)


def _tell(text: str) -> None:
    sys.stderr.write(f"memory: {text}\n")
    sys.stderr.flush()


def main(words: Sequence[str] | None = None) -> int:
    """Fill, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.audit.memory", description=__doc__)
    parser.add_argument(
        *("--entries", "-n"),
        type=lambda text: [int(each) for each in text.split(",")],
        default=list(SIZES),
        help="how many the tree has; several, separated by commas, are measured one after another",
    )
    parser.add_argument("--folder", type=Path, help="where the PostgreSQL keeps its data")
    options = parser.parse_args(words)
    measured: list[Measured] = []
    folder = options.folder or Path(tempfile.mkdtemp(prefix="peculium-memory-"))
    machine.prepare(folder)
    with Postgres.running(folder) as postgres:
        for size in options.entries:
            ledger, entries = filled(postgres, size)
            _tell(f"{entries:,} entries")
            for each in measure(ledger, entries):
                measured.append(each)
                _tell(f"{each.read}: {each.seconds:.0f} s, {each.largest_mb:.0f} MB at most")
    sys.stdout.write(table(measured) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
