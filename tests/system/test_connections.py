"""Clients that are told to connect anew, so that they come to servers that were started since."""

from __future__ import annotations

import asyncio

import grpc

from tests.server import StartServer
from tests.system.load import check, under_load
from tests.system.test_watching import Follower, key, recorded


async def test_a_connection_that_is_old_is_left_for_another_and_no_caller_notices(
    start_server: StartServer, database: str
) -> None:
    flags = ("--database-url", database, "--connection-seconds-max", "1")
    server = await asyncio.to_thread(start_server, *flags)
    follower = Follower()
    async with asyncio.TaskGroup() as running, grpc.aio.insecure_channel(server.address) as idle:
        following = running.create_task(follower.follow(server.address))
        await follower.begun.wait()
        async with under_load(server.address) as load:
            # Each connection is older than that by then: the load's, and the one of who follows.
            for _ in range(2):
                await idle.channel_ready()
                await idle.wait_for_state_change(grpc.ChannelConnectivity.READY)
            await load.progress(50)
        entries = await recorded(server.address)
        await follower.until({key(entry) for entry in entries})
        following.cancel()
    assert sorted(map(key, follower.told)) == sorted(map(key, entries))
    await check(server.address, load)
