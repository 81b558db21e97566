"""The campaign: every part, one after another, and a verdict.

    python -m tests.faults [--seconds N] [--seed S] [--parts a,b] [--folder D]

Progress goes to the error stream. The last line of standard output is the verdict as JSON; the exit code
is 1 unless nothing was found wrong and all planted faults were found.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import secrets
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tests.faults import planted
from tests.faults.progress import say
from tests.faults.tally import Setting, Tally

SECONDS_DEFAULT = 2_100
"""Thirty-five minutes, which is above fifty rounds of crash."""


class Part(NamedTuple):
    """A part of the campaign."""

    name: str
    share: float
    """Of the time."""
    module: str


PARTS = (
    Part("modelled", 0.26, "tests.faults.modelled"),
    Part("bank", 0.10, "tests.faults.bank"),
    Part("race", 0.08, "tests.faults.race"),
    Part("crash", 0.28, "tests.faults.crash"),
    Part("interleavings", 0.08, "tests.faults.interleavings"),
    Part("clock", 0.06, "tests.faults.clock"),
    Part("planted", 0.14, "tests.faults.planted"),
)
_PLANTED = "planted"
ALONE_SECONDS = 100.0
"""A checker check that has so much time also takes each guard away alone."""
OVERHEAD_SECONDS = 35.0
"""What a part takes beside its own time: starting, healing, sweeping, reading."""
COUNTS = (
    "rounds",
    "operations",
    "kills",
    "cuts",
    "acked_lost",
    "applied_twice",
    "overshoot",
    "leaked_holds",
    "wrong_totals",
)


@dataclass
class Verdict:
    """What the whole campaign comes to."""

    tally: Tally
    planted_faults_found: int
    planted_faults: int
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether nothing was found wrong, and whatever was planted was found."""
        return self.tally.clean and self.planted_faults_found == self.planted_faults

    def line(self) -> str:
        """The verdict as JSON, with exactly the keys that readers know."""
        counts = {name: value for name, value in asdict(self.tally).items() if name in COUNTS}
        return json.dumps(
            {name: counts[name] for name in COUNTS}
            | {
                "planted_faults_found": self.planted_faults_found,
                "planted_faults": self.planted_faults,
                "seconds": round(self.seconds, 1),
            }
        )


def table(results: Sequence[tuple[str, Tally, float]]) -> str:
    """What each part came to, as a table for people."""
    heads = ("part", "seconds", *COUNTS)
    rows = [
        (name, f"{seconds:.0f}", *(str(getattr(tally, count)) for count in COUNTS))
        for name, tally, seconds in results
    ]
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


async def _run_planted(setting: Setting) -> tuple[Tally, int]:
    """The checker check: its counts, and how many of the planted faults were found."""
    checked = await planted.check_checkers(setting, alone=setting.seconds >= ALONE_SECONDS)
    for name in checked.found:
        say(f"  found: {name}")
    for name in checked.masked:
        say(f"  made up for by other guards: {name}")
    return checked.tally, len(checked.found)


async def _part(part: Part, setting: Setting) -> tuple[Tally, int]:
    if part.name == _PLANTED:
        return await _run_planted(setting)
    module = importlib.import_module(part.module)
    return await module.run(setting), 0


async def campaign(
    parts: Sequence[Part], seconds: float, seed: int, folder: Path
) -> tuple[Verdict, list[tuple[str, Tally, float]]]:
    """Run parts, each for its share of the time."""
    begun = time.monotonic()
    share = sum(part.share for part in parts)
    working = max(0.3 * seconds, seconds - OVERHEAD_SECONDS * len(parts))
    total, results, found = Tally(), [], 0
    for part in parts:
        own = folder / part.name
        own.mkdir(parents=True, exist_ok=True)
        own.chmod(0o755)
        allotted = working * part.share / share
        say(f"{part.name}: about {allotted:.0f} s, seed {seed}")
        part_begun = time.monotonic()
        try:
            tally, planted_found = await _part(part, Setting(seed, allotted, own))
            found += planted_found
        except Exception as error:  # noqa: BLE001 - the other parts are run all the same
            tally = Tally(problems=[f"the part failed: {error!r}\n{traceback.format_exc()}"])
        took = time.monotonic() - part_begun
        results.append((part.name, tally, took))
        counts = ", ".join(f"{getattr(tally, name)} {name}" for name in COUNTS)
        say(f"{part.name}: {took:.0f} s, {'clean' if tally.clean else 'NOT CLEAN'}: {counts}")
        for problem in tally.problems[:20]:
            say(f"  {problem}")
        if len(tally.problems) > 20:
            say(f"  and {len(tally.problems) - 20} more")
        total.add(tally)
    planted_faults = len(planted.PLANTED) if _PLANTED in {part.name for part in parts} else 0
    return Verdict(total, found, planted_faults, time.monotonic() - begun), results


def _arguments() -> argparse.Namespace:
    there = [part for part in PARTS if importlib.util.find_spec(part.module) is not None]
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS_DEFAULT, help="for all parts")
    parser.add_argument("--seed", type=int, default=None, help="default: one of its own")
    parser.add_argument("--parts", default=",".join(part.name for part in there))
    parser.add_argument("--folder", type=Path, default=None, help="keep histories here")
    arguments = parser.parse_args()
    by_name = {part.name: part for part in there}
    unknown = [name for name in arguments.parts.split(",") if name not in by_name]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(by_name)}")
    arguments.parts = [by_name[name] for name in arguments.parts.split(",")]
    return arguments


def main() -> int:
    """Run the campaign: 0 if it is clean, else 1."""
    arguments = _arguments()
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="peculium-faults-"))
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    say(f"seed {seed}, histories in {folder}")
    verdict, results = asyncio.run(campaign(arguments.parts, arguments.seconds, seed, folder))
    (folder / "verdict.json").write_text(verdict.line() + "\n")
    (folder / "parts.md").write_text(table(results) + "\n")
    say(table(results))
    if verdict.clean and arguments.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        say(f"histories are kept in {folder}; again: make faults SEED={seed}")
    sys.stdout.write(verdict.line() + "\n")
    return 0 if verdict.clean else 1


if __name__ == "__main__":
    sys.exit(main())
