"""Transactions over several lanes: whole or not at all, beside the writers of single lanes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psycopg
import pytest

from peculium_server.core.batch import Request, decide_atomic
from peculium_server.core.footprint import Footprint
from peculium_server.core.operations import AtomicBatch, Grant, Spend
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refused
from peculium_server.core.state import Accepted
from peculium_server.store import connect, lane
from peculium_server.store.lane import LanesWriter, LoadedLanes
from peculium_server.store.store import Store
from peculium_server.store.wire import Connection, Flown, Step
from tests.core.ledger import AGENT
from tests.store.spender import Spender, spent


class Batcher:
    """Spends from several roots at once, all or none."""

    def __init__(self, store: Store, spender: Spender) -> None:
        self.store = store
        self.spender = spender

    def ask(self, *roots: Grant, amount: int = 1) -> list[Spend]:
        batch = AtomicBatch(self.spender.ids.id(), len(roots))
        return [
            Spend(
                operation_id=asked.operation_id,
                root_id=asked.root_id,
                budget_id=asked.budget_id,
                authority=asked.authority,
                amount=amount,
                batch=batch,
            )
            for asked in (self.spender.ask(root) for root in roots)
        ]

    async def do(self, writer: LanesWriter, operations: Sequence[Spend]) -> list[Outcome | Refused]:
        footprints: dict[int, dict[bytes, Footprint]] = {}
        for operation in operations:
            here = footprints.setdefault(self.store.lane_of(operation.root_id), {})
            here.setdefault(operation.root_id, Footprint()).add(operation)
        answers: list[Outcome | Refused] = []
        requests = [Request(operation, AGENT, index) for index, operation in enumerate(operations)]

        def decide(loaded: LoadedLanes) -> Sequence[Accepted]:
            answers[:], accepted = decide_atomic(
                loaded.trees,
                requests,
                self.spender.ids.now,
                self.store.lane_of,
                dict(loaded.positions),
            )
            return accepted

        await writer.run(footprints, decide, None)
        return answers


@pytest.fixture
def batcher(store: Store, spender: Spender) -> Batcher:
    return Batcher(store, spender)


async def totals(store: Store, roots: Sequence[Grant]) -> list[int]:
    return [await spent(store, root) for root in roots]


async def test_what_concerns_several_lanes_is_saved_in_each_of_them(
    store: Store, spender: Spender, batcher: Batcher
) -> None:
    roots = [await spender.grant(store, lane=number) for number in (5, 2, 9)]
    answers = await batcher.do(store.lanes_writer(), batcher.ask(*roots, roots[0]))
    assert [isinstance(answer, Outcome) for answer in answers] == [True] * 4
    assert await totals(store, roots) == [2, 1, 1]
    assert [(await store.standing(number)).position for number in (2, 5, 9)] == [2, 3, 2]


async def test_a_refusal_in_one_lane_saves_nothing_in_any(
    store: Store, spender: Spender, batcher: Batcher
) -> None:
    rich, poor = await spender.grant(store, lane=1), await spender.grant(store, 2, lane=0)
    answers = await batcher.do(store.lanes_writer(), batcher.ask(rich, poor, amount=3))
    assert [isinstance(answer, Refused) for answer in answers] == [True, True]
    assert await totals(store, [rich, poor]) == [0, 0]
    assert [(await store.standing(number)).position for number in (0, 1)] == [1, 1]


@pytest.mark.parametrize("turns", [True, False], ids=["in turn", "without the lock"])
async def test_writers_of_one_lane_and_of_several_lose_and_double_nothing(
    store: Store,
    other_store: Store,
    spender: Spender,
    batcher: Batcher,
    monkeypatch: pytest.MonkeyPatch,
    turns: bool,
) -> None:
    monkeypatch.setitem(connect._WRITER_SETTINGS, "lock_timeout", "20s")
    if not turns:
        monkeypatch.setattr(lane, "is_postgres", lambda _: False)
    roots = [await spender.grant(store, lane=number) for number in range(3)]
    writers = (store.lanes_writer(), other_store.lanes_writer())

    async def cross(each: int) -> None:
        # Asked for in changing order: the lanes are taken in theirs.
        asked = batcher.ask(roots[each % 3], roots[(each + 1) % 3])
        answers = await batcher.do(writers[each % 2], asked)
        assert [isinstance(answer, Outcome) for answer in answers] == [True, True]

    await asyncio.gather(
        *(cross(each) for each in range(30)),
        *(spender.spend(store.writer(each % 3), roots[each % 3]) for each in range(30)),
        *(spender.spend(other_store.writer(each % 3), roots[each % 3]) for each in range(30)),
    )
    assert await totals(store, roots) == [40, 40, 40]


@pytest.mark.parametrize("fault", ["request lost", "answer lost"])
async def test_a_commit_over_several_lanes_that_is_in_doubt_is_found_out(
    store: Store,
    spender: Spender,
    batcher: Batcher,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    roots = [await spender.grant(store, lane=number) for number in range(2)]
    fly = Connection.fly
    made: list[str] = []

    async def break_once(self: Connection, *segments: Sequence[Step]) -> list[Flown]:
        if made or segments[0][-1].statement.name != b"commit":
            return await fly(self, *segments)
        made.append(fault)
        if fault == "answer lost":
            await fly(self, *segments)
        self.pgconn.finish()
        raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(Connection, "fly", break_once)
    answers = await batcher.do(store.lanes_writer(), batcher.ask(*roots))
    outcomes = [answer for answer in answers if isinstance(answer, Outcome)]
    assert [outcome.replayed for outcome in outcomes] == [fault == "answer lost"] * 2
    assert made == [fault]
    assert await totals(store, roots) == [1, 1]
