"""Agents that spend as fast as they can, and a provider that bills them, whatever the ledger says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import peculium
from peculium import Child, aio
from peculium.aio import Budget, Client
from peculium.values import Receipt

ESTIMATE = 20
CALLS_OF_SLICE = 4
GRANTED = 10**9
TIMEOUT_SECONDS = 60.0
"""Longer than any fault of a test: nothing may stay unknown."""


@dataclass
class Provider:
    """Bills calls."""

    billed: int = 0
    calls: int = 0

    def call(self) -> int:
        """What this call costs."""
        cost = 1 + self.calls % ESTIMATE
        self.calls += 1
        self.billed += cost
        return cost


@dataclass
class Load:
    """Agents at work."""

    roots: tuple[str, str]
    """What they spend from."""
    provider: Provider = field(default_factory=Provider)
    acknowledged: list[Receipt] = field(default_factory=list)
    """Whatever the ledger has answered to them."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _progress: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def progress(self, calls: int) -> None:
        """Wait until so many more calls are settled."""
        async with self._progress:
            wanted = len(self.acknowledged) + 2 * calls
            await self._progress.wait_for(lambda: len(self.acknowledged) >= wanted)

    async def work(self, budget: Budget) -> None:
        """One agent, until it is told to stop."""
        while not self.stopping.is_set():
            await self._call(budget)

    async def work_in_slices(self, budget: Budget) -> None:
        """One agent that takes a slice of the budget for every few calls, and gives back the rest."""
        while not self.stopping.is_set():
            async with budget.delegate_here(CALLS_OF_SLICE * ESTIMATE) as part:
                for _ in range(CALLS_OF_SLICE):
                    await self._call(part)

    async def _call(self, budget: Budget) -> None:
        async with budget.reserve(ESTIMATE) as hold:
            await self._note(hold.receipt)
            await self._note(await hold.settle(self.provider.call()))

    async def _note(self, receipt: Receipt) -> None:
        async with self._progress:
            self.acknowledged.append(receipt)
            self._progress.notify_all()


@contextlib.asynccontextmanager
async def under_load(
    address: str, name: str = "load", *, budgets: int = 6, timeout: float = TIMEOUT_SECONDS
) -> AsyncIterator[Load]:
    """Agents on each of some budgets held by token, and on one that its principal holds.

    Leaving ends them after the call that each of them is at.
    """
    async with aio.connect(address, timeout=timeout) as client:
        load = Load((f"{name}-tokens", f"{name}-service"))
        shared = await _make_budgets(client, load.roots, budgets)
        async with asyncio.TaskGroup() as working:
            for budget in shared:
                working.create_task(load.work_in_slices(budget))
                for _ in range(4):
                    working.create_task(load.work(budget))
            try:
                yield load
            finally:
                load.stopping.set()


async def _make_budgets(client: Client, roots: tuple[str, str], count: int) -> list[Budget]:
    tokens, service = roots
    made = await client.admin.grant(tokens, unit="calls", amount=GRANTED)
    root = await client.accept(made.capability)
    children = await root.delegate(
        [Child(f"run-{number}", GRANTED // 100) for number in range(count)]
    )
    await client.admin.grant(service, unit="calls", amount=GRANTED, holder="dev")
    return [
        await client.open(service),
        *[await client.accept(child.capability) for child in children],
    ]


async def check(address: str, load: Load) -> None:
    """What was acknowledged is recorded, once; what was billed is what was spent; and all verifies."""
    async with aio.connect(address, timeout=TIMEOUT_SECONDS) as client:
        spent = held = 0
        recorded: list[str] = []
        kinds: dict[str, int] = {}
        for root in load.roots:
            async for budget in client.audit.budgets(root):
                spent += budget.balances.spent
                held += budget.balances.held
            async for entry in client.audit.entries(root, reach=peculium.Reach.TREE):
                if entry.part == 0:
                    recorded.append(entry.operation_id)
                    kinds[entry.kind] = kinds.get(entry.kind, 0) + 1
        verdicts = [progress.verified async for progress in client.audit.verify()]
    assert (spent, held) == (load.provider.billed, 0)
    assert len(recorded) == len(set(recorded))
    assert {receipt.operation_id for receipt in load.acknowledged} <= set(recorded)
    assert kinds["SETTLE"] == load.provider.calls
    assert verdicts[-1] is True
