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
import os
import platform
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from peculium_server.embedded import MAJOR_VERSION
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
_TOLD_MAX = 20
"""Problems of a part that are told; its tally has more."""
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


@dataclass
class Result:
    """What one part came to."""

    name: str
    tally: Tally
    seconds: float
    found: Sequence[str] = ()
    """Planted faults that were found."""
    masked: Sequence[str] = ()
    """Guards that were taken away alone, and made up for by the others."""


def report(verdict: Verdict, results: Sequence[Result], seed: int) -> str:
    """What a run came to, as `docs/reliability.md` shows it."""
    heads = ("part", "seconds", *COUNTS)
    rows = [
        (
            f"`{each.name}`",
            f"{each.seconds:.0f}",
            *(str(getattr(each.tally, count)) for count in COUNTS),
        )
        for each in results
    ]
    lines = [heads, tuple("---" for _ in heads), *rows]
    said = [
        (
            f"Seed {seed}; {os.cpu_count()} processors, Python {platform.python_version()},"
            f" PostgreSQL {MAJOR_VERSION}."
        ),
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
    ]
    for words, names in (
        ("Planted and found", [name for each in results for name in each.found]),
        ("Taken away alone, and made up for", [name for each in results for name in each.masked]),
    ):
        if names:
            said.append(f"{words}: " + ", ".join(f"`{name}`" for name in names) + ".")
    return "\n\n".join([*said, f"    {verdict.line()}"]) + "\n"


async def _part(part: Part, setting: Setting) -> Result:
    if part.name == _PLANTED:
        checked = await planted.check_checkers(setting, alone=setting.seconds >= ALONE_SECONDS)
        return Result(part.name, checked.tally, 0.0, checked.found, checked.masked)
    module = importlib.import_module(part.module)
    return Result(part.name, await module.run(setting), 0.0)


async def campaign(
    parts: Sequence[Part], seconds: float, seed: int, folder: Path
) -> tuple[Verdict, list[Result]]:
    """Run parts, each for its share of the time."""
    begun = time.monotonic()
    share = sum(part.share for part in parts)
    working = max(0.3 * seconds, seconds - OVERHEAD_SECONDS * len(parts))
    total, results = Tally(), []
    for part in parts:
        # All at once: what is changed during a run of half an hour is not mixed into it.
        importlib.import_module(part.module)
    importlib.import_module("tests.faults.contended")
    for part in parts:
        own = folder / part.name
        own.mkdir(parents=True, exist_ok=True)
        own.chmod(0o755)
        allotted = working * part.share / share
        say(f"{part.name}: about {allotted:.0f} s, seed {seed}")
        part_begun = time.monotonic()
        try:
            result = await _part(part, Setting(seed, allotted, own))
        except Exception as error:  # noqa: BLE001 - the other parts are run all the same
            failed = f"the part failed: {error!r}\n{traceback.format_exc()}"
            result = Result(part.name, Tally(problems=[failed]), 0.0)
        result.seconds = time.monotonic() - part_begun
        results.append(result)
        _tell(result)
        total.add(result.tally)
    planted_faults = len(planted.PLANTED) if _PLANTED in {part.name for part in parts} else 0
    found = sum(len(result.found) for result in results)
    return Verdict(total, found, planted_faults, time.monotonic() - begun), results


def _tell(result: Result) -> None:
    tally = result.tally
    counts = ", ".join(f"{getattr(tally, name)} {name}" for name in COUNTS)
    clean = "clean" if tally.clean else "NOT CLEAN"
    say(f"{result.name}: {result.seconds:.0f} s, {clean}: {counts}")
    for problem in tally.problems[:_TOLD_MAX]:
        say(f"  {problem}")
    if len(tally.problems) > _TOLD_MAX:
        say(f"  and {len(tally.problems) - _TOLD_MAX} more")


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
    # To be told to end is to be interrupted: what was started has to be stopped.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    say(f"seed {seed}, histories in {folder}")
    verdict, results = asyncio.run(campaign(arguments.parts, arguments.seconds, seed, folder))
    (folder / "verdict.json").write_text(verdict.line() + "\n")
    told = report(verdict, results, seed)
    (folder / "report.md").write_text(told)
    say(told)
    if verdict.clean and arguments.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        say(f"histories are kept in {folder}; again: make faults SEED={seed}")
    sys.stdout.write(verdict.line() + "\n")
    return 0 if verdict.clean else 1


if __name__ == "__main__":
    sys.exit(main())
