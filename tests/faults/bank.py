"""Bank: money moves within trees, and in every read the total is what was granted.

A reader asks PostgreSQL itself, in transactions that see a serial state for sure (SERIALIZABLE READ ONLY
DEFERRABLE), and the audit service, whose pages are a snapshot each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import psycopg

from peculium.v1 import types_pb2
from tests.faults.checks import Problem, overshoot, tallied
from tests.faults.cluster import Cluster
from tests.faults.history import History
from tests.faults.modelled import Campaign
from tests.faults.storms import storm
from tests.faults.tally import Setting, Tally
from tests.faults.wishes import MOVES

READ_SECONDS_MAX = 20.0
_BALANCES = (
    "SELECT root_id::text, parent_id IS NULL, granted, available, held, delegated, spent, forfeited,"
    " overrun, advanced FROM budgets"
)
_BEGIN = "BEGIN ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE"

Row = tuple[str, bool, int, int, int, int, int, int, int, int]
"""Root id, whether it is the root, then the balances in the order of the wire."""


def wrong_totals(rows: Iterable[Row], granted: Mapping[str, int]) -> list[Problem]:
    """What is wrong with one read: rows out of balance, and trees that do not have what was granted."""
    found = []
    totals: dict[str, int] = {}
    of_roots: dict[str, int] = {}
    for root_id, is_root, put_in, available, held, delegated, spent, forfeited, over, lent in rows:
        if put_in != available + held + delegated + spent + forfeited - over:
            found.append(Problem("total", f"a budget of {root_id} is not balanced"))
        if min(put_in, available, held, delegated, spent, forfeited, over) < 0 or lent > put_in:
            found.append(Problem("total", f"a budget of {root_id} has less than nothing"))
        totals[root_id] = totals.get(root_id, 0) + available + held + spent + forfeited
        if is_root:
            totals[root_id] -= over
            of_roots[root_id] = put_in
    for root_id, total in totals.items():
        expected = granted.get(root_id, of_roots.get(root_id))
        if total != expected or of_roots.get(root_id) != expected:
            found.append(Problem("total", f"{root_id} has {total} in all, was granted {expected}"))
    return found


class _Reader:
    """Reads totals, again and again."""

    def __init__(self, work: Campaign) -> None:
        self.reads = 0
        self.found: list[Problem] = []
        self._work = work
        self._granted: dict[str, int] = {}

    async def read_on(self) -> None:
        """Until cancelled."""
        async with self._work.lines() as lines:
            while True:
                await self._of_tables()
                for line in lines:
                    for purse in self._work.shared:
                        if purse.parent is None:
                            budgets = await line.budgets(purse.root_id, READ_SECONDS_MAX)
                            self._judge(_rows(budgets or []))
                await asyncio.sleep(0.02)

    async def _of_tables(self) -> None:
        try:
            rows = await asyncio.wait_for(_read(self._work.cluster.dsn), READ_SECONDS_MAX)
        except (psycopg.Error, TimeoutError):
            # Killed, or no safe snapshot in time: no read.
            return
        self._judge(rows)

    def _judge(self, rows: list[Row]) -> None:
        if not rows:
            return
        self.reads += 1
        for root_id, is_root, put_in, *_ in rows:
            if is_root:
                self._granted.setdefault(root_id, put_in)
        self.found += wrong_totals(rows, self._granted)


async def _read(dsn: str) -> list[Row]:
    async with await psycopg.AsyncConnection.connect(
        dsn, autocommit=True, connect_timeout=10
    ) as connection:
        await connection.execute(_BEGIN)
        rows: list[Any] = await (await connection.execute(_BALANCES)).fetchall()
        await connection.execute("COMMIT")
        return rows


def _rows(budgets: Iterable[types_pb2.Budget]) -> list[Row]:
    found = []
    for budget in budgets:
        money = budget.balances
        # As PostgreSQL writes an id.
        digits = budget.root_id.hex()
        root = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
        found.append(
            (
                *(root, not budget.parent_id, money.granted, money.available, money.held),
                *(money.delegated, money.spent, money.forfeited, money.overrun, money.advanced),
            )
        )
    return found


async def run(setting: Setting) -> Tally:
    """Money moves, and every read has the same total."""
    chance = setting.random("bank")
    tally = Tally()
    async with Cluster.running(setting.folder / "bank", chance) as cluster:
        with History(setting.folder / "bank.jsonl", "bank", setting.seed) as history:
            work = Campaign(cluster, history, chance, kinds=MOVES, dry_runs=False)
            await work.prepare()
            reader = _Reader(work)
            beside = [
                asyncio.create_task(reader.read_on()),
                asyncio.create_task(
                    storm(cluster, history, setting.random("storm"), calm_seconds=3.0)
                ),
            ]
            try:
                await work.work(setting.seconds)
            finally:
                for task in beside:
                    task.cancel()
                ends = await asyncio.gather(*beside, return_exceptions=True)
            for end in ends:
                if isinstance(end, Exception):
                    raise end
            journal, found = await work.examined()
            if not reader.reads:
                found.append(Problem("total", "nothing could be read"))
            tally = tallied([*reader.found, *found])
            tally.rounds = reader.reads
            tally.operations = len(work.asked)
            tally.kills, tally.cuts = cluster.kills, cluster.cuts
            tally.overshoot = overshoot(journal)
            tally.leaked_holds = len(work.leaked)
    return tally
