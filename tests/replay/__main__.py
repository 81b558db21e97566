"""The incident catalogue, replayed: every scenario against every contestant.

    python -m tests.replay [--trials N] [--only S1,D2] [--against NAME,...] [--slice] [--litellm] [--report]
        [--folder D]

Progress goes to the error stream, everything measured to `replay.json` in the folder, and the last line of
standard output is the figures as JSON. A run that was broken off goes on where it was if the folder is the same.
With `--report` docs/incidents.md is written from it. The exit code is 1 if Peculium let through what a ledger can
prevent, or more than its documented bound.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench import machine
from tests.replay import catalogue, litellm, margins, report
from tests.replay.campaign import TRIALS, Stage, play_cell, stage, stranded_over_time
from tests.replay.contestants import Contestant
from tests.replay.figures import OURS, Replay, percentile
from tests.replay.kept import Kept
from tests.replay.plays import Scenario
from tests.replay.scenarios import SLICE, all_scenarios

_MEMORY = Path("/dev/shm")  # noqa: S108 - what is in it ends with the machine
_WHOLE = machine.ROOT / "build" / "replay"
"""Where a whole run keeps what it has played."""
_SLICE_TRIALS = 2


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is played."""

    scenarios: Sequence[Scenario]
    trials: int
    whole: bool
    litellm: bool
    against: Sequence[str]
    """Only these contestants; empty: all."""
    folder: Path


def tell(text: str) -> None:
    """Tell people."""
    sys.stderr.write(f"replay: {text}\n")
    sys.stderr.flush()


async def run(options: Options, kept: Kept, folder: Path) -> dict[str, Any]:
    """Play all of it, with what processes need in the folder: the run's JSON."""
    async with stage(folder, options.against, with_litellm=options.litellm) as scene:
        facts = machine.facts(scene.postgres, folder)
        cells = await _cells(scene, options, kept)
        begun = time.monotonic()
        tell("money stranded after a crash, over time")
        stranded = await stranded_over_time(scene)
        contestants = [[each.name, each.title] for each in scene.contestants]
    tell("margins on a trace")
    return {
        "begun": kept.begun,
        "whole": options.whole,
        "trials": options.trials,
        "machine": facts,
        "contestants": contestants,
        "scenarios": [_told(scenario) for scenario in options.scenarios],
        "stranded": stranded,
        "coverage": margins.COVERAGE,
        "together": margins.TOGETHER,
        "margins": margins.told(),
        "cells": cells,
        "seconds": round(time.monotonic() - begun + sum(cell["seconds"] for cell in cells), 1),
    }


async def _cells(scene: Stage, options: Options, kept: Kept) -> list[dict[str, Any]]:
    """Play what was not played yet."""
    wanted = [
        (scenario, contestant)
        for scenario in options.scenarios
        for contestant in scene.contestants
        if contestant.plays(scenario)
    ]
    if len(kept):
        tell(f"{len(kept)} of {len(wanted)} cells were played already")
    cells = []
    for number, (scenario, contestant) in enumerate(wanted, 1):
        cell = kept.get(scenario.name, contestant.name)
        if cell is None:
            cell = await _cell(scene, scenario, contestant, options.trials)
            kept.add(cell)
            over = sum(trial["billed"] > scenario.cap for trial in cell["trials"])
            calls = sum(trial["calls"] for trial in cell["trials"])
            tell(
                f"{number}/{len(wanted)} {scenario.name} {contestant.name}: {over}/{options.trials}"
                f" over the cap, {calls} calls, {cell['seconds']:.1f} s"
            )
        cells.append(cell)
    return cells


async def _cell(
    scene: Stage, scenario: Scenario, contestant: Contestant, trials: int
) -> dict[str, Any]:
    begun = time.monotonic()
    played = await play_cell(scene, contestant, scenario, trials, tell)
    seconds = [each for trial in played for each in trial.seconds]
    return {
        "scenario": scenario.name,
        "contestant": contestant.name,
        "p50_s": percentile(seconds, 0.5),
        "p99_s": percentile(seconds, 0.99),
        "seconds": round(time.monotonic() - begun, 2),
        "trials": [trial.told() for trial in played],
    }


def _run(options: Options) -> str:
    """What tells this run from others: cells are only taken over from the same."""
    played = repr((options.scenarios, options.trials, options.litellm, options.against))
    return hashlib.sha256(played.encode()).hexdigest()


def _told(scenario: Scenario) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "title": scenario.title,
        "cap": scenario.cap,
        "agents": scenario.agents,
        "bound": scenario.bound,
        "why": scenario.why,
        "family": scenario.family,
    }


def _arguments(words: Sequence[str] | None) -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(prog="python -m tests.replay", description=__doc__)
    parser.add_argument("--trials", type=int, help=f"of each cell; default: {TRIALS}")
    parser.add_argument("--only", help="names of scenarios, with commas between")
    parser.add_argument("--against", help="names of contestants besides Peculium; default: all")
    parser.add_argument("--slice", action="store_true", help="only see that it runs")
    parser.add_argument("--litellm", action="store_true", help="against LiteLLM, too: installs it")
    parser.add_argument("--report", action="store_true", help="write docs/incidents.md from it")
    parser.add_argument("--folder", type=Path, help="for replay.json; default: a new one")
    given = parser.parse_args(words)
    scenarios = all_scenarios()
    names = [scenario.name for scenario in scenarios]
    wanted = given.only.split(",") if given.only else list(SLICE if given.slice else names)
    for name in wanted:
        if name not in names:
            parser.error(f"no scenario is called {name!r}: there are {', '.join(names)}")
    whole = wanted == names and not given.against
    if given.report and not whole:
        parser.error("the page would not be whole: --report goes with all of it")
    usual = _WHOLE if given.report else Path(tempfile.mkdtemp(prefix="peculium-replay-"))
    options = Options(
        scenarios=[scenario for scenario in scenarios if scenario.name in wanted],
        trials=given.trials or (_SLICE_TRIALS if given.slice else TRIALS),
        whole=whole,
        litellm=given.litellm,
        against=[*given.against.split(","), OURS] if given.against else [],
        folder=(given.folder or usual).absolute(),
    )
    return options, given.report


def main(words: Sequence[str] | None = None) -> int:
    """Play, write it down, and say it in one line."""
    options, reporting = _arguments(words)
    machine.prepare(options.folder)
    if options.litellm:
        tell(f"LiteLLM {litellm.version()} in {litellm.ENVIRONMENT}")
        litellm.install()
    kept = Kept(options.folder / "played.jsonl", _run(options), machine.now())
    # In memory where there is some: it is not the disk that is examined.
    data = Path(
        tempfile.mkdtemp(prefix="peculium-replay-", dir=_MEMORY if _MEMORY.is_dir() else None)
    )
    machine.prepare(data)
    try:
        told = asyncio.run(run(options, kept, data))
    finally:
        shutil.rmtree(data, ignore_errors=True)
    file = options.folder / "replay.json"
    file.write_text(report.text(told))
    kept.forget()
    tell(f"everything is in {file}; the page is written by: python -m tests.replay.report {file}")
    if reporting:
        report.write(file, machine.ROOT / "docs")
    replay = Replay(told, catalogue.rows())
    for problem in replay.problems:
        tell(f"WRONG: {problem}")
    sys.stdout.write(json.dumps(replay.line()) + "\n")
    return 1 if replay.problems else 0


if __name__ == "__main__":
    sys.exit(main())
