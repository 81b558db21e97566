"""Whoever follows the ledger is told every entry once and in order, whatever happens to the servers."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

import peculium
from peculium import EntryInfo, aio
from tests.server import StartServer
from tests.system.load import under_load

pytestmark = pytest.mark.timeout(180)

Key = tuple[int, int, int]


def key(entry: EntryInfo) -> Key:
    return entry.lane, entry.position, entry.part


class Follower:
    """Follows the whole ledger, and remembers whatever it is told."""

    def __init__(self) -> None:
        self.told: list[EntryInfo] = []
        self.begun = asyncio.Event()
        self._progress = asyncio.Condition()

    async def follow(self, target: str) -> None:
        async with aio.connect(target) as client:
            async for watched in client.audit.watch():
                # Until then it is not known from where on nothing may be missed.
                self.begun.set()
                async with self._progress:
                    self.told += watched.entries
                    self._progress.notify_all()

    async def until(self, last: set[Key]) -> None:
        """Wait until the last entry of each tree was told."""
        async with asyncio.timeout(60), self._progress:
            await self._progress.wait_for(lambda: last <= set(map(key, self.told)))


async def recorded(address: str) -> list[EntryInfo]:
    """All entries of the ledger."""
    found = []
    async with aio.connect(address, timeout=60) as client:
        async for root in client.audit.budgets():
            found += [
                entry async for entry in client.audit.entries(root.ref, reach=peculium.Reach.TREE)
            ]
    return found


async def test_every_entry_is_told_once_and_in_order_although_the_server_that_tells_is_killed(
    start_server: StartServer, database: str
) -> None:
    first, second = [
        await asyncio.to_thread(start_server, "--database-url", database) for _ in range(2)
    ]
    both = f"ipv4:{first.address},{second.address}"
    follower = Follower()
    async with asyncio.TaskGroup() as running:
        following = running.create_task(follower.follow(both))
        await follower.begun.wait()
        async with (
            under_load(both, "first") as load,
            under_load(second.address, "second") as other,
        ):
            await load.progress(50)
            await other.progress(50)
            told = len(follower.told)
            await asyncio.to_thread(first.kill)
            await load.progress(50)
            await other.progress(50)
        entries = await recorded(second.address)
        await follower.until({key(entry) for entry in entries})
        assert 0 < told < len(entries)
        following.cancel()
    assert sorted(map(key, follower.told)) == sorted(map(key, entries))
    by_lane: dict[int, list[Key]] = defaultdict(list)
    for entry in follower.told:
        by_lane[entry.lane].append(key(entry))
    assert all(lane == sorted(lane) for lane in by_lane.values())
    assert {key(entry): entry for entry in follower.told} == {
        key(entry): entry for entry in entries
    }


async def test_a_server_that_is_told_to_stop_does_not_wait_for_those_who_follow(
    start_server: StartServer, database: str
) -> None:
    """It is given longer than the test may last."""
    server = await asyncio.to_thread(
        start_server, "--database-url", database, "--drain-seconds", "3600"
    )
    follower = Follower()
    following = asyncio.create_task(follower.follow(server.address))
    await follower.begun.wait()
    assert await asyncio.to_thread(server.stop) == 0
    following.cancel()
    await asyncio.wait([following])
