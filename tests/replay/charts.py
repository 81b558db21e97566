"""The charts of docs/incidents.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.bench.charts import Series, lines
from tests.bench.figures import Spread
from tests.replay.figures import OURS, Cell, Replay


def overshoot(replay: Replay) -> str:
    """What was billed beyond the cap, by the number of agents that race for it."""
    names = {"S2-60-3p": 3} | {
        name: scenario["agents"]
        for name, scenario in replay.scenarios.items()
        if scenario["family"] == "scale"
    }
    return lines(
        "Overshoot against agents: a cap of 60, calls of 23 (estimate 31)",
        "agents that begin at the same moment",
        "tokens billed beyond the cap",
        _series(replay, names, lambda cell: cell.overshoot),
        log_y=False,
    )


def utilisation(replay: Replay) -> str:
    """The share of the cap that was used, by the cap."""
    caps = {
        name: scenario["cap"]
        for name, scenario in replay.scenarios.items()
        if scenario["family"] == "utilisation"
    }
    return lines(
        "Use of the cap: 16 agents that want 32 calls of 23 (estimate 31)",
        "cap",
        "% of the cap used",
        # The bill, not more than the cap.
        _series(replay, caps, lambda cell: round(100 * cell.used, 1)),
        log_y=False,
    )


def _series(replay: Replay, names: dict[str, int], value: Callable[[Cell], float]) -> list[Series]:
    """A line for each contestant, over what the scenarios differ in."""
    return [
        Series(
            contestant,
            [
                (at, _certain(value(replay.cells[name, contestant])))
                for name, at in names.items()
                if (name, contestant) in replay.cells
            ],
            ours=contestant == OURS,
        )
        for contestant in replay.contestants
    ]


def stranded(told: Sequence[dict[str, Any]]) -> str:
    """What was neither billed nor free, from the moment of a crash on."""
    return lines(
        "Money stranded when a process dies with four calls reserved",
        "seconds after the crash",
        "tokens neither billed nor free",
        [
            Series(
                line["name"],
                [(x, _certain(y)) for x, y in line["points"]],
                ours=line["name"] == OURS,
            )
            for line in told
        ],
        log_y=False,
        log_x=False,
        dots=False,
    )


def _certain(value: float) -> Spread:
    return Spread(value, value, value)
