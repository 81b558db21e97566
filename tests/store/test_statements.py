"""The SQL that is sent: for two databases, by whole keys, and in one order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
import pytest
from sqlalchemy import Dialect, SmallInteger, create_mock_engine, literal_column
from sqlalchemy_cockroachdb.psycopg import (  # type: ignore[import-untyped]
    CockroachDBDialect_psycopg,
)

from peculium_server.core.batch import Request, decide_group
from peculium_server.core.operations import ByToken, Operation
from peculium_server.store import (
    accounts,
    alerts,
    audit_reads,
    checkpoints,
    keys,
    reads,
    refusals,
    schema,
    security,
    snapshot,
    statements,
    tail,
    waiting,
)
from peculium_server.store.connect import _WRITER_SETTINGS_POSTGRES
from peculium_server.store.save import changes
from peculium_server.store.store import Store
from peculium_server.store.wire import Connection, Flown, Step
from tests.core.ledger import HoldRef, Ledger
from tests.store.spender import Spender
from tests.store.stored import StoredLedger


@pytest.fixture(scope="module")
def cockroach() -> Dialect:
    dialect: Dialect = CockroachDBDialect_psycopg(paramstyle="numeric_dollar")
    return dialect


def test_every_statement_is_the_same_for_cockroachdb(cockroach: Dialect) -> None:
    here: Any = literal_column("7", SmallInteger)
    of_lane = statements.of_lane(7)._asdict()
    assert of_lane.keys() == statements.LANE_RECIPES.keys()
    executables = {name: recipe.build(here) for name, recipe in statements.LANE_RECIPES.items()}
    sent = {name: statement.sql for name, statement in of_lane.items()}
    for module in (
        *(reads, accounts, alerts, audit_reads, tail, checkpoints, refusals, snapshot, keys),
        *(security, waiting),
    ):
        of_module = f"{module.__name__}."
        executables |= {
            of_module + name: executable for name, (executable, _) in module.RECIPES.items()
        }
        sent |= {of_module + name: statement.sql for name, statement in module.STATEMENTS.items()}
    for name, executable in executables.items():
        assert str(executable.compile(dialect=cockroach)).encode() == sent[name]  # type: ignore[attr-defined]


def test_every_table_is_made_for_cockroachdb_of_what_both_have(cockroach: Dialect) -> None:
    made: list[str] = []
    engine = create_mock_engine(
        "cockroachdb+psycopg://",
        lambda ddl, *_, **__: made.append(str(ddl.compile(dialect=cockroach))),
    )
    schema.metadata.create_all(engine, checkfirst=False)
    text = "\n".join(made).lower()
    assert text.count("create table") == len(schema.metadata.tables)
    assert text.count("index ix_entries_position") == 1
    for word in ("brin", "collate", "references", "serial", "trigger", "nextval", "partition"):
        assert word not in text


def test_every_statement_of_a_lane_names_it_literally() -> None:
    for name, statement in statements.of_lane(11)._asdict().items():
        assert (b"11" in statement.sql) == (name != "load_roots")
        assert "lane" not in dict(statement.parameters)


# -- Plans ------------------------------------------------------------------------------------------

NAME_KEY = "lane_root_id_parent_id_name_key"
TOKEN_INDEX = "lane_root_id_budget_id_token_idx"
CONSUMED_INDEX = "lane_root_id_budget_id_consumed_idx"
LOOKUPS: dict[str, list[tuple[str, str, set[str]]]] = {
    "load_budgets": [("budgets", "pkey", {"lane", "root_id", "budget_id"})],
    "load_holds": [("holds", "pkey", {"lane", "root_id", "hold_id"})],
    "load_tokens": [
        ("entries", CONSUMED_INDEX, {"lane", "root_id", "budget_id", "consumed"}),
        ("holds", TOKEN_INDEX, {"lane", "root_id", "budget_id", "token"}),
    ],
    "load_recorded": [("entries", "pkey", {"lane", "root_id", "operation_id"})],
    "load_names": [("budgets", NAME_KEY, {"lane", "root_id", "parent_id", "name"})],
    "load_open_holds": [("holds", TOKEN_INDEX, {"lane", "root_id", "budget_id"})],
    "load_below": [("budgets", NAME_KEY, {"lane", "root_id", "parent_id"})] * 2,
    "load_open_children": [("budgets", NAME_KEY, {"lane", "root_id", "parent_id"})],
    "load_position": [("lanes", "pkey", {"lane"})],
    "save_position": [("lanes", "pkey", {"lane"})],
    "save_budget": [("budgets", "pkey", {"lane", "root_id", "budget_id"})],
    "save_budgets": [("budgets", "pkey", {"lane", "root_id", "budget_id"})],
    "save_hold": [("holds", "pkey", {"lane", "root_id", "hold_id"})],
    "save_holds": [("holds", "pkey", {"lane", "root_id", "hold_id"})],
}


async def lookups(database: str, lane: int) -> dict[str, list[tuple[str, str, set[str]]]]:
    """How a new writer's statements find their rows: table, index, and columns of the key."""
    found = {}
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        for name, value in _WRITER_SETTINGS_POSTGRES.items():
            await connection.execute("SELECT set_config(%s, %s, false)", [name, value])
        of_lane = statements.of_lane(lane)._asdict()
        for name in LOOKUPS:
            statement = of_lane[name]
            await connection.execute(b"PREPARE planned AS " + statement.sql)
            nulls = ", ".join(["NULL"] * len(statement.parameters))
            arguments = f"({nulls})" if nulls else ""
            cursor = await connection.execute(
                f"EXPLAIN (FORMAT JSON) EXECUTE planned{arguments}".encode()
            )
            row = await cursor.fetchone()
            assert row is not None
            found[name] = sorted(_scans(row[0][0]["Plan"], f"_{lane:02}"), key=str)
            await connection.execute("DEALLOCATE planned")
    return found


def _scans(plan: dict[str, Any], partition: str) -> Iterator[tuple[str, str, set[str]]]:
    if plan["Node Type"] in ("Seq Scan", "Index Scan", "Index Only Scan", "Bitmap Heap Scan"):
        table = plan["Relation Name"].removesuffix(partition)
        index = plan.get("Index Name", "").removeprefix(f"{table}{partition}_")
        yield table, index, set(re.findall(r"\((\w+) = ", plan.get("Index Cond", "")))
    for inner in plan.get("Plans", ()):
        yield from _scans(inner, partition)


async def test_rows_of_a_new_ledger_are_found_by_their_whole_key(database: str) -> None:
    assert await lookups(database, 5) == LOOKUPS


@pytest.mark.parametrize("analyzed", [False, True])
async def test_rows_are_found_by_their_whole_key_however_postgres_was_maintained(
    ledger: StoredLedger, database: str, *, analyzed: bool
) -> None:
    """Vacuumed while it was empty, Postgres holds a table for empty; a lane that grew is planned anew."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute("VACUUM")
        root = await ledger.root(10_000, holder="ops", by_token=False)
        await ledger.accept(*[root.reserve(1) for _ in range(120)])
        await ledger.accept(root.delegate(*[root.spec(1) for _ in range(120)]))
        if analyzed:
            await connection.execute("ANALYZE")
    assert await lookups(database, ledger.store.lane_of(root.root_id)) == LOOKUPS


@pytest.mark.parametrize("budgets", [3, 12, 40])
@pytest.mark.parametrize("tidied", ["ANALYZE", "VACUUM (ANALYZE)"])
async def test_rows_are_found_by_their_whole_key_though_there_are_few(
    ledger: StoredLedger, database: str, tidied: str, budgets: int
) -> None:
    """As it is when PostgreSQL looks while nobody asks: a few budgets, and no hold that is open."""
    root = await ledger.root(10_000, holder="ops", by_token=False)
    await ledger.accept(root.delegate(*[root.spec(1) for _ in range(budgets)]))
    reserves = [root.reserve(1) for _ in range(60)]
    await ledger.accept(*reserves)
    await ledger.accept(
        *(
            HoldRef(root, each.hold_id).settle(1, authority=ByToken(each.hold_token_id))
            for each in reserves
        )
    )
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute(tidied.encode())
    assert await lookups(database, ledger.store.lane_of(root.root_id)) == LOOKUPS


async def test_plans_are_made_again_as_a_lane_grows(
    store: Store, spender: Spender, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await spender.grant(store)
    lane = store.lane_of(root.root_id)
    writer = store.writer(lane)
    fly = Connection.fly
    replanned: list[int] = []

    async def watch(self: Connection, *segments: Sequence[Step]) -> list[Flown]:
        if segments[0] and segments[0][0].statement.name == b"replan":
            replanned.append((await store.standing(lane)).position)
        return await fly(self, *segments)

    monkeypatch.setattr(Connection, "fly", watch)
    for _ in range(210):
        await spender.spend(writer, root)
    assert replanned == [64, 192]


# -- What has to be there ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2], ids=["alone", "with others"])
async def test_to_change_a_row_that_is_not_there_fails_the_transaction(
    database: str, number: int
) -> None:
    ledger = Ledger()
    root = ledger.grant(100)
    held = [root.child(10).hold(1) for _ in range(number)]
    operations = [hold.settle(1) for hold in held]
    group = [Request(each, ledger.actor(each), index) for index, each in enumerate(operations)]
    trees = ledger.load(operations)
    _, accepted = decide_group(trees, group, ledger.now, ledger.position)
    existing = {(root.root_id, hold.id) for hold in held}
    steps, _ = changes(statements.of_lane(3), accepted, existing, ledger.position)
    changing = [step for step in steps if step.statement.name.startswith(b"save_")]
    assert len(changing) == 2
    async with await Connection.connect(database, autocommit=True) as connection:
        for flown in await connection.fly(*([step] for step in changing)):
            assert isinstance(flown, psycopg.errors.DivisionByZero)


# -- The order of writing -----------------------------------------------------------------------------


def test_rows_are_written_in_one_order_each_kind_sorted_by_its_key() -> None:
    ledger = Ledger(eager=0)
    root = ledger.grant(1_000, holder="agent", by_token=False)
    settled = [root.hold(1) for _ in range(2)]
    children = [root.child(10) for _ in range(2)]
    tops = [root.child(10) for _ in range(2)]
    for top in tops:
        top.child(5)
    operations: list[Operation] = [
        root.delegate(root.spec(5), root.spec(6)),
        *(child.reserve(3) for child in children),
        *(hold.settle(1) for hold in settled),
        ledger.ask_grant(7),
        *[root.revoke(top) for top in reversed(tops)],
    ]
    trees = ledger.load(operations)
    group = [
        Request(operation, ledger.actor(operation), index)
        for index, operation in enumerate(operations)
    ]
    _, accepted = decide_group(trees, group, ledger.now, ledger.position)
    assert len(accepted) == len(operations)
    of_lane = statements.of_lane(3)
    existing = {(root.root_id, hold.id) for hold in settled}
    steps, position = changes(of_lane, accepted, existing, ledger.position)
    assert position == ledger.position + len(operations)
    names = {statement: name for name, statement in of_lane._asdict().items()}
    assert [names[step.statement] for step in steps] == [
        "add_roots",
        "add_budgets",
        "save_budgets",
        "add_holds",
        "save_holds",
        "add_entries",
        "add_collections",
    ]
    for step in steps[1:]:
        keys = _keys(step)
        assert len(keys) == len(set(keys)) > 0
        if names[step.statement] != "add_roots":
            assert keys == sorted(keys)
    assert len(_keys(steps[-2])) == sum(len(each.entries) for each in accepted)
    assert _keys(steps[-1]) == [(root.root_id, top.id) for top in tops]


def _keys(step: Step) -> list[Any]:
    columns = {
        "budgets": ("root_id", "budget_id"),
        "holds": ("root_id", "hold_id"),
        "entries": ("root_id", "operation_id", "part"),
        "roots": ("root_id",),
        "collections": ("root_id", "budget_id"),
    }
    table = step.statement.name.decode().split("_")[1]
    return list(zip(*(step.values[column] for column in columns[table]), strict=True))


def test_a_budget_that_changed_twice_is_written_once_as_it_was_left() -> None:
    ledger = Ledger()
    root = ledger.grant(100)
    reserve = root.reserve(10)
    settle = HoldRef(root, reserve.hold_id).settle(3, authority=ByToken(reserve.hold_token_id))
    operations: list[Operation] = [reserve, settle]
    group = [Request(each, ledger.actor(each), index) for index, each in enumerate(operations)]
    trees = ledger.load(operations)
    _, accepted = decide_group(trees, group, ledger.now, ledger.position)
    steps, _ = changes(statements.of_lane(3), accepted, set(), ledger.position)
    saved = {step.statement.name: step.values for step in steps}
    assert saved[b"save_budget_3"]["seq"] == 3
    assert saved[b"save_budget_3"]["before"] == 1
    assert saved[b"save_budget_3"]["spent"] == 3
    assert saved[b"add_hold_3"]["remaining"] == 0
    assert not saved.keys() & {b"save_hold_3", b"save_holds_3"}
    assert sorted(saved[b"add_entries_3"]["seq"]) == [2, 3]


def test_nothing_accepted_writes_nothing_and_leaves_the_lane_where_it_is() -> None:
    assert changes(statements.of_lane(3), [], set(), 17) == ([], 17)
