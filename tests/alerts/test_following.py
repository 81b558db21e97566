"""Following alerts: each once and without a gap, from any cursor on, whoever they concern."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from peculium.v1 import audit_service_pb2 as audit, types_pb2
from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
from peculium_server.core.alerts import AlertKind
from peculium_server.rpc import watching
from tests.alerts.watched import Watched
from tests.rpc.wire import storing

FREEZE = AlertKind.FREEZE


@pytest.fixture
async def auditor(database: str) -> AsyncIterator[Any]:
    async with storing(database) as stored:
        yield AuditServiceStub(stored.channel)


async def told(auditor: Any, count: int, **asked: Any) -> tuple[list[int], bytes, int]:
    """The numbers of the next alerts, the cursor behind them, and how many were forgotten before."""
    call = auditor.WatchEntries(audit.WatchEntriesRequest(alerts=True, **asked))
    numbers: list[int] = []
    cursor, forgotten = b"", 0
    async with asyncio.timeout(20):
        while len(numbers) < count:
            message = await call.read()
            numbers += [alert.number for alert in message.alerts]
            cursor, forgotten = message.cursor, forgotten + message.alerts_forgotten
    call.cancel()
    return numbers, cursor, forgotten


def ref(root: bytes, budget: bytes | None = None) -> types_pb2.BudgetRef:
    return types_pb2.BudgetRef(root_id=root, budget_id=budget or root)


async def test_every_alert_is_told_once_from_any_cursor_on_however_few_are_read_at_once(
    watched: Watched, auditor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_ALERTS_AT_ONCE", 2)
    root = await watched.fleet.root(100)
    await watched.rule(root, kind=FREEZE)
    for _ in range(5):
        await watched.freeze(root)
    await watched.look()
    numbers, cursor, _ = await told(auditor, 5, from_beginning=True)
    assert numbers == [1, 2, 3, 4, 5]
    following = asyncio.ensure_future(told(auditor, 2, cursor=cursor))
    for _ in range(2):
        await watched.freeze(root)
        await watched.look()
    assert (await following)[0] == [6, 7]
    assert (await told(auditor, 2, cursor=cursor))[0] == [6, 7]


async def test_a_cursor_of_a_watch_without_alerts_goes_on_with_those_that_came_after_it(
    watched: Watched, auditor: Any
) -> None:
    root = await watched.fleet.root(100)
    await watched.rule(root, kind=FREEZE)
    await watched.freeze(root)
    await watched.look()
    call = auditor.WatchEntries(audit.WatchEntriesRequest(from_beginning=True))
    message = await call.read()
    entries = 0
    while entries < 2:
        message = await call.read()
        assert not message.alerts
        entries += len(message.entries)
    call.cancel()
    await watched.freeze(root)
    await watched.look()
    assert (await told(auditor, 1, cursor=message.cursor))[0] == [2]


async def test_alerts_of_other_budgets_are_passed_over(watched: Watched, auditor: Any) -> None:
    root, elsewhere = [await watched.fleet.root(100) for _ in range(2)]
    child = await watched.child(root, 50)
    for budget in (root, child):
        await watched.rule(root, budget, FREEZE)
    await watched.rule(elsewhere, kind=FREEZE)
    await watched.freeze(elsewhere)
    await watched.freeze(root, child)
    await watched.look()
    numbered = await watched.numbered()
    of = {
        name: [each.number for each in numbered if each.alert.budget_id in budgets]
        for name, budgets in {"child": {child}, "root": {root}, "tree": {root, child}}.items()
    }
    for budget, reach, wanted in (
        (child, audit.REACH_BUDGET, of["child"]),
        (child, audit.REACH_SUBTREE, of["child"]),
        (root, audit.REACH_BUDGET, of["root"]),
        (root, audit.REACH_SUBTREE, of["tree"]),
        (child, audit.REACH_TREE, of["tree"]),
    ):
        asked = {"budget": ref(root, budget), "reach": reach, "from_beginning": True}
        assert (await told(auditor, len(wanted), **asked))[0] == wanted
    page = await auditor.ListAlerts(audit.ListAlertsRequest(budget=ref(root, child)))
    assert [alert.number for alert in page.alerts] == of["child"]


@pytest.mark.parametrize("kept", [[4, 5], []])
async def test_who_comes_too_late_is_told_how_many_are_kept_no_longer(
    watched: Watched, auditor: Any, database: str, kept: list[int]
) -> None:
    root = await watched.fleet.root(100)
    await watched.rule(root, kind=FREEZE)
    call = auditor.WatchEntries(audit.WatchEntriesRequest())
    cursor = (await call.read()).cursor
    call.cancel()
    for _ in range(5):
        await watched.freeze(root)
    await watched.look()
    with psycopg.connect(database) as connection:
        connection.execute("DELETE FROM alerts WHERE number <= %s", [5 - len(kept)])
    following = asyncio.ensure_future(told(auditor, len(kept) + 1, cursor=cursor))
    await watched.freeze(root)
    await watched.look()
    numbers, _, forgotten = await following
    assert numbers == [*kept, 6]
    assert forgotten == 5 - len(kept)


@pytest.mark.parametrize("descending", [False, True])
async def test_alerts_are_listed_in_pages(
    watched: Watched, auditor: Any, *, descending: bool
) -> None:
    root = await watched.fleet.root(100)
    await watched.rule(root, kind=FREEZE)
    for _ in range(5):
        await watched.freeze(root)
    await watched.look()
    request = audit.ListAlertsRequest(page_size=2, descending=descending)
    listed = []
    while True:
        page = await auditor.ListAlerts(request)
        assert len(page.alerts) <= 2
        listed += [alert.number for alert in page.alerts]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert listed == ([5, 4, 3, 2, 1] if descending else [1, 2, 3, 4, 5])
