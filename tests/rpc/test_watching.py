"""Following the entries: from any point on, each once, whole operations, and never more than is taken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from peculium.v1 import audit_service_pb2 as audit, types_pb2
from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
from peculium.v1.ledger_service_pb2_grpc import LedgerServiceStub
from peculium_server.core.operations import ByHolder, Grant, Reserve, Spend
from peculium_server.rpc import cursors, watching
from peculium_server.rpc.calls import CALL, Call, CallUnanswered
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.watching import Watching
from peculium_server.store.store import Store
from tests.rpc.messages import message_of
from tests.rpc.test_reads import HOLDER, by_path, delegated, granted, make, new_id, refusal
from tests.rpc.wire import Stored, info_of, storing

Key = tuple[int, int, int]
SUBTREE, TREE = audit.REACH_SUBTREE, audit.REACH_TREE


@pytest.fixture
async def stored(database: str) -> AsyncIterator[Stored]:
    async with storing(database) as running:
        yield running


class Watch:
    """One who follows; what was told so far, and by which cursors."""

    def __init__(self, stored: Stored, **asked: Any) -> None:
        self.call: Any = AuditServiceStub(stored.channel).WatchEntries(
            audit.WatchEntriesRequest(**asked)
        )
        self.entries: list[audit.Entry] = []
        self.cursor = b""

    async def next(self) -> audit.WatchEntriesResponse:
        async with asyncio.timeout(20):
            message = await self.call.read()
        assert isinstance(message, audit.WatchEntriesResponse)
        self.entries += message.entries
        self.cursor = message.cursor
        return message

    async def until(self, count: int) -> list[audit.Entry]:
        """Wait for so many entries; there must not be more, also in what comes next if that is there."""
        while len(self.entries) < count:
            await self.next()
        assert len(self.entries) == count
        return self.entries

    async def end(self) -> None:
        self.call.cancel()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await self.call.read()


@contextlib.asynccontextmanager
async def following(stored: Stored, **asked: Any) -> AsyncIterator[Watch]:
    """Somebody who follows from now on, or as asked; what comes first is no entry."""
    watch = Watch(stored, **asked)
    assert not (await watch.next()).entries
    yield watch
    await watch.end()


def keys(entries: Any) -> list[Key]:
    return [(entry.lane, entry.position, entry.part) for entry in entries]


async def everything(stored: Stored, *roots: Grant) -> list[audit.Entry]:
    """All entries of some trees, as they are listed."""
    stub = AuditServiceStub(stored.channel)
    found: list[audit.Entry] = []
    for root in roots:
        request = audit.ListEntriesRequest(budget=by_path(root.name), reach=TREE, page_size=1000)
        found += (await stub.ListEntries(request)).entries
    return found


def spent(root: Grant, amount: int = 1, *, by: bytes | None = None, **said: Any) -> Spend:
    return Spend(
        operation_id=new_id(),
        root_id=root.root_id,
        budget_id=by or root.root_id,
        authority=ByHolder(),
        amount=amount,
        **said,
    )


async def test_what_is_recorded_from_now_on_is_told_as_it_is_listed(stored: Stored) -> None:
    before = granted("before")
    await make(stored, before)
    async with following(stored) as watch:
        root, other = granted("acme"), granted("other")
        await make(stored, root, delegated(root, root.root_id, "a", "b"), spent(root), other)
        told = await watch.until(6)
    assert len({entry.root_id for entry in told}) == 2
    listed = await everything(stored, root, other)
    assert sorted(told, key=lambda entry: keys([entry])) == sorted(
        listed, key=lambda entry: keys([entry])
    )
    of_root = [entry for entry in told if entry.root_id == root.root_id]
    assert keys(of_root) == sorted(keys(of_root))


async def test_from_the_beginning_everything_is_told(stored: Stored) -> None:
    roots = [granted(f"root-{number}") for number in range(8)]
    await make(stored, *roots, *(spent(root) for root in roots))
    async with following(stored, from_beginning=True) as watch:
        told = await watch.until(16)
    assert sorted(keys(told)) == sorted(keys(await everything(stored, *roots)))


async def test_any_cursor_resumes_behind_what_came_with_it_also_at_another_server(
    stored: Stored, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = granted("acme")
    await make(stored, root, delegated(root, root.root_id, "a", "b"), *(spent(root) for _ in "123"))
    listed = keys(await everything(stored, root))
    # Each operation is a message of its own.
    monkeypatch.setattr(watching, "PAGE_BYTES_MAX", 1)
    async with storing(database) as other:
        async with following(stored, from_beginning=True) as watch:
            cursors_told = [(0, watch.cursor)]
            while len(watch.entries) < len(listed):
                message = await watch.next()
                assert len({entry.position for entry in message.entries}) <= 1
                cursors_told.append((len(watch.entries), message.cursor))
        assert len(cursors_told) == 6
        for count, cursor in cursors_told[:-1]:
            async with following(other, cursor=cursor) as resumed:
                assert keys(await resumed.until(len(listed) - count)) == listed[count:]
        async with following(other, cursor=cursors_told[-1][1]) as resumed:
            await make(stored, spent(root))
            assert [entry.position for entry in await resumed.until(1)] == [6]


async def test_a_cursor_of_one_tree_is_good_for_the_whole_ledger(stored: Stored) -> None:
    root, other = granted("acme"), granted("other")
    await make(stored, root, other)
    async with following(stored, budget=by_path("acme"), reach=TREE) as watch:
        cursor = watch.cursor
    await make(stored, spent(other))
    async with following(stored, cursor=cursor) as watch:
        [entry] = await watch.until(1)
    assert (entry.root_id, entry.kind) == (other.root_id, types_pb2.OPERATION_KIND_SPEND)


async def test_only_what_is_within_reach_is_told_also_of_budgets_that_are_made_later(
    stored: Stored,
) -> None:
    root = granted("acme")
    top = delegated(root, root.root_id, "top")
    await make(stored, root, top)
    top_id = top.children[0].budget_id
    async with (
        following(stored, budget=by_path("acme/top")) as alone,
        following(stored, budget=by_path("acme/top"), reach=SUBTREE) as subtree,
        following(stored, budget=by_path("acme/top"), reach=TREE) as tree,
    ):
        below = delegated(root, top_id, "below")
        below_id = below.children[0].budget_id
        other = granted("other")
        await make(stored, below, other, spent(root, by=below_id), spent(root), spent(other))
        by_budget = [(entry.budget_id, entry.part) for entry in await tree.until(4)]
        assert by_budget == [(top_id, 0), (below_id, 1), (below_id, 0), (root.root_id, 0)]
        by_budget = [(entry.budget_id, entry.part) for entry in await subtree.until(3)]
        assert by_budget == [(top_id, 0), (below_id, 1), (below_id, 0)]
        assert [entry.budget_id for entry in await alone.until(1)] == [top_id]


async def test_only_what_is_selected_is_told(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "HEARTBEAT_SECONDS", 0.0)
    root = granted("acme")
    reserve = Reserve(
        operation_id=new_id(),
        root_id=root.root_id,
        budget_id=root.root_id,
        authority=ByHolder(),
        labels=(("run", "7"), ("team", "x")),
        amount=5,
        ttl_us=60_000_000,
        hold_id=new_id(),
        hold_token_id=bytes(32),
    )
    trace = bytes(range(16))
    traceparent = f"00-{trace.hex()}-{bytes(range(8)).hex()}-01"
    spend = spent(root, labels=(("run", "7"),), reference="call-1")
    await make(stored, root, reserve)
    await LedgerServiceStub(stored.channel).Spend(message_of(spend, HOLDER, traceparent))
    await make(stored, delegated(root, root.root_id, "a"))
    operations = types_pb2.OperationKind
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [1, 2, 3, 4, 4]),
        ({"kinds": [operations.Value("OPERATION_KIND_DELEGATE")]}, [4, 4]),
        ({"kinds": [1, 4]}, [1, 2]),
        ({"principals": ["dev"]}, [1, 2, 3, 4, 4]),
        ({"principals": ["system", "nobody"]}, []),
        ({"operation_id": spend.operation_id}, [3]),
        ({"trace_id": trace}, [3]),
        ({"labels": {"run": "7"}}, [2, 3]),
        ({"labels": {"run": "7", "team": "x"}}, [2]),
        ({"labels": {"run": "8"}}, []),
        ({"hold_id": reserve.hold_id}, [2]),
        ({"reference": "call-1"}, [3]),
        ({"labels": {"run": "7"}, "kinds": [4]}, [2]),
    ]
    for said, positions in cases:
        selected = audit.EntryFilter(**said)
        async with following(stored, from_beginning=True, filter=selected) as watch:
            if positions:
                assert [entry.position for entry in await watch.until(len(positions))] == positions
            else:
                # The heartbeat that comes when all was looked at.
                assert not (await watch.next()).entries


async def test_a_cursor_that_is_none_or_of_another_ledger_is_refused(stored: Stored) -> None:
    root = granted("acme")
    await make(stored, root)
    async with following(stored) as watch:
        cursor = watch.cursor
    incarnation, lanes = stored.store.incarnation, stored.store.lanes
    positions = cursors.read_cursor(cursor, incarnation, lanes + 1)
    ahead = [position + 1 for position in positions]
    damaged = bytearray(cursor)
    damaged[30] ^= 1
    cases = {
        cursor[:-1]: "damaged",
        bytes(damaged): "damaged",
        b"x": "damaged",
        cursors.write_cursor(bytes(16), positions): "another ledger",
        cursors.write_cursor(incarnation, positions[1:]): "another ledger",
        cursors.write_cursor(incarnation, ahead): "ahead of the ledger",
    }
    for wrong, problem in cases.items():
        reason, facts = await refusal(Watch(stored, cursor=wrong).call.read())
        assert (reason, facts["field"]) == ("MALFORMED", "cursor")
        assert problem in facts["problem"]


async def test_what_cannot_be_meant_is_refused(stored: Stored) -> None:
    root = granted("acme")
    await make(stored, root)
    async with following(stored) as watch:
        cursor = watch.cursor
    time = Timestamp(seconds=1)
    from_time = audit.EntryFilter()
    getattr(from_time, "from").CopyFrom(time)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"cursor": cursor, "from_beginning": True}, "from_beginning"),
        ({"reach": SUBTREE}, "reach"),
        ({"budget": by_path("acme"), "reach": 77}, "reach"),
        ({"filter": from_time}, "filter.from"),
        ({"filter": audit.EntryFilter(until=time)}, "filter.until"),
        ({"filter": audit.EntryFilter(kinds=[1, 77])}, "filter.kinds[1]"),  # type: ignore[list-item]
        ({"filter": audit.EntryFilter(kinds=[0])}, "filter.kinds[0]"),  # type: ignore[list-item]
        ({"filter": audit.EntryFilter(trace_id=b"x")}, "filter.trace_id"),
        ({"filter": audit.EntryFilter(hold_id=b"x")}, "filter.hold_id"),
        ({"filter": audit.EntryFilter(operation_id=bytes(17))}, "filter.operation_id"),
    ]
    for asked, field in cases:
        reason, facts = await refusal(Watch(stored, **asked).call.read())
        assert (reason, facts["field"]) == ("MALFORMED", field)
    reason, _ = await refusal(Watch(stored, budget=by_path("nobody")).call.read())
    assert reason == "BUDGET_UNKNOWN"


def polls() -> list[asyncio.Task[Any]]:
    """The tasks that look at the lanes."""
    return [task for task in asyncio.all_tasks() if task.get_name() == "watch"]


async def test_all_who_follow_share_one_poll_which_ends_with_the_last_of_them(
    stored: Stored,
) -> None:
    assert not polls()
    async with following(stored), following(stored) as watch:
        assert len(polls()) == 1
        await make(stored, granted("acme"))
        await watch.until(1)
        assert len(polls()) == 1
    await asyncio.wait(polls(), timeout=20)
    assert not polls()


async def test_no_more_follow_than_the_server_allows(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "WATCHES_MAX", 1)
    async with following(stored):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Watch(stored).call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert info_of(caught.value).reason == "TOO_MANY_WATCHES"
        assert dict(info_of(caught.value).metadata) == {"limit": "1"}
    await asyncio.wait(polls(), timeout=20)
    assert not polls()
    async with following(stored):
        pass


async def test_heartbeats_move_the_cursor_past_what_is_not_selected(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "HEARTBEAT_SECONDS", 0.0)
    root = granted("acme")
    async with following(stored, filter=audit.EntryFilter(principals=["nobody"])) as watch:
        await make(stored, root)
        lane = stored.store.lane_of(root.root_id)
        seen = 0
        while not seen:
            assert not (await watch.next()).entries
            positions = stored.store.lanes + 1
            seen = cursors.read_cursor(watch.cursor, stored.store.incarnation, positions)[lane]
        assert seen == 1


async def test_draining_does_not_wait_for_those_who_follow(stored: Stored) -> None:
    CALL.set(Call("a method", "ab12"))
    service = Watching(Reader(stored.store), stored.store)
    messages = service.watch(audit.WatchEntriesRequest())
    await anext(messages)
    waiting = asyncio.ensure_future(anext(messages))
    await asyncio.sleep(0)
    service.close()
    with pytest.raises(CallUnanswered, match="about to stop"):
        await waiting
    with pytest.raises(CallUnanswered, match="about to stop"):
        await anext(service.watch(audit.WatchEntriesRequest()))


async def test_nothing_is_read_before_what_was_told_is_taken(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_WIDTH_FIRST", 1)
    monkeypatch.setattr(watching, "_SPARSE_ENTRIES", 0)
    root = granted("acme")
    await make(stored, root, *(spent(root) for _ in range(9)))
    reads = 0
    tail = Store.tail

    async def counted(self: Store, *arguments: Any, **named: Any) -> Any:
        nonlocal reads
        reads += 1
        return await tail(self, *arguments, **named)

    monkeypatch.setattr(Store, "tail", counted)
    CALL.set(Call("a method", "ab12"))
    service = Watching(Reader(stored.store), stored.store)
    messages = service.watch(audit.WatchEntriesRequest(from_beginning=True))
    await anext(messages)
    assert reads == 0
    for count in range(1, 10):
        assert len((await anext(messages)).entries) == 1
        assert reads == count
    await messages.aclose()


async def test_an_entry_that_is_not_there_is_not_passed_over(stored: Stored, database: str) -> None:
    root = granted("acme")
    await make(stored, root, spent(root), spent(root))
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as tamperer:
        await tamperer.execute("DELETE FROM entries WHERE position = 2")
    watch = Watch(stored, from_beginning=True)
    await watch.next()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await watch.next()
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_a_database_that_is_gone_ends_the_stream_and_the_next_one_goes_on(
    stored: Stored, database: str
) -> None:
    name = str(conninfo_to_dict(database)["dbname"])
    closing = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    elsewhere = make_conninfo(database, dbname="postgres")
    async with (
        await psycopg.AsyncConnection.connect(elsewhere, autocommit=True) as admin,
        following(stored) as watch,
    ):
        await admin.execute(closing.format(sql.Identifier(name), sql.SQL("false")))
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.until(1)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert info_of(caught.value).reason == "DATABASE_UNAVAILABLE"
        await admin.execute(closing.format(sql.Identifier(name), sql.SQL("true")))
        await make(stored, granted("acme"))
        async with following(stored, cursor=watch.cursor) as resumed:
            await resumed.until(1)
