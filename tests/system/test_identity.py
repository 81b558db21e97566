"""Who calls, what that allows, and that the ledger says it of everything that it records."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import grpc
import psycopg
import pytest

import peculium
from peculium import Child, Client
from peculium.errors import (
    BudgetExhausted,
    CapabilityUnknown,
    OperationIdReused,
    PermissionDenied,
    TokenConsumed,
    Unauthenticated,
)
from tests.forked import Forked
from tests.postgres import Server as PostgresServer
from tests.server import RunningServer, ServerFailed, StartServer, starting
from tests.system.racers import racing
from tests.system.wire import Held, Told, Wire, spend_of
from tests.system.world import ADMIN, AUDIT, LEDGER, METHODS, dump

pytestmark = pytest.mark.timeout(240)

PRINCIPALS = {
    "ops": "admin",
    "gateway": "agent",
    "crawler": "agent",
    "revision": "auditor",
}
PROCESSES = 4
CALLS = 25
MAY_CALL = {
    LEDGER: {"agent", "admin"},
    ADMIN: {"admin"},
    AUDIT: {"auditor", "admin"},
}


@dataclass(frozen=True)
class Guarded:
    """A server that knows its callers, and their keys by principal."""

    server: RunningServer
    database: str
    keys: dict[str, str]

    def connect(self, principal: str) -> Client:
        return peculium.connect(self.server.address, api_key=self.keys[principal])


@pytest.fixture(scope="module")
def guarded(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    directory = tmp_path_factory.mktemp("guarded")
    keys = {principal: secrets.token_urlsafe(32) for principal in PRINCIPALS}
    keys_file = directory / "keys.toml"
    keys_file.write_text(
        "\n".join(
            f'[[keys]]\nprincipal = "{principal}"\nrole = "{role}"\n'
            f'sha256 = "{hashlib.sha256(keys[principal].encode()).hexdigest()}"\n'
            for principal, role in PRINCIPALS.items()
        )
    )
    with (
        postgres.fresh_database(postgres.migrated_template()) as database,
        starting(directory, Forked) as start,
    ):
        server = start("--database-url", database, "--keys-file", str(keys_file))
        yield Guarded(server, database, keys)


@pytest.fixture
def ops(guarded: Guarded) -> Iterator[Client]:
    with guarded.connect("ops") as client:
        yield client


@pytest.fixture
def gateway(guarded: Guarded) -> Iterator[Client]:
    with guarded.connect("gateway") as client:
        yield client


@pytest.fixture
def crawler(guarded: Guarded) -> Iterator[Client]:
    with guarded.connect("crawler") as client:
        yield client


@pytest.mark.parametrize("principal", PRINCIPALS)
def test_each_role_may_call_its_own_methods_and_no_others(guarded: Guarded, principal: str) -> None:
    role = PRINCIPALS[principal]
    with Wire(guarded.server.address, guarded.keys[principal]) as wire:
        for method in METHODS:
            service = method[: method.rindex("/") + 1]
            answer = wire.send(method, b"")
            if role in MAY_CALL[service] or (role == "auditor" and method == ADMIN + "ListKeys"):
                assert isinstance(answer, bytes) or answer.reason == "MALFORMED", method
            else:
                assert isinstance(answer, Told), method
                assert answer.code is grpc.StatusCode.PERMISSION_DENIED
                assert (answer.facts["principal"], answer.facts["role"]) == (principal, role)


@pytest.mark.parametrize("key", [None, "", "guessed"])
def test_nobody_without_a_key_of_the_file_is_served(guarded: Guarded, key: str | None) -> None:
    with Wire(guarded.server.address, key) as wire:
        for method in METHODS:
            answer = wire.send(method, b"")
            assert answer == Told(
                grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", {"header": "authorization"}
            )


def test_the_sdk_says_what_is_missing(guarded: Guarded, gateway: Client) -> None:
    with peculium.connect(guarded.server.address) as nobody, pytest.raises(Unauthenticated):
        nobody.open("anything")
    with pytest.raises(PermissionDenied):
        gateway.admin.grant("mine", unit="calls", amount=1)


def test_every_entry_names_the_principal_who_asked(
    ops: Client, gateway: Client, crawler: Client
) -> None:
    ops.admin.grant("named", unit="calls", amount=100, holder="gateway")
    budget = gateway.open("named")
    [made] = budget.delegate([Child("child", 50, holder="crawler")])
    crawler.open("named/child").spend(5)
    ops.admin.freeze("named")
    actors = [
        (entry.kind, entry.budget_id == made.ref.budget_id, entry.actor)
        for entry in ops.audit.entries("named", reach=peculium.Reach.TREE)
    ]
    assert actors == [
        ("GRANT", False, "ops"),
        ("DELEGATE", False, "gateway"),
        ("DELEGATE", True, "gateway"),
        ("SPEND", True, "crawler"),
        ("FREEZE", False, "ops"),
    ]


def replica(connection: Connection, barrier: Barrier, address: str, key: str) -> None:
    """One of a service's processes: reserves and settles, with nothing but a path and its key."""
    with peculium.connect(address, api_key=key) as client:
        path = connection.recv()
        budget = client.open(path)
        barrier.wait()
        settled = 0
        for _ in range(CALLS):
            try:
                with budget.reserve(2) as hold:
                    settled += hold.settle(1).replayed is False
            except BudgetExhausted:
                break
        connection.send(settled)
        assert connection.recv() is None


def test_a_principals_processes_share_its_budget_and_nobody_else_can_use_it(
    guarded: Guarded, ops: Client, crawler: Client
) -> None:
    ops.admin.grant("shared", unit="calls", amount=1_000, holder="gateway")
    with racing(replica, PROCESSES, guarded.server.address, guarded.keys["gateway"]) as race:
        settled = race.start("shared")
    assert settled == [CALLS] * PROCESSES
    balances = ops.audit.budget("shared").balances
    assert (balances.spent, balances.held) == (CALLS * PROCESSES, 0)
    with pytest.raises(CapabilityUnknown):
        crawler.open("shared")
    with pytest.raises(CapabilityUnknown):
        crawler.recover("shared")


def test_a_capability_for_one_principal_is_worth_nothing_in_anothers_hands(
    ops: Client, gateway: Client, crawler: Client
) -> None:
    made = ops.admin.grant("bound", unit="calls", amount=100, holder="gateway", token=True)
    stolen = made.capability.reveal()
    with pytest.raises(CapabilityUnknown):
        crawler.accept(stolen)
    budget = gateway.accept(stolen)
    budget.spend(1)
    # A bearer's capability belongs to whoever accepts it, and from then on to nobody else.
    [child] = budget.delegate([Child("child", 10)])
    accepted = crawler.accept(child.capability)
    moved = accepted.hand_over().reveal()
    with pytest.raises(CapabilityUnknown):
        gateway.accept(moved)
    assert ops.audit.budget("bound/child").holder == "crawler"


def test_the_older_of_two_incarnations_is_told_that_it_was_fenced(
    guarded: Guarded, ops: Client, gateway: Client
) -> None:
    made = ops.admin.grant("fenced", unit="calls", amount=100, holder="gateway", token=True)
    older = gateway.accept(made.capability)
    hold = older.reserve(10)
    with guarded.connect("gateway") as restarted:
        newer = restarted.recover("fenced")
        assert [found.hold_id for found in newer.holds()] == [hold.hold_id]
        with pytest.raises(TokenConsumed) as fenced:
            older.reserve(1)
        assert fenced.value.fenced_by == "gateway"
        # What was reserved before is settled by whoever has the hold.
        hold.settle(7)
        newer.spend(1)
    assert ops.audit.budget("fenced").balances.spent == 8


def test_an_operation_id_belongs_to_the_principal_who_used_it(
    guarded: Guarded, ops: Client
) -> None:
    made = ops.admin.grant("replayed", unit="calls", amount=100)
    secret = made.capability.take("the test")
    with (
        Wire(guarded.server.address, guarded.keys["gateway"]) as first,
        Wire(guarded.server.address, guarded.keys["crawler"]) as second,
    ):
        held = Held(made.ref.root_id, made.ref.budget_id, secret)
        request = spend_of(held, 1)
        assert isinstance(first.send(LEDGER + "Spend", request), bytes)
        answer = second.send(LEDGER + "Spend", request)
    assert isinstance(answer, Told)
    assert answer.reason == OperationIdReused.reason
    assert answer.facts["field"] == "principal"


def test_no_key_is_to_be_found_in_the_log_or_the_database(guarded: Guarded, ops: Client) -> None:
    ops.admin.grant("quiet", unit="calls", amount=1, holder="gateway")
    with psycopg.connect(guarded.database) as connection:
        rows = [row for table in dump(connection).values() for row in table]
    for key in guarded.keys.values():
        assert not [line for line in guarded.server.said if key in line]
        assert not [row for row in rows if key in row or key.encode().hex() in row]


def test_without_any_key_everybody_is_dev_and_the_server_says_so(
    running_server: RunningServer,
) -> None:
    warnings = [line for line in running_server.said if line.startswith("WARNING")]
    assert any("may do everything" in line and "'dev'" in line for line in warnings)
    with peculium.connect(running_server.address, api_key="whatever") as client:
        client.admin.grant("acme", unit="calls", amount=1, holder="dev")
        assert [entry.actor for entry in client.audit.entries("acme")] == ["dev"]


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:7415"])
def test_without_tls_only_this_machine_is_served(
    start_server: StartServer, database: str, listen: str
) -> None:
    with pytest.raises(ServerFailed, match="exit code 2") as failed:
        start_server("--database-url", database, listen=listen)
    assert "only a loopback address" in str(failed.value)


def test_without_tls_others_are_served_if_that_is_allowed(
    start_server: StartServer, database: str, tmp_path: Path
) -> None:
    keys_file = tmp_path / "keys.toml"
    digest = hashlib.sha256(b"key").hexdigest()
    keys_file.write_text(f'[[keys]]\nprincipal = "ops"\nrole = "admin"\nsha256 = "{digest}"\n')
    server = start_server(
        *("--database-url", database, "--keys-file", str(keys_file), "--allow-plaintext"),
        listen="0.0.0.0:0",
    )
    port = server.address.rpartition(":")[2]
    with peculium.connect(f"127.0.0.1:{port}", api_key="key") as client:
        client.admin.grant("acme", unit="calls", amount=1, holder="dev")
    assert not [line for line in server.said if "may do everything" in line]
