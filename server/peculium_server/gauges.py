"""What is counted in the database for those who collect metrics, in the background and seldom.

Only where metrics are exported. Every server tells the same of the ledger, so that whoever adds servers up
takes the highest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Final

from peculium_server.core.limits import SECOND_US
from peculium_server.core.state import HoldState
from peculium_server.store.errors import StoreError
from peculium_server.store.store import Store
from peculium_server.store.waiting import Waiting
from peculium_server.telemetry import instruments
from peculium_server.telemetry.instruments import Instrument
from peculium_server.telemetry.meters import Meters

LOOK_SECONDS: Final = 5.0
"""Between two looks; collectors come more seldom."""
IDLE_SHARE: Final = 20
"""So many times as long as a look took it takes until the next one at least."""

_logger = logging.getLogger(__name__)


class Gauges:
    """Looks now and then how many holds there are, what some roots have, and what waits of the alerts."""

    def __init__(self, store: Store, meters: Meters, roots: Sequence[str] = ()) -> None:
        """Begin with nothing known.

        Args:
            store: The ledger's.
            meters: Tell what was found.
            roots: The names of roots whose balances are told. One that there is not is left out.
        """
        self._store = store
        self._roots = roots
        self._holds: Mapping[str, int] = {}
        self._balances: Mapping[str, Mapping[str, int]] = {}
        self._waiting: Mapping[Instrument, float] = {}
        meters.watch_holds(lambda: self._holds)
        meters.watch_roots(lambda: self._balances)
        meters.watch_alerts(lambda: self._waiting)

    async def run(self) -> None:
        """Look until cancelled."""
        answers, clock = True, asyncio.get_running_loop().time
        # The first look connects and plans, too, which says nothing of the others.
        share = 0
        while True:
            begun = clock()
            try:
                await self.look()
                answers = True
            except StoreError as error:
                # Nothing is told, rather than what was so before.
                self._holds, self._balances, self._waiting = {}, {}, {}
                if answers:
                    _logger.warning("holds, balances and alerts are not counted: %s", error)
                answers = False
            except Exception:
                _logger.exception("counting holds, balances and alerts has failed")
            await asyncio.sleep(max(LOOK_SECONDS, share * (clock() - begun)))
            share = IDLE_SHARE

    async def look(self) -> None:
        """Find out how it is now.

        Raises:
            StoreError: The database does not say.
        """
        self._waiting = _of_alerts(await self._store.alerting.waiting())
        live, lapsed = await self._store.open_holds()
        self._holds = {HoldState.LIVE.name.lower(): live, HoldState.LAPSED.name.lower(): lapsed}
        self._balances = {
            name: money for name in self._roots if (money := await self._money(name)) is not None
        }

    async def _money(self, name: str) -> Mapping[str, int] | None:
        found = await self._store.find(name)
        if found is None:
            return None
        budget, *_ = await self._store.budget(*found)
        return budget.money._asdict()


def _of_alerts(waiting: Waiting) -> dict[Instrument, float]:
    def seconds(since: int | None) -> float:
        return 0.0 if since is None else max(0, waiting.now - since) / SECOND_US

    return {
        instruments.ALERTER_LAG: seconds(waiting.since),
        instruments.ALERTER_DUE: waiting.due,
        instruments.OUTBOX_DEPTH: waiting.deliveries,
        instruments.OUTBOX_AGE: seconds(waiting.oldest),
    }
