from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from peculium import Price, PriceList, PriceUnknown, Usage, usd
from peculium.errors import Malformed

COUNTS = st.integers(0, 10**7)
PRICES = st.integers(0, 10**12)


@pytest.mark.parametrize(
    ("dollars", "nanos"),
    [
        ("0", 0),
        ("0.12", 120_000_000),
        ("0.000000001", 1),
        ("1e-9", 1),
        ("2.50", 2_500_000_000),
        (3, 3_000_000_000),
        (Decimal("0.1"), 100_000_000),
        ("4611686018", 4_611_686_018_000_000_000),
    ],
)
def test_dollars_are_exact_billionths(dollars: str | int | Decimal, nanos: int) -> None:
    assert usd(dollars) == nanos


@pytest.mark.parametrize(
    "dollars",
    [
        0.1,
        True,
        None,
        "",
        "ten",
        "-1",
        "-0.0",
        -1,
        "NaN",
        "Infinity",
        "0.0000000001",
        "1e-10",
        "4611686019",
        "1e999999999",
        Decimal("sNaN"),
    ],
    ids=repr,
)
def test_dollars_that_are_no_exact_amount_are_refused(dollars: object) -> None:
    with pytest.raises(Malformed):
        usd(dollars)  # type: ignore[arg-type]


@given(st.decimals(min_value=0, max_value=10**9, places=9))
def test_no_billionth_gets_lost(dollars: Decimal) -> None:
    assert Fraction(usd(dollars), 10**9) == Fraction(dollars)


@given(input_=PRICES, output=PRICES, call=PRICES, read=COUNTS, written=COUNTS)
def test_a_cost_is_rounded_up_once(
    input_: int, output: int, call: int, read: int, written: int
) -> None:
    price = Price(input_per_million=input_, output_per_million=output, per_call=call)
    exact = Fraction(read * input_ + written * output, 10**6) + call
    actual = price.actual(Usage(input_tokens=read, output_tokens=written))
    assert 0 <= actual - exact < 1


@given(
    input_=PRICES,
    output=PRICES,
    cached=st.none() | PRICES,
    prompt=COUNTS,
    limit=COUNTS,
    data=st.data(),
)
def test_no_call_within_its_limits_costs_more_than_the_upper_bound(
    input_: int, output: int, cached: int | None, prompt: int, limit: int, data: st.DataObject
) -> None:
    price = Price(input_per_million=input_, output_per_million=output, cached_per_million=cached)
    read = data.draw(st.integers(0, prompt))
    usage = Usage(
        input_tokens=read,
        output_tokens=data.draw(st.integers(0, limit)),
        cached_tokens=data.draw(st.integers(0, read)),
    )
    assert price.actual(usage) <= price.upper(prompt, limit)


def test_tokens_from_a_cache_have_their_own_price() -> None:
    price = Price(input_per_million=1000, output_per_million=0, cached_per_million=100)
    usage = Usage(input_tokens=2_000_000, cached_tokens=1_000_000)
    assert price.actual(usage) == 1100
    assert Price(input_per_million=1000, output_per_million=0).actual(usage) == 2000


def test_an_unknown_price_is_an_error_and_never_zero() -> None:
    price = Price(input_per_million=1, output_per_million=1)
    prices = PriceList({"known": price})
    assert prices["known"] is prices.get("known") is price
    assert "known" in prices
    assert "unknown" not in prices
    assert (list(prices), len(prices)) == (["known"], 1)
    with pytest.raises(PriceUnknown, match=r"no price is known for model 'unknown'") as caught:
        prices["unknown"]
    assert isinstance(caught.value, LookupError)
    with pytest.raises(PriceUnknown):
        prices.get("unknown", price)


ONE = Price(input_per_million=1, output_per_million=1)


@pytest.mark.parametrize("amount", [-1, 2**62, 0.5, True], ids=repr)
@pytest.mark.parametrize(
    "field", ["input_per_million", "output_per_million", "cached_per_million", "per_call"]
)
def test_a_price_that_is_no_amount_is_refused(field: str, amount: object) -> None:
    with pytest.raises(Malformed) as caught:
        replace(ONE, **{field: amount})  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("count", [-1, 2**53 + 1, 1.5, True], ids=repr)
def test_a_number_of_tokens_that_makes_no_sense_is_refused(count: int) -> None:
    for field in ("input_tokens", "output_tokens", "cached_tokens"):
        with pytest.raises(Malformed):
            replace(Usage(), **{field: count})  # type: ignore[arg-type]
    with pytest.raises(Malformed):
        ONE.upper(count, 1)
    with pytest.raises(Malformed):
        ONE.upper(1, count)


def test_no_more_comes_from_a_cache_than_was_read() -> None:
    with pytest.raises(Malformed, match="cached_tokens"):
        Usage(input_tokens=1, cached_tokens=2)
