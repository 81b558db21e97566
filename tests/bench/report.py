"""The pages about performance, from a run's JSON: `python -m tests.bench.report FILE`.

Nothing in them is written by hand. Pictures of where the time goes, `flame-*.svg`, are shown if they are
there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.charts import Bar, Series, bars, lines
from tests.bench.figures import Run, Spread, goals, spread

ROOT = Path(__file__).parents[2]
BUSY = 1.0
"""A machine that had more than so many processes to run before the run began was not quiet."""

GOALS = """\
Reached is the ratio of the medians of this run. By repetition is the median, and in brackets the least and the most,
of the ratios within each repetition, which measures what is compared within a minute or so."""

METHOD = """\
One run on one machine: an embedded PostgreSQL with its own default settings, `peculium serve` with its own,
and client processes share its processors. `fsync`, `synchronous_commit` and `full_page_writes` are on.

- A **pair** is a Reserve and a Settle, two durable operations. Every agent waits for its Reserve, then for its
  Settle, and begins again at once. There is a warm-up before the window; a pair that one of the window's ends cuts
  counts by its part within, since pairs that travel together end together.
- Everything is measured in turn: each repetition measures every row of the tables once, so that what disturbs the
  machine disturbs all alike. What is compared is close together: pgbench, row locks and Redis are measured among the
  coalesced agents, empty calls among operations that travel alone. Given is the **median** of the repetitions, and in brackets the
  least and the most of them. Latencies are those of a Reserve as its caller sees it; of each percentile it is
  again the median of the repetitions.
- Clients run on uvloop, as the server does. *Coalesced* is the SDK as it is: what the agents of one process ask
  at the same time travels together. *Alone* is every operation in a call of its own: unary calls on the stubs over
  one channel, with requests that the SDK's own builder makes.
- *One root*: each agent has a budget held by token, all below one root, and so all in one lane. *Own roots*: each
  agent has a root held by token. *Shared root*: all reserve from one budget that their principal holds.
- The *empty handler* is a gRPC server as ours, on uvloop in a process of its own, whose Reserve parses its request and
  answers with an empty response. *Bytes* and *batches* are calls of a method without messages, which carry the bytes of
  one and of 50 Reserves.
  *pgbench* is `pgbench -N -M prepared -c 16 -j 2`, scale 10. *Row locks* are what one would write first: SELECT …
  FOR UPDATE, UPDATE, INSERT, COMMIT for each operation, a connection for each task.
- *Redis*, where there is one, is a counter that a script checks, `appendfsync always`: it knows no holds, no operations
  and no history, so it is no ledger, and shows what a sync of a log alone allows. Pipelined are four connections with 50
  pairs each on their way.
- The provider's bill is kept beside the ledger, and compared with every budget at the end."""

FLAMES = """\
Of a run of its own: 200 agents below one root, coalesced, from one client process; py-spy looks 250 times a second at
what holds the interpreter's lock. So only Python that runs is in the pictures, and neither gRPC's own threads nor
PostgreSQL. Each box is a function, as wide as its part of the samples, and stands on its caller. *Before* is commit
3d27db8, the last one before the work on processor time. Opened by itself, a picture tells of each box under the
pointer what it is, and how much."""

AGAIN = """\
## Again

    make bench                                 # half an hour on a quiet machine; writes this page
    make bench ARGS="--full"                   # up to three million entries
    make bench ARGS="--seconds-per-cell 1.5"   # shorter windows
    make bench ONLY=stack,baselines            # only some parts; this page stays as it is
    make bench ONLY="pgbench,one root, 200 agents"   # only some rows, by how their names begin
    make bench SLICE=1                         # see that it runs
    make fleet AGENTS=10000 SECONDS=300        # `ARGS=--report` shows it here
    make flame NAME=after                      # pictures of where the time goes

All figures, of every repetition: [bench.json](performance/bench.json)."""


def write_fleet(file: Path, docs: Path) -> None:
    """Keep a fleet's JSON, and write the page again with it if there is one."""
    folder = docs / "performance"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fleet.json").write_text(text(json.loads(file.read_text())))
    if (folder / "bench.json").exists():
        write(folder / "bench.json", docs)


def text(data: Mapping[str, Any]) -> str:
    """JSON with a line for each thing, and in lists for each of theirs, so that changes can be seen."""
    parts = []
    for name, value in data.items():
        if isinstance(value, list) and value:
            shown = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        else:
            shown = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {shown}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(file: Path, docs: Path) -> None:
    """Write the page, its charts and its figures from a run's JSON."""
    run = Run(json.loads(file.read_text()))
    folder = docs / "performance"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(text(run.data))
    drawn = charts(run)
    for name, chart in drawn.items():
        (folder / name).write_text(chart)
    flames = sorted(path.name for path in folder.glob("flame-*.svg"))
    fleet = folder / "fleet.json"
    told = json.loads(fleet.read_text()) if fleet.exists() else None
    (docs / "performance.md").write_text(page(run, list(drawn), flames, told))


def page(
    run: Run, drawn: Sequence[str], flames: Sequence[str], fleet: Mapping[str, Any] | None
) -> str:
    """The whole page."""
    sections = [
        "<!-- Written by `python -m tests.bench.report`; do not edit. -->\n# Performance",
        _when(run),
        *_goals(run),
        "## Method\n\n" + METHOD,
        *_throughput(run, drawn),
        *_baselines(run, drawn),
        *_unloaded(run),
        *_lanes(run),
        *_growth(run, drawn),
        *_fleet(fleet),
        *_flames(flames),
        *_not_measured(run, fleet),
        AGAIN,
    ]
    return "\n\n".join(sections) + "\n"


# --- parts of the page ---


def _when(run: Run) -> str:
    data, machine = run.data, run.data["machine"]
    options, load = data["options"], data["load_average"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    settings = machine["postgresql"]
    shown = ", ".join(
        f"{name} {value}" for name, value in settings.items() if name != "server_version"
    )
    notes = []
    if options["slice"]:
        notes.append(
            "**This is a slice: it shows that the benchmark runs, and no figure means anything.**"
        )
    elif load["begin"][0] > BUSY:
        notes.append(
            f"**The machine was not quiet: {load['begin'][0]:g} processes wanted to run when it began."
            " The figures are lower than those of a quiet run, and none should be quoted.**"
        )
    if data["failures"]:
        notes.append(f"**What failed is missing: {'; '.join(data['failures'])}.**")
    rows = [
        ("run", f"{data['begun']} to {data['ended']}, at {machine['commit']}"),
        (
            "windows",
            f"{options['seconds_per_cell']:g} s each, {options['repetitions']} repetitions",
        ),
        (
            "load average",
            f"{load['begin'][0]:g} when it began, {load['end'][0]:g} when it ended",
        ),
        (
            "machine",
            (
                f"{machine['cores']} cores, {machine['processor']}, {machine['memory_gb']:g} GB,"
                f" {machine['kernel']}, {machine['file_system']}"
            ),
        ),
        ("software", f"Python {machine['python']}, {packages}"),
        (f"PostgreSQL {settings['server_version']}", shown),
    ]
    return "\n\n".join([*notes, table(("", ""), rows)])


def _goals(run: Run) -> list[str]:
    words = {True: "met", False: "**not met**", None: "not measured"}
    rows = [
        (
            goal.wanted,
            goal.reached,
            "-" if goal.in_repetitions is None else _bounded(*goal.in_repetitions),
            words[goal.met],
        )
        for goal in goals(run)
    ]
    return [f"## Goals\n\n{GOALS}\n\n" + table(("goal", "reached", "by repetition", ""), rows)]


_RATES = ("pairs/s", "p50 ms", "p99 ms", "p99.9 ms", "client CPU", "server CPU", "PostgreSQL CPU")


def _throughput(run: Run, drawn: Sequence[str]) -> list[str]:
    sections = []
    for part, title in (
        ("stack", "Pairs a second, coalesced"),
        ("unary", "Pairs a second, every operation alone, from one process"),
        ("cluster", "Processes with one agent each, over two servers"),
    ):
        rows = [(name, *_rates(cell)) for name, cell in run.cells.items() if cell["part"] == part]
        if not rows:
            continue
        pictures = {
            "stack": ("throughput.svg", "latency.svg"),
        }.get(part, ())
        section = f"## {title}\n\n" + table(("", *_RATES), rows)
        sections.append("\n\n".join([section, *_pictures(pictures, drawn)]))
    if sections:
        sections.append(
            "CPU is in cores. Neither a client process nor a server can use more than one."
        )
    return sections


def _rates(cell: Mapping[str, Any]) -> Iterable[str]:
    repetitions = cell["repetitions"]
    yield _shown(spread(repetitions, "per_s"))
    for key in ("p50_ms", "p99_ms", "p999_ms"):
        yield _shown(spread(repetitions, key), digits=1, bounds=key == "p99_ms")
    for who in ("clients", "server", "postgres"):
        yield _shown(spread([one.get("cpu", {}) for one in repetitions], who), 2, bounds=False)


def _baselines(run: Run, drawn: Sequence[str]) -> list[str]:
    counted = {
        "empty": "calls",
        "batches": "operations",
        "bytes": "calls",
        "pgbench": "transactions",
        "row": "pairs",
        "redis,": "pairs",
    }
    rows = []
    for name, cell in run.cells.items():
        if cell["part"] == "baselines":
            repetitions = cell["repetitions"]
            latency = spread(repetitions, "p50_ms") or spread(repetitions, "mean_ms")
            rows.append(
                (
                    name,
                    counted[name.split()[0]],
                    _shown(spread(repetitions, "per_s")),
                    _shown(latency, 2, bounds=False),
                    _shown(spread(repetitions, "p99_ms"), 2, bounds=False),
                )
            )
    if not rows:
        return []
    heads = ("", "what", "a second", "p50 ms", "p99 ms")
    note = "Of pgbench the mean latency is given. Latencies of row locks and Redis are those of the reserving half."
    compared = table(heads, rows)
    pictures = _pictures(("compared.svg",), drawn)
    return ["\n\n".join(["## What it is compared with\n\n" + compared, note, *pictures])]


def _unloaded(run: Run) -> list[str]:
    rows = [
        (name.removeprefix("unloaded, "), *(_shown(run.of(name, key), 2) for key in keys))
        for name, cell in run.cells.items()
        for keys in [("p50_ms", "p99_ms")]
        if cell["part"] == "unloaded"
    ]
    if not rows:
        return []
    return [
        "## Unloaded\n\nOne after the other, and nothing else: an agent's Reserve, an empty call, an INSERT"
        " that commits.\n\n" + table(("", "p50 ms", "p99 ms"), rows)
    ]


def _lanes(run: Run) -> list[str]:
    rows = [
        (
            name,
            *_rates(cell),
            sum(one["serialization_retries"] for one in cell["repetitions"]),
            sum(one["lock_timeouts"] for one in cell["repetitions"]),
        )
        for name, cell in run.cells.items()
        if cell["part"] == "lanes"
    ]
    if not rows:
        return []
    heads = ("", *_RATES, "serialization retries", "waits for a lane given up")
    return [
        "## Lanes\n\nThe same agents in two client processes: in one tree, and in two trees of different"
        " lanes. Retries are counted in PostgreSQL's log.\n\n" + table(heads, rows)
    ]


def _growth(run: Run, drawn: Sequence[str]) -> list[str]:
    sections = []
    grown = run.data.get("growth", ())
    if grown:
        rows = [(f"{one['entries']:,}", *_rates(one)) for one in grown]
        sections.append(
            "\n\n".join(
                [
                    "## Growth\n\nAll entries are in one tree, made by reserving and settling, and so in one lane."
                    " Each size is vacuumed once it is reached. Ledgers below 200,000 entries are copied"
                    " anew for each repetition, since to measure makes them grow.\n\n"
                    + table(("entries", *_RATES), rows),
                    *_pictures(("growth.svg",), drawn),
                ]
            )
        )
    for part, title in (("trees", "Agents in one tree"), ("depth", "Depth of the tree")):
        rows = [(name, *_rates(cell)) for name, cell in run.cells.items() if cell["part"] == part]
        if rows:
            note = {
                "trees": "At most 200 agents are at work at once, on all budgets of the tree in turn.",
                "depth": "50 agents on the deepest level; the root is on the first, so there each has its own.",
            }[part]
            sections.append(f"### {title}\n\n{note}\n\n" + table(("", *_RATES), rows))
    sections += [*_disk(run), *_memory(run), *_recovery(run)]
    return sections


def _disk(run: Run) -> list[str]:
    disk = run.data.get("disk")
    if disk is None:
        return []
    rows = [
        (name, f"{size / disk['operations']:,.1f}")
        for name, size in sorted(disk["bytes"].items(), key=lambda one: -one[1])
        if size / disk["operations"] >= 0.05
    ]
    total = ("**all**", f"**{disk['bytes_per_operation']:,.1f}**")
    return [
        f"### Disk\n\nBytes for each of {disk['operations']:,} operations, after VACUUM, with all indexes.\n\n"
        + table(("table", "bytes an operation"), [*rows, total])
    ]


def _memory(run: Run) -> list[str]:
    memory = run.data.get("memory")
    if memory is None:
        return []
    return [
        (
            f"### Memory\n\nA server has {memory['server_rss_mb_before']:g} MB when it has started, and"
            f" {memory['server_rss_mb']:g} MB with {memory['connections']:,} clients connected, each of which has"
            f" asked for something: {memory['kb_per_connection']:g} kB for each."
        )
    ]


def _recovery(run: Run) -> list[str]:
    recovery = run.data.get("recovery", {})
    names = {
        "start_up": "a server's start, on a database that runs",
        "server_killed": "SIGKILL of a server under load, and the start of another",
        "postgres_killed": "SIGKILL of PostgreSQL under load, and its start; the server runs on",
    }
    rows = [
        (what, _shown(spread(recovery[name], "answer_s"), 2))
        for name, what in names.items()
        if recovery.get(name)
    ]
    if not rows:
        return []
    return [
        "### Start and recovery\n\n"
        + table(("from", "seconds to the first Reserve answered"), rows)
    ]


def _fleet(fleet: Mapping[str, Any] | None) -> list[str]:
    if fleet is None:
        return []
    figures, cpu = fleet["figures"], fleet["cpu"]
    rows = [(name, f"{value:,}") for name, value in figures.items()]
    met = (
        not figures["overshoot"]
        and not figures["mismatches"]
        and figures["p99_ms"] is not None
        and figures["p99_ms"] < 250
    )
    return [
        f"## A fleet\n\n{fleet['begun']}, at {fleet['machine']['commit']}, load average"
        f" {fleet['load_average']['begin'][0]:g} when it began. {fleet['cadence']}\n\nGoal: nothing overshot,"
        f" nothing mismatched, p99 of a Reserve below 250 ms: {'met' if met else '**not met**'}.\n\n"
        + table(("", ""), rows)
        + f"\n\nProcessors used, in cores: {cpu['clients']:.2f} by clients, {cpu['server']:.2f} by the server,"
        f" {cpu['postgres']:.2f} by PostgreSQL. {fleet['refused']:,} Reserves were refused."
    ]


def _flames(flames: Sequence[str]) -> list[str]:
    """By process, what was before first."""
    if not flames:
        return []
    sections = [f"## Where the time goes\n\n{FLAMES}"]
    for who in ("server", "client"):
        begin = f"flame-{who}-"
        names = [file.removeprefix(begin).removesuffix(".svg") for file in flames if begin in file]
        names.sort(key=lambda name: (name != "before", name))
        pictures = [f"![{who}, {name}](performance/{begin}{name}.svg)" for name in names]
        sections.append("\n\n".join([f"### The {who}", *pictures]))
    return sections


def _not_measured(run: Run, fleet: Mapping[str, Any] | None) -> list[str]:
    missing = [
        (
            "More than one machine: clients, servers and PostgreSQL share the processors, which is slower than a"
            " deployment, and there is no network between them."
        ),
        "CockroachDB, PgBouncer, and PostgreSQL with replicas.",
        "Time in a provider: agents do not think between Reserve and Settle, but for the fleet.",
    ]
    if not run.data["options"]["redis"]:
        missing.append(
            "Redis: there was no `redis-server` on the path. Where there is one, a counter checked by a script,"
            " `appendfsync always`, is measured in the same run."
        )
    if not any(one["wanted"] == 3_000_000 for one in run.data.get("growth", ())):
        missing.append("Three million entries: `--full` measures them.")
    if run.data["options"]["only"]:
        missing.append(f"Parts other than {', '.join(run.data['options']['only'])}.")
    if fleet is None:
        missing.append("A fleet: `make fleet`.")
    return ["## What was not measured\n\n" + "\n".join(f"- {one}" for one in missing)]


# --- charts ---


def charts(run: Run) -> dict[str, str]:
    """The charts that there are figures for, by file name."""
    drawn = {}
    kinds = {
        "one root": "one root, ",
        "own roots": "own roots, ",
        "shared root": "shared root, ",
        "alone, one root": "unary, one root, ",
    }
    throughput = [Series(name, _by_agents(run, prefix)) for name, prefix in kinds.items()]
    if any(one.points for one in throughput):
        drawn["throughput.svg"] = lines(
            "Reserve and settle, from one client process",
            *("agents", "pairs a second"),
            throughput,
            log_y=False,
        )
    latency = [
        Series(f"{quantile}, {name}", _by_agents(run, kinds[name], key))
        for name in ("one root", "shared root")
        for quantile, key in (("p50", "p50_ms"), ("p99", "p99_ms"))
    ]
    if any(one.points for one in latency):
        drawn["latency.svg"] = lines(
            "Latency of a Reserve", "agents", "milliseconds", latency, log_y=True
        )
    rows = _compared(run)
    if rows:
        drawn["compared.svg"] = bars("On the same machine, in the same run", "a second", rows)
    grown = [
        (float(one["entries"]), found)
        for one in run.data.get("growth", ())
        if (found := spread(one["repetitions"], "per_s"))
    ]
    if grown:
        drawn["growth.svg"] = lines(
            "A ledger that grows",
            *("entries", "pairs a second"),
            [Series("one root", grown)],
            log_y=False,
        )
    return drawn


def _by_agents(run: Run, prefix: str, key: str = "per_s") -> list[tuple[float, Spread]]:
    return [
        (float(name.removeprefix(prefix).split()[0]), found)
        for name in run.cells
        if name.startswith(prefix) and (found := run.of(name, key))
    ]


def _compared(run: Run) -> list[Bar]:
    named: list[tuple[str, str | None, bool]] = []
    best = run.best(["stack"])
    if best is not None:
        named.append((f"pairs, {best[0]}", best[0], True))
    shared = f"shared root, {run.agents} agents"
    if best is None or best[0] != shared:
        named.append((f"pairs, {shared}", shared, True))
    named.append(("transactions of pgbench", "pgbench", False))
    for kind, what in (("hot", "on one row"), ("spread", "on many rows")):
        found = run.best(["baselines"], f"row locks, {kind}")
        named.append((f"pairs, row locks {what}", found and found[0], False))
    named += [
        (f"pairs, {name}", name, False) for name in ("redis, not pipelined", "redis, pipelined")
    ]
    return [
        Bar(text, value, ours)
        for text, name, ours in named
        if name is not None and (value := run.of(name))
    ]


def _pictures(names: Sequence[str], drawn: Sequence[str]) -> list[str]:
    return [
        f"![{name.removesuffix('.svg')}](performance/{name})" for name in names if name in drawn
    ]


# --- words ---


def _shown(value: Spread | None, digits: int = 0, *, bounds: bool = True) -> str:
    if value is None:
        return "-"
    median, low, high = (f"{one:,.{digits}f}" for one in value)
    return _bounded(median, low, high) if bounds else median


def _bounded(median: str, low: str, high: str) -> str:
    return f"{median} ({low} … {high})" if low != high else median


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of a page."""
    lines_ = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines_)


def main() -> int:
    """Write the pages from a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.report", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    write(given.file, given.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
