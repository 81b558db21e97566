"""Following the ledger: the client goes on by itself where a stream was cut, and never where it was refused."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any, cast

import grpc
import pytest

import peculium
from peculium import EntryFilter, LedgerUnavailable, Reach, _aio_sender, _sync_sender
from peculium._retry import delay_before
from peculium.errors import Malformed
from peculium.v1 import audit_service_pb2 as audit, audit_service_pb2_grpc
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.lanes.answers import Unanswered, Unavailability
from peculium_server.rpc import status

CUT = status.of_unanswered(Unanswered(Unavailability.DRAINING, {}, 1))
DAMAGED = status.of_refused(Refused(Refusal.MALFORMED, {"field": "cursor", "problem": "damaged"}))


@dataclass
class Script:
    """A ledger that tells what a test says: of each call its cursors, and how it ends."""

    calls: deque[tuple[list[bytes], Any]] = field(default_factory=deque)
    asked: list[audit.WatchEntriesRequest] = field(default_factory=list)
    sums: list[tuple[str, float]] = field(default_factory=list)
    """Of each call for a sum: of which budget, and how many seconds it might take."""

    def WatchEntries(  # noqa: N802 - the wire's name
        self, request: audit.WatchEntriesRequest, context: Any
    ) -> Iterator[audit.WatchEntriesResponse]:
        self.asked.append(request)
        cursors, end = self.calls.popleft()
        for cursor in cursors:
            entry = audit.Entry(position=len(cursor))
            yield audit.WatchEntriesResponse(cursor=cursor, entries=[entry])
        if end is not None:
            context.abort_with_status(end)

    def GetStatement(  # noqa: N802 - the wire's name
        self, request: audit.GetStatementRequest, context: Any
    ) -> audit.GetStatementResponse:
        self.sums.append((request.budget.path, context.time_remaining()))
        return audit.GetStatementResponse()

    def GetUsage(  # noqa: N802 - the wire's name
        self, request: audit.GetUsageRequest, context: Any
    ) -> audit.GetUsageResponse:
        self.sums.append((request.budget.path, context.time_remaining()))
        return audit.GetUsageResponse()


class _Rest:
    """The rest of the service, which nobody asks for."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def __getattr__(self, name: str) -> Any:
        return getattr(self._script, name, None)


@pytest.fixture
def script() -> Script:
    return Script()


@contextmanager
def served(script: Script) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    audit_service_pb2_grpc.add_AuditServiceServicer_to_server(cast("Any", _Rest(script)), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture
def target(script: Script) -> Iterator[str]:
    with served(script) as address:
        yield address


async def test_a_stream_that_was_cut_goes_on_behind_the_last_cursor(
    script: Script, target: str
) -> None:
    script.calls += [([b"a", b"ab"], CUT), ([], CUT), ([b"abc"], None), ([b"abcd"], CUT)]
    told = []
    async with peculium.aio.connect(target) as client:
        async for watched in client.audit.watch(from_beginning=True, cursor=None):
            told.append((watched.cursor, [entry.position for entry in watched.entries]))
            if len(told) == 4:
                break
    assert told == [(b"a", [1]), (b"ab", [2]), (b"abc", [3]), (b"abcd", [4])]
    assert [request.cursor for request in script.asked] == [b"", b"ab", b"ab", b"abc"]


def test_the_blocking_client_goes_on_likewise(script: Script, target: str) -> None:
    script.calls += [([b"a", b"ab"], CUT), ([], CUT), ([b"abc"], None), ([b"abcd"], CUT)]
    with peculium.connect(target) as client:
        told = [watched.cursor for watched in islice(client.audit.watch(), 4)]
    assert told == [b"a", b"ab", b"abc", b"abcd"]
    assert [request.cursor for request in script.asked] == [b"", b"ab", b"ab", b"abc"]


async def test_what_goes_on_with_a_cursor_does_not_begin_at_the_beginning(
    script: Script, target: str
) -> None:
    script.calls += [([b"a"], CUT), ([b"ab"], CUT)]
    async with peculium.aio.connect(target) as client:
        watching = client.audit.watch(from_beginning=True)
        await anext(watching)
        await anext(watching)
        await watching.aclose()  # type: ignore[attr-defined]
    assert [request.from_beginning for request in script.asked] == [True, False]


async def test_what_is_refused_is_not_asked_again(script: Script, target: str) -> None:
    script.calls += [([b"a"], CUT), ([], DAMAGED)]
    async with peculium.aio.connect(target) as client:
        with pytest.raises(Malformed, match="damaged"):
            async for _ in client.audit.watch():
                pass
    assert len(script.asked) == 2


def test_what_is_refused_is_not_asked_again_by_the_blocking_client(
    script: Script, target: str
) -> None:
    script.calls += [([], DAMAGED)]
    with peculium.connect(target) as client, pytest.raises(Malformed, match="damaged"):
        next(client.audit.watch())
    assert len(script.asked) == 1


async def test_how_long_it_was_away_is_counted_from_the_last_answer(
    script: Script, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[int] = []

    def noted(attempt: int, *said: Any) -> float | None:
        failures.append(attempt)
        return delay_before(attempt, *said)

    for sender in (_aio_sender, _sync_sender):
        monkeypatch.setattr(sender, "delay_before", noted)
    calls = [([b"a"], CUT), ([], CUT), ([b"ab"], CUT), ([b"abc"], CUT)]
    script.calls += calls
    async with peculium.aio.connect(target) as client:
        watching = client.audit.watch(timeout=60)
        assert [(await anext(watching)).cursor for _ in range(3)] == [b"a", b"ab", b"abc"]
        await watching.aclose()  # type: ignore[attr-defined]
    assert failures == [1, 2, 1]
    failures.clear()
    script.calls.clear()
    script.calls += calls
    with peculium.connect(target) as blocking:
        assert len(list(islice(blocking.audit.watch(timeout=60), 3))) == 3
    assert failures == [1, 2, 1]


async def test_a_ledger_is_not_waited_for_longer_than_it_may_be_away(script: Script) -> None:
    with served(script) as gone:
        pass
    async with peculium.aio.connect(gone) as client:
        with pytest.raises(LedgerUnavailable):
            await anext(client.audit.watch(timeout=0.05))
    with peculium.connect(gone) as blocking, pytest.raises(LedgerUnavailable):
        next(blocking.audit.watch(timeout=0.05))


async def test_what_is_followed_is_asked_for_as_it_was_said(script: Script, target: str) -> None:
    script.calls += [([b"a"], CUT)]
    selected = EntryFilter(
        kinds=["SETTLE", "LAPSE"],
        principals=["svc"],
        operation_id="0192f0c1-0000-7000-8000-000000000001",
        trace_id="0f" * 16,
        labels={"run": "7"},
        since=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        hold_id=bytes(16),
        reference="call-1",
    )
    async with peculium.aio.connect(target) as client:
        watching = client.audit.watch("acme/run", reach=Reach.TREE, selected=selected, cursor=b"c")
        await anext(watching)
        await watching.aclose()  # type: ignore[attr-defined]
    [request] = script.asked
    assert (request.budget.path, request.reach) == ("acme/run", audit.REACH_TREE)
    assert request.cursor == b"c"
    asked = request.filter
    assert list(asked.kinds) == [5, 19]
    assert asked.operation_id == bytes.fromhex("0192f0c1000070008000000000000001")
    assert (asked.trace_id, dict(asked.labels)) == (b"\x0f" * 16, {"run": "7"})
    assert getattr(asked, "from").ToDatetime(UTC) == selected.since
    assert not asked.HasField("until")
    assert (asked.hold_id, asked.reference) == (bytes(16), "call-1")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"kinds": ["SPENT"]}, "kinds"),
        ({"operation_id": "7"}, "operation_id"),
        ({"trace_id": "x"}, "trace_id"),
        ({"until": datetime(2026, 1, 2)}, "until"),  # noqa: DTZ001 - that is what is wrong
    ],
)
async def test_a_filter_that_cannot_be_meant_costs_no_call(
    script: Script, target: str, wrong: dict[str, Any], field: str
) -> None:
    async with peculium.aio.connect(target) as client:
        with pytest.raises(Malformed) as caught:
            await anext(client.audit.watch(selected=EntryFilter(**wrong)))
        assert caught.value.facts["field"] == field
        for by in (["week"], "day"):
            with pytest.raises(Malformed):
                await client.audit.usage("acme", by)
    assert not script.asked


async def test_a_sum_may_take_all_the_time_that_there_is(script: Script, target: str) -> None:
    async with peculium.aio.connect(target) as client:
        await client.audit.statement("acme", timeout=1_000)
        await client.audit.usage("acme", timeout=1_000)
    with peculium.connect(target) as blocking:
        blocking.audit.statement("acme", timeout=1_000)
        blocking.audit.usage("acme", timeout=1_000)
    # One attempt of another call counts as lost after seconds.
    assert [path for path, _ in script.sums] == ["acme"] * 4
    assert min(seconds for _, seconds in script.sums) > 500
