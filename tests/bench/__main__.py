"""The benchmark: everything in one run, on one machine, in turn.

    python -m tests.bench [--seconds-per-cell N] [--repetitions N] [--only a,b] [--folder D] [--full]

Cells' names have commas in them, and a blank after each: `--only "pgbench,one root, 200 agents"` is two cells.

Progress goes to the error stream, everything measured to `bench.json` in the folder, and the last line of
standard output is the figures as JSON; null is what was not measured. With `--report` the pages in `docs`
are written from it. The exit code is 1 if something failed, or ledger and provider disagree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench import growth, machine, report
from tests.bench.cells import Bench, Cell, Times, all_cells, in_turn, redis_program
from tests.bench.crew import Crew, empty_server
from tests.bench.figures import Run
from tests.bench.ledgers import Ledger, Postgres, Trees

PARTS = (
    *("stack", "unary", "cluster", "baselines", "unloaded", "lanes", "trees", "depth"),
    *("growth", "memory", "recovery"),
)
SIZES = (10_000, 100_000, 1_000_000)
SIZES_FULL = (*SIZES, 3_000_000)
GROWTH_AGENTS = 200
WARM_UP_SECONDS_MAX = 0.5
"""Connections are there before it, and a turn that it cuts counts by its part: it need not be long."""
CONNECTIONS = 10_000
CONNECTION_PROCESSES = 4
_DESCRIPTORS = 16_000


@dataclass
class Options:
    """How much is measured."""

    seconds: float
    repetitions: int
    only: Sequence[str]
    small: bool
    sizes: Sequence[int]
    connections: int
    folder: Path

    def wants(self, part: str, name: str = "") -> bool:
        """Whether a part, or a cell of it, is measured."""
        return not self.only or any(
            word == part or (name and name.startswith(word)) for word in self.only
        )


@dataclass
class Results:
    """What came of it so far."""

    cells: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    """Seconds, by part."""

    @contextlib.contextmanager
    def going_on(self, what: str, part: str) -> Iterator[None]:
        """Whatever fails is noted, and the rest is measured all the same."""
        begun = time.monotonic()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - hours of other figures must not be lost for it
            # Where in the code is for whoever looks on, not for the page.
            tell(f"FAILED: {what}: {traceback.format_exc()}")
            self.failures.append(f"{what}: {type(error).__name__}")
        finally:
            self.took[part] = self.took.get(part, 0.0) + time.monotonic() - begun


def tell(text: str) -> None:
    """Tell people."""
    sys.stderr.write(f"bench: {text}\n")
    sys.stderr.flush()


def run(options: Options) -> dict[str, Any]:
    """Measure everything that is wanted: the run's JSON."""
    _allow_many_descriptors()
    begun, load = machine.now(), machine.load()
    clock = time.monotonic()
    results = Results()
    cells = [cell for cell in all_cells(small=options.small) if options.wants(cell.part, cell.name)]
    with contextlib.ExitStack() as open_:
        crew = open_.enter_context(Crew())
        postgres = open_.enter_context(Postgres.running(options.folder))
        ledger = Ledger.made(postgres, "bench")
        [server] = open_.enter_context(ledger.serving())
        lanes = ledger.fetch("SELECT lanes FROM ledger")[0][0]
        bench = Bench(
            *(
                postgres,
                crew,
                Times(min(WARM_UP_SECONDS_MAX, options.seconds / 3), options.seconds),
                ledger,
                server,
            ),
            Trees(server.address, lanes),
            open_.enter_context(empty_server()),
            open_,
            agents_max=max(getattr(cell, "agents", 1) for cell in all_cells(small=options.small)),
        )
        facts = machine.facts(postgres, options.folder)
        _measure_cells(bench, cells, options, results)
        _measure_growth(bench, options, results)
        _measure_rest(bench, options, results)
        problems, operations = ledger.wrong(), ledger.operations
    for grown in results.more.get("growth", ()):
        for one in grown["repetitions"]:
            problems += one.pop("problems")
    for problem in problems:
        tell(f"WRONG: {problem}")
    return {
        "begun": begun,
        "ended": machine.now(),
        "seconds": round(time.monotonic() - clock, 1),
        "seconds_by_part": {part: round(seconds, 1) for part, seconds in results.took.items()},
        "load_average": {"begin": load, "end": machine.load()},
        "machine": facts,
        "options": {
            "seconds_per_cell": options.seconds,
            "repetitions": options.repetitions,
            "only": list(options.only),
            "slice": options.small,
            "redis": redis_program() is not None,
        },
        "cells": results.cells,
        **results.more,
        "operations": operations,
        "mismatches": len(problems),
        "problems": problems,
        "failures": results.failures,
    }


def _measure_cells(bench: Bench, cells: Sequence[Cell], options: Options, results: Results) -> None:
    """Measure all cells in turn, as often as wanted, so that what disturbs the machine hits all alike."""
    records: dict[str, dict[str, Any]] = {}
    for cell in cells:
        with results.going_on(cell.name, "preparations"):
            cell.prepare(bench)
            records[cell.name] = {"name": cell.name, "part": cell.part, "repetitions": []}
    results.cells += records.values()
    for number in range(1, options.repetitions + 1):
        for cell in in_turn(cells):
            if cell.name not in records:
                continue
            with results.going_on(cell.name, cell.part):
                measured = cell.measure(bench)
                records[cell.name]["repetitions"].append({"repetition": number, **measured})
                tell(f"{number}/{options.repetitions} {cell.name}: {_told(measured)}")


def _told(measured: dict[str, Any]) -> str:
    shown = {name: measured.get(name) for name in ("per_s", "p50_ms", "p99_ms")}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def _measure_growth(bench: Bench, options: Options, results: Results) -> None:
    if not options.wants("growth"):
        return
    agents = 20 if options.small else GROWTH_AGENTS
    sizes: list[growth.Grown] = []
    with results.going_on("filling", "filling"):
        sizes = growth.grow(bench, options.sizes, agents, tell)
    if not sizes:
        return
    with results.going_on("growth", "growth"):
        for number in range(1, options.repetitions + 1):
            for one in sizes:
                growth.measure(bench, one, number)
                tell(f"{one.entries} entries: {_told(one.repetitions[-1])}")
        results.more["growth"] = [
            {"wanted": one.wanted, "entries": one.entries, "repetitions": one.repetitions}
            for one in sizes
        ]
        results.more["disk"] = growth.disk(sizes[-1])


def _measure_rest(bench: Bench, options: Options, results: Results) -> None:
    if options.wants("memory"):
        with results.going_on("memory", "memory"):
            results.more["memory"] = growth.memory(bench, options.connections, CONNECTION_PROCESSES)
            tell(f"memory: {results.more['memory']}")
    if options.wants("recovery"):
        kinds: dict[str, Callable[[Bench], dict[str, Any]]] = {
            "start_up": growth.start_up,
            "server_killed": growth.server_killed,
            # The last of all: it is the same PostgreSQL for everything.
            "postgres_killed": growth.postgres_killed,
        }
        found: dict[str, list[dict[str, Any]]] = {}
        for name, measure in kinds.items():
            with results.going_on(name, "recovery"):
                found[name] = [measure(bench) for _ in range(options.repetitions)]
                tell(f"{name}: {found[name]}")
        results.more["recovery"] = found


def _allow_many_descriptors() -> None:
    """A connection takes one on either side."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _sizes(text: str) -> Sequence[int]:
    return [int(word) for word in text.split(",")]


def _words(text: str) -> Sequence[str]:
    return [word for word in re.split(r",(?! )", text) if word]


def _is_there(word: str, *, small: bool) -> bool:
    return word in PARTS or any(cell.name.startswith(word) for cell in all_cells(small=small))


def _arguments(words: Sequence[str] | None) -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--seconds-per-cell", type=float, help="default: 3, in a slice 0.3")
    parser.add_argument("--repetitions", type=int, help="default: 5, in a slice 1")
    parser.add_argument(
        "--only",
        type=_words,
        default=[],
        help=f"parts ({', '.join(PARTS)}), or how names of cells begin, with a comma and no blank between",
    )
    parser.add_argument(
        "--folder", type=Path, help="for the data and bench.json; default: a new one"
    )
    parser.add_argument("--slice", action="store_true", help="only see that it runs")
    parser.add_argument(
        "--entries", type=_sizes, help="how large the ledger grows; default: 10000,100000,1000000"
    )
    parser.add_argument(
        "--full",
        dest="entries",
        action="store_const",
        const=SIZES_FULL,
        help="grow to three million entries",
    )
    parser.add_argument("--report", action="store_true", help="write docs/performance.md from it")
    given = parser.parse_args(words)
    for word in given.only:
        if not _is_there(word, small=given.slice):
            parser.error(f"neither a part nor a cell is called {word!r}")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="peculium-bench-"))
    small = given.slice
    options = Options(
        seconds=given.seconds_per_cell or (0.3 if small else 3.0),
        repetitions=given.repetitions or (1 if small else 5),
        only=given.only,
        small=small,
        sizes=given.entries or ((500, 1_500) if small else SIZES),
        connections=40 if small else CONNECTIONS,
        folder=folder.absolute(),
    )
    return options, given.report


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write it down, and say it in one line: 0 if nothing failed or is wrong."""
    options, reporting = _arguments(words)
    machine.prepare(options.folder)
    data = run(options)
    file = options.folder / "bench.json"
    file.write_text(report.text(data))
    tell(f"everything is in {file}; the pages are written by: python -m tests.bench.report {file}")
    if reporting:
        report.write(file, machine.ROOT / "docs")
    for leftover in options.folder.glob("ready-*.json"):
        leftover.unlink(missing_ok=True)
    shutil.rmtree(options.folder / "postgres", ignore_errors=True)
    sys.stdout.write(json.dumps(Run(data).line()) + "\n")
    return 1 if data["mismatches"] or data["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
