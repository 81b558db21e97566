"""What callers may ask of a server: never more than the limits say, and never less."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given, strategies as st

from peculium_server.core.limits import SECOND_US
from peculium_server.core.throttle import (
    SWEEP_US,
    Bucket,
    Entry,
    Exceeded,
    Limit,
    Limits,
    Throttle,
)

MS = SECOND_US // 1000
START = 5 * SECOND_US
LET_IN = 0


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        # (when, weight) in milliseconds and operations; told: milliseconds to wait. 10 a second, 3 at once.
        ([(0, 1), (0, 1), (0, 1), (0, 1)], [LET_IN, LET_IN, LET_IN, 100]),
        ([(0, 1), (0, 1), (0, 1), (99, 1), (100, 1)], [LET_IN] * 3 + [1, LET_IN]),
        # A pause is no more than a full bucket.
        ([(60_000, 1)] * 4, [LET_IN, LET_IN, LET_IN, 100]),
        # What is refused costs nothing.
        ([(0, 3), (0, 1), (0, 1), (100, 1)], [LET_IN, 100, 100, LET_IN]),
        # What is larger than the bucket is let in, and waited for by whoever comes next.
        ([(0, 30), (0, 1), (2_700, 1), (2_800, 1)], [LET_IN, 2_800, 100, LET_IN]),
        # A large one is not kept waiting by small ones: room for one is room for it.
        ([(0, 1), (0, 1), (0, 20), (0, 1)], [LET_IN, LET_IN, LET_IN, 2_000]),
        # At the rate itself nobody ever waits.
        ([(100 * step, 1) for step in range(50)], [LET_IN] * 50),
    ],
    ids=["burst", "rate", "pause", "refused", "larger", "large among small", "steady"],
)
def test_a_bucket_lets_in_as_much_as_it_says(
    asked: Sequence[tuple[int, int]], told: Sequence[int]
) -> None:
    throttle = Throttle(Limits(rate=10, burst=3))
    waits = []
    for at, weight in asked:
        entered = throttle.enter("a", weight, START + at * MS)
        waits.append(entered.wait_us // MS if isinstance(entered, Exceeded) else LET_IN)
    assert waits == told


def test_what_a_call_weighs_may_be_known_later() -> None:
    throttle = Throttle(Limits(rate=10, burst=3, at_once=5))
    first = throttle.enter("a", 1, START)
    assert isinstance(first, Entry)
    first.add(9)
    assert throttle.enter("a", 1, START) == Exceeded(Limit.AT_ONCE, 0)
    first.leave()
    assert throttle.enter("a", 1, START) == Exceeded(Limit.RATE, 800 * MS)


@pytest.mark.parametrize(("stream", "limit"), [(False, Limit.AT_ONCE), (True, Limit.STREAMS)])
def test_who_has_as_much_in_progress_as_one_may_waits_until_some_of_it_ends(
    stream: bool, limit: Limit
) -> None:
    throttle = Throttle(Limits(at_once=2, streams=2))
    entries = [throttle.enter("a", 1, START, stream=stream) for _ in range(3)]
    first, _, refused = entries
    assert refused == Exceeded(limit, 0)
    assert isinstance(throttle.enter("b", 1, START, stream=stream), Entry)
    assert isinstance(throttle.enter("a", 1, START, stream=not stream), Entry)
    assert isinstance(first, Entry)
    first.leave()
    assert isinstance(throttle.enter("a", 1, START, stream=stream), Entry)
    assert throttle.enter("a", 1, START, stream=stream) == Exceeded(limit, 0)


def test_who_is_not_limited_never_waits() -> None:
    throttle = Throttle(Limits())
    for _ in range(1000):
        assert isinstance(throttle.enter("a", 1_000_000, START), Entry)
        assert isinstance(throttle.enter("a", 1, START, stream=True), Entry)


# -- Properties ------------------------------------------------------------------------------------------

RATES = st.integers(1, 1_000_000)
BURSTS = st.integers(1, 100_000)
WEIGHTS = st.integers(1, 300)
GAPS = st.one_of(st.just(0), st.integers(0, 1000), st.integers(0, 10 * SECOND_US))
"""Microseconds between two calls."""
DEMANDS = st.lists(st.tuples(GAPS, WEIGHTS), min_size=1, max_size=40)


def times(demand: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    at = accumulate((gap for gap, _ in demand), initial=START)
    next(at)
    return [(moment, weight) for moment, (_, weight) in zip(at, demand, strict=True)]


@given(RATES, BURSTS, DEMANDS)
def test_never_is_more_let_in_than_the_rate_and_the_burst_allow(
    rate: int, burst: int, demand: Sequence[tuple[int, int]]
) -> None:
    """Within any time: what was let in before a call is let in leaves room for one more."""
    throttle = Throttle(Limits(rate=rate, burst=burst))
    let_in = [
        (at, weight)
        for at, weight in times(demand)
        if isinstance(throttle.enter("a", weight, at), Entry)
    ]
    for first in range(len(let_in)):
        used = 0
        for at, weight in let_in[first:]:
            allowed = Fraction(rate * (at - let_in[first][0]), SECOND_US) + burst
            assert used + 1 <= allowed
            used += weight


@given(RATES, BURSTS, DEMANDS, st.integers(0, 50))
def test_never_does_anybody_wait_who_asks_for_less_whatever_others_do(
    rate: int, burst: int, demand: Sequence[tuple[int, int]], others: int
) -> None:
    throttle = Throttle(Limits(rate=rate, burst=burst, at_once=300))
    level, last = Fraction(0), START
    for at, weight in times(demand):
        for other in range(others):
            throttle.enter(f"flood-{other % 3}", 300, at)
        level = max(level - Fraction(rate * (at - last), SECOND_US), Fraction(0))
        last = at
        if level + weight > burst:
            continue
        level += weight
        entered = throttle.enter("modest", weight, at)
        assert isinstance(entered, Entry)
        entered.leave()


@given(RATES, BURSTS, DEMANDS)
def test_who_comes_back_when_told_is_let_in_and_not_a_microsecond_before(
    rate: int, burst: int, demand: Sequence[tuple[int, int]]
) -> None:
    bucket = Bucket(rate, burst)
    for at, weight in times(demand):
        wait = bucket.wait_us(at)
        if wait:
            assert bucket.wait_us(at + wait - 1) > 0
            assert bucket.wait_us(at + wait) == 0
        else:
            bucket.put(at, weight)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), WEIGHTS), max_size=60))
def test_what_has_ended_counts_no_longer(
    steps: Sequence[tuple[int, bool, int]],
) -> None:
    """Against a list of what is open; a step that finds nothing to end is a call."""
    throttle = Throttle(Limits(at_once=500, streams=3), callers_max=2)
    running: dict[int, list[tuple[Entry, bool, int]]] = {}
    for name, stream, weight in steps:
        mine = running.setdefault(name % 2, [])
        if name > 2 and mine:
            mine.pop(0)[0].leave()
            continue
        at_once = sum(each for _, streaming, each in mine if not streaming)
        streams = sum(streaming for _, streaming, _ in mine)
        entered = throttle.enter(f"{name % 2}", weight, START, stream=stream)
        assert isinstance(entered, Entry) == (streams < 3 if stream else at_once < 500)
        if isinstance(entered, Entry):
            mine.append((entered, stream, weight))


# -- How many callers are told apart -----------------------------------------------------------------------


def test_callers_of_whom_nothing_is_left_to_know_are_forgotten() -> None:
    throttle = Throttle(Limits(rate=10, burst=3, at_once=5, streams=5), callers_max=3)
    busy = throttle.enter("busy", 1, START)
    throttle.enter("open", 1, START, stream=True)
    throttle.enter("spent", 1_000, START)
    assert throttle.known == 3
    later = START + SWEEP_US
    assert isinstance(throttle.enter("new", 1, later), Entry)
    # All three are still known for something: the new one is one of the others.
    assert throttle.known == 3
    assert isinstance(busy, Entry)
    busy.leave()
    assert isinstance(throttle.enter("new", 1, later + SWEEP_US), Entry)
    assert throttle.known == 3


def test_those_beyond_the_bound_share_what_one_may_ask_for() -> None:
    throttle = Throttle(Limits(rate=10, burst=4), callers_max=100)
    for number in range(100):
        assert isinstance(throttle.enter(f"known-{number}", 1, START), Entry)
    told = [throttle.enter(f"signed-{number}", 1, START) for number in range(10_000)]
    assert sum(isinstance(each, Entry) for each in told) == 4
    assert throttle.known == 100
    # Whoever is known has what one has, whatever the others do.
    assert isinstance(throttle.enter("known-7", 1, START), Entry)


def test_a_crowd_is_not_looked_through_for_every_stranger() -> None:
    """However many come within a second, the known ones are looked through once."""
    throttle = Throttle(Limits(at_once=5), callers_max=2)
    looks = 0

    class Noting(dict[str, object]):
        def items(self) -> object:  # type: ignore[override]
            nonlocal looks
            looks += 1
            return super().items()

    throttle._callers = Noting()  # type: ignore[assignment]
    for number in range(2):
        throttle.enter(f"busy-{number}", 1, START)
    for number in range(1000):
        throttle.enter(f"stranger-{number}", 1, START + number)
    assert looks == 1
