"""Connections that break: before a commit, while it is on its way, and behind it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Coroutine, Sequence
from typing import Any

import psycopg
import pytest
from psycopg.pq import PGconn

from peculium_server.core.operations import Grant
from peculium_server.core.outcome import Outcome
from peculium_server.store import connect, lane, wire
from peculium_server.store.errors import (
    LedgerCorrupt,
    LedgerRestored,
    StatementRefused,
    StoreUnavailable,
)
from peculium_server.store.known import Known
from peculium_server.store.lane import LaneWriter, Loaded
from peculium_server.store.store import Store
from peculium_server.store.wire import Connection, Flown, Step
from tests.store.spender import Spender, spent


class Faults:
    """Breaks connections in the middle of commits, as long as there are faults left to make."""

    def __init__(self) -> None:
        self.launch = Connection.launch
        self.made = 0
        self.plan: list[str] = []
        self.stalled: list[Connection] = []

    async def break_commit(self, connection: Connection, *segments: Sequence[Step]) -> list[Flown]:
        commits = any(step.statement.name == b"commit" for step in segments[0])
        if not commits or not self.plan:
            return await self.launch(connection, *segments)
        fault = self.plan.pop(0)
        self.made += 1
        if fault == "not replicated":
            connection.unreplicated = True
            return await self.launch(connection, *segments)
        if fault == "request lost":
            connection.pgconn.finish()
        elif fault == "no answer":
            await self.launch(connection, *segments)
            await asyncio.Event().wait()
        elif fault == "answer lost":
            await self.launch(connection, *segments)
            connection.pgconn.finish()
        elif fault == "delayed":
            # Everything but the commit has arrived; who asked for it hears nothing more.
            await self.launch(connection, segments[0][:-1])
            stalled = Connection(connection.pgconn)
            stalled._known_statements = connection._known_statements
            self.stalled.append(stalled)
            connection.pgconn = PGconn.connect(b"host=/nowhere")
        raise psycopg.OperationalError("the connection is lost")

    async def arrive(self) -> None:
        """Let a delayed commit be done after all."""
        connection = self.stalled.pop()
        assert await self.launch(connection, [lane._COMMIT]) == [[[]]]
        await connection.close()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    made = Faults()

    def launch(self: Connection, *segments: Sequence[Step]) -> Coroutine[Any, Any, list[Flown]]:
        return made.break_commit(self, *segments)

    monkeypatch.setattr(Connection, "launch", launch)
    return made


@pytest.fixture(params=["with care", "by a guess"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the operations are done whose commits break."""
    if request.param == "by a guess":
        monkeypatch.setattr(Known, "ALONE_AFTER", 0)


WITH_CARE = pytest.mark.parametrize("way", ["with care"], indirect=True)
"""About what is noticed before a commit is sent: a guess is sent with its commit."""


@pytest.fixture
async def root(store: Store, spender: Spender) -> Grant:
    return await spender.grant(store)


async def terminate(database: str, application: str = "peculium") -> None:
    """End every session of the store."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = %s AND datname = current_database()",
            [application],
        )


async def test_a_commit_whose_answer_is_lost_is_found_out(
    store: Store, spender: Spender, root: Grant, faults: Faults
) -> None:
    faults.plan = ["answer lost"]
    answer = await spender.do(store.writer(store.lane_of(root.root_id)), spender.ask(root))
    assert faults.made == 1
    assert isinstance(answer, Outcome)
    assert answer.replayed
    assert await spent(store, root) == 1


async def test_a_commit_that_never_arrived_is_done_again(
    store: Store, spender: Spender, root: Grant, faults: Faults
) -> None:
    faults.plan = ["request lost"]
    answer = await spender.do(store.writer(store.lane_of(root.root_id)), spender.ask(root))
    assert faults.made == 1
    assert isinstance(answer, Outcome)
    assert not answer.replayed
    assert await spent(store, root) == 1


async def test_a_commit_that_is_still_on_its_way_is_waited_for(
    store: Store, spender: Spender, root: Grant, faults: Faults
) -> None:
    faults.plan = ["delayed"]
    arrival: list[asyncio.Task[None]] = []

    def arrive_later(loaded: Loaded) -> None:
        if spender.decisions == 3:
            arrival.append(asyncio.create_task(faults.arrive()))

    answer = await spender.do(
        store.writer(store.lane_of(root.root_id)), spender.ask(root), watch=arrive_later
    )
    await arrival[0]
    assert isinstance(answer, Outcome)
    assert answer.replayed
    assert await spent(store, root) == 1


async def test_a_refusal_is_not_told_while_an_earlier_commit_may_still_arrive(
    store: Store, spender: Spender, root: Grant, faults: Faults
) -> None:
    """The second decision finds too little, since it cannot see what the first is about to commit."""
    faults.plan = ["delayed"]
    arrival: list[asyncio.Task[None]] = []

    def empty_it(loaded: Loaded) -> None:
        tree = loaded.trees[root.root_id]
        if spender.decisions in (3, 4) and tree.recorded[spend.operation_id] is None:
            budget = tree.budget(root.root_id)
            poor = budget.money._replace(available=0, granted=0)
            tree.budgets[root.root_id] = budget._replace(money=poor)
        if spender.decisions == 4:
            arrival.append(asyncio.create_task(faults.arrive()))

    spend = spender.ask(root)
    answer = await spender.do(store.writer(store.lane_of(root.root_id)), spend, watch=empty_it)
    await arrival[0]
    assert isinstance(answer, Outcome)
    assert answer.replayed
    assert await spent(store, root) == 1


async def test_an_outcome_that_cannot_be_found_out_in_time_is_told_to_be_unknown(
    store: Store, spender: Spender, root: Grant, faults: Faults
) -> None:
    faults.plan = ["answer lost"] + ["request lost"] * 1_000
    deadline = asyncio.get_running_loop().time() + 0.5
    with pytest.raises(StoreUnavailable) as raised:
        await spender.do(
            store.writer(store.lane_of(root.root_id)), spender.ask(root), deadline=deadline
        )
    assert raised.value.outcome_unknown


async def test_without_a_deadline_the_search_for_an_outcome_ends_too(
    store: Store,
    spender: Spender,
    root: Grant,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lane, "IN_DOUBT_SECONDS_MAX", 0.2)
    faults.plan = ["request lost"] * 1_000
    with pytest.raises(StoreUnavailable) as raised:
        await spender.spend(store.writer(store.lane_of(root.root_id)), root)
    assert raised.value.outcome_unknown


async def test_sessions_that_were_ended_are_replaced(
    store: Store, spender: Spender, root: Grant, database: str
) -> None:
    writer = store.writer(store.lane_of(root.root_id))
    for _ in range(3):
        await terminate(database)
        await spender.spend(writer, root)
    await terminate(database)
    assert await spent(store, root) == 3


async def test_a_commit_that_may_not_be_on_the_standby_is_found_out_in_another_session(
    store: Store, spender: Spender, root: Grant, faults: Faults
) -> None:
    faults.plan = ["not replicated"]
    writer = store.writer(store.lane_of(root.root_id))
    session = writer._writer._connection
    answer = await spender.do(writer, spender.ask(root))
    assert isinstance(answer, Outcome)
    assert answer.replayed
    assert writer._writer._connection is not session
    assert await spent(store, root) == 1


async def test_a_deadline_that_passes_behind_a_commit_leaves_its_outcome_unknown(
    store: Store, spender: Spender, root: Grant, faults: Faults
) -> None:
    faults.plan = ["no answer"]
    writer, spend = store.writer(store.lane_of(root.root_id)), spender.ask(root)
    deadline = asyncio.get_running_loop().time() + 0.5
    with pytest.raises(StoreUnavailable) as raised:
        await spender.do(writer, spend, deadline=deadline)
    assert faults.made == 1
    assert raised.value.outcome_unknown
    assert isinstance(await spender.do(writer, spend), Outcome)
    assert await spent(store, root) == 1


@WITH_CARE
async def test_a_backend_that_dies_while_it_saves_leaves_nothing_or_all(
    store: Store, spender: Spender, root: Grant, database: str
) -> None:
    writer = store.writer(store.lane_of(root.root_id))

    def kill(loaded: Loaded) -> None:
        if spender.decisions == 2:
            with psycopg.connect(database, autocommit=True) as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                    " WHERE application_name = 'peculium' AND state = 'idle in transaction'"
                    " AND datname = current_database()"
                )

    answer = await spender.do(writer, spender.ask(root), watch=kill)
    assert spender.decisions == 3
    assert isinstance(answer, Outcome)
    assert await spent(store, root) == 1


@WITH_CARE
async def test_a_database_that_is_gone_is_told_at_once_and_used_when_it_is_back(
    store: Store, spender: Spender, root: Grant, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    writer = store.writer(store.lane_of(root.root_id))
    nowhere = "host=127.0.0.1 port=1 dbname=none"
    monkeypatch.setattr(writer._writer, "_dsn", nowhere)
    await terminate(database)
    with pytest.raises(StoreUnavailable) as raised:
        await spender.spend(writer, root)
    assert not raised.value.outcome_unknown
    monkeypatch.undo()
    await spender.spend(writer, root)
    assert await spent(store, root) == 1


async def test_a_caller_who_gives_up_leaves_the_lane_usable(
    store: Store, spender: Spender, root: Grant, database: str
) -> None:
    writer = store.writer(store.lane_of(root.root_id))
    async with await psycopg.AsyncConnection.connect(database) as hoarder:
        number = store.lane_of(root.root_id)
        await hoarder.execute("SELECT FROM lanes WHERE lane = %s FOR UPDATE", [number])
        begun = asyncio.Event()
        spend = spender.ask(root)
        spending = asyncio.create_task(spender.do(writer, spend, watch=lambda _: begun.set()))
        await begun.wait()
        spending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await spending
        await hoarder.rollback()
    # What was sent before may still be done: asking again tells.
    assert isinstance(await spender.do(writer, spend), Outcome)
    assert await spent(store, root) == 1


async def test_an_error_in_deciding_saves_nothing_and_leaves_the_lane_usable(
    store: Store, spender: Spender, root: Grant
) -> None:
    writer = store.writer(store.lane_of(root.root_id))

    def fail(loaded: Loaded) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await spender.do(writer, spender.ask(root), watch=fail)
    await spender.spend(writer, root)
    assert await spent(store, root) == 1


async def test_a_read_survives_sessions_that_were_ended(
    store: Store, root: Grant, database: str
) -> None:
    for _ in range(3):
        await terminate(database)
        assert await store.budget(root.root_id, root.root_id)


async def test_rows_that_contradict_what_was_loaded_are_not_overwritten(
    store: Store, spender: Spender, root: Grant
) -> None:
    writer = store.writer(store.lane_of(root.root_id))

    def tamper(loaded: Loaded) -> None:
        tree = loaded.trees[root.root_id]
        budget = tree.budget(root.root_id)
        tree.budgets[root.root_id] = budget._replace(seq=budget.seq + 5)

    with pytest.raises(LedgerCorrupt):
        await spender.do(writer, spender.ask(root), watch=tamper)
    assert await spent(store, root) == 0


ANOTHER = (
    "INSERT INTO incarnations SELECT number + 1, at, system_identifier, timeline, database_oid,"
    " pg_current_xact_id()::text::bigint, gen_random_uuid(), frozen, event, reason, principal, positions"
    " FROM incarnations ORDER BY number DESC LIMIT 1"
)


async def test_another_ledger_in_the_same_place_is_not_written_to(
    store: Store, spender: Spender, root: Grant, database: str
) -> None:
    async with await psycopg.AsyncConnection.connect(database) as admin:
        await admin.execute(ANOTHER)
    await terminate(database)
    with pytest.raises(LedgerRestored):
        await spender.spend(store.writer(store.lane_of(root.root_id)), root)


async def test_a_database_that_became_read_only_is_unavailable(
    store: Store, spender: Spender, root: Grant, database: str
) -> None:
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    await terminate(database)
    with pytest.raises(StoreUnavailable):
        await spender.spend(store.writer(store.lane_of(root.root_id)), root)


def test_writers_ask_for_a_primary_whatever_they_are_told() -> None:
    asked = psycopg.conninfo.conninfo_to_dict(
        connect.conninfo("host=a,b target_session_attrs=any keepalives_idle=9")
    )
    assert asked["target_session_attrs"] == "read-write"
    assert asked["keepalives_idle"] == "9"


async def test_a_statement_that_the_database_refuses_is_no_outage(
    store: Store, spender: Spender, root: Grant, database: str
) -> None:
    writer = store.writer(store.lane_of(root.root_id))
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute("ALTER TABLE entries RENAME TO misplaced")
        with pytest.raises(StatementRefused) as raised:
            await spender.spend(writer, root)
        assert raised.value.state == "42P01"
        with pytest.raises(StatementRefused):
            await store.last_use(root.root_id, root.root_id)
        await admin.execute("ALTER TABLE misplaced RENAME TO entries")
    await spender.spend(writer, root)
    assert await spent(store, root) == 1


@WITH_CARE
async def test_statements_that_a_change_of_the_schema_has_spoilt_are_made_anew(
    store: Store, spender: Spender, root: Grant, database: str
) -> None:
    """Postgres refuses to execute what was prepared for columns of other types."""
    writer = store.writer(store.lane_of(root.root_id))
    await spender.spend(writer, root)
    await store.budget(root.root_id, root.root_id)
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute("DROP SCHEMA audit CASCADE")
        await admin.execute("ALTER TABLE budgets ALTER COLUMN name TYPE varchar(200)")
    with pytest.raises(StoreUnavailable):
        await spender.spend(writer, root)
    with pytest.raises(StoreUnavailable):
        await store.budget(root.root_id, root.root_id)
    await spender.spend(writer, root)
    assert await spent(store, root) == 2


async def test_a_read_does_not_wait_for_a_lock_for_as_long_as_it_is_kept(
    store: Store, root: Grant, database: str
) -> None:
    async with await psycopg.AsyncConnection.connect(database) as hoarder:
        await hoarder.execute("LOCK TABLE budgets IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.budget(root.root_id, root.root_id)
        await hoarder.rollback()
    assert await store.budget(root.root_id, root.root_id)


async def test_reads_that_were_given_up_leave_nothing_behind(
    store: Store, root: Grant, database: str
) -> None:
    """Neither is a connection lost to those who come later, nor does a session wait on for nobody."""
    async with await psycopg.AsyncConnection.connect(database) as hoarder:
        await hoarder.execute("LOCK TABLE budgets IN ACCESS EXCLUSIVE MODE")
        for _ in range(8):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await store.budget(root.root_id, root.root_id)
        await hoarder.rollback()
    assert await store.budget(root.root_id, root.root_id)
    async with asyncio.timeout(20), await psycopg.AsyncConnection.connect(database) as admin:
        while await _sessions_at_work(admin):
            # What the statistics say is kept for a transaction.
            await admin.rollback()


async def _sessions_at_work(admin: psycopg.AsyncConnection) -> int:
    cursor = await admin.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'peculium'"
        " AND state <> 'idle' AND datname = current_database()"
    )
    [(count,)] = await cursor.fetchall()
    return int(count)


async def test_a_verification_that_is_broken_off_gives_its_connection_back(
    store: Store, root: Grant
) -> None:
    async def break_off() -> None:
        async with store.snapshot() as snapshot:
            async for _ in snapshot.entries_in_order(root.root_id):
                raise ZeroDivisionError

    for _ in range(8):
        with pytest.raises(ZeroDivisionError):
            await break_off()
    assert await store.budget(root.root_id, root.root_id)


async def test_who_waits_for_a_connection_in_vain_is_told_so(
    store: Store, root: Grant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "READER_WAIT_SECONDS_MAX", 0.05)
    async with contextlib.AsyncExitStack() as taken:
        for _ in range(4):
            await taken.enter_async_context(store.snapshot())
        with pytest.raises(StoreUnavailable, match="in use"):
            await store.budget(root.root_id, root.root_id)
    assert await store.budget(root.root_id, root.root_id)


async def test_an_answer_that_does_not_come_is_not_waited_for_without_end(
    store: Store, spender: Spender, root: Grant, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever keeps the connection up, such as a proxy whose other side is gone."""
    monkeypatch.setattr(wire, "ANSWER_SECONDS_MAX", 0.2)
    async with await psycopg.AsyncConnection.connect(database) as hoarder:
        await hoarder.execute("LOCK TABLE entries IN ACCESS EXCLUSIVE MODE")
        # Not what the database would say of the lock, which it does later.
        with pytest.raises(StoreUnavailable, match="connection broke"):
            await store.last_use(root.root_id, root.root_id)
        await hoarder.rollback()
    await spender.spend(store.writer(store.lane_of(root.root_id)), root)


async def test_another_ledger_in_the_same_place_is_not_read_from(
    store: Store, root: Grant, database: str
) -> None:
    assert await store.budget(root.root_id, root.root_id)
    async with await psycopg.AsyncConnection.connect(database) as admin:
        await admin.execute(ANOTHER)
    await terminate(database)
    with pytest.raises(LedgerRestored):
        await store.budget(root.root_id, root.root_id)


async def test_a_probe_commits_and_changes_nothing(store: Store, database: str) -> None:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        before = await _lanes(admin)
        await store.probe()
        after = await _lanes(admin)
    assert [position for position, *_ in before] == [position for position, *_ in after]
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1


async def test_a_probe_keeps_out_of_lanes_that_others_commit_to(
    store: Store, other_store: Store, spender: Spender, database: str
) -> None:
    # The lane that is probed first.
    while (lane := store.lane_of((root := await spender.grant(store)).root_id)) != store._probed:
        pass
    await store.probe()
    store._probed = lane
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        for _ in range(5):
            await spender.spend(other_store.writer(lane), root)
            before = await _lanes(admin)
            await store.probe()
            assert (await _lanes(admin))[lane] == before[lane]


async def _lanes(admin: psycopg.AsyncConnection) -> list[tuple[object, ...]]:
    """Position and version of each lane's row."""
    cursor = await admin.execute("SELECT position, xmin, ctid FROM lanes ORDER BY lane")
    return await cursor.fetchall()


async def test_a_probe_finds_what_only_writers_would_notice(store: Store, database: str) -> None:
    await store.probe()
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await terminate(database)
        with pytest.raises(StoreUnavailable):
            await store.probe()
        await admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    await store.probe()


async def test_callers_with_little_time_do_not_keep_a_writer_from_the_host_that_answers(
    store: Store, spender: Spender, database: str
) -> None:
    """The first of two hosts takes connections and says nothing, for longer than any caller waits."""
    root = await spender.grant(store)
    found = psycopg.conninfo.conninfo_to_dict(database)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found["host"] = f"127.0.0.1,{found['host']}"
        found["port"] = f"{silent.getsockname()[1]},{found['port']}"
        both = psycopg.conninfo.make_conninfo("", **found, connect_timeout=2)
        writer = LaneWriter(both, store._memory, store.lane_of(root.root_id))
        clock = asyncio.get_running_loop().time
        operation, tried = spender.ask(root), 0
        async with asyncio.timeout(30):
            while True:
                tried += 1
                with contextlib.suppress(StoreUnavailable):
                    await spender.do(writer, operation, deadline=clock() + 0.5)
                    break
    assert tried > 2
    assert await spent(store, root) == 1
    await writer.close()


@WITH_CARE
async def test_a_statement_that_takes_too_long_is_ended_and_saves_nothing(
    store: Store, spender: Spender, root: Grant, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connect._WRITER_SETTINGS, "statement_timeout", "200ms")
    await terminate(database)
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute(
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_sleep(60); RETURN NEW; END'"
        )
        await admin.execute(
            "CREATE TRIGGER dawdle BEFORE INSERT ON entries FOR EACH ROW EXECUTE FUNCTION dawdle()"
        )
        writer = store.writer(store.lane_of(root.root_id))
        with pytest.raises(StoreUnavailable, match="57014") as raised:
            await spender.spend(writer, root)
        assert not raised.value.outcome_unknown
        await admin.execute("DROP TRIGGER dawdle ON entries")
    await spender.spend(writer, root)
    assert await spent(store, root) == 1
