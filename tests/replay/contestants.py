"""What guards the calls, as the campaign sees it, and what all that keep a counter have in common.

Each is used as its users would: a store that cannot be reached permits nothing, a lost connection is
made again and what was asked is asked once more, a call that failed is not charged for.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeVar

from tests.faults.proxy import Proxy
from tests.replay.agents import CallFailed, Gate, Llm, Result, Seat, patience
from tests.replay.plays import DISTURBED, Scenario
from tests.replay.provider import Script

ROOT = Path(__file__).parents[2]
AGAIN_SECONDS = 0.02

_T = TypeVar("_T")


class StoreGone(Exception):
    """What keeps the budget cannot be reached."""


class Contestant(ABC):
    """One way to guard calls, as the campaign sees it."""

    name: str
    title: str

    def __init__(self) -> None:
        self.proxy: Proxy | None = None
        """Between agents and what keeps the budget, in scenarios in which that is disturbed."""

    def plays(self, scenario: Scenario) -> bool:
        """Whether it takes part."""
        return True

    @abstractmethod
    def running(self) -> AbstractAsyncContextManager[object]:
        """Start what it needs."""

    @abstractmethod
    async def seats(self, trial: str, scenario: Scenario) -> Sequence[Seat]:
        """Make a budget, and tell each process how to get at it."""

    async def left(self, trial: str) -> int | None:
        """How much is free to be spent, as it is kept; None: nobody keeps it."""
        return None

    async def kill(self) -> None:
        """Kill what keeps the budget, with its database, and start it again."""

    async def revoke(self, trial: str) -> None:
        """Take the budget away from its agents."""

    async def reconcile(self, trial: str, billed: int) -> None:
        """Do with the provider's bill what its users can do."""


def proxied(scenario: Scenario) -> bool:
    """Whether agents reach what keeps the budget through a proxy that can be disturbed."""
    return any(act.strike in DISTURBED for act in scenario.acts)


class CounterGate(Gate):
    """Asks before a call, and books after it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def call(self, llm: Llm, script: Script, attempts: int, agent: str) -> Result:
        """Make a call if the counter permits it; its attempts are the client's business."""
        try:
            if not await self._store.ask(script.estimate, agent):
                return Result.REFUSED
        except StoreGone:
            return Result.REFUSED
        try:
            usage = await llm.complete(script, attempts)
        except CallFailed:
            result, actual = Result.FAILED, 0
        else:
            result, actual = Result.DONE, usage or 0
        with contextlib.suppress(StoreGone):
            await self._store.book(script.estimate, actual, agent)
        return result


class Store(ABC):
    """A trial's counter, as agents use it."""

    @abstractmethod
    async def ask(self, estimate: int, agent: str) -> bool:
        """Whether a call may be made."""

    @abstractmethod
    async def book(self, estimate: int, actual: int, agent: str) -> None:
        """A call is over."""


async def twice(ask: Callable[[], Awaitable[_T]], *errors: type[Exception]) -> _T:
    """Ask, and once more if the connection was lost.

    Raises:
        StoreGone: It was lost again.
    """
    for last in (False, True):
        try:
            async with asyncio.timeout(patience.get()):
                return await ask()
        except TimeoutError as error:
            raise StoreGone from error
        except errors as error:
            if last:
                raise StoreGone from error
            await asyncio.sleep(AGAIN_SECONDS)
    raise AssertionError("unreachable")
