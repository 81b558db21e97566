"""What the schema itself refuses, whoever writes it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql

from peculium_server.core.operations import After
from peculium_server.core.state import Hold
from peculium_server.store.store import Store
from tests.core.ledger import HoldRef, Node
from tests.postgres import Server
from tests.store.stored import StoredLedger

MAX = 2**62


class Tree(NamedTuple):
    """A database with a root that has a hold, and with a child of that root."""

    database: str
    lane: int
    root: Node
    hold: Hold


@pytest.fixture(scope="module")
def tree(postgres: Server) -> Iterator[Tree]:
    async def make(database: str) -> Tree:
        store = await Store.open(database)
        ledger = StoredLedger(store)
        root = await ledger.root(110)
        await ledger.below(root, 50)
        reserve = root.reserve(10)
        await ledger.accept(reserve)
        await store.close()
        hold = HoldRef(root, reserve.hold_id).hold
        return Tree(database, store.lane_of(root.root_id), root, hold)

    with postgres.fresh_database(postgres.migrated_template()) as database:
        yield asyncio.run(make(database))


@pytest.fixture
def connection(tree: Tree) -> Iterator[psycopg.Connection]:
    with psycopg.connect(tree.database, autocommit=True) as opened:
        yield opened


def change(connection: psycopg.Connection, table: str, where: str, **values: Any) -> str | None:
    """Change a row and undo that; the constraint that refused it, or None."""
    assignments = sql.SQL(", ").join(
        sql.SQL("{} = {}").format(sql.Identifier(name), sql.Literal(value))
        for name, value in values.items()
    )
    statement = sql.SQL("UPDATE {} SET {} WHERE {}").format(
        sql.Identifier(table), assignments, sql.SQL(where)
    )
    try:
        with connection.transaction(force_rollback=True):
            changed = connection.execute(statement)
    except psycopg.errors.IntegrityError as error:
        return error.diag.constraint_name
    assert changed.rowcount == 1
    return None


ROOT, CHILD = "parent_id IS NULL", "parent_id IS NOT NULL"


@pytest.mark.parametrize(
    ("constraint", "where", "values"),
    [
        ("ck_budgets_balanced", ROOT, {"available": 51}),
        ("ck_budgets_balanced", ROOT, {"granted": MAX}),
        ("ck_budgets_signed", ROOT, {"available": -1, "spent": 51}),
        ("ck_budgets_signed", ROOT, {"granted": MAX + 1, "available": MAX - 59}),
        ("ck_budgets_signed", CHILD, {"advanced": -1}),
        ("ck_budgets_advanced", CHILD, {"advanced": 51}),
        ("ck_budgets_overrun", CHILD, {"overrun": 1, "spent": 1}),
        ("ck_budgets_counters", ROOT, {"disputed": -1}),
        ("ck_budgets_counters", ROOT, {"disputes": -1}),
        ("ck_budgets_counters", ROOT, {"holds_live": -1}),
        ("ck_budgets_counters", ROOT, {"version": -1}),
        ("ck_budgets_counters", ROOT, {"seq": 0}),
        ("ck_budgets_counters", ROOT, {"disputed": MAX + 1, "disputes": 1}),
        ("ck_budgets_held", ROOT, {"holds_live": 0}),
        ("ck_budgets_disputed", ROOT, {"disputed": 1}),
        ("ck_budgets_custody", ROOT, {"token": None}),
        ("ck_budgets_custody", ROOT, {"custody": 2, "holder": "ops"}),
        ("ck_budgets_custody", ROOT, {"custody": 2, "token": None}),
        ("ck_budgets_custody", ROOT, {"custody": 3}),
        ("ck_budgets_ancestors", CHILD, {"parent_id": None}),
        ("ck_budgets_ancestors", CHILD, {"ancestors": []}),
        ("ck_budgets_overrun_factor", CHILD, {"overrun_factor": None}),
        ("ck_budgets_overrun_factor", CHILD, {"overrun_factor": 1001}),
        ("ck_budgets_overrun_factor", CHILD, {"overrun_factor": -1}),
        ("ck_budgets_overrun_factor", ROOT, {"overrun_factor": 1}),
        ("ck_budgets_times", ROOT, {"lease_until": "2100-01-01"}),
        ("ck_budgets_times", ROOT, {"lease_latest": "2100-01-01"}),
        ("ck_budgets_times", ROOT, {"created_at": "2100-01-01"}),
        ("ck_budgets_token", ROOT, {"token": bytes(31)}),
        ("ck_budgets_head", ROOT, {"head": bytes(33)}),
        ("ck_budgets_labels", ROOT, {"labels": "[]"}),
    ],
)
def test_a_budget_that_breaks_a_rule_is_refused(
    connection: psycopg.Connection,
    constraint: str,
    where: str,
    values: dict[str, Any],
) -> None:
    assert change(connection, "budgets", where, **values) == constraint


@pytest.mark.parametrize(
    ("where", "values"),
    [
        (ROOT, {"granted": MAX, "available": MAX - 60}),
        (
            ROOT,
            {"granted": MAX, "overrun": MAX, "available": 0, "spent": MAX, "forfeited": MAX - 60},
        ),
        (CHILD, {"advanced": 50}),
        (ROOT, {"disputed": MAX, "disputes": 1}),
        (ROOT, {"token": None, "closed": True}),
        (ROOT, {"token": None, "custody": 2, "holder": "ops"}),
        (CHILD, {"overrun_factor": 1000}),
        (CHILD, {"lease_until": "2100-01-01", "lease_latest": "2100-01-01"}),
    ],
)
def test_a_budget_at_its_bounds_is_taken(
    connection: psycopg.Connection, where: str, values: dict[str, Any]
) -> None:
    assert change(connection, "budgets", where, **values) is None


@pytest.mark.parametrize(
    ("constraint", "values"),
    [
        ("ck_holds_state", {"state": 0, "remaining": 0}),
        ("ck_holds_state", {"state": 6, "remaining": 0}),
        ("ck_holds_amounts", {"amount": 0, "remaining": 0}),
        ("ck_holds_amounts", {"remaining": -1}),
        ("ck_holds_amounts", {"remaining": 11}),
        ("ck_holds_amounts", {"booked": -1}),
        ("ck_holds_amounts", {"disputed": -1}),
        ("ck_holds_ended", {"state": 3}),
        ("ck_holds_ended", {"state": 5, "remaining": 0}),
        ("ck_holds_ended", {"state": 3, "remaining": 0, "disputed": 1}),
        ("ck_holds_token", {"token": bytes(16)}),
    ],
)
def test_a_hold_that_breaks_a_rule_is_refused(
    connection: psycopg.Connection, constraint: str, values: dict[str, Any]
) -> None:
    assert change(connection, "holds", "true", **values) == constraint


@pytest.mark.parametrize(
    ("constraint", "values"),
    [
        ("ck_entries_balanced", {"available": 51}),
        ("ck_entries_balanced", {"delegated": 1}),
        ("ck_entries_signed", {"available": -1, "spent": 111}),
        ("ck_entries_signed", {"forfeited": -1, "spent": 1}),
        ("ck_entries_advanced", {"advanced": 111}),
        ("ck_entries_overrun", {"budget_id": b"\x01" * 16, "overrun": 1, "spent": 1}),
        ("ck_entries_counters", {"position": 0}),
        ("ck_entries_counters", {"seq": 0}),
        ("ck_entries_counters", {"amount": -1}),
        ("ck_entries_counters", {"kind": 0}),
        ("ck_entries_parts", {"part": -1}),
        ("ck_entries_parts", {"part": 1}),
        ("ck_entries_parts", {"request": None}),
        ("ck_entries_parts", {"parts": 2}),
        ("ck_entries_parts", {"digest": bytes(32)}),
        ("ck_entries_digests", {"hash": bytes(31)}),
        ("ck_entries_digests", {"consumed": bytes(31)}),
        ("ck_entries_digests", {"digest": bytes(31), "parts": 2}),
    ],
)
def test_an_entry_that_breaks_a_rule_is_refused(
    connection: psycopg.Connection, constraint: str, values: dict[str, Any]
) -> None:
    values = {name: value.hex() if name == "budget_id" else value for name, value in values.items()}
    assert change(connection, "entries", "position = 1", **values) == constraint


def copy(connection: psycopg.Connection, table: str, where: str = "true", **values: Any) -> str:
    """Insert a row like an existing one, but for some values; the index that refused it."""
    found = connection.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0", [table]
    )
    names = [name for (name,) in found.fetchall()]
    columns = sql.SQL(", ").join(map(sql.Identifier, names))
    selected = sql.SQL(", ").join(
        sql.Literal(values[name]) if name in values else sql.Identifier(name) for name in names
    )
    statement = sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {} WHERE {} LIMIT 1").format(
        sql.Identifier(table), columns, selected, sql.Identifier(table), sql.SQL(where)
    )
    with pytest.raises(psycopg.errors.UniqueViolation) as raised:
        connection.execute(statement)
    name = raised.value.diag.constraint_name
    assert name is not None
    return name


NEW = "01234567-89ab-7def-8123-456789abcdef"


def test_ids_names_and_tokens_are_unique(tree: Tree, connection: psycopg.Connection) -> None:
    lane = f"{tree.lane:02}"
    name_key, token_key = "lane_root_id_parent_id_name_key", "lane_root_id_budget_id_token_idx"
    consumed_key = "lane_root_id_budget_id_consumed_idx"
    assert copy(connection, "ledger") == "pk_ledger"
    assert copy(connection, "lanes") == "lanes_00_pkey"
    assert copy(connection, "roots", root_id=NEW) == "pk_roots"
    assert copy(connection, "budgets", name="other") == f"budgets_{lane}_pkey"
    assert copy(connection, "budgets", CHILD, budget_id=NEW) == f"budgets_{lane}_{name_key}"
    assert copy(connection, "holds", token=bytes(32)) == f"holds_{lane}_pkey"
    assert copy(connection, "holds", hold_id=NEW) == f"holds_{lane}_{token_key}"
    assert copy(connection, "entries", consumed=bytes(32)) == f"entries_{lane}_pkey"
    consuming = "consumed IS NOT NULL"
    assert (
        copy(connection, "entries", consuming, operation_id=NEW) == f"entries_{lane}_{consumed_key}"
    )


def test_a_row_lies_in_its_lanes_partition(tree: Tree, connection: psycopg.Connection) -> None:
    for table in ("lanes", "budgets", "holds", "entries"):
        found = connection.execute(
            sql.SQL("SELECT DISTINCT tableoid::regclass::text FROM {} WHERE lane = %s").format(
                sql.Identifier(table)
            ),
            [tree.lane],
        )
        assert found.fetchall() == [(f"{table}_{tree.lane:02}",)]
    with pytest.raises(psycopg.errors.CheckViolation, match="no partition"):
        connection.execute("INSERT INTO lanes (lane, position) VALUES (16, 0)")


async def test_the_token_of_an_ended_hold_is_known_by_the_entry_that_consumed_it(
    ledger: StoredLedger, database: str
) -> None:
    """The index of holds' tokens has those of open holds only."""
    root = await ledger.root(100)
    ended, live = [root.reserve(10), root.reserve(20, authority=After(0))]
    await ledger.accept(ended, live)
    await ledger.accept(HoldRef(root, ended.hold_id).release())
    with psycopg.connect(database, autocommit=True) as connection:
        token = ended.hold_token_id
        assert change(connection, "holds", "state = 1", token=token) is None
        assert change(connection, "entries", "seq = 2", consumed=token) is not None
