"""Whoever asks for what is refused, however often, costs the database nothing that stays.

PostgreSQL gives a transaction a number when it first writes, and never otherwise: if the next number is
the same after a storm, nothing in it has written.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from peculium.v1 import ledger_service_pb2 as ledger, types_pb2
from peculium.v1.admin_service_pb2_grpc import AdminServiceStub
from peculium.v1.ledger_service_pb2_grpc import LedgerServiceStub
from peculium_server.embedded import EmbeddedPostgres
from peculium_server.refusals import KEYS_MAX, RefusalCounts
from peculium_server.store import migrate
from tests.rpc.wire import Stored, storing
from tests.system.wire import (
    HOLDER,
    Held,
    grant_of,
    header,
    new_id,
    new_secret,
    reserve_of,
    spend_of,
    token_id,
    told,
)
from tests.system.world import dump

ROUNDS = 40
AT_ONCE = 50
"""Operations of a batch: so many are refused in one transaction, which has nothing to save."""
AMOUNT = 100


@pytest.fixture
def quiet_database(own_postgres: Path) -> Iterator[str]:
    """A database in a PostgreSQL in which nobody else does anything."""
    with EmbeddedPostgres.start(own_postgres, settings={"autovacuum": "off"}) as postgres:
        migrate.upgrade(postgres.dsn)
        yield postgres.dsn


@pytest.fixture
async def stored(quiet_database: str) -> AsyncIterator[Stored]:
    async with storing(quiet_database, counting=True) as running:
        yield running


class Watch:
    """What a database has written."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True)

    def transactions(self) -> int:
        """The number that the next transaction gets that writes."""
        query = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
        found = self._connection.execute(query).fetchone()
        assert found is not None
        return int(found[0])

    def rows(self) -> dict[str, list[str]]:
        """All rows but those that tell what was refused."""
        return dump(self._connection)

    def counts(self) -> int:
        """How many rows tell what was refused how often."""
        found = self._connection.execute("SELECT count(*) FROM refusals").fetchone()
        assert found is not None
        return int(found[0])

    def close(self) -> None:
        self._connection.close()


async def granted(stored: Stored) -> Held:
    secret = new_secret()
    request = grant_of("acme", AMOUNT, secret=secret)
    await AdminServiceStub(stored.channel).Grant(request)
    return Held(request.header.root_id, request.header.budget_id, secret)


async def spent(stored: Stored, budget: Held) -> Held:
    """A budget's token that was consumed; the budget goes on with another."""
    before = Held(budget.root_id, budget.budget_id, budget.secret)
    following = new_secret()
    request = spend_of(budget, 1)
    request.next_token_id = token_id(following)
    await LedgerServiceStub(stored.channel).Spend(request)
    budget.secret = following
    return before


def refused_operations(budget: Held, consumed: Held) -> list[Any]:
    """One of each sort that somebody may ask for over and over, as requests of their own."""
    unknown = header(new_id(), new_id(), types_pb2.Authority(secret=new_secret()))
    nobody = ledger.SpendRequest(header=unknown, amount=1, next_token_id=token_id(new_secret()))
    guessed = spend_of(Held(budget.root_id, budget.budget_id, new_secret()), 1)
    hold = ledger.SettleRequest(header=budget.header(), hold_id=new_id(), actual=1)
    by_name = ledger.SpendRequest(header=header(budget.root_id, budget.budget_id, HOLDER), amount=1)
    return [
        reserve_of(budget, AMOUNT + 1),
        spend_of(budget, AMOUNT + 1),
        spend_of(consumed, 1),
        nobody,
        guessed,
        hold,
        by_name,
        spend_of(budget, 0),
        reserve_of(budget, -1),
    ]


EXPECTED = {
    "BUDGET_EXHAUSTED": 2,
    "TOKEN_CONSUMED": 1,
    "CAPABILITY_UNKNOWN": 4,
    "MALFORMED": 2,
}
"""How many of each there are among them."""


async def storm(stored: Stored, budget: Held, consumed: Held) -> Counter[str]:
    """Thousands of operations, alone and in batches; how often which was the answer."""
    stub, answers = LedgerServiceStub(stored.channel), Counter[str]()
    calls: dict[type[Any], Any] = {
        ledger.ReserveRequest: stub.Reserve,
        ledger.SpendRequest: stub.Spend,
        ledger.SettleRequest: stub.Settle,
    }

    async def alone(request: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await calls[type(request)](request, timeout=60)
        answers[told(caught.value).reason] += 1

    async def together() -> None:
        requests = itertools.islice(itertools.cycle(refused_operations(budget, consumed)), AT_ONCE)
        operations = [ledger.Operation(**{_kind(each): each}) for each in requests]
        response = await stub.Batch(ledger.BatchRequest(operations=operations), timeout=60)
        for result in response.results:
            assert result.HasField("refused")
            name = types_pb2.RefusalReason.Name(result.refused.reason)
            answers[f"batched {name.removeprefix('REFUSAL_REASON_')}"] += 1

    for _ in range(ROUNDS // 10):
        asked = [each for _ in range(10) for each in refused_operations(budget, consumed)]
        await asyncio.gather(*map(alone, asked), *(together() for _ in range(10)))
    return answers


def _kind(request: Any) -> str:
    return type(request).__name__.removesuffix("Request").lower()


async def test_a_storm_of_refusals_writes_nothing_but_its_counts(
    stored: Stored, quiet_database: str
) -> None:
    budget = await granted(stored)
    consumed = await spent(stored, budget)
    watch = Watch(quiet_database)
    try:
        rows, transactions = watch.rows(), watch.transactions()
        answers = await storm(stored, budget, consumed)
        for reason, each in EXPECTED.items():
            assert answers[reason] == each * ROUNDS
            assert answers[f"batched {reason}"] > 0
        assert answers.total() == ROUNDS * (sum(EXPECTED.values()) + AT_ONCE)
        assert watch.transactions() == transactions
        assert watch.rows() == rows
        assert watch.counts() == 0
        # What is written is how many there were, in one transaction, in a few rows.
        counts = stored.refusals
        assert isinstance(counts, RefusalCounts)
        await counts.add_up()
        assert watch.transactions() == transactions + 1
        assert 0 < watch.counts() <= 2 * KEYS_MAX
        assert watch.rows() == rows
    finally:
        watch.close()
