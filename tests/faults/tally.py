"""What every part of the campaign is told, and what it has to tell."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """How one part of the campaign is to run. Its seed decides everything that is left to chance."""

    seed: int
    seconds: float
    """How long it may take, roughly: the round that is begun is finished."""
    folder: Path
    """Where it keeps its data, and leaves its histories."""

    def random(self, name: str) -> random.Random:
        """A source of chance of one's own, the same for the same seed and name."""
        return random.Random(f"{self.seed} {name}")


@dataclass
class Tally:
    """What was done, and what was found wrong. Everything from `acked_lost` on has to stay zero."""

    rounds: int = 0
    operations: int = 0
    """Asked of the ledger, replays of the same operation not counted."""
    kills: int = 0
    """Processes that were ended by SIGKILL: servers, backends, postmasters."""
    cuts: int = 0
    """Connections that were cut or silenced on purpose."""
    acked_lost: int = 0
    """Acknowledged operations that the ledger does not have."""
    applied_twice: int = 0
    overshoot: int = 0
    """What was billed beyond what was granted and declared as overrun, in units."""
    leaked_holds: int = 0
    """Holds that are live although everything that could end them is done, and their time is over."""
    wrong_totals: int = 0
    """Reads, answers and rows that differ from what the model says."""
    problems: list[str] = field(default_factory=list)
    """For people: a sentence for each thing that was found wrong."""

    def add(self, other: Tally) -> None:
        """Take over another part's counts."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @property
    def clean(self) -> bool:
        """Whether nothing was found wrong."""
        wrong = (
            self.acked_lost,
            self.applied_twice,
            self.overshoot,
            self.leaked_holds,
            self.wrong_totals,
        )
        return not any(wrong) and not self.problems
