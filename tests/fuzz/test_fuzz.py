"""Whatever is sent: never the server's failure, and no balance changes but by what was accepted."""

from __future__ import annotations

import random
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from peculium_server.rpc.permissions import PERMISSIONS
from tests.fuzz import books
from tests.fuzz.books import Answered, Books
from tests.fuzz.campaign import NEVER, Campaign
from tests.fuzz.guessing import KINDS
from tests.fuzz.serving import FLAGS, key_file
from tests.fuzz.twisting import Twister
from tests.server import RunningServer, StartServer
from tests.system.wire import Held, Wire, granted, new_id, spend_of

pytestmark = pytest.mark.timeout(240)

CASES = 4_000
REACHED = {
    *((name, "OK") for name in ("Reserve", "Spend", "Settle", "Release", "Delegate", "Accept")),
    *((name, "OK") for name in ("Grant", "TopUp", "Freeze", "Batch", "GetBudget", "Verify")),
    *((name, "OK") for name in ("CreateKey", "ListBudgets", "ListEntries", "WatchEntries")),
    ("Spend", "INVALID_ARGUMENT"),
    ("Settle", "NOT_FOUND"),
}
"""How deep the guesses have to get for the test to say anything."""
OTHERS = {"UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "ALREADY_EXISTS"}


def test_every_method_is_asked() -> None:
    assert set(KINDS) == set(PERMISSIONS)


async def test_whatever_is_asked_is_answered_and_changes_only_what_was_accepted(
    start_server: StartServer, served_database: str, database: str, tmp_path: Path
) -> None:
    keys, flags = key_file(tmp_path)
    server = start_server("--database-url", served_database, *flags, *FLAGS)
    campaign = Campaign(server.address, keys, database, server.process.pid, seed=2606)
    verdict = await campaign.run(CASES, lambda _: None)
    assert verdict.problems == []
    assert verdict.clean
    assert verdict.cases == CASES
    assert not verdict.statuses.keys() & set(NEVER)
    assert verdict.reached >= REACHED
    assert verdict.statuses.keys() >= OTHERS


@pytest.fixture
def acme(running_server: RunningServer) -> Held:
    with Wire(running_server.address) as wire:
        return granted(wire, "acme", 100)


@pytest.mark.parametrize("told", [True, False], ids=["answered", "not answered"])
def test_what_is_recorded_and_was_not_answered_is_found(
    running_server: RunningServer, database: str, acme: Held, told: bool
) -> None:
    request = spend_of(acme, 7)
    with psycopg.connect(database, autocommit=True) as connection:
        before = Books.read(connection)
        with Wire(running_server.address) as wire:
            wire.ledger.Spend(request)
        answered = Answered({UUID(bytes=request.header.operation_id)} if told else set())
        found = books.audit(connection, before, Books.read(connection), answered)
    assert (found.changed, len(found.problems)) == ((0, 0) if told else (1, 1))


def test_a_balance_that_no_entry_tells_of_is_found(database: str, acme: Held) -> None:
    change = "UPDATE budgets SET granted = granted + 1, available = available + 1"
    with psycopg.connect(database, autocommit=True) as connection:
        before = Books.read(connection)
        connection.execute(change)
        found = books.audit(connection, before, Books.read(connection), Answered())
    assert found.changed == 1
    assert [problem.split()[0] for problem in found.problems] == ["budget", "root"]


def test_spoilt_requests_are_of_every_kind() -> None:
    request = spend_of(Held(new_id(), new_id()), 1)
    twister, data = Twister(random.Random(1)), request.SerializeToString()  # noqa: S311 - repeatable
    spoilt = [twister.message(request) for _ in range(500)]
    assert any(len(each) > 50_000 for each in spoilt)
    assert any(len(each) < len(data) // 2 for each in spoilt)
    assert len(set(spoilt)) > 200
