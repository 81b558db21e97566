"""What is read outside of a lane's transaction: paths, lists, pages and snapshots."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest

from peculium_server.core.operations import ByHolder
from peculium_server.core.selection import Period, Selection
from peculium_server.core.state import GENESIS, Budget, Entry, Hold
from peculium_server.store import lists, snapshot as snapshot_module
from peculium_server.store.accounts import Account
from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.history import line_at, makings, used_at
from peculium_server.store.lists import (
    BudgetSelection,
    Reach,
    list_budgets,
    list_entries,
    list_roots,
)
from peculium_server.store.store import Found, Page, Store
from tests.core.ledger import HoldRef, Node
from tests.store.spender import Spender
from tests.store.stored import StoredLedger

EVERY_BUDGET, EVERY_ENTRY, EVER = BudgetSelection(), Selection(), Period()


@pytest.fixture
async def root(ledger: StoredLedger) -> Node:
    return await ledger.root(10_000, name="acme", holder="ops", by_token=False)


async def pages(ask: Callable[[Any], Any]) -> list[tuple[Any, ...]]:
    """All pages of a list."""
    page: Page[Any, Any] = await ask(None)
    found = [page.rows]
    while page.next is not None:
        page = await ask(page.next)
        found.append(page.rows)
    return found


async def collected(rows: AsyncIterator[Any]) -> list[Any]:
    return [row async for row in rows]


async def test_a_path_leads_to_a_budget(ledger: StoredLedger, root: Node) -> None:
    research = await ledger.below(root, 100, name="research")
    run = await ledger.below(research, 10, name="run-7 ünïcode %")
    find = ledger.store.find
    assert await find("acme") == Found(root.root_id, root.id)
    assert await find("acme/research") == Found(root.root_id, research.id)
    assert await find("acme/research/run-7 ünïcode %") == Found(root.root_id, run.id)
    for path in ("", "/", "acme/", "Acme", "acme/run-7", "acme/research/x", "research", "a/" * 20):
        assert await find(path) is None


async def test_a_budget_comes_with_its_ancestors_upwards(ledger: StoredLedger, root: Node) -> None:
    child = await ledger.below(root, 100)
    grandchild = await ledger.below(child, 10)
    await ledger.below(child, 10)
    line = await ledger.store.budget(root.root_id, grandchild.id)
    assert line == (grandchild.budget, child.budget, root.budget)
    assert await ledger.store.budget(root.root_id, root.id) == (root.budget,)
    assert await ledger.store.budget(root.root_id, ledger.id()) == ()
    assert await ledger.store.budget(ledger.id(), root.id) == ()


async def test_roots_are_listed_by_the_bytes_of_their_names(store: Store, spender: Spender) -> None:
    names = ["a", "B", "b", "ä", "a b", "a0"]
    for name in names:
        grant = spender.ids.ask_grant(1, name=name)
        await spender.do(store.writer(store.lane_of(grant.root_id)), grant)
    expected = sorted(names, key=str.encode)
    for limit in (1, 2, 6, 7):
        found = await pages(lambda after: list_roots(store, EVERY_BUDGET, limit=limit, after=after))  # noqa: B023
        assert [budget.name for rows in found for budget in rows] == expected
        assert {len(rows) for rows in found[:-1]} <= {limit}


async def test_the_top_is_listed_first_and_descendants_by_id(
    ledger: StoredLedger, root: Node
) -> None:
    children = [await ledger.below(root, 100, name=name) for name in ("c", "a", "b")]
    below = [await ledger.below(children[0], 1) for _ in range(3)]
    await ledger.accept(children[1].return_all())
    store = ledger.store
    found = await pages(
        lambda after: list_budgets(store, root.budget, EVERY_BUDGET, limit=4, after=after)
    )
    assert [budget for rows in found for budget in rows] == [
        root.budget,
        *sorted((node.budget for node in (*children, *below)), key=lambda each: each.budget_id),
    ]
    page = await list_budgets(store, children[0].budget, EVERY_BUDGET, limit=10)
    top, *rest = page.rows
    assert top == children[0].budget
    assert {budget.budget_id for budget in rest} == {node.id for node in below}
    assert page.next is None


async def test_a_page_that_has_the_top_alone_is_followed_by_all_that_is_below(
    ledger: StoredLedger, root: Node
) -> None:
    below = [await ledger.below(root, 1) for _ in range(2)]
    store = ledger.store
    found = await pages(
        lambda after: list_budgets(store, root.budget, EVERY_BUDGET, limit=1, after=after)
    )
    listed = [budget.budget_id for rows in found for budget in rows]
    assert listed == [root.id, *sorted(node.id for node in below)]


async def test_a_tree_that_is_listed_while_money_moves_in_it_adds_up(
    ledger: StoredLedger, root: Node
) -> None:
    child = await ledger.below(root, 10)
    store = ledger.store
    moving = asyncio.create_task(_move(ledger, root, child))
    try:
        for _ in range(200):
            page = await list_budgets(store, root.budget, EVERY_BUDGET, limit=10)
            top, below = page.rows
            assert top.money.delegated == below.money.granted
    finally:
        moving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await moving


async def _move(ledger: StoredLedger, root: Node, child: Node) -> None:
    while True:
        await ledger.accept(root.fund(child, 5))
        await ledger.accept(child.give_back(5))


async def test_a_page_that_ends_with_the_list_has_no_next(ledger: StoredLedger, root: Node) -> None:
    reserves = [root.reserve(1, authority=ByHolder()) for _ in range(2)]
    await ledger.accept(*reserves)
    page = await ledger.store.list_holds(root.root_id, root.id, limit=2)
    assert len(page.rows) == 2
    assert page.next is None


async def test_holds_are_listed_while_they_can_be_settled(ledger: StoredLedger, root: Node) -> None:
    reserves = [root.reserve(1, authority=ByHolder()) for _ in range(5)]
    await ledger.accept(*reserves)
    holds = [HoldRef(root, reserve.hold_id) for reserve in reserves]
    await ledger.accept(holds[1].release())
    store = ledger.store
    found = await pages(lambda after: store.list_holds(root.root_id, root.id, limit=3, after=after))
    assert [hold for rows in found for hold in rows] == [
        hold.hold for hold in holds if hold is not holds[1]
    ]
    everything = await store.list_holds(root.root_id, root.id, ended=True, limit=9)
    assert everything.rows == tuple(hold.hold for hold in holds)
    assert (await store.list_holds(root.root_id, ledger.id(), limit=9)).rows == ()


async def test_a_budgets_entries_are_listed_by_seq_in_both_directions(
    ledger: StoredLedger, root: Node
) -> None:
    await ledger.accept(*[root.spend(1) for _ in range(150)])
    child = await ledger.below(root, 1)
    mine = [entry for entry in ledger.journal if entry.budget_id == root.id]
    assert [entry.seq for entry in mine] == list(range(1, 153))
    store = ledger.store
    for limit in (1_000, 152, 64, 50):
        for descending in (False, True):
            found = await pages(
                lambda after: list_entries(
                    store,
                    root.budget,
                    Reach.BUDGET,
                    EVERY_ENTRY,
                    EVER,
                    limit=limit,  # noqa: B023
                    after=after,
                    descending=descending,  # noqa: B023
                )
            )
            listed = [entry for rows in found for entry in rows]
            assert listed == (mine[::-1] if descending else mine)
    page = await list_entries(store, child.budget, Reach.BUDGET, EVERY_ENTRY, EVER, limit=5)
    [first] = page.rows
    assert first.previous_hash == GENESIS


async def test_a_trees_entries_are_listed_by_whole_operations(
    store: Store, ledger: StoredLedger, root: Node
) -> None:
    lane = store.lane_of(root.root_id)
    children = [await ledger.below(root, 100) for _ in range(3)]
    delegate = root.delegate(*[root.spec(1) for _ in range(8)])
    await ledger.accept(*[child.spend(1) for child in children], delegate)
    other = StoredLedger(store)
    grant = other.ask_grant(100)
    while store.lane_of(grant.root_id) != lane:
        grant = other.ask_grant(100)
    other.position = ledger.position
    await other.accept(grant)
    neighbour = Node(other, grant.root_id, grant.root_id)
    await other.accept(neighbour.spend(1))
    ledger.position = other.position
    await ledger.accept(children[0].spend(2))
    for limit in (1, 3, 100):
        for descending in (False, True):
            found = await pages(
                lambda after: list_entries(
                    store,
                    root.budget,
                    Reach.TREE,
                    EVERY_ENTRY,
                    EVER,
                    limit=limit,  # noqa: B023
                    after=after,
                    descending=descending,  # noqa: B023
                )
            )
            operations = [list(dict.fromkeys(entry.position for entry in rows)) for rows in found]
            assert max(map(len, operations)) <= limit
            positions = [position for page in operations for position in page]
            assert positions == sorted(set(positions), reverse=descending)
            listed = [entry for rows in found for entry in rows]
            assert sorted(listed, key=_order) == sorted(ledger.journal, key=_order)
            by_operation: dict[int, list[int]] = {}
            for entry in listed:
                by_operation.setdefault(entry.position, []).append(entry.part)
            assert all(parts == list(range(len(parts))) for parts in by_operation.values())


def _order(entry: Entry) -> tuple[int, int]:
    return entry.position, entry.part


async def test_a_snapshot_shows_one_instant_however_long_it_is_read(
    ledger: StoredLedger, root: Node
) -> None:
    reserve = root.reserve(5)
    await ledger.accept(reserve, root.spend(1))
    child = await ledger.below(root, 10)
    journal = list(ledger.journal)
    budgets = {budget.budget_id: budget for budget in ledger.trees[root.root_id].known_budgets()}
    hold = HoldRef(root, reserve.hold_id)
    before: Hold = hold.hold
    async with ledger.store.snapshot() as snapshot:
        await ledger.accept(hold.settle(3), child.spend(1))
        assert {each.root_id for each in await collected(snapshot.lying(None))} == {root.root_id}
        entries: list[Entry] = await collected(snapshot.entries_in_order(root.root_id))
        found: list[Budget] = await collected(snapshot.budgets_of(root.root_id))
        assert await collected(snapshot.holds_of(root.root_id)) == [before]
        assert abs(ledger.now - snapshot.now) < 60_000_000
    assert [entry._replace(previous_hash=b"") for entry in journal] == entries
    assert {budget.budget_id: budget for budget in found} == budgets
    assert await ledger.verified(root.root_id) is None


async def test_a_stream_that_is_left_early_leaves_a_usable_store(
    ledger: StoredLedger, root: Node
) -> None:
    for _ in range(6):
        await ledger.accept(*[root.spend(1) for _ in range(250)])
    for _ in range(6):
        async with ledger.store.snapshot() as snapshot:
            async for entry in snapshot.entries_in_order(root.root_id):
                assert entry.seq == 1
                break
    assert await ledger.verified(root.root_id) is None


@pytest.mark.parametrize("window", [1, 2, 3, 100])
async def test_a_snapshot_tells_a_lane_in_any_windows_each_operation_once(
    ledger: StoredLedger, root: Node, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_module, "_WINDOW", window)
    await ledger.below(root)
    await ledger.accept(*[root.spend(1) for _ in range(4)])
    lane = ledger.store.lane_of(root.root_id)
    journal = [entry._replace(previous_hash=b"") for entry in ledger.journal]
    async with ledger.store.snapshot() as snapshot:
        for root_id in (None, root.root_id):
            told = snapshot.entries_between(lane, after=1, until=5, root_id=root_id)
            between = [entry for entry in journal if 1 < entry.position <= 5]
            assert await collected(told) == between


async def test_a_page_that_has_looked_at_enough_ends_though_nothing_is_selected(
    ledger: StoredLedger, root: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "KEYS_MAX", 3)
    monkeypatch.setattr(lists, "_WINDOW_MAX", 1)
    for _ in range(5):
        await ledger.below(root, 1)
    nobody = BudgetSelection(holder="nobody")
    page = await list_budgets(ledger.store, root.budget, nobody, limit=1)
    assert page.rows == ()
    assert page.next is not None


async def test_what_is_summed_up_takes_no_longer_than_its_caller_waits(
    ledger: StoredLedger, root: Node
) -> None:
    async with ledger.store.accounts(root.root_id, seconds_max=1.25) as accounts:
        shown = await accounts._connection.execute("SHOW statement_timeout")
        assert await shown.fetchone() == ("1250ms",)


async def test_bytes_that_are_no_entry_are_shown_to_the_verifier_and_refused_to_readers(
    ledger: StoredLedger, root: Node, database: str
) -> None:
    await ledger.accept(root.spend(1))
    async with await psycopg.AsyncConnection.connect(database) as tamperer:
        await tamperer.execute(r"UPDATE entries SET effect = '\xff', kind = 99 WHERE seq = 2")
    finding = await ledger.verified(root.root_id)
    assert finding is not None
    assert (finding.budget_id, finding.seq) == (root.id, 2)
    with pytest.raises(LedgerCorrupt, match="entry 2"):
        await list_entries(ledger.store, root.budget, Reach.BUDGET, EVERY_ENTRY, EVER, limit=5)


async def test_sums_of_what_an_unreadable_effect_says_are_refused(
    ledger: StoredLedger, root: Node, database: str
) -> None:
    await ledger.accept(root.spend(1))
    at = ledger.now
    await ledger.accept(root.spend(1))
    async with await psycopg.AsyncConnection.connect(database) as tamperer:
        await tamperer.execute(r"UPDATE entries SET effect = '\xff' WHERE seq = 2")
    with pytest.raises(LedgerCorrupt, match=root.id.hex()):
        await used_at(ledger.store, root.root_id, root.id, at)
    account = Account(root.root_id, root.id, subtree=False)
    with pytest.raises(LedgerCorrupt, match=root.id.hex()):
        async with ledger.store.accounts(root.root_id, seconds_max=30) as accounts:
            await accounts.totals(account, Period(None, at + 1))


@pytest.mark.parametrize("taken", ["position = 1", "position = 2 AND part = 0"])
async def test_a_budget_whose_making_is_not_recorded_any_more_is_told_by_nobody(
    ledger: StoredLedger, root: Node, database: str, taken: str
) -> None:
    child = await ledger.below(root)
    await ledger.accept(child.spend(1))
    async with await psycopg.AsyncConnection.connect(database) as tamperer:
        await tamperer.execute(f"DELETE FROM entries WHERE {taken}".encode())  # noqa: S608
    with pytest.raises(LedgerCorrupt):
        await makings(ledger.store, root.root_id, [root.id, child.id])


async def test_a_line_of_which_an_ancestor_has_no_entry_is_not_told(
    ledger: StoredLedger, root: Node, database: str
) -> None:
    child = await ledger.below(root)
    line = await ledger.store.budget(root.root_id, child.id)
    assert [budget.seq for budget in await line_at(ledger.store, line, ledger.now)] == [1, 2]
    async with await psycopg.AsyncConnection.connect(database) as tamperer:
        await tamperer.execute("DELETE FROM entries WHERE budget_id = root_id")
    with pytest.raises(LedgerCorrupt, match="no entry by then"):
        await line_at(ledger.store, line, ledger.now)


async def test_where_a_lane_stands_is_told_with_the_time(ledger: StoredLedger, root: Node) -> None:
    lane = ledger.store.lane_of(root.root_id)
    first = await ledger.store.standing(lane)
    await ledger.accept(root.spend(1))
    second = await ledger.store.standing(lane)
    assert (first.position, second.position) == (1, 2)
    assert first.now < second.now
    assert ledger.now < second.now
