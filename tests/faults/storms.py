"""Faults that come and go: what is done to connections, and now and then to processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

from tests.faults.cluster import Cluster
from tests.faults.history import History
from tests.faults.proxy import CommitCut, Faults, Proxy

Fault = Callable[[Proxy, Random], Awaitable[None]]


async def _slow(proxy: Proxy, chance: Random) -> None:
    slow = Faults(latency_seconds=chance.uniform(0, 0.05), jitter_seconds=chance.uniform(0, 0.2))
    proxy.trouble(up=slow, down=slow)


async def _sliced(proxy: Proxy, chance: Random) -> None:
    proxy.trouble(up=Faults(slice_bytes=chance.choice((1, 7, 100))), down=Faults(slice_bytes=64))


async def _black_hole(proxy: Proxy, _: Random) -> None:
    proxy.trouble(up=Faults(swallow=True), down=Faults(swallow=True))


async def _silent(proxy: Proxy, _: Random) -> None:
    proxy.trouble(down=Faults(swallow=True))


async def _held(proxy: Proxy, chance: Random) -> None:
    held = Faults(held=True)
    proxy.trouble(**chance.choice(({"up": held}, {"down": held}, {"up": held, "down": held})))


async def _cut_after_bytes(proxy: Proxy, chance: Random) -> None:
    faults = Faults(cut_after_bytes=chance.randint(1, 20_000))
    proxy.trouble(**chance.choice(({"up": faults}, {"down": faults})))


async def _torn(proxy: Proxy, chance: Random) -> None:
    """What is asked does not arrive as a whole."""
    proxy.trouble(up=Faults(cut_after_bytes=chance.randint(1, 5_000)))


async def _reset(proxy: Proxy, chance: Random) -> None:
    proxy.reset(chance.choice((0.3, 1.0)))


async def _refused(proxy: Proxy, _: Random) -> None:
    await proxy.refuse()
    proxy.reset()


async def _commit_cut(proxy: Proxy, chance: Random) -> None:
    proxy.cut_commits(chance.choice(list(CommitCut)), chance.choice((0.1, 0.5, 1.0)))


ANYWHERE: tuple[Fault, ...] = (
    *(_slow, _sliced, _black_hole, _silent, _held),
    *(_cut_after_bytes, _reset, _refused),
)
BEFORE_POSTGRES: tuple[Fault, ...] = (*ANYWHERE, _commit_cut, _commit_cut, _commit_cut)
CUTS: tuple[Fault, ...] = (_silent, _cut_after_bytes, _reset)
"""What loses answers to what was done."""
TORN: tuple[Fault, ...] = (_torn,)
"""What loses what was asked."""


async def storm(
    cluster: Cluster,
    history: History,
    chance: Random,
    *,
    kill_chance: float = 0.0,
    faults: tuple[tuple[Fault, ...], tuple[Fault, ...]] = (ANYWHERE, BEFORE_POSTGRES),
    calm_seconds: float = 0.8,
    bad_seconds: float = 1.5,
) -> None:
    """Trouble one proxy after another until cancelled; `faults` are those of fronts, if any, and of backs."""
    while True:
        await asyncio.sleep(chance.uniform(0, calm_seconds))
        if chance.random() < kill_chance:
            await kill_something(cluster, history, chance)
            continue
        if chance.random() < kill_chance:
            await _pause(cluster, history, chance)
            continue
        node = chance.choice(cluster.nodes)
        front = bool(faults[0]) and chance.random() < 0.5
        proxy = node.front if front else node.back
        fault = chance.choice(faults[0] if front else faults[1])
        where = f"{'front' if front else 'back'} of {node.name}"
        history.info("nemesis", fault.__name__.strip("_"), where)
        await fault(proxy, chance)
        await asyncio.sleep(chance.uniform(0.1, bad_seconds))
        await proxy.heal()
        history.info("nemesis", "heal", where)


async def _pause(cluster: Cluster, history: History, chance: Random) -> None:
    """Stop a server in its tracks, sometimes for longer than the database waits for it."""
    node = chance.choice(cluster.nodes)
    history.info("nemesis", "pause", node.name)
    node.pause()
    await asyncio.sleep(chance.choice((chance.uniform(0.1, 2.0), 8.0)))
    node.resume()
    history.info("nemesis", "resume", node.name)


async def kill_something(cluster: Cluster, history: History, chance: Random) -> str:
    """Kill a server, a backend or the postmaster, and wait until all runs again: what it was."""
    what = chance.choice(("server", "server", "backend", "postmaster"))
    history.info("nemesis", "kill", what)
    if what == "server":
        cluster.kill_server(chance.choice(cluster.nodes))
    elif what == "backend":
        await cluster.kill_backend()
    else:
        cluster.kill_postmaster()
    await asyncio.sleep(chance.uniform(0, 0.5))
    await cluster.revive()
    history.info("nemesis", "alive", what)
    return what
