"""`peculium serve` and nothing else: the ledger of a laptop, from the command line."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import peculium
from peculium import Child
from peculium.errors import Unauthenticated
from tests.server import RunningServer, StartServer

pytestmark = pytest.mark.timeout(240)


class Shell:
    """The program `peculium`, as it is installed, speaking to a server."""

    def __init__(self, server: RunningServer) -> None:
        self._environment = {**os.environ, "PECULIUM_TARGET": server.address, "COLUMNS": "160"}

    def says(self, *arguments: str) -> str:
        program = Path(sys.executable).with_name("peculium")
        return subprocess.run(
            [str(program), *arguments],
            env=self._environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def lines(self, *arguments: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.says(*arguments, "--json").splitlines()]


def test_a_laptops_ledger_is_granted_spent_shown_verified_and_still_there_after_a_restart(
    start_server: StartServer, own_postgres: Path
) -> None:
    server = start_server("--data-dir", str(own_postgres))
    assert any("PostgreSQL of the server's own" in line for line in server.said)
    shell = Shell(server)
    assert "granted $5.00 to acme" in shell.says("grant", "acme", "5usd", "--holder", "dev")
    assert "available now: $6.00" in shell.says("topup", "acme", "1usd")
    with peculium.connect(server.address) as client:
        acme = client.open("acme")
        [made] = acme.delegate([Child("run-7", peculium.usd("2.00"))])
        run = client.accept(made.capability)
        with run.reserve(peculium.usd("0.50")) as hold:
            hold.settle(peculium.usd("0.25"))
    before = shell.lines("tree", "acme")
    assert [(budget["path"], budget["spent"]) for budget in before] == [
        ("acme", 0),
        ("acme/run-7", 250_000_000),
    ]
    table = shell.says("tree", "acme")
    assert "run-7" in table
    assert "$1.75" in table
    assert server.stop() == 0
    assert server.said[-1] == "stopped"

    shell = Shell(start_server("--data-dir", str(own_postgres)))
    assert shell.lines("tree", "acme") == before
    assert "$0.25" in shell.says("budget", "show", "acme/run-7")
    kinds = [entry["kind"] for entry in shell.lines("entries", "acme/run-7", "--oldest-first")]
    assert kinds == ["DELEGATE", "ACCEPT", "RESERVE", "SETTLE"]
    [verdict] = shell.lines("verify")
    assert (verdict["verified"], verdict["trees"], verdict["entries"]) == (True, 1, 7)


def test_a_laptops_server_that_was_killed_leaves_its_ledger_to_the_next(
    start_server: StartServer, own_postgres: Path
) -> None:
    server = start_server("--data-dir", str(own_postgres))
    Shell(server).says("grant", "acme", "5usd", "--holder", "dev")
    server.kill()
    server = start_server("--data-dir", str(own_postgres))
    assert any("runs in" in line for line in server.said)
    # Another one beside it is a second server on the same database.
    second = start_server("--data-dir", str(own_postgres))
    with peculium.connect(second.address) as client:
        client.open("acme").spend(1)
    assert second.stop() == 0
    with peculium.connect(server.address) as client:
        assert client.open("acme").spend(1).balances.spent == 2
    assert server.stop() == 0


def test_the_first_key_of_a_laptops_ledger_is_made_beside_its_server(
    start_server: StartServer, own_postgres: Path
) -> None:
    server = start_server("--data-dir", str(own_postgres))
    key = Shell(server).says("keys", "bootstrap", "--data-dir", str(own_postgres)).strip()
    with peculium.connect(server.address) as nobody, pytest.raises(Unauthenticated):
        # Until the server has read that there is a key now.
        [list(nobody.audit.budgets()) for _ in itertools.count()]
    with peculium.connect(server.address, api_key=key) as admin:
        admin.admin.grant("acme", unit="calls", amount=1, holder="admin")
        assert [key.principal for key in admin.admin.keys.list()] == ["admin"]
    assert server.stop() == 0
