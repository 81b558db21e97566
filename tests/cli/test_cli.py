"""The command line as a person or a script uses it, on a real server."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psycopg
import pytest

import peculium
import peculium_server.cli
from peculium_server.cli import main
from tests.server import RunningServer, StartServer


class Finished(NamedTuple):
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str


class Cli:
    """The command line, pointed at a server."""

    def __init__(self, target: str, **variables: str) -> None:
        self._variables = {
            "PECULIUM_TARGET": target,
            "COLUMNS": "200",
            "NO_COLOR": "1",
            **variables,
        }

    def run(self, *arguments: str) -> Finished:
        """Run it in this process: starting another takes longer than what it does."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self._variables),
            mock.patch.object(sys, "argv", ["peculium", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return Finished(code, out.getvalue(), err.getvalue())

    def says(self, *arguments: str) -> str:
        """What it prints when all is well."""
        finished = self.run(*arguments)
        assert finished.code == 0, finished.err
        return finished.out

    def lines(self, *arguments: str) -> list[dict[str, Any]]:
        """What it prints for machines when all is well."""
        return [json.loads(line) for line in self.says(*arguments, "--json").splitlines()]

    def complains(self, *arguments: str) -> tuple[int, str]:
        """The exit code, and what it says about it."""
        finished = self.run(*arguments)
        return finished.code, finished.err


def test_a_root_is_granted_topped_up_shown_and_verified(cli: Cli) -> None:
    assert "granted $100.00 to acme" in cli.says("grant", "acme", "100usd", "--holder", "dev")
    assert "available now: $112.50" in cli.says("topup", "acme", "12.50usd")
    shown = cli.says("budget", "show", "acme")
    for word in ("acme", "open", "principal dev", "$112.50"):
        assert word in shown
    assert "acme" in cli.says("tree")
    assert "top_up" in cli.says("entries", "acme")
    assert "verified: 2 entries of 1 trees" in cli.says("verify")


def test_machines_get_json_with_integers(cli: Cli) -> None:
    [granted] = cli.lines("grant", "acme", "0.5usd", "--holder", "dev", "--label", "team=a")
    assert (granted["path"], granted["unit"], granted["available"]) == (
        "acme",
        "usd_nanos",
        500_000_000,
    )
    assert "capability" not in granted
    [shown] = cli.lines("budget", "show", "acme")
    assert shown["labels"] == {"team": "a"}
    assert shown["custody"] == "principal"
    [topped] = cli.lines("topup", "acme", "7")
    assert topped["granted"] == 500_000_007
    entries = cli.lines("entries", "acme", "--oldest-first")
    assert [entry["kind"] for entry in entries] == ["GRANT", "TOP_UP"]
    assert entries[1]["changes"]["granted"] == 7
    assert entries[1]["previous_hash"] == entries[0]["hash"]
    assert cli.lines("tree") == cli.lines("tree", "acme")
    assert cli.lines("verify") == [{"verified": True, "entries": 2, "trees": 1, "findings": []}]


def test_a_capability_is_printed_once_and_works(cli: Cli, running_server: RunningServer) -> None:
    printed = cli.says("grant", "acme", "5", "--unit", "calls").split()
    [capability] = [word for word in printed if word.startswith("pec_")]
    [other] = cli.lines("grant", "other", "5", "--unit", "calls", "--holder", "dev", "--token")
    with peculium.connect(running_server.address) as client:
        client.accept(capability).spend(2)
        client.accept(other["capability"]).spend(2)
    assert cli.lines("budget", "show", "acme")[0]["spent"] == 2
    assert capability not in cli.says("entries", "acme", "--json")


def test_a_tree_is_shown_with_children_under_their_parents(
    cli: Cli, running_server: RunningServer
) -> None:
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    with peculium.connect(running_server.address) as client:
        acme = client.open("acme")
        acme.delegate([peculium.Child(name, 10, holder="dev") for name in ("b", "a")])
        client.open("acme/a").delegate([peculium.Child("deep", 3, holder="dev")])
    shown = cli.says("tree", "acme")
    names = [line.split()[0] for line in shown.splitlines()[1:]]
    assert names == ["acme", "a", "deep", "b"]
    below = [line["path"] for line in cli.lines("tree", "acme/a")]
    assert below == ["acme/a", "acme/a/deep"]
    entries = cli.says("entries", "acme", "--tree", "--limit", "0")
    assert "acme/a/deep" in entries
    [limited] = cli.lines("entries", "acme", "--tree", "--limit", "1")
    assert limited["position"] == 3


def test_a_budget_is_found_by_its_ids_too(cli: Cli, running_server: RunningServer) -> None:
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    with peculium.connect(running_server.address) as client:
        client.open("acme").delegate([peculium.Child("a", 10, holder="dev")])
    [root, child] = cli.lines("tree", "acme")
    by_ids = f"{child['root_id']}/{child['budget_id']}"
    assert cli.lines("budget", "show", by_ids) == [child]
    assert cli.lines("budget", "show", root["root_id"]) == [root]
    assert cli.lines("verify", by_ids)[0]["verified"]


COMPLAINTS = [
    (("grant", "acme", "1usd", "--holder", "dev"), 1, ("NAME", "acme", "another name")),
    (("topup", "nothing", "1usd"), 1, ("no such budget", "nothing", "check the path")),
    (("topup", "acme", "1usd"), 2, ("in dollars", "counts calls")),
    (("topup", "acme", "0"), 2, ("amount",)),
    (("grant", "other", "5"), 2, ("--unit",)),
    (("grant", "a/b", "5", "--unit", "calls", "--holder", "dev"), 2, ("name", "without")),
    (("grant", "other", "5", "--unit", "calls", "--label", "x"), 2, ("key=value",)),
    (("budget", "show"), 2, ("Missing argument",)),
    (("spend", "everything"), 2, ("No such command",)),
]


def test_an_error_says_what_happened_where_and_what_to_do(cli: Cli) -> None:
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    for arguments, code, words in COMPLAINTS:
        exit_code, complaint = cli.complains(*arguments)
        assert exit_code == code, complaint
        for word in words:
            assert word.lower() in complaint.lower(), arguments
        assert "Traceback" not in complaint


def test_a_ledger_that_was_tampered_with_does_not_verify(cli: Cli, database: str) -> None:
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE budgets SET holder = 'mallory'")
    finished = cli.run("verify")
    assert finished.code == 1
    assert "NOT verified" in finished.out
    assert "fold" in finished.out
    assert "holder" in finished.out
    finished = cli.run("verify", "--json")
    assert finished.code == 1
    assert not json.loads(finished.out)["verified"]


def test_a_server_that_is_not_there_is_told_so() -> None:
    exit_code, complaint = Cli("127.0.0.1:1").complains("tree", "--timeout", "0.3")
    assert exit_code == 3
    assert "Traceback" not in complaint


def test_a_key_of_the_wrong_role_is_told_so(
    start_server: StartServer, database: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    digest = hashlib.sha256(b"gateway").hexdigest()
    file.write_text(f'[[keys]]\nprincipal = "gateway"\nrole = "agent"\nsha256 = "{digest}"\n')
    server = start_server("--database-url", database, "--keys-file", str(file))
    exit_code, complaint = Cli(server.address, PECULIUM_API_KEY="gateway").complains("tree")
    assert exit_code == 2
    assert "auditor" in complaint
    exit_code, complaint = Cli(server.address).complains("tree")
    assert exit_code == 2
    assert "api key" in complaint


def test_migrating_makes_a_database_fit_and_can_be_repeated(
    empty_database: str, start_server: StartServer
) -> None:
    cli = Cli("unused")
    for _ in range(2):
        finished = cli.run("migrate", "--database-url", empty_database)
        assert finished.code == 0, finished.err
        assert "newest schema" in finished.err
    start_server("--database-url", empty_database)


def test_the_command_line_is_a_program_whose_exit_code_tells(running_server: RunningServer) -> None:
    for target, code in ((running_server.address, 0), ("127.0.0.1:1", 3)):
        finished = subprocess.run(
            [sys.executable, "-m", "peculium_server", "tree", "--timeout", "1", "--target", target],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert finished.returncode == code, finished.stderr
        assert "Traceback" not in finished.stderr


def test_what_runs_it_has_the_name_of_no_module_that_may_be_imported_first() -> None:
    for module in pkgutil.iter_modules(peculium_server.cli.__path__):
        importlib.import_module(f"peculium_server.cli.{module.name}")
    assert inspect.isfunction(peculium_server.cli.main)


def test_help_teaches_every_verb() -> None:
    cli = Cli("unused")
    top = cli.says("--help")
    for verb in (
        "serve",
        "migrate",
        "grant",
        "topup",
        "budget",
        "tree",
        "entries",
        "verify",
        "demo",
    ):
        assert verb in top
    for words in (("grant",), ("topup",), ("budget", "show"), ("tree",), ("entries",), ("verify",)):
        assert f"peculium {' '.join(words)}" in cli.says(*words, "--help")


def test_entries_and_budgets_are_shown_as_far_as_they_are_selected(
    cli: Cli, running_server: RunningServer
) -> None:
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    with peculium.connect(running_server.address) as client:
        acme = client.open("acme")
        acme.delegate([peculium.Child("a", 10, holder="dev", labels={"team": "x"})])
        acme.spend(3, labels={"run": "7"}, reference="call-1")
        client.open("acme/a").spend(4)
    kinds = [each["kind"] for each in cli.lines("audit", "entries", "acme", "--kind", "spend")]
    assert kinds == ["SPEND"]
    for options in (("--label", "run=7"), ("--reference", "call-1"), ("--subtree", "--limit", "2")):
        found = cli.lines("entries", "acme", "--kind", "spend", *options)
        assert found[-1]["amount"] == 3
    assert len(cli.lines("entries", "acme/a", "--tree", "--kind", "spend")) == 2
    assert cli.lines("entries", "acme", "--since", "2999-01-01") == []
    assert [each["path"] for each in cli.lines("tree", "acme", "--label", "team=x")] == ["acme/a"]
    assert [each["path"] for each in cli.lines("tree", "acme", "--depth", "0")] == ["acme"]
    assert cli.lines("tree", "acme", "--state", "frozen") == []
    code, said = cli.complains("entries", "acme", "--since", "yesterday")
    assert (code, "no time" in said) == (2, True)
    assert cli.complains("entries", "acme", "--kind", "nothing")[0] == 2
    assert cli.complains("entries", "acme", "--tree", "--subtree")[0] == 2


def test_a_budget_is_shown_as_it_was_with_what_its_subtree_has_used(
    cli: Cli, running_server: RunningServer
) -> None:
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    with peculium.connect(running_server.address) as client:
        client.open("acme").delegate([peculium.Child("a", 10, holder="dev")])
        before = client.open("acme/a").spend(4).at.isoformat()
        client.open("acme/a").spend(5)
    assert "used below" in cli.says("budget", "show", "acme", "--sum")
    for options, used in ((("--as-of", before), 4), ((), 9)):
        [shown] = cli.lines("budget", "show", "acme", "--sum", *options)
        assert (shown["subtree_used"], shown["subtree_disputed"]) == (used, 0)
    code, said = cli.complains("budget", "show", "acme", "--as-of", "2000-01-01")
    assert (code, "created_at" in said) == (1, True)


def test_a_lineage_names_who_made_each_level_and_where_the_token_went(
    cli: Cli, running_server: RunningServer
) -> None:
    cli.says("grant", "acme", "100", "--unit", "calls", "--holder", "dev")
    with peculium.connect(running_server.address) as client:
        [child] = client.open("acme").delegate([peculium.Child("a", 10)])
        client.accept(child.capability).spend(1)
    root, made, first, accepted, spent = cli.lines("audit", "lineage", "acme/a")
    assert (root["path"], root["by"], root["right"]) == ("acme", "dev", "role")
    assert (made["path"], made["right"], made["amount"]) == ("acme/a", "holder", 10)
    assert [each["kind"] for each in (first, accepted, spent)] == ["DELEGATE", "ACCEPT", "SPEND"]
    assert [each["holder"] for each in (first, accepted, spent)] == [None, "dev", "dev"]
    assert first["consumed"] is None
    fingerprint = hashlib.sha256(bytes.fromhex(accepted["consumed"])).hexdigest()
    assert fingerprint.startswith(first["produced_fingerprint"])
    shown = cli.says("audit", "lineage", "acme/a")
    for word in ("the role admin", "holder dev", "whoever has the token"):
        assert word in shown
