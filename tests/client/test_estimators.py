from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, strategies as st

from peculium.errors import Malformed
from peculium.estimators import MISSES_AHEAD, AdaptiveEstimator
from peculium_server.demo import trace

LIMIT = 4_096
COVERAGES = st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999])


def missed(estimator: AdaptiveEstimator, uses: Iterable[int], limit: int = LIMIT) -> int:
    """How many of a model's calls, one after the other, use more than was estimated."""
    count = 0
    for number, use in enumerate(uses):
        estimate = estimator.estimate("m", limit=limit, size=number % 7)
        count += use > estimate.amount
        estimator.learn(estimate, use)
    return count


def allowed(estimator: AdaptiveEstimator, calls: int) -> float:
    return (1 - estimator.coverage) * calls + MISSES_AHEAD


@given(COVERAGES, st.booleans(), st.lists(st.integers(0, LIMIT), max_size=400))
def test_misses_stay_within_their_budget_whatever_the_calls_use(
    coverage: float, alike: bool, uses: list[int]
) -> None:
    estimator = AdaptiveEstimator(coverage=coverage, window=10_000, alike=alike)
    assert missed(estimator, uses) < allowed(estimator, len(uses)) + 1e-6


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("limit", [1, 7, LIMIT])
@pytest.mark.parametrize("alike", [True, False])
def test_misses_stay_within_their_budget_against_one_who_knows_every_estimate(
    coverage: float, limit: int, alike: bool
) -> None:
    """The worst that there is: whatever is estimated, the call uses one more if it can."""
    estimator = AdaptiveEstimator(coverage=coverage, alike=alike)
    chance = random.Random(7)
    misses = 0
    calls = 6_000
    for _ in range(calls):
        estimate = estimator.estimate("m", limit=limit)
        use = min(estimate.amount + 1, limit) if chance.random() < 0.9 else 0
        misses += use > estimate.amount
        estimator.learn(estimate, use)
    assert misses < allowed(estimator, calls)
    assert misses == estimator.calibration("m").misses


@given(st.integers(1, 40), st.lists(st.integers(0, LIMIT), min_size=1, max_size=300))
def test_calls_in_flight_add_at_most_as_many_misses(flying: int, uses: list[int]) -> None:
    estimator = AdaptiveEstimator(coverage=0.9)
    misses = 0
    for first in range(0, len(uses), flying):
        some = uses[first : first + flying]
        estimates = [estimator.estimate("m", limit=LIMIT) for _ in some]
        for estimate, use in zip(estimates, some, strict=True):
            misses += use > estimate.amount
            estimator.learn(estimate, use)
    assert misses < allowed(estimator, len(uses)) + flying


@given(COVERAGES, st.lists(st.tuples(st.integers(0, 5_000), st.integers(0, 10_000)), max_size=200))
def test_an_estimate_never_exceeds_the_limit(coverage: float, calls: list[tuple[int, int]]) -> None:
    estimator = AdaptiveEstimator(coverage=coverage, window=10_000)
    for limit, use in calls:
        estimate = estimator.estimate("m", limit=limit)
        assert 0 <= estimate.amount <= limit
        assert estimate.learned == (estimate.amount < limit)
        estimator.learn(estimate, use)


def gradual(chance: random.Random, number: int) -> int:
    return min(LIMIT, int(chance.expovariate(1 / (20 + number / 40))))


def sudden(chance: random.Random, number: int) -> int:
    return min(LIMIT, int(chance.expovariate(1 / (20 if number < 3_000 else 600))))


def steady(chance: random.Random, number: int) -> int:
    return min(LIMIT, int(chance.paretovariate(1.3)))


@pytest.mark.parametrize("nature", [steady, gradual, sudden])
@pytest.mark.parametrize("coverage", [0.9, 0.99])
def test_the_coverage_is_what_was_asked_for_and_costs_less_than_the_limit(
    nature: Callable[[random.Random, int], int], coverage: float
) -> None:
    chance = random.Random(11)
    estimator = AdaptiveEstimator(coverage=coverage)
    amounts = []
    for number in range(6_000):
        estimate = estimator.estimate("m", limit=LIMIT)
        estimator.learn(estimate, nature(chance, number))
        amounts.append(estimate.amount)
    reached = estimator.calibration("m").coverage
    assert coverage - 0.002 <= reached <= coverage + (1 - coverage)
    assert sum(amounts[2_000:]) < 0.9 * LIMIT * len(amounts[2_000:])


@given(st.lists(st.integers(0, LIMIT), min_size=20, max_size=150))
def test_more_coverage_never_estimates_less(uses: list[int]) -> None:
    amounts = []
    for coverage in (0.5, 0.8, 0.95, 0.99, 0.999):
        estimator = AdaptiveEstimator(coverage=coverage)
        limit = estimator.estimate("m", limit=LIMIT)
        for use in uses:
            # From a call that was covered: how often it was right before is left out of it.
            estimator.learn(limit, use)
        amounts.append(estimator.estimate("m", limit=LIMIT).amount)
    assert amounts == sorted(amounts)


def test_until_enough_is_known_the_limit_is_estimated() -> None:
    estimator = AdaptiveEstimator(coverage=0.99)
    for _ in range(48):
        estimate = estimator.estimate("m", limit=LIMIT)
        assert estimate.amount == LIMIT
        estimator.learn(estimate, 5)
    while estimator.calibration("m").calls < 99:
        estimator.learn(estimator.estimate("m", limit=LIMIT), 5)
    assert estimator.estimate("m", limit=LIMIT).amount == 5
    assert estimator.estimate("another", limit=LIMIT).amount == LIMIT


def test_calls_are_compared_with_those_of_their_size_first() -> None:
    estimator = AdaptiveEstimator(coverage=0.9)
    for size, use in ((10, 3), (1_000, 700)):
        for _ in range(30):
            estimator.learn(estimator.estimate("m", limit=LIMIT, size=size), use)
    assert estimator.estimate("m", limit=LIMIT, size=11).amount == 3
    assert estimator.estimate("m", limit=LIMIT, size=900).amount == 700
    # Of a size that is new, all of them tell.
    assert estimator.estimate("m", limit=LIMIT, size=100_000).amount == 700
    # With another limit, none.
    assert estimator.estimate("m", limit=10 * LIMIT, size=11).amount == 10 * LIMIT


def test_without_credit_only_limits_are_estimated_until_it_is_earned_again() -> None:
    estimator = AdaptiveEstimator(coverage=0.9)
    for _ in range(400):
        estimator.learn(estimator.estimate("m", limit=LIMIT), 1)
    misses = 0
    while (estimate := estimator.estimate("m", limit=LIMIT)).learned:
        estimator.learn(estimate, LIMIT)
        misses += 1
        assert misses <= 10
    assert estimator.calibration("m").credit < 1
    while not (estimate := estimator.estimate("m", limit=LIMIT)).learned:
        estimator.learn(estimate, 1)
        assert estimator.calibration("m").calls < 500
    assert estimate.amount < LIMIT


def test_what_was_long_ago_is_forgotten() -> None:
    estimator = AdaptiveEstimator(coverage=0.9, window=50)
    for use in [900] * 50 + [10] * 50:
        estimator.learn(estimator.estimate("m", limit=LIMIT), use)
    assert estimator.estimate("m", limit=LIMIT).amount == 10


def test_threads_may_learn_at_once() -> None:
    estimator = AdaptiveEstimator(coverage=0.9, window=200)

    def learn(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(300):
            estimate = estimator.estimate("m", limit=LIMIT)
            estimator.learn(estimate, chance.randrange(100))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(learn, range(8)))
    assert estimator.calibration("m").calls == 2_400
    assert estimator.estimate("m", limit=LIMIT).amount < 100


def test_a_model_that_nobody_knows_has_missed_nothing() -> None:
    calibration = AdaptiveEstimator().calibration("m")
    assert (calibration.calls, calibration.misses, calibration.coverage) == (0, 0, 1.0)


@pytest.mark.parametrize("coverage", [0.0, 0.49, 0.99999, 1.0, float("nan")])
def test_a_coverage_that_cannot_be_is_refused(coverage: float) -> None:
    with pytest.raises(Malformed):
        AdaptiveEstimator(coverage=coverage)


def test_a_window_that_cannot_show_the_coverage_is_refused() -> None:
    with pytest.raises(Malformed):
        AdaptiveEstimator(coverage=0.999, window=999)
    AdaptiveEstimator(coverage=0.999, window=1_000)


@pytest.mark.parametrize("wrong", [-1, 1.5, True])
def test_counts_are_whole_numbers(wrong: int) -> None:
    estimator = AdaptiveEstimator()
    with pytest.raises(Malformed):
        estimator.estimate("m", limit=wrong)
    with pytest.raises(Malformed):
        estimator.estimate("m", limit=1, size=wrong)
    with pytest.raises(Malformed):
        estimator.learn(estimator.estimate("m", limit=1), wrong)


def test_on_a_real_trace_it_covers_what_it_says_and_reserves_far_less_than_the_limit() -> None:
    requests = trace.read(None)
    estimator = AdaptiveEstimator(coverage=0.99)
    reserved = used = 0
    for request in requests:
        estimate = estimator.estimate("m", limit=2_048, size=request.context_tokens)
        estimator.learn(estimate, request.generated_tokens)
        reserved += estimate.amount
        used += request.generated_tokens
    calibration = estimator.calibration("m")
    assert calibration.coverage >= 0.989
    assert calibration.misses < allowed(estimator, len(requests))
    assert reserved < 2_048 * len(requests) / 5


# --- what is known to be used, and coverage of all sizes together ---


@given(
    COVERAGES,
    st.booleans(),
    st.lists(
        st.tuples(st.integers(0, 5_000), st.integers(0, 5_000), st.integers(0, 10_000)),
        max_size=200,
    ),
)
def test_an_estimate_is_between_what_is_used_in_any_case_and_the_limit(
    coverage: float, alike: bool, calls: list[tuple[int, int, int]]
) -> None:
    estimator = AdaptiveEstimator(coverage=coverage, window=10_000, alike=alike)
    for least, open_, use in calls:
        estimate = estimator.estimate("m", limit=least + open_, size=least, least=least)
        assert least <= estimate.amount <= least + open_
        estimator.learn(estimate, use)


@pytest.mark.parametrize("alike", [True, False])
def test_only_what_is_open_is_learned(alike: bool) -> None:
    estimator = AdaptiveEstimator(coverage=0.9, alike=alike)
    for _ in range(64):
        estimate = estimator.estimate("m", limit=1_000 + 64, size=9, least=1_000)
        estimator.learn(estimate, 1_005)
    amount = estimator.estimate("m", limit=1_015 + 64, size=9, least=1_015).amount
    # Of what is expected to use a little more, a little more is expected beside.
    assert amount == (1_020 if alike else 1_021)


def test_what_is_used_in_any_case_is_no_more_than_the_limit() -> None:
    with pytest.raises(Malformed):
        AdaptiveEstimator().estimate("m", limit=5, least=6)


def test_misses_are_where_holds_are_largest_for_what_calls_use() -> None:
    """Half of the calls read little and half read much; what they write is the same."""
    chance = random.Random(3)
    missed_by = {}
    for alike in (True, False):
        estimator = AdaptiveEstimator(coverage=0.95, alike=alike)
        misses = {10: 0, 10_000: 0}
        ratios = 0.0
        for _ in range(8_000):
            read = chance.choice([10, 10_000])
            use = read + min(LIMIT, int(chance.expovariate(1 / 50)))
            estimate = estimator.estimate("m", limit=read + LIMIT, size=read, least=read)
            estimator.learn(estimate, use)
            misses[read] += use > estimate.amount
            ratios += estimate.amount / use
        assert estimator.calibration("m").coverage >= 0.949
        missed_by[alike] = misses, ratios
    together, each = missed_by[False], missed_by[True]
    assert together[0][10] > 10 * together[0][10_000]
    assert each[0][10] < 2 * each[0][10_000]
    assert together[1] < each[1]


def test_the_same_calls_are_always_estimated_alike() -> None:
    requests = trace.read(None)[:1_500]

    def estimated() -> list[int]:
        estimator = AdaptiveEstimator(coverage=0.95, alike=False)
        amounts = []
        for request in requests:
            estimate = estimator.estimate("m", limit=2_048, size=request.context_tokens)
            estimator.learn(estimate, request.generated_tokens)
            amounts.append(estimate.amount)
        return amounts

    assert estimated() == estimated()
