"""A writer that is alone on its lane guesses what it remembers, and is never wrong for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import psycopg
import pytest

from peculium_server.core.footprint import Footprint
from peculium_server.core.operations import ByToken, Grant, Operation
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused, id_text
from peculium_server.store.guess import Guess, GuessedClock
from peculium_server.store.known import Known
from peculium_server.store.lane import Loaded
from peculium_server.store.statements import of_lane
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
    launch = Connection.launch

    def listen(self: Connection, *segments: Sequence[Step]) -> Coroutine[Any, Any, list[Flown]]:
        names.extend(
            step.statement.name.decode().rstrip("_0123456789")
            for segment in segments
            for step in segment
        )
        return launch(self, *segments)

    monkeypatch.setattr(Connection, "launch", listen)
    return names


GUESSED = ["begin", "advance_position", "save_budget", "add_entry", "commit"]
SAVED = ["save_position", "save_budget", "add_entry", "commit"]


async def test_what_a_writer_remembers_is_not_asked_for(
    guessing: StoredLedger, root: Node, asked: list[str]
) -> None:
    reserve = root.reserve()
    await guessing.accept(reserve)
    assert asked == [
        *("begin", "advance_position", "refuse_seen"),
        *("save_budget", "add_hold", "add_entry", "commit"),
    ]
    asked.clear()
    await guessing.accept(HoldRef(root, reserve.hold_id).settle(3))
    assert asked == [
        *("begin", "advance_position"),
        *("save_budget", "save_hold", "add_entry", "commit"),
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
    assert asked == GUESSED


async def test_what_another_has_written_meanwhile_is_loaded_and_decided_upon(
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
    assert available == [8, 0]
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
        *GUESSED,
        *("rollback", "lock", "begin", "load_budgets", "load_recorded", "load_position"),
        *SAVED,
        "unlock",
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
        held, owner = (top.root_id, reserve.hold_id), (top.root_id, reserve.budget_id)
        remembered = held in known.holds and owner in known.budgets
        asked.clear()
        await guessing.accept(HoldRef(child, reserve.hold_id).settle())
        assert ("load_holds" in asked) is not remembered
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


# -- What cannot be guessed ---------------------------------------------------------------------------


def footprint_of(operation: Operation) -> dict[bytes, Footprint]:
    footprint = Footprint()
    footprint.add(operation)
    return {operation.root_id: footprint}


async def test_nothing_is_guessed_of_a_budget_with_an_ancestor_or_hold_that_is_not_remembered(
    guessing: StoredLedger, store: Store, root: Node
) -> None:
    child = await guessing.below(root)
    reserve = child.reserve()
    await guessing.accept(reserve)
    settle = footprint_of(HoldRef(child, reserve.hold_id).settle())
    known = store.writer(store.lane_of(root.root_id))._writer._known[store.lane_of(root.root_id)]
    assert Guess.of(settle, known) is not None
    hold = known.holds.pop((root.root_id, reserve.hold_id))
    assert Guess.of(settle, known) is None
    known.holds[root.root_id, reserve.hold_id] = hold
    for budget_id in (root.id, child.id):
        budget = known.budgets.pop((root.root_id, budget_id))
        assert Guess.of(settle, known) is None
        known.budgets[root.root_id, budget_id] = budget
    assert Guess.of(settle, known) is not None


async def test_nothing_is_guessed_of_names_of_what_lies_below_nor_of_lists_of_holds(
    guessing: StoredLedger, store: Store, root: Node
) -> None:
    child = await guessing.below(root)
    await guessing.accept(child.spend())
    known = store.writer(store.lane_of(root.root_id))._writer._known[store.lane_of(root.root_id)]
    assert Guess.of(footprint_of(child.spend()), known) is not None
    for operation in (
        child.delegate(child.spec(1)),
        child.return_all(),
        root.revoke(child),
        child.recover(),
    ):
        assert Guess.of(footprint_of(operation), known) is None, operation.kind


# -- One behind the other -----------------------------------------------------------------------------


async def both(
    store: Store, spender: Spender, root: Grant, second: Callable[[Loaded], None]
) -> list[Outcome]:
    """Spend twice, the second time as soon as the first has sent its commit; `second` watches that."""
    writer = store.writer(store.lane_of(root.root_id))
    operations = [spender.ask(root, 3), spender.ask(root, 4)]
    first_has_sent = asyncio.Event()

    async def spend_second() -> Outcome | Refused:
        await first_has_sent.wait()
        return await spender.do(writer, operations[1], watch=second)

    spending = asyncio.create_task(spend_second())
    await asyncio.sleep(0)
    answers = [
        await spender.do(writer, operations[0], sent=first_has_sent.set),
        await spending,
    ]
    return [answer for answer in answers if isinstance(answer, Outcome)]


@pytest.fixture
async def granted(store: Store, spender: Spender, monkeypatch: pytest.MonkeyPatch) -> Grant:
    """A root whose writer guesses."""
    monkeypatch.setattr(Known, "ALONE_AFTER", 1)
    made = await spender.grant(store, 100)
    for _ in range(2):
        await spender.spend(store.writer(store.lane_of(made.root_id)), made)
    return made


async def test_a_batch_is_decided_on_what_those_before_have_sent_and_not_committed_yet(
    store: Store, spender: Spender, granted: Grant
) -> None:
    seen: list[int] = []

    def look(loaded: Loaded) -> None:
        seen.append(loaded.trees[granted.root_id].budget(granted.root_id).money.spent)

    first, second = await both(store, spender, granted, look)
    assert seen == [2 + 3]
    assert (first.money.spent, second.money.spent) == (5, 9)
    assert await spent(store, granted) == 9


async def test_a_flight_that_follows_one_in_the_air_names_it_and_one_that_follows_none_does_not(
    store: Store, spender: Spender, granted: Grant, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[tuple[str, str]] = []
    launch = Connection.launch

    def listen(self: Connection, *segments: Sequence[Step]) -> Coroutine[Any, Any, list[Flown]]:
        names.extend(
            (step.values["previous"], step.values["own"])
            for segment in segments
            for step in segment
            if step.statement.name.startswith(b"advance_position")
        )
        return launch(self, *segments)

    monkeypatch.setattr(Connection, "launch", listen)
    await both(store, spender, granted, lambda _: None)
    await both(store, spender, granted, lambda _: None)
    [(before_first, first), (before_second, _), (before_third, third), (before_fourth, _)] = names
    assert (before_first, before_second) == ("", first)
    assert (before_third, before_fourth) == ("", third)


async def test_who_has_to_ask_waits_for_what_is_in_the_air_and_lets_it_be(
    store: Store, spender: Spender, granted: Grant, asked: list[str]
) -> None:
    lane = store.lane_of(granted.root_id)
    writer, first_has_sent = store.writer(lane), asyncio.Event()

    async def grant_behind() -> Grant:
        await first_has_sent.wait()
        return await spender.grant(store, lane=lane)

    granting = asyncio.create_task(grant_behind())
    await asyncio.sleep(0)
    asked.clear()
    answer = await spender.do(writer, spender.ask(granted, 3), sent=first_has_sent.set)
    await granting
    assert isinstance(answer, Outcome)
    assert asked[:5] == GUESSED
    assert asked.count("commit") == 2
    assert "rollback" not in asked


async def test_if_a_guess_fails_what_was_decided_on_it_is_decided_again(
    store: Store, other_store: Store, spender: Spender, granted: Grant
) -> None:
    """Also where another server has moved the lane exactly to where the second expects it."""
    lane = store.lane_of(granted.root_id)
    await spender.spend(other_store.writer(lane), granted, 50)
    seen: list[int] = []

    def look(loaded: Loaded) -> None:
        seen.append(loaded.trees[granted.root_id].budget(granted.root_id).money.spent)

    answers = await both(store, spender, granted, look)
    assert seen[0] == 2 + 3
    assert seen[-1] in (52, 55)
    assert sorted(answer.money.spent for answer in answers) in ([55, 59], [56, 59])
    assert await spent(store, granted) == 59


async def advance(database: str, **values: Any) -> psycopg.Error | int:
    """Move lane 3 from position 0 to 1 by a guess, in a session of its own; the clock, or what it failed with."""
    async with await Connection.connect(database, autocommit=True) as connection:
        return await advance_in(connection, **values)


async def advance_in(connection: Connection, **values: Any) -> psycopg.Error | int:
    now = time.time_ns() // 1_000
    default = {"before": 0, "after": 1, "previous": "", "own": "1"}
    times = {"at": now - 1_000_000, "latest": now + 1_000_000}
    step = Step(of_lane(3).advance_position, default | times | values)
    (flown,) = await connection.fly([step])
    if isinstance(flown, psycopg.Error):
        return flown
    clock: int = flown[0][0][0]
    return clock


@pytest.mark.parametrize(
    "wrong",
    [
        {"before": 1},
        {"at": time.time_ns() // 1_000 + 3_600_000_000, "latest": 2**60},
        {"latest": time.time_ns() // 1_000 - 3_600_000_000},
        {"previous": "7"},
    ],
    ids=["the position", "a time to come", "a time long past", "the flight before"],
)
async def test_the_database_refuses_a_guess_that_is_wrong_in(
    store: Store, database: str, wrong: dict[str, Any]
) -> None:
    assert isinstance(await advance(database, **wrong), psycopg.errors.DivisionByZero)
    assert isinstance(await advance(database), int)


async def test_a_flight_whose_commit_failed_is_none_that_another_may_follow(
    store: Store, database: str
) -> None:
    async with await Connection.connect(database, autocommit=True) as connection:
        await connection.execute("BEGIN")
        assert isinstance(await advance_in(connection, own="1"), int)
        await connection.execute("ROLLBACK")
        refused = await advance_in(connection, previous="1", own="2")
        assert isinstance(refused, psycopg.errors.DivisionByZero)
        assert isinstance(await advance_in(connection, own="1"), int)
        follows = {"before": 1, "after": 2, "previous": "1", "own": "2"}
        assert isinstance(await advance_in(connection, **follows), int)


# -- The clock ----------------------------------------------------------------------------------------


class Monotonic:
    """This machine's clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1_000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.seconds)


def test_the_clock_is_what_was_read_and_what_has_passed_and_never_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, clock = Monotonic(monkeypatch), GuessedClock()
    clock.read(5_000_000)
    here.seconds += 2
    now = clock.now()
    assert now is not None
    assert 6_990_000 < now < 7_000_000


def test_the_clock_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    here, clock = Monotonic(monkeypatch), GuessedClock()
    clock.read(5_000_000)
    here.seconds += 2
    before = clock.now()
    clock.read(6_000_000)
    assert clock.now() == before


def test_an_old_reading_is_of_no_use_nor_one_of_another_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, clock = Monotonic(monkeypatch), GuessedClock()
    assert clock.now() is None
    clock.read(5_000_000)
    here.seconds += GuessedClock.READING_SECONDS_MAX + 1
    assert clock.now() is None
    clock.read(6_000_000)
    assert clock.now() == 6_000_000
    clock.forget()
    assert clock.now() is None


async def test_every_flight_brings_a_reading_of_the_clock(
    guessing: StoredLedger, root: Node, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[int] = []
    monkeypatch.setattr(GuessedClock, "read", lambda _, now: readings.append(now))
    before = time.time_ns() // 1_000
    await guessing.accept(root.spend())
    assert "advance_position" in asked
    [reading] = readings
    assert before <= reading <= time.time_ns() // 1_000


async def test_what_is_guessed_at_a_time_to_come_is_decided_again_at_the_databases(
    guessing: StoredLedger, root: Node, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = time.time_ns() // 1_000 + 3_600_000_000
    monkeypatch.setattr(GuessedClock, "now", lambda _: ahead)
    [outcome] = await guessing.accept(root.spend())
    assert "load_position" in asked
    assert outcome.at < ahead
