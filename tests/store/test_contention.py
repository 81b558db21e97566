"""Several writers on one lane, with and without the lock that keeps them apart."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psycopg
import pytest

from peculium_server.core.outcome import Outcome
from peculium_server.store import connect, lane, statements
from peculium_server.store.errors import StoreContended, StoreUnavailable
from peculium_server.store.known import Known
from peculium_server.store.lane import LaneWriter, Loaded
from peculium_server.store.store import Store
from peculium_server.store.wire import Connection, Flown, Step
from tests.store.spender import Spender, spent


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writers wait for the lock for as long as a busy machine may take."""
    monkeypatch.setitem(connect._WRITER_SETTINGS, "lock_timeout", "20s")


async def test_writers_that_take_turns_are_never_aborted(
    store: Store, other_store: Store, spender: Spender, patience: None
) -> None:
    root = await spender.grant(store)
    number = store.lane_of(root.root_id)
    writers = (store.writer(number), other_store.writer(number))
    # Both are connected, so that neither is alone for long enough to do without the lock.
    for writer in writers:
        await spender.spend(writer, root)
    spender.decisions = 0
    await asyncio.gather(*(spender.spend(writers[each % 2], root) for each in range(60)))
    assert spender.decisions == 60
    assert await spent(store, root) == 62


async def test_without_the_lock_nothing_is_lost_or_doubled_only_repeated(
    store: Store, other_store: Store, spender: Spender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "is_postgres", lambda _: False)
    root = await spender.grant(store)
    number = store.lane_of(root.root_id)
    writers = (store.writer(number), other_store.writer(number))
    spender.decisions = 0
    await asyncio.gather(*(spender.spend(writers[each % 2], root) for each in range(60)))
    assert spender.decisions > 60
    assert await spent(store, root) == 60


async def test_writers_of_different_lanes_never_abort_each_other(
    store: Store, spender: Spender
) -> None:
    roots = [await spender.grant(store, lane=number) for number in range(4)]
    spender.decisions = 0
    await asyncio.gather(
        *(spender.spend(store.writer(each % 4), roots[each % 4]) for each in range(100))
    )
    assert spender.decisions == 100


async def test_two_servers_share_a_lane_fairly(
    store: Store, other_store: Store, spender: Spender, patience: None
) -> None:
    root = await spender.grant(store)
    number = store.lane_of(root.root_id)
    turns: list[int] = []

    async def work(which: int, writer: LaneWriter) -> None:
        while len(turns) < 200:
            await spender.spend(writer, root)
            turns.append(which)

    writers = store.writer(number), other_store.writer(number)
    for writer in writers:
        # Connected, before the other begins.
        await spender.spend(writer, root)
    await asyncio.gather(*(work(which, writer) for which, writer in enumerate(writers)))
    assert 70 <= sum(turns) <= len(turns) - 70


async def test_a_writer_that_is_alone_and_never_rests_lets_another_in(
    store: Store, other_store: Store, spender: Spender, patience: None
) -> None:
    root = await spender.grant(store)
    number = store.lane_of(root.root_id)
    busy, other = store.writer(number), other_store.writer(number)
    await spender.spend(other, root)
    done = 0
    alone, served = asyncio.Event(), asyncio.Event()

    async def never_rest() -> None:
        nonlocal done
        while not served.is_set():
            await spender.spend(busy, root)
            done += 1
            if done == 2 * Known.ALONE_AFTER:
                alone.set()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(never_rest())
        await alone.wait()
        before = done
        await spender.spend(other, root)
        served.set()
    assert done - before < 20


async def test_a_writer_goes_without_the_lock_when_another_keeps_it(
    store: Store, spender: Spender, database: str
) -> None:
    root = await spender.grant(store)
    number = store.lane_of(root.root_id)
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as hoarder:
        await hoarder.execute("SELECT pg_advisory_lock(%s)", [statements.LOCK_KEYS + number])
        await spender.spend(store.writer(number), root)
    assert await spent(store, root) == 1


async def test_a_row_that_another_transaction_keeps_is_not_waited_for_beyond_the_deadline(
    store: Store, spender: Spender, database: str
) -> None:
    root = await spender.grant(store)
    number = store.lane_of(root.root_id)
    clock = asyncio.get_running_loop().time
    async with await psycopg.AsyncConnection.connect(database) as hoarder:
        await hoarder.execute("SELECT FROM lanes WHERE lane = %s FOR UPDATE", [number])
        begun, spend = clock(), spender.ask(root)
        with pytest.raises(StoreUnavailable, match="in time") as raised:
            await spender.do(store.writer(number), spend, deadline=begun + 0.3)
        assert raised.value.outcome_unknown
        assert clock() - begun < 2
        await hoarder.rollback()
    # The commit travelled with what had to wait, and may be done by now: asking again tells.
    assert isinstance(await spender.do(store.writer(number), spend), Outcome)
    assert await spent(store, root) == 1


async def test_what_another_commits_in_between_is_seen_before_deciding_again(
    store: Store, spender: Spender, database: str
) -> None:
    root = await spender.grant(store, 10)
    number = store.lane_of(root.root_id)
    available: list[int] = []

    def interfere(loaded: Loaded) -> None:
        available.append(loaded.trees[root.root_id].budget(root.root_id).money.available)
        if len(available) == 1:
            with psycopg.connect(database) as other:
                other.execute("UPDATE lanes SET position = position + 1 WHERE lane = %s", [number])
                other.execute("UPDATE budgets SET available = 4, spent = 6, seq = seq + 1")

    await spender.do(store.writer(number), spender.ask(root, 3), watch=interfere)
    assert available == [10, 4]
    assert await spent(store, root) == 9


async def test_repetitions_are_bounded(
    store: Store, spender: Spender, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await spender.grant(store)
    fly = Connection.fly

    async def conflict(self: Connection, *segments: Sequence[Step]) -> list[Flown]:
        if any(step.statement.name == b"commit" for step in segments[0]):
            return [psycopg.errors.SerializationFailure("in the way"), []]
        return await fly(self, *segments)

    monkeypatch.setattr(Connection, "fly", conflict)
    monkeypatch.setattr(lane, "_backoff", lambda _: 0)
    spender.decisions = 0
    with pytest.raises(StoreContended) as raised:
        await spender.spend(store.writer(store.lane_of(root.root_id)), root)
    assert raised.value.attempts == spender.decisions == lane.ATTEMPTS_MAX
    monkeypatch.undo()
    assert await spent(store, root) == 0


def test_waits_grow_and_are_never_two_writers_the_same() -> None:
    assert {lane._backoff(attempt) <= lane._BACKOFF_SECONDS_MAX for attempt in range(20)} == {True}
    assert lane._backoff(1) < lane._backoff(6)
    assert len({lane._backoff(6) for _ in range(50)}) > 1
