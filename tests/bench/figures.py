"""What a run comes to: medians of its repetitions, the goals, and the one line that programs read."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
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


def by_repetition(repetitions: Iterable[Mapping[str, Any]], key: str) -> dict[int, float]:
    """One figure, by the number of the repetition that has it."""
    return {
        one.get("repetition", number): one[key]
        for number, one in enumerate(repetitions, start=1)
        if one.get(key) is not None
    }


def ratios(one: Mapping[int, float], other: Mapping[int, float]) -> Spread | None:
    """Of what was measured in the same repetition; None if there is no such."""
    values = [one[number] / other[number] for number in one if other.get(number)]
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

    def median(self, name: str | None, key: str = "per_s") -> float | None:
        """The median of a figure of a cell."""
        found = None if name is None else self.of(name, key)
        return None if found is None else found.median

    def by_repetition(self, name: str | None, key: str = "per_s") -> dict[int, float]:
        """A figure of a cell by repetition; none if it was not measured."""
        cell = None if name is None else self.cells.get(name)
        return {} if cell is None else by_repetition(cell["repetitions"], key)

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

    def hot_roots(self) -> dict[str, str]:
        """The cells of one root that all share, by how: children below it, or the root itself."""
        named = {
            "budgets below one root": f"one root, {self.agents} agents",
            "one budget for all": f"shared root, {self.agents} agents",
        }
        return {how: name for how, name in named.items() if self.median(name) is not None}

    @property
    def hottest(self) -> str | None:
        """The slower of them."""
        return min(self.hot_roots().values(), key=lambda name: self.median(name) or 0, default=None)

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

    def growth_by_repetition(self, entries: int) -> dict[int, float]:
        """Pairs a second at a size, by repetition."""
        for one in self.data.get("growth", ()):
            if one["wanted"] == entries:
                return by_repetition(one["repetitions"], "per_s")
        return {}

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
        name = f"one root, {self.agents} agents"
        values = {
            "pairs_per_s": self.best_rate(["stack"]),
            "pairs_per_s_hot_root": self.median(self.hottest),
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
    in_repetitions: tuple[str, str, str] | None = None
    """Of a ratio: the median of those of each repetition, the least and the most."""


def _goal(
    wanted: str,
    value: float | None,
    holds: Callable[[float], bool],
    text: str = "{:,.0f}",
    in_repetitions: Spread | None = None,
) -> Goal:
    if value is None:
        return Goal(wanted, "not measured", None)
    if in_repetitions is None:
        return Goal(wanted, text.format(value), holds(value))
    median, low, high = map(text.partition(" ")[0].format, in_repetitions)
    return Goal(wanted, text.format(value), holds(value), (median, low, high))


def goals(run: Run) -> list[Goal]:
    """All goals, with what was reached."""
    return [
        *_pairs_goals(run),
        *_alone_goals(run),
        *_lanes_goals(run),
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
            ratios(*(run.growth_by_repetition(size) for size in (10_000, 1_000_000))),
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


def _pairs_goals(run: Run) -> Iterator[Goal]:
    best = run.best(["stack"])
    pairs, of_best = (None, {}) if best is None else (best[1], run.by_repetition(best[0]))
    yield _goal(
        "pairs a second, best setting: at least 5,300 (the peer's bare engine)",
        pairs,
        lambda value: value >= PEER_PAIRS_PER_S,
    )
    yield _goal(
        "pairs a second: at least one for each transaction of pgbench",
        _ratio(pairs, run.median("pgbench")),
        lambda value: value >= 1,
        "{:.2f} to one",
        ratios(of_best, run.by_repetition("pgbench")),
    )
    own = f"own roots, {run.agents} agents"
    for how, name in run.hot_roots().items():
        yield _goal(
            f"{run.agents} agents on {how}: at least 90 % of a root for each",
            _ratio(run.median(name), run.median(own)),
            lambda value: value >= 0.9,
            "{:.0%}",
            ratios(run.by_repetition(name), run.by_repetition(own)),
        )
    lowest = run.median(run.hottest)
    for kind, where, least in (("hot", "a hot row", 20), ("spread", "rows of their own", 4)):
        locks = run.best(["baselines"], f"row locks, {kind}")
        yield _goal(
            f"one root for all: at least {least} times row locks on {where}",
            _ratio(lowest, locks and locks[1]),
            partial(operator.le, least),
            "{:.1f} times",
            ratios(run.by_repetition(run.hottest), run.by_repetition(locks and locks[0])),
        )


def _alone_goals(run: Run) -> Iterator[Goal]:
    best = run.best(["unary"])
    alone = {number: 2 * rate for number, rate in run.by_repetition(best and best[0]).items()}
    empty = run.best(["baselines"], "empty handler, ")
    for what, name in (
        ("operations that travel alone: at least 60 % of empty calls", empty and empty[0]),
        (
            "the same of calls without messages, of bytes alone (stricter than the goal)",
            "bytes to the empty handler",
        ),
    ):
        yield _goal(
            what,
            _ratio(run.unary_ops, run.median(name)),
            lambda value: value >= 0.6,
            "{:.0%}",
            ratios(alone, run.by_repetition(name)),
        )
    reserve, both = run.unloaded
    calls, commits = (
        run.by_repetition(f"unloaded, {name}", "p50_ms") for name in ("empty call", "commit")
    )
    yield _goal(
        "unloaded Reserve: at most twice an empty call and a commit (medians)",
        _ratio(reserve, both),
        lambda value: value <= 2,
        "{:.2f} times",
        ratios(
            run.by_repetition("unloaded, Reserve", "p50_ms"),
            {number: calls[number] + commits[number] for number in calls.keys() & commits},
        ),
    )


def _lanes_goals(run: Run) -> Iterator[Goal]:
    rates = {
        name: rate
        for name in ("two lanes", "two lanes, two servers")
        if (rate := run.median(name)) is not None
    }
    conflicts = sum(
        one["serialization_retries"]
        for cell in run.cells.values()
        if cell["part"] == "lanes"
        for one in cell["repetitions"]
    )
    yield _goal(
        "two lanes busy at once: no serialization retries",
        float(conflicts) if rates else None,
        lambda value: value == 0,
    )
    best = max(rates, key=lambda name: rates[name], default=None)
    yield _goal(
        "two lanes busy at once: at least 1.5 times one lane, where there are cores for it",
        _ratio(run.median(best), run.median("one lane")),
        lambda value: value >= 1.5,
        "{:.2f} times",
        ratios(run.by_repetition(best), run.by_repetition("one lane")),
    )
