"""The lanes on a real database: many callers, several servers, lost connections."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import psycopg
import pytest

from peculium_server.core.operations import ByHolder, ByToken, Grant, Spend
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.verify import Verifier
from peculium_server.lanes.answers import Answer, Unanswered
from peculium_server.lanes.ledger import Ledger
from peculium_server.store.store import Store
from tests.lanes.memory import ADMIN, chain, grant, new_token, request, spend

RETRY_SECONDS_MAX = 30


def new_id() -> bytes:
    """A UUIDv7 of now."""
    rest = bytearray(secrets.token_bytes(10))
    rest[0] = 0x70 | rest[0] & 0x0F
    rest[2] = 0x80 | rest[2] & 0x3F
    return (time.time_ns() // 1_000_000).to_bytes(6) + bytes(rest)


def now(operation: Spend) -> Spend:
    """The same, made now: on a principal-held budget an operation must not be old."""
    return replace(operation, operation_id=new_id())


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    opened = await Store.open(database)
    yield opened
    await opened.close()


@pytest.fixture
async def ledger(store: Store) -> AsyncIterator[Ledger]:
    opened = Ledger(store, queue_rows_max=10_000)
    yield opened
    await opened.drain()


async def granted(ledger: Ledger, amount: int) -> Grant:
    root = grant(amount)
    [answer] = await ledger.execute([request(root, actor=ADMIN)], None)
    assert isinstance(answer.result, Outcome)
    return root


async def verified(store: Store, root: Grant) -> int:
    """Verify a tree, and return how many entries it has."""
    verifier = Verifier(root.root_id)
    async with store.snapshot() as snapshot:
        async for entry in snapshot.entries_in_order(root.root_id):
            verifier.entry(entry)
        async for budget in snapshot.budgets_of(root.root_id):
            verifier.budget(budget)
        async for hold in snapshot.holds_of(root.root_id):
            verifier.hold(hold)
    assert verifier.finish() is None
    return verifier.entries


async def test_many_callers_spend_from_few_roots_and_not_one_too_much(
    ledger: Ledger, store: Store
) -> None:
    roots = [await granted(ledger, 50) for _ in range(3)]
    answers = await asyncio.gather(
        *(ledger.execute([request(now(spend(roots[number % 3])))], None) for number in range(240))
    )
    results = [answer.result for [answer] in answers]
    assert sum(isinstance(result, Outcome) for result in results) == 150
    refused = {result.reason for result in results if isinstance(result, Refused)}
    assert refused == {Refusal.BUDGET_EXHAUSTED}
    for root in roots:
        [budget] = await store.budget(root.root_id, root.budget_id)
        assert (budget.money.spent, budget.money.available) == (50, 0)
        assert await verified(store, root) == 51


async def test_one_request_over_many_lanes_is_answered_as_a_whole(
    ledger: Ledger, store: Store
) -> None:
    roots = [await granted(ledger, 10) for _ in range(20)]
    assert len({store.lane_of(root.root_id) for root in roots}) > 1
    answers = await ledger.execute(chain([now(spend(root, 4)) for root in roots]), None)
    for root, answer in zip(roots, answers, strict=True):
        assert isinstance(answer.result, Outcome)
        assert answer.result.budget_id == root.budget_id
        assert answer.position is not None
        assert answer.position.lane == store.lane_of(root.root_id)


async def test_a_token_is_consumed_once_however_many_present_it(
    ledger: Ledger, database: str
) -> None:
    token = new_token()
    root = replace(grant(100, holder=None), token_id=token)
    await ledger.execute([request(root, actor=ADMIN)], None)
    other_store = await Store.open(database)
    other = Ledger(other_store, queue_rows_max=10_000)
    try:
        answers = await asyncio.gather(
            *(
                (ledger, other)[number % 2].execute([request(spend(root, 1, ByToken(token)))], None)
                for number in range(60)
            )
        )
    finally:
        await other.drain()
        await other_store.close()
    results = [answer.result for [answer] in answers]
    [winner] = [result for result in results if isinstance(result, Outcome)]
    losers = [result for result in results if isinstance(result, Refused)]
    assert len(losers) == 59
    assert {loser.reason for loser in losers} == {Refusal.TOKEN_CONSUMED}
    assert {loser.facts["consumed_by"] for loser in losers} != {""}
    assert winner.money.spent == 1


async def test_two_servers_share_a_root_without_losing_or_doubling_anything(
    ledger: Ledger, store: Store, database: str
) -> None:
    root = await granted(ledger, 1_000)
    other_store = await Store.open(database)
    other = Ledger(other_store, queue_rows_max=10_000)
    try:
        answers = await asyncio.gather(
            *(
                (ledger, other)[number % 2].execute([request(now(spend(root)))], None)
                for number in range(200)
            )
        )
    finally:
        await other.drain()
        await other_store.close()
    assert all(isinstance(answer.result, Outcome) for [answer] in answers)
    [budget] = await store.budget(root.root_id, root.budget_id)
    assert budget.money.spent == 200
    assert await verified(store, root) == 201


async def test_what_got_no_answer_is_sent_again_and_happens_once(
    ledger: Ledger, store: Store, database: str
) -> None:
    root = await granted(ledger, 10_000)
    interrupted = asyncio.Event()

    async def insist(operation: Spend) -> tuple[Answer, int]:
        """Send the same operation until it is answered, as a client does."""
        async with asyncio.timeout(RETRY_SECONDS_MAX):
            for attempt in range(1_000):
                [answer] = await ledger.execute([request(operation)], None)
                if not isinstance(answer.result, Unanswered):
                    return answer, attempt
                await asyncio.sleep(answer.result.retry_delay_ms / 10_000)
        raise AssertionError("no answer")

    async def spend_until_interrupted() -> list[tuple[Answer, int]]:
        answers = []
        while not interrupted.is_set():
            answers.append(await insist(now(spend(root))))
        return answers

    async def interrupt() -> None:
        connection = await psycopg.AsyncConnection.connect(database, autocommit=True)
        async with connection:
            for _ in range(10):
                await insist(now(spend(root)))
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
        interrupted.set()

    *spenders, _ = await asyncio.gather(
        *(spend_until_interrupted() for _ in range(20)), interrupt()
    )
    answers = [each for answers in spenders if answers for each in answers]
    results = [answer.result for answer, _ in answers]
    assert all(isinstance(result, Outcome) for result in results)
    entries = await verified(store, root)
    [budget] = await store.budget(root.root_id, root.budget_id)
    assert budget.money.spent == entries - 1 == len(answers) + 10


async def test_what_its_caller_left_before_it_was_decided_is_not_recorded(
    ledger: Ledger, store: Store
) -> None:
    root = await granted(ledger, 1_000)
    kept = [
        asyncio.create_task(ledger.execute([request(now(spend(root)))], None)) for _ in range(5)
    ]
    left = [
        asyncio.create_task(ledger.execute([request(now(spend(root)))], None)) for _ in range(5)
    ]
    await asyncio.sleep(0)
    for task in left:
        task.cancel()
    await asyncio.gather(*kept)
    await asyncio.gather(*left, return_exceptions=True)
    await ledger.drain()
    assert await verified(store, root) == 6


async def test_a_chain_over_a_real_database_gives_each_its_own_answer(
    ledger: Ledger, store: Store
) -> None:
    root = await granted(ledger, 10)
    operations = [now(spend(root, amount, ByHolder())) for amount in (4, 7, 3, 3, 3)]
    answers = await ledger.execute(chain(operations), None)
    told = [isinstance(answer.result, Outcome) for answer in answers]
    assert told == [True, False, True, True, False]
