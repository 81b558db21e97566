"""A writer that is alone on its lane guesses what it remembers, and is never wrong for long."""

from __future__ import annotations

from collections.abc import Sequence

import psycopg
import pytest

from peculium_server.core.operations import ByToken
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, id_text
from peculium_server.store.known import Known
from peculium_server.store.lane import Loaded
from peculium_server.store.store import Store
from peculium_server.store.wire import Connection, Flown, Step
from tests.core.ledger import HoldRef, Node
from tests.store.spender import Spender, spent
from tests.store.stored import StoredLedger


@pytest.fixture
def guessing(store: Store, monkeypatch: pytest.MonkeyPatch) -> StoredLedger:
    """A ledger whose writers take themselves for alone after one transaction."""
    monkeypatch.setattr(Known, "ALONE_AFTER", 1)
    return StoredLedger(store)


@pytest.fixture
async def root(guessing: StoredLedger) -> Node:
    made = await guessing.root()
    for _ in range(2):
        await guessing.accept(made.spend())
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all statements that are sent."""
    names: list[str] = []
    fly = Connection.fly

    async def listen(self: Connection, *segments: Sequence[Step]) -> list[Flown]:
        names.extend(
            step.statement.name.decode().rstrip("_0123456789")
            for segment in segments
            for step in segment
        )
        return await fly(self, *segments)

    monkeypatch.setattr(Connection, "fly", listen)
    return names


SAVED = ["save_position", "save_budgets", "add_entries", "commit"]


async def test_what_a_writer_remembers_is_not_asked_for(
    guessing: StoredLedger, root: Node, asked: list[str]
) -> None:
    reserve = root.reserve()
    await guessing.accept(reserve)
    assert asked == [
        *("begin", "load_tokens", "load_position"),
        *("save_position", "save_budgets", "add_holds", "add_entries", "commit"),
    ]
    asked.clear()
    await guessing.accept(HoldRef(root, reserve.hold_id).settle(3))
    assert asked == [
        *("begin", "load_position"),
        *("save_position", "save_budgets", "save_holds", "add_entries", "commit"),
    ]


async def test_a_writer_that_has_just_begun_takes_turns_and_loads(
    store: Store, spender: Spender, asked: list[str]
) -> None:
    granted = await spender.grant(store)
    writer = store.writer(store.lane_of(granted.root_id))
    for _ in range(Known.ALONE_AFTER):
        asked.clear()
        await spender.spend(writer, granted)
        assert asked[0] == "lock"
        assert "load_budgets" in asked
    asked.clear()
    await spender.spend(writer, granted)
    assert asked == ["begin", "load_position", *SAVED]


async def test_what_another_has_written_meanwhile_is_loaded_before_anything_is_decided(
    store: Store, other_store: Store, spender: Spender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Known, "ALONE_AFTER", 1)
    granted = await spender.grant(store, 10)
    lane = store.lane_of(granted.root_id)
    for _ in range(2):
        await spender.spend(store.writer(lane), granted)
    await spender.spend(other_store.writer(lane), granted, 8)
    available: list[int] = []

    def watch(loaded: Loaded) -> None:
        available.append(loaded.trees[granted.root_id].budget(granted.root_id).money.available)

    answer = await spender.do(store.writer(lane), spender.ask(granted), watch=watch)
    assert not isinstance(answer, Outcome)
    assert answer.reason is Refusal.BUDGET_EXHAUSTED
    assert available == [0]
    assert await spent(store, granted) == 10


async def test_whoever_was_disturbed_takes_turns_again(
    store: Store, other_store: Store, spender: Spender, asked: list[str]
) -> None:
    granted = await spender.grant(store)
    lane = store.lane_of(granted.root_id)
    for _ in range(Known.ALONE_AFTER + 1):
        await spender.spend(store.writer(lane), granted)
    await spender.spend(other_store.writer(lane), granted)
    asked.clear()
    await spender.spend(store.writer(lane), granted)
    assert asked == [
        "begin",
        "load_position",
        "load_budgets",
        "load_recorded",
        "load_position",
        *SAVED,
    ]
    asked.clear()
    await spender.spend(store.writer(lane), granted)
    assert asked[0] == "lock"


async def test_an_operation_that_was_accepted_before_is_found_and_not_done_twice(
    guessing: StoredLedger, root: Node
) -> None:
    spend = root.spend(7)
    [first] = await guessing.accept(spend)
    await guessing.accept(root.spend(1))
    [again] = await guessing.accept(spend)
    assert again == first._replace(replayed=True)
    assert root.money.spent == 10 + 10 + 7 + 1


async def test_a_replay_does_not_keep_the_rest_of_its_batch_from_being_done(
    guessing: StoredLedger, root: Node
) -> None:
    child = await guessing.below(root)
    spend = root.spend(7)
    await guessing.accept(spend)
    again, other = await guessing.accept(spend, child.spend(5))
    assert again.replayed
    assert not other.replayed
    assert child.money.spent == 5


async def test_a_consumed_token_is_told_with_who_consumed_it(
    guessing: StoredLedger, root: Node
) -> None:
    stale, winner = root.spend(), root.spend()
    await guessing.accept(winner)
    refused = await guessing.refused(stale)
    assert refused.reason is Refusal.TOKEN_CONSUMED
    assert refused.facts["consumed_by"] == id_text(winner.operation_id)


async def test_refusals_one_after_the_other_are_not_decided_twice_each(
    store: Store, spender: Spender
) -> None:
    granted = await spender.grant(store, 100)
    writer = store.writer(store.lane_of(granted.root_id))
    for _ in range(Known.ALONE_AFTER + 1):
        await spender.spend(writer, granted)
    decided = spender.decisions
    await spender.do(writer, spender.ask(granted, 1_000))
    assert spender.decisions == decided + 2
    for count in range(1, Known.ALONE_AFTER):
        await spender.do(writer, spender.ask(granted, 1_000))
        assert spender.decisions == decided + 2 + count


async def test_a_token_that_was_used_before_cannot_be_produced_again(
    guessing: StoredLedger, root: Node
) -> None:
    spend = root.spend()
    assert isinstance(spend.authority, ByToken)
    await guessing.accept(spend)
    again = root.spend(next_token_id=spend.authority.token_id)
    assert (await guessing.refused(again)).reason is Refusal.TOKEN_ID_REUSED


async def test_a_hold_that_exists_and_is_not_remembered_is_not_made_again(
    guessing: StoredLedger, root: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Known, "HOLDS_MAX", 0)
    reserve = root.reserve()
    await guessing.accept(reserve)
    again = root.reserve(hold_id=reserve.hold_id)
    assert (await guessing.refused(again)).reason is Refusal.ID_TAKEN


async def test_rows_that_had_to_make_room_are_loaded_again(
    guessing: StoredLedger, store: Store, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Known, "ANCESTORS_MAX", 3)
    monkeypatch.setattr(Known, "BUDGETS_MAX", 2)
    monkeypatch.setattr(Known, "HOLDS_MAX", 1)
    top = await guessing.root()
    children = [await guessing.below(top) for _ in range(4)]
    reserves = [child.reserve(amount) for amount, child in enumerate(children, start=1)]
    for reserve in reserves:
        await guessing.accept(reserve)
    [known] = store.writer(store.lane_of(top.root_id))._writer._known.values()
    for child, reserve in zip(children, reserves, strict=True):
        forgotten = (top.root_id, reserve.hold_id) not in known.holds
        asked.clear()
        await guessing.accept(HoldRef(child, reserve.hold_id).settle())
        assert ("load_holds" in asked[: asked.index("load_position")]) is forgotten
        assert "load_recorded" not in asked
        assert len(known.budgets) == 2
        assert len(known.holds) <= 1
        assert len(known._ancestors) == 3
    assert [child.money.spent for child in children] == [1, 2, 3, 4]
    assert await guessing.verified(top.root_id) is None


def end_sessions(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


async def test_a_new_connection_remembers_nothing(
    guessing: StoredLedger, root: Node, database: str, asked: list[str]
) -> None:
    end_sessions(database)
    await guessing.accept(root.spend())
    assert "load_budgets" in asked


async def test_of_what_was_lost_with_a_connection_nothing_is_remembered_in_other_lanes_either(
    store: Store, database: str, asked: list[str]
) -> None:
    writer = store.lanes_writer()

    async def first_asked(number: int) -> str:
        asked.clear()
        await writer.run({number: {}}, lambda _: (), None)
        return asked[0]

    for _ in range(Known.ALONE_AFTER + 1):
        for number in (3, 5):
            await first_asked(number)
    assert [await first_asked(number) for number in (3, 5)] == ["begin", "begin"]
    end_sessions(database)
    await first_asked(3)
    assert await first_asked(5) == "lock"
