"""Who waits for money that this process itself has set aside: pure bookkeeping, without polling.

A reserve that does not fit may wait while holds of this very process could free enough. Whoever came
first is served first; a large request is not overtaken by small ones for ever.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from peculium._requests import Operation
from peculium.v1 import types_pb2

_W = TypeVar("_W")


@dataclass(slots=True)
class _Pool(Generic[_W]):
    """What is known of one budget."""

    holds: dict[bytes, int] = field(default_factory=dict)
    """What this process's live holds have left, by hold id."""
    queue: deque[tuple[int, _W]] = field(default_factory=deque)
    """Amounts and waiters, the first come first."""
    trying: int = 0
    """Waiters that were woken and have no answer yet."""
    ends: int = 0
    """How many holds have ended: a refusal that was sent for before the last end is stale."""


class Waiting(Generic[_W]):
    """This process's holds by budget, and who waits for them."""

    def __init__(self) -> None:
        self._pools: dict[bytes, _Pool[_W]] = {}

    def ends(self, budget_id: bytes) -> int:
        """How many holds of the budget have ended so far, to be compared later."""
        pool = self._pools.get(budget_id)
        return 0 if pool is None else pool.ends

    def may_help(self, budget_id: bytes, missing: int) -> bool:
        """Whether this process's own holds could free as much."""
        pool = self._pools.get(budget_id)
        return pool is not None and (pool.trying > 0 or sum(pool.holds.values()) >= missing)

    def add(self, budget_id: bytes, amount: int, waiter: _W) -> None:
        """Wait for an amount to come free."""
        self._pools[budget_id].queue.append((amount, waiter))

    def remove(self, budget_id: bytes, waiter: _W) -> None:
        """Wait no more."""
        pool = self._pools[budget_id]
        pool.queue = deque(entry for entry in pool.queue if entry[1] is not waiter)

    def tried(self, budget_id: bytes) -> list[_W]:
        """A woken waiter has its answer; who else waits in vain now."""
        pool = self._pools[budget_id]
        pool.trying -= 1
        return self._in_vain(budget_id, pool)

    def observe(
        self, operation: Operation, outcome: types_pb2.Outcome
    ) -> tuple[list[_W], list[_W]]:
        """Take note of an accepted operation; who can try again now, and who waits in vain."""
        if outcome.dry_run:
            return [], []
        if operation.kind == "reserve":
            pool = self._pools.setdefault(operation.budget_id, _Pool())
            pool.holds[operation.hold_id] = outcome.hold.amount
            return [], []
        pool_or_none = self._pools.get(operation.budget_id)
        if pool_or_none is None or operation.hold_id not in pool_or_none.holds:
            return [], []
        return self._freed(pool_or_none, operation, outcome)

    def _freed(
        self, pool: _Pool[_W], operation: Operation, outcome: types_pb2.Outcome
    ) -> tuple[list[_W], list[_W]]:
        if outcome.hold.state == types_pb2.HOLD_STATE_LIVE:
            pool.holds[operation.hold_id] = outcome.hold.remaining
        else:
            del pool.holds[operation.hold_id]
        pool.ends += 1
        available = outcome.balances.available
        woken: list[_W] = []
        while pool.queue and pool.queue[0][0] <= available:
            amount, waiter = pool.queue.popleft()
            available -= amount
            woken.append(waiter)
        pool.trying += len(woken)
        return woken, self._in_vain(operation.budget_id, pool)

    def _in_vain(self, budget_id: bytes, pool: _Pool[_W]) -> list[_W]:
        if pool.holds or pool.trying:
            return []
        given_up = [waiter for _, waiter in pool.queue]
        pool.queue.clear()
        del self._pools[budget_id]
        return given_up
