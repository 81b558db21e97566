"""How much a call will need, learned from the calls before it: less than its limit, seldom too little.

A reservation of all that a call may use never fails, and sets aside many times what most calls use.
An estimator learns from calls whose use is known, and says how much was enough for a stated share
of them.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field

from peculium.errors import Malformed

_MILLION = 1_000_000
_COVERAGE_LEAST = 0.5
_WINDOW_LEAST = 10
_CREDIT_AT_FIRST = 4 * _MILLION
_CREDIT_MOST = 2 * _CREDIT_AT_FIRST
_MISSABLE_MOST = _MILLION // 2
"""However much credit there is, the median at least is estimated."""

_ABOVE_LEAST = 4
"""Calls of about one size are enough to go by if so many of them would exceed their quantile: few more than
it takes would tell more of chance than of size."""

_ROOT_BITS = 20
"""Of square roots, that are kept behind the point."""

MISSES_AHEAD = 5
"""How many misses there may be beyond the share that `coverage` leaves, whatever the calls do: those
that an estimator begins with, and the one that uses the credit up."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What to reserve for one call. Give it back to `learn` when it is known what the call used.

    Attributes:
        model: Whose call it is.
        size: How large the request is, in any measure.
        limit: The most that the call can use.
        amount: What is expected to be enough, at most the limit.
        least: What it uses in any case.
    """

    model: str
    size: int
    limit: int
    amount: int
    least: int = 0

    @property
    def learned(self) -> bool:
        """Whether it is less than the limit, so that it may be too little."""
        return self.amount < self.limit


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well a model's estimates have done.

    Attributes:
        calls: That were learned from.
        misses: Of them, those that used more than was estimated.
        credit: How many misses may come before only limits are given.
    """

    calls: int
    misses: int
    credit: float

    @property
    def coverage(self) -> float:
        """The share of calls for which the estimate was enough; 1.0 before the first."""
        return 1.0 - self.misses / self.calls if self.calls else 1.0


class AdaptiveEstimator:
    """Estimates that are enough for a stated share of calls, by what the calls before them used.

    Per model, requests of about the same size and limit are compared with each other: the estimate
    is the quantile of what the last of them used, taken so that it covers a further one of the same
    kind with the chance `coverage` (conformal prediction). Where too few are known, those of the
    model with about the same limit are taken, and where those are too few, the limit itself.

    So each size is covered alike, and a small call, which costs next to nothing, is set aside many
    times what it uses. With `alike=False` the share is that of all calls of a model together: what a
    call uses beyond its least is compared in proportion to the square root of what such a call is
    expected to use. So misses are where holds would be largest for what calls use, in small ones, and
    in the mean over calls less is set aside for each unit that is used.

    Calls may change their nature at any time, even against the estimator. So misses have a budget,
    too: each call earns the share of a miss that `coverage` leaves, each miss costs one, and without
    credit the estimate is the limit, which cannot be missed. Of any n calls of a model, one after the
    other, fewer than (1 - coverage) x n + `MISSES_AHEAD` are missed, whatever they do; with several
    in flight at once, at most as many more. With more credit than at first it dares more, with less,
    less.

    It may be used by many threads and tasks. It keeps nothing when the process ends: the next one
    begins with limits.

    Args:
        coverage: The share of calls for which the estimate shall be enough, from 0.5 to 0.9999.
        window: How many of the last calls of a kind are remembered. A coverage needs at least
            1 / (1 - coverage) of them.
        alike: Whether requests of every size are covered alike.

    Raises:
        Malformed: The coverage is out of its range, or the window too short for it.
    """

    def __init__(self, *, coverage: float = 0.99, window: int = 2_000, alike: bool = True) -> None:
        if not _COVERAGE_LEAST <= coverage <= 1 - 1e-4:
            raise _malformed("coverage", f"must be from 0.5 to 0.9999, not {coverage!r}")
        self._missable = round((1 - coverage) * _MILLION)
        """The share of calls that may be missed, in millionths."""
        if window < max(_WINDOW_LEAST, -(-_MILLION // self._missable)):
            raise _malformed(
                "window", f"{window!r} calls are too few for a coverage of {coverage!r}"
            )
        self._coverage = coverage
        self._window = window
        self._alike = alike
        self._lock = threading.Lock()
        self._models: dict[str, _Model] = {}

    @property
    def coverage(self) -> float:
        """The share of calls for which the estimate shall be enough."""
        return self._coverage

    def estimate(self, model: str, *, limit: int, size: int = 0, least: int = 0) -> Estimate:
        """Say how much to reserve for a call.

        Args:
            model: Calls of different models are not compared. Any name will do, also one for each
                kind of request.
            limit: The most that the call can use, for example the `max_tokens` sent with it, times
                their price. The estimate never exceeds it.
            size: How large the request is, in any measure, for example the tokens of its prompt.
            least: What the call uses in any case, for example the price of a prompt that was counted:
                it is part of the limit, and only the rest is estimated.

        Raises:
            Malformed: One of them is negative or no int, or the least exceeds the limit.
        """
        _count("limit", limit)
        _count("size", size)
        _count("least", least)
        if least > limit:
            raise _malformed("least", f"{least!r} exceeds the limit of {limit!r}")
        with self._lock:
            known = self._models.get(model)
            enough = None if known is None else self._enough(known, limit - least, size, least)
        amount = limit if enough is None else min(least + enough, limit)
        return Estimate(model, size, limit, amount, least)

    def learn(self, estimate: Estimate, actual: int) -> None:
        """Learn what a call has used. Calls of which that is not known are not to be learned from.

        Args:
            estimate: What was estimated for it.
            actual: What it has used, in the unit of the limit. More than the limit is possible if
                the limit was none, and less than the least if that was none.

        Raises:
            Malformed: The actual use is negative or no int.
        """
        _count("actual", actual)
        with self._lock:
            model = self._models.setdefault(estimate.model, _Model())
            model.calls += 1
            model.credit += self._missable
            if actual > estimate.amount:
                model.misses += 1
                model.credit -= _MILLION
            model.credit = min(model.credit, _CREDIT_MOST)
            rest = max(0, actual - estimate.least)
            kinds = _kinds(estimate.limit - estimate.least, estimate.size)
            if self._alike:
                for kind in kinds:
                    model.kinds.setdefault(kind, _Uses(self._window)).add(rest)
            else:
                model.kinds.setdefault(kinds[-1], _Uses(self._window)).add_beside(
                    estimate.least, rest
                )

    def calibration(self, model: str) -> Calibration:
        """How well the estimates of a model have done so far."""
        with self._lock:
            known = self._models.get(model) or _Model()
            return Calibration(known.calls, known.misses, known.credit / _MILLION)

    def _enough(self, model: _Model, open_: int, size: int, least: int) -> int | None:
        if model.credit <= 0:
            return None
        missable = min(self._missable * model.credit // _CREDIT_AT_FIRST, _MISSABLE_MOST)
        kinds = _kinds(open_, size)
        if not self._alike:
            uses = model.kinds.get(kinds[-1])
            return None if uses is None else uses.enough_beside(missable, least)
        for kind, above in zip(kinds, (_ABOVE_LEAST, 1), strict=True):
            uses = model.kinds.get(kind)
            enough = None if uses is None else uses.enough(missable, above)
            if enough is not None:
                return enough
        return None


@dataclass(slots=True)
class _Model:
    """What is known of a model's calls."""

    calls: int = 0
    misses: int = 0
    credit: int = _CREDIT_AT_FIRST
    """In millionths of a miss."""
    kinds: dict[tuple[int, ...], _Uses] = field(default_factory=dict)


class _Uses:
    """What the last calls of a kind have used, in order of time and of size."""

    def __init__(self, window: int) -> None:
        self._recent: deque[tuple[int, int]] = deque(maxlen=window)
        self._sorted: list[int] = []
        self._total = 0

    def add(self, actual: int) -> None:
        """Remember one, and forget the oldest if there are too many."""
        self._add(actual, actual)

    def add_beside(self, least: int, actual: int) -> None:
        """The same, of one that used so much besides, for what it was expected to use."""
        expected = least + (self._total + actual) // (len(self._sorted) + 1)
        self._add(actual, -(-(actual << 2 * _ROOT_BITS) // _root(expected)))

    def _add(self, actual: int, sorted_by: int) -> None:
        if len(self._recent) == self._recent.maxlen:
            used, oldest = self._recent[0]
            del self._sorted[bisect_left(self._sorted, oldest)]
            self._total -= used
        self._recent.append((actual, sorted_by))
        insort(self._sorted, sorted_by)
        self._total += actual

    def enough(self, missable: int, least: int) -> int | None:
        """What is enough for a further one, but for so many millionths.

        None: so few are known that fewer than `least` of them would exceed it.
        """
        known = len(self._sorted)
        above = (known + 1) * missable // _MILLION
        return self._sorted[known - above] if above >= least else None

    def enough_beside(self, missable: int, least: int) -> int | None:
        """The same for one that uses so much besides, for what it is expected to use."""
        enough = self.enough(missable, 1)
        if enough is None:
            return None
        expected = least + self._total // len(self._sorted)
        return -(-enough * _root(expected) >> 2 * _ROOT_BITS)


def _root(expected: int) -> int:
    """The square root, in 2^-`_ROOT_BITS`."""
    return math.isqrt(max(1, expected) << 2 * _ROOT_BITS)


def _kinds(open_: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Which calls are compared with such a one, the most similar ones first: within powers of two."""
    return (open_.bit_length(), size.bit_length()), (open_.bit_length(),)


def _count(field_: str, value: int) -> None:
    if type(value) is not int or value < 0:
        raise _malformed(field_, f"must be an int of at least 0, not {value!r}")


def _malformed(field_: str, problem: str) -> Malformed:
    return Malformed(f"{field_}: {problem}", facts={"field": field_, "problem": problem})
