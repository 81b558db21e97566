"""The coordinator: holds the cap, delegates to the workers, and hands on what they give back.

It decides from three facts only: what its own budget has available, who asks for how much, and how
much has surely been spent. A request is given up when it needs more than all that is not spent,
wherever that is; until then whoever asks waits for money to come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from peculium import BudgetRef, Child
from peculium.aio import Budget
from peculium_server.demo.channel import Channel
from peculium_server.demo.messages import (
    Answer,
    Ask,
    Begin,
    Done,
    Failed,
    Message,
    Ready,
    Returned,
    Tally,
)
from peculium_server.demo.shares import share

PARTS_PER_WORKER: Final = 2
"""Half of what there is goes to the workers at first; the other half is for whoever is faster."""


NOTHING_YET: Final = Tally(calls=0, refused=0, spent=0, held=0)


class WorkerFailed(Exception):
    """A worker could not go on."""

    def __init__(self, peer: str, problem: str) -> None:
        super().__init__(f"{peer}: {problem}")
        self.peer = peer


@dataclass(slots=True, eq=False)
class Attended:
    """A worker, as the coordinator knows it."""

    channel: Channel
    ref: BudgetRef
    tally: Tally = NOTHING_YET
    asks: dict[int, int] = field(default_factory=dict)
    """What each waiting agent needs, by the number of its ask."""
    done: Done | None = None


class Coordinator:
    """Spends a cap through workers."""

    def __init__(self, budget: Budget, granted: int, channels: Sequence[Channel]) -> None:
        """`channels` lead to the workers."""
        self._budget = budget
        self._granted = granted
        self._channels = channels
        self._parts = PARTS_PER_WORKER * len(channels)
        self.workers: list[Attended] = []
        self._money_may_be_there = asyncio.Event()

    async def run(self) -> None:
        """Delegate to the workers, and attend to them until all are done.

        Raises:
            ExceptionGroup: Of WorkerFailed and PeerEnded: a worker could not go on; or of what the
                ledger answered.
        """
        await self._delegate()
        async with asyncio.TaskGroup() as group:
            handing_on = group.create_task(self._hand_on())
            async with asyncio.TaskGroup() as attending:
                for worker in self.workers:
                    attending.create_task(self._attend(worker))
            handing_on.cancel()

    @property
    def tally(self) -> Tally:
        """How far all workers are together."""
        tallies = [worker.tally for worker in self.workers]
        return Tally(
            calls=sum(tally.calls for tally in tallies),
            refused=sum(tally.refused for tally in tallies),
            spent=sum(tally.spent for tally in tallies),
            held=sum(tally.held for tally in tallies),
        )

    @property
    def done(self) -> dict[str, Done]:
        """What those workers that are done have said, by name."""
        return {worker.channel.peer: worker.done for worker in self.workers if worker.done}

    @property
    def _unspent_max(self) -> int:
        return self._granted - self.tally.spent

    async def _delegate(self) -> None:
        """Give every worker a budget that only it can use: it has made the secret."""
        children = []
        for channel in self._channels:
            match await channel.receive():
                case Ready(token_id=token_id):
                    amount = self._granted // self._parts
                    token = bytes.fromhex(token_id)
                    children.append(Child(channel.peer, amount, receiver=token))
                case other:
                    raise _failed(channel.peer, other)
        made = await self._budget.delegate(children)
        for channel, child in zip(self._channels, made, strict=True):
            ref = child.ref
            self.workers.append(Attended(channel, ref))
            await channel.send(
                Begin(
                    path=ref.path,
                    root_id=ref.root_id.hex(),
                    budget_id=ref.budget_id.hex(),
                    carrier=dict(child.carrier),
                )
            )

    async def _attend(self, worker: Attended) -> None:
        while worker.done is None:
            match await worker.channel.receive():
                case Tally() as tally:
                    worker.tally = tally
                    await self._give_up_on_the_hopeless()
                case Ask(ask=ask, need=need):
                    worker.asks[ask] = need
                    self._money_may_be_there.set()
                case Returned():
                    self._money_may_be_there.set()
                case Done() as done:
                    worker.done = done
                    self._money_may_be_there.set()
                case other:
                    raise _failed(worker.channel.peer, other)

    async def _hand_on(self) -> None:
        """Fund whoever asks, whenever there may be money for it."""
        while True:
            await self._money_may_be_there.wait()
            self._money_may_be_there.clear()
            if any(worker.asks for worker in self.workers):
                available = (await self._budget.info()).balances.available
                for worker, ask in self._waiting():
                    available -= await self._fund(worker, ask, available)
                await self._give_up_on_the_hopeless()

    async def _fund(self, worker: Attended, ask: int, available: int) -> int:
        """Answer an ask with money, if what is available will do; how much was handed on."""
        need = worker.asks.get(ask)
        if need is None or need > available:
            return 0
        del worker.asks[ask]
        amount = share(available, self._parts, need)
        await self._budget.fund(worker.ref, amount)
        await self._answer(worker, ask, funded=True)
        return amount

    async def _give_up_on_the_hopeless(self) -> None:
        """Refuse what even everything that is left could not pay."""
        for worker, ask in self._waiting():
            if worker.asks.get(ask, 0) > self._unspent_max:
                del worker.asks[ask]
                await self._answer(worker, ask, funded=False)

    def _waiting(self) -> list[tuple[Attended, int]]:
        """Who waits, the longest waiting of each worker first."""
        return [(worker, ask) for worker in self.workers for ask in worker.asks]

    async def _answer(self, worker: Attended, ask: int, *, funded: bool) -> None:
        answer = Answer(ask=ask, funded=funded, unspent_max=self._unspent_max)
        await worker.channel.send(answer)


def _failed(name: str, message: Message) -> WorkerFailed:
    match message:
        case Failed(problem=problem):
            return WorkerFailed(name, problem)
        case _:
            return WorkerFailed(name, f"sent {type(message).__name__}")
