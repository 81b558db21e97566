"""The sweeper: does what is due by the database's clock, on every server alike.

It finds holds whose time is over, leases that have ended, and what closings have left to collect,
and sends Lapse, Expire and Collect the way that everyone else's operations go. Any number of servers
may sweep at once: the ids are derived from what is acted on, so that the second one's operation is a
replay, on which it leaves the lane to the first for a while.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

from opentelemetry import metrics

from peculium_server.core import sweeping
from peculium_server.core.batch import Request
from peculium_server.core.limits import SECOND_US
from peculium_server.core.operations import SYSTEM, Collect, Expire, Lapse
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused, id_text
from peculium_server.lanes.answers import Answer, Unanswered, Unavailability
from peculium_server.lanes.lane import COMMIT_OPERATIONS_MAX, COMMIT_ROWS_MAX, DeadlinePassed
from peculium_server.lanes.ledger import Ledger
from peculium_server.lanes.weight import rows
from peculium_server.store.errors import StoreError
from peculium_server.store.store import Due, Store
from peculium_server.telemetry import instruments

ROUND_MAX: Final = 1_024
"""Operations of a kind in one lane and round: bounds what other lanes wait for."""
COLLECTIONS_MAX: Final = 64
"""Closed budgets of one lane that are looked below in one round."""
ANSWER_SECONDS_MAX: Final = 10.0
"""An operation that has no answer by then is left to a later round."""
UNAVAILABLE_SECONDS: Final = 1.0
SET_ASIDE_SECONDS: Final = 60.0
"""After a refusal or failure that should not be, until the same is tried again."""
SET_ASIDE_MAX: Final = 10_000
LAG_SECONDS_MAX: Final = 60.0
"""Who is further behind says so in the log."""

_OVERTAKEN: Final = frozenset({Refusal.HOLD_ENDED, Refusal.NOT_DUE, Refusal.BUDGET_CLOSED})
"""Somebody else was faster: settled the hold, extended it, renewed the lease, closed the budget."""

_logger = logging.getLogger(__name__)

_Operation = Lapse | Expire | Collect


class Kind(StrEnum):
    """What can be due."""

    HOLD = "hold"
    LEASE = "lease"
    COLLECTION = "collection"


class Result(StrEnum):
    """What became of an operation of the sweeper's."""

    DONE = "done"
    REPLAYED = "replayed"
    """Another server has done it."""
    OVERTAKEN = "overtaken"
    """It was not due any more."""
    REFUSED = "refused"
    FAILED = "failed"
    UNANSWERED = "unanswered"


class Swept(NamedTuple):
    """What a round has come to."""

    more: bool
    """It did something, and more of it is waiting."""
    wait_seconds: float
    """The ledger asks not to be asked again before."""


class _NoAnswer(Exception):
    """A lane gives no answer just now; nothing more is sent to it in this round."""

    def __init__(self, wait_seconds: float, *, everywhere: bool) -> None:
        super().__init__(wait_seconds)
        self.wait_seconds = wait_seconds
        self.everywhere = everywhere
        """No other lane will answer either."""


class Sweeper:
    """Sweeps all lanes of an open ledger, and knows how far behind it is."""

    def __init__(
        self, ledger: Ledger, store: Store, meter_provider: metrics.MeterProvider | None = None
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._lag = dict.fromkeys(Kind, 0.0)
        self._late: set[Kind] = set()
        self._pending = 0
        self._set_aside: dict[bytes, float] = {}
        """Until when an operation is not tried again; it stays here until it succeeds."""
        meter = metrics.get_meter(__name__, meter_provider=meter_provider)
        instruments.SWEEPER_LAG.observed(meter, self._observe_lag)
        instruments.SWEEPER_PENDING.observed(meter, self._observe_pending)
        self._operations = instruments.SWEEPER_OPERATIONS.counter(meter)

    async def run(self, seconds: float) -> None:
        """Sweep until cancelled; when nothing is left to do, look again after so many seconds."""
        answers = True
        while True:
            wait = seconds
            try:
                swept = await self.round()
                wait = swept.wait_seconds or (0.0 if swept.more else seconds)
                answers = True
            except StoreError as error:
                wait = max(seconds, UNAVAILABLE_SECONDS)
                if answers:
                    _logger.warning("nothing is swept: %s", error)
                answers = False
            except Exception:
                wait = max(seconds, UNAVAILABLE_SECONDS)
                _logger.exception("a round of the sweeper has failed")
            # Never two servers' the same.
            await asyncio.sleep(wait * (0.75 + secrets.randbelow(1024) / 2048))

    async def round(self) -> Swept:
        """Do some of what is due in each lane.

        Raises:
            StoreError: The database does not say what is due.
        """
        due = await self._store.due()
        self._measure(due)
        more, wait_seconds = False, 0.0
        first = secrets.randbelow(len(due))
        for lane in [*range(first, len(due)), *range(first)]:
            try:
                more |= await self._sweep(lane, due[lane])
            except _NoAnswer as none:
                wait_seconds = max(wait_seconds, none.wait_seconds)
                if none.everywhere:
                    break
        return Swept(more, wait_seconds)

    # -- One lane -----------------------------------------------------------------------------------

    async def _sweep(self, lane: int, due: Due) -> bool:
        """Do some of what is due in a lane, and say whether more is waiting."""
        more = False
        if due.hold is not None and due.hold <= due.now:
            holds = await self._store.due_holds(lane, limit=self._limit())
            lapses = [sweeping.lapse(*hold) for hold in holds]
            more |= await self._send(Kind.HOLD, lapses) > 0 and len(holds) >= ROUND_MAX
        if due.lease is not None and due.lease <= due.now:
            leases = await self._store.due_leases(lane, limit=self._limit())
            expires = [sweeping.expire(*budget) for budget in leases]
            more |= await self._send(Kind.LEASE, expires) > 0 and len(leases) >= ROUND_MAX
        if due.collections:
            more |= await self._collect(lane)
        return more

    async def _collect(self, lane: int) -> bool:
        more = False
        limit = COLLECTIONS_MAX + len(self._set_aside)
        for top in await self._store.collections(lane, limit=limit):
            below = await self._store.to_collect(top, limit=self._limit())
            if not below:
                await self._store.end_collection(top)
                more = True
                continue
            collects = [sweeping.collect(top.root_id, budget_id) for budget_id in below]
            more |= await self._send(Kind.COLLECTION, collects) > 0
        return more

    def _limit(self) -> int:
        """How much to ask for: what was set aside is among the first that is found."""
        return ROUND_MAX + len(self._set_aside)

    async def _send(self, kind: Kind, operations: Iterable[_Operation]) -> int:
        """Send operations of one lane a transaction at a time, and say how many were done.

        Each is a request of its own, so that one which fails takes no other with it. When a batch
        does nothing new, another server is at it, and the rest is left to that.
        """
        now = asyncio.get_running_loop().time()
        waiting = [each for each in operations if self._set_aside.get(each.operation_id, 0) <= now]
        done = 0
        for batch in _batches(waiting):
            deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS_MAX
            answers = await asyncio.gather(
                *(self._ledger.execute([Request(each, SYSTEM, 0)], deadline) for each in batch),
                return_exceptions=True,
            )
            new = self._take(kind, batch, answers)
            done += new
            if not new:
                break
        return done

    def _take(
        self,
        kind: Kind,
        batch: Sequence[_Operation],
        answers: Sequence[list[Answer] | BaseException],
    ) -> int:
        """Say how many operations were done.

        Raises:
            _NoAnswer: Some have none.
        """
        results: Counter[Result] = Counter()
        unanswered: Unanswered | None = None
        for operation, answer in zip(batch, answers, strict=True):
            result = answer if isinstance(answer, BaseException) else answer[0].result
            match result:
                case Outcome():
                    self._set_aside.pop(operation.operation_id, None)
                    results[Result.REPLAYED if result.replayed else Result.DONE] += 1
                case Refused() if result.reason in _OVERTAKEN:
                    results[Result.OVERTAKEN] += 1
                case Refused():
                    results[Result.REFUSED] += 1
                    self._put_aside(operation, result.message)
                case Unanswered():
                    results[Result.UNANSWERED] += 1
                    unanswered = result
                case DeadlinePassed():
                    results[Result.UNANSWERED] += 1
                    unanswered = Unanswered(Unavailability.CONTENDED, {}, 0)
                case _:
                    results[Result.FAILED] += 1
                    self._put_aside(operation, f"{type(result).__name__}: {result}")
        for each, count in results.items():
            self._operations.add(count, {"kind": kind.value, "outcome": each.value})
        if unanswered is not None:
            raise _NoAnswer(
                unanswered.retry_delay_ms / 1_000,
                everywhere=unanswered.reason
                in (Unavailability.DATABASE_UNAVAILABLE, Unavailability.DRAINING),
            )
        return results[Result.DONE]

    def _put_aside(self, operation: _Operation, problem: str) -> None:
        """Let those behind it come first; log it when it fails for the first time."""
        if operation.operation_id not in self._set_aside:
            _logger.error(
                "%s of %s in %s cannot be done: %s",
                operation.kind.name,
                id_text(operation.hold_id if isinstance(operation, Lapse) else operation.budget_id),
                id_text(operation.root_id),
                problem,
            )
        if len(self._set_aside) >= SET_ASIDE_MAX:
            del self._set_aside[next(iter(self._set_aside))]
        until = asyncio.get_running_loop().time() + SET_ASIDE_SECONDS
        self._set_aside[operation.operation_id] = until

    # -- How far behind it is -------------------------------------------------------------------------

    def _measure(self, due: Sequence[Due]) -> None:
        self._pending = sum(lane.collections for lane in due)
        for kind in Kind:
            lag = max(max(0, lane.now - (getattr(lane, kind) or lane.now)) for lane in due)
            self._lag[kind] = lag / SECOND_US
            if (self._lag[kind] > LAG_SECONDS_MAX) is (kind in self._late):
                continue
            if kind in self._late:
                self._late.remove(kind)
                _logger.warning("the sweeper has caught up: no %s is overdue for long", kind)
            else:
                self._late.add(kind)
                _logger.warning(
                    "the sweeper is behind: a %s has been due for %.0f s", kind, self._lag[kind]
                )

    def _observe_lag(self, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for kind, lag in self._lag.items():
            yield metrics.Observation(lag, {"kind": kind.value})

    def _observe_pending(self, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        yield metrics.Observation(self._pending)


def _batches(operations: Iterable[_Operation]) -> Iterator[Sequence[_Operation]]:
    """Cut operations into what one transaction holds each."""
    batch: list[_Operation] = []
    size = 0
    for operation in operations:
        own = rows([operation])
        if batch and (len(batch) == COMMIT_OPERATIONS_MAX or size + own > COMMIT_ROWS_MAX):
            yield batch
            batch, size = [], 0
        batch.append(operation)
        size += own
    if batch:
        yield batch
