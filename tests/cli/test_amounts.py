from __future__ import annotations

import pytest
import typer
from hypothesis import given, strategies as st

from peculium import USD_NANOS
from peculium_server.cli.amounts import parse_amount, show_amount

MOST = (2**62 - 1) // 10**9 * 10**9
"""The largest amount that is whole dollars."""


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("12.50usd", 12_500_000_000),
        ("12.50 USD", 12_500_000_000),
        ("$12.50", 12_500_000_000),
        ("1,000usd", 1_000_000_000_000),
        ("0usd", 0),
        ("0.000000001usd", 1),
    ],
)
def test_dollars_say_their_unit(text: str, amount: int) -> None:
    assert parse_amount(text, None) == (amount, USD_NANOS)
    assert parse_amount(text, USD_NANOS) == (amount, USD_NANOS)


@pytest.mark.parametrize(
    ("text", "amount"), [("12", 12), ("1_000", 1_000), ("1,000,000", 1_000_000), (" 7 ", 7)]
)
def test_a_whole_number_is_of_the_trees_unit(text: str, amount: int) -> None:
    assert parse_amount(text, "tokens") == (amount, "tokens")
    assert parse_amount(text, USD_NANOS) == (amount, USD_NANOS)


@pytest.mark.parametrize(
    ("text", "unit", "said"),
    [
        ("12", None, "--unit"),
        ("12usd", "tokens", "the tree counts tokens"),
        ("12.5", "tokens", "no amount"),
        ("-3", "tokens", "no amount"),
        ("-3usd", None, "no amount"),
        ("1e3", "tokens", "no amount"),
        ("٣", "tokens", "no amount"),
        ("", "tokens", "no amount"),
        ("usd", None, "no amount"),
        ("12eur", None, "no amount"),
        ("0.0000000001usd", None, "finer than a billionth"),
        ("9999999999999usd", None, "more than a budget can hold"),
    ],
)
def test_what_is_no_amount_is_told_why(text: str, unit: str | None, said: str) -> None:
    with pytest.raises(typer.BadParameter, match=said):
        parse_amount(text, unit)


@pytest.mark.parametrize(
    ("amount", "unit", "shown"),
    [
        (0, USD_NANOS, "$0.00"),
        (12_500_000_000, USD_NANOS, "$12.50"),
        (1, USD_NANOS, "$0.000000001"),
        (-1_500_000_000, USD_NANOS, "-$1.50"),
        (1_234_567_890_000_000_000, USD_NANOS, "$1,234,567,890.00"),
        (1_234_567, "tokens", "1,234,567"),
        (-5, "tokens", "-5"),
    ],
)
def test_an_amount_is_shown_exactly(amount: int, unit: str, shown: str) -> None:
    assert show_amount(amount, unit) == shown


@given(st.integers(0, MOST), st.sampled_from([USD_NANOS, "tokens"]))
def test_what_is_shown_can_be_written_again(amount: int, unit: str) -> None:
    assert parse_amount(show_amount(amount, unit), unit) == (amount, unit)
