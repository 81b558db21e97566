"""The views say of a ledger what it is, in words and numbers."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row

from peculium_server.core.operations import Kind
from peculium_server.core.selection import Period, Selection
from peculium_server.core.state import Balances, Budget, BudgetState, Custody, Entry
from peculium_server.store.lists import (
    BudgetSelection,
    Reach,
    list_budgets,
    list_entries,
    list_roots,
)
from peculium_server.store.store import Store
from tests.audit_sql.conftest import Lived
from tests.audit_sql.filling import fill, instant
from tests.audit_sql.test_decoder import fingerprint, told_effect, told_request
from tests.core.ledger import Ledger, requested

MONEY = Balances._fields
TOKENS = ("input_tokens", "output_tokens", "cached_tokens")
SUMMED = ("operations", "spent", "forfeited", "estimated", *TOKENS)
BOOKING = {Kind.SETTLE, Kind.SPEND, Kind.RESOLVE}

Row = dict[str, Any]


@pytest.fixture
async def store(lived: Lived) -> AsyncIterator[Store]:
    """A server's."""
    opened = await Store.open(lived.dsn)
    yield opened
    await opened.close()


def rows(auditor: psycopg.Connection, query: str, *values: Any) -> list[Row]:
    """What an auditor is answered."""
    cursor = auditor.cursor(row_factory=dict_row)
    return cursor.execute(query.encode(), values).fetchall()


def uuid(id_: bytes) -> UUID:
    return UUID(bytes=id_)


def when(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else instant(microseconds)


def known_budgets(lived: Lived) -> dict[bytes, Budget]:
    return {
        budget.budget_id: budget
        for tree in lived.ledger.trees.values()
        for budget in tree.known_budgets()
    }


def line(budgets: dict[bytes, Budget], budget: Budget) -> list[Budget]:
    """From the root to the budget."""
    return [*(budgets[above] for above in reversed(budget.ancestors)), budget]


def path(budgets: dict[bytes, Budget], budget: Budget) -> str:
    return "/".join(each.name for each in line(budgets, budget))


def changed(entry: Entry) -> Row:
    return {f"{name}_change": value for name, value in entry.effect.changes._asdict().items()}


# -- Budgets and holds ----------------------------------------------------------------------------------


async def test_budgets_are_as_the_server_reads_them(
    lived: Lived, auditor: psycopg.Connection, store: Store
) -> None:
    told = {row["path"]: row for row in rows(auditor, "SELECT * FROM audit.budgets")}
    seen = 0
    for root in (await list_roots(store, BudgetSelection(), limit=100)).rows:
        page = await list_budgets(store, root, BudgetSelection(), limit=1_000)
        budgets = {budget.budget_id: budget for budget in page.rows}
        for budget in page.rows:
            row = told[path(budgets, budget)]
            now = (await store.standing(0)).now
            state = max(each.state(now) for each in line(budgets, budget))
            assert row == {
                "root": root.name,
                "path": path(budgets, budget),
                "lane": store.lane_of(root.root_id),
                "root_id": uuid(root.root_id),
                "budget_id": uuid(budget.budget_id),
                "parent_id": budget.parent_id and uuid(budget.parent_id),
                "ancestors": [uuid(above) for above in budget.ancestors],
                "depth": len(budget.ancestors),
                "name": budget.name,
                "unit": budget.unit,
                "state": state.name,
                "closed": budget.closed,
                "frozen": budget.frozen,
                "disputes": budget.disputes,
                "disputed": budget.disputed,
                "custody": budget.custody.name,
                "holder": budget.holder,
                **budget.money._asdict(),
                "holds_live": budget.holds_live,
                "overrun_factor": budget.overrun_factor,
                "lease_until": when(budget.lease_until),
                "lease_latest": when(budget.lease_latest),
                "labels": dict(budget.labels),
                "created_at": when(budget.created_at),
                "last_at": when(budget.last_at),
                "seq": budget.seq,
                "version": budget.version,
                "head": budget.head,
            }
            seen += 1
    assert len(told) == seen > 10
    assert {row["custody"] for row in told.values()} == {custody.name for custody in Custody}


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ("closed = true, frozen = true", BudgetState.CLOSED),
        ("lease_until = now() - interval '1s', lease_latest = now()", BudgetState.EXPIRED),
        (
            "lease_until = now() + interval '1h', lease_latest = now() + interval '1h'",
            BudgetState.OPEN,
        ),
        ("frozen = true", BudgetState.FROZEN),
        ("disputes = 1", BudgetState.FROZEN),
    ],
)
def test_a_state_considers_all_above_and_the_clock(
    change: str, state: BudgetState, database: str
) -> None:
    ledger = Ledger()
    ledger.grant(100).child(50).child(20)
    fill(database, ledger)
    with psycopg.connect(database) as connection:
        connection.execute(f"UPDATE budgets SET {change} WHERE parent_id IS NULL".encode())
        found = connection.execute("SELECT state FROM audit.budgets").fetchall()
    assert found == [(state.name,)] * 3


async def test_holds_are_as_the_server_reads_them(
    lived: Lived, auditor: psycopg.Connection, store: Store
) -> None:
    budgets = known_budgets(lived)
    told = {row["hold_id"]: row for row in rows(auditor, "SELECT * FROM audit.holds")}
    states = Counter(row["state"] for row in told.values())
    for tree in lived.ledger.trees.values():
        for budget in tree.known_budgets():
            page = await store.list_holds(tree.root_id, budget.budget_id, ended=True, limit=1_000)
            for hold in page.rows:
                assert told.pop(uuid(hold.hold_id)) == {
                    "root": budgets[tree.root_id].name,
                    "path": path(budgets, budget),
                    "lane": store.lane_of(tree.root_id),
                    "root_id": uuid(tree.root_id),
                    "budget_id": uuid(budget.budget_id),
                    "hold_id": uuid(hold.hold_id),
                    "state": hold.state.name,
                    "amount": hold.amount,
                    "remaining": hold.remaining,
                    "booked": hold.booked,
                    "disputed": hold.disputed,
                    "created_at": when(hold.created_at),
                    "expires_at": when(hold.expires_at),
                }
    assert not told
    assert len(states) > 2


def test_a_subtree_has_used_what_all_in_it_have_spent_and_forfeited(
    lived: Lived, auditor: psycopg.Connection
) -> None:
    budgets = known_budgets(lived)
    for row in rows(auditor, "SELECT * FROM audit.subtrees"):
        top = budgets[row["budget_id"].bytes]
        inside = [
            each for each in budgets.values() if top.budget_id in (each.budget_id, *each.ancestors)
        ]
        assert row["path"] == path(budgets, top)
        assert row["budgets"] == len(inside)
        assert row["used"] == sum(each.money.spent + each.money.forfeited for each in inside)
        assert row["disputed"] == sum(each.disputed for each in inside)
        assert row["in_flight"] == sum(each.money.held for each in inside)
        if top.is_root:
            money = top.money
            free = sum(each.money.available + each.money.held for each in inside)
            assert row["used"] == money.granted + money.overrun - free


# -- Entries --------------------------------------------------------------------------------------------


async def test_entries_are_as_the_server_reads_them(
    lived: Lived, auditor: psycopg.Connection, store: Store
) -> None:
    budgets = known_budgets(lived)
    query = "SELECT * FROM audit.entries WHERE root = %s ORDER BY position, part"
    for tree in lived.ledger.trees.values():
        told = rows(auditor, query, budgets[tree.root_id].name)
        page = await list_entries(
            store, tree.budget(tree.root_id), Reach.TREE, Selection(), Period(), limit=1_000
        )
        first = page.rows[0]
        for row, entry in zip(told, page.rows, strict=True):
            first = entry if entry.part == 0 else first
            assert row == _entry(budgets, entry, first) | {"lane": store.lane_of(tree.root_id)}


def _entry(budgets: dict[bytes, Budget], entry: Entry, first: Entry) -> Row:
    operation = requested(first)
    request, effect = told_request(operation), told_effect(entry.effect)
    hold = effect.get("hold", {})
    return {
        "root": budgets[entry.root_id].name,
        "path": path(budgets, budgets[entry.budget_id]),
        "root_id": uuid(entry.root_id),
        "budget_id": uuid(entry.budget_id),
        "seq": entry.seq,
        "position": entry.position,
        "part": entry.part,
        "parts": entry.parts,
        "operation_id": uuid(entry.operation_id),
        "kind": entry.kind.name,
        "at": when(entry.at),
        "principal": entry.principal,
        "trace_id": entry.trace_id and entry.trace_id.hex(),
        "consumed": entry.consumed,
        "consumed_token": entry.consumed and fingerprint(entry.consumed),
        "produced_token": _produced(entry, request),
        "amount": entry.amount,
        **entry.money._asdict(),
        **changed(entry),
        "disputed": entry.effect.disputed,
        "closed": entry.effect.closed,
        "frozen": entry.effect.frozen,
        "lease_until": when(entry.effect.lease_until),
        "hold_id": hold.get("hold_id") and UUID(hold["hold_id"]),
        "hold_state": hold.get("state"),
        "authority": request["authority"],
        "labels": dict(operation.labels),
        "reference": request.get("reference"),
        "reason": request.get("reason"),
        "request": request,
        "effect": effect,
        "digest": entry.digest if entry.parts > 1 else None,
        "hash": entry.hash,
    }


def _produced(entry: Entry, request: Row) -> str | None:
    if entry.part == 0:
        return request.get("next_token") or request.get("token")
    children = request.get("children", [])
    made = [child for child in children if child["budget_id"] == str(uuid(entry.budget_id))]
    return made[0].get("token") if made else None


def test_a_budgets_token_can_be_followed_from_hand_to_hand(
    lived: Lived, auditor: psycopg.Connection
) -> None:
    """What an entry consumes of a budget was produced by the one before that produced any."""
    query = (
        "SELECT budget_id, kind, consumed_token, produced_token FROM audit.entries"
        " WHERE (part = 0 OR kind = 'DELEGATE')"
        " AND NOT (kind IN ('SETTLE', 'RELEASE', 'EXTEND')"
        " OR kind = 'RESOLVE' AND authority <> 'TOKEN') ORDER BY budget_id, seq"
    )
    live: dict[UUID, str | None] = {}
    followed = 0
    for row in rows(auditor, query):
        budget_id = row["budget_id"]
        # Of a budget without a token, what is consumed is a hold's.
        if row["consumed_token"] and live.get(budget_id):
            assert row["consumed_token"] == live[budget_id]
            followed += 1
        if row["produced_token"] or row["kind"] == "RECOVER":
            live[budget_id] = row["produced_token"]
    assert followed > 20
    for budget in known_budgets(lived).values():
        if budget.token is not None:
            assert live[uuid(budget.budget_id)] == fingerprint(budget.token)


def test_an_entry_of_a_root_without_its_name_is_not_hidden(lived: Lived) -> None:
    with psycopg.connect(lived.dsn) as connection:
        query = "SELECT count(*) FROM audit.entries"
        before = connection.execute(query).fetchone()
        connection.execute("DELETE FROM roots")
        assert connection.execute(query).fetchone() == before
        connection.rollback()


def test_an_entry_that_was_spoilt_is_shown_without_what_cannot_be_read(lived: Lived) -> None:
    with psycopg.connect(lived.dsn) as connection:
        connection.execute("UPDATE entries SET request = 'x', effect = 'y' WHERE part = 0")
        query = "SELECT DISTINCT request, effect FROM audit.entries WHERE part = 0"
        assert connection.execute(query).fetchall() == [(None, None)]
        connection.rollback()


# -- Sums -----------------------------------------------------------------------------------------------


def test_statements_add_up_what_moved_by_day_and_kind(
    lived: Lived, auditor: psycopg.Connection
) -> None:
    budgets = known_budgets(lived)
    wanted: dict[tuple[str, Any, str], list[Entry]] = defaultdict(list)
    for entry in lived.ledger.journal:
        place = path(budgets, budgets[entry.budget_id])
        wanted[place, instant(entry.at).date(), entry.kind.name].append(entry)
    told = rows(auditor, "SELECT * FROM audit.statements")
    assert len(told) == len(wanted)
    for row in told:
        moved = wanted[row["path"], row["day"], row["kind"]]
        assert row["entries"] == len(moved)
        assert row["operations"] == len({entry.operation_id for entry in moved})
        assert [row[name] for name in MONEY] == _sums(entry.effect.changes for entry in moved)


def _sums(balances: Iterable[Balances]) -> list[int]:
    return [sum(each) for each in zip(*(Balances(), *balances), strict=True)]


@pytest.mark.parametrize("subtree", [False, True], ids=["alone", "with all below"])
def test_a_statement_leads_from_opening_to_closing(
    lived: Lived, auditor: psycopg.Connection, *, subtree: bool
) -> None:
    budgets = known_budgets(lived)
    journal = lived.ledger.journal
    chance = random.Random(len(journal))
    for top in budgets.values():
        # A moment at which something was decided is in the period that it begins.
        since, until = sorted(chance.choice(journal).at + chance.choice([0, 1]) for _ in range(2))
        inside = [
            each.budget_id
            for each in budgets.values()
            if each is top or (subtree and top.budget_id in each.ancestors)
        ]
        query = "SELECT * FROM audit.statement(%s, %s, %s, %s)"
        place = path(budgets, top)
        first, *movements, last = rows(auditor, query, place, when(since), when(until), subtree)
        assert (first["line"], last["line"]) == ("OPENING", "CLOSING")
        for row, moment in ((first, since), (last, until)):
            heads = {
                entry.budget_id: _of_account(entry.money, entry, top, subtree=subtree)
                for entry in journal
                if entry.budget_id in inside and entry.at < moment
            }
            assert [row[name] for name in MONEY] == _sums(heads.values())
        within = [
            entry for entry in journal if entry.budget_id in inside and since <= entry.at < until
        ]
        assert [row["line"] for row in movements] == sorted({entry.kind.name for entry in within})
        for row in movements:
            of_kind = [entry for entry in within if entry.kind.name == row["line"]]
            assert row["entries"] == len(of_kind)
            assert row["operations"] == len({entry.operation_id for entry in of_kind})
            assert [row[name] for name in MONEY] == _sums(
                _of_account(entry.effect.changes, entry, top, subtree=subtree) for entry in of_kind
            )
        for name in MONEY:
            assert first[name] + sum(row[name] for row in movements) == last[name]
        assert last["granted"] + last["overrun"] == sum(
            last[name] for name in ("available", "held", "delegated", "spent", "forfeited")
        )


def _of_account(money: Balances, entry: Entry, top: Budget, *, subtree: bool) -> Balances:
    """What a budget's money counts in an account that may be a whole subtree."""
    if not subtree:
        return money
    of_top = dict.fromkeys(("granted", "overrun", "advanced"), 0)
    return money._replace(delegated=0, **(of_top if entry.budget_id != top.budget_id else {}))


def test_a_statement_of_all_time_needs_no_times(lived: Lived, auditor: psycopg.Connection) -> None:
    root = known_budgets(lived)[lived.ledger.journal[0].root_id]
    told = rows(auditor, "SELECT * FROM audit.statement(%s)", root.name)
    assert [told[0][name] for name in MONEY] == [0] * len(MONEY)
    assert [told[-1][name] for name in MONEY] == list(root.money)


def test_balances_can_be_had_as_they_were(lived: Lived, auditor: psycopg.Connection) -> None:
    budgets = known_budgets(lived)
    root_id = lived.ledger.journal[-1].root_id
    for entry in lived.ledger.journal[::10]:
        heads = {
            each.budget_id: each
            for each in lived.ledger.journal
            if each.root_id == root_id and each.at <= entry.at
        }
        query = "SELECT * FROM audit.as_of(%s, %s)"
        told = rows(auditor, query, budgets[root_id].name, when(entry.at))
        assert {row["path"]: [row[name] for name in MONEY] for row in told} == {
            path(budgets, budgets[budget_id]): list(head.money) for budget_id, head in heads.items()
        }
        for row in told:
            head = heads[row["budget_id"].bytes]
            assert (row["seq"], row["last_at"]) == (head.seq, when(head.at))
            assert (row["closed"], row["frozen"]) == (head.effect.closed, head.effect.frozen)
            assert row["disputed"] == head.effect.disputed


@pytest.mark.parametrize(
    "nothing", ["", "/", "nobody", "nobody/", "root-2/", "root-2//x", "root-2/x"]
)
def test_where_there_is_no_budget_there_is_nothing(
    nothing: str, auditor: psycopg.Connection
) -> None:
    assert rows(auditor, "SELECT * FROM audit.subtree(%s)", nothing) == []


def test_usage_is_attributed_to_day_principal_model_and_labels(
    lived: Lived, auditor: psycopg.Connection
) -> None:
    budgets = known_budgets(lived)
    wanted: dict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    first = lived.ledger.journal[0]
    for entry in lived.ledger.journal:
        first = entry if entry.part == 0 else first
        spent, forfeited = entry.effect.changes.spent, entry.effect.changes.forfeited
        books = entry.kind in BOOKING and entry.part == 0
        if not (books or spent or forfeited):
            continue
        operation = requested(first)
        budget = budgets[entry.budget_id]
        labels = {key: value for each in line(budgets, budget) for key, value in each.labels}
        labels |= dict(operation.labels)
        facts = getattr(operation, "usage", None)
        group = wanted[
            path(budgets, budget),
            instant(entry.at).date(),
            entry.principal,
            facts.provider if facts else "",
            (facts.model if facts else "") or labels.get("model", ""),
            tuple(sorted(labels.items())),
        ]
        group += Counter(operations=books)
        group["spent"] += spent
        group["forfeited"] += forfeited
        group["estimated"] += books and getattr(operation, "estimated", False)
        for name in TOKENS:
            group[name] += getattr(facts, name) if facts and books else 0
    told = {
        (
            *(row[name] for name in ("path", "day", "principal", "provider", "model")),
            tuple(sorted(row["labels"].items())),
        ): row
        for row in rows(auditor, "SELECT * FROM audit.usage")
    }
    assert told.keys() == wanted.keys()
    for key, group in wanted.items():
        assert {name: told[key][name] for name in SUMMED} == {name: group[name] for name in SUMMED}


def test_a_lineage_names_who_made_each_level_and_by_what_right(
    lived: Lived, auditor: psycopg.Connection
) -> None:
    budgets = known_budgets(lived)
    made = {entry.budget_id: entry for entry in lived.ledger.journal if entry.seq == 1}
    operations = {entry.operation_id: entry for entry in lived.ledger.journal if entry.part == 0}
    told = rows(auditor, "SELECT * FROM audit.lineage ORDER BY budget_id, depth")
    assert len(told) == sum(1 + len(budget.ancestors) for budget in budgets.values())
    rights = set()
    for row in told:
        budget = budgets[row["budget_id"].bytes]
        above = line(budgets, budget)[row["depth"]]
        birth = made[above.budget_id]
        first = operations[birth.operation_id]
        assert row["path"] == path(budgets, budget)
        assert (row["above_id"].bytes, row["above_path"]) == (above.budget_id, path(budgets, above))
        assert (row["made_at"], row["made_by"]) == (when(birth.at), first.principal)
        assert (row["kind"], row["amount"]) == (first.kind.name, birth.money.granted)
        assert row["operation_id"].bytes == birth.operation_id
        assert row["consumed_token"] == (first.consumed and fingerprint(first.consumed))
        assert row["authority"] == told_request(requested(first))["authority"]
        rights.add(row["authority"])
    assert rights >= {"TOKEN", "ROLE"}
