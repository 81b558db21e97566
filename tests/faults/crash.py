"""Crash: servers, backends and the postmaster are killed under load, again and again.

The load is agents with the SDK and a provider that bills them, whatever the ledger says; and agents that
die with a hold of theirs. Afterwards everything that was acknowledged is there, once; what was billed is
what was spent; and no hold outlives its time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from random import Random

from peculium._ids import id_text
from peculium_server.core.operations import Kind
from tests.faults.checks import Journal, Problem, overshoot, tallied
from tests.faults.cluster import Cluster
from tests.faults.history import History
from tests.faults.modelled import Campaign
from tests.faults.progress import say
from tests.faults.storms import kill_something
from tests.faults.tally import Setting, Tally
from tests.faults.wishes import Wisher
from tests.system.load import Load, under_load

SDK_SECONDS = 600.0
"""Longer than anything takes to come back: no agent may be left without an answer."""
PROGRESS_SECONDS_MAX = 300.0
CALLS = 15
"""That each load settles between one kill and the next."""


def judged(journal: Journal, loads: Sequence[Load]) -> list[Problem]:
    """What is wrong with a ledger after such loads."""
    found = []
    roots = {name: root_id for root_id, name in journal.roots.items()}
    recorded = {id_text(entry.operation_id) for entry in journal.entries}
    for load in loads:
        trees = {roots[name] for name in load.roots if name in roots}
        lost = {receipt.operation_id for receipt in load.acknowledged} - recorded
        found += [Problem("lost", f"{each} was acknowledged, and is not recorded") for each in lost]
        spent = sum(b.money.spent for b in journal.budgets if b.root_id in trees)
        held = sum(b.money.held for b in journal.budgets if b.root_id in trees)
        settles = Counter(e.kind for e in journal.entries if e.root_id in trees and e.part == 0)
        settled, calls = settles[Kind.SETTLE], load.provider.calls
        if settled > calls:
            found += [Problem("operation twice", "a call was settled twice")] * (settled - calls)
        if settled < calls:
            found += [Problem("unfinished", "a call was not settled")] * (calls - settled)
        if spent != load.provider.billed:
            found.append(Problem("billed", f"{load.provider.billed} billed, {spent} spent"))
        if held:
            found.append(Problem("held", f"{held} is held, and everybody is done"))
    return found


class _Dying:
    """Agents that reserve and are never heard of again."""

    def __init__(self, work: Campaign, wisher: Wisher) -> None:
        self._work = work
        self._wisher = wisher

    async def die_on(self) -> None:
        """One after another, until cancelled."""
        async with self._work.lines() as lines:
            while True:
                purses = [purse for purse in self._work.shared if not purse.by_token]
                wish = self._wisher._reserve(self._work._chance.choice(purses))
                if wish is not None:
                    wish.request.ttl.FromSeconds(1)  # type: ignore[attr-defined]
                    await self._work._perform(0, lines, wish)
                await asyncio.sleep(0.05)


async def _rounds(
    cluster: Cluster, history: History, chance: Random, loads: Sequence[Load], seconds: float
) -> int:
    """Let the loads get on, kill something, and so on: how often something was killed."""
    rounds = 0
    deadline = time.monotonic() + seconds
    while rounds == 0 or time.monotonic() < deadline:
        async with asyncio.timeout(PROGRESS_SECONDS_MAX):
            await asyncio.gather(*(load.progress(CALLS) for load in loads))
        kills = cluster.kills
        killed = await kill_something(cluster, history, chance)
        rounds += cluster.kills > kills
        say(f"  round {rounds}: {killed}")
    return rounds


async def run(setting: Setting) -> Tally:
    """Kill whatever runs, under load."""
    chance = setting.random("crash")
    async with Cluster.running(setting.folder / "crash", chance) as cluster:
        with History(setting.folder / "crash.jsonl", "crash", setting.seed) as history:
            work = Campaign(cluster, history, chance, dry_runs=False)
            await work.prepare()
            dying = _Dying(work, Wisher(setting.random("dying"), work.shared, {"reserve": 1}))
            async with AsyncExitStack() as loaded:
                loads = [
                    await loaded.enter_async_context(
                        under_load(node.address, node.name, budgets=3, timeout=SDK_SECONDS)
                    )
                    for node in cluster.nodes
                ]
                beside = asyncio.create_task(dying.die_on())
                try:
                    rounds = await _rounds(cluster, history, chance, loads, setting.seconds)
                finally:
                    beside.cancel()
                    ends = await asyncio.gather(beside, return_exceptions=True)
            failed = [end for end in ends if isinstance(end, Exception)]
            journal, found = await work.examined(others=True)
            found += [Problem("failure", repr(end)) for end in failed]
            found += judged(journal, loads)
    tally = tallied(found)
    tally.rounds = rounds
    tally.operations = len({entry.operation_id for entry in journal.entries})
    tally.kills, tally.cuts = cluster.kills, cluster.cuts
    tally.overshoot = overshoot(journal)
    tally.leaked_holds = len(work.leaked)
    return tally
