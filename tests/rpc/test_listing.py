"""What auditors ask of lists and of the past that cannot be meant, and how they are told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from peculium.v1 import audit_service_pb2 as audit, types_pb2
from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
from peculium_server.rpc import listing, pages
from peculium_server.store import lists
from tests.rpc.test_reads import by_path, delegated, granted, make, refusal, reserved
from tests.rpc.wire import Stored, storing

NOW = datetime.now(UTC)
LONG_AGO, LATER = datetime(2000, 1, 1, tzinfo=UTC), NOW + timedelta(days=1)


def stamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def selecting(since: Timestamp | None = None, **said: Any) -> audit.EntryFilter:
    """A filter of entries; `from` is a word of Python's own."""
    message = audit.EntryFilter(**said)
    if since is not None:
        getattr(message, "from").CopyFrom(since)
    return message


def choosing(**said: Any) -> audit.BudgetFilter:
    return audit.BudgetFilter(**said)


@pytest.fixture
async def stored(database: str) -> AsyncIterator[Stored]:
    async with storing(database) as running:
        root = granted("acme")
        child = delegated(root, root.root_id, "a", "b")
        await make(running, root, child, *(reserved(root) for _ in range(3)))
        yield running


BAD_FILTERS: list[tuple[str, audit.EntryFilter]] = [
    ("filter.kinds[1]", selecting(kinds=[4, 99])),
    ("filter.kinds[0]", selecting(kinds=[0])),
    ("filter.principals", selecting(principals=[""])),
    ("filter.principals", selecting(principals=["a\x00b"])),
    ("filter.operation_id", selecting(operation_id=b"short")),
    ("filter.trace_id", selecting(trace_id=bytes(15))),
    ("filter.hold_id", selecting(hold_id=bytes(17))),
    ("filter.labels key", selecting(labels={"": "a"})),
    ("filter.labels value", selecting(labels={"team": "a\x00"})),
    ("filter.reference", selecting(reference="x" * 257)),
    ("filter.until", selecting(since=stamp(NOW), until=stamp(LONG_AGO))),
    ("filter.from", selecting(since=Timestamp(seconds=2**60))),
    ("filter.until", selecting(until=Timestamp(nanos=-1))),
]


@pytest.mark.parametrize(("field", "bad"), BAD_FILTERS, ids=range(len(BAD_FILTERS)))
async def test_a_filter_of_entries_that_cannot_be_meant_is_malformed(
    stored: Stored, field: str, bad: audit.EntryFilter
) -> None:
    request = audit.ListEntriesRequest(budget=by_path("acme"), filter=bad)
    reason, facts = await refusal(AuditServiceStub(stored.channel).ListEntries(request))
    assert (reason, facts["field"]) == ("MALFORMED", field)


BAD_BUDGET_FILTERS: list[tuple[str, audit.BudgetFilter]] = [
    ("filter.states", choosing(states=[9])),
    ("filter.states", choosing(states=[0])),
    ("filter.holder", choosing(holder="a\x00")),
    ("filter.name_prefix", choosing(name_prefix="x" * 129)),
    (
        "filter.created_until",
        choosing(created_from=stamp(NOW), created_until=stamp(LONG_AGO)),
    ),
]


@pytest.mark.parametrize("below", [None, by_path("acme")])
@pytest.mark.parametrize(("field", "bad"), BAD_BUDGET_FILTERS, ids=range(len(BAD_BUDGET_FILTERS)))
async def test_a_filter_of_budgets_that_cannot_be_meant_is_malformed(
    stored: Stored, field: str, bad: audit.BudgetFilter, below: types_pb2.BudgetRef | None
) -> None:
    request = audit.ListBudgetsRequest(below=below, filter=bad)
    reason, facts = await refusal(AuditServiceStub(stored.channel).ListBudgets(request))
    assert (reason, facts["field"]) == ("MALFORMED", field)


async def test_more_labels_or_principals_than_a_filter_may_have_are_too_large(
    stored: Stored,
) -> None:
    stub = AuditServiceStub(stored.channel)
    for selection in (
        selecting(labels={str(number): "" for number in range(17)}),
        selecting(principals=[str(number) for number in range(101)]),
    ):
        request = audit.ListEntriesRequest(budget=by_path("acme"), filter=selection)
        reason, _ = await refusal(stub.ListEntries(request))
        assert reason == "TOO_LARGE"


async def test_a_reach_that_there_is_not_is_malformed(stored: Stored) -> None:
    request = audit.ListEntriesRequest(budget=by_path("acme"))
    setattr(request, "reach", 7)  # noqa: B010 - a number that its type does not have
    reason, facts = await refusal(AuditServiceStub(stored.channel).ListEntries(request))
    assert (reason, facts["field"]) == ("MALFORMED", "reach")


async def test_a_page_token_is_of_one_list_its_reach_its_order_and_its_filter(
    stored: Stored,
) -> None:
    stub = AuditServiceStub(stored.channel)
    asked: dict[str, Any] = {"budget": by_path("acme"), "page_size": 1}
    kinds = selecting(kinds=[4])
    page = await stub.ListEntries(audit.ListEntriesRequest(**asked, filter=kinds))
    token = page.next_page_token
    assert token
    others: tuple[dict[str, Any], ...] = (
        {},
        {"filter": selecting(kinds=[5])},
        {"filter": kinds, "descending": True},
        {"filter": kinds, "reach": audit.REACH_TREE},
        {"filter": kinds, "budget": by_path("acme/a")},
    )
    for other in others:
        request = audit.ListEntriesRequest(**asked | other, page_token=token)
        reason, facts = await refusal(stub.ListEntries(request))
        assert (reason, facts["field"]) == ("MALFORMED", "page_token")
    below: dict[str, Any] = {"below": by_path("acme"), "page_size": 1}
    listed = await stub.ListBudgets(audit.ListBudgetsRequest(**below))
    prefixed = choosing(name_prefix="a")
    others = {"filter": prefixed}, {"below": None}
    for other in others:
        again = audit.ListBudgetsRequest(**below | other, page_token=listed.next_page_token)
        reason, facts = await refusal(stub.ListBudgets(again))
        assert (reason, facts["field"]) == ("MALFORMED", "page_token")


async def test_a_filter_that_selects_nothing_gives_an_empty_page_after_so_much_work(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "KEYS_MAX", 2)
    monkeypatch.setattr(lists, "_WINDOW_MAX", 1)
    stub = AuditServiceStub(stored.channel)
    request = audit.ListEntriesRequest(
        budget=by_path("acme"),
        reach=audit.REACH_TREE,
        page_size=1,
        filter=selecting(labels={"team": "nobody's"}),
    )
    calls = 0
    while True:
        page = await stub.ListEntries(request)
        calls += 1
        assert not page.entries
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert 1 < calls < 10


async def test_roots_are_filtered_by_state_and_name(stored: Stored) -> None:
    await make(stored, granted("beta"), granted("alpha"))
    stub = AuditServiceStub(stored.channel)

    async def names(**said: Any) -> list[str]:
        request = audit.ListBudgetsRequest(filter=audit.BudgetFilter(**said))
        return [budget.name for budget in (await stub.ListBudgets(request)).budgets]

    assert await names() == ["acme", "alpha", "beta"]
    assert await names(name_prefix="a") == ["acme", "alpha"]
    assert await names(states=[types_pb2.BUDGET_STATE_OPEN]) == ["acme", "alpha", "beta"]
    assert await names(states=[types_pb2.BUDGET_STATE_FROZEN]) == []
    assert await names(created_from=stamp(LATER)) == []


@pytest.mark.parametrize("states", [[], [types_pb2.BUDGET_STATE_OPEN]])
async def test_a_page_of_budgets_is_cut_by_the_bytes_that_it_takes(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, states: Any
) -> None:
    root = granted("wide")
    wide = delegated(root, root.root_id, *(number * 32 for number in ("ä", "ö", "ü")))
    # Four bytes a letter, and longer than all else that a budget has.
    labels = tuple((f"key{number:02}", "\U0001f4b0" * 64) for number in range(16))
    wide = replace(wide, children=tuple(replace(each, labels=labels) for each in wide.children))
    await make(stored, root, wide)
    monkeypatch.setattr(listing, "PAGE_BYTES_MAX", 7_000)
    request = audit.ListBudgetsRequest(below=by_path("wide"), filter=choosing(states=states))
    told = []
    while True:
        page = await AuditServiceStub(stored.channel).ListBudgets(request)
        assert sum(budget.ByteSize() for budget in page.budgets) <= 7_000
        told.append([budget.budget_id for budget in page.budgets])
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    first, *others = sorted(child.budget_id for child in wide.children)
    assert told == [[root.root_id, first], *([each] for each in others)]


async def test_a_budget_is_unknown_before_it_was_made(stored: Stored) -> None:
    stub = AuditServiceStub(stored.channel)
    request = audit.GetBudgetRequest(budget=by_path("acme/a"), as_of=stamp(LONG_AGO))
    reason, facts = await refusal(stub.GetBudget(request))
    assert reason == "BUDGET_UNKNOWN"
    assert facts["budget"] == "acme/a"
    assert facts["as_of"] == "2000-01-01T00:00:00.000000Z"
    assert facts["created_at"] > facts["as_of"]


@pytest.mark.parametrize(
    "as_of", [stamp(LATER), Timestamp(seconds=-(2**50))], ids=["tomorrow", "no time at all"]
)
async def test_a_time_that_is_not_over_or_is_none_is_malformed(
    stored: Stored, as_of: Timestamp
) -> None:
    request = audit.GetBudgetRequest(budget=by_path("acme"), as_of=as_of)
    reason, facts = await refusal(AuditServiceStub(stored.channel).GetBudget(request))
    assert (reason, facts["field"]) == ("MALFORMED", "as_of")


async def test_a_subtree_is_summed_up_only_if_that_is_asked_for(stored: Stored) -> None:
    # A tree of its own: what others do to theirs is not summed up here.
    root = granted("unused")
    await make(stored, root)
    stub = AuditServiceStub(stored.channel)
    request = audit.GetBudgetRequest(budget=by_path("unused"))
    assert not (await stub.GetBudget(request)).HasField("used")
    request.sum_subtree = True
    told = await stub.GetBudget(request)
    assert told.HasField("used")
    assert (told.used, told.disputed) == (0, 0)
    assert (told.held, told.holds_live) == (0, 0)


@pytest.mark.parametrize("descending", [False, True])
async def test_an_operation_that_what_is_read_at_once_ends_in_the_middle_of_comes_whole(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, descending: bool
) -> None:
    root = granted("wide")
    wide = [
        delegated(root, root.root_id, *(f"{number}-{name}" for name in "abc"))
        for number in range(6)
    ]
    await make(stored, root, *wide)
    # One operation of four parts, and a half.
    monkeypatch.setattr(lists, "_ENTRIES_AT_ONCE", 6)
    request = audit.ListEntriesRequest(
        budget=by_path("wide"), reach=audit.REACH_TREE, descending=descending, page_size=1_000
    )
    page = await AuditServiceStub(stored.channel).ListEntries(request)
    listed = [(entry.operation_id, entry.part) for entry in page.entries]
    operations = [(root.operation_id, 1), *((each.operation_id, 4) for each in wide)]
    if descending:
        operations.reverse()
    assert listed == [(id_, part) for id_, parts in operations for part in range(parts)]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("most", [1, 3_000, 5_000])
async def test_no_page_ends_within_an_operation_also_where_a_message_is_full(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, descending: bool, most: int
) -> None:
    root = granted("wide")
    wide = [
        delegated(root, root.root_id, *(f"{number}-{name}" for name in "abc"))
        for number in range(4)
    ]
    await make(stored, root, *wide)
    monkeypatch.setattr(pages, "PAGE_BYTES_MAX", most)
    request = audit.ListEntriesRequest(
        budget=by_path("wide"), reach=audit.REACH_TREE, descending=descending
    )
    listed: list[tuple[bytes, int]] = []
    calls = 0
    while True:
        page = await AuditServiceStub(stored.channel).ListEntries(request)
        calls += 1
        listed += [(entry.operation_id, entry.part) for entry in page.entries]
        assert page.entries[-1].part == page.entries[-1].parts - 1
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert calls > 1
    operations = [(root.operation_id, 1), *((each.operation_id, 4) for each in wide)]
    if descending:
        operations.reverse()
    assert listed == [(id_, part) for id_, parts in operations for part in range(parts)]


@pytest.mark.parametrize("reach", [audit.REACH_BUDGET, audit.REACH_SUBTREE, audit.REACH_TREE])
async def test_a_period_has_its_first_instant_and_not_its_last(stored: Stored, reach: Any) -> None:
    stub = AuditServiceStub(stored.channel)
    everything = audit.ListEntriesRequest(budget=by_path("acme"), reach=reach)
    whole = list((await stub.ListEntries(everything)).entries)
    times = sorted({entry.at.ToMicroseconds() for entry in whole})
    first, last = whole[1].at, whole[-1].at
    assert first.ToMicroseconds() < last.ToMicroseconds() == times[-1]
    request = audit.ListEntriesRequest(
        budget=by_path("acme"), reach=reach, filter=selecting(since=first, until=last)
    )
    page = await stub.ListEntries(request)
    assert list(page.entries) == [
        entry
        for entry in whole
        if first.ToMicroseconds() <= entry.at.ToMicroseconds() < last.ToMicroseconds()
    ]
    assert first in [entry.at for entry in page.entries]
