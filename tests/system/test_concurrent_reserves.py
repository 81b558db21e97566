"""Many reserves of one agent at once, near the end of its budget: each gets its own true answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Self

import pytest

from peculium import BudgetExhausted, aio
from peculium.aio import Budget, Client, Hold
from tests.system.conftest import Shared

pytestmark = pytest.mark.timeout(240)

GRANTED = 10_000
SPENT_BEFORE = GRANTED * 9 // 10
RESERVES = 50
ROUND_TRIPS_MAX = 3


class Exhausted(NamedTuple):
    """What a refusal has to say."""

    available: int
    held: int
    requested: int
    remedy: str


@pytest.fixture
async def client(shared: Shared) -> AsyncIterator[Client]:
    async with aio.connect(shared.server.address) as connected:
        yield connected


class Counting:
    """The Batch method of a client's stub, and how often it was called."""

    def __init__(self, client: Client) -> None:
        self._ledger = client._sender.ledger
        self._batch = self._ledger.Batch
        self.calls = 0

    def __enter__(self) -> Self:
        vars(self._ledger)["Batch"] = self
        return self

    def __exit__(self, *error: object) -> None:
        vars(self._ledger)["Batch"] = self._batch

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self._batch(*arguments, **options)


async def _nearly_spent(client: Client, name: str, custody: str) -> Budget:
    if custody == "token":
        made = await client.admin.grant(name, unit="calls", amount=GRANTED)
        budget = await client.accept(made.capability)
    else:
        await client.admin.grant(name, unit="calls", amount=GRANTED, holder="dev")
        budget = await client.open(name)
    await budget.spend(SPENT_BEFORE)
    return budget


def _model(amounts: list[int]) -> list[int | Exhausted]:
    """What one reserve after the other would have been told."""
    available, held = GRANTED - SPENT_BEFORE, 0
    answers: list[int | Exhausted] = []
    for amount in amounts:
        if amount <= available:
            available -= amount
            held += amount
            answers.append(amount)
        else:
            remedy = "wait_for_holds" if amount <= available + held else "top_up"
            answers.append(Exhausted(available, held, amount, remedy))
    return answers


def _answer(result: Hold | BaseException) -> int | Exhausted:
    if isinstance(result, Hold):
        return result.amount
    assert isinstance(result, BudgetExhausted)
    return Exhausted(result.available, result.held, result.requested, result.remedy)


@pytest.mark.parametrize("custody", ["token", "principal"])
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_fifty_reserves_at_once_get_the_answers_of_fifty_one_after_the_other(
    client: Client, custody: str, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    amounts = [chance.choice([1, 7, 40, 150, 400, 1_001]) for _ in range(RESERVES)]
    name = f"{custody}-{seed}"
    budget = await _nearly_spent(client, name, custody)
    with Counting(client) as counting:
        results = await asyncio.gather(
            *(budget.reserve(amount) for amount in amounts), return_exceptions=True
        )
    assert counting.calls <= ROUND_TRIPS_MAX
    assert [_answer(result) for result in results] == _model(amounts)
    holds = [result for result in results if isinstance(result, Hold)]
    assert 0 < len(holds) < RESERVES
    assert (await budget.balances()).held == sum(hold.amount for hold in holds)
    positions = [
        entry.operation_id async for entry in client.audit.entries(name) if entry.kind == "RESERVE"
    ]
    assert positions == [hold.receipt.operation_id for hold in holds]


async def test_what_was_reserved_at_once_is_settled_at_once(client: Client) -> None:
    budget = await _nearly_spent(client, "settled-at-once", "token")
    holds = await asyncio.gather(*(budget.reserve(20) for _ in range(RESERVES)))
    with Counting(client) as counting:
        await asyncio.gather(*(hold.settle(19) for hold in holds))
    assert counting.calls <= ROUND_TRIPS_MAX
    balances = await budget.balances()
    assert (balances.spent, balances.available, balances.held) == (SPENT_BEFORE + 950, 50, 0)
    verdicts = [progress.verified async for progress in client.audit.verify()]
    assert verdicts[-1] is True
