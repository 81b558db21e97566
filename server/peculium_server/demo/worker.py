"""A worker: a process with a budget that only it can use, and agents that spend slices of it."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from typing import Final

import peculium
import peculium.aio
from peculium import BudgetExhausted, BudgetRef, PeculiumError, Receiver
from peculium.aio import Budget
from peculium_server.demo.channel import Channel, first_error
from peculium_server.demo.messages import (
    Answer,
    Begin,
    Done,
    Failed,
    Message,
    Ready,
    Start,
    Tally,
    Work,
)
from peculium_server.demo.prices import MODEL, actual, upper
from peculium_server.demo.provider import ProviderClient, ProviderRefused
from peculium_server.demo.trace import Request
from peculium_server.demo.treasury import Treasury

TALLY_SECONDS: Final = 0.2


class Agent:
    """Takes one request after the other, and spends slices of its worker's budget on them."""

    def __init__(
        self,
        number: int,
        treasury: Treasury,
        requests: deque[Request],
        provider: ProviderClient,
    ) -> None:
        self._name = f"agent-{number}"
        self._treasury = treasury
        self._requests = requests
        self._provider = provider
        self.calls = 0
        self.refused = 0
        self.spent = 0
        self.held = 0

    async def run(self) -> None:
        """Work until there is nothing left to do."""
        request = self._next()
        while request is not None:
            async with self._treasury.slice_for(self._name, upper(request)) as budget:
                if budget is not None:
                    request = await self._spend(budget, request)
                else:
                    self.refused += 1
                    request = self._next()
        await self._treasury.give_back_idle()

    async def _spend(self, budget: Budget, request: Request | None) -> Request | None:
        """Serve requests, beginning with this one, as long as the budget can pay; the one it cannot."""
        try:
            while request is not None:
                await self._serve(budget, request)
                request = self._next()
        except BudgetExhausted:
            pass
        return request

    async def _serve(self, budget: Budget, request: Request) -> None:
        limit = upper(request)
        async with budget.reserve(limit, unbilled=(ProviderRefused,)) as hold:
            self.held = limit
            completion = await self._provider.complete(
                MODEL,
                prompt_tokens=request.context_tokens,
                max_tokens=request.output_limit,
                would_write=request.generated_tokens,
            )
            cost, usage = actual(completion.prompt_tokens, completion.completion_tokens)
            await hold.settle(cost, reference=completion.call_id, usage=usage)
        self.held = 0
        self.spent += cost
        self.calls += 1

    def _next(self) -> Request | None:
        return self._requests.popleft() if self._requests else None


class Worker:
    """The process: gets a budget, lets its agents spend it, gives back what is left."""

    def __init__(self, start: Start, coordinator: Channel) -> None:
        self._start = start
        self._coordinator = coordinator
        self._requests: deque[Request] = deque()
        self._agents: list[Agent] = []

    async def run(self) -> None:
        """From the budget's secret, which is made here, to the budget's end."""
        receiver = Receiver()
        await self._coordinator.send(Ready(token_id=receiver.token_id.hex()))
        begin = await self._prepare()
        ref = BudgetRef(begin.path, bytes.fromhex(begin.root_id), bytes.fromhex(begin.budget_id))
        async with peculium.aio.connect(
            self._start.target, timeout=self._start.timeout_seconds
        ) as client:
            budget = await client.accept(receiver.capability(ref))
            await self._spend(Treasury(budget, self._coordinator, self._start.agents))
            await budget.give_back()
        await self._tell()
        await self._coordinator.send(
            Done(
                calls=[agent.calls for agent in self._agents],
                refused=[agent.refused for agent in self._agents],
            )
        )

    async def _prepare(self) -> Begin:
        """Take the requests, until the budget is there."""
        while True:
            match await self._coordinator.receive():
                case Work(requests=requests):
                    self._requests.extend(Request(*fields) for fields in requests)
                case Begin() as begin:
                    return begin
                case other:
                    raise _unexpected(other)

    async def _spend(self, treasury: Treasury) -> None:
        for number in range(1, self._start.agents + 1):
            provider = await ProviderClient.connect(self._start.provider_port)
            self._agents.append(Agent(number, treasury, self._requests, provider))
        async with asyncio.TaskGroup() as others:
            background = [
                others.create_task(self._listen(treasury)),
                others.create_task(self._tell_regularly()),
            ]
            async with asyncio.TaskGroup() as agents:
                for agent in self._agents:
                    agents.create_task(agent.run())
            for task in background:
                task.cancel()

    async def _listen(self, treasury: Treasury) -> None:
        while True:
            match await self._coordinator.receive():
                case Answer() as answer:
                    treasury.answered(answer)
                case other:
                    raise _unexpected(other)

    async def _tell_regularly(self) -> None:
        while True:
            await self._tell()
            await asyncio.sleep(TALLY_SECONDS)

    async def _tell(self) -> None:
        await self._coordinator.send(
            Tally(
                calls=sum(agent.calls for agent in self._agents),
                refused=sum(agent.refused for agent in self._agents),
                spent=sum(agent.spent for agent in self._agents),
                held=sum(agent.held for agent in self._agents),
            )
        )


async def main() -> int:
    """Be the worker that the coordinator starts; the process's exit code."""
    coordinator = await Channel.to_coordinator()
    start = await coordinator.receive()
    if not isinstance(start, Start):
        raise _unexpected(start)
    try:
        await Worker(start, coordinator).run()
    except Exception as error:
        cause = first_error(error)
        if not isinstance(cause, PeculiumError | ProviderRefused | ConnectionError):
            raise
        problem = f"{type(cause).__name__}: {cause}"
        sys.stderr.write(f"{problem}\n")
        await coordinator.send(Failed(problem=problem))
        return 1
    return 0


def _unexpected(message: Message) -> ConnectionError:
    return ConnectionError(f"the coordinator sent {type(message).__name__}")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
