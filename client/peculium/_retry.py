"""When to send an operation again: a pure decision, with the randomness as an argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from peculium.errors import (
    DeadlineExceeded,
    Invalid,
    LedgerUnavailable,
    OutcomeUnknown,
    Refused,
    Unavailable,
)


@dataclass(frozen=True, slots=True)
class Policy:
    """How long to wait before another attempt.

    Attributes:
        first_seconds: Before the second attempt, at most.
        factor: How much longer before each further one.
        longest_seconds: It never grows beyond this.
        attempt_seconds: How long one attempt may take before it counts as lost.
    """

    first_seconds: float = 0.05
    factor: float = 2.0
    longest_seconds: float = 2.0
    attempt_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt failed, whatever carried it.

    Attributes:
        message: For people.
        refused: The ledger's definite answer, if it gave one: nothing was done.
        not_done: Nothing was done, for certain.
        retry_seconds: When the ledger says to try again.
        permanent: Another attempt would end the same.
    """

    message: str
    refused: Refused | Invalid | None = None
    not_done: bool = False
    retry_seconds: float | None = None
    permanent: bool = False


def delay_before(attempt: int, failure: Failure, policy: Policy, jitter: float) -> float | None:
    """How many seconds to wait before another attempt; None: do not try again.

    Args:
        attempt: How many attempts were made so far, at least 1.
        failure: How the last one failed.
        policy: The local policy, which the ledger's own word beats.
        jitter: From 0 to 1, evenly distributed, so that clients do not come back in step.
    """
    if failure.refused is not None or failure.permanent:
        return None
    if failure.retry_seconds is not None:
        return failure.retry_seconds
    # Compared as an exponent first: a high power of a float overflows.
    longest = policy.first_seconds
    for _ in range(attempt - 1):
        longest *= policy.factor
        if longest >= policy.longest_seconds:
            longest = policy.longest_seconds
            break
    return longest * jitter


class Resumable(Protocol):
    """An answer of a stream that never ends."""

    cursor: bytes
    """To go on behind."""


class Resuming(Resumable, Protocol):
    """A request for such a stream."""

    from_beginning: bool
    """Without a cursor: everything."""


class Attempts:
    """The attempts at one call that travels alone: how long each may take, and what comes after it."""

    def __init__(
        self,
        policy: Policy,
        jitter: Callable[[], float],
        *,
        deadline: float,
        budget: str | None = None,
        operation_id: str | None = None,
    ) -> None:
        self._policy = policy
        self._jitter = jitter
        self._deadline = deadline
        self._budget = budget
        self._operation_id = operation_id
        """None for a call that only reads: its outcome cannot stay unknown."""
        self._made = 0
        self._maybe_done = False
        self._failed: str | None = None
        """Why the attempt before did, if there was one."""

    def timeout(self, now: float) -> float:
        """How many seconds the next attempt may take.

        Raises:
            DeadlineExceeded: There was no time for any.
            LedgerUnavailable: There is no time left after one that has failed, and nothing was done.
            OutcomeUnknown: There is no time left, and it may have been done.
        """
        left = self._deadline - now
        if left <= 0 and self._failed is not None:
            # Whoever wakes late from a pause is told why there was one.
            raise self._unavailable(self._failed, LedgerUnavailable)
        if left <= 0:
            raise self._unavailable("the time is over", DeadlineExceeded)
        self._made += 1
        return min(left, self._policy.attempt_seconds)

    def delay(self, failure: Failure, now: float) -> float:
        """How many seconds to wait before the next attempt.

        Raises:
            Refused: The ledger said no.
            Invalid: The ledger found the request wrong.
            LedgerUnavailable: There is no time for another attempt, and nothing was done.
            OutcomeUnknown: There is no time for another attempt, and it may have been done.
        """
        self._maybe_done = self._maybe_done or not failure.not_done
        self._failed = failure.message
        delay = delay_before(self._made, failure, self._policy, self._jitter())
        if delay is not None and now + delay < self._deadline:
            return delay
        # What is refused for its budget was not recorded before, or that would be the answer; bad
        # credentials say nothing of an earlier attempt.
        refused = failure.refused
        if refused is not None and (isinstance(refused, Refused) or not self._maybe_done):
            raise refused.concerning(self._budget, self._operation_id)
        raise self._unavailable(failure.message, LedgerUnavailable)

    def _unavailable(self, message: str, otherwise: type[Unavailable]) -> Unavailable:
        unknown = self._maybe_done and self._operation_id is not None
        cls = OutcomeUnknown if unknown else otherwise
        return cls(message, budget=self._budget, operation_id=self._operation_id)
