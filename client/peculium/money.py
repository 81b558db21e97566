"""Money in integers: dollars as `usd_nanos`, and what a model call costs, at most and in fact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from peculium._limits import AMOUNT_MAX, USAGE_TOKENS_MAX
from peculium.errors import Malformed, PriceUnknown

USD_NANOS = "usd_nanos"
"""The unit of `usd()`: billionths of a US dollar."""

_NANOS_PER_USD = 1_000_000_000
_TOKENS_PER_PRICE = 1_000_000


def usd(amount: str | int | Decimal) -> int:
    """Turn dollars into the integer number of `usd_nanos`, exactly.

    Args:
        amount: Dollars, as text ("0.12"), a whole number or a Decimal. Never a float: 0.1 is not a
            tenth.

    Raises:
        Malformed: It is a float, negative, too large, finer than a billionth, or not a number.
    """
    if isinstance(amount, bool) or not isinstance(amount, str | int | Decimal):
        raise _malformed("amount", f"dollars are text, int or Decimal, not {_type(amount)}")
    try:
        dollars = Decimal(amount)
    except InvalidOperation:
        raise _malformed("amount", f"{amount!r} is not a number of dollars") from None
    if not dollars.is_finite() or dollars.is_signed():
        raise _malformed("amount", f"{amount!r} is not zero or more dollars")
    # Compared before it is multiplied: the product of a huge exponent would not fit in memory.
    if dollars > AMOUNT_MAX // _NANOS_PER_USD:
        raise _malformed("amount", f"{amount!r} dollars are more than a budget can hold")
    numerator, denominator = dollars.as_integer_ratio()
    nanos, rest = divmod(numerator * _NANOS_PER_USD, denominator)
    if rest:
        raise _malformed("amount", f"{amount!r} dollars are finer than a billionth")
    return nanos


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a provider reported for one call, kept for attribution and reconciliation.

    Attributes:
        provider: For example "openai".
        model: For example "gpt-5".
        input_tokens: Tokens read, those from a cache included.
        output_tokens: Tokens written.
        cached_tokens: Of the input tokens, those read from a cache.

    Raises:
        Malformed: A count is negative, huge or no int, or more was cached than read.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    provider: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        for field in ("input_tokens", "output_tokens", "cached_tokens"):
            _count(field, getattr(self, field))
        if self.cached_tokens > self.input_tokens:
            raise _malformed("cached_tokens", "must be among the input tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a model's tokens cost, in the tree's unit per million of them.

    The sum for a call is rounded up once, so that what is booked is never below what is billed.

    Attributes:
        input_per_million: For a million tokens read, for example `usd("2.50")`.
        output_per_million: For a million tokens written.
        cached_per_million: For a million tokens read from a cache; absent: as any input.
        per_call: For each call, whatever its size.

    Raises:
        Malformed: A price is negative, huge or no int.
    """

    input_per_million: int
    output_per_million: int
    cached_per_million: int | None = None
    per_call: int = 0

    def __post_init__(self) -> None:
        for field in ("input_per_million", "output_per_million", "per_call"):
            _amount(field, getattr(self, field))
        if self.cached_per_million is not None:
            _amount("cached_per_million", self.cached_per_million)

    def upper(self, prompt_tokens: int, max_output_tokens: int) -> int:
        """The most that a call can cost, in the tree's unit: what to reserve for it.

        Args:
            prompt_tokens: Tokens of the prompt, or an upper bound of them. Counted at the dearer of
                the input prices, since a cache may ask for more.
            max_output_tokens: The limit that is sent to the provider with the call.

        Raises:
            Malformed: A count is negative, huge or no int.
        """
        _count("prompt_tokens", prompt_tokens)
        _count("max_output_tokens", max_output_tokens)
        dearest = max(self.input_per_million, self._cached)
        return self._sum(prompt_tokens * dearest + max_output_tokens * self.output_per_million)

    def actual(self, usage: Usage) -> int:
        """What a call has cost, in the tree's unit, by what the provider reported."""
        fresh = usage.input_tokens - usage.cached_tokens
        return self._sum(
            fresh * self.input_per_million
            + usage.cached_tokens * self._cached
            + usage.output_tokens * self.output_per_million
        )

    @property
    def _cached(self) -> int:
        cached = self.cached_per_million
        return self.input_per_million if cached is None else cached

    def _sum(self, per_million: int) -> int:
        return self.per_call - (-per_million // _TOKENS_PER_PRICE)


class PriceList(Mapping[str, Price]):
    """Prices by model. A model that is not listed is an error, never free of charge."""

    def __init__(self, prices: Mapping[str, Price]) -> None:
        self._prices = dict(prices)

    def __getitem__(self, model: str) -> Price:
        """The model's price.

        Raises:
            PriceUnknown: The model is not listed.
        """
        try:
            return self._prices[model]
        except KeyError:
            known = ", ".join(sorted(self._prices)) or "none"
            raise PriceUnknown(f"no price is known for model {model!r} (known: {known})") from None

    def __contains__(self, model: object) -> bool:
        return model in self._prices

    def __iter__(self) -> Iterator[str]:
        return iter(self._prices)

    def __len__(self) -> int:
        return len(self._prices)

    def get(self, model: str, default: object = None) -> Price:
        """The model's price; a default is not taken, since an unknown price must not pass.

        Raises:
            PriceUnknown: The model is not listed.
        """
        del default
        return self[model]


def _count(field: str, value: int) -> None:
    if type(value) is not int or not 0 <= value <= USAGE_TOKENS_MAX:
        raise _malformed(field, f"must be an int from 0 to 2^53, not {value!r}")


def _amount(field: str, value: int) -> None:
    if type(value) is not int or not 0 <= value <= AMOUNT_MAX:
        raise _malformed(field, f"must be an int from 0 to 2^62 - 1, not {value!r}")


def _malformed(field: str, problem: str) -> Malformed:
    return Malformed(f"{field}: {problem}", facts={"field": field, "problem": problem})


def _type(value: object) -> str:
    return type(value).__name__
