"""`peculium audit reconcile` as an admin uses it, on a real server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import peculium
from peculium import Usage, usd
from tests.cli.test_cli import Cli
from tests.server import RunningServer, StartServer


@pytest.fixture
def acme(cli: Cli, running_server: RunningServer) -> Iterator[peculium.Budget]:
    """A budget of a hundred dollars, with one below it."""
    cli.says("grant", "acme", "100usd", "--holder", "dev", "--label", "team=core")
    with peculium.connect(running_server.address) as client:
        budget = client.open("acme")
        budget.delegate([peculium.Child("run", usd("50"), holder="dev", labels={"team": "run"})])
        yield budget


def settle(budget: peculium.Budget, reference: str, amount: str, model: str = "gpt-4o") -> bytes:
    hold = budget.reserve(usd("1"))
    hold.settle(usd(amount), reference=reference, usage=Usage(provider="openai", model=model))
    return hold.hold_id


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def reconciled(cli: Cli, *arguments: str) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """The exit code, what was found, and the summary."""
    finished = cli.run("audit", "reconcile", *arguments, "--json")
    assert finished.code in {0, 1}, finished.err
    *found, summary = map(json.loads, finished.out.splitlines())
    return finished.code, found, summary


def test_a_bill_that_agrees_is_reconciled(cli: Cli, acme: peculium.Budget, tmp_path: Path) -> None:
    settle(acme, "r1", "0.25")
    settle(acme, "r2", "0.5")
    bill = written(tmp_path / "bill.csv", "request_id,cost\nr1,0.25\nr2,0.50\n")
    said = cli.says("audit", "reconcile", bill, "acme")
    assert "2  the bill and the ledger agree: billed $0.75, booked $0.75, difference $0.00" in said
    assert "the bill: 2 lines, $0.75" in said
    assert said.endswith("\nreconciled\n")
    code, found, summary = reconciled(cli, bill)
    assert (code, found, summary["status"]) == (0, [], "reconciled")
    assert summary["findings"] == {
        "matched": {"count": 2, "billed": usd("0.75"), "booked": usd("0.75")}
    }


def test_what_is_accepted_is_booked_once(
    cli: Cli, acme: peculium.Budget, running_server: RunningServer, tmp_path: Path
) -> None:
    with peculium.connect(running_server.address) as client:
        run = client.open("acme/run")
        dearer, cheaper = settle(run, "dearer", "0.25"), settle(acme, "cheaper", "0.5")
        settle(acme, "same", "0.125")
        settle(acme, "unbilled", "0.0625")
        acme.spend(usd("1"), reference="spend")
    rows = "dearer,0.30\ncheaper,0.4\nsame,0.125\nspend,2\nunknown,3\n"
    bill = written(tmp_path / "bill.csv", f"request_id,cost\n{rows}")
    code, found, summary = reconciled(cli, bill, "acme")
    assert code == 1
    assert {
        tuple(each["references"]): (each["status"], each["difference"], each["bookable"])
        for each in found
    } == {
        ("dearer",): ("different", usd("0.05"), True),
        ("cheaper",): ("different", -usd("0.1"), True),
        ("unbilled",): ("ledger_only", -usd("0.0625"), False),
        ("spend",): ("different", usd("1"), False),
        ("unknown",): ("bill_only", usd("3"), False),
    }
    assert (summary["bookable"], summary["booked"]) == (2, 0)
    before = cli.lines("entries", "acme", "--tree", "--limit", "0")
    code, found, summary = reconciled(cli, bill, "acme", "--apply", "--reason", "November", "--yes")
    assert (code, summary["bookable"], summary["booked"]) == (1, 2, 2)
    booked = {each["hold_id"]: each["actual"] for each in found if each["status"] == "booked"}
    assert booked == {
        str(uuid.UUID(bytes=dearer)): usd("0.30"),
        str(uuid.UUID(bytes=cheaper)): usd("0.40"),
    }
    after = cli.lines("entries", "acme", "--tree", "--limit", "0")
    assert {each["kind"] for each in after[: len(after) - len(before)]} == {"RESOLVE"}
    # A second time there is nothing to book, and nothing is written.
    code, found, summary = reconciled(cli, bill, "acme", "--apply", "--reason", "November", "--yes")
    assert (code, summary["bookable"], summary["booked"]) == (1, 0, 0)
    assert {each["status"] for each in found} == {"ledger_only", "different", "bill_only"}
    assert cli.lines("entries", "acme", "--tree", "--limit", "0") == after
    assert cli.lines("verify", "acme")[0]["verified"]


def test_a_hold_that_lapsed_is_explained_by_its_id_or_its_time(
    cli: Cli, acme: peculium.Budget, running_server: RunningServer, tmp_path: Path
) -> None:
    lapsing = [acme.reserve(usd("1"), ttl=1) for _ in range(2)]
    with peculium.connect(running_server.address) as client:
        _wait_for_lapses(client, 2)
    first, second = (str(uuid.UUID(bytes=hold.hold_id)) for hold in lapsing)
    rows = [
        {"request_id": "a", "cost": 0.5, "metadata": {"hold_id": first}},
        {"request_id": "b", "cost": 0.25, "created_at": lapsing[1].info.created_at.isoformat()},
    ]
    bill = written(tmp_path / "bill.jsonl", "\n".join(map(json.dumps, rows)))
    columns = ("--hold", "metadata.hold_id", "--day", "created_at")
    code, found, _ = reconciled(cli, bill, "acme", *columns)
    assert code == 1
    assert [(each["status"], each["fits_hold_id"]) for each in found] == [
        ("lapsed", None),
        ("bill_only", second),
    ]
    apply = (*columns, "--by-time", "--apply", "--reason", "crashed", "--yes")
    code, found, summary = reconciled(cli, bill, "acme", *apply)
    assert (code, summary["booked"], summary["status"]) == (0, 2, "reconciled")
    [budget] = cli.lines("budget", "show", "acme")
    assert (budget["forfeited"], budget["spent"]) == (0, usd("0.75"))
    code, found, summary = reconciled(cli, bill, "acme", *apply)
    assert (code, found, summary["booked"]) == (0, [], 0)


def _wait_for_lapses(client: peculium.Client, count: int) -> None:
    """Ask until the sweeper has done it: each answer takes its time, so this is no busy loop."""
    while sum(entry.kind == "LAPSE" for entry in client.audit.entries("acme")) < count:
        pass


def test_a_report_of_sums_is_compared_by_day_model_and_label(
    cli: Cli, acme: peculium.Budget, running_server: RunningServer, tmp_path: Path
) -> None:
    with peculium.connect(running_server.address) as client:
        settle(acme, "r1", "0.25")
        settle(client.open("acme/run"), "r2", "0.5")
        settle(acme, "r3", "0.125", model="other")
        [day] = {entry.at.strftime("%Y-%m-%d") for entry in client.audit.entries("acme")}
    rows = [
        {"amount": {"value": 0.2502, "currency": "usd"}, "line_item": "4o, input", "team": "core"},
        {"amount": {"value": 0.5, "currency": "usd"}, "line_item": "4o, output", "team": "run"},
    ]
    page = {"data": [{"start_time": _seconds(day), "results": rows}], "has_more": False}
    bill = written(tmp_path / "costs.json", json.dumps(page))
    arguments = (bill, "--label", "team=team", "--rename-model", "4o=gpt-4o")
    code, found, summary = reconciled(cli, *arguments)
    assert code == 1
    by_group = {(each["group"]["model"], each["group"]["team"]): each for each in found}
    assert {key: each["status"] for key, each in by_group.items()} == {
        ("gpt-4o", "core"): "different",
        ("gpt-4o", "run"): "matched",
        ("other", "core"): "ledger_only",
    }
    assert by_group["gpt-4o", "core"]["unexplained"] == usd("0.0002")
    assert summary["total"]["difference"] == usd("0.0002") - usd("0.125")
    tolerant = ("--tolerance", "0.1%", "--tolerance", "0.125usd")
    assert reconciled(cli, *arguments, *tolerant)[0] == 0
    table = cli.run("audit", "reconcile", *arguments)
    assert table.code == 1
    for words in ("ledger only", "$0.0002", "3 groups", "NOT reconciled"):
        assert words in table.out
    # Another provider's bill is none of these calls'.
    code, found, _ = reconciled(cli, *arguments, "--provider", "anthropic")
    assert {each["status"] for each in found} == {"bill_only"}


def _seconds(day: str) -> int:
    from peculium_server.reconcile.times import parse_moment

    return parse_moment(day).at // 1_000_000


def test_only_the_budgets_that_are_named_are_compared(
    cli: Cli, acme: peculium.Budget, running_server: RunningServer, tmp_path: Path
) -> None:
    cli.says("grant", "other", "5usd", "--holder", "dev")
    with peculium.connect(running_server.address) as client:
        settle(acme, "a", "0.1")
        settle(client.open("acme/run"), "b", "0.2")
        settle(client.open("other"), "c", "0.3")
    bill = written(tmp_path / "bill.csv", "request_id,cost\na,0.1\nb,0.2\nc,0.3\n")
    for budgets, unknown in (
        ((), set()),
        (("acme", "other"), set()),
        (("acme", "acme/run"), {"c"}),
        (("acme/run",), {"a", "c"}),
    ):
        _, found, _ = reconciled(cli, bill, *budgets)
        assert {each["references"][0] for each in found} == unknown


def test_calls_that_name_no_provider_may_be_any_providers(
    cli: Cli, acme: peculium.Budget, tmp_path: Path
) -> None:
    for provider in ("openai", "anthropic", ""):
        acme.spend(usd("0.25"), reference=f"r-{provider}", usage=Usage(provider=provider))
    bill = written(
        tmp_path / "bill.csv", "request_id,cost\nr-openai,0.25\nr-anthropic,0.25\nr-,0.25\n"
    )
    code, [found], summary = reconciled(cli, bill, "acme", "--provider", "openai")
    assert (code, found["references"], found["status"]) == (1, ["r-anthropic"], "bill_only")
    assert summary["findings"]["matched"]["count"] == 2


def test_trees_of_different_units_are_not_one_bills(
    cli: Cli, acme: peculium.Budget, tmp_path: Path
) -> None:
    cli.says("grant", "calls", "5", "--unit", "calls", "--holder", "dev")
    bill = written(tmp_path / "bill.csv", "request_id,cost\na,0.1\n")
    code, complaint = cli.complains("audit", "reconcile", bill)
    assert code == 2
    assert "count calls and usd_nanos" in complaint


def test_an_admin_is_asked_before_anything_is_booked(
    cli: Cli, acme: peculium.Budget, tmp_path: Path
) -> None:
    settle(acme, "r", "0.25")
    bill = written(tmp_path / "bill.csv", "request_id,cost\nr,0.5\n")
    apply = ("audit", "reconcile", bill, "acme", "--apply", "--reason", "bill")
    for answer, spent in ((False, "0.25"), (True, "0.5")):
        with (
            mock.patch("sys.stdin.isatty", return_value=True),
            mock.patch("typer.confirm", return_value=answer) as asked,
        ):
            assert cli.run(*apply).code == (0 if answer else 1)
        assert "Book these 1 as billed" in asked.call_args.args[0]
        assert cli.lines("budget", "show", "acme")[0]["spent"] == usd(spent)


def test_who_is_no_admin_books_nothing(
    start_server: StartServer, database: str, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    roles = {"root": "admin", "dev": "agent", "audit": "auditor"}
    keys.write_text(
        "".join(
            f'[[keys]]\nprincipal = "{name}"\nrole = "{role}"\n'
            f'sha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
            for name, role in roles.items()
        )
    )
    server = start_server("--database-url", database, "--keys-file", str(keys))
    admin = Cli(server.address, PECULIUM_API_KEY="root")
    auditor = Cli(server.address, PECULIUM_API_KEY="audit")
    admin.says("grant", "acme", "5usd", "--holder", "dev")
    with peculium.connect(server.address, api_key="dev") as client:
        settle(client.open("acme"), "r1", "0.25")
        settle(client.open("acme"), "r2", "0.25")
    bill = written(tmp_path / "bill.csv", "request_id,cost\nr1,0.5\nr2,0.5\n")
    assert reconciled(auditor, bill)[0] == 1
    apply = ("audit", "reconcile", bill, "--apply", "--reason", "bill", "--yes")
    code, complaint = auditor.complains(*apply)
    assert code == 2
    assert "0 of 2 were dealt with" in complaint
    assert admin.lines("budget", "show", "acme")[0]["spent"] == usd("0.5")


def test_what_the_ledger_refuses_is_told_and_the_rest_is_booked(
    cli: Cli, acme: peculium.Budget, tmp_path: Path
) -> None:
    settle(acme, "huge", "0.25")
    settle(acme, "fine", "0.25")
    # Two such amounts are more than the balances of a tree can hold.
    largest = 2**62 - 1
    bill = written(tmp_path / "bill.csv", f"request_id,cost\nhuge,{largest}\nfine,300000000\n")
    code, found, summary = reconciled(
        cli,
        bill,
        "--amount-in",
        "unit",
        "--apply",
        "--reason",
        "bill",
        "--yes",
    )
    told = [each for each in found if "actual" in each]
    assert [(each["references"], each["status"]) for each in told] == [
        (["huge"], "not_booked"),
        (["fine"], "booked"),
    ]
    assert told[0]["problem"]
    assert (code, summary["booked"]) == (1, 1)


def test_the_example_of_the_page_is_what_happens(
    cli: Cli, running_server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "reconcile.md").read_text()
    fenced = dict(re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    subprocess.run(
        [sys.executable, "-c", fenced["python"]],
        env={**os.environ, "PECULIUM_TARGET": running_server.address},
        check=True,
    )
    written(tmp_path / "gateway.csv", fenced["csv"])
    monkeypatch.chdir(tmp_path)
    finished = cli.run(*fenced["sh"].split()[1:])
    assert finished.code == 1
    assert finished.out.endswith(fenced["text"])


WRONG = [
    (("--apply", "--yes"), "needs a --reason"),
    (("--reason", "x"), "go with --apply"),
    (("--apply", "--reason", "x" * 600, "--yes"), "longer than 512 bytes"),
    (("--apply", "--reason", "x"), "nobody can be asked"),
    (("--apply", "--reason", "x", "--yes", "--by", "group"), "only what has a reference"),
    (("--tolerance", "x%"), "no part of a hundred"),
    (("--tolerance", "nan%"), "no part of a hundred"),
    (("--tolerance", "101%"), "no part of a hundred"),
    (("--tolerance", "1"), None),
    (("--tolerance", "x"), "no amount"),
    (("--from", "yesterday"), "--from: 'yesterday' is no time"),
    (("--since", "2025-11-26", "--until", "2025-11-26"), "has to be before"),
    (("--from", "2025-11-26", "--until", "2025-11-26"), "has to be before"),
    (("--label", "team"), "key=value"),
    (("--amount", "price"), "line 2, column price: is not there"),
    (("--format", "json"), "line 1: not JSON"),
]


def test_wrong_usage_is_told_and_changes_nothing(
    cli: Cli, acme: peculium.Budget, tmp_path: Path
) -> None:
    settle(acme, "r", "0.25")
    bill = written(tmp_path / "bill.csv", "request_id,cost\nr,0.5\n")
    for arguments, words in WRONG:
        code, complaint = cli.complains("audit", "reconcile", bill, "acme", *arguments)
        assert code == (1 if words is None else 2), (arguments, complaint)
        flat = " ".join(complaint.replace("│", " ").split())
        assert (words or "") in flat, arguments
        assert "Traceback" not in complaint
    missing = str(tmp_path / "missing.csv")
    assert cli.complains("audit", "reconcile", missing)[0] == 2
    no_reference = written(tmp_path / "sums.csv", "day,cost\n2025-11-26,1\n")
    code, complaint = cli.complains("audit", "reconcile", no_reference, "--by", "reference")
    assert code == 2
    assert "no column is known to be the reference" in complaint
    assert cli.lines("budget", "show", "acme")[0]["spent"] == usd("0.25")


def test_a_server_that_is_not_there_is_no_answer(tmp_path: Path) -> None:
    bill = written(tmp_path / "bill.csv", "request_id,cost\nr,0.5\n")
    code, _ = Cli("127.0.0.1:1").complains("audit", "reconcile", bill, "--timeout", "0.3")
    assert code == 3
