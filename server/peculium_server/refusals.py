"""Counts refusals by budget, reason and minute, and adds them up in the database now and then.

So there is an answer to "why was it stopped at 14:03?", and a storm of refusals still writes nothing when it
happens. Counts are kept in memory for some seconds: a server that is killed takes the last of them with it.
An addition whose answer was lost is made again, so that in a failover some may count twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from peculium_server.core.limits import ID_BYTES, SECOND_US
from peculium_server.core.refusals import Refusal
from peculium_server.store.errors import StoreError
from peculium_server.store.refusals import NOBODY, Key
from peculium_server.store.store import Store
from peculium_server.telemetry.meters import Meters

FLUSH_SECONDS: Final = 5.0
"""Between two additions."""
KEYS_MAX: Final = 256
"""Budgets and reasons that a server tells apart within a minute; the others are told by reason only."""
UNPROVEN_MAX: Final = 64
"""Of them, those whose caller has not shown a right to the budget, and may have made it up."""
MINUTES_MAX: Final = 60
"""That are kept while the database takes nothing; then the earliest are dropped."""

_MINUTE_US: Final = 60 * SECOND_US
_DAY_US: Final = 24 * 60 * _MINUTE_US
_FORGET_EVERY: Final = 120
"""Additions between two looks for what is too old."""

_logger = logging.getLogger(__name__)


class RefusalCounts:
    """What was refused since the last addition, and how it gets to the database."""

    def __init__(self, store: Store, days: int, meters: Meters | None = None) -> None:
        """Begin with nothing counted.

        Args:
            store: The ledger's.
            days: After so many rows are forgotten.
            meters: Tell how many refusals could not be told apart.
        """
        self._store = store
        self._days = days
        self._ahead_us = 0
        """How far the database's clock is ahead of this process's own."""
        self._counts: dict[Key, int] = {}
        self._minute = 0
        self._told_apart: set[tuple[bytes, bytes, Refusal]] = set()
        """Within the current minute."""
        self._unproven = 0
        self._unattributed = 0
        if meters is not None:
            meters.watch_unattributed(lambda: self._unattributed)

    def count(self, root_id: bytes, budget_id: bytes, reason: Refusal) -> None:
        """A budget was refused something, just now."""
        now = self._now()
        minute = now - now % _MINUTE_US
        if minute != self._minute:
            self._minute, self._unproven = minute, 0
            self._told_apart.clear()
        if not len(root_id) == len(budget_id) == ID_BYTES:
            # Not the ids of anything, and maybe something that is to be kept to nobody.
            root_id = budget_id = NOBODY
        apart = root_id, budget_id, reason
        if apart not in self._told_apart:
            if not self._is_room(reason):
                self._unattributed += 1
                root_id = budget_id = NOBODY
            else:
                self._told_apart.add(apart)
        key = Key(minute, root_id, budget_id, reason.name)
        self._counts[key] = self._counts.get(key, 0) + 1

    def _is_room(self, reason: Refusal) -> bool:
        if len(self._told_apart) >= KEYS_MAX:
            return False
        if reason > Refusal.BUDGET_UNKNOWN:
            return True
        if self._unproven >= UNPROVEN_MAX:
            return False
        self._unproven += 1
        return True

    def _now(self) -> int:
        return time.monotonic_ns() // 1_000 + self._ahead_us

    async def learn_time(self) -> None:
        """Find out what time it is for the database, before anything is counted.

        Raises:
            StoreError: The database does not say.
        """
        self._ahead_us = await self._store.refusals.now() - time.monotonic_ns() // 1_000

    async def run(self, seconds: float = FLUSH_SECONDS) -> None:
        """Add up until cancelled."""
        answers, additions = True, 0
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.add_up()
                if additions % _FORGET_EVERY == 0:
                    await self._store.refusals.forget(self._now() - self._days * _DAY_US)
                additions += 1
                answers = True
            except StoreError as error:
                if answers:
                    _logger.warning("refusals are not added up: %s", error)
                answers = False
            except Exception:
                _logger.exception("adding up refusals has failed")

    async def end(self, seconds: float) -> None:
        """Add up the last of it, if that is possible within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self.add_up()
        except StoreError as error:
            _logger.warning("the last refusals were not added up: %s", error)
        except TimeoutError:
            _logger.warning("the last refusals were not added up: the database did not answer")

    async def add_up(self) -> None:
        """Add what was counted to what the database has.

        Raises:
            StoreError: It was not done, or it is unknown whether it was: it will be tried again.
        """
        await self.learn_time()
        counts, self._counts = self._counts, {}
        if not counts:
            return
        try:
            await self._store.refusals.add(list(counts.items()))
        except BaseException:
            self._take_back(counts)
            raise

    def _take_back(self, counts: dict[Key, int]) -> None:
        for key, number in counts.items():
            self._counts[key] = self._counts.get(key, 0) + number
        minutes = sorted({key.minute for key in self._counts})
        if len(minutes) > MINUTES_MAX:
            earliest = minutes[-MINUTES_MAX]
            self._counts = {k: n for k, n in self._counts.items() if k.minute >= earliest}
