"""What a replay's trials come to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.replay.catalogue import Row

OURS = "Peculium"
_Z = 1.959964
"""Of a two-sided interval of 95 %."""


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson's score)."""
    if not trials:
        return 0.0, 1.0
    share, square = hits / trials, _Z * _Z
    middle = share + square / (2 * trials)
    width = _Z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    below = 1 + square / trials
    return max(0.0, (middle - width) / below), min(1.0, (middle + width) / below)


def fitting(refused: Sequence[int], rest: int) -> int:
    """How many of the refused calls would have fitted into what was left: false refusals."""
    count = 0
    for cost in sorted(refused):
        if cost > rest:
            break
        rest -= cost
        count += 1
    return count


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that this share does not exceed; None without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


@dataclass(frozen=True)
class Cell:
    """One contestant in one scenario."""

    scenario: str
    contestant: str
    trials: int
    over: int
    """Trials whose bill exceeds the cap."""
    overshoot: float
    """The median amount of them."""
    overshoot_most: int
    calls: float
    """Useful ones, in the mean."""
    used: float
    """The share of the cap, in the mean."""
    false_refusals: float
    stranded: float
    """Neither billed nor free, in the mean."""
    stranded_later: float
    """The same after holds have lapsed and the bill was gone through."""
    invented: float
    """Free by the contestant's books, and not there, in the mean."""
    kept: bool
    """Somebody keeps books."""
    lapse: float | None
    """How long money was held for calls that nobody ended, in seconds: the median."""
    p50_ms: float | None
    p99_ms: float | None

    @classmethod
    def of(cls, told: Mapping[str, Any], cap: int) -> Cell:
        """By the trials."""
        trials = told["trials"]
        overs = [trial["billed"] - cap for trial in trials if trial["billed"] > cap]
        kept = [trial for trial in trials if trial["left"] is not None]
        lapses = [trial["lapse_seconds"] for trial in trials if trial["lapse_seconds"] is not None]

        def mean(values: Sequence[float]) -> float:
            return statistics.fmean(values) if values else 0.0

        p50, p99 = told["p50_s"], told["p99_s"]
        return cls(
            scenario=told["scenario"],
            contestant=told["contestant"],
            trials=len(trials),
            over=len(overs),
            overshoot=statistics.median(overs) if overs else 0,
            overshoot_most=max(overs, default=0),
            calls=mean([trial["calls"] for trial in trials]),
            used=mean([min(trial["billed"], cap) / cap for trial in trials]),
            false_refusals=mean(
                [fitting(trial["refused"], cap - trial["billed"]) for trial in trials]
            ),
            stranded=mean([max(0, cap - trial["left"] - trial["billed"]) for trial in kept]),
            stranded_later=mean(
                [max(0, cap - trial["left_later"] - trial["billed"]) for trial in kept]
            ),
            invented=mean(
                [max(0, trial["left"] - max(0, cap - trial["billed"])) for trial in kept]
            ),
            kept=bool(kept),
            lapse=statistics.median(lapses) if lapses else None,
            p50_ms=None if p50 is None else p50 * 1000,
            p99_ms=None if p99 is None else p99 * 1000,
        )


class Replay:
    """A run's JSON, and what follows from it."""

    def __init__(self, data: Mapping[str, Any], rows: Sequence[Row]) -> None:
        self.data = data
        self.rows = rows
        self.scenarios: dict[str, Mapping[str, Any]] = {
            scenario["name"]: scenario for scenario in data["scenarios"]
        }
        self.contestants = [name for name, _ in data["contestants"]]
        self.cells = {
            (told["scenario"], told["contestant"]): Cell.of(
                told, self.scenarios[told["scenario"]]["cap"]
            )
            for told in data["cells"]
        }

    def preventable(self, name: str) -> bool:
        """Whether a ledger can keep the scenario's bill within its cap."""
        return bool(self.scenarios[name]["bound"] == 0)

    @property
    def problems(self) -> list[str]:
        """A sentence for each cell in which Peculium let through more than it says."""
        found = []
        for name, scenario in self.scenarios.items():
            cell = self.cells[name, OURS]
            bound = scenario["bound"]
            if bound is not None and cell.overshoot_most > bound:
                found.append(
                    f"{name}: {cell.overshoot_most} over the cap, {bound} is the documented bound"
                )
        return found

    def total(self, contestant: str, *, preventable: bool) -> int:
        """Trials over the cap, where a ledger can prevent it or where it cannot."""
        return sum(
            cell.over
            for (name, who), cell in self.cells.items()
            if who == contestant and self.preventable(name) == preventable
        )

    def margin(self, kind: str) -> Mapping[str, Any]:
        """The adaptive margin that others are compared with: `coverage` of each size alike, or `together`."""
        wanted = f"coverage {self.data[kind]:g}"
        return next(
            each
            for each in self.data["margins"]
            if each["name"].endswith(wanted)
            and ("together" in each["name"]) == (kind == "together")
        )

    def line(self) -> dict[str, Any]:
        """The figures in one line. Overshoot counts where a ledger can prevent it."""
        cells = self.cells.values()
        margin = self.margin("together")
        return {
            "scenarios": len(self.scenarios),
            "trials": sum(cell.trials for cell in cells),
            "rows_mapped": sum(bool(row.scenario or row.reason) for row in self.rows),
            "rows_total": len(self.rows),
            "overshoot_trials": {
                name: self.total(name, preventable=True) for name in self.contestants
            },
            "useful_calls": {
                name: round(sum(c.calls * c.trials for c in cells if c.contestant == name))
                for name in self.contestants
            },
            "stranded": {
                name: round(sum(c.stranded_later * c.trials for c in cells if c.contestant == name))
                for name in self.contestants
            },
            "over_reservation_mean": margin["over_reservation_per_call"],
            "coverage": margin["coverage"],
            "seconds": self.data["seconds"],
        }
