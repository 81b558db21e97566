"""Statements and usage over the wire: what is asked, told and refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from peculium.v1 import audit_service_pb2 as audit, types_pb2
from peculium.v1.admin_service_pb2_grpc import AdminServiceStub
from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
from peculium.v1.ledger_service_pb2_grpc import LedgerServiceStub
from peculium_server.core.operations import (
    ByHolder,
    ByRole,
    Delegate,
    Grant,
    Spend,
    TopUp,
    Usage,
    Withdraw,
)
from peculium_server.rpc import accounting
from tests.rpc.messages import message_of
from tests.rpc.test_reads import HOLDER, by_path, delegated, granted, make, new_id, refusal
from tests.rpc.wire import Stored, storing

By = audit.UsageGrouping
SUBTREE, TREE = audit.REACH_SUBTREE, audit.REACH_TREE


@pytest.fixture
async def stored(database: str) -> AsyncIterator[Stored]:
    async with storing(database) as running:
        yield running


@pytest.fixture
async def acme(stored: Stored) -> Grant:
    """A root of 1000 with a child "research" of 100, which has a child "run" of 40."""
    root = granted("acme")
    research = delegated(root, root.root_id, "research")
    research = replace(
        research, children=(replace(research.children[0], amount=100, labels=(("team", "r"),)),)
    )
    run = delegated(root, research.children[0].budget_id, "run")
    run = replace(run, children=(replace(run.children[0], amount=40),))
    await make(stored, root, research, run)
    await spend(stored, root, run, 7, usage=Usage(provider="openai", model="m", input_tokens=3))
    await spend(stored, root, research, 5, labels=(("team", "other"),))
    return root


async def spend(stored: Stored, root: Grant, of: Delegate, amount: int, **said: Any) -> None:
    operation = Spend(
        operation_id=new_id(),
        root_id=root.root_id,
        budget_id=of.children[0].budget_id,
        authority=ByHolder(),
        amount=amount,
        **said,
    )
    await LedgerServiceStub(stored.channel).Spend(message_of(operation, HOLDER))


async def statement(stored: Stored, path: str, **asked: Any) -> audit.GetStatementResponse:
    request = audit.GetStatementRequest(budget=by_path(path), **asked)
    return await AuditServiceStub(stored.channel).GetStatement(request)


async def usage(stored: Stored, path: str, *group_by: Any, **asked: Any) -> audit.GetUsageResponse:
    groupings = [
        By(by=By.BY_LABEL, label=each) if isinstance(each, str) else By(by=each)
        for each in group_by
    ]
    request = audit.GetUsageRequest(budget=by_path(path), group_by=groupings, **asked)
    return await AuditServiceStub(stored.channel).GetUsage(request)


async def test_a_subtree_is_stated_as_one_account(stored: Stored, acme: Grant) -> None:
    told = await statement(stored, "acme/research", reach=SUBTREE)
    assert told.opening == types_pb2.Balances()
    assert told.closing == types_pb2.Balances(granted=100, available=88, spent=12)
    assert (told.used_opening, told.used_closing, told.disputed_closing) == (0, 12, 0)
    assert (told.budgets, told.unit) == (2, "calls")
    assert told.ledger.incarnation == stored.store.incarnation
    assert told.ledger.position == 5
    movements = {types_pb2.OperationKind.Name(each.kind): each for each in told.movements}
    spends = movements["OPERATION_KIND_SPEND"]
    assert (spends.operations, spends.entries) == (2, 2)
    assert spends.changes == types_pb2.Balances(available=-12, spent=12)
    # One came from above, and of the other both sides are inside.
    delegates = movements["OPERATION_KIND_DELEGATE"]
    assert (delegates.operations, delegates.entries) == (2, 3)
    assert delegates.changes == types_pb2.Balances(granted=100, available=100)


async def test_a_tree_is_the_subtree_of_its_root_whichever_budget_is_named(
    stored: Stored, acme: Grant
) -> None:
    told = await statement(stored, "acme/research/run", reach=TREE)
    assert told.closing == types_pb2.Balances(granted=1_000, available=988, spent=12)
    assert told.budgets == 3


async def test_a_budget_alone_is_stated_as_it_is(stored: Stored, acme: Grant) -> None:
    told = await statement(stored, "acme/research")
    assert told.closing == types_pb2.Balances(granted=100, available=55, delegated=40, spent=5)
    assert told.budgets == 1


async def test_one_period_closes_where_the_next_one_opens(stored: Stored, acme: Grant) -> None:
    listed = await AuditServiceStub(stored.channel).ListEntries(
        audit.ListEntriesRequest(budget=by_path("acme"), reach=TREE)
    )
    first, *_, last = (entry.at for entry in listed.entries)
    before = await statement(stored, "acme", reach=TREE, until=last)
    after = await statement(stored, "acme", reach=TREE, **{"from": last})
    assert (
        before.closing == after.opening == types_pb2.Balances(granted=1_000, available=993, spent=7)
    )
    assert (getattr(before, "from"), before.until) == (first, last)
    assert getattr(after, "from") == last
    assert last.ToNanoseconds() < after.until.ToNanoseconds()
    assert [movement.operations for movement in after.movements] == [1]


async def test_a_period_without_anything_has_no_movements(stored: Stored, acme: Grant) -> None:
    now = (await statement(stored, "acme")).until
    told = await statement(stored, "acme", reach=TREE, **{"from": now, "until": now})
    assert (
        told.opening == told.closing == types_pb2.Balances(granted=1_000, available=988, spent=12)
    )
    assert not told.movements


async def test_a_sum_that_the_wire_cannot_hold_is_refused(stored: Stored) -> None:
    most = 2**62 - 1
    root = granted("rich", amount=most)
    await make(stored, root)
    stub = AdminServiceStub(stored.channel)
    header: dict[str, Any] = {"root_id": root.root_id, "budget_id": root.root_id}
    for _ in range(3):
        for type_, method in ((Withdraw, stub.Withdraw), (TopUp, stub.TopUp)):
            operation = type_(operation_id=new_id(), authority=ByRole(), amount=most, **header)
            await method(message_of(operation, None))
    reason, facts = await refusal(statement(stored, "rich"))
    assert (reason, facts["balance"]) == ("AMOUNT_OVERFLOW", "granted")


async def test_usage_is_grouped_in_the_order_that_is_asked_for(stored: Stored, acme: Grant) -> None:
    told = await usage(stored, "acme", "team", By.BY_BUDGET, reach=TREE)
    assert [(list(group.keys), group.spent) for group in told.groups] == [
        (["other", "acme/research"], 5),
        (["r", "acme/research/run"], 7),
    ]
    assert (told.total.spent, told.total.operations, told.total.input_tokens) == (12, 2, 3)
    assert (list(told.total.keys), told.unit) == ([], "calls")
    assert told.ledger.position == 5
    turned = await usage(stored, "acme", By.BY_BUDGET, "team", reach=TREE)
    assert [list(group.keys) for group in turned.groups] == [
        ["acme/research", "other"],
        ["acme/research/run", "r"],
    ]


async def test_without_anything_to_group_by_all_is_one_group(stored: Stored, acme: Grant) -> None:
    told = await usage(stored, "acme", reach=TREE)
    assert [group.spent for group in told.groups] == [12]
    assert not (await usage(stored, "acme")).groups


async def test_more_groups_than_there_may_be_are_refused(
    stored: Stored, acme: Grant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "GROUPS_MAX", 1)
    assert len((await usage(stored, "acme", By.BY_DAY, reach=TREE)).groups) == 1
    reason, facts = await refusal(usage(stored, "acme", By.BY_MODEL, reach=TREE))
    assert (reason, facts["field"], facts["limit"]) == ("TOO_LARGE", "group_by", "1")


async def test_groups_that_fit_no_message_are_refused(
    stored: Stored, acme: Grant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "_GROUPS_BYTES_MAX", 100)
    reason, facts = await refusal(usage(stored, "acme", By.BY_MODEL, reach=TREE))
    assert (reason, facts["field"]) == ("TOO_LARGE", "group_by")


async def test_what_cannot_be_meant_is_refused(stored: Stored, acme: Grant) -> None:
    now = (await statement(stored, "acme")).until
    early = type(now)(seconds=1)
    cases: list[tuple[Any, str]] = [
        (statement(stored, "acme", **{"from": now, "until": early}), "until"),
        (statement(stored, "acme", **{"from": type(now)(nanos=-1)}), "from"),
        (usage(stored, "acme", until=type(now)(seconds=2**62)), "until"),
        (usage(stored, "acme", **{"from": now, "until": early}), "until"),
        (statement(stored, "acme", reach=77), "reach"),
        (usage(stored, "acme", By.BY_DAY, 77), "group_by[1].by"),
        (usage(stored, "acme", By.BY_UNSPECIFIED), "group_by[0].by"),
        (usage(stored, "acme", "x" * 65), "group_by[0].label"),
        (usage(stored, "acme", ""), "group_by[0].label"),
        (usage(stored, "acme", "a", By.BY_DAY, "a"), "group_by[2]"),
    ]
    for call, field in cases:
        reason, facts = await refusal(call)
        assert (reason, facts["field"]) == ("MALFORMED", field)
    reason, _ = await refusal(usage(stored, "acme", *(str(number) for number in range(9))))
    assert reason == "TOO_LARGE"
    for asked in (statement(stored, "nobody"), usage(stored, "nobody")):
        assert (await refusal(asked))[0] == "BUDGET_UNKNOWN"
