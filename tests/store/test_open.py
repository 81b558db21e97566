"""Which databases a store opens, and which it refuses."""

from __future__ import annotations

import traceback

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from peculium_server.config import ConfigInvalid
from peculium_server.core.lanes import lane_of
from peculium_server.store import migrate
from peculium_server.store.errors import (
    SchemaOutdated,
    ServerOutdated,
    SettingsUnsafe,
    StoreUnavailable,
)
from peculium_server.store.schema import LANES
from peculium_server.store.store import Store


async def alter(database: str, setting: str, value: str) -> None:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute(
            sql.SQL("ALTER DATABASE {} SET {} = {}").format(
                sql.Identifier(str(conninfo_to_dict(database)["dbname"])),
                sql.Identifier(setting),
                sql.Literal(value),
            )
        )


async def test_a_ledger_tells_its_lanes_and_its_incarnation(database: str, store: Store) -> None:
    assert store.lanes == LANES == 16
    assert len(store.incarnation) == 16
    again = await Store.open(database)
    assert again.incarnation == store.incarnation
    await again.close()


async def test_an_empty_database_is_refused(empty_database: str) -> None:
    with pytest.raises(SchemaOutdated) as raised:
        await Store.open(empty_database)
    assert (raised.value.found, raised.value.expected) == (None, migrate.head())
    assert "peculium migrate" in str(raised.value)


SECRET = "correct-horse"


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://ledger:per%zzcent{SECRET}@db.example/p",
        f"postgresql://ledger@db.example/p?pasword={SECRET}={SECRET}",
        f"host=db.example password='{SECRET}",
        f"host=db.example {SECRET}=x",
    ],
)
async def test_of_an_address_that_libpq_cannot_read_nothing_is_repeated(dsn: str) -> None:
    with pytest.raises(ConfigInvalid) as raised:
        await Store.open(dsn)
    assert SECRET not in "".join(traceback.format_exception(raised.value))


async def at_revision(database: str, revision: str, serves_from: str) -> None:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute("UPDATE alembic_version SET version_num = %s", [revision])
        await admin.execute("UPDATE ledger SET serves_from = %s", [serves_from])


async def test_a_database_at_an_older_revision_is_refused(database: str) -> None:
    await at_revision(database, "0001", "0001")
    with pytest.raises(SchemaOutdated, match=r"at schema 0001.* run peculium migrate"):
        await Store.open(database)


async def test_a_database_that_a_newer_version_has_expanded_is_served(database: str) -> None:
    """So it is migrated before its servers are replaced."""
    await at_revision(database, "9999", migrate.head())
    store = await Store.open(database)
    await store.close()


async def test_a_database_that_lacks_what_this_version_uses_is_refused(database: str) -> None:
    await at_revision(database, "9999", "9998")
    with pytest.raises(ServerOutdated, match="servers of schema 9998 or newer") as raised:
        await Store.open(database)
    assert (raised.value.found, raised.value.own) == ("9999", migrate.head())


async def test_a_database_that_forgets_commits_is_refused_unless_that_is_allowed(
    database: str,
) -> None:
    await alter(database, "synchronous_commit", "off")
    with pytest.raises(SettingsUnsafe, match="synchronous_commit is off") as raised:
        await Store.open(database)
    assert raised.value.settings == {"synchronous_commit": "off"}
    store = await Store.open(database, unsafe_settings_allowed=True)
    await store.close()


@pytest.mark.parametrize("value", ["on", "local", "remote_apply"])
async def test_every_other_way_to_commit_is_safe_enough(database: str, value: str) -> None:
    await alter(database, "synchronous_commit", value)
    store = await Store.open(database)
    await store.close()


async def test_a_database_that_takes_no_writes_is_refused(database: str) -> None:
    """A standby, too, is told apart by the session being read-only."""
    await alter(database, "default_transaction_read_only", "on")
    with pytest.raises(StoreUnavailable):
        await Store.open(database)


async def test_no_database_at_all_is_refused_without_telling_the_password() -> None:
    dsn = "postgresql://someone:hunter2@127.0.0.1:1/none"
    with pytest.raises(StoreUnavailable) as raised:
        await Store.open(dsn)
    assert "hunter2" not in str(raised.value)
    assert not raised.value.outcome_unknown


async def test_an_unknown_database_is_refused(database: str) -> None:
    with pytest.raises(StoreUnavailable):
        await Store.open(make_conninfo(database, dbname="nobody-made-this"))


async def test_a_closed_store_has_no_sessions_left(database: str) -> None:
    store = await Store.open(database)
    await store.writer(3).run({}, lambda _: [], None)
    await store.close()
    async with await psycopg.AsyncConnection.connect(database) as admin:
        found = await admin.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'peculium'"
        )
        assert await found.fetchone() == (0,)


def test_the_lane_of_a_root_is_fixed_for_ever() -> None:
    """Another program finds a tree's rows by the same computation."""
    roots = [bytes(16), bytes(range(16)), b"\xff" * 16]
    assert [lane_of(root, 16) for root in roots] == [4, 14, 11]
    spread = [lane_of(number.to_bytes(16), 16) for number in range(16_000)]
    assert all(900 < spread.count(lane) < 1_100 for lane in range(16))
