"""A real server process: how it starts, what it says, and how it stops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import peculium
from peculium.errors import BudgetExhausted, PermissionDenied, Unauthenticated
from peculium.v1.admin_service_pb2_grpc import AdminServiceStub
from peculium.v1.ledger_service_pb2_grpc import LedgerServiceStub
from peculium_server import app
from peculium_server.config import Config
from peculium_server.core.operations import ByHolder, Grant, Spend
from peculium_server.signing import SigningKey
from tests.rpc.messages import message_of
from tests.rpc.test_reads import HOLDER, granted, new_id
from tests.server import RunningServer, ServerFailed, StartServer


def said(server: RunningServer) -> str:
    return "\n".join(server.said)


def keys_file(folder: Path, **roles: str) -> Path:
    """Keys for principals, each of whose key is its name."""
    file = folder / "keys.toml"
    file.write_text(
        "".join(
            f'[[keys]]\nprincipal = "{name}"\nrole = "{role}"\n'
            f'sha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
            for name, role in roles.items()
        )
    )
    return file


def test_money_is_granted_reserved_settled_and_verified(running_server: RunningServer) -> None:
    with peculium.connect(running_server.address) as client:
        client.admin.grant("acme", unit="calls", amount=100, holder="dev")
        budget = client.open("acme")
        with budget.reserve(60) as hold:
            hold.settle(25)
        with pytest.raises(BudgetExhausted) as caught:
            budget.reserve(80)
        assert (caught.value.available, caught.value.requested) == (75, 80)
        assert client.audit.budget("acme").balances.spent == 25
        *_, verdict = client.audit.verify()
        assert verdict.verified
        assert verdict.entries == 3


def test_a_server_without_keys_says_loudly_that_everybody_may_do_everything(
    running_server: RunningServer,
) -> None:
    [warning] = [line for line in running_server.said if "WARNING" in line]
    assert "'dev'" in warning
    assert running_server.address in warning


def test_a_server_seals_with_the_key_that_it_is_given(
    start_server: StartServer, database: str, tmp_path: Path
) -> None:
    key = SigningKey.make(tmp_path / "key.pem")
    arguments = ("--signing-key-file", str(tmp_path / "key.pem"), "--seal-seconds", "1")
    server = start_server("--database-url", database, *arguments)
    assert f"checkpoints are signed with the key {key.key_id.hex()}" in said(server)
    with peculium.connect(server.address) as client:
        client.admin.grant("acme", unit="calls", amount=100, holder="dev")
    with psycopg.connect(database, autocommit=True) as connection:
        deadline = time.monotonic() + 50
        while not (found := connection.execute("SELECT key_id FROM checkpoints").fetchall()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert found == [(key.key_id,)]


def test_a_server_without_a_key_for_checkpoints_says_that_it_does_not_seal(
    running_server: RunningServer,
) -> None:
    assert "without a signing_key_file this server does not seal" in said(running_server)


def test_a_server_that_is_told_not_to_seal_warns(start_server: StartServer, database: str) -> None:
    server = start_server("--database-url", database, "--seal-seconds", "0")
    assert "WARNING: this server does not seal" in said(server)


def test_a_key_for_checkpoints_that_others_may_read_is_refused(
    start_server: StartServer, database: str, tmp_path: Path
) -> None:
    SigningKey.make(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(0o644)
    with pytest.raises(ServerFailed, match="others may use it") as caught:
        start_server("--database-url", database, "--signing-key-file", str(tmp_path / "key.pem"))
    assert "exit code 2" in str(caught.value)


def test_a_server_on_its_own_postgresql_makes_a_key_once(tmp_path: Path) -> None:
    config = Config.load({"data_dir": str(tmp_path)}, {})
    first, second = app._signing_key(config), app._signing_key(config)
    assert first is not None
    assert second is not None
    assert first.key_id == second.key_id
    assert stat.S_IMODE((tmp_path / app.OWN_KEY).stat().st_mode) == 0o600


def test_a_server_without_tls_refuses_to_be_reached_from_elsewhere(
    start_server: StartServer, database: str
) -> None:
    with pytest.raises(ServerFailed, match="only a loopback address") as caught:
        start_server("--database-url", database, listen="192.0.2.1:0")
    assert "exit code 2" in str(caught.value)


def test_a_server_with_keys_knows_its_callers(
    start_server: StartServer, database: str, tmp_path: Path
) -> None:
    file = keys_file(tmp_path, root="admin", gateway="agent", controller="auditor")
    server = start_server("--database-url", database, "--keys-file", str(file))
    assert "WARNING" not in said(server)
    with peculium.connect(server.address, api_key="root") as admin:
        admin.admin.grant("acme", unit="calls", amount=100, holder="gateway")
    with peculium.connect(server.address, api_key="gateway") as agent:
        agent.open("acme").spend(5)
        with pytest.raises(PermissionDenied):
            agent.audit.budget("acme")
    with peculium.connect(server.address, api_key="controller") as auditor:
        recorded = [(entry.kind, entry.actor) for entry in auditor.audit.entries("acme")]
        assert recorded == [("GRANT", "root"), ("SPEND", "gateway")]
        with pytest.raises(PermissionDenied):
            auditor.admin.grant("other", unit="calls", amount=1, holder="gateway")
    with (
        peculium.connect(server.address, api_key="nobody") as nobody,
        pytest.raises(Unauthenticated),
    ):
        nobody.open("acme")


def test_a_server_that_others_can_reach_says_that_nothing_is_encrypted(
    start_server: StartServer, database: str, tmp_path: Path
) -> None:
    file = keys_file(tmp_path, root="admin")
    flags = ("--database-url", database, "--keys-file", str(file), "--allow-plaintext")
    server = start_server(*flags, listen="[::]:0")
    assert any(line.startswith("WARNING") and "NOT ENCRYPTED" in line for line in server.said)


def test_the_ready_file_is_there_while_calls_are_served(
    start_server: StartServer, database: str, tmp_path: Path
) -> None:
    ready_file = tmp_path / "ready.json"
    server = start_server("--database-url", database, PECULIUM_READY_FILE=str(ready_file))
    # The fixture's own flag beats the variable.
    assert not ready_file.exists()
    [written] = tmp_path.glob("ready-*.json")
    ready = json.loads(written.read_text())
    assert ready["pid"] == server.process.pid
    assert ready["listening"] == server.address
    server.stop()
    assert not written.exists()


def test_a_key_file_that_is_none_is_told_with_every_problem(
    start_server: StartServer, database: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[[keys]]\nprincipal = "system"\nrole = "king"\n')
    with pytest.raises(ServerFailed) as caught:
        start_server("--database-url", database, "--keys-file", str(file))
    for problem in ("exit code 2", "'system' is reserved", "role must be", "sha256 must be"):
        assert problem in str(caught.value)


def test_a_database_that_is_not_at_the_newest_schema_is_refused(
    start_server: StartServer, empty_database: str
) -> None:
    with pytest.raises(ServerFailed, match="peculium migrate"):
        start_server("--database-url", empty_database)


def test_a_database_that_could_forget_is_refused_unless_that_is_wanted(
    start_server: StartServer, database: str
) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    with pytest.raises(ServerFailed, match="synchronous_commit is off"):
        start_server("--database-url", database)
    server = start_server("--database-url", database, "--unsafe-settings")
    assert any(line.startswith("WARNING: a database that may forget") for line in server.said)


def test_a_database_that_is_not_there_is_told_so(start_server: StartServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ServerFailed, match="exit code 3"):
        start_server("--database-url", f"postgresql://nobody@127.0.0.1:{port}/none")


def test_an_address_that_is_taken_is_told_so(start_server: StartServer, database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerFailed, match=f"cannot listen on 127.0.0.1:{port}"):
            start_server("--database-url", database, listen=f"127.0.0.1:{port}")


def test_settings_are_printed_without_the_password(
    start_server: StartServer, database: str
) -> None:
    server = start_server("--database-url", f"{database}&password=correct-horse")
    assert "drain_seconds = 20" in said(server)
    assert "correct-horse" not in said(server)


def test_a_misspelt_variable_is_pointed_out(start_server: StartServer, database: str) -> None:
    server = start_server("--database-url", database, PECULIUM_KEY_FILE="keys.toml")
    assert "WARNING: PECULIUM_KEY_FILE is not a setting" in server.said


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """Where the user whom the server's own database runs as can enter, whoever runs the tests."""
    with tempfile.TemporaryDirectory(prefix="peculium-app-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "ledger"


def test_without_a_database_a_server_keeps_one_of_its_own(
    start_server: StartServer, data_dir: Path
) -> None:
    first = start_server("--data-dir", str(data_dir))
    assert "no database is configured" in said(first)
    with peculium.connect(first.address) as client:
        client.admin.grant("acme", unit="calls", amount=100, holder="dev")
    assert first.stop() == 0
    assert not (data_dir / "cluster" / "postmaster.pid").exists()
    second = start_server("--data-dir", str(data_dir))
    with peculium.connect(second.address) as client:
        assert client.audit.budget("acme").balances.granted == 100
    assert second.stop() == 0


def test_a_server_whose_own_database_is_killed_ends_and_has_everything_when_it_is_started_again(
    start_server: StartServer, data_dir: Path
) -> None:
    first = start_server("--data-dir", str(data_dir))
    with peculium.connect(first.address) as client:
        client.admin.grant("acme", unit="calls", amount=100, holder="dev")
    postmaster = int((data_dir / "cluster" / "postmaster.pid").read_text().splitlines()[0])
    os.kill(postmaster, signal.SIGKILL)
    assert first.process.wait(30) == 3
    first.end()
    assert "the server's own PostgreSQL has ended" in said(first)
    second = start_server("--data-dir", str(data_dir))
    with peculium.connect(second.address) as client:
        assert client.audit.budget("acme").balances.granted == 100
    assert second.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_loses_nothing_that_it_answered(
    start_server: StartServer, database: str, number: signal.Signals
) -> None:
    first = start_server("--database-url", database)
    roots = [granted(f"root-{index}", amount=10**6) for index in range(4)]
    answered: set[bytes] = set()
    another = threading.Semaphore(0)

    def spend(root: Grant) -> None:
        """Spend, one after the other, until the server is gone."""
        with grpc.insecure_channel(first.address) as channel:
            stub = LedgerServiceStub(channel)
            while True:
                operation = Spend(
                    operation_id=new_id(),
                    root_id=root.root_id,
                    budget_id=root.root_id,
                    authority=ByHolder(),
                    amount=1,
                )
                try:
                    response = stub.Spend(message_of(operation, HOLDER))
                except grpc.RpcError:
                    return
                answered.add(response.outcome.operation_id)
                another.release()

    with grpc.insecure_channel(first.address) as channel:
        for root in roots:
            AdminServiceStub(channel).Grant(message_of(root, None))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        spending = [pool.submit(spend, root) for root in roots for _ in range(4)]
        for _ in range(200):
            another.acquire()
        assert first.stop(number) == 0
        for each in spending:
            each.result()
    assert first.said[-1] == "stopped"
    second = start_server("--database-url", database)
    with peculium.connect(second.address) as client:
        recorded = {
            uuid.UUID(entry.operation_id).bytes
            for root in roots
            for entry in client.audit.entries(root.name)
        }
        *_, verdict = client.audit.verify()
    assert len(answered) >= 200
    assert answered <= recorded
    assert verdict.verified


def test_a_server_is_healthy_while_its_database_answers(
    start_server: StartServer, database: str
) -> None:
    server = start_server("--database-url", database)
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="peculium.v1.LedgerService"), timeout=30
        )
        for answer in watch:
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                break
        server.process.send_signal(signal.SIGTERM)
        for answer in watch:
            if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
        watch.cancel()
    assert server.process.wait(30) == 0


STARTED = """
import gc, os, signal, sys
from peculium_server import app
from peculium_server.config import Config

def tell(line):
    if line.startswith("listening"):
        print(gc.get_freeze_count(), gc.get_threshold()[0])
        os.kill(os.getpid(), signal.SIGTERM)

app.run(Config.load({"database_url": sys.argv[1], "listen": "127.0.0.1:0"}), tell)
"""


def test_a_server_seldom_looks_for_garbage_and_never_among_what_it_was_started_with(
    database: str,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED, database], capture_output=True, text=True, check=True
    )
    frozen, threshold = map(int, done.stdout.split())
    # Modules alone are more than that.
    assert frozen > 10_000
    assert threshold == app.YOUNG_OBJECTS_MAX


class Draining:
    """A server with a call in progress that ends when the test says so, and a ledger."""

    def __init__(self) -> None:
        self.calls_done = asyncio.Event()
        self.stops: list[float] = []
        self.drained = False

    async def stop(self, grace_seconds: float) -> None:
        self.stops.append(grace_seconds)
        if grace_seconds:
            await self.calls_done.wait()

    async def drain(self) -> None:
        self.drained = True


async def test_draining_ends_when_calls_and_commits_have() -> None:
    both: Any = Draining()
    draining = asyncio.create_task(app._drain(both, both, 20, asyncio.Event()))
    await asyncio.sleep(0)
    both.calls_done.set()
    await draining
    assert both.stops == [20]
    assert both.drained


async def test_told_to_stop_a_second_time_a_server_does_not_wait() -> None:
    both: Any = Draining()
    stop = asyncio.Event()
    draining = asyncio.create_task(app._drain(both, both, 20, stop))
    await asyncio.sleep(0)
    assert not draining.done()
    stop.set()
    await draining
    assert both.stops == [20, 0]


@pytest.mark.parametrize(
    ("files", "flags", "connections"),
    [
        (65_536, {}, 16_000),
        (resource.RLIM_INFINITY, {}, 16_000),
        (65_536, {"connections_max": "60000"}, 60_000),
        (65_536, {"connections_max": "100000"}, 65_536 - app.FILES_KEPT),
        (1_024, {}, 1_024 - app.FILES_KEPT),
        (200, {}, 100),
        (1_024, {"tls_client_listen": "127.0.0.1:0"}, (1_024 - app.FILES_KEPT) // 2),
    ],
)
def test_no_more_may_connect_than_leave_the_server_some_files_of_its_own(
    monkeypatch: pytest.MonkeyPatch, files: int, flags: dict[str, str], connections: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    tls = {
        "tls_cert_file": "tls.crt",
        "tls_key_file": "tls.key",
        "tls_client_ca_file": "ca.crt",
    }
    assert app._connections(Config.load({**tls, **flags}, {})) == connections
