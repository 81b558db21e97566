"""Amounts as people write and read them: `12.50usd`, or a whole number of the tree's unit."""

from __future__ import annotations

import re
from typing import Final

import typer

from peculium import USD_NANOS, usd
from peculium.errors import Malformed

_USD: Final = re.compile(
    r"\$?\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*usd|\$\s*([0-9][0-9_,]*(?:\.[0-9]+)?)", re.IGNORECASE
)
_WHOLE: Final = re.compile(r"[0-9][0-9_,]*")
_NANOS_DIGITS: Final = 9
_CENT_DIGITS: Final = 2


def parse_amount(text: str, unit: str | None) -> tuple[int, str]:
    """Read an amount, and say in which unit it is.

    Args:
        text: `12.50usd`, `$12.50`, or a whole number.
        unit: The tree's unit; None if the amount may say it.

    Raises:
        typer.BadParameter: It is no amount, or not one of that unit.
    """
    written = text.strip()
    dollars = _USD.fullmatch(written)
    if dollars is not None:
        if unit not in (None, USD_NANOS):
            raise typer.BadParameter(f"{text!r} is in dollars, and the tree counts {unit}")
        try:
            return usd((dollars[1] or dollars[2]).replace(",", "").replace("_", "")), USD_NANOS
        except Malformed as error:
            raise typer.BadParameter(error.message) from error
    if _WHOLE.fullmatch(written) is None:
        raise typer.BadParameter(f"{text!r} is no amount: write a whole number, or 12.50usd")
    if unit is None:
        raise typer.BadParameter(
            f"{text!r} of what? Write dollars as 12.50usd, or name a --unit such as tokens"
        )
    return int(written.replace(",", "").replace("_", "")), unit


def show_amount(amount: int, unit: str) -> str:
    """Write an amount exactly: dollars with as many digits as they need, others in groups of three."""
    if unit != USD_NANOS:
        return f"{amount:,}"
    sign = "-" if amount < 0 else ""
    whole, nanos = divmod(abs(amount), 10**_NANOS_DIGITS)
    digits = f"{nanos:0{_NANOS_DIGITS}d}".rstrip("0").ljust(_CENT_DIGITS, "0")
    return f"{sign}${whole:,}.{digits}"
