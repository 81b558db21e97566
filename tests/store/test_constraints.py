"""What the schema itself refuses, whoever writes it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from peculium_server.core.state import Hold
from tests.core.ledger import HoldRef, Node
from tests.store.stored import StoredLedger

MAX = 2**62


@pytest.fixture
async def connection(database: str) -> AsyncIterator[psycopg.AsyncConnection]:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as opened:
        yield opened


@pytest.fixture
async def root(ledger: StoredLedger) -> Node:
    return await ledger.root(100)


@pytest.fixture
async def child(ledger: StoredLedger, root: Node) -> Node:
    return await ledger.below(root, 50)


@pytest.fixture
async def hold(ledger: StoredLedger, root: Node) -> Hold:
    reserve = root.reserve(10)
    await ledger.accept(reserve)
    return HoldRef(root, reserve.hold_id).hold


async def change(
    connection: psycopg.AsyncConnection, table: str, where: str, **values: Any
) -> str | None:
    """Change all rows where that holds; the constraint that refused it, or None."""
    assignments = sql.SQL(", ").join(
        sql.SQL("{} = {}").format(sql.Identifier(name), sql.Literal(value))
        for name, value in values.items()
    )
    statement = sql.SQL("UPDATE {} SET {} WHERE {}").format(
        sql.Identifier(table), assignments, sql.SQL(where)
    )
    try:
        changed = await connection.execute(statement)
    except psycopg.errors.IntegrityError as error:
        return error.diag.constraint_name
    assert changed.rowcount > 0
    return None


ROOT, CHILD = "parent_id IS NULL", "parent_id IS NOT NULL"


@pytest.mark.parametrize(
    ("constraint", "where", "values"),
    [
        ("ck_budgets_balanced", ROOT, {"available": 51}),
        ("ck_budgets_balanced", ROOT, {"granted": MAX}),
        ("ck_budgets_signed", ROOT, {"available": -1, "spent": 51}),
        ("ck_budgets_signed", ROOT, {"granted": MAX + 1, "available": MAX - 49}),
        ("ck_budgets_signed", CHILD, {"advanced": -1}),
        ("ck_budgets_advanced", CHILD, {"advanced": 51}),
        ("ck_budgets_overrun", CHILD, {"overrun": 1, "spent": 1}),
        ("ck_budgets_counters", ROOT, {"disputed": -1}),
        ("ck_budgets_counters", ROOT, {"disputes": -1}),
        ("ck_budgets_counters", ROOT, {"holds_live": -1}),
        ("ck_budgets_counters", ROOT, {"version": -1}),
        ("ck_budgets_counters", ROOT, {"seq": 0}),
        ("ck_budgets_counters", ROOT, {"disputed": MAX + 1, "disputes": 1}),
        ("ck_budgets_held", ROOT, {"available": 40, "held": 10}),
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
async def test_a_budget_that_breaks_a_rule_is_refused(
    connection: psycopg.AsyncConnection,
    child: Node,
    constraint: str,
    where: str,
    values: dict[str, Any],
) -> None:
    assert await change(connection, "budgets", where, **values) == constraint


@pytest.mark.parametrize(
    ("where", "values"),
    [
        (ROOT, {"granted": MAX, "available": MAX - 50}),
        (
            ROOT,
            {"granted": MAX, "overrun": MAX, "available": 0, "spent": MAX, "forfeited": MAX - 50},
        ),
        (CHILD, {"advanced": 50}),
        (ROOT, {"disputed": MAX, "disputes": 1}),
        (ROOT, {"token": None, "closed": True}),
        (ROOT, {"token": None, "custody": 2, "holder": "ops"}),
        (CHILD, {"overrun_factor": 1000}),
        (CHILD, {"lease_until": "2100-01-01", "lease_latest": "2100-01-01"}),
    ],
)
async def test_a_budget_at_its_bounds_is_taken(
    connection: psycopg.AsyncConnection, child: Node, where: str, values: dict[str, Any]
) -> None:
    assert await change(connection, "budgets", where, **values) is None


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
async def test_a_hold_that_breaks_a_rule_is_refused(
    connection: psycopg.AsyncConnection, hold: Hold, constraint: str, values: dict[str, Any]
) -> None:
    assert await change(connection, "holds", "true", **values) == constraint


@pytest.mark.parametrize(
    ("constraint", "values"),
    [
        ("ck_entries_balanced", {"available": 51}),
        ("ck_entries_balanced", {"delegated": 1}),
        ("ck_entries_signed", {"available": -1, "spent": 101}),
        ("ck_entries_signed", {"forfeited": -1, "spent": 1}),
        ("ck_entries_advanced", {"advanced": 101}),
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
async def test_an_entry_that_breaks_a_rule_is_refused(
    connection: psycopg.AsyncConnection, root: Node, constraint: str, values: dict[str, Any]
) -> None:
    values = {name: value.hex() if name == "budget_id" else value for name, value in values.items()}
    assert await change(connection, "entries", "true", **values) == constraint


async def copy(
    connection: psycopg.AsyncConnection, table: str, where: str = "true", **values: Any
) -> str:
    """Insert a row like an existing one, but for some values; the index that refused it."""
    found = await connection.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0", [table]
    )
    names = [name for (name,) in await found.fetchall()]
    columns = sql.SQL(", ").join(map(sql.Identifier, names))
    selected = sql.SQL(", ").join(
        sql.Literal(values[name]) if name in values else sql.Identifier(name) for name in names
    )
    statement = sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {} WHERE {} LIMIT 1").format(
        sql.Identifier(table), columns, selected, sql.Identifier(table), sql.SQL(where)
    )
    with pytest.raises(psycopg.errors.UniqueViolation) as raised:
        await connection.execute(statement)
    name = raised.value.diag.constraint_name
    assert name is not None
    return name


NEW = "01234567-89ab-7def-8123-456789abcdef"


async def test_ids_names_and_tokens_are_unique(
    connection: psycopg.AsyncConnection, ledger: StoredLedger, child: Node, hold: Hold
) -> None:
    lane = f"{ledger.store.lane_of(child.root_id):02}"
    assert await copy(connection, "ledger") == "pk_ledger"
    assert await copy(connection, "lanes") == "lanes_00_pkey"
    assert await copy(connection, "roots", root_id=NEW) == "pk_roots"
    assert await copy(connection, "budgets", name="other") == f"budgets_{lane}_pkey"
    assert (
        await copy(connection, "budgets", CHILD, budget_id=NEW)
        == f"budgets_{lane}_lane_root_id_parent_id_name_key"
    )
    assert await copy(connection, "holds", token=bytes(32)) == f"holds_{lane}_pkey"
    assert (
        await copy(connection, "holds", hold_id=NEW)
        == f"holds_{lane}_lane_root_id_budget_id_token_idx"
    )
    assert await copy(connection, "entries", consumed=bytes(32)) == f"entries_{lane}_pkey"
    assert (
        await copy(connection, "entries", "consumed IS NOT NULL", operation_id=NEW)
        == f"entries_{lane}_lane_root_id_budget_id_consumed_idx"
    )


async def test_an_ended_hold_does_not_keep_its_token_to_itself(
    connection: psycopg.AsyncConnection, ledger: StoredLedger, root: Node, hold: Hold
) -> None:
    """Its token is known by the entry that consumed it; the index has open holds only."""
    await ledger.accept(HoldRef(root, hold.hold_id).release())
    reserve = root.reserve(10)
    await ledger.accept(reserve)
    assert await change(connection, "holds", "state = 1", token=hold.token) is None


async def test_a_token_is_consumed_at_most_once_whoever_writes_the_entry(
    connection: psycopg.AsyncConnection, ledger: StoredLedger, root: Node
) -> None:
    await ledger.accept(root.spend(1))
    await ledger.accept(root.spend(1))
    tokens = await connection.execute("SELECT consumed FROM entries WHERE consumed IS NOT NULL")
    [first, second] = [token for (token,) in await tokens.fetchall()]
    with pytest.raises(psycopg.errors.UniqueViolation):
        await connection.execute(
            "UPDATE entries SET consumed = %s WHERE consumed = %s", [first, second]
        )


async def test_a_row_lies_in_its_lanes_partition(
    connection: psycopg.AsyncConnection, ledger: StoredLedger, child: Node, hold: Hold
) -> None:
    lane = ledger.store.lane_of(child.root_id)
    for table in ("lanes", "budgets", "holds", "entries"):
        found = await connection.execute(
            sql.SQL("SELECT DISTINCT tableoid::regclass::text FROM {} WHERE lane = %s").format(
                sql.Identifier(table)
            ),
            [lane],
        )
        assert await found.fetchall() == [(f"{table}_{lane:02}",)]
    with pytest.raises(psycopg.errors.CheckViolation, match="no partition"):
        await connection.execute("INSERT INTO lanes (lane, position) VALUES (16, 0)")
