"""What a run comes to: medians of its repetitions, the goals, and the one line that programs read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

KEYS = (
    "pairs_per_s",
    "pairs_per_s_hot_root",
    "p50_ms",
    "p99_ms",
    "unloaded_p50_ms",
    "empty_grpc_unary_per_s",
    "unary_ops_per_s",
    "pgbench_tps",
    "rowlock_hot_pairs_per_s",
    "rowlock_spread_pairs_per_s",
    "bytes_per_op",
    "slowdown_at_1e6",
    "mismatches",
)
AGENTS = 200
"""How many share a root where the goals speak of it."""
PEER_PAIRS_PER_S = 5_300
"""The peer's bare Redis script engine, synced always, pipelined, on a machine of this class."""


class Spread(NamedTuple):
    """The median of some repetitions, and the least and the most of them."""

    median: float
    low: float
    high: float


def spread(repetitions: Iterable[Mapping[str, Any]], key: str) -> Spread | None:
    """Of one figure; None if no repetition has it."""
    values = [one[key] for one in repetitions if one.get(key) is not None]
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


class Run:
    """A run's JSON."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.cells: dict[str, Mapping[str, Any]] = {cell["name"]: cell for cell in data["cells"]}

    def of(self, name: str, key: str = "per_s") -> Spread | None:
        """A figure of a cell; None if it was not measured."""
        cell = self.cells.get(name)
        return None if cell is None else spread(cell["repetitions"], key)

    def median(self, name: str, key: str = "per_s") -> float | None:
        """The median of a figure of a cell."""
        found = self.of(name, key)
        return None if found is None else found.median

    def best(self, parts: Iterable[str], prefix: str = "") -> tuple[str, float] | None:
        """Which cell of some parts has the highest median rate, and which rate that is."""
        wanted = set(parts)
        rates = {
            name: rate
            for name, cell in self.cells.items()
            if cell["part"] in wanted
            and name.startswith(prefix)
            and (rate := self.median(name)) is not None
        }
        if not rates:
            return None
        name = max(rates, key=lambda one: rates[one])
        return name, rates[name]

    def best_rate(self, parts: Iterable[str], prefix: str = "") -> float | None:
        """The highest median rate."""
        found = self.best(parts, prefix)
        return None if found is None else found[1]

    def worst_p99(self, parts: Iterable[str], suffix: str = "") -> float | None:
        """The highest median p99 of the cells of some parts, in milliseconds."""
        wanted = set(parts)
        found = [
            value
            for name, cell in self.cells.items()
            if cell["part"] in wanted
            and name.endswith(suffix)
            and (value := self.median(name, "p99_ms")) is not None
        ]
        return max(found, default=None)

    @property
    def agents(self) -> int:
        """How many share a root in the cells that the goals speak of; fewer in a slice."""
        there = [
            int(name.split()[2])
            for name in self.cells
            if name.startswith("one root, ") and int(name.split()[2]) <= AGENTS
        ]
        return max(there, default=AGENTS)

    def hot_roots(self) -> dict[str, float]:
        """One root that all share, by how: children below it, or the root itself."""
        named = {
            "budgets below one root": f"one root, {self.agents} agents",
            "one budget for all": f"shared root, {self.agents} agents",
        }
        return {how: rate for how, name in named.items() if (rate := self.median(name)) is not None}

    @property
    def unary_ops(self) -> float | None:
        """Operations a second where each travels alone, two to a pair."""
        rate = self.best_rate(["unary"])
        return None if rate is None else 2 * rate

    @property
    def unloaded(self) -> tuple[float | None, float | None]:
        """Of one Reserve, and of an empty call and a commit together, in milliseconds."""
        empty = self.median("unloaded, empty call", "p50_ms")
        commit = self.median("unloaded, commit", "p50_ms")
        both = None if empty is None or commit is None else empty + commit
        return self.median("unloaded, Reserve", "p50_ms"), both

    def growth(self, entries: int, key: str = "per_s") -> Spread | None:
        """A figure at a size."""
        for one in self.data.get("growth", ()):
            if one["wanted"] == entries:
                return spread(one["repetitions"], key)
        return None

    @property
    def slowdown(self) -> float | None:
        """How much slower a ledger of a million entries is than one of ten thousand."""
        few, many = self.growth(10_000), self.growth(1_000_000)
        return _ratio(few and few.median, many and many.median)

    @property
    def bytes_per_op(self) -> float | None:
        """On disk, of the largest ledger."""
        disk = self.data.get("disk")
        return None if disk is None else float(disk["bytes_per_operation"])

    def line(self) -> dict[str, float | int | None]:
        """The last line of a run: null is what it did not measure."""
        hot = self.hot_roots()
        name = f"one root, {self.agents} agents"
        values = {
            "pairs_per_s": self.best_rate(["stack"]),
            "pairs_per_s_hot_root": min(hot.values(), default=None),
            "p50_ms": self.median(name, "p50_ms"),
            "p99_ms": self.median(name, "p99_ms"),
            "unloaded_p50_ms": self.unloaded[0],
            "empty_grpc_unary_per_s": self.best_rate(["baselines"], "empty handler, "),
            "unary_ops_per_s": self.unary_ops,
            "pgbench_tps": self.median("pgbench"),
            "rowlock_hot_pairs_per_s": self.best_rate(["baselines"], "row locks, hot"),
            "rowlock_spread_pairs_per_s": self.best_rate(["baselines"], "row locks, spread"),
            "bytes_per_op": self.bytes_per_op,
            "slowdown_at_1e6": self.slowdown,
            "mismatches": self.data["mismatches"],
        }
        return {key: value if value is None else round(value, 3) for key, value in values.items()}


@dataclass(frozen=True)
class Goal:
    """Something to be reached, and what was."""

    wanted: str
    reached: str
    met: bool | None
    """None: not measured."""


def _goal(
    wanted: str, value: float | None, holds: Callable[[float], bool], text: str = "{:,.0f}"
) -> Goal:
    if value is None:
        return Goal(wanted, "not measured", None)
    return Goal(wanted, text.format(value), holds(value))


def goals(run: Run) -> list[Goal]:
    """All goals, with what was reached."""
    pairs, pgbench = run.best_rate(["stack"]), run.median("pgbench")
    own = run.median(f"own roots, {run.agents} agents")
    hot, spread_rate = (
        run.best_rate(["baselines"], f"row locks, {kind}") for kind in ("hot", "spread")
    )
    empty = run.line()["empty_grpc_unary_per_s"]
    reserve, both = run.unloaded
    found = [
        _goal(
            "pairs a second, best setting: at least 5,300 (the peer's bare engine)",
            pairs,
            lambda value: value >= PEER_PAIRS_PER_S,
        ),
        _goal(
            "pairs a second: at least one for each transaction of pgbench",
            _ratio(pairs, pgbench),
            lambda value: value >= 1,
            "{:.2f} to one",
        ),
    ]
    for how, rate in run.hot_roots().items():
        found.append(
            _goal(
                f"{run.agents} agents on {how}: at least 90 % of a root for each",
                _ratio(rate, own),
                lambda value: value >= 0.9,
                "{:.0%}",
            )
        )
    lowest = min(run.hot_roots().values(), default=None)
    lanes = [
        value
        for name in ("two lanes", "two lanes, two servers")
        if (value := run.median(name)) is not None
    ]
    conflicts = sum(
        one["serialization_retries"]
        for cell in run.cells.values()
        if cell["part"] == "lanes"
        for one in cell["repetitions"]
    )

    return [
        *found,
        _goal(
            "one root for all: at least 20 times row locks on a hot row",
            _ratio(lowest, hot),
            lambda value: value >= 20,
            "{:.1f} times",
        ),
        _goal(
            "one root for all: at least 4 times row locks on rows of their own",
            _ratio(lowest, spread_rate),
            lambda value: value >= 4,
            "{:.1f} times",
        ),
        _goal(
            "operations that travel alone: at least 60 % of empty calls",
            _ratio(run.unary_ops, empty),
            lambda value: value >= 0.6,
            "{:.0%}",
        ),
        _goal(
            "the same of calls without messages, of bytes alone (stricter than the goal)",
            _ratio(run.unary_ops, run.median("bytes to the empty handler")),
            lambda value: value >= 0.6,
            "{:.0%}",
        ),
        _goal(
            "unloaded Reserve: at most twice an empty call and a commit (medians)",
            _ratio(reserve, both),
            lambda value: value <= 2,
            "{:.2f} times",
        ),
        _goal(
            "two lanes busy at once: no serialization retries",
            float(conflicts) if lanes else None,
            lambda value: value == 0,
        ),
        _goal(
            "two lanes busy at once: at least 1.5 times one lane, where there are cores for it",
            _ratio(max(lanes, default=None), run.median("one lane")),
            lambda value: value >= 1.5,
            "{:.2f} times",
        ),
        _goal(
            f"p99 of a Reserve with {run.agents} agents in one process or two, worst setting: at most 100 ms",
            run.worst_p99(["stack"], f" {run.agents} agents"),
            lambda value: value <= 100,
            "{:,.1f} ms",
        ),
        _goal(
            "the same with an agent in each of as many processes, over two servers",
            run.worst_p99(["cluster"]),
            lambda value: value <= 100,
            "{:,.1f} ms",
        ),
        _goal(
            "a million entries: at most 1.3 times slower than ten thousand",
            run.slowdown,
            lambda value: value <= 1.3,
            "{:.2f} times",
        ),
        _goal(
            "bytes on disk for an operation, all indexes and the chain included: at most 750",
            run.bytes_per_op,
            lambda value: value <= 750,
        ),
        _goal(
            "budgets of which ledger and provider say different things: none",
            float(run.data["mismatches"]),
            lambda value: value == 0,
        ),
    ]
