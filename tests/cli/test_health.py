"""`peculium health`, which orchestrators ask again and again."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from tests.certificates import Authority
from tests.cli.test_cli import Cli, Finished
from tests.server import RunningServer, StartServer


def assert_becomes_healthy(cli: Cli) -> None:
    """It listens before it has committed for the first time."""
    deadline = time.monotonic() + 50
    while (finished := cli.run("health")) != Finished(0, "SERVING\n", ""):
        assert (finished.code, finished.out) == (1, "NOT_SERVING\n")
        assert time.monotonic() < deadline


def test_a_server_that_answers_operations_is_healthy(cli: Cli) -> None:
    assert_becomes_healthy(cli)


def test_a_server_that_is_gone_is_not(cli: Cli, running_server: RunningServer) -> None:
    running_server.stop()
    finished = cli.run("health")
    assert (finished.code, finished.out) == (1, "no answer: UNAVAILABLE\n")


def test_a_server_that_says_nothing_is_not_waited_for_longer_than_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        finished = Cli(f"127.0.0.1:{silent.getsockname()[1]}").run("health", "--timeout", "0.1")
    assert (finished.code, finished.out) == (1, "no answer: DEADLINE_EXCEEDED\n")


def test_nobody_needs_a_key_to_ask_and_the_certificate_may_be_of_another_name(
    start_server: StartServer, served_database: str, tmp_path: Path
) -> None:
    authority = Authority()
    certificate, key = authority.server("ledger.example").write(tmp_path)
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    flags = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key))
    server = start_server("--database-url", served_database, *flags)
    variables = {
        "PECULIUM_TLS_CA_FILE": str(tmp_path / "ca.crt"),
        "PECULIUM_TLS_SERVER_NAME": "ledger.example",
    }
    assert_becomes_healthy(Cli(server.address, **variables))
    assert Cli(server.address).run("health").code == 1
