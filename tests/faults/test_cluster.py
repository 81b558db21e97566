"""A cluster comes back from whatever is done to it, where its clients know it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import psutil
import pytest

from tests.faults.cluster import Cluster
from tests.faults.history import History
from tests.faults.modelled import Campaign
from tests.faults.proxy import Faults
from tests.system.wire import AioWire, grant_of

pytestmark = pytest.mark.timeout(300)


async def _granted(address: str, name: str) -> None:
    """A grant that takes as many attempts as it takes: the same one."""
    grant = grant_of(name, 1, holder="dev")
    async with AioWire(address) as wire:
        await wire.admin.Grant(grant, timeout=120, wait_for_ready=True)


async def test_everything_that_is_killed_comes_back_and_has_what_was_recorded() -> None:
    with tempfile.TemporaryDirectory(prefix="peculium-cluster-") as folder:
        async with Cluster.running(Path(folder), Random(1), servers=1) as cluster:
            (node,) = cluster.nodes
            address, postmaster = node.address, cluster.postgres.pid
            await _granted(address, "first")
            cluster.kill_server(node)
            await cluster.heal()
            await _granted(address, "second")
            assert await cluster.kill_backend()
            await cluster.heal()
            cluster.kill_postmaster()
            node.front.trouble(up=Faults(swallow=True), down=Faults(swallow=True))
            await cluster.heal()
            await _granted(address, "third")
            assert cluster.kills == 3
            assert cluster.postgres.pid != postmaster
            assert (await cluster.fetch("SELECT count(*) FROM roots"))[0] == (3,)
            processes = [psutil.Process(cluster.postgres.pid)]
            assert node.process is not None
            processes.append(psutil.Process(node.process.pid))
        await asyncio.to_thread(psutil.wait_procs, processes, 30)
        assert not [process for process in processes if process.is_running()]


@pytest.fixture
async def campaign() -> AsyncIterator[Campaign]:
    """Clients of two servers, before any of them works."""
    with tempfile.TemporaryDirectory(prefix="peculium-cluster-") as folder:
        async with Cluster.running(Path(folder), Random(1)) as cluster:
            with History(Path(folder) / "history.jsonl", "campaign", 1) as history:
                work = Campaign(cluster, history, Random(1))
                await work.prepare()
                yield work


async def test_clients_go_on_until_a_connection_was_cut(campaign: Campaign) -> None:
    asked = len(campaign.asked)
    working = asyncio.create_task(campaign.work(0, 1, until_cut=True))
    while len(campaign.asked) < asked + 30 and not working.done():
        await asyncio.sleep(0)
    assert not working.done()
    assert campaign.cluster.nodes[0].back.reset()
    await working


async def test_a_server_that_has_stopped_is_not_waited_for(campaign: Campaign) -> None:
    campaign.cluster.kill_server(campaign.cluster.nodes[0])
    async with asyncio.timeout(60):
        assert await campaign._verified() == []
