"""What a threshold is, when it fires, and how long a delivery waits: rules without a ledger."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from peculium_server.core.alerts import (
    ATTEMPTS_MAX,
    DELAY_US_MAX,
    JITTER_STEPS,
    AlertKind,
    Reading,
    Rule,
    delay_after,
    look,
)
from peculium_server.core.limits import SECOND_US

AMOUNTS = st.integers(0, 2**62)


def rule(**said: Any) -> Rule:
    ids = bytes(16)
    made = Rule(ids, 0, ids, ids, (ids,), "acme", "calls", AlertKind.USED, 0, 0, 0, 0, "admin")
    return made._replace(**said)


def reading(used: int, granted: int = 100, *, closed: bool = False) -> Reading:
    return Reading(1, used, granted, closed)


@given(granted=AMOUNTS, used=AMOUNTS, basis_points=st.integers(1, 100_000))
def test_a_share_is_crossed_exactly_from_that_share_on(
    granted: int, used: int, basis_points: int
) -> None:
    threshold = rule(basis_points=basis_points).threshold(granted)
    crossed = used > 0 and used * 10_000 >= granted * basis_points
    assert (used >= threshold) is crossed


@given(granted=AMOUNTS, amount=st.integers(1, 2**62 - 1))
def test_an_amount_is_a_threshold_whatever_was_granted(granted: int, amount: int) -> None:
    assert rule(amount=amount).threshold(granted) == amount


def test_a_rule_fires_once_and_again_only_after_it_was_found_below() -> None:
    watching = rule(basis_points=8_000)
    fired = []
    for used in (79, 80, 81, 200, 80, 79, 79, 80):
        watching, alert = look(watching, reading(used))
        fired.append(alert is not None)
    assert fired == [False, True, False, False, False, False, False, True]
    assert watching.crossings == 2


def test_more_that_is_granted_arms_a_share_and_not_an_amount() -> None:
    share, amount = rule(basis_points=8_000), rule(amount=80)
    share, _ = look(share, reading(80))
    amount, _ = look(amount, reading(80))
    assert look(share, reading(80, granted=200))[0].armed
    assert not look(amount, reading(80, granted=200))[0].armed


def test_each_crossing_of_a_rule_has_an_id_of_its_own_and_the_same_whoever_finds_it() -> None:
    watching = rule(basis_points=8_000)
    after, first = look(watching, reading(80))
    _, found_elsewhere = look(watching, reading(85))
    after, _ = look(after, reading(10))
    _, second = look(after, reading(80))
    _, of_another_rule = look(rule(basis_points=8_000, rule_id=bytes(15) + b"x"), reading(80))
    assert first is not None
    assert found_elsewhere is not None
    assert second is not None
    assert of_another_rule is not None
    assert first.alert_id == found_elsewhere.alert_id
    assert len({first.alert_id, second.alert_id, of_another_rule.alert_id}) == 3


def test_what_was_granted_to_a_closed_budget_is_no_measure_of_what_it_has_used() -> None:
    """All that flows back makes its share rise to the whole."""
    for armed in (True, False):
        share = rule(basis_points=5_000, armed=armed)
        assert look(share, reading(40, granted=40, closed=True)) == (
            share._replace(due=False),
            None,
        )
        assert look(share, reading(1, closed=True))[0].armed is armed
    _, alert = look(rule(amount=40), reading(40, granted=40, closed=True))
    assert alert is not None


def test_an_alert_says_what_was_found_against_what() -> None:
    _, alert = look(rule(basis_points=5_000), reading(61, granted=121))
    assert alert is not None
    assert (alert.amount, alert.threshold, alert.granted) == (61, 61, 121)


@pytest.mark.parametrize("attempts", range(1, ATTEMPTS_MAX))
def test_each_delay_is_four_times_the_one_before_up_to_a_day_the_half_of_it_by_chance(
    attempts: int,
) -> None:
    longest = min(5 * SECOND_US * 4 ** (attempts - 1), DELAY_US_MAX)
    assert delay_after(attempts, 0) == longest // 2
    assert delay_after(attempts, JITTER_STEPS) == longest


def test_a_delivery_is_dead_when_it_was_tried_often_enough() -> None:
    assert delay_after(ATTEMPTS_MAX, 0) is None
    assert DELAY_US_MAX == 86_400 * SECOND_US
