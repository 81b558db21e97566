from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from peculium._retry import Attempts, Failure, Policy, delay_before
from peculium.errors import (
    BudgetUnknown,
    DeadlineExceeded,
    LedgerUnavailable,
    OutcomeUnknown,
    Unauthenticated,
)

POLICY = Policy(first_seconds=0.05, factor=2.0, longest_seconds=2.0, attempt_seconds=5.0)
LOST = Failure("lost")
NOT_DONE = Failure("not done", not_done=True)
REFUSED = Failure("no", refused=BudgetUnknown("no"), not_done=True)


@pytest.mark.parametrize(
    ("attempt", "seconds"), [(1, 0.05), (2, 0.1), (3, 0.2), (6, 1.6), (7, 2.0), (10_000, 2.0)]
)
def test_pauses_grow_up_to_a_limit(attempt: int, seconds: float) -> None:
    assert delay_before(attempt, LOST, POLICY, 1.0) == pytest.approx(seconds)


@given(attempt=st.integers(1, 100), jitter=st.floats(0, 1))
def test_jitter_only_shortens_a_pause(attempt: int, jitter: float) -> None:
    longest = delay_before(attempt, LOST, POLICY, 1.0)
    delay = delay_before(attempt, LOST, POLICY, jitter)
    assert longest is not None
    assert delay is not None
    assert 0 <= delay <= longest


def test_the_ledgers_word_beats_the_policy() -> None:
    assert delay_before(1, Failure("busy", retry_seconds=7.5), POLICY, 0.0) == 7.5


def test_what_is_refused_or_would_end_the_same_is_not_tried_again() -> None:
    assert delay_before(1, REFUSED, POLICY, 1.0) is None
    assert delay_before(1, Failure("large", permanent=True), POLICY, 1.0) is None


def attempts(*, writes: bool = True) -> Attempts:
    return Attempts(
        POLICY,
        lambda: 1.0,
        deadline=100.0,
        budget="acme",
        operation_id="0192" if writes else None,
    )


def test_an_attempt_takes_no_longer_than_is_left() -> None:
    assert attempts().timeout(90.0) == 5.0
    assert attempts().timeout(98.0) == pytest.approx(2.0)
    with pytest.raises(DeadlineExceeded):
        attempts().timeout(100.0)


def test_attempts_end_when_the_next_one_would_be_too_late() -> None:
    trying = attempts()
    trying.timeout(90.0)
    assert trying.delay(NOT_DONE, 90.0) == pytest.approx(0.05)
    with pytest.raises(LedgerUnavailable, match="not done"):
        trying.delay(NOT_DONE, 99.999)


def test_whoever_wakes_too_late_from_a_pause_is_told_why_there_was_one() -> None:
    trying = attempts()
    trying.timeout(90.0)
    trying.delay(NOT_DONE, 90.0)
    with pytest.raises(LedgerUnavailable, match="not done"):
        trying.timeout(100.0)
    trying = attempts()
    trying.timeout(90.0)
    trying.delay(LOST, 90.0)
    with pytest.raises(OutcomeUnknown, match="lost"):
        trying.timeout(100.0)


def test_what_may_have_been_done_is_told_as_unknown_with_its_id() -> None:
    trying = attempts()
    trying.timeout(90.0)
    trying.delay(LOST, 90.0)
    trying.timeout(91.0)
    with pytest.raises(OutcomeUnknown) as caught:
        trying.delay(NOT_DONE, 99.999)
    assert (caught.value.budget, caught.value.operation_id) == ("acme", "0192")


def test_a_read_is_never_of_unknown_outcome() -> None:
    trying = attempts(writes=False)
    trying.timeout(90.0)
    with pytest.raises(LedgerUnavailable):
        trying.delay(LOST, 99.999)


def test_a_refusal_is_told_also_after_an_attempt_that_was_lost() -> None:
    trying = attempts()
    trying.timeout(90.0)
    trying.delay(LOST, 90.0)
    trying.timeout(91.0)
    with pytest.raises(BudgetUnknown):
        trying.delay(REFUSED, 91.0)


def test_bad_credentials_say_nothing_of_an_attempt_before() -> None:
    failure = Failure("who are you", refused=Unauthenticated("who are you"), not_done=True)
    trying = attempts()
    trying.timeout(90.0)
    with pytest.raises(Unauthenticated):
        trying.delay(failure, 90.0)
    trying = attempts()
    trying.timeout(90.0)
    trying.delay(LOST, 90.0)
    trying.timeout(91.0)
    with pytest.raises(OutcomeUnknown):
        trying.delay(failure, 91.0)
