"""A stolen capability shows: real principals, real servers, and what auditors are told of it."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

import peculium
from peculium import BudgetState, Child, Client, EntryFilter, Reach, SecurityEvent
from peculium.errors import (
    BudgetFrozen,
    BudgetUnknown,
    CapabilityUnknown,
    Malformed,
    PermissionDenied,
    TokenConsumed,
)
from peculium_server.store import roles
from tests.cli.test_cli import Cli
from tests.forked import Forked
from tests.postgres import Server as PostgresServer, as_role
from tests.server import RunningServer, StartServer, starting

pytestmark = pytest.mark.timeout(120)

PRINCIPALS = {"ops": "admin", "alice": "agent", "bob": "agent", "revision": "auditor"}


@dataclass(frozen=True)
class World:
    """Servers of one ledger: two that freeze, and one that only records."""

    start: StartServer
    flags: tuple[str, ...]
    database: str
    keys: dict[str, str]
    freezing: tuple[RunningServer, RunningServer]
    recording: RunningServer

    def connect(self, principal: str, server: RunningServer | None = None) -> Client:
        address = (server or self.recording).address
        return peculium.connect(address, api_key=self.keys[principal])


@pytest.fixture(scope="module")
def world(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("reuse")
    keys = {principal: secrets.token_urlsafe(32) for principal in PRINCIPALS}
    with (
        postgres.fresh_database(postgres.migrated_template()) as database,
        starting(folder, Forked) as start,
    ):
        flags = _flags(folder, database, keys)
        freezing = (*flags, "--freeze-on-reuse-seconds", "3600")
        servers = start(*freezing), start(*freezing)
        yield World(start, flags, database, keys, servers, start(*flags))


def _flags(folder: Path, database: str, keys: dict[str, str]) -> tuple[str, ...]:
    file = folder / "keys.toml"
    file.write_text(
        "\n".join(
            f'[[keys]]\nprincipal = "{principal}"\nrole = "{role}"\n'
            f'sha256 = "{hashlib.sha256(keys[principal].encode()).hexdigest()}"\n'
            for principal, role in PRINCIPALS.items()
        )
    )
    served = as_role(database, roles.SERVER)
    return ("--database-url", served, "--keys-file", str(file), "--alert-seconds", "0")


@pytest.fixture
def ops(world: World) -> Iterator[Client]:
    with world.connect("ops") as client:
        yield client


@pytest.fixture
def alice(world: World) -> Iterator[Client]:
    with world.connect("alice") as client:
        yield client


@pytest.fixture
def bob(world: World) -> Iterator[Client]:
    with world.connect("bob") as client:
        yield client


def granted(ops: Client, name: str) -> str:
    """The text of a new root's capability, which is a bearer's."""
    return ops.admin.grant(name, unit="calls", amount=100).capability.reveal()


def told(client: Client, budget: str, **options: Any) -> list[SecurityEvent]:
    return list(client.audit.security_events(budget, **options))


def freezes(client: Client, budget: str) -> list[str]:
    """Who has frozen a budget."""
    found = client.audit.entries(budget, reach=Reach.BUDGET, selected=EntryFilter(kinds=["FREEZE"]))
    return [entry.actor for entry in found]


def test_the_thief_after_the_owner_is_recorded_and_nothing_else_happens(
    ops: Client, alice: Client, bob: Client
) -> None:
    text = granted(ops, "after")
    owned = alice.accept(text)
    begun = datetime.now(UTC)
    with pytest.raises(TokenConsumed):
        bob.accept(text)
    [event] = told(ops, "after")
    assert (event.kind, event.principal, event.consumed_by) == ("CONSUMED_TOKEN", "bob", "alice")
    assert (event.consumed_kind, event.count, event.holder) == ("ACCEPT", 1, "alice")
    assert abs(event.at - begun) < timedelta(minutes=1)
    assert event.freeze_id is None
    [accept] = ops.audit.entries("after", selected=EntryFilter(kinds=["ACCEPT"]))
    assert (event.consumed_operation_id, event.consumed_at) == (accept.operation_id, accept.at)
    # The owner goes on.
    owned.spend(1)


def test_the_owner_after_the_thief_is_recorded_likewise(
    ops: Client, alice: Client, bob: Client
) -> None:
    text = granted(ops, "before")
    bob.accept(text).spend(5)
    with pytest.raises(TokenConsumed):
        alice.accept(text)
    [event] = told(ops, "before")
    assert (event.principal, event.consumed_by, event.holder) == ("alice", "bob", "bob")


def test_a_bound_token_is_of_no_use_to_who_has_stolen_it_and_shows(
    ops: Client, alice: Client, bob: Client
) -> None:
    live = alice.accept(granted(ops, "bound")).hand_over().reveal()
    with pytest.raises(CapabilityUnknown):
        bob.accept(live)
    [event] = told(ops, "bound")
    assert (event.kind, event.principal, event.holder) == ("BOUND_TOKEN", "bob", "alice")
    assert (event.consumed_by, event.consumed_operation_id, event.consumed_at) == (None, None, None)
    # It lies in the owner's hands as before.
    alice.accept(live).spend(1)


def test_retries_of_one_principal_and_whom_an_admin_fences_are_no_events(
    world: World, ops: Client, alice: Client
) -> None:
    text = granted(ops, "again")
    older = alice.accept(text)
    with world.connect("alice", world.freezing[0]) as replica:
        for client in (alice, replica, replica):
            with pytest.raises(TokenConsumed):
                client.accept(text)
        ops.admin.recover("again", holder="bob", token=True)
        with pytest.raises(TokenConsumed):
            older.spend(1)
    made_up = peculium.Capability(
        root_id=older.ref.root_id, budget_id=older.ref.budget_id, secret=secrets.token_bytes(32)
    )
    with pytest.raises(CapabilityUnknown):
        alice.accept(made_up)
    assert told(ops, "again", reach=Reach.TREE) == []
    assert freezes(ops, "again") == []


def test_servers_that_are_told_to_freeze_the_budget_once_and_an_unfreeze_stands(
    world: World, ops: Client
) -> None:
    text = granted(ops, "frozen")
    with world.connect("bob", world.freezing[0]) as thief:
        stolen = thief.accept(text)
        child = thief.accept(stolen.delegate([Child("below", 10)])[0].capability)

        def present(server: RunningServer) -> None:
            with world.connect("alice", server) as owner:
                for _ in range(3):
                    with pytest.raises(TokenConsumed):
                        owner.accept(text)

        with ThreadPoolExecutor(2) as both:
            list(both.map(present, world.freezing))
        # It was, before anybody had an answer.
        for budget in (stolen, child):
            with pytest.raises(BudgetFrozen):
                budget.spend(1)
        assert freezes(ops, "frozen") == ["system"]
        events = told(ops, "frozen")
        [freeze_id] = {event.freeze_id for event in events if event.freeze_id is not None}
        [entry] = ops.audit.entries("frozen", selected=EntryFilter(kinds=["FREEZE"]))
        assert entry.operation_id == freeze_id
        ops.admin.unfreeze("frozen")
        for server in world.freezing:
            present(server)
        stolen.spend(1)
        assert freezes(ops, "frozen") == ["system"]
    assert ops.audit.budget("frozen").state is BudgetState.OPEN
    *_, verdict = ops.audit.verify("frozen")
    assert verdict.verified


def test_what_was_noticed_outlives_a_server_that_is_killed_when_it_has_answered(
    world: World, ops: Client, alice: Client
) -> None:
    text = granted(ops, "killed")
    alice.accept(text)
    server = world.start(*world.flags, "--freeze-on-reuse-seconds", "3600")
    with world.connect("bob", server) as thief, pytest.raises(TokenConsumed):
        thief.accept(text)
    server.kill()
    assert [event.principal for event in told(ops, "killed")] == ["bob"]
    assert freezes(ops, "killed") == ["system"]


def test_a_storm_is_counted_when_its_server_ends(world: World, ops: Client, alice: Client) -> None:
    text = granted(ops, "storm")
    alice.accept(text)
    server = world.start(*world.flags)
    with world.connect("bob", server) as thief:
        for _ in range(20):
            with pytest.raises(TokenConsumed):
                thief.accept(text)
    assert server.stop() == 0
    assert sorted(event.count for event in told(ops, "storm")) == [1, 19]
    assert any("event=security" in line for line in server.said)
    assert all(text not in line for line in server.said)


def test_auditors_ask_by_sdk_command_and_sql(
    world: World, ops: Client, alice: Client, bob: Client
) -> None:
    text = granted(ops, "asked")
    root = alice.accept(text)
    [made] = root.delegate([Child("run", 50)])
    below = made.capability.reveal()
    alice.accept(below)
    for stolen in (text, below):
        with pytest.raises(TokenConsumed):
            bob.accept(stolen)
    with world.connect("revision") as auditor:
        both = told(auditor, "asked", page_size=1)
        assert [str(event.ref) for event in both] == ["asked", "asked/run"]
        assert told(auditor, "asked", descending=True) == both[::-1]
        assert told(auditor, "asked", reach=Reach.BUDGET) == both[:1]
        assert told(auditor, "asked/run") == both[1:]
        assert told(auditor, "asked/run", reach=Reach.TREE) == both
        assert told(auditor, "asked", since=both[1].at) == both[1:]
        assert told(auditor, "asked", until=both[1].at) == both[:1]
        assert told(auditor, "asked", kinds=["BOUND_TOKEN"]) == []
        assert {*both} <= {*auditor.audit.security_events(kinds=["CONSUMED_TOKEN"])}
        with pytest.raises(Malformed):
            told(auditor, "asked", kinds=["NONSENSE"])
        with pytest.raises(BudgetUnknown):
            told(auditor, "nobody")
    with pytest.raises(PermissionDenied):
        told(alice, "asked")
    _on_the_command_line(world, both)
    with psycopg.connect(as_role(world.database, roles.AUDITOR)) as connection:
        rows = connection.execute(
            "SELECT path, principal, consumed_by, consumed_kind, number FROM audit.security_events"
            " WHERE root = 'asked' ORDER BY at"
        ).fetchall()
    assert rows == [(path, "bob", "alice", "ACCEPT", 1) for path in ("asked", "asked/run")]


def _on_the_command_line(world: World, events: list[SecurityEvent]) -> None:
    cli = Cli(world.recording.address, PECULIUM_API_KEY=world.keys["revision"])
    ask = ("audit", "security-events", "asked", "--kind", "consumed_token")
    lines = [json.loads(line) for line in cli.run(*ask, "--json").out.splitlines()]
    assert [line["event_id"] for line in lines] == [event.event_id for event in events[::-1]]
    assert [line["path"] for line in lines] == ["asked/run", "asked"]
    assert {line["principal"] for line in lines} == {"bob"}
    table = cli.run(*ask, "--oldest-first", "--limit", "1").out
    assert "alice (ACCEPT at" in table
    assert "bob" in table
    assert "asked/run" not in table
