"""The sweeper on a real database: what is due is done, once, whatever stands in its way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import psycopg
import pytest

from peculium_server import sweeper
from peculium_server.core.limits import DEPTH_MAX, SECOND_US
from peculium_server.core.operations import ByToken, Extend, Kind
from peculium_server.core.state import Balances, HoldState
from peculium_server.lanes.answers import Answer, Unanswered, Unavailability
from peculium_server.store.errors import StoreUnavailable
from peculium_server.store.reads import STATEMENTS
from tests.lanes.memory import new_token
from tests.sweeper.fleet import Fleet, new_id, until

pytestmark = pytest.mark.timeout(240)

TREE = 10_000


@contextlib.asynccontextmanager
async def running(fleet: Fleet, seconds: float = 0.1) -> Any:
    """The fleet's sweeper at work for the time of the block."""
    task = asyncio.create_task(fleet.sweeper.run(seconds))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


def told(caplog: pytest.LogCaptureFixture, least: int = logging.INFO) -> list[str]:
    """What the sweeper has logged."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == sweeper.__name__ and record.levelno >= least
    ]


async def test_a_hold_lapses_when_its_time_is_over_and_not_before(fleet: Fleet) -> None:
    root = await fleet.root(100)
    short = await fleet.hold(root, 10)
    long = await fleet.hold(root, 20, ttl_us=3_600 * SECOND_US)
    assert await fleet.sweeper.round() == (False, 0)
    await fleet.wait_until_due(1)
    await fleet.sweep_until(fleet.nothing_due)
    holds = await fleet.holds_of(root)
    assert holds[short].state is HoldState.LAPSED
    assert holds[long].state is HoldState.LIVE
    money = (await fleet.budget(root)).money
    assert (money.available, money.held, money.forfeited) == (70, 20, 10)
    assert (await fleet.verified(root))[Kind.LAPSE] == 1


async def test_a_lease_that_ended_closes_the_budget_and_its_money_is_back(fleet: Fleet) -> None:
    root = await fleet.root(1_000)
    [leased] = await fleet.children(root, root, 1, 500, lease_us=SECOND_US)
    await fleet.children(root, leased, 100)
    await fleet.wait_until_due(101)
    await fleet.sweep_until(fleet.nothing_due)
    assert (await fleet.budget(root, leased)).closed
    assert (await fleet.budget(root)).money == Balances(granted=1_000, available=1_000)
    kinds = await fleet.verified(root)
    assert kinds[Kind.EXPIRE] == 101


async def test_a_lease_below_a_closed_budget_ends_too_and_is_not_found_due_for_ever(
    fleet: Fleet,
) -> None:
    root = await fleet.root(1_000)
    [top] = await fleet.children(root, root, 1, 500)
    [leased] = await fleet.children(root, top, 1, 100, lease_us=SECOND_US)
    await fleet.revoke(root, top)
    await fleet.wait_until_due(1)
    await fleet.sweep_until(fleet.nothing_due)
    assert (await fleet.budget(root, leased)).closed
    assert (await fleet.verified(root))[Kind.EXPIRE] == 1


@pytest.mark.parametrize("width", [TREE, 21])
async def test_a_revocation_of_ten_thousand_budgets_leaves_little_to_wait_for(
    fleet: Fleet, width: int
) -> None:
    """What it leaves pending is collected afterwards, and the root has all of it."""
    root = await fleet.root(1_000_000)
    [top] = await fleet.children(root, root, 1, 500_000)
    level = [top]
    made = 0
    while made < TREE:
        level, parents = [], level
        for parent in parents:
            count = min(width, TREE - made)
            share = (
                (await fleet.budget(root, parent)).money.available // (count + 1) if count else 0
            )
            level += await fleet.children(root, parent, count, share) if count else []
            made += count
    outcome = await fleet.revoke(root, top)
    assert outcome.returned + outcome.pending == 500_000
    assert outcome.pending > 0
    if width == TREE:
        assert len(level) == TREE
    await fleet.sweep_until(fleet.nothing_due)
    await fleet.sweeper.round()
    assert fleet.pending() == 0
    assert (await fleet.budget(root)).money == Balances(granted=1_000_000, available=1_000_000)
    await fleet.verified(root)


async def test_what_a_closing_left_is_the_same_in_the_end_as_if_all_were_collected_at_once(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spending, holds in flight and a second closing above in the meantime included."""

    async def run(swept: str) -> list[Balances]:
        root = await fleet.root(10_000)
        [top] = await fleet.children(root, root, 1, 5_000)
        [middle] = await fleet.children(root, top, 1, 3_000)
        leaves = await fleet.children(root, middle, 150, 10)
        held = [
            await fleet.hold(root, 5, budget_id=leaf, ttl_us=600 * SECOND_US)
            for leaf in leaves[::50]
        ]
        await fleet.revoke(root, middle)
        if swept == "between":
            await fleet.sweep_until(fleet.nothing_due)
        await fleet.revoke(root, top)
        if swept == "before the settles":
            await fleet.sweep_until(fleet.nothing_due)
        for hold, leaf, actual in zip(held, leaves[::50], (0, 3, 9), strict=True):
            await fleet.settle(root, hold, actual, budget_id=leaf)
        await fleet.sweep_until(fleet.nothing_due)
        await fleet.verified(root)
        return [(await fleet.budget(root, budget)).money for budget in (root, top, middle, *leaves)]

    ends = [await run(swept) for swept in ("between", "before the settles", "last")]
    assert ends[0] == ends[1] == ends[2]
    assert ends[0][0] == Balances(granted=10_000, available=10_000 - 12, delegated=12)


async def test_a_closed_budget_is_on_the_list_until_nothing_is_left_below_it(
    fleet: Fleet,
) -> None:
    root = await fleet.root(10_000)
    tops = await fleet.children(root, root, 2, 1_000)
    await fleet.children(root, tops[0], 64)
    await fleet.children(root, tops[1], 65)
    lane = fleet.store.lane_of(root)
    assert (await fleet.revoke(root, tops[0])).pending == 0
    assert await fleet.store.collections(lane, limit=10) == []
    assert (await fleet.revoke(root, tops[1])).pending == 1
    assert await fleet.store.collections(lane, limit=10) == [(root, tops[1])]
    assert (await fleet.sweeper.round()).more
    assert fleet.pending() == 1
    assert await fleet.store.collections(lane, limit=10) == [(root, tops[1])]
    await fleet.sweeper.round()
    await fleet.sweeper.round()
    assert await fleet.store.collections(lane, limit=10) == []
    assert fleet.pending() == 0
    assert fleet.counted("collection", "done") == 1


async def test_thousands_of_due_holds_are_lapsed_once_each_by_two_servers(
    fleet: Fleet, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    roots = [await fleet.root() for _ in range(3)]
    for root in roots:
        await fleet.holds(root, 1_000)
    await fleet.wait_until_due(3_000)
    async with Fleet.opened(database) as other, running(fleet), running(other):

        async def all_counted() -> bool:
            # What is committed is counted once its answer is there.
            return sum(each.counted("hold", "done") for each in (fleet, other)) >= 3_000

        await until(all_counted)
        assert await fleet.nothing_due()
    assert sum(each.counted("hold", "done") for each in (fleet, other)) == 3_000
    for root in roots:
        assert (await fleet.verified(root))[Kind.LAPSE] == 1_000
        assert (await fleet.budget(root)).money.forfeited == 1_000
    assert told(caplog) == []


async def test_after_an_outage_the_backlog_is_worked_off_in_bounded_batches_and_callers_get_through(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await fleet.root()
    await fleet.holds(root, 5_000)
    await fleet.wait_until_due(5_000)
    transactions: list[set[bytes]] = []
    writer = fleet.store.writer(fleet.store.lane_of(root))
    run = writer.run

    async def watched(footprints: Any, decide: Any, deadline: float | None, sent: Any) -> int:
        transactions.append(set().union(*(each.operations for each in footprints.values())))
        return await run(footprints, decide, deadline, sent)

    monkeypatch.setattr(writer, "run", watched)
    between: list[int] = []
    lapsed = 0
    async with running(fleet), asyncio.timeout(120):
        while lapsed < 5_000:
            before = len(transactions)
            spend = fleet.spend(root)
            [outcome] = await fleet.ask(spend)
            begun = [spend.operation_id in each for each in transactions[before:]]
            assert begun.count(True) == 1
            between.append(begun.index(True))
            lapsed = outcome.money.forfeited
    assert max(map(len, transactions)) <= 256
    # Whoever asks waits for what is under way and, if it is full, the next one: not for the backlog.
    assert max(between) <= 1
    assert len(between) >= 10
    kinds = await fleet.verified(root)
    assert (kinds[Kind.LAPSE], kinds[Kind.SPEND]) == (5_000, len(between))


async def test_a_round_does_a_bounded_part_of_a_lane_and_says_that_there_is_more(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "ROUND_MAX", 10)
    root = await fleet.root()
    await fleet.holds(root, 25)
    await fleet.wait_until_due(25)
    assert [(await fleet.sweeper.round()).more for _ in range(3)] == [True, True, False]
    assert fleet.counted("hold", "done") == 25


async def test_what_is_due_first_is_done_first(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "ROUND_MAX", 2)
    root = await fleet.root()
    holds = [await fleet.hold(root) for _ in range(4)]
    await fleet.wait_until_due(4)
    await fleet.sweeper.round()
    states = await fleet.holds_of(root)
    assert [states[hold].state.name for hold in holds] == ["LAPSED", "LAPSED", "LIVE", "LIVE"]


async def test_a_collection_through_many_levels_is_cut_into_small_transactions(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each Collect writes an entry for every closed level that the money passes."""
    root = await fleet.root(10_000)
    [top] = [bottom] = await fleet.children(root, root, 1, 5_000)
    for _ in range(DEPTH_MAX - 3):
        [bottom] = await fleet.children(root, bottom, 1, 1_000)
    await fleet.children(root, bottom, 200)
    await fleet.revoke(root, top)
    written: list[int] = []
    writer = fleet.store.writer(fleet.store.lane_of(root))
    run = writer.run

    async def watched(footprints: Any, decide: Any, deadline: float | None, sent: Any) -> int:
        def counted(loaded: Any) -> Any:
            accepted = decide(loaded)
            written.append(sum(len(each.entries) for each in accepted))
            return accepted

        return await run(footprints, counted, deadline, sent)

    monkeypatch.setattr(writer, "run", watched)
    await fleet.sweep_until(fleet.nothing_due)
    assert sum(written) >= 130 * DEPTH_MAX
    assert max(written) <= 1_000
    assert (await fleet.budget(root)).money.available == 10_000
    await fleet.verified(root)


async def test_what_another_server_is_doing_already_is_left_to_it(
    fleet: Fleet, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thousand that both have found, the slower one repeats a single transaction."""
    root = await fleet.root()
    await fleet.holds(root, 1_000)
    await fleet.wait_until_due(1_000)
    due_holds = fleet.store.due_holds
    async with Fleet.opened(database) as faster:

        async def found_as_well(lane: int, *, limit: int) -> Any:
            found = await due_holds(lane, limit=limit)
            await faster.sweep_until(faster.nothing_due)
            return found

        monkeypatch.setattr(fleet.store, "due_holds", found_as_well)
        assert not (await fleet.sweeper.round()).more
        assert faster.counted("hold", "done") == 1_000
    assert fleet.counted("hold", "replayed") == 256
    assert fleet.counted("hold", "done") == 0


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
@pytest.mark.parametrize("analyzed", [False, True])
async def test_what_is_not_due_yet_is_not_even_looked_at(
    fleet: Fleet, database: str, mode: str, *, analyzed: bool
) -> None:
    root = await fleet.root()
    await fleet.holds(root, 300, ttl_us=3_600 * SECOND_US)
    await fleet.children(root, root, 300, lease_us=3_600 * SECOND_US)
    lane = fleet.store.lane_of(root)
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        if analyzed:
            await connection.execute("ANALYZE")
        await connection.execute("SELECT set_config('plan_cache_mode', %s, false)", [mode])
        for name, column in (("due_holds", "expires_at"), ("due_leases", "lease_until")):
            statement = STATEMENTS[name]
            assert [parameter for parameter, _ in statement.parameters] == ["lane", "limit"]
            await connection.execute(b"PREPARE planned AS " + statement.sql)
            cursor = await connection.execute(
                f"EXPLAIN (ANALYZE, TIMING OFF) EXECUTE planned({lane}, 1024)".encode()
            )
            plan = "\n".join([line for (line,) in await cursor.fetchall()])
            assert f"{column} <= statement_timestamp()" in plan.partition("Index Cond: ")[2]
            assert "Rows Removed by Filter" not in plan
            await connection.execute("DEALLOCATE planned")


# -- What stands in its way -----------------------------------------------------------------------

ORPHAN = """
    INSERT INTO holds (
        amount, remaining, booked, disputed, created_at, expires_at, lane, state,
        root_id, budget_id, hold_id, token
    ) SELECT 1, 1, 0, 0, now(), now() - interval '1 hour', %(lane)s, 1,
        %(root)s, %(budget)s, gen_random_uuid(), sha256(gen_random_uuid()::text::bytea)
    FROM generate_series(1, %(count)s)
"""


async def test_what_is_refused_holds_up_nothing_behind_it_and_is_logged_once(
    fleet: Fleet,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Holds without a budget, more of them than one round looks at, all due before any other."""
    monkeypatch.setattr(sweeper, "ROUND_MAX", 20)
    monkeypatch.setattr(sweeper, "SET_ASIDE_SECONDS", 0.5)
    root = await fleet.root()
    lane = fleet.store.lane_of(root)
    ghost = {"lane": lane, "root": new_id().hex(), "budget": new_id().hex(), "count": 50}
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute(ORPHAN, ghost)
    await fleet.holds(root, 30)
    await fleet.wait_until_due(80)

    async def only_those_are_left() -> bool:
        return await fleet.overdue() == 50

    await fleet.sweep_until(only_those_are_left)
    refusals = fleet.counted("hold", "refused")

    async def tried_again() -> bool:
        return fleet.counted("hold", "refused") >= refusals + 50

    await fleet.sweep_until(tried_again)
    logged = told(caplog, logging.ERROR)
    assert len(logged) == 50
    assert all("There is no such budget" in line for line in logged)
    assert (await fleet.verified(root))[Kind.LAPSE] == 30
    assert fleet.lag("hold") >= 3_600


async def test_what_fails_takes_nothing_of_its_batch_with_it(
    fleet: Fleet, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A hold of a budget whose ancestors are missing: the transaction that loads it fails."""
    root = await fleet.root()
    lane = fleet.store.lane_of(root)
    broken = {"lane": lane, "root": root.hex(), "budget": new_id().hex(), "count": 1}
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute(
            "INSERT INTO budgets SELECT (jsonb_populate_record(budgets, jsonb_build_object("
            "'budget_id', %(budget)s::uuid, 'parent_id', gen.id, 'overrun_factor', 1, 'name', 'x',"
            "'ancestors', ARRAY[gen.id, root_id]))).*"
            " FROM budgets, gen_random_uuid() AS gen (id) WHERE root_id = %(root)s",
            broken,
        )
        await connection.execute(ORPHAN, broken)
    await fleet.holds(root, 20)
    await fleet.wait_until_due(21)

    async def only_that_is_left() -> bool:
        return await fleet.overdue() == 1

    await fleet.sweep_until(only_that_is_left)
    assert fleet.counted("hold", "done") == 20
    assert fleet.counted("hold", "failed") == 1
    [logged] = told(caplog, logging.ERROR)
    assert "LedgerCorrupt" in logged


async def test_whoever_was_faster_is_let_have_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hold that is settled, and one that is extended, between being found and being lapsed."""
    root = await fleet.root()
    settled, extended = await fleet.hold(root), await fleet.hold(root)
    await fleet.wait_until_due(2)
    due_holds = fleet.store.due_holds

    async def found_late(lane: int, *, limit: int) -> Any:
        found = await due_holds(lane, limit=limit)
        await fleet.settle(root, settled, 1)
        await fleet.ask(
            Extend(
                operation_id=new_id(),
                root_id=root,
                budget_id=root,
                authority=ByToken(fleet.tokens[extended]),
                hold_id=extended,
                ttl_us=2 * SECOND_US,
                next_hold_token_id=new_token(),
            )
        )
        return found

    with monkeypatch.context() as patched:
        patched.setattr(fleet.store, "due_holds", found_late)
        await fleet.sweeper.round()
    assert fleet.counted("hold", "overtaken") == 2
    holds = await fleet.holds_of(root)
    assert (holds[settled].state, holds[extended].state) == (HoldState.SETTLED, HoldState.LIVE)
    await fleet.wait_until_due(1)
    await fleet.sweep_until(fleet.nothing_due)
    assert (await fleet.verified(root))[Kind.LAPSE] == 1


async def test_a_lane_without_an_answer_holds_up_no_other_and_is_left_alone_as_long_as_it_asks(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, free = await fleet.root(lane=3), await fleet.root(lane=4)
    await fleet.holds(full, 3)
    await fleet.holds(free, 3)
    await fleet.wait_until_due(6)
    execute = fleet.ledger.execute

    async def without_room(requests: Any, deadline: float | None) -> list[Answer]:
        if requests[0].operation.root_id == full:
            return [Answer(Unanswered(Unavailability.QUEUE_FULL, {}, 700), None)]
        return await execute(requests, deadline)

    with monkeypatch.context() as patched:
        patched.setattr(fleet.ledger, "execute", without_room)
        assert await fleet.sweeper.round() == (False, 0.7)
    assert fleet.counted("hold", "unanswered") == 3
    assert (await fleet.verified(free))[Kind.LAPSE] == 3
    assert (await fleet.verified(full))[Kind.LAPSE] == 0
    await fleet.sweep_until(fleet.nothing_due)
    assert (await fleet.verified(full))[Kind.LAPSE] == 3


async def test_what_is_not_decided_in_time_is_left_to_a_later_round(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await fleet.root()
    await fleet.holds(root, 3)
    await fleet.wait_until_due(3)
    with monkeypatch.context() as patched:
        patched.setattr(sweeper, "ANSWER_SECONDS_MAX", -1)
        assert await fleet.sweeper.round() == (False, 0)
    assert fleet.counted("hold", "unanswered") == 3
    await fleet.sweep_until(fleet.nothing_due)
    assert (await fleet.verified(root))[Kind.LAPSE] == 3


async def test_nothing_ends_the_sweeping(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sweeper, "UNAVAILABLE_SECONDS", 0.01)
    root = await fleet.root()
    await fleet.holds(root, 3)
    await fleet.wait_until_due(3)
    due = fleet.store.due
    failures: list[Exception] = [
        StoreUnavailable("away"),
        StoreUnavailable("still away"),
        RuntimeError("a bug"),
    ]

    async def failing() -> Any:
        if failures:
            raise failures.pop(0)
        return await due()

    async def lapsed() -> bool:
        return (await fleet.budget(root)).money.forfeited == 3

    monkeypatch.setattr(fleet.store, "due", failing)
    async with running(fleet, 0.01) as task:
        await until(lapsed)
        assert not task.done()
    assert told(caplog) == ["nothing is swept: away", "a round of the sweeper has failed"]


# -- What it tells --------------------------------------------------------------------------------


async def test_its_lag_is_how_long_the_earliest_has_been_due(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sweeper, "LAG_SECONDS_MAX", 0.5)
    root = await fleet.root(10_000)
    await fleet.hold(root, ttl_us=3_600 * SECOND_US)
    [leased] = await fleet.children(root, root, 1, 10, lease_us=SECOND_US)
    [top] = await fleet.children(root, root, 1, 1_000)
    await fleet.children(root, top, 70)
    await fleet.sweeper.round()
    assert [fleet.lag(kind) for kind in ("hold", "lease", "collection")] == [0, 0, 0]
    await fleet.revoke(root, top)
    await fleet.wait_until_due(2)
    assert fleet.pending() == 0
    await asyncio.sleep(0.6)
    caplog.clear()
    await fleet.sweeper.round()
    assert fleet.pending() == 1
    assert fleet.lag("hold") == 0
    assert 0.5 < fleet.lag("lease") < 60
    assert fleet.lag("lease") + 1 < fleet.lag("collection") + 2 < 62
    await fleet.sweep_until(fleet.nothing_due)
    await fleet.sweeper.round()
    assert [fleet.lag(kind) for kind in ("hold", "lease", "collection")] == [0, 0, 0]
    lines = sorted(line.split(":")[0] for line in told(caplog))
    assert lines == ["the sweeper has caught up"] * 2 + ["the sweeper is behind"] * 2
    assert (await fleet.budget(root, leased)).closed
