"""The sealer: everything that was recorded is sealed, once, whoever writes and seals meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import psycopg
import pytest

from peculium_server import sealer as sealer_module
from peculium_server.core.state import GENESIS
from peculium_server.sealer import Round
from peculium_server.signing import SigningKey
from peculium_server.store import reading, seals as seals_module
from peculium_server.store.errors import StoreError
from peculium_server.store.store import Store
from peculium_server.store.wire import Connection, Flown, Step
from tests.sealer.sealing import Sealing, found, new_key
from tests.sweeper.fleet import Fleet


async def execute(database: str, statement: str, *parameters: object) -> None:
    """Do what somebody does who may do everything in the database."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute(statement.encode(), parameters)


async def sealed_up_to(store: Store) -> tuple[int, ...]:
    return (await store.seals.unsealed()).sealed


# -- What is sealed -----------------------------------------------------------------------------------


async def test_nothing_recorded_is_nothing_to_seal(sealing: Sealing) -> None:
    assert await sealing.sealer.round() is Round.NOTHING
    assert await sealing.checkpoints() == []
    assert await found(sealing.store) == []


async def test_a_checkpoint_seals_the_heads_that_moved(fleet: Fleet, sealing: Sealing) -> None:
    first, second = await fleet.root(), await fleet.root()
    [child] = await fleet.children(first, first, 1)
    assert await sealing.sealer.round() is Round.SEALED
    await fleet.ask(fleet.spend(second), fleet.spend(second))
    assert await sealing.sealer.round() is Round.SEALED
    before, after = await sealing.checkpoints()
    assert (before.checkpoint.number, before.checkpoint.previous_hash) == (1, GENESIS)
    assert (after.checkpoint.number, after.checkpoint.previous_hash) == (2, before.hash)
    assert before.checkpoint.sealed_at < after.checkpoint.sealed_at
    assert after.checkpoint.positions == await fleet.store.positions()
    heads, moved = await sealing.leaves()
    assert {leaf.budget_id: leaf.seq for leaf in heads} == {first: 2, second: 1, child: 1}
    [leaf] = moved
    assert (leaf.budget_id, leaf.seq) == (second, 3)
    assert leaf.head == (await fleet.budget(second)).head
    assert await found(sealing.store) == []


async def test_what_is_sealed_is_not_sealed_again(fleet: Fleet, sealing: Sealing) -> None:
    await fleet.root()
    assert await sealing.seal_all() == 1
    assert await sealing.sealer.round() is Round.NOTHING
    assert len(await sealing.checkpoints()) == 1


async def test_a_checkpoint_of_a_moment_ago_is_enough(
    fleet: Fleet, database: str, key: SigningKey
) -> None:
    async with Sealing.opened(database, key, seconds=3_600) as sealing:
        root = await fleet.root()
        assert await sealing.sealer.round() is Round.SEALED
        await fleet.ask(fleet.spend(root))
        assert await sealing.sealer.round() is Round.NOTHING
        await execute(database, "UPDATE checkpoints SET sealed_at = sealed_at - interval '31 min'")
        assert await sealing.sealer.round() is Round.SEALED


async def test_a_backlog_is_sealed_in_steps_and_no_lane_waits_for_a_busier_one(
    fleet: Fleet, sealing: Sealing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealer_module, "OPERATIONS_MAX", 20)
    busy, quiet = await fleet.root(lane=3), await fleet.root(lane=5)
    for _ in range(10):
        await fleet.ask(*[fleet.spend(busy) for _ in range(10)])
    await fleet.ask(fleet.spend(quiet))
    assert await sealing.sealer.round() is Round.MORE
    positions = await sealed_up_to(fleet.store)
    assert (positions[3], positions[5]) == (18, 2)
    assert await sealing.seal_all() == 5
    assert await sealed_up_to(fleet.store) == await fleet.store.positions()
    assert await found(sealing.store) == []


async def test_an_operation_with_more_parts_than_may_be_looked_at_is_sealed_whole(
    fleet: Fleet, sealing: Sealing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealer_module, "OPERATIONS_MAX", 2)
    monkeypatch.setattr(sealer_module, "ENTRIES_EXTRA", 0)
    root = await fleet.root()
    await fleet.children(root, root, 30)
    await fleet.ask(fleet.spend(root))
    assert await sealing.seal_all() == 2
    assert [len(leaves) for leaves in await sealing.leaves()] == [31, 1]
    assert await found(sealing.store) == []


# -- Several servers, and writers ---------------------------------------------------------------------


async def test_of_two_that_seal_the_same_exactly_one_succeeds(
    fleet: Fleet, sealing: Sealing, other_sealing: Sealing
) -> None:
    root = await fleet.root()
    for _ in range(10):
        await fleet.ask(fleet.spend(root))
        outcomes = await asyncio.gather(sealing.sealer.round(), other_sealing.sealer.round())
        assert Round.SEALED in outcomes
    checkpoints = await sealing.checkpoints()
    assert [each.checkpoint.number for each in checkpoints] == list(range(1, len(checkpoints) + 1))
    # Of the same operations there is one checkpoint.
    positions = [each.checkpoint.positions for each in checkpoints]
    assert len(set(positions)) == len(positions)
    assert await found(sealing.store) == []


async def test_whoever_comes_second_with_the_same_number_leaves_nothing(
    fleet: Fleet, sealing: Sealing, other_sealing: Sealing, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.root()
    add = type(sealing.store.seals).add

    async def add_after_another(*args: object, **kwargs: object) -> object:
        monkeypatch.undo()
        assert await other_sealing.sealer.round() is Round.SEALED
        return await add(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(sealing.store.seals), "add", add_after_another)
    assert await sealing.sealer.round() is Round.OVERTAKEN
    [checkpoint] = await sealing.checkpoints()
    assert [len(leaves) for leaves in await sealing.leaves()] == [checkpoint.checkpoint.leaves]


async def test_two_that_have_seen_the_same_last_checkpoint_do_not_both_commit(
    fleet: Fleet, sealing: Sealing, other_sealing: Sealing, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await fleet.root()
    await sealing.seal_all()
    await fleet.ask(fleet.spend(root))
    both_have_looked = asyncio.Barrier(2)
    fly = reading.fetch_together

    async def fly_together(connection: Connection, *steps: Step) -> list[list[object]]:
        results = await fly(connection, *steps)
        if steps[0].statement.name == b"begin":
            await both_have_looked.wait()
        return results

    monkeypatch.setattr(seals_module, "fetch_together", fly_together)
    outcomes = await asyncio.gather(sealing.sealer.round(), other_sealing.sealer.round())
    assert sorted(outcome.name for outcome in outcomes) == ["OVERTAKEN", "SEALED"]
    assert len(await sealing.checkpoints()) == 2
    assert await found(sealing.store) == []


async def test_everything_is_sealed_while_writers_run_and_servers_seal(
    fleet: Fleet,
    sealing: Sealing,
    other_sealing: Sealing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sealer_module, "OPERATIONS_MAX", 25)
    roots = [await fleet.root(lane=lane) for lane in (1, 1, 2, 9)]
    writing = True

    async def write(root: bytes) -> None:
        for _ in range(15):
            await fleet.ask(*[fleet.spend(root) for _ in range(5)])
            await fleet.children(root, root, 3)

    async def seal(each: Sealing) -> None:
        while writing:
            await each.sealer.round()

    async with asyncio.TaskGroup() as sealers:
        sealers.create_task(seal(sealing))
        sealers.create_task(seal(other_sealing))
        await asyncio.gather(*(write(root) for root in roots))
        writing = False
    await sealing.seal_all()
    assert await sealed_up_to(fleet.store) == await fleet.store.positions()
    assert await found(sealing.store) == []
    checkpoints = await sealing.checkpoints()
    assert sum(len(leaves) for leaves in await sealing.leaves()) == sum(
        each.checkpoint.leaves for each in checkpoints
    )


async def test_a_server_that_dies_in_between_leaves_nothing_and_the_next_one_seals(
    fleet: Fleet, sealing: Sealing, other_sealing: Sealing, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.root()
    fly = Connection.fly

    async def die_before_the_commit(self: Connection, *segments: Sequence[Step]) -> list[Flown]:
        if segments[0] and segments[0][0].statement.name == b"add_leaves":
            await fly(self, *segments)
            self.pgconn.finish()
            raise psycopg.OperationalError("gone")
        return await fly(self, *segments)

    monkeypatch.setattr(Connection, "fly", die_before_the_commit)
    with pytest.raises(StoreError):
        await sealing.sealer.round()
    monkeypatch.undo()
    assert await sealing.checkpoints() == []
    assert await other_sealing.sealer.round() is Round.SEALED
    assert await found(sealing.store) == []


async def test_keys_change_and_what_was_signed_before_stays_good(
    fleet: Fleet, sealing: Sealing, database: str, tmp_path: Path
) -> None:
    root = await fleet.root()
    await sealing.seal_all()
    await fleet.ask(fleet.spend(root))
    newer = new_key(tmp_path, "newer.pem")
    async with Sealing.opened(database, newer) as other:
        await other.seal_all()
    await fleet.ask(fleet.spend(root))
    await sealing.seal_all()
    ids = [each.key_id for each in await sealing.checkpoints()]
    assert ids == [sealing.key.key_id, newer.key_id, sealing.key.key_id]
    kept = await sealing.store.seals.page(limit=9, after=None, descending=False)
    assert [each.public_key for each in kept] == [
        sealing.key.public_key,
        newer.public_key,
        sealing.key.public_key,
    ]
    assert await found(sealing.store) == []


# -- What it says of itself ---------------------------------------------------------------------------


async def test_the_lag_is_that_of_the_earliest_operation_that_is_not_sealed(
    fleet: Fleet, sealing: Sealing, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await fleet.root()
    await sealing.seal_all()
    assert (
        sealing.gauge("peculium.checkpoint.lag"),
        sealing.gauge("peculium.checkpoint.unsealed"),
    ) == (0, 0)
    await fleet.ask(fleet.spend(root), fleet.spend(root))
    await execute(database, "UPDATE entries SET at = at - interval '1 hour' WHERE seq = 2")

    async def nothing(*_: object) -> Round:
        return Round.NOTHING

    monkeypatch.setattr(sealing.sealer, "_seal", nothing)
    await sealing.sealer.round()
    assert sealing.gauge("peculium.checkpoint.unsealed") == 2
    lag = sealing.gauge("peculium.checkpoint.lag")
    assert 3_600 <= lag < 3_700
    assert sealing.gauge("peculium.checkpoint.lag") > lag


async def test_who_is_far_behind_says_so_once_and_that_it_has_caught_up(
    fleet: Fleet,
    sealing: Sealing,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await fleet.root()
    await execute(database, "UPDATE entries SET at = at - interval '1 hour'")
    with caplog.at_level(logging.WARNING, sealer_module.__name__):
        await sealing.seal_all()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "sealing is behind",
        "sealing has caught up",
    ]


@pytest.mark.parametrize(
    "tampering",
    [
        "DELETE FROM entries WHERE seq = 2",
        "DELETE FROM entries WHERE seq = 4",
        "UPDATE entries SET position = 2 WHERE seq = 3",
        "UPDATE lanes SET position = position + 1 WHERE position > 1",
    ],
)
async def test_a_lane_that_lacks_what_it_has_counted_is_not_sealed_and_others_are(
    fleet: Fleet,
    sealing: Sealing,
    database: str,
    tampering: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken, whole = await fleet.root(lane=4), await fleet.root(lane=7)
    await fleet.ask(*[fleet.spend(broken) for _ in range(3)])
    await execute(database, tampering)
    assert await sealing.seal_all() == 1
    positions = await sealed_up_to(fleet.store)
    assert (positions[4], positions[7]) == (0, 1)
    await fleet.ask(fleet.spend(whole))
    assert await sealing.seal_all() == 1
    [told] = [record.message for record in caplog.records if "not sealed" in record.message]
    assert told.startswith("lane 4 is not sealed any further")
    assert sealing.gauge("peculium.checkpoint.unsealed") >= 4


async def test_it_goes_on_when_the_database_does(
    fleet: Fleet, sealing: Sealing, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.root()
    unsealed = type(sealing.store.seals).unsealed
    failures = iter([StoreError("no answer"), RuntimeError("a bug")])

    async def fail_at_first(self: object) -> object:
        for failure in failures:
            raise failure
        return await unsealed(self)  # type: ignore[arg-type]

    monkeypatch.setattr(type(sealing.store.seals), "unsealed", fail_at_first)
    monkeypatch.setattr(sealer_module, "UNAVAILABLE_SECONDS", 0.0)
    running = asyncio.create_task(sealing.sealer.run())
    async with asyncio.timeout(30):
        while not await sealing.checkpoints():  # noqa: ASYNC110 - it tells no event
            await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.wait([running])
