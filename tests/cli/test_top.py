"""`peculium top`: who spends how fast."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import peculium
from peculium_server.cli.top import Rates, Row
from tests.cli.test_cli import Cli
from tests.server import RunningServer

SECONDS_MAX = 60


def row(path: str, used: int) -> Row:
    return Row(path, "calls", "open", used, 0, 0, 0, 0, 0)


def burns(rates: Rates, now: float, **used: int) -> dict[str, float | None]:
    rated = rates.rate([row(path, amount) for path, amount in used.items()], now)
    return {each.row.path: each.burn for each in rated}


# --- rates ---


def test_a_rate_is_what_was_used_between_two_looks_in_a_minute() -> None:
    rates = Rates()
    assert burns(rates, 100.0, a=5, b=7) == {"a": None, "b": None}
    assert burns(rates, 110.0, a=15, b=7) == {"a": 60.0, "b": 0.0}


def test_a_rate_is_that_of_the_last_minute() -> None:
    rates = Rates()
    for second in range(0, 61, 10):
        burns(rates, float(second), a=second)
    # Nothing more is used from then on.
    assert [burns(rates, float(second), a=60)["a"] for second in (90, 110, 120, 180)] == [
        30.0,
        10.0,
        0.0,
        0.0,
    ]


def test_what_was_not_there_before_has_no_rate_and_what_is_gone_is_forgotten() -> None:
    rates = Rates()
    burns(rates, 0.0, a=0)
    assert burns(rates, 10.0, b=100) == {"b": None}
    assert burns(rates, 20.0, a=100, b=100) == {"a": None, "b": 0.0}


def test_what_is_taken_back_counts_below_zero() -> None:
    rates = Rates()
    burns(rates, 0.0, a=10)
    assert burns(rates, 60.0, a=4) == {"a": -6.0}


# --- the verb ---


@pytest.fixture
def spending(running_server: RunningServer) -> Iterator[dict[str, peculium.Budget]]:
    """Two trees; below one of them a run with a hold."""
    with peculium.connect(running_server.address) as client:
        for name, amount in (("acme", 100), ("globex", 50)):
            client.admin.grant(name, unit="calls", amount=amount, holder="dev")
        acme, globex = client.open("acme"), client.open("globex")
        acme.delegate(
            [peculium.Child("run", 40, holder="dev"), peculium.Child("idle", 5, holder="dev")]
        )
        run = client.open("acme/run")
        run.spend(7)
        globex.spend(1)
        run.reserve(10)
        yield {"acme": acme, "globex": globex, "run": run}


def once(cli: Cli, *arguments: str) -> list[dict[str, Any]]:
    return cli.lines("top", "--once", "--every", "0.2", *arguments)


@pytest.mark.usefixtures("spending")
def test_trees_are_shown_with_all_that_is_below_them(cli: Cli) -> None:
    acme, globex = once(cli, "--sort", "used")
    assert acme == {
        "path": "acme",
        "unit": "calls",
        "state": "open",
        "used": 7,
        "held": 10,
        "holds": 1,
        "available": 83,
        "overrun": 0,
        "refused": 0,
        "burn_per_minute": 0,
    }
    assert (globex["path"], globex["used"], globex["available"]) == ("globex", 1, 49)
    shown = cli.says("top", "--once", "--every", "0.2")
    for said in ("burn/min", "acme", "globex", "83"):
        assert said in shown


@pytest.mark.usefixtures("spending")
def test_the_budgets_directly_below_one_are_shown_instead(cli: Cli) -> None:
    assert [
        (each["path"], each["used"], each["held"]) for each in once(cli, "acme", "--sort", "used")
    ] == [
        ("acme/run", 7, 10),
        ("acme/idle", 0, 0),
    ]
    assert once(cli, "acme/idle") == []


@pytest.mark.usefixtures("spending")
@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        (("--sort", "held"), ["acme", "globex"]),
        (("--sort", "left"), ["globex", "acme"]),
        (("--sort", "name"), ["acme", "globex"]),
        (("--match", "glo"), ["globex"]),
        (("--sort", "used", "--limit", "1"), ["acme"]),
    ],
)
def test_rows_are_sorted_chosen_and_limited(
    cli: Cli, arguments: tuple[str, ...], paths: list[str]
) -> None:
    assert [each["path"] for each in once(cli, *arguments)] == paths


def test_what_is_refused_below_is_counted(cli: Cli, spending: dict[str, peculium.Budget]) -> None:
    for _ in range(3):
        with pytest.raises(peculium.BudgetExhausted):
            spending["run"].spend(1_000)
    # Servers write down what they have counted every few seconds.
    while not (acme := once(cli, "--match", "acme")[0])["refused"]:
        pass
    assert acme["refused"] == 3
    assert [each["refused"] for each in once(cli, "acme", "--sort", "name")] == [0, 3]
    assert once(cli, "--match", "globex")[0]["refused"] == 0


@contextmanager
def on_a_terminal(target: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The program on a terminal of its own, of 120 columns, and what it writes there."""
    ours, theirs = pty.openpty()
    environment = {
        **os.environ,
        "PECULIUM_TARGET": target,
        "COLUMNS": "120",
        "LINES": "40",
        "TERM": "xterm-256color",
    }
    command = [sys.executable, "-m", "peculium_server", "top", *arguments]
    process = subprocess.Popen(
        command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, wanted: bytes) -> None:
    """Read what is on the screen until this is."""
    seen = b""
    while wanted not in seen:
        ready, _, _ = select.select([terminal], [], [], SECONDS_MAX)
        assert ready, seen[-2000:]
        seen += os.read(terminal, 65_536)


def test_it_goes_on_on_a_terminal_until_somebody_leaves(
    running_server: RunningServer, spending: dict[str, peculium.Budget]
) -> None:
    with on_a_terminal(running_server.address, "--every", "0.2") as (process, terminal):
        read_until(terminal, b"globex")
        spending["run"].spend(16)
        # Seven and sixteen.
        read_until(terminal, b" 23 ")
        process.send_signal(signal.SIGINT)
        # The screen that was there before is there again.
        read_until(terminal, b"\x1b[?1049l")
        assert process.wait(SECONDS_MAX) == 0
