"""The commands of the files in deploy/, with their settings, on a real database; only the containers are missing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

import peculium
from peculium_server.embedded import EmbeddedPostgres
from peculium_server.signing import SigningKey
from peculium_server.store import roles
from tests.certificates import Authority
from tests.cli.test_cli import Cli, Finished
from tests.deploy.started import COMPOSE, Started, compose, every_start
from tests.postgres import as_role
from tests.server import RunningServer, StartServer

STARTS = {started.where: started for started in every_start()}


def variables(started: Started, places: Mapping[str, Path]) -> dict[str, str]:
    """What it is started with, where its files are elsewhere."""
    found = dict(started.environment)
    for name, value in found.items():
        for place, folder in places.items():
            if value.startswith(place):
                found[name] = value.replace(place, str(folder), 1)
    # Nobody listens there, and any address of this machine would be listened on.
    return {name: each for name, each in found.items() if not name.startswith("OTEL_")}


def run(environment: Mapping[str, str], *arguments: str) -> Finished:
    target = environment.get("PECULIUM_TARGET", "")
    return Cli(target, **environment).run(*arguments)


def serve(started: Started, environment: Mapping[str, str], start: StartServer) -> RunningServer:
    assert started.arguments == ["serve"]
    return start(**environment)


def healthy(started: Started, environment: Mapping[str, str], server: RunningServer) -> bool:
    """What its probe says."""
    [[_, *probe]] = started.probes
    return run({**environment, "PECULIUM_TARGET": server.address}, *probe).code == 0


def assert_becomes_healthy(
    started: Started, environment: Mapping[str, str], server: RunningServer
) -> None:
    """It is asked again and again: a server listens before it has committed for the first time."""
    deadline = time.monotonic() + 60
    while not healthy(started, environment, server):
        assert time.monotonic() < deadline


def make_secrets(folder: Path) -> None:
    shutil.copy(COMPOSE.parent / "secrets.sh", folder)
    subprocess.run([folder / "secrets.sh"], check=True, capture_output=True)
    for path in (folder / "secrets").iterdir():
        # As whom containers run; here it is whoever tests.
        os.chown(path, os.geteuid(), os.getegid())


class Machine:
    """One with what Compose would start there."""

    def __init__(self, folder: Path, postgres: EmbeddedPostgres) -> None:
        self.folder = folder
        self.secrets = folder / "secrets"
        self._postgres = postgres

    def make_secrets(self) -> None:
        make_secrets(self.folder)
        port = urlsplit(self._postgres.tcp_dsn).port
        for name in ("database_owner", "database_server"):
            path = self.secrets / name
            found, here = "host=database\nport=5432\n", f"host=127.0.0.1\nport={port}\n"
            path.write_text(path.read_text().replace(found, here))

    def make_roles(self) -> None:
        command = [str(self._postgres._place.bin_dir / "psql"), "--no-psqlrc", "--quiet"]
        command += [f"--file={COMPOSE.parent / 'roles.sql'}"]
        command += [urlsplit(self._postgres.tcp_dsn)._replace(path="/postgres").geturl()]
        environment = {**os.environ, "SECRETS": str(self.secrets)}
        subprocess.run(command, check=True, capture_output=True, env=environment)

    def variables(self, service: str) -> dict[str, str]:
        return variables(STARTS[service], {"/run/secrets": self.secrets})


@pytest.fixture
def machine(tmp_path: Path, own_postgres: Path) -> Iterator[Machine]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with EmbeddedPostgres.start(own_postgres, port=port) as postgres:
        with psycopg.connect(postgres.dsn, autocommit=True, dbname="postgres") as admin:
            admin.execute("DROP DATABASE peculium")
        yield Machine(tmp_path, postgres)


@pytest.mark.timeout(120)
def test_what_compose_starts_serves_a_client_on_this_machine(
    machine: Machine, start_server: StartServer
) -> None:
    machine.make_secrets()
    # They are made again at each start.
    machine.make_roles()
    machine.make_roles()
    owner = machine.variables("migrate")
    migrated = run(owner, *STARTS["migrate"].arguments)
    assert (migrated.code, "WARNING" in migrated.err) == (0, False), migrated.err
    # Before servers start: one on loopback would take everybody for `dev` until it has read of the key.
    key = run(owner, "keys", "bootstrap", "operator").out.strip()
    servers = []
    for name in ("server-1", "server-2"):
        settings = machine.variables(name)
        server = serve(STARTS[name], settings, start_server)
        assert any("checkpoints are signed" in line for line in server.said)
        assert not any("webhook_key_file" in line and "without" in line for line in server.said)
        assert_becomes_healthy(STARTS[name], settings, server)
        servers.append(server)
    examined = run(
        machine.variables("server-1"), "doctor", "--json", "--target", servers[0].address
    )
    assert (examined.code, "rewrite history" in examined.out) == (0, False), examined.out
    # As the page tells those to call who are on this machine.
    tls = peculium.Tls.of_files(ca_file=str(machine.secrets / "ca.crt"), server_name="localhost")
    target = "ipv4:" + ",".join(server.address for server in servers)
    with peculium.connect(target, api_key=key, tls=tls, timeout=60) as client:
        client.admin.grant("acme", unit="calls", amount=100, holder="operator")
        servers[0].stop()
        assert client.open("acme").spend(1).balances.spent == 1
    assert not healthy(STARTS["server-1"], machine.variables("server-1"), servers[0])


def test_secrets_are_made_once_and_for_their_owner_only(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    make_secrets(tmp_path)
    before = {path.name: path.read_bytes() for path in secrets.iterdir()}
    assert all(path.stat().st_mode & 0o077 == 0 for path in secrets.iterdir())
    assert set(compose()["secrets"]) <= set(before)
    assert "PECULIUM_USER=" in (tmp_path / ".env").read_text()
    (secrets / "server.crt").unlink()
    make_secrets(tmp_path)
    after = {path.name: path.read_bytes() for path in secrets.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"server.crt", "server.key"}


def test_what_kubernetes_starts_migrates_serves_and_is_found_ready(
    empty_database: str, start_server: StartServer, tmp_path: Path
) -> None:
    job, deployment = STARTS["Job/peculium-migrate"], STARTS["Deployment/peculium"]
    places = {"/etc/peculium": tmp_path}
    for folder in ("database", "tls", "signing"):
        (tmp_path / folder).mkdir()
    _write_service(tmp_path / "database" / "pg_service.conf", empty_database)
    migrated = run(variables(job, places), *job.arguments)
    assert migrated.code == 0, migrated.err
    # The servers' user is another one.
    _write_service(tmp_path / "database" / "pg_service.conf", as_role(empty_database, roles.SERVER))
    authority = Authority()
    authority.server("peculium.peculium.svc").write(tmp_path / "tls")
    (tmp_path / "tls" / "ca.crt").write_bytes(authority.pem)
    SigningKey.make(tmp_path / "signing" / "checkpoints.pem")
    settings = variables(deployment, places)
    server = serve(deployment, settings, start_server)
    assert_becomes_healthy(deployment, settings, server)
    host, _, port = server.address.rpartition(":")
    # The other probes, which connect and go.
    socket.create_connection((host, int(port)), 10).close()
    assert healthy(deployment, settings, server)
    assert server.stop() == 0
    assert not healthy(deployment, settings, server)


def _write_service(path: Path, url: str) -> None:
    facts = conninfo_to_dict(url)
    path.write_text("[peculium]\n" + "".join(f"{name}={value}\n" for name, value in facts.items()))
