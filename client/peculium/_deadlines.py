"""Until when callers wait: one timer for all, since nearly every answer comes long before.

Pure: it sets no timer itself, it says when to look.
"""

from __future__ import annotations

import heapq
import itertools
import math

from peculium._coalescer import Ticket

_STALE_MIN = 64
"""So many entries of tickets that nobody waits for any more may always lie about."""


class Deadlines:
    """The deadlines of tickets that somebody waits for."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Ticket]] = []
        self._order = itertools.count()
        self._waiting = 0

    def add(self, ticket: Ticket) -> float:
        """Somebody waits for a ticket; its deadline."""
        self._waiting += 1
        if len(self._heap) > 2 * self._waiting + _STALE_MIN:
            self._heap = [entry for entry in self._heap if _is_awaited(entry)]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (ticket.deadline, next(self._order), ticket))
        return ticket.deadline

    def leave(self) -> None:
        """Somebody waits no more: the ticket's future is done."""
        self._waiting -= 1

    def due(self, now: float) -> list[Ticket]:
        """The tickets whose time is over."""
        found = []
        while self._heap and (self._heap[0][0] <= now or not _is_awaited(self._heap[0])):
            entry = heapq.heappop(self._heap)
            if _is_awaited(entry):
                found.append(entry[2])
        return found

    def next(self) -> float:
        """When to look again."""
        return self._heap[0][0] if self._heap else math.inf


def _is_awaited(entry: tuple[float, int, Ticket]) -> bool:
    deadline, _, ticket = entry
    # Whoever waits for it once more has a later deadline.
    return ticket.awaited and ticket.deadline == deadline
