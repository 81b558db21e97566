"""Money goes to whoever can use it, and nobody is refused what somebody may still return.

The ledger is one in memory that decides as the real one does; the test plays the other side.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest

import peculium.aio
from peculium import BudgetRef, Receiver
from peculium.aio import Budget, Client
from peculium_server.demo.channel import Channel, first_error
from peculium_server.demo.coordinator import Coordinator, WorkerFailed
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
from peculium_server.demo.treasury import Treasury
from tests.client.ledger import serving

GRANTED = 800
SHARE = GRANTED // 4
"""What each of two workers is handed at first."""

_M = TypeVar("_M", bound=Message)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    with serving() as ledger:
        async with peculium.aio.connect(ledger.target) as client:
            yield client


@pytest.fixture
async def root(client: Client) -> Budget:
    grant = await client.admin.grant("demo", unit="usd_nanos", amount=GRANTED)
    return await client.accept(grant.capability)


async def pair(peer: str) -> tuple[Channel, Channel]:
    """A channel to a peer, and the peer's own end."""
    ours, theirs = socket.socketpair()
    return await Channel.over(ours, peer), await Channel.over(theirs, "the coordinator")


async def next_of(kind: type[_M], channel: Channel) -> _M:
    message = await channel.receive()
    assert isinstance(message, kind)
    return message


class PlayedWorker:
    """A worker whose moves are the test's."""

    def __init__(self, channel: Channel, budget: Budget) -> None:
        self.channel = channel
        self.budget = budget

    async def idle(self) -> int:
        return (await self.budget.info()).balances.available

    async def spend(self, amount: int) -> None:
        await self.budget.spend(amount)
        await self.channel.send(Tally(calls=1, refused=0, spent=amount, held=0))

    async def end(self) -> None:
        await self.budget.give_back()
        await self.channel.send(Done(calls=[1], refused=[0]))


@asynccontextmanager
async def coordinating(
    client: Client, root: Budget
) -> AsyncIterator[tuple[Coordinator, PlayedWorker, PlayedWorker]]:
    """A coordinator of two workers that have got their budgets."""
    pairs = [await pair(f"worker-{number}") for number in (1, 2)]
    coordinator = Coordinator(root, GRANTED, [ours for ours, _ in pairs])
    running = asyncio.create_task(coordinator.run())
    receivers = [Receiver(), Receiver()]
    for receiver, (_, theirs) in zip(receivers, pairs, strict=True):
        await theirs.send(Ready(token_id=receiver.token_id.hex()))
    workers = []
    for receiver, (_, theirs) in zip(receivers, pairs, strict=True):
        begin = await next_of(Begin, theirs)
        ref = BudgetRef(begin.path, bytes.fromhex(begin.root_id), bytes.fromhex(begin.budget_id))
        budget = await client.accept(receiver.capability(ref))
        workers.append(PlayedWorker(theirs, budget))
    one, other = workers
    try:
        yield coordinator, one, other
        await running
    finally:
        running.cancel()
        for channel in (channel for both in pairs for channel in both):
            await channel.close()


async def test_every_worker_gets_a_share_and_the_coordinator_keeps_the_rest(
    client: Client, root: Budget
) -> None:
    async with coordinating(client, root) as (coordinator, one, other):
        assert await one.idle() == await other.idle() == SHARE
        assert (await root.info()).balances.available == GRANTED - 2 * SHARE
        await one.end()
        await other.end()
    assert (await root.info()).balances.available == GRANTED
    assert coordinator.done == {
        name: Done(calls=[1], refused=[0]) for name in ("worker-1", "worker-2")
    }


async def test_whoever_asks_is_funded_with_a_share_of_what_there_is_or_with_its_need(
    client: Client, root: Budget
) -> None:
    async with coordinating(client, root) as (_, one, other):
        await one.channel.send(Ask(ask=1, need=7))
        assert await next_of(Answer, one.channel) == Answer(ask=1, funded=True, unspent_max=GRANTED)
        funded = share(GRANTED - 2 * SHARE, 4, 7)
        assert await one.idle() == SHARE + funded
        rest = GRANTED - 2 * SHARE - funded
        await one.channel.send(Ask(ask=2, need=rest))
        assert (await next_of(Answer, one.channel)).funded
        assert await one.idle() == SHARE + funded + rest
        await one.end()
        await other.end()


async def test_what_does_not_fit_waits_for_what_others_return(client: Client, root: Budget) -> None:
    async with coordinating(client, root) as (_, one, other):
        await one.budget.give_back(SHARE)
        await one.channel.send(Ask(ask=1, need=700))
        # A smaller one passes meanwhile; its answer shows that the first was looked at.
        await other.channel.send(Ask(ask=1, need=1))
        assert (await next_of(Answer, other.channel)).funded
        await other.budget.give_back(await other.idle())
        await other.channel.send(Returned())
        assert await next_of(Answer, one.channel) == Answer(ask=1, funded=True, unspent_max=GRANTED)
        assert await one.idle() == share(GRANTED, 4, 700)
        await one.end()
        await other.end()


async def test_what_all_that_is_not_spent_cannot_pay_is_refused_at_once(
    client: Client, root: Budget
) -> None:
    async with coordinating(client, root) as (_, one, other):
        await other.spend(150)
        await one.channel.send(Ask(ask=1, need=GRANTED - 150 + 1))
        assert await next_of(Answer, one.channel) == Answer(
            ask=1, funded=False, unspent_max=GRANTED - 150
        )
        await one.end()
        await other.end()


async def test_who_waits_is_refused_as_soon_as_others_have_spent_too_much(
    client: Client, root: Budget
) -> None:
    async with coordinating(client, root) as (_, one, other):
        await one.budget.give_back(SHARE)
        await one.channel.send(Ask(ask=1, need=700))
        await other.spend(100)
        await other.spend(
            100
        )  # The tally tells the total, which is 100 still: no reason to refuse.
        await other.channel.send(Tally(calls=2, refused=0, spent=200, held=0))
        assert await next_of(Answer, one.channel) == Answer(
            ask=1, funded=False, unspent_max=GRANTED - 200
        )
        await one.end()
        await other.end()


async def test_a_worker_that_cannot_go_on_ends_the_run(client: Client, root: Budget) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with coordinating(client, root) as (_, one, _):
            await one.channel.send(Failed(problem="no answer"))
    error = first_error(caught.value)
    assert isinstance(error, WorkerFailed)
    assert (error.peer, str(error)) == ("worker-1", "worker-1: no answer")


@pytest.mark.parametrize(
    ("there", "parts", "need", "amount"),
    [
        (800, 4, 1, 200),  # An equal part,
        (80, 4, 10, 60),  # but enough for a few requests,
        (50, 4, 10, 50),  # if there is enough,
        (10, 4, 10, 10),  # and never less than what is needed.
    ],
)
def test_a_share_shrinks_with_what_there_is_but_lasts_for_a_few_requests(
    there: int, parts: int, need: int, amount: int
) -> None:
    assert share(there, parts, need) == amount


# --- a worker's treasury, with two agents; the test is the coordinator ---


@asynccontextmanager
async def treasury_of(root: Budget) -> AsyncIterator[tuple[Treasury, Budget, Channel]]:
    """A treasury with a budget of 100, and the coordinator's end of its channel."""
    ours, theirs = await pair("the worker")
    async with root.delegate_here(100, name="worker-1") as budget:
        yield Treasury(budget, theirs, agents=2), budget, ours
    await ours.close()
    await theirs.close()


async def available(budget: Budget) -> int:
    return (await budget.info()).balances.available


async def test_an_agent_gets_a_share_of_what_is_idle(root: Budget) -> None:
    async with (
        treasury_of(root) as (treasury, budget, _),
        treasury.slice_for("agent-1", 2) as first,
        treasury.slice_for("agent-2", 40) as second,
    ):
        assert first is not None
        assert second is not None
        assert await available(first) == share(100, 2, 2) == 50
        assert await available(second) == share(50, 2, 40) == 50
        assert await available(budget) == 0


async def test_what_an_agent_leaves_is_there_for_the_next(root: Budget) -> None:
    async with treasury_of(root) as (treasury, budget, _):
        async with treasury.slice_for("agent-1", 100) as whole:
            assert whole is not None
            await whole.spend(1)
        async with treasury.slice_for("agent-2", 99) as rest:
            assert rest is not None
            assert await available(rest) == 99
        assert await available(budget) == 99


async def test_what_is_idle_goes_back_before_an_agent_waits(root: Budget) -> None:
    async with treasury_of(root) as (treasury, budget, coordinator):
        waiting = asyncio.create_task(_amount(treasury, 150))
        ask = await next_of(Ask, coordinator)
        assert ask.need == 150
        assert await available(budget) == 0
        assert await available(root) == GRANTED
        await root.fund(budget.ref, 160)
        treasury.answered(Answer(ask=ask.ask, funded=True, unspent_max=GRANTED))
        assert await waiting == 160


async def test_money_that_another_agent_took_first_is_asked_for_again(root: Budget) -> None:
    async with treasury_of(root) as (treasury, _, coordinator):
        waiting = asyncio.create_task(_amount(treasury, 150))
        first = await next_of(Ask, coordinator)
        treasury.answered(Answer(ask=first.ask, funded=True, unspent_max=GRANTED))
        second = await next_of(Ask, coordinator)
        assert (second.need, second.ask) != (first.need, first.ask)
        treasury.answered(Answer(ask=second.ask, funded=False, unspent_max=149))
        assert await waiting is None


async def test_what_can_never_be_paid_is_not_asked_for_again(root: Budget) -> None:
    async with treasury_of(root) as (treasury, _, coordinator):
        waiting = asyncio.create_task(_amount(treasury, 150))
        ask = await next_of(Ask, coordinator)
        treasury.answered(Answer(ask=ask.ask, funded=False, unspent_max=120))
        assert await waiting is None
        async with treasury.slice_for("agent-1", 121) as hopeless:
            assert hopeless is None
        waiting = asyncio.create_task(_amount(treasury, 120))
        assert (await next_of(Ask, coordinator)).need == 120
        waiting.cancel()


async def test_an_agent_that_ends_lets_the_coordinator_have_what_is_idle(root: Budget) -> None:
    async with treasury_of(root) as (treasury, budget, coordinator):
        await treasury.give_back_idle()
        await next_of(Returned, coordinator)
        assert await available(budget) == 0
        assert await available(root) == GRANTED
        await treasury.give_back_idle()
        await next_of(Returned, coordinator)


async def _amount(treasury: Treasury, need: int) -> int | None:
    async with treasury.slice_for("agent-1", need) as budget:
        return None if budget is None else await available(budget)
