"""Amounts of a bill, exact: decimals of the file's unit, turned into the tree's."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal, Inexact, InvalidOperation
from typing import Any, Final, NamedTuple

from peculium_server.core.limits import AMOUNT_MAX

Amount = int | Decimal
"""In the tree's unit: an int if it is whole, or else every digit that the bill has."""

_TEXT_MAX: Final = 64
"""Characters of an amount; more is no amount, and takes too long to read."""
_DIGITS_AFTER_POINT: Final = 60
_EXACT: Final = Context(prec=200, traps=[Inexact, InvalidOperation])
"""Room for the sum of as many amounts as fit into a file, without rounding any."""
_PERCENT: Final = 100


def parse_amount(value: Any, factor: int) -> Amount:
    """Read an amount of the bill.

    Args:
        value: Text, or a number out of JSON. Never a float: those were read as Decimal.
        factor: How many of the tree's unit one of the file's unit is.

    Raises:
        ValueError: It is no amount, negative, or more than a budget can hold.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise ValueError(f"{_short(value)} is no amount")  # noqa: TRY004 - of a file, not of an argument
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and (len(text) > _TEXT_MAX or "_" in text):
        raise ValueError(f"{_short(text)} is no amount")
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{_short(text)} is no amount") from None
    if not number.is_finite():
        raise ValueError(f"{_short(text)} is no amount")
    if number < 0:
        raise ValueError(f"{_short(text)} is negative: credits are no calls, leave them out")
    # Compared before it is multiplied: the product of a huge exponent would not fit in memory.
    if number > AMOUNT_MAX // factor:
        raise ValueError(f"{_short(text)} is more than a budget can hold")
    if number and number.adjusted() - len(number.as_tuple().digits) < -_DIGITS_AFTER_POINT:
        raise ValueError(f"{_short(text)} has too many digits")
    scaled = _EXACT.multiply(number, Decimal(factor))
    whole = int(scaled)
    return whole if whole == scaled else scaled


def add(one: Amount, other: Amount) -> Amount:
    """The sum, exact. Once a Decimal, always one: it tells that something was finer than the unit."""
    if isinstance(one, int) and isinstance(other, int):
        return one + other
    return _EXACT.add(Decimal(one), Decimal(other))


def rounded(amount: Amount) -> int:
    """The nearest whole number, halves to the even one: done once, to a sum."""
    if isinstance(amount, int):
        return amount
    return int(amount.to_integral_value(ROUND_HALF_EVEN, _EXACT))


class Tolerance(NamedTuple):
    """How far bill and ledger may be apart: as far as either allows."""

    absolute: int = 0
    """In the tree's unit."""
    percent: Decimal = Decimal(0)
    """Of the larger of both."""

    def allows(self, billed: Amount, booked: int, fine: int) -> int:
        """The largest difference that is none, in the tree's unit: any that is above is one.

        Args:
            billed: What the bill says.
            booked: What the ledger says.
            fine: How many lines of the bill are finer than the unit. Such an amount may have been
                booked rounded up or down: each explains a difference of less than one.
        """
        larger = max(Decimal(billed), Decimal(booked))
        part = int(_EXACT.divide(_EXACT.multiply(larger, self.percent), Decimal(_PERCENT)))
        return max(self.absolute, part, fine)

    def agree(self, billed: Amount, booked: int, fine: int) -> bool:
        """Bill and ledger say the same, as far as the tolerance goes."""
        difference = Decimal(add(billed, -booked))
        return abs(difference) <= self.allows(billed, booked, fine)


def _short(value: Any) -> str:
    text = repr(str(value) if isinstance(value, Decimal) else value)
    return text if len(text) <= _TEXT_MAX else f"{text[:_TEXT_MAX]}…"
