"""What was refused to whom in which minute: counted in memory, added up now and then, and bounded."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

import peculium
from peculium import Child, Reach
from peculium.errors import (
    BudgetExhausted,
    BudgetUnknown,
    CapabilityUnknown,
    Malformed,
    TokenConsumed,
)
from peculium_server import refusals
from peculium_server.cli.verbs import app
from peculium_server.core.refusals import Refusal
from peculium_server.refusals import KEYS_MAX, UNPROVEN_MAX, RefusalCounts
from peculium_server.store import roles
from peculium_server.store.errors import StoreUnavailable
from peculium_server.store.refusals import NOBODY, Asked, Counted, Key
from peculium_server.store.store import Store
from tests.postgres import as_role
from tests.server import StartServer

EXHAUSTED = Refusal.BUDGET_EXHAUSTED
UNKNOWN = Refusal.CAPABILITY_UNKNOWN
DAY_US = 86_400_000_000


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    opened = await Store.open(database)
    yield opened
    await opened.close()


async def counting(store: Store, days: int = 7) -> RefusalCounts:
    counts = RefusalCounts(store, days)
    await counts.learn_time()
    return counts


async def listed(store: Store, asked: Asked | None = None) -> list[Counted]:
    return await store.refusals.page(asked or Asked(), limit=1_000, after=None, descending=False)


def numbers(rows: Sequence[Counted]) -> dict[tuple[bytes, str], int]:
    """How often, by budget and reason, minutes aside."""
    found: dict[tuple[bytes, str], int] = {}
    for row in rows:
        key = row.key.budget_id, row.key.reason
        found[key] = found.get(key, 0) + row.number
    return found


def new_id() -> bytes:
    return secrets.token_bytes(16)


async def test_counts_of_several_servers_are_added_up_in_the_minute_of_the_database(
    store: Store,
) -> None:
    root, budget = new_id(), new_id()
    before = await store.refusals.now()
    for _ in range(2):
        server = await counting(store)
        for _ in range(3):
            server.count(root, budget, EXHAUSTED)
        await server.add_up()
    after = await store.refusals.now()
    rows = await listed(store)
    assert numbers(rows) == {(budget, "BUDGET_EXHAUSTED"): 6}
    for row in rows:
        assert row.key.minute % 60_000_000 == 0
        assert before - 60_000_000 < row.key.minute <= after


@pytest.mark.parametrize(("root", "budget"), [(32, 16), (16, 32), (15, 15), (0, 0)])
async def test_what_is_no_id_is_counted_by_its_reason_and_kept_to_nobody(
    store: Store, root: int, budget: int
) -> None:
    server, told = await counting(store), new_id()
    server.count(b"s" * root, b"s" * budget, Refusal.MALFORMED)
    server.count(told, told, EXHAUSTED)
    assert b"ss" not in repr(vars(server)).encode()
    await server.add_up()
    assert numbers(await listed(store)) == {
        (NOBODY, "MALFORMED"): 1,
        (told, "BUDGET_EXHAUSTED"): 1,
    }


async def test_a_storm_is_one_row_and_is_written_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    add = store.refusals.add

    async def noted(counts: Sequence[tuple[Key, int]]) -> None:
        written.append(len(counts))
        await add(counts)

    monkeypatch.setattr(store.refusals, "add", noted)
    monkeypatch.setattr(RefusalCounts, "_now", lambda _: 1_800_000_000_000_000)
    server, root = await counting(store), new_id()
    for _ in range(10_000):
        server.count(root, root, EXHAUSTED)
    assert written == []
    await server.add_up()
    # Nothing happened since: nothing is written.
    await server.add_up()
    assert written == [1]
    assert numbers(await listed(store)) == {(root, "BUDGET_EXHAUSTED"): 10_000}


async def test_what_is_beyond_the_bound_is_counted_by_reason_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_800_000_000_000_000
    monkeypatch.setattr(RefusalCounts, "_now", lambda _: now)
    server = await counting(store)
    budgets = [new_id() for _ in range(KEYS_MAX + 10)]
    for budget in budgets:
        server.count(budget, budget, EXHAUSTED)
    # One that is told apart already still is.
    server.count(budgets[0], budgets[0], EXHAUSTED)
    await server.add_up()
    found = numbers(await listed(store))
    assert len(found) == KEYS_MAX + 1
    assert found[NOBODY, "BUDGET_EXHAUSTED"] == 10
    assert found[budgets[0], "BUDGET_EXHAUSTED"] == 2
    # Another minute has room again.
    now += 60_000_000
    server.count(budgets[-1], budgets[-1], EXHAUSTED)
    await server.add_up()
    assert numbers(await listed(store))[budgets[-1], "BUDGET_EXHAUSTED"] == 1


async def test_made_up_budgets_do_not_crowd_out_those_that_there_are(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RefusalCounts, "_now", lambda _: 1_800_000_000_000_000)
    server = await counting(store)
    for _ in range(10 * KEYS_MAX):
        server.count(new_id(), new_id(), UNKNOWN)
    real = new_id()
    server.count(real, real, EXHAUSTED)
    await server.add_up()
    found = numbers(await listed(store))
    assert found[real, "BUDGET_EXHAUSTED"] == 1
    assert found[NOBODY, "CAPABILITY_UNKNOWN"] == 10 * KEYS_MAX - UNPROVEN_MAX


async def test_counts_wait_while_the_database_takes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = store.refusals.add

    async def fail(_: object) -> None:
        raise StoreUnavailable("gone")

    server, root = await counting(store), new_id()
    server.count(root, root, EXHAUSTED)
    monkeypatch.setattr(store.refusals, "add", fail)
    with pytest.raises(StoreUnavailable):
        await server.add_up()
    server.count(root, root, EXHAUSTED)
    monkeypatch.setattr(store.refusals, "add", add)
    await server.add_up()
    assert numbers(await listed(store)) == {(root, "BUDGET_EXHAUSTED"): 2}


async def test_no_more_than_an_hour_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000_000_000

    async def fail(_: object) -> None:
        raise StoreUnavailable("gone")

    monkeypatch.setattr(RefusalCounts, "_now", lambda _: now)
    monkeypatch.setattr(store.refusals, "add", fail)
    server, root = await counting(store), new_id()
    for _ in range(refusals.MINUTES_MAX + 5):
        server.count(root, root, EXHAUSTED)
        now += 60_000_000
    with pytest.raises(StoreUnavailable):
        await server.add_up()
    monkeypatch.undo()
    await server.add_up()
    assert len(await listed(store)) == refusals.MINUTES_MAX


async def test_old_rows_are_forgotten_and_others_stay(store: Store) -> None:
    now = await store.refusals.now()
    old = Key(now - 8 * DAY_US, new_id(), new_id(), "TOO_LARGE")
    recent = Key(now - 6 * DAY_US, new_id(), new_id(), "TOO_LARGE")
    await store.refusals.add([(old, 1), (recent, 1)])
    await store.refusals.forget(now - 7 * DAY_US)
    assert [row.key for row in await listed(store)] == [recent]


def _refuse(client: peculium.Client) -> None:
    """Have budgets of two trees refused something."""
    acme = client.accept(client.admin.grant("acme", unit="calls", amount=10).capability)
    [made] = acme.delegate([Child("run", 5)])
    run = client.accept(made.capability)
    for _ in range(3):
        with pytest.raises(BudgetExhausted):
            run.reserve(100)
    with pytest.raises(BudgetExhausted):
        acme.spend(50)
    stale = client.admin.grant("other", unit="calls", amount=10).capability.reveal()
    client.accept(stale)
    with pytest.raises(TokenConsumed):
        client.accept(stale)


def test_auditors_learn_why_an_agent_was_stopped_and_when(
    start_server: StartServer, served_database: str, database: str
) -> None:
    server = start_server("--database-url", served_database)
    with peculium.connect(server.address) as client:
        _refuse(client)
    # What was counted is not lost with the server.
    assert server.stop() == 0
    server = start_server("--database-url", served_database)
    with peculium.connect(server.address) as client:
        _ask_with_the_sdk(client)
    _ask_on_the_command_line(server.address)
    with psycopg.connect(as_role(database, roles.AUDITOR)) as connection:
        seen = connection.execute("SELECT root, path, reason, number FROM audit.refusals")
        assert ("other", "other", "TOKEN_CONSUMED", 1) in seen.fetchall()


def _ask_with_the_sdk(client: peculium.Client) -> None:
    found = list(client.audit.refusals(page_size=1))
    told: dict[tuple[str, str], int] = {}
    for each in found:
        key = str(each.ref), each.reason
        told[key] = told.get(key, 0) + each.count
    assert told == {
        ("acme/run", "BUDGET_EXHAUSTED"): 3,
        ("acme", "BUDGET_EXHAUSTED"): 1,
        ("other", "TOKEN_CONSUMED"): 1,
    }
    minutes = [each.minute for each in found]
    assert abs(minutes[0] - datetime.now(UTC)) < timedelta(minutes=10)
    assert list(client.audit.refusals(page_size=1, descending=True)) == found[::-1]

    def counted(budget: str | None = None, **options: Any) -> int:
        return sum(each.count for each in client.audit.refusals(budget, **options))

    assert counted("acme") == 4
    assert counted("acme", reach=Reach.BUDGET) == 1
    assert counted("acme/run") == 3
    assert counted("acme/run", reach=Reach.TREE) == 4
    assert counted(reasons=["TOKEN_CONSUMED"]) == 1
    assert counted(until=min(minutes)) == 0
    assert counted(since=min(minutes)) == 5
    with pytest.raises(Malformed):
        counted(reasons=["NONSENSE"])
    with pytest.raises(BudgetUnknown):
        counted("nobody")


def _ask_on_the_command_line(address: str) -> None:
    def shown(*arguments: str) -> str:
        asked = ["audit", "refusals", *arguments, "--target", address]
        return CliRunner().invoke(app, asked).stdout

    rows = [json.loads(line) for line in shown("acme/run", "--json").splitlines()]
    assert sum(row["count"] for row in rows) == 3
    assert {(row["path"], row["reason"]) for row in rows} == {("acme/run", "BUDGET_EXHAUSTED")}
    table = shown("--reason", "token_consumed")
    assert "TOKEN_CONSUMED" in table
    assert "other" in table
    assert "acme" not in table


def test_a_server_that_is_told_to_counts_nothing(
    start_server: StartServer, served_database: str
) -> None:
    server = start_server("--database-url", served_database, "--refusal-days", "0")
    with peculium.connect(server.address) as client, pytest.raises(CapabilityUnknown):
        client.accept(
            peculium.Capability(root_id=new_id(), budget_id=new_id(), secret=new_id() * 2)
        )
    assert server.stop() == 0
    with psycopg.connect(served_database) as connection:
        assert connection.execute("SELECT count(*) FROM refusals").fetchone() == (0,)
