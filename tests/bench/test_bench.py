"""That the benchmark runs, counts right, finds what is wrong, and writes its pages itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree as ET

import pytest

import peculium
from tests.bench import __main__ as benchmark, crew as crews, flame, report
from tests.bench.cells import Pgbench, RedisCounter, Stack, all_cells, in_turn, percentiles, summary
from tests.bench.crew import BenchBroken, Crew, Spans
from tests.bench.figures import KEYS, Run, goals
from tests.bench.fleet import FIGURES
from tests.bench.jobs import Counted, Turn, Window, clock, take_turns
from tests.bench.ledgers import Ledger, Postgres
from tests.bench.machine import ROOT
from tests.postgres import Server
from tests.server import RunningServer

SECONDS_MAX = 240
"""For a program: it starts a PostgreSQL and servers, on a machine that has much to do."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the user who runs PostgreSQL can reach."""
    made = Path(tempfile.mkdtemp(prefix="peculium-bench-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def program(module: str, *words: object) -> dict[str, Any]:
    """The figures that a program ends with."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said, told = process.communicate(timeout=SECONDS_MAX - 60)
        except BaseException:
            # It takes its servers and its PostgreSQL with it.
            process.terminate()
            raise
    assert process.returncode == 0, told
    figures: dict[str, Any] = json.loads(said.splitlines()[-1])
    return figures


@pytest.mark.timeout(SECONDS_MAX)
def test_a_slice_of_the_benchmark_tells_what_it_measured_and_null_for_the_rest(
    folder: Path,
) -> None:
    figures = program("tests.bench", "--slice", "--only", "one root,unary", "--folder", folder)
    assert tuple(figures) == KEYS
    assert figures["mismatches"] == 0
    told = {key for key, value in figures.items() if value is not None}
    rates = {"pairs_per_s", "pairs_per_s_hot_root", "unary_ops_per_s"}
    # Where nothing ended within so short a window there are no latencies.
    assert told - {"p50_ms", "p99_ms"} == rates | {"mismatches"}
    data = json.loads((folder / "bench.json").read_text())
    assert data["operations"] > 0
    assert (data["problems"], data["failures"]) == ([], [])
    report.write(folder / "bench.json", folder)
    page = (folder / "performance.md").read_text()
    assert all(f"| {cell['name']} |" in page for cell in data["cells"])


@pytest.mark.timeout(SECONDS_MAX)
def test_a_small_fleet_spends_no_more_than_it_has(folder: Path) -> None:
    figures = program(
        "tests.bench.fleet",
        *("--agents", 40, "--seconds", 4, "--pace", 5),
        *("--folder", folder),
    )
    assert tuple(figures) == FIGURES
    assert (figures["overshoot"], figures["mismatches"], figures["agents"]) == (0, 0, 40)
    assert figures["pairs"] > 0
    (folder / "performance").mkdir()
    shutil.copy(ROOT / "docs" / "performance" / "bench.json", folder / "performance")
    report.write_fleet(folder / "fleet.json", folder)
    page = (folder / "performance.md").read_text()
    assert "40 agents ask for 20 pairs a second" in page
    assert f"| pairs | {figures['pairs']:,} |" in page


# --- counting ---


async def test_a_turn_counts_by_the_part_of_it_within_the_window() -> None:
    begin = clock() + 0.05
    window = Window(begin, begin + 0.1)
    turns: list[tuple[float, float]] = []
    counted = Counted()

    async def turn() -> float:
        begun = clock()
        await asyncio.sleep(0.03)
        turns.append((begun, clock()))
        return 0.5

    async def refused() -> None:
        await asyncio.sleep(0.01)

    await take_turns([turn, turn, refused], window, counted)
    parts = [
        max(0.0, min(ended, window.end) - max(begun, window.begin)) / (ended - begun)
        for begun, ended in turns
    ]
    assert 0 < counted.turns < len(turns)
    assert counted.turns == pytest.approx(sum(parts), abs=0.1)
    assert set(counted.latencies) == {0.5}
    assert len(counted.latencies) == sum(begin <= ended < window.end for _, ended in turns)
    assert counted.refused > 0


async def _sleep(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


async def test_everybody_goes_on_until_the_last_turn_that_the_window_cuts_is_over() -> None:
    begin = clock()
    ended = []

    async def short() -> float:
        await asyncio.sleep(0.01)
        ended.append(clock())
        return 0.0

    await take_turns([short, lambda: _sleep(0.3)], Window(begin, begin + 0.1), Counted())
    assert ended[-1] >= begin + 0.28


def test_rates_add_up_over_processes_and_latencies_are_ranked_together() -> None:
    counted = [
        Counted(turns=3, latencies=array("d", [0.001, 0.002, 0.003]), cpu_seconds=1.0),
        Counted(turns=1, latencies=array("d", [0.1]), cpu_seconds=0.5),
    ]
    measured = summary(counted, Spans({"server": 2.0}), 2.0, turns=50)
    assert (measured["count"], measured["per_s"]) == (200, 100.0)
    assert (measured["p50_ms"], measured["p99_ms"]) == (3.0, 100.0)
    assert measured["cpu"] == {"clients": 0.75, "client_max": 0.5, "server": 1.0}


def test_without_latencies_there_are_no_percentiles() -> None:
    assert set(percentiles([]).values()) == {None}


# --- what is measured ---


def test_names_of_cells_may_have_commas() -> None:
    words = ["--only", "lanes,one root, 200 agents,pgbench"]
    options, _ = benchmark._arguments(words)
    assert options.only == ["lanes", "one root, 200 agents", "pgbench"]
    chosen = [one.name for one in all_cells(small=False) if options.wants(one.part, one.name)]
    assert chosen == [
        *("one root, 200 agents", "pgbench"),
        *("one lane", "two lanes", "two lanes, two servers"),
    ]


@pytest.mark.parametrize("word", ["nothing", "stack, growth", "two root"])
def test_what_is_neither_a_part_nor_a_cell_is_refused(
    capsys: pytest.CaptureFixture[str], word: str
) -> None:
    with pytest.raises(SystemExit):
        benchmark._arguments(["--only", word])
    assert repr(word) in capsys.readouterr().err


def test_a_repetition_measures_each_cell_once_and_what_is_compared_side_by_side() -> None:
    cells = all_cells(small=False)
    order = in_turn(cells)
    assert sorted(cell.name for cell in order) == sorted(cell.name for cell in cells)
    many = [
        number
        for number, cell in enumerate(order)
        if isinstance(cell, Stack | Pgbench | RedisCounter)
        if getattr(cell, "agents", 200) >= 200
        if cell.part in {"stack", "baselines"}
    ]
    # Where there is a Redis, its counters are among them.
    assert many == list(range(many[0], many[0] + len(many)))
    assert order[many[4]].name == "pgbench"


# --- a crew ---


@dataclass
class Failing:
    """A job that fails, or hangs, before or after it says that it is ready."""

    before: bool
    hangs: bool = False

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[Sequence[Turn]]:
        if self.before:
            await self._fail()
        yield [self._fail]

    async def _fail(self) -> float:
        if self.hangs:
            await asyncio.sleep(SECONDS_MAX)
        raise ZeroDivisionError("planned")

    def billed(self) -> Counter[bytes]:
        return Counter()


@pytest.mark.parametrize("before", [True, False])
def test_what_a_client_process_fails_of_is_told_and_the_next_job_finds_a_process(
    *, before: bool
) -> None:
    with Crew() as crew:
        with pytest.raises(BenchBroken, match="planned"):
            crew.work([Failing(before)], warm_up=0.0, seconds=0.1)
        counted, _ = crew.work([Idle()], warm_up=0.0, seconds=0.1)
    assert counted[0].turns > 0


@pytest.mark.parametrize("before", [True, False])
def test_a_client_process_that_hangs_ends_the_cell_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, *, before: bool
) -> None:
    monkeypatch.setattr(crews, "READY_SECONDS_MAX", 8.0)
    monkeypatch.setattr(crews, "OVER_SECONDS_MAX", 1.0)
    begun = time.monotonic()
    with Crew() as crew, pytest.raises(BenchBroken, match="said nothing"):
        crew.work([Failing(before, hangs=True)], warm_up=0.0, seconds=0.1)
    assert time.monotonic() - begun < SECONDS_MAX / 2


@dataclass
class Idle:
    """A job of turns that do nothing much."""

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[Sequence[Turn]]:
        async def turn() -> float:
            await asyncio.sleep(0.001)
            return 0.0

        yield [turn]

    def billed(self) -> Counter[bytes]:
        return Counter()


# --- ledger and provider ---


def test_a_budget_is_wrong_if_the_provider_billed_something_else(
    running_server: RunningServer, database: str, postgres: Server
) -> None:
    with peculium.connect(running_server.address) as client:
        made = client.admin.grant("one", unit="calls", amount=100, holder="dev")
        budget = client.open("one")
        with budget.reserve(10) as hold:
            hold.settle(7)
        ledger = Ledger(cast("Postgres", postgres), database.rpartition("/")[2].partition("?")[0])
        assert len(ledger.wrong()) == 1
        ledger.billed[made.ref.budget_id] = 7
        assert ledger.wrong() == []
        ledger.billed[made.ref.budget_id] = 8
        assert "billed 8" in ledger.wrong()[0]
        ledger.billed[made.ref.budget_id] = 7
        ledger.billed[b"x" * 16] = 1
        assert "not there" in ledger.wrong()[0]
        del ledger.billed[b"x" * 16]
        left = budget.reserve(5)
        assert "5 held" in ledger.wrong()[0]
        left.release()


# --- figures and pages ---


def cell(name: str, part: str, *rates: float, **more: float) -> dict[str, Any]:
    figures = {"p50_ms": 1.0, "p99_ms": 2.0, "p999_ms": 3.0, **more}
    extra = {"serialization_retries": 0, "lock_timeouts": 0, "cpu": {}}
    return {
        "name": name,
        "part": part,
        "repetitions": [{"per_s": rate, **extra, **figures} for rate in rates],
    }


def measured_run(**changes: Any) -> Run:
    """A run in which every goal is met, and what is changed in it."""
    data: dict[str, Any] = {
        "cells": [
            cell("one root, 200 agents", "stack", 6_900, 7_000, 9_000),
            cell("own roots, 200 agents", "stack", 7_100),
            cell("shared root, 200 agents", "stack", 6_800),
            cell("cluster, one root, 200 processes", "cluster", 900),
            cell("unary, one root, 200 agents", "unary", 900),
            cell("empty handler, 200 callers", "baselines", 2_900),
            cell("bytes to the empty handler", "baselines", 2_950),
            cell("batches to the empty handler", "baselines", 60_000),
            cell("pgbench", "baselines", 6_000),
            cell("row locks, hot, 16 tasks", "baselines", 300),
            cell("row locks, spread, 16 tasks", "baselines", 1_500),
            cell("unloaded, Reserve", "unloaded", 300, p50_ms=3.0),
            cell("unloaded, empty call", "unloaded", 2_000, p50_ms=0.5),
            cell("unloaded, commit", "unloaded", 900, p50_ms=1.0),
            cell("one lane", "lanes", 4_000),
            cell("two lanes", "lanes", 6_500),
        ],
        "growth": [
            {"wanted": 10_000, **cell("", "", 5_000)},
            {"wanted": 1_000_000, **cell("", "", 4_000)},
        ],
        "disk": {"bytes_per_operation": 600.0},
        "mismatches": 0,
    }
    cells = {one["name"]: one for one in data["cells"]}
    for name in list(changes):
        if name in cells:
            cells[name]["repetitions"] = changes.pop(name)["repetitions"]
    return Run(data | changes)


def test_the_last_line_has_medians_and_the_worse_of_the_hot_roots() -> None:
    assert measured_run().line() == {
        "pairs_per_s": 7_100,
        "pairs_per_s_hot_root": 6_800,
        "p50_ms": 1.0,
        "p99_ms": 2.0,
        "unloaded_p50_ms": 3.0,
        "empty_grpc_unary_per_s": 2_900,
        "unary_ops_per_s": 1_800,
        "pgbench_tps": 6_000,
        "rowlock_hot_pairs_per_s": 300,
        "rowlock_spread_pairs_per_s": 1_500,
        "bytes_per_op": 600.0,
        "slowdown_at_1e6": 1.25,
        "mismatches": 0,
    }


def test_ratios_are_of_the_same_repetition_even_if_one_failed() -> None:
    pgbench = cell("pgbench", "baselines", 6_000, 3_000, 1_000)
    # Of the second repetition there is nothing.
    pgbench["repetitions"].pop(1)
    for number, one in zip((1, 3), pgbench["repetitions"], strict=True):
        one["repetition"] = number
    ours = cell("own roots, 200 agents", "stack", 7_000, 7_100, 7_200)
    run = measured_run(**{one["name"]: one for one in (pgbench, ours)})
    [goal] = [one for one in goals(run) if "pgbench" in one.wanted]
    assert goal.reached == "2.03 to one"
    assert goal.in_repetitions == ("4.18", "1.17", "7.20")


def test_goals_are_met_missed_or_not_measured() -> None:
    assert {goal.met for goal in goals(measured_run())} == {True}
    nothing = Run({"cells": [], "mismatches": 0})
    assert [goal.met for goal in goals(nothing)].count(None) == len(goals(nothing)) - 1
    assert set(nothing.line().values()) == {None, 0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pgbench", cell("", "", 7_200)),
        ("shared root, 200 agents", cell("", "", 6_300)),
        ("row locks, hot, 16 tasks", cell("", "", 350)),
        ("row locks, spread, 16 tasks", cell("", "", 1_800)),
        ("empty handler, 200 callers", cell("", "", 3_100)),
        ("bytes to the empty handler", cell("", "", 3_100)),
        ("unloaded, Reserve", cell("", "", 300, p50_ms=3.1)),
        ("two lanes", cell("", "", 5_900)),
        ("two lanes", cell("", "", 6_500, serialization_retries=1)),
        ("one root, 200 agents", cell("", "", 7_000, p99_ms=101.0)),
        ("cluster, one root, 200 processes", cell("", "", 900, p99_ms=101.0)),
        ("growth", [{"wanted": 10_000, **cell("", "", 5_000)},
                    {"wanted": 1_000_000, **cell("", "", 3_800)}]),
        ("disk", {"bytes_per_operation": 751.0}),
        ("mismatches", 1),
    ],
)  # fmt: skip
def test_a_goal_that_was_missed_is_told(name: str, value: Any) -> None:
    met = [goal.met for goal in goals(measured_run(**{name: value}))]
    assert met.count(False) == 1


def test_the_page_and_its_charts_are_what_the_report_writes_from_the_figures(
    tmp_path: Path,
) -> None:
    kept = ROOT / "docs" / "performance"
    shutil.copytree(kept, tmp_path / "performance")
    report.write(kept / "bench.json", tmp_path)
    assert (tmp_path / "performance.md").read_text() == (
        ROOT / "docs" / "performance.md"
    ).read_text()
    for file in kept.iterdir():
        assert (tmp_path / "performance" / file.name).read_bytes() == file.read_bytes()


def test_charts_are_drawings_within_their_bounds() -> None:
    drawn = report.charts(measured_run(growth=[
        {"wanted": size, "entries": size, **cell("", "", *rates)}
        for size, rates in ((10_000, (900, 1_000)), (1_000_000, (800, 950)))
    ]))  # fmt: skip
    assert set(drawn) == {"throughput.svg", "latency.svg", "compared.svg", "growth.svg"}
    for chart in drawn.values():
        root = ET.fromstring(chart)  # noqa: S314 - we have drawn it
        width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
        for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
            assert 0 <= float(circle.attrib["cx"]) <= width
            assert 0 <= float(circle.attrib["cy"]) <= height


# --- pictures of where the time goes ---

LOOP = "_run_code (<frozen runpy>);Runner.run (/lib/python3.11/asyncio/runners.py:118)"
STACKS = f"""\
{LOOP};Lane._run (/srv/peculium/server/peculium_server/lanes/lane.py:20);decide (/srv/peculium/server/peculium_server/core/rules.py:1) 600
{LOOP};Lane._run (/srv/peculium/server/peculium_server/lanes/lane.py:21);decide (/srv/peculium/server/peculium_server/core/rules.py:9) 290
{LOOP};wait <C> (/srv/peculium/.venv/lib/python3.11/site-packages/psycopg/waiting.py:3) 100
{LOOP};<lambda> (/lib/python3.11/uuid.py) 7
{LOOP};rare (/srv/peculium/client/peculium/aio.py:7) 2
_bootstrap (threading.py:5) 1
"""


def test_a_picture_merges_lines_and_names_files_from_their_package_on() -> None:
    drawn = flame.draw("One & all", STACKS)
    titles = [one.text for one in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}title")]  # noqa: S314 - we have drawn it
    assert titles == [
        "<lambda> (uuid.py): 0.7%",
        "Lane._run (peculium_server/lanes/lane.py): 89.0%",
        "decide (peculium_server/core/rules.py): 89.0%",
        "wait <C> (psycopg/waiting.py): 10.0%",
    ]
    assert "srv" not in drawn
    rare = STACKS.splitlines()[4].rpartition(" ")[0]
    layers = [flame.frame(text).layer for text in rare.split(";")]
    assert layers == ["interpreter", "interpreter", "SDK"]


def test_a_picture_of_the_same_stacks_is_the_same_in_whatever_order_they_come() -> None:
    lines = STACKS.splitlines()
    assert len({flame.draw("x", "\n".join(some)) for some in (lines, lines[::-1])}) == 1


def test_boxes_of_a_picture_stand_on_their_callers_and_within_it() -> None:
    root = ET.fromstring(flame.draw("x", STACKS))  # noqa: S314 - we have drawn it
    width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
    boxes = {}
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        if (title := group.findtext("{http://www.w3.org/2000/svg}title")) is not None:
            [box] = group.iter("{http://www.w3.org/2000/svg}rect")
            x, y, wide, high = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
            assert 0 <= x <= x + wide <= width
            assert 0 <= y <= y + high <= height
            boxes[title.split()[0]] = (x, y, wide)
    assert boxes["Lane._run"][0::2] == boxes["decide"][0::2]
    assert boxes["Lane._run"][1] > boxes["decide"][1]


def test_a_picture_that_is_kept_is_small_and_knows_nothing_of_the_machine() -> None:
    for file in (ROOT / "docs" / "performance").glob("flame-*.svg"):
        text = file.read_text()
        assert len(text) < 150_000
        assert "<script" not in text
        assert not any(f"({path}" in text for path in ("/", *map(str, ROOT.parents)))


def test_the_page_shows_for_each_process_what_was_before_first() -> None:
    files = [f"flame-{who}-{name}.svg" for who in ("client", "server") for name in ("a", "before")]
    [_, *shown] = report._flames(files)
    assert [one.split("performance/")[1:] for one in shown] == [
        [f"flame-{who}-before.svg)\n\n![{who}, a](", f"flame-{who}-a.svg)"]
        for who in ("server", "client")
    ]
