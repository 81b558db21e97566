"""A cluster comes back from whatever is done to it, where its clients know it."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from random import Random

import psutil
import pytest

from tests.faults.cluster import Cluster
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
