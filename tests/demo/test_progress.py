"""Progress is drawn on a terminal, and told in lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from peculium_server.demo.messages import Tally
from peculium_server.demo.progress import RATE_SECONDS, Rate, dollars, exact_dollars, shown

TALLY = Tally(calls=1234, refused=5, spent=6_500_000_000, held=7_000)


@pytest.mark.parametrize(
    ("nanos", "text"),
    [
        (0, "$0.000000"),
        (999, "$0.000000"),
        (1_000, "$0.000001"),
        (1_234_567_890, "$1.234567"),
        (2**62, "$4,611,686,018.427387"),
    ],
)
def test_dollars_are_cut_and_never_rounded_up(nanos: int, text: str) -> None:
    assert dollars(nanos) == text
    assert exact_dollars(nanos) == f"{text}{nanos % 1000:03}"


def test_the_rate_is_that_of_the_last_seconds_only() -> None:
    rate = Rate()
    assert rate.at(0.0, 0) == 0
    assert rate.at(1.0, 100) == 100
    assert rate.at(1.0 + RATE_SECONDS, 100 + 300) == 300 / RATE_SECONDS
    assert rate.at(100.0, 400) == 0


@pytest.mark.parametrize(
    ("terminal", "cap", "figures"),
    [
        (True, 8_000_000_000, "$6.50 of $8.00, $0.00 held, 0 calls/s, 5 refused"),
        (True, 1_000_000, "$6.500000 of $0.001000, $0.000007 held, 0 calls/s, 5 refused"),
        (
            False,
            8_000_000_000,
            "1,234 calls, 0/s, 5 refused; spent $6.500000 of $8.000000, held $0.000007",
        ),
    ],
    ids=["terminal", "terminal with a small cap", "pipe"],
)
async def test_the_last_figures_are_shown_however_short_the_run(
    terminal: bool, cap: int, figures: str
) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    async with shown(console, cap, lambda: TALLY):
        pass
    file = console.file
    assert isinstance(file, io.StringIO)
    told = file.getvalue()
    assert figures in told
    assert ("\x1b[" in told) == terminal
