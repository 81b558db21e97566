"""The sealer: seals what was recorded since the last checkpoint, on every server that has a key.

It works behind the operations and never in their way: it looks at committed entries only, which do not
change any more, a bounded number of them at a time, and writes to tables that no operation touches. Any
number of servers may seal: of those that make the same checkpoint one succeeds, and the others leave it
at that.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, auto
from itertools import chain
from typing import Final

from opentelemetry import metrics

from peculium_server.core.checkpoint import Leaf, Sealed
from peculium_server.core.limits import SECOND_US
from peculium_server.core.merkle import Growing
from peculium_server.core.sealing import sealed_after, shares
from peculium_server.signing import SigningKey
from peculium_server.store.errors import StoreError
from peculium_server.store.seals import Unsealed
from peculium_server.store.store import Store
from peculium_server.telemetry import instruments

OPERATIONS_MAX: Final = 16_384
"""Operations that one checkpoint seals; more of them are sealed by the next one, at once."""
ENTRIES_EXTRA: Final = 1_024
"""So many entries more than twice its operations are looked at in a lane: most have one or two, and some
have hundreds. What is beyond is left to the next checkpoint."""
_HASHES_AT_A_TIME: Final = 512
"""Leaves that are hashed before other calls get their turn: a millisecond or two."""
UNAVAILABLE_SECONDS: Final = 5.0
LAG_SECONDS_MAX: Final = 600.0
"""Who is further behind says so in the log, or what is sealed anyhow."""

_logger = logging.getLogger(__name__)


class Round(Enum):
    """What a round has come to."""

    SEALED = auto()
    MORE = auto()
    """It has sealed as much as it may at once, and more is waiting."""
    OVERTAKEN = auto()
    """Another server was faster."""
    NOTHING = auto()
    """Everything is sealed, or was a short time ago."""


class Sealer:
    """Seals an open ledger with one key, and knows how far behind that is."""

    def __init__(
        self,
        store: Store,
        key: SigningKey,
        seconds: float,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        """Begin with nothing known.

        Args:
            store: The ledger's.
            key: Signs the checkpoints.
            seconds: Between two checkpoints, whichever servers make them.
            meter_provider: Of the process, if not given.
        """
        self._store = store
        self._key = key
        self._seconds = seconds
        self._unsealed: Unsealed | None = None
        self._looked_at = 0.0
        self._late = False
        self._stuck: frozenset[int] = frozenset()
        """Lanes that lack operations which they have counted: nothing behind those is sealed."""
        meter = metrics.get_meter(__name__, meter_provider=meter_provider)
        instruments.CHECKPOINT_LAG.observed(meter, self._observe_lag)
        instruments.CHECKPOINT_UNSEALED.observed(meter, self._observe_unsealed)
        self._rounds = instruments.CHECKPOINT_ROUNDS.counter(meter)

    async def run(self) -> None:
        """Seal until cancelled."""
        answers = True
        while True:
            wait = self._seconds
            try:
                if await self.round() is Round.MORE:
                    wait = 0.0
                answers = True
            except StoreError as error:
                wait = max(wait, UNAVAILABLE_SECONDS)
                if answers:
                    _logger.warning("nothing is sealed: %s", error)
                answers = False
            except Exception:
                wait = max(wait, UNAVAILABLE_SECONDS)
                _logger.exception("a round of the sealer has failed")
            # Never two servers' the same.
            await asyncio.sleep(wait * (0.75 + secrets.randbelow(1024) / 2048))

    async def round(self) -> Round:
        """Seal what was recorded since the last checkpoint, unless that was a moment ago.

        Raises:
            StoreError: The database does not say what there is, or does not take a checkpoint.
        """
        unsealed = await self._store.seals.unsealed()
        self._measure(unsealed)
        outcome = await self._seal(unsealed)
        self._rounds.add(1, {"outcome": outcome.name.lower()})
        if outcome is Round.SEALED:
            self._measure(await self._store.seals.unsealed())
        return outcome

    async def _seal(self, unsealed: Unsealed) -> Round:
        waiting = sum(unsealed.waiting)
        last = unsealed.last
        if last is not None and waiting <= OPERATIONS_MAX:
            # Of several servers one is enough; half the time, since each of them waits for another one.
            age = (unsealed.now - last.checkpoint.sealed_at) / SECOND_US
            if 0 <= age < self._seconds / 2:
                return Round.NOTHING
        positions, leaves = await self._moved(unsealed)
        if not leaves:
            return Round.NOTHING
        root = await _merkle_root(leaves)

        def seal(now: int) -> Sealed:
            return sealed_after(
                last,
                now=now,
                incarnation=self._store.incarnation,
                positions=positions,
                merkle_root=root,
                leaves=sum(map(len, leaves.values())),
                key_id=self._key.key_id,
                sign=self._key.sign,
            )

        if await self._store.seals.add(last, seal, self._key.public_key, leaves) is None:
            return Round.OVERTAKEN
        more = any(
            position < unsealed.positions[lane]
            for lane, position in enumerate(positions)
            if lane not in self._stuck
        )
        return Round.MORE if more else Round.SEALED

    async def _moved(self, unsealed: Unsealed) -> tuple[Sequence[int], Mapping[int, list[Leaf]]]:
        """Up to where each lane is to be sealed, and the heads that moved since, by lane."""
        positions = list(unsealed.sealed)
        leaves: dict[int, list[Leaf]] = {}
        stuck = {lane for lane, now in enumerate(unsealed.positions) if now < positions[lane]}
        for lane, share in enumerate(shares(unsealed.waiting, OPERATIONS_MAX)):
            if not share:
                continue
            after = positions[lane]
            until = await self._whole(lane, after, after + share)
            if until is None:
                stuck.add(lane)
                continue
            leaves[lane] = await self._store.seals.heads(lane, after=after, until=until)
            positions[lane] = until
        self._tell_stuck(frozenset(stuck))
        return positions, leaves

    async def _whole(self, lane: int, after: int, until: int) -> int | None:
        """Up to where a lane's operations can be sealed at once; None if some of them are missing."""
        limit = 2 * (until - after) + ENTRIES_EXTRA
        covered = await self._store.seals.covered(lane, after=after, until=until, limit=limit)
        if covered.rows == limit:
            until = covered.until or after
        counted = until - after
        whole = covered.until == until and covered.positions == covered.operations == counted
        return until if whole else None

    # -- How far behind it is -------------------------------------------------------------------------

    def _tell_stuck(self, stuck: frozenset[int]) -> None:
        for lane in sorted(stuck - self._stuck):
            _logger.error(
                "lane %d is not sealed any further: it lacks entries that it has counted, or has more;"
                " verify the ledger",
                lane,
            )
        self._stuck = stuck

    def _measure(self, unsealed: Unsealed) -> None:
        self._unsealed, self._looked_at = unsealed, time.monotonic()
        lag = self._lag()
        if (lag > LAG_SECONDS_MAX + 2 * self._seconds) is self._late:
            return
        self._late = not self._late
        if self._late:
            _logger.warning("sealing is behind: an operation was not sealed for %.0f s", lag)
        else:
            _logger.warning("sealing has caught up")

    def _lag(self) -> float:
        """Grows by itself while nothing is found out."""
        unsealed = self._unsealed
        if unsealed is None or unsealed.since is None:
            return 0.0
        lag = max(0, unsealed.now - unsealed.since) / SECOND_US
        return lag + time.monotonic() - self._looked_at

    def _observe_lag(self, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        yield metrics.Observation(self._lag())

    def _observe_unsealed(self, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        yield metrics.Observation(0 if self._unsealed is None else sum(self._unsealed.waiting))


async def _merkle_root(leaves: Mapping[int, Sequence[Leaf]]) -> bytes:
    """The root over the leaves of all lanes, in order of their ids."""
    growing = Growing()
    for leaf in sorted(chain.from_iterable(leaves.values())):
        growing.add(leaf.hash())
        if growing.leaves % _HASHES_AT_A_TIME == 0:
            await asyncio.sleep(0)
    return growing.root()
