"""A worker: a process with a budget that only it can use, and agents that spend slices of it."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context

import peculium
import peculium.aio
from peculium import BudgetExhausted, BudgetRef, PeculiumError, Receiver
from peculium.aio import Budget
from peculium_server.config import Exporting
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
from peculium_server.demo.prices import MODEL, PROVIDER, actual, upper
from peculium_server.demo.provider import ProviderClient, ProviderRefused
from peculium_server.demo.trace import Request
from peculium_server.demo.traces import EXPORT_SECONDS_MAX, SERVICE, TRACER, handed
from peculium_server.demo.treasury import Treasury
from peculium_server.telemetry import providers

TALLY_SECONDS: Final = 0.2

_CHAT: Final = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": PROVIDER,
    "gen_ai.request.model": MODEL,
}


class Agent:
    """Takes one request after the other, and spends slices of its worker's budget on them."""

    def __init__(
        self,
        number: int,
        treasury: Treasury,
        requests: deque[Request],
        provider: ProviderClient,
        run: trace.Link,
    ) -> None:
        self._name = f"agent-{number}"
        self._run = run
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
        # A trace of its own, linked with the run's: all of them are too many for one.
        with TRACER.start_as_current_span(
            "agent request",
            Context(),
            links=[self._run],
            attributes={"demo.agent": self._name, "demo.request": request.number},
            # A refusal is nothing exceptional: another slice is got for it.
            record_exception=False,
            set_status_on_exception=False,
        ):
            cost = await self._pay(budget, request)
        self.held = 0
        self.spent += cost
        self.calls += 1

    async def _pay(self, budget: Budget, request: Request) -> int:
        limit = upper(request)
        async with budget.reserve(limit, unbilled=(ProviderRefused,)) as hold:
            self.held = limit
            with TRACER.start_as_current_span(
                f"chat {MODEL}", kind=trace.SpanKind.CLIENT, attributes=_CHAT
            ):
                completion = await self._provider.complete(
                    MODEL,
                    prompt_tokens=request.context_tokens,
                    max_tokens=request.output_limit,
                    would_write=request.generated_tokens,
                )
            cost, usage = actual(completion.prompt_tokens, completion.completion_tokens)
            await hold.settle(cost, reference=completion.call_id, usage=usage)
        return cost

    def _next(self) -> Request | None:
        return self._requests.popleft() if self._requests else None


class Worker:
    """The process: gets a budget, lets its agents spend it, gives back what is left."""

    def __init__(self, start: Start, coordinator: Channel) -> None:
        self._start = start
        self._coordinator = coordinator
        self._requests: deque[Request] = deque()
        self._agents: list[Agent] = []

    async def run(self) -> Done:
        """From the budget's secret, which is made here, to the budget's end."""
        receiver = Receiver()
        await self._coordinator.send(Ready(token_id=receiver.token_id.hex()))
        begin = await self._prepare()
        ref = BudgetRef(begin.path, bytes.fromhex(begin.root_id), bytes.fromhex(begin.budget_id))
        async with peculium.aio.connect(
            self._start.target, timeout=self._start.timeout_seconds
        ) as client:
            with TRACER.start_as_current_span("worker", handed(begin.carrier)) as own:
                budget = await client.accept(receiver.capability(ref))
                treasury = Treasury(budget, self._coordinator, self._start.agents)
                await self._spend(treasury, trace.Link(own.get_span_context()))
                await budget.give_back()
        await self._tell()
        return Done(
            calls=[agent.calls for agent in self._agents],
            refused=[agent.refused for agent in self._agents],
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

    async def _spend(self, treasury: Treasury, run: trace.Link) -> None:
        for number in range(1, self._start.agents + 1):
            provider = await ProviderClient.connect(self._start.provider_port)
            self._agents.append(Agent(number, treasury, self._requests, provider, run))
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
    telemetry = providers.start_caller(Exporting.load(), SERVICE)
    try:
        done = await Worker(start, coordinator).run()
    except Exception as error:
        cause = first_error(error)
        if not isinstance(cause, PeculiumError | ProviderRefused | ConnectionError):
            raise
        problem = f"{type(cause).__name__}: {cause}"
        sys.stderr.write(f"{problem}\n")
        await coordinator.send(Failed(problem=problem))
        return 1
    # Before it is told that this is the end: after that nobody waits for this process.
    await asyncio.to_thread(telemetry.shutdown, EXPORT_SECONDS_MAX)
    await coordinator.send(done)
    return 0


def _unexpected(message: Message) -> ConnectionError:
    return ConnectionError(f"the coordinator sent {type(message).__name__}")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
