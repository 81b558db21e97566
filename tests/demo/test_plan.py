"""The cap binds before the trace ends, and yet no single request is larger than the cap."""

from __future__ import annotations

import pytest

from peculium_server.core.limits import AMOUNT_MAX
from peculium_server.demo import trace
from peculium_server.demo.prices import actual, upper
from peculium_server.demo.run import Settings, TooDear, plan
from peculium_server.demo.trace import TOKENS_MAX, Request

SETTINGS = Settings(processes=4, agents=8, cap_percent=85)


def test_the_cap_is_a_share_of_what_the_whole_trace_costs() -> None:
    requests = trace.read(None)
    made = plan(requests, SETTINGS)
    assert made.requests == 8819
    assert made.cost == 18_059_974 * 2_500 + 245_896 * 10_000
    assert made.granted == made.cost * 85 // 100


def test_the_cap_can_pay_any_single_request() -> None:
    few = [Request(1, 100, 10), Request(2, 1_000_000, 100)]
    assert plan(few, SETTINGS).granted == upper(few[1])
    assert plan(few[:1], SETTINGS).granted == upper(few[0]) > actual(100, 10)[0]
    nothing = [Request(1, 0, 0)]
    assert plan(nothing, SETTINGS).granted == upper(nothing[0]) > 0


def test_a_trace_that_needs_more_than_a_budget_can_hold_is_refused() -> None:
    most = AMOUNT_MAX // 2_500
    assert plan([Request(1, most - 64, 1)], SETTINGS).granted <= AMOUNT_MAX
    with pytest.raises(TooDear, match="is the largest"):
        plan([Request(1, most + 1, 1)], SETTINGS)
    with pytest.raises(TooDear):
        plan([Request(1, TOKENS_MAX, TOKENS_MAX)], SETTINGS)


@pytest.mark.parametrize("generated", [0, 1, 16, 17, 5_000])
def test_what_is_reserved_is_never_less_than_what_is_billed(generated: int) -> None:
    assert upper(Request(1, 7, generated)) >= actual(7, generated)[0]
