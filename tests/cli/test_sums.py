"""Statements, usage and following on the command line, on a real server."""

from __future__ import annotations

import json

import pytest

import peculium
from peculium import Child, Usage
from tests.cli.test_cli import Cli
from tests.server import RunningServer

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def cli(running_server: RunningServer) -> Cli:
    """A root of a hundred dollars of which a child has spent twelve and a half, and 0.5 itself."""
    with peculium.connect(running_server.address) as client:
        usd = peculium.usd
        client.admin.grant("acme", unit="usd_nanos", amount=usd("100"), holder="dev")
        acme = client.open("acme")
        [made] = acme.delegate([Child("run", usd("20"), labels={"team": "red"})])
        run = client.accept(made.capability)
        run.spend(usd("12.5"), usage=Usage(model="m-1", provider="p", input_tokens=1234))
        acme.spend(usd("0.5"))
    return Cli(running_server.address)


def test_a_statement_is_a_table_whose_columns_add_up(cli: Cli) -> None:
    said = cli.says("audit", "statement", "acme")
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    assert rows["opening"] == ["0", "0", "0"]
    assert rows["grant"] == ["1", "$100.00", "$100.00", "0"]
    assert rows["spend"] == ["2", "0", "-$13.00", "$13.00"]
    assert rows["closing"] == ["$100.00", "$87.00", "$13.00"]
    assert rows["delegate"] == ["1", "0", "0", "0"]
    assert "2 budgets" in said
    assert "used in that time: $13.00" in said


def test_a_statement_for_machines_has_every_balance(cli: Cli) -> None:
    told = json.loads(cli.says("audit", "statement", "acme", "--alone", "--json"))
    assert told["closing"]["delegated"] == 20_000_000_000
    assert told["used_closing"] == 500_000_000
    assert [each["kind"] for each in told["movements"]] == ["GRANT", "SPEND", "DELEGATE"]
    assert told["unit"] == "usd_nanos"


def test_a_period_is_said_in_utc_unless_it_names_a_zone(cli: Cli) -> None:
    later = ("--since", "2999-01-01", "--until", "2999-01-02T01:00+02:00", "--json")
    told = json.loads(cli.says("audit", "statement", "acme", *later))
    assert told["opening"] == told["closing"]
    assert told["movements"] == []
    before = json.loads(cli.says("audit", "statement", "acme", "--until", "2001-01-01", "--json"))
    assert before["closing"]["granted"] == 0
    assert before["until"] == "2001-01-01T00:00:00.000Z"


def test_usage_is_a_table_with_its_total(cli: Cli) -> None:
    said = cli.says("audit", "usage", "acme", "--by", "label:team", "--by", "model")
    lines = [line.split() for line in said.splitlines()]
    assert lines[1] == ["-", "-", "1", "$0.50", "$0.00", "0", "0"]
    assert lines[2] == ["red", "m-1", "1", "$12.50", "$0.00", "1,234", "0"]
    assert lines[3] == ["total", "2", "$13.00", "$0.00", "1,234", "0"]
    assert "total" in cli.says("audit", "usage", "acme")


def test_usage_for_machines_names_what_was_grouped_by(cli: Cli) -> None:
    said = cli.says("audit", "usage", "acme", "--by", "budget", "--json")
    groups = [json.loads(line) for line in said.splitlines()]
    assert [(each["group"], each["spent"]) for each in groups] == [
        ({"budget": "acme"}, 500_000_000),
        ({"budget": "acme/run"}, 12_500_000_000),
    ]


def test_what_was_recorded_is_followed_from_any_point_on(cli: Cli) -> None:
    said = cli.says("audit", "watch", "acme", "--from-beginning", "--kind", "spend", "--limit", "2")
    first, second = said.splitlines()
    assert "spend     acme/run  $12.50  by dev  available $7.50" in first
    assert "acme  $0.50" in second
    told = cli.says("audit", "watch", "--from-beginning", "--limit", "6", "--json").splitlines()
    entries = [json.loads(line) for line in told]
    assert [entry["kind"] for entry in entries] == [
        "GRANT", "DELEGATE", "DELEGATE", "ACCEPT", "SPEND", "SPEND",
    ]  # fmt: skip
    assert [bool(entry["cursor"]) for entry in entries] == [False] * 5 + [True]
    cli.says("topup", "acme", "1usd")
    said = cli.says("audit", "watch", "--cursor", entries[-1]["cursor"], "--limit", "1")
    assert "top_up" in said


def test_what_cannot_be_meant_is_a_mistake_of_usage(cli: Cli) -> None:
    for arguments in (
        ("statement", "acme", "--since", "yesterday"),
        ("usage", "acme", "--by", "week"),
        ("watch", "acme", "--kind", "spent"),
        ("watch", "acme", "--label", "x"),
        ("watch", "--cursor", "zz"),
        ("watch", "--cursor", "00"),
        ("statement", "acme", "--since", "2026-02-01", "--until", "2026-01-01"),
    ):
        finished = cli.run("audit", *arguments)
        assert finished.code != 0, arguments
        assert finished.err
        assert "Traceback" not in finished.err
    assert cli.run("audit", "statement", "nobody").code == 1
