"""Agents of one process at steady work: `python -m tests.faults.soaker ADDRESS SLOT BILLS`.

They may be killed at any time. Who comes after them takes their slot's budget over, and by a throw of a
coin ends their holds by what the provider has billed, or lets them lapse.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

from peculium import aio
from peculium.aio import Budget, Client
from peculium.errors import BudgetClosed, BudgetExpired

TOKENS = "soak-tokens"
"""The root whose children are the slots, one for each process, held by token."""
SERVICE = "soak-service"
"""The root that all processes spend from by name."""

ESTIMATE = 20
TTL_SECONDS = 5
LEASE_SECONDS = 10

_TIMEOUT_SECONDS = 60.0
_CALLS_OF_SLICE = 3
_CALL_SECONDS_MAX = 0.1
_PAUSE_SECONDS = (0.1, 0.3)


class Provider:
    """Bills calls: what it has billed stays billed, whoever dies."""

    def __init__(self, bills: Path) -> None:
        self.earlier = dict(read(bills))
        self._file = os.open(bills, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def bill(self, hold_id: bytes) -> int:
        """What the call has cost."""
        cost = random.randint(1, ESTIMATE)
        os.write(self._file, f"{hold_id.hex()} {cost}\n".encode())
        return cost


def read(bills: Path) -> list[tuple[str, int]]:
    """What was billed, by hold."""
    if not bills.exists():
        return []
    lines = [line.split() for line in bills.read_text().splitlines()]
    return [(hold_id, int(cost)) for hold_id, cost in lines]


class Worker:
    """The agents of a process."""

    def __init__(self, client: Client, provider: Provider) -> None:
        self.stopping = asyncio.Event()
        self._client = client
        self._provider = provider

    async def work(self, slot: str) -> None:
        """Work until told to stop."""
        service = await self._client.open(SERVICE)
        own = await self._client.recover(f"{TOKENS}/{slot}")
        if random.random() < 0.5:
            await self._inherit(own)
        async with asyncio.TaskGroup() as working:
            for budget in (own, service):
                working.create_task(self._call_on(budget))
                working.create_task(self._slice_on(budget))

    async def _inherit(self, budget: Budget) -> None:
        """End what the process before has left, by what it was billed."""
        for hold in await budget.holds():
            billed = self._provider.earlier.get(hold.hold_id.hex(), 0)
            await budget.resolve(hold.hold_id, billed, reason="its process died")

    async def _call_on(self, budget: Budget) -> None:
        while not self.stopping.is_set():
            await self._call(budget)

    async def _slice_on(self, budget: Budget) -> None:
        """Take a leased slice for every few calls, and give back what is left of it."""
        while not self.stopping.is_set():
            try:
                async with budget.delegate_here(
                    _CALLS_OF_SLICE * ESTIMATE, lease=LEASE_SECONDS
                ) as part:
                    for _ in range(_CALLS_OF_SLICE):
                        await self._call(part)
            except (BudgetClosed, BudgetExpired):
                # On a machine that is this slow the lease was over before the work.
                continue

    async def _call(self, budget: Budget) -> None:
        async with budget.reserve(ESTIMATE, ttl=TTL_SECONDS) as hold:
            await asyncio.sleep(random.uniform(0, _CALL_SECONDS_MAX))
            cost = self._provider.bill(hold.hold_id)
            await asyncio.sleep(random.uniform(0, _CALL_SECONDS_MAX))
            await hold.settle(cost)
        await asyncio.sleep(random.uniform(*_PAUSE_SECONDS))


async def main(address: str, slot: str, bills: str) -> None:
    """Work until SIGTERM."""
    async with aio.connect(address, timeout=_TIMEOUT_SECONDS) as client:
        worker = Worker(client, Provider(Path(bills)))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stopping.set)
        await worker.work(slot)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
