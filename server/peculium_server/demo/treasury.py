"""A worker's budget, from which its agents get slices, and to which they return what they leave.

The rule that keeps money from being stranded: before anybody here waits for money or ends, what is
idle here has gone back to the coordinator. So when all agents of all workers wait, everything that
is not spent is with the coordinator, and goes to whoever can use it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from peculium.aio import Budget
from peculium_server.demo.channel import Channel
from peculium_server.demo.messages import Answer, Ask, Returned
from peculium_server.demo.shares import share

SLICE_LEASE_SECONDS: Final = 3_600.0


class Treasury:
    """One worker's."""

    def __init__(self, budget: Budget, coordinator: Channel, agents: int) -> None:
        self._budget = budget
        self._coordinator = coordinator
        self._agents = agents
        self._slice_numbers = itertools.count(1)
        self._ask_numbers = itertools.count(1)
        # What is idle is looked up and then used: nobody else may use it in between.
        self._lock = asyncio.Lock()
        self._asks: dict[int, asyncio.Future[bool]] = {}
        self._unspent_max: int | None = None

    @asynccontextmanager
    async def slice_for(self, agent: str, need: int) -> AsyncIterator[Budget | None]:
        """A child budget with at least `need`, for the time of the block; what is left returns.

        Waits while others hold money that may come back. None: nothing that is left anywhere in the
        tree can pay `need`.
        """
        async with AsyncExitStack() as stack:
            yield await self._open(stack, agent, need)

    async def give_back_idle(self) -> None:
        """Let the coordinator have what nobody here uses."""
        async with self._lock:
            idle = await self._idle()
            if idle:
                await self._budget.give_back(idle)
        await self._coordinator.send(Returned())

    def answered(self, answer: Answer) -> None:
        """The coordinator's answer to an ask came."""
        self._unspent_max = answer.unspent_max
        self._asks.pop(answer.ask).set_result(answer.funded)

    async def _open(self, stack: AsyncExitStack, agent: str, need: int) -> Budget | None:
        while self._unspent_max is None or need <= self._unspent_max:
            async with self._lock:
                idle = await self._idle()
                if idle >= need:
                    amount = share(idle, self._agents, need)
                    name = f"{agent}.{next(self._slice_numbers)}"
                    child = self._budget.delegate_here(amount, name=name, lease=SLICE_LEASE_SECONDS)
                    return await stack.enter_async_context(child)
                if idle:
                    await self._budget.give_back(idle)
            if not await self._ask(need):
                break
        return None

    async def _idle(self) -> int:
        return (await self._budget.info()).balances.available

    async def _ask(self, need: int) -> bool:
        number = next(self._ask_numbers)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asks[number] = answer
        await self._coordinator.send(Ask(ask=number, need=need))
        return await answer
