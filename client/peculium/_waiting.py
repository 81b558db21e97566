"""Who waits for money that this process itself has set aside: pure bookkeeping, without polling.

A reserve that does not fit may wait while holds of this very process could free enough. Whoever came
first is served first; a large request is not overtaken by small ones for ever.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

from peculium._requests import Operation
from peculium.v1 import types_pb2

_W = TypeVar("_W")


@dataclass(slots=True, weakref_slot=True, eq=False)
class Pool(Generic[_W]):
    """What is known of one budget's money in this process."""

    holds: dict[bytes, int] = field(default_factory=dict)
    """What this process's live holds have left, by hold id."""
    queue: deque[tuple[int, _W]] = field(default_factory=deque)
    """Amounts and waiters, the first come first."""
    trying: int = 0
    """Waiters that were woken and have no answer yet."""
    ends: int = 0
    """How often a hold freed money: a refusal that was asked for before the last time is stale."""

    def may_free(self, missing: int) -> bool:
        """Whether this process's own holds could free as much."""
        return self.trying > 0 or sum(self.holds.values()) >= missing

    def remove(self, waiter: _W) -> None:
        """Forget a waiter."""
        self.queue = deque(entry for entry in self.queue if entry[1] is not waiter)


class Waiting(Generic[_W]):
    """This process's holds by budget, and who waits for them."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Pool[_W]] = {}
        """Those with holds."""
        self._asked: WeakValueDictionary[bytes, Pool[_W]] = WeakValueDictionary()
        """Those that somebody else may refer to."""

    def pool(self, budget_id: bytes) -> Pool[_W]:
        """The budget's pool, the same one for as long as anybody refers to it."""
        pool = self._kept.get(budget_id) or self._asked.get(budget_id) or Pool()
        self._asked[budget_id] = pool
        return pool

    def observe(
        self, operation: Operation, outcome: types_pb2.Outcome
    ) -> tuple[list[_W], list[_W]]:
        """Take note of an accepted operation; who can try again now, and who waits in vain."""
        if outcome.dry_run:
            return [], []
        if operation.kind == "reserve":
            pool = self._kept.get(operation.budget_id)
            if pool is None:
                pool = self._asked.get(operation.budget_id) or Pool()
                self._kept[operation.budget_id] = pool
            pool.holds[operation.hold_id] = outcome.hold.amount
            return [], []
        kept = self._kept.get(operation.budget_id)
        if kept is None or operation.hold_id not in kept.holds:
            return [], []
        return self._freed(kept, operation, outcome)

    def forget(self, operation: Operation) -> list[_W]:
        """The hold of an operation is not there any more; who waits in vain now."""
        pool = self._kept.get(operation.budget_id)
        if pool is None or pool.holds.pop(operation.hold_id, None) is None:
            return []
        if not pool.holds:
            del self._kept[operation.budget_id]
        return self._in_vain(pool)

    def tried(self, pool: Pool[_W]) -> list[_W]:
        """A woken waiter has its answer; who else waits in vain now."""
        pool.trying -= 1
        return self._in_vain(pool)

    def _freed(
        self, pool: Pool[_W], operation: Operation, outcome: types_pb2.Outcome
    ) -> tuple[list[_W], list[_W]]:
        if outcome.hold.state == types_pb2.HOLD_STATE_LIVE:
            pool.holds[operation.hold_id] = outcome.hold.remaining
        else:
            del pool.holds[operation.hold_id]
        if not pool.holds:
            del self._kept[operation.budget_id]
        pool.ends += 1
        available = outcome.balances.available
        woken: list[_W] = []
        while pool.queue and pool.queue[0][0] <= available:
            amount, waiter = pool.queue.popleft()
            available -= amount
            woken.append(waiter)
        pool.trying += len(woken)
        return woken, self._in_vain(pool)

    @staticmethod
    def _in_vain(pool: Pool[_W]) -> list[_W]:
        if pool.holds or pool.trying:
            return []
        given_up = [waiter for _, waiter in pool.queue]
        pool.queue.clear()
        return given_up
