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
from tests.faults.race import Storm
from tests.faults.storms import TORN, storm
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
    """Let clients fight over what lies in one lane, on two servers with a fault.

    By the fault's `load` they use a few trees that all share (`fight`), send every operation to both
    servers at once (`twice`), or all present the same token (`race`); or they fight while the servers'
    connections to the database are cut (`cut`).
    """
    name = f"planted-{fault.name}"
    chance = setting.random(name)
    command = ("-m", "tests.faults.planted", fault.name)
    async with Cluster.running(setting.folder / name, chance, command=command) as cluster:
        for statement in fault.sql:
            await cluster.fetch(statement)
        with History(setting.folder / f"{name}.jsonl", name, setting.seed) as history:
            try:
                if fault.load == "race":
                    return await _race(setting, cluster, history)
                if fault.load == "cut":
                    return await _cut(setting, cluster, history)
                return await _fight(setting, cluster, history, twice=fault.load == "twice")
            except psycopg.Error as error:
                # What such servers have left cannot even be read.
                return Contention(0, [Problem("failure", repr(error))])


async def _race(setting: Setting, cluster: Cluster, history: History) -> Contention:
    racing = Storm(cluster, history, setting.random("race"))
    await racing.rounds(setting.seconds)
    return Contention(len(racing.asked), await racing.examined())


async def _cut(setting: Setting, cluster: Cluster, history: History) -> Contention:
    chance = setting.random("storm")
    cutting = asyncio.create_task(
        storm(cluster, history, chance, faults=((), TORN), calm_seconds=0.2, bad_seconds=0.3)
    )
    try:
        return await _fight(setting, cluster, history, twice=False)
    finally:
        cutting.cancel()
        await asyncio.gather(cutting, return_exceptions=True)


async def _fight(
    setting: Setting, cluster: Cluster, history: History, *, twice: bool
) -> Contention:
    kinds = {"spend": 1} if twice else KINDS
    work = Campaign(cluster, history, setting.random("fight"), kinds=kinds, dry_runs=False)
    work.copies_chance = 1.0 if twice else 0.5
    work.shared_chance = 0.95
    work.sweep_seconds = SWEEP_SECONDS_MAX
    await work.prepare(same_lane=True)
    await work.work(setting.seconds)
    _, found = await work.examined()
    return Contention(len(work.asked), found)
