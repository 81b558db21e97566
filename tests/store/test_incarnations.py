"""A database that was restored, copied or taken over: what a server notices of it, and what it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from peculium_server.core.operations import Grant
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.store import incarnations, operating
from peculium_server.store.errors import LedgerRestored
from peculium_server.store.known import Known
from peculium_server.store.store import Store
from tests.postgres import Server
from tests.store.spender import Spender, spent

PLACE = ("system_identifier", "timeline", "database_oid")


async def rows(database: str) -> list[tuple[Any, ...]]:
    """What was recorded of the ledger's incarnations, the last one last."""
    async with await psycopg.AsyncConnection.connect(database) as admin:
        found = await admin.execute(
            "SELECT event, incarnation::text, frozen, reason FROM incarnations ORDER BY number"
        )
        return await found.fetchall()


async def move(database: str, column: str) -> None:
    """Record that the ledger was somewhere else until now: what a restore leaves."""
    place = ", ".join(f"{name} - {int(name == column)}" for name in PLACE)
    xid = "pg_current_xact_id()::text::bigint" + (" - 1" if column == "xid" else "")
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        columns = "incarnation, frozen, event, positions"
        sql = (
            f"INSERT INTO incarnations (number, {columns}, xid, {', '.join(PLACE)})"  # noqa: S608
            f" SELECT number + 1, {columns}, {xid}, {place}"
            " FROM incarnations ORDER BY number DESC LIMIT 1"
        )
        await admin.execute(sql.encode())


async def put_back(database: str) -> None:
    """Take every lane back to its beginning, as a restore does."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute("UPDATE lanes SET position = 0")


async def disconnect(database: str) -> None:
    """End all other sessions."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


async def confirm(database: str, *, nothing_lost: bool = False) -> operating.Restored:
    return await operating.restored(
        database, principal="ops", reason="put back to noon", nothing_lost=nothing_lost
    )


@pytest.fixture
async def root(store: Store, spender: Spender) -> Grant:
    root = await spender.grant(store)
    await spender.spend(store.writer(store.lane_of(root.root_id)), root)
    return root


@pytest.fixture
async def frozen(store: Store, root: Grant, database: str) -> AsyncIterator[Store]:
    """The same ledger, opened after it was found to be in another PostgreSQL."""
    await move(database, "system_identifier")
    opened = await Store.open(database)
    assert opened.frozen
    yield opened
    await opened.close()


@pytest.fixture(params=["with care", "guessing"])
def _writers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "guessing":
        monkeypatch.setattr(Known, "ALONE_AFTER", 0)


# --- a server that opens a ledger ---


async def test_a_ledger_that_stays_where_it_is_keeps_its_incarnation(
    store: Store, root: Grant, database: str
) -> None:
    again = await Store.open(database)
    await again.close()
    assert again.incarnation == store.incarnation
    assert not again.frozen


async def test_a_copy_in_which_nothing_was_recorded_is_another_ledger_and_no_restored_one(
    store: Store, database: str, postgres: Server
) -> None:
    await store.close()
    with postgres.fresh_database(urlsplit(database).path.removeprefix("/")) as copy:
        other = await Store.open(copy)
        await other.close()
    assert other.incarnation != store.incarnation
    assert not other.frozen


async def test_a_copy_of_what_was_recorded_is_frozen_and_the_original_is_not(
    store: Store, root: Grant, database: str, postgres: Server
) -> None:
    await store.close()
    with postgres.fresh_database(urlsplit(database).path.removeprefix("/")) as copy:
        other = await Store.open(copy)
        assert other.frozen
        assert other.incarnation != store.incarnation
        assert await spent(other, root) == 1
        await other.close()
        *_, (event, _, frozen, reason) = await rows(copy)
        assert (event, frozen) == ("noticed", True)
        assert "its database has oid" in reason
    original = await Store.open(database)
    await original.close()
    assert original.incarnation == store.incarnation
    assert not original.frozen


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("system_identifier", "it is in PostgreSQL"),
        ("timeline", "it is on timeline"),
        ("database_oid", "its database has oid"),
        ("xid", "its rows were written anew"),
    ],
)
async def test_a_ledger_that_is_elsewhere_than_it_was_is_frozen_under_another_incarnation(
    store: Store, root: Grant, database: str, column: str, said: str
) -> None:
    await move(database, column)
    opened = await Store.open(database)
    await opened.close()
    assert opened.frozen
    assert opened.incarnation != store.incarnation
    # Secrets of webhooks are made from this: receivers go on with those that they have.
    assert opened.origin == store.origin
    *_, (event, _, frozen, reason) = await rows(database)
    assert (event, frozen) == ("noticed", True)
    assert said in reason
    again = await Store.open(database)
    await again.close()
    assert again.incarnation == opened.incarnation
    assert again.frozen


async def test_of_servers_that_start_at_once_one_notices_and_all_agree(
    store: Store, root: Grant, database: str
) -> None:
    before = len(await rows(database))
    await move(database, "database_oid")
    opened = await asyncio.gather(*(Store.open(database) for _ in range(4)))
    for each in opened:
        await each.close()
    assert len({each.incarnation for each in opened}) == 1
    assert len(await rows(database)) == before + 2


# --- a server that was there before ---


async def test_a_standby_that_took_over_with_everything_is_gone_on_with(
    store: Store, root: Grant, database: str, spender: Spender
) -> None:
    await store.probe()
    await move(database, "timeline")
    await disconnect(database)
    await spender.spend(store.writer(store.lane_of(root.root_id)), root)
    assert not store.frozen
    assert store.restored is None
    event, incarnation, frozen, reason = (await rows(database))[-1]
    assert (event, incarnation.replace("-", ""), frozen) == (
        "moved",
        store.incarnation.hex(),
        False,
    )
    assert "timeline" in reason
    again = await Store.open(database)
    await again.close()
    assert again.incarnation == store.incarnation
    assert not again.frozen


async def test_a_standby_that_takes_over_what_is_frozen_thaws_nothing(
    frozen: Store, database: str
) -> None:
    await move(database, "timeline")
    await frozen.probe()
    assert frozen.frozen
    assert (await rows(database))[-1][::2] == ("moved", True)


async def test_who_has_not_seen_the_ledger_for_long_vouches_for_no_standby(
    store: Store, root: Grant, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incarnations, "FRESH_SECONDS_MAX", 0.0)
    await move(database, "timeline")
    with pytest.raises(LedgerRestored):
        await store.probe()
    assert (await rows(database))[-1][::2] == ("noticed", True)


@pytest.mark.parametrize("column", ["system_identifier", "database_oid", "xid"])
async def test_what_is_no_standby_is_not_gone_on_with_although_nothing_is_missing(
    store: Store, root: Grant, database: str, column: str
) -> None:
    await move(database, column)
    with pytest.raises(LedgerRestored):
        await store.probe()
    assert store.restored is not None


@pytest.mark.usefixtures("_writers")
async def test_a_database_that_has_forgotten_what_it_acknowledged_is_noticed_where_it_is(
    store: Store, root: Grant, database: str, spender: Spender
) -> None:
    """So a snapshot of the disk is found, which leaves no other trace."""
    writer = store.writer(store.lane_of(root.root_id))
    await spender.spend(writer, root)
    await spender.spend(writer, root)
    await put_back(database)
    await disconnect(database)
    with pytest.raises(LedgerRestored, match="stands at 0, and stood at 4"):
        await spender.spend(writer, root)
    assert store.restored is not None
    with pytest.raises(LedgerRestored):
        await spent(store, root)
    opened = await Store.open(database)
    await opened.close()
    assert opened.frozen
    assert opened.incarnation != store.incarnation


async def test_what_only_another_server_has_recorded_is_missed_too(
    store: Store, other_store: Store, root: Grant, database: str
) -> None:
    await other_store.probe()
    await put_back(database)
    with pytest.raises(LedgerRestored):
        await other_store.probe()
    # This one learns of it from the other.
    with pytest.raises(LedgerRestored):
        await store.probe()
    assert [event for event, *_ in await rows(database)].count("noticed") == 1


async def test_what_was_only_read_counts_as_seen(
    store: Store, other_store: Store, root: Grant, database: str
) -> None:
    await other_store.probe()
    await store.close()
    await put_back(database)
    with pytest.raises(LedgerRestored):
        await other_store.probe()


# --- a frozen ledger ---


@pytest.mark.usefixtures("_writers")
async def test_nothing_is_spent_from_a_frozen_ledger_and_everything_can_be_read(
    frozen: Store, root: Grant, spender: Spender
) -> None:
    writer = frozen.writer(frozen.lane_of(root.root_id))
    for _ in range(3):
        answer = await spender.do(writer, spender.ask(root))
        assert isinstance(answer, Refused)
        assert answer.reason is Refusal.BUDGET_FROZEN
        assert answer.facts["by"] == "restore"
        assert "peculium_restored" in answer.facts["remedy"]
    assert await spent(frozen, root) == 1


async def test_what_was_recorded_before_is_told_again_while_it_is_frozen(
    store: Store, root: Grant, spender: Spender, database: str
) -> None:
    operation = spender.ask(root)
    lane = store.lane_of(root.root_id)
    await spender.do(store.writer(lane), operation)
    await move(database, "database_oid")
    opened = await Store.open(database)
    answer = await spender.do(opened.writer(lane), operation)
    await opened.close()
    assert isinstance(answer, Outcome)
    assert answer.replayed


async def test_an_operator_lets_it_go_on_and_servers_learn_of_it(
    frozen: Store, root: Grant, spender: Spender, database: str
) -> None:
    before, after = await confirm(database)
    assert before.frozen
    assert after.incarnation == frozen.incarnation
    assert (await rows(database))[-1][::2] == ("confirmed", False)
    await frozen.probe()
    assert not frozen.frozen
    await spender.spend(frozen.writer(frozen.lane_of(root.root_id)), root)


async def test_what_lost_nothing_gets_the_incarnation_back_that_it_had(
    store: Store, frozen: Store, database: str
) -> None:
    _, after = await confirm(database, nothing_lost=True)
    assert after.incarnation == store.incarnation != frozen.incarnation
    # Who has served it in between begins anew.
    with pytest.raises(LedgerRestored):
        await frozen.probe()
    opened = await Store.open(database)
    await opened.close()
    assert opened.incarnation == store.incarnation
    assert not opened.frozen


async def test_a_restore_that_nobody_has_noticed_is_said_by_the_operator(
    store: Store, root: Grant, database: str
) -> None:
    before, after = await confirm(database)
    assert not before.frozen
    assert after.incarnation != store.incarnation
    with pytest.raises(LedgerRestored):
        await store.probe()
    opened = await Store.open(database)
    await opened.close()
    assert opened.incarnation == after.incarnation
    assert not opened.frozen


async def test_a_place_that_an_operator_has_confirmed_is_not_noticed_again(
    store: Store, root: Grant, database: str
) -> None:
    await store.close()
    await move(database, "system_identifier")
    _, after = await confirm(database, nothing_lost=True)
    assert after.incarnation == store.incarnation
    opened = await Store.open(database)
    await opened.close()
    assert not opened.frozen
    assert opened.incarnation == store.incarnation


async def test_who_said_so_and_why_is_kept(frozen: Store, database: str) -> None:
    _, after = await confirm(database)
    assert (after.principal, after.reason, after.event) == ("ops", "put back to noon", "confirmed")
    async with await psycopg.AsyncConnection.connect(database) as auditor:
        found = await auditor.execute(
            "SELECT principal, reason FROM audit.incarnations ORDER BY number DESC LIMIT 1"
        )
        assert await found.fetchone() == ("ops", "put back to noon")
