"""What a call costs: the price list that the agents reserve by and the provider bills by."""

from __future__ import annotations

from typing import Final

from peculium import Price, PriceList, Usage, usd
from peculium_server.demo.trace import Request

PROVIDER: Final = "example-provider"
MODEL: Final = "example-large"
PRICES: Final = PriceList(
    {MODEL: Price(input_per_million=usd("2.50"), output_per_million=usd("10"))}
)
"""In `usd_nanos`: a token read is 2,500, a token written 10,000."""


def upper(request: Request) -> int:
    """The most that a request can cost, known before the call: what its agent reserves."""
    return PRICES[MODEL].upper(request.context_tokens, request.output_limit)


def actual(input_tokens: int, output_tokens: int) -> tuple[int, Usage]:
    """What a call has cost, and the usage that says so, to be recorded with it."""
    usage = Usage(
        provider=PROVIDER, model=MODEL, input_tokens=input_tokens, output_tokens=output_tokens
    )
    return PRICES[MODEL].actual(usage), usage
