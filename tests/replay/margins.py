"""How much to reserve: margins on a real trace of requests, by what they set aside and what they miss.

The trace tells tokens and no text. So the prompt is counted exactly, as its agent can, except where only its
bytes are known: four for a token, as English and code have. Its requests name no limit; here it is 2,048,
the smallest power of two that none of them needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from peculium.estimators import AdaptiveEstimator
from peculium_server.demo import trace
from peculium_server.demo.prices import MODEL, PRICES
from peculium_server.demo.trace import Request

LIMIT = 2_048
BYTES_PER_TOKEN = 4
COVERAGE = 0.993
"""Of the adaptive estimates that are compared: that of the margin of two, and a little more."""
COVERAGES = (0.95, 0.99, COVERAGE, 0.995)
TOGETHER = 0.987
"""The same of those that cover all sizes together."""
COVERAGES_TOGETHER = (0.95, 0.98, TOGETHER, 0.99, 0.995)
IN_FLIGHT = 32
CAPS = (100, 300, 1_000)
"""In calls of the mean cost."""
STARTS = 8
"""From so many places of the trace on each cap is spent."""

Margin = Callable[[Request], tuple[int, Callable[[int], None]]]
"""What to reserve for a request, and who learns how many tokens it has written."""


def _upper(request: Request, written: int) -> int:
    return PRICES[MODEL].upper(request.context_tokens, written)


def _forgets(_written: int) -> None:
    """Learn nothing."""


def by_bytes() -> Margin:
    """A token for each byte of the prompt, and all that may be written."""

    def reserve(request: Request) -> tuple[int, Callable[[int], None]]:
        most = PRICES[MODEL].upper(request.context_tokens * BYTES_PER_TOKEN, LIMIT)
        return most, _forgets

    return reserve


def by_limit() -> Margin:
    """The prompt counted, and all that may be written."""
    return lambda request: (_upper(request, LIMIT), _forgets)


def twice() -> Margin:
    """Twice what such a call costs with the mean of what was written so far."""
    calls = total = 0

    def reserve(request: Request) -> tuple[int, Callable[[int], None]]:
        mean = total // calls if calls else LIMIT

        def learn(written: int) -> None:
            nonlocal calls, total
            calls, total = calls + 1, total + written

        return 2 * _upper(request, mean), learn

    return reserve


def adaptive(coverage: float, *, alike: bool) -> Margin:
    """The prompt counted, and what the estimator says of the rest."""
    estimator = AdaptiveEstimator(coverage=coverage, alike=alike)

    def reserve(request: Request) -> tuple[int, Callable[[int], None]]:
        estimate = estimator.estimate(
            MODEL,
            limit=_upper(request, LIMIT),
            size=request.context_tokens,
            least=_upper(request, 0),
        )
        return estimate.amount, lambda written: estimator.learn(estimate, _upper(request, written))

    return reserve


@dataclass(frozen=True)
class Outcome:
    """What a margin has come to, on the whole trace."""

    name: str
    over_reservation: float
    """Money reserved for each that was billed."""
    over_reservation_per_call: float
    """The mean over calls of what was reserved for each unit that was billed."""
    coverage: float
    """The share of calls for which it was enough."""
    short: float
    """What calls cost beyond their reservation, as a share of what all cost."""
    capped: list[dict[str, float]]
    """By cap: the share of it that was used when the first call was refused, and the most that it was
    overrun by, as a share of it."""


def _whole(requests: Sequence[Request], margin: Margin) -> tuple[float, float, float, float]:
    reserved = billed = misses = short = 0
    ratios = 0.0
    for request in requests:
        amount, learn = margin(request)
        actual = _upper(request, request.generated_tokens)
        learn(request.generated_tokens)
        reserved += amount
        billed += actual
        misses += actual > amount
        short += max(0, actual - amount)
        ratios += amount / actual
    calls = len(requests)
    return reserved / billed, ratios / calls, 1 - misses / calls, short / billed


def _capped(
    requests: Sequence[Request], margin: Margin, cap: int, first: int
) -> tuple[float, float]:
    """Spend a cap with calls in flight, as a ledger keeps it: the share used, and overrun.

    What was before has been learned from. Whoever is refused ends; calls in flight end as usual.
    """
    for request in requests[:first]:
        margin(request)[1](request.generated_tokens)
    available, billed = cap, 0
    flying: list[tuple[int, Request, Callable[[int], None]]] = []
    for request in requests[first:]:
        if len(flying) == IN_FLIGHT:
            hold, ended, learn = flying.pop(0)
            actual = _upper(ended, ended.generated_tokens)
            learn(ended.generated_tokens)
            available += hold - actual
            billed += actual
        amount, learn = margin(request)
        if amount > available:
            break
        available -= amount
        flying.append((amount, request, learn))
    used = billed + sum(_upper(ended, ended.generated_tokens) for _, ended, _ in flying)
    return min(used, cap) / cap, max(0, used - cap) / cap


def measure(caps: Sequence[int] = CAPS) -> list[Outcome]:
    """All of them."""
    requests = trace.read(None)
    mean = sum(_upper(each, each.generated_tokens) for each in requests) // len(requests)
    margins: dict[str, Callable[[], Margin]] = {
        "static: the prompt's bytes, and the limit": by_bytes,
        "static: the prompt's tokens, and the limit": by_limit,
        "twice the expected cost": twice,
    }
    for coverage in COVERAGES:
        margins[f"adaptive, coverage {coverage:g}"] = functools.partial(
            adaptive, coverage, alike=True
        )
    for coverage in COVERAGES_TOGETHER:
        margins[f"adaptive, of all sizes together, coverage {coverage:g}"] = functools.partial(
            adaptive, coverage, alike=False
        )
    outcomes = []
    for name, make in margins.items():
        over, per_call, covered, short = _whole(requests, make())
        capped = []
        for calls in caps:
            firsts = [500 + number * 900 for number in range(STARTS)]
            spent = [_capped(requests, make(), calls * mean, first) for first in firsts]
            capped.append(
                {
                    "calls": calls,
                    "used": round(sum(used for used, _ in spent) / STARTS, 4),
                    "overrun": round(max(overrun for _, overrun in spent), 5),
                }
            )
        outcomes.append(
            Outcome(
                name,
                round(over, 3),
                round(per_call, 3),
                round(covered, 5),
                round(short, 5),
                capped,
            )
        )
    return outcomes


def told() -> list[dict[str, object]]:
    """As it is kept."""
    return [asdict(outcome) for outcome in measure()]
