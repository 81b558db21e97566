"""What becomes of signs of theft: the first is recorded at once, a storm is few rows, and none is lost."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import psycopg
import pytest

from peculium_server import security
from peculium_server.core.batch import Request
from peculium_server.core.operations import Actor, ByToken, Freeze, Kind, Role, Spend
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.reuse import GUARD, Reuse, ReuseKind
from peculium_server.core.state import Consumption
from peculium_server.lanes.answers import Answer, Unanswered, Unavailability
from peculium_server.lanes.lane import DeadlinePassed
from peculium_server.security import KEYS_MAX, KEYS_OF_ONE_MAX, SecurityEvents
from peculium_server.store import roles
from peculium_server.store.clauses import Scope
from peculium_server.store.errors import StoreUnavailable
from peculium_server.store.refusals import NOBODY
from peculium_server.store.security import Asked, Place, SecurityEvent
from peculium_server.store.store import Store
from tests.core.ledger import Ledger
from tests.postgres import as_role

NOW = 1_800_000_000_000_000
SECOND = 1_000_000
HOUR_SECONDS = 3_600


class Table:
    """Keeps events, unless it is told to fail."""

    def __init__(self) -> None:
        self.events: list[SecurityEvent] = []
        self.fails = False
        self.asked = 0

    async def add(self, events: Sequence[SecurityEvent]) -> None:
        self.asked += 1
        if self.fails:
            raise StoreUnavailable("gone")
        known = {each.event_id for each in self.events}
        self.events += [each for each in events if each.event_id not in known]


class Freezer:
    """Answers Freezes, as it is told to."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.answer: Outcome | Refused | Unanswered | Exception = Unanswered(
            Unavailability.QUEUE_FULL, {}, 0
        )

    async def execute(self, requests: Sequence[Request], _: float | None) -> list[Answer]:
        self.asked += requests
        if isinstance(self.answer, Exception):
            raise self.answer
        return [Answer(self.answer, None)]


def frozen() -> Outcome:
    """What a Freeze that was accepted is answered."""
    ledger = Ledger()
    return ledger.do(ledger.grant().freeze())


class Recorder:
    """Security events of one server, with nothing around them."""

    def __init__(self, freeze_seconds: int = 0) -> None:
        self.table, self.freezer = Table(), Freezer()
        self.freezer.answer = frozen()
        self.events = SecurityEvents(self.freezer, self.table, freeze_seconds)
        self.budget = new_id()

    def notice(self, *, by: str = "bob", budget: bytes | None = None, **changes: Any) -> bool:
        """Somebody presents what alice has consumed ten seconds ago."""
        budget = budget or self.budget
        spend = Spend(
            operation_id=new_id(),
            root_id=budget,
            budget_id=budget,
            authority=ByToken(bytes(32)),
            amount=1,
        )
        consumption = Consumption(
            new_id(), Kind.SPEND, NOW - 10 * SECOND, "alice", part=0, shown=True
        )
        reuse = Reuse(
            ReuseKind.CONSUMED_TOKEN, NOW, None, frozen=False, consumption=consumption
        )._replace(**changes)
        return self.events.notice(Request(spend, Actor(by, Role.AGENT), 0), reuse)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.events.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])


def new_id() -> bytes:
    return secrets.token_bytes(16)


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how long a window is."""
    return lambda seconds: monkeypatch.setattr(security, "WINDOW_SECONDS", seconds)


async def test_the_first_is_recorded_before_it_is_answered() -> None:
    recorder = Recorder()
    async with recorder.running():
        assert recorder.notice()
        await recorder.events.recorded()
        [event] = recorder.table.events
    assert (event.at, event.kind, event.number) == (NOW, ReuseKind.CONSUMED_TOKEN, 1)
    assert (event.principal, event.consumed_by) == ("bob", "alice")
    assert event.consumed_at == NOW - 10 * SECOND
    assert event.freeze_id is None


async def test_one_of_another_sort_is_recorded_before_it_is_answered_too() -> None:
    recorder = Recorder()
    async with recorder.running():
        for by in ("bob", "carol", "dave"):
            assert recorder.notice(by=by)
            await recorder.events.recorded()
            assert recorder.table.events[-1].principal == by


async def test_a_storm_is_two_rows_with_all_of_it_counted() -> None:
    recorder = Recorder()
    async with recorder.running():
        assert recorder.notice()
        await recorder.events.recorded()
        assert sum(recorder.notice() for _ in range(10_000)) == 0
        await recorder.events.recorded()
        assert [each.number for each in recorder.table.events] == [1]
    await recorder.events.end(5)
    assert [each.number for each in recorder.table.events] == [1, 10_000]
    assert recorder.table.asked == 2


async def test_what_followed_is_recorded_when_its_window_is_over(
    window: Callable[[float], None],
) -> None:
    recorder = Recorder()
    window(0.05)
    added = asyncio.Event()
    add = recorder.table.add

    async def noted(events: Sequence[SecurityEvent]) -> None:
        await add(events)
        if len(recorder.table.events) > 1:
            added.set()

    recorder.table.add = noted  # type: ignore[method-assign]
    async with recorder.running():
        recorder.notice()
        await recorder.events.recorded()
        recorder.notice()
        await added.wait()
    assert sum(each.number for each in recorder.table.events) == 2


async def test_other_budgets_principals_and_kinds_are_told_apart() -> None:
    recorder = Recorder()
    assert recorder.notice()
    assert recorder.notice(by="carol")
    assert recorder.notice(budget=new_id())
    assert recorder.notice(kind=ReuseKind.BOUND_TOKEN, consumption=None, holder="alice")
    assert not recorder.notice(by="carol")
    await recorder.events.record()
    assert sorted(each.number for each in recorder.table.events) == [1, 1, 1, 2]


async def test_nobody_hides_another_by_a_flood_of_their_own() -> None:
    recorder = Recorder()
    for _ in range(10 * KEYS_MAX):
        recorder.notice(by="mallory", budget=new_id())
    assert recorder.notice(by="bob")
    await recorder.events.record()
    of_mallory = [each for each in recorder.table.events if each.principal == "mallory"]
    assert len(of_mallory) == KEYS_OF_ONE_MAX + 1
    [rest] = [each for each in of_mallory if each.root_id == NOBODY]
    assert rest.number == 10 * KEYS_MAX - KEYS_OF_ONE_MAX
    assert (rest.consumed_by, rest.consumed_operation_id, rest.holder) == (None, None, None)
    [told] = [each for each in recorder.table.events if each.principal == "bob"]
    assert told.root_id == recorder.budget


async def test_beyond_all_bounds_there_is_one_row_for_each_kind() -> None:
    recorder = Recorder()
    for number in range(3 * KEYS_MAX):
        recorder.notice(by=f"principal-{number}")
    await recorder.events.record()
    assert len(recorder.table.events) == KEYS_MAX + 1
    [rest] = [each for each in recorder.table.events if each.root_id == NOBODY]
    assert (rest.principal, rest.number) == ("", 2 * KEYS_MAX)


async def test_nothing_is_lost_and_nothing_twice_while_the_database_takes_nothing() -> None:
    recorder = Recorder()
    recorder.table.fails = True
    recorder.notice()
    with pytest.raises(StoreUnavailable):
        await recorder.events.record()
    # What may be there already is not added to: it would not be there again.
    recorder.notice()
    recorder.notice(by="carol")
    with pytest.raises(StoreUnavailable):
        await recorder.events.record()
    recorder.table.fails = False
    await recorder.events.record()
    await recorder.events.end(5)
    told = [(each.principal, each.number) for each in recorder.table.events]
    assert sorted(told) == [("bob", 1), ("bob", 1), ("carol", 1)]


async def test_no_answer_waits_long_for_a_database_that_takes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(security, "ANSWER_SECONDS_MAX", 0.01)
    recorder = Recorder()
    recorder.table.fails = True
    async with recorder.running():
        recorder.notice()
        await recorder.events.recorded()
    assert recorder.table.events == []
    recorder.table.fails = False
    await recorder.events.end(5)
    assert len(recorder.table.events) == 1


async def test_what_is_kept_for_a_dead_database_is_bounded(
    monkeypatch: pytest.MonkeyPatch, window: Callable[[float], None]
) -> None:
    monkeypatch.setattr(security, "WAITING_MAX", 10)
    recorder = Recorder()
    recorder.table.fails = True
    window(0)
    for number in range(50):
        recorder.notice(by=f"principal-{number}")
        with pytest.raises(StoreUnavailable):
            await recorder.events.record()
    recorder.table.fails = False
    await recorder.events.record()
    told = [each.principal for each in recorder.table.events]
    # The first ones are whole.
    assert told[:10] == [f"principal-{number}" for number in range(10)]
    assert {*told[10:]} == {""}
    assert sum(each.number for each in recorder.table.events) == 50


# -- Freezing ------------------------------------------------------------------------------------------------


async def test_the_budget_is_frozen_before_the_event_is_recorded() -> None:
    recorder = Recorder(HOUR_SECONDS)
    add = recorder.table.add
    before: list[int] = []

    async def noted(events: Sequence[SecurityEvent]) -> None:
        before.append(len(recorder.freezer.asked))
        await add(events)

    recorder.table.add = noted  # type: ignore[method-assign]
    recorder.notice()
    assert await recorder.events.record()
    assert before == [1]
    [asked] = recorder.freezer.asked
    assert isinstance(asked.operation, Freeze)
    assert (asked.operation.budget_id, asked.actor) == (recorder.budget, GUARD)
    [event] = recorder.table.events
    assert event.freeze_id == asked.operation.operation_id
    assert event.consumed_operation_id is not None
    assert asked.operation.reason.split()[4].replace("-", "") == event.consumed_operation_id.hex()


@pytest.mark.parametrize(
    ("seconds", "changes"),
    [
        (0, {}),
        (9, {}),
        (HOUR_SECONDS, {"frozen": True}),
        (HOUR_SECONDS, {"kind": ReuseKind.CONSUMED_HOLD_TOKEN}),
        (HOUR_SECONDS, {"kind": ReuseKind.BOUND_TOKEN, "consumption": None, "holder": "alice"}),
    ],
    ids=["off", "too long ago", "frozen already", "a hold's", "a bound one"],
)
async def test_what_is_recorded_without_a_freeze(seconds: int, changes: dict[str, Any]) -> None:
    recorder = Recorder(seconds)
    recorder.notice(**changes)
    await recorder.events.record()
    assert recorder.freezer.asked == []
    assert [each.freeze_id for each in recorder.table.events] == [None]


async def test_many_tokens_of_a_budget_freeze_it_once_in_a_window() -> None:
    recorder = Recorder(HOUR_SECONDS)
    for number in range(100):
        recorder.notice(by=f"principal-{number % 3}")
    await recorder.events.record()
    assert len(recorder.freezer.asked) == 1
    assert len({each.freeze_id for each in recorder.table.events}) == 1


@pytest.mark.parametrize(
    "failure",
    [Unanswered(Unavailability.DATABASE_UNAVAILABLE, {}, 0), DeadlinePassed()],
    ids=["unanswered", "too late"],
)
async def test_a_freeze_without_an_answer_is_tried_again(
    failure: Unanswered | Exception,
) -> None:
    recorder = Recorder(HOUR_SECONDS)
    recorder.freezer.answer = failure
    recorder.notice()
    assert not await recorder.events.record()
    # The event does not wait for it.
    assert len(recorder.table.events) == 1
    recorder.freezer.answer = frozen()
    assert await recorder.events.record()
    first, second = recorder.freezer.asked
    assert first.operation == second.operation
    assert await recorder.events.record()
    assert len(recorder.freezer.asked) == 2


@pytest.mark.parametrize(
    "failure",
    [Refused(Refusal.BUDGET_CLOSED, {}), RuntimeError("a bug")],
    ids=["refused", "failed"],
)
async def test_a_freeze_that_cannot_be_is_given_up_and_said(
    failure: Refused | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(HOUR_SECONDS)
    recorder.freezer.answer = failure
    recorder.notice()
    assert await recorder.events.record()
    assert await recorder.events.record()
    assert len(recorder.freezer.asked) == 1
    assert len(recorder.table.events) == 1
    assert "frozen" in caplog.text


# -- The table ------------------------------------------------------------------------------------------------


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    """With the rights of a server, and no others."""
    opened = await Store.open(as_role(database, roles.SERVER))
    yield opened
    await opened.close()


def event(at: int, root_id: bytes, **changes: Any) -> SecurityEvent:
    return SecurityEvent(
        at=at,
        event_id=new_id(),
        kind=ReuseKind.CONSUMED_TOKEN,
        number=1,
        root_id=root_id,
        budget_id=root_id,
        principal="bob",
        operation_id=new_id(),
        consumed_by="alice",
        consumed_operation_id=new_id(),
        consumed_kind=Kind.ACCEPT,
        consumed_at=at - SECOND,
        holder=None,
        freeze_id=None,
    )._replace(**changes)


async def test_events_are_kept_as_they_are_and_added_once(store: Store) -> None:
    root = new_id()
    bound: dict[str, Any] = {
        "kind": ReuseKind.BOUND_TOKEN,
        "holder": "alice",
        **dict.fromkeys(("consumed_by", "consumed_operation_id", "consumed_kind", "consumed_at")),
    }
    first, second = event(NOW, root, freeze_id=new_id()), event(NOW + 1, root, **bound)
    untold = event(NOW + 2, NOBODY, principal="", number=7, **(bound | {"holder": None}))
    await store.security.add([first, second])
    # Its answer was lost.
    await store.security.add([first._replace(number=5), untold])
    found = await store.security.page(Asked(), limit=10, after=None, descending=False)
    assert [each.event for each in found] == [first, second, untold]
    assert {each.path for each in found} == {""}


async def test_events_are_listed_by_page_time_kind_and_tree(store: Store) -> None:
    one, other = new_id(), new_id()
    hold = ReuseKind.CONSUMED_HOLD_TOKEN
    events = [
        event(NOW + index, other if index == 3 else one, **({"kind": hold} if index == 4 else {}))
        for index in range(6)
    ]
    await store.security.add(events)

    async def listed(asked: Asked | None = None, *, descending: bool = False) -> list[int]:
        found: list[SecurityEvent] = []
        while True:
            after = Place(found[-1].at, found[-1].event_id) if found else None
            page = await store.security.page(
                asked or Asked(), limit=2, after=after, descending=descending
            )
            if not page:
                return [events.index(each) for each in found]
            found += [each.event for each in page]

    assert await listed() == [0, 1, 2, 3, 4, 5]
    assert await listed(descending=True) == [5, 4, 3, 2, 1, 0]
    assert await listed(Asked(since=NOW + 1, before=NOW + 3)) == [1, 2]
    assert await listed(Asked(kinds=[hold])) == [4]
    lane = store.lane_of(other)
    in_tree = Asked(scope=Scope.TREE, lane=lane, root_id=other, budget_id=other)
    assert await listed(in_tree) == [3]


async def test_a_server_adds_events_and_cannot_take_them_back(store: Store, database: str) -> None:
    await store.security.add([event(NOW, new_id())])
    with psycopg.connect(as_role(database, roles.SERVER), autocommit=True) as connection:
        for statement in ("DELETE FROM security_events", "UPDATE security_events SET number = 9"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())
