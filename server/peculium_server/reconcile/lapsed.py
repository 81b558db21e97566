"""Billed calls that nothing explains, and lapsed holds that nobody settled: which fits which."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from peculium_server.core.state import HoldState
from peculium_server.reconcile.calls import Call


class Unexplained(NamedTuple):
    """A billed call that the ledger does not know."""

    at: int | None
    """Microseconds since the Unix epoch; None if the bill does not say more than the day."""
    amount: int
    model: str


def fitting(lines: Sequence[Unexplained], lapsed: Sequence[Call]) -> list[Call | None]:
    """For each line the one lapsed hold that it fits, if there is one, and no other line fits that.

    A line fits a hold if the call was made between its reservation and its lapse, cost no more than
    was reserved, and was of the same model where both say which. One that was resolved after its
    lapse fits what it was resolved to, so that what was booked once is not looked for again.
    """
    holds = sorted(lapsed, key=lambda call: call.created_at)
    begins = [call.created_at for call in holds]
    longest = max((call.at - call.created_at for call in holds), default=0)
    fits = [_candidates(line, holds, begins, longest) for line in lines]
    wanted = Counter(id(call) for calls in fits for call in calls)
    return [calls[0] if len(calls) == 1 and wanted[id(calls[0])] == 1 else None for calls in fits]


def _candidates(
    line: Unexplained, holds: Sequence[Call], begins: Sequence[int], longest: int
) -> list[Call]:
    """Holds that a line fits; of many, two."""
    found: list[Call] = []
    if line.at is None:
        return found
    for index in range(bisect_right(begins, line.at) - 1, -1, -1):
        call = holds[index]
        if call.created_at < line.at - longest or len(found) > 1:
            break
        in_time = line.at <= call.at
        same_model = not (line.model and call.model) or line.model == call.model
        is_lapsed = call.state is HoldState.LAPSED
        affordable = line.amount <= call.reserved if is_lapsed else line.amount == call.booked
        if in_time and same_model and affordable:
            found.append(call)
    return found
