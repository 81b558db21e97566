"""A short campaign in which two servers get in each other's way as much as they can: on one lane."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import psycopg

from tests.faults.checks import Problem
from tests.faults.cluster import Cluster
from tests.faults.history import History
from tests.faults.modelled import Campaign
from tests.faults.planted import Planted
from tests.faults.tally import Setting
from tests.faults.wishes import ALL_KINDS

KINDS = {
    **{kind: weight for kind, weight in ALL_KINDS.items() if kind in {"settle", "release"}},
    "reserve": 30,
    "spend": 30,
    "give_back": 5,
}
"""What every client can do to the few budgets that all share."""

SWEEP_SECONDS_MAX = 5.0
"""Whether holds lapse is no question here, and a server with a fault may never get that far."""


@dataclass
class Contention:
    """What came of it."""

    operations: int
    problems: list[Problem]


async def contended(setting: Setting, fault: Planted) -> Contention:
    """Let clients fight over a few trees of one lane, on two servers with a fault."""
    name = f"planted-{fault.name}"
    chance = setting.random(name)
    command = ("-m", "tests.faults.planted", fault.name)
    async with Cluster.running(setting.folder / name, chance, command=command) as cluster:
        for statement in fault.sql:
            await cluster.fetch(statement)
        with History(setting.folder / f"{name}.jsonl", name, setting.seed) as history:
            work = Campaign(cluster, history, chance, kinds=KINDS, dry_runs=False)
            work.copies_chance = 0.5
            work.shared_chance = 0.95
            work.sweep_seconds = SWEEP_SECONDS_MAX
            await work.prepare(same_lane=True)
            await work.work(setting.seconds)
            try:
                async with asyncio.timeout(120):
                    _, found = await work.examined()
            except (TimeoutError, psycopg.Error) as error:
                found = [Problem("failure", repr(error))]
    return Contention(len(work.asked), found)
