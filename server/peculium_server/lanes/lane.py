"""Group commit: whatever waits when a lane becomes free is one transaction.

No timer decides how many that are: alone, an operation waits for nothing; under load, those that came
during the last commit share the next one, with those that come as fast as the event loop turns. While one is
on its way to the database, the next may be decided, once enough waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import Context
from typing import Final, NamedTuple, Protocol

from opentelemetry.trace import Span

from peculium_server.core.batch import (
    Left,
    Request,
    decide_atomic,
    decide_group,
    with_carried,
)
from peculium_server.core.footprint import Footprint
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refused
from peculium_server.core.state import Accepted
from peculium_server.lanes.answers import Unanswered, Unavailability, without_store
from peculium_server.lanes.weight import GROUP_ROWS_MAX, rows
from peculium_server.store.errors import StoreContended, StoreUnavailable
from peculium_server.store.lane import Loaded, LoadedLanes
from peculium_server.telemetry import spans
from peculium_server.telemetry.meters import Meters

COMMIT_OPERATIONS_MAX: Final = 256
"""Operations in one transaction: more gain little, and each waits for all."""

COMMIT_ROWS_MAX: Final = GROUP_ROWS_MAX
"""Rows written in one transaction: bounds what others wait for, and what a conflict repeats."""

UNDER_WAY_MAX: Final = 2
"""Transactions of a lane at a time: one that is being saved, and one that is decided meanwhile."""

GATHERED_ROWS: Final = 32
"""With so many to write, a transaction is worth its cost, and begins."""

QUIET_TURNS: Final = 8
"""Turns of the event loop in which nobody came: one call takes about seven to get here behind another."""

GATHER_SECONDS_MAX: Final = 0.01
"""Turns may be long when other lanes are busy: nobody waits for more company for longer than this."""

QUEUE_FULL_RETRY_MS: Final = 100
"""A lane commits hundreds of operations in that time."""

_logger = logging.getLogger(__name__)


class DeadlinePassed(Exception):
    """The caller's time was over before its operations were decided; nothing was done."""


class Writer(Protocol):
    """What a lane needs of the store."""

    async def run(
        self,
        footprints: Mapping[bytes, Footprint],
        decide: Callable[[Loaded], Sequence[Accepted]],
        deadline: float | None,
        sent: Callable[[], None],
    ) -> int:
        """Load, decide and save as one transaction; see `peculium_server.store.lane.LaneWriter`."""
        ...


class LanesWriter(Protocol):
    """What atomic batches need of the store."""

    async def run(
        self,
        footprints: Mapping[int, Mapping[bytes, Footprint]],
        decide: Callable[[LoadedLanes], Sequence[Accepted]],
        deadline: float | None,
    ) -> Mapping[int, int]:
        """Load, decide and save as one transaction; see `peculium_server.store.lane.LanesWriter`."""
        ...


class Answered:
    """What became of a group: an answer for each of its operations, and where the lanes stand."""

    __slots__ = ("left", "positions", "results")

    def __init__(
        self,
        results: Sequence[Outcome | Refused],
        left: Left,
        positions: Mapping[int, int],
    ) -> None:
        self.results = results
        self.left = left
        """The tokens that these and earlier operations of the request left for later ones."""
        self.positions = positions
        """Of the lanes concerned."""


class _Committed(NamedTuple):
    """What a transaction has come to."""

    positions: Mapping[int, int]
    """Where the lanes stand."""
    saved: Sequence[Accepted]


class _Group:
    """The operations of one request that belong to this lane, and the caller who waits for them."""

    __slots__ = ("answered", "before", "call", "deadline", "left", "requests", "results", "rows")

    def __init__(
        self,
        requests: Sequence[Request],
        before: Left,
        deadline: float | None,
        answered: asyncio.Future[Answered | Unanswered],
        call: Span | None,
    ) -> None:
        self.requests = requests
        self.call = call
        """The span of the call that they came with, if somebody will see it."""
        self.before = before
        self.left = before
        self.deadline = deadline
        self.answered = answered
        self.rows = rows(request.operation for request in requests)
        self.results: Sequence[Outcome | Refused] | None = None

    def abandoned(self, now: float) -> bool:
        """Say whether nobody waits any more: the caller has gone, or its deadline has passed."""
        if self.answered.done():
            return True
        if self.deadline is not None and self.deadline <= now:
            self.answered.set_exception(DeadlinePassed())
            return True
        return False

    def answer(self, answer: Answered | Unanswered) -> None:
        if not self.answered.done():
            self.answered.set_result(answer)

    def fail(self, error: Exception) -> None:
        if not self.answered.done():
            self.answered.set_exception(error)


class _Queue:
    """Groups that wait for a transaction, and the tasks that commit as many as one may hold."""

    def __init__(self, name: str, *, queue_rows_max: int, meters: Meters | None) -> None:
        self.name = name
        self._queue_rows_max = queue_rows_max
        self._meters = meters
        self._tracer = spans.tracer()
        self._waiting: deque[_Group] = deque()
        self._waiting_rows = 0
        self._under_way: dict[asyncio.Task[None], int] = {}
        """The transactions, with the rows of each, in the order of their beginning."""
        self._deciding: asyncio.Task[None] | None = None
        """The one that has not sent its commit yet."""
        self._groups_before = 0
        """How many the transaction before has taken."""
        self._abandoned = False

    def submit(
        self, requests: Sequence[Request], before: Left, deadline: float | None
    ) -> asyncio.Future[Answered | Unanswered]:
        """Queue the operations of one request, to be decided together and in order.

        To cancel the future is to say that the caller has gone: what was not decided by then never is.

        Args:
            requests: Well-formed; all their roots belong to this lane, or they are an atomic batch.
            before: The tokens that earlier operations of the same client request have left.
            deadline: On the event loop's clock; past it nothing is begun.

        Returns:
            Becomes the answer. Raises DeadlinePassed, or whatever failed for a reason that is not the
            database's.
        """
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Answered | Unanswered] = loop.create_future()
        call = None if self._tracer is None else spans.recording()
        group = _Group(requests, before, deadline, answered, call)
        if self._waiting and self._waiting_rows + group.rows > self._queue_rows_max:
            facts = {"lane": self.name, "queued": str(self._waiting_rows)}
            group.answer(Unanswered(Unavailability.QUEUE_FULL, facts, QUEUE_FULL_RETRY_MS))
            return answered
        self._waiting.append(group)
        self._waiting_rows += group.rows
        self._go_on()
        return answered

    @property
    def depth(self) -> int:
        """How much waits, in rows to be written."""
        return self._waiting_rows

    async def idle(self) -> None:
        """Wait until nothing waits and nothing is being committed."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def abandon(self) -> None:
        """Wait no longer for what is being committed, nor for what waits: nobody hears of it any more."""
        self._abandoned = True
        for task in self._under_way:
            task.cancel()

    def _go_on(self) -> None:
        """Begin a transaction, if something waits and none is in its way."""
        if not self._waiting or self._deciding is not None or self._abandoned:
            return
        if self._under_way and (
            len(self._under_way) == UNDER_WAY_MAX
            # Begun earlier than its predecessor ends, it has to be worth a transaction of its own.
            or self._waiting_rows * UNDER_WAY_MAX < sum(self._under_way.values())
        ):
            return
        loop = asyncio.get_running_loop()
        # It takes what waits when it begins, in the next turn of the event loop.
        # Not in the context of whoever comes first: it is for all of them.
        self._deciding = loop.create_task(
            self._transact(), name=f"lane {self.name}", context=Context()
        )
        self._under_way[self._deciding] = 0

    async def _transact(self) -> None:
        """Commit as much of what waits as one transaction holds. Nothing may leave this: a lane goes on."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - this is one
        try:
            await self._gather()
            groups = self._take()
            self._groups_before = len(groups)
            if groups:
                self._under_way[task] = sum(group.rows for group in groups)
                await self._commit(groups)
        finally:
            del self._under_way[task]
            self._decided()

    async def _gather(self) -> None:
        """Let those come who are on their way; but whoever is alone waits for nobody.

        The transport hands over one call after the other, and a transaction costs as much as one of them.
        Begun with whatever is there, transactions would take the time in which more could have come: they
        would stay small, and be many.
        """
        if self._groups_before <= 1 and len(self._under_way) == 1:
            return
        time = asyncio.get_running_loop().time
        quiet, end = 0, time() + GATHER_SECONDS_MAX
        while quiet < QUIET_TURNS and self._waiting_rows < GATHERED_ROWS and time() < end:
            waiting = self._waiting_rows
            await asyncio.sleep(0)
            quiet = quiet + 1 if self._waiting_rows == waiting else 0

    def _decided(self) -> None:
        """Let the next transaction begin: the one whose task calls has sent its commit, or has ended."""
        if self._deciding is asyncio.current_task():
            self._deciding = None
        self._go_on()

    def _take(self) -> list[_Group]:
        """Take as many groups as one transaction holds, without those that nobody waits for."""
        now = asyncio.get_running_loop().time()
        groups: list[_Group] = []
        operations = rows_taken = 0
        while self._waiting:
            group = self._waiting[0]
            if not group.abandoned(now):
                operations += len(group.requests)
                rows_taken += group.rows
                full = operations > COMMIT_OPERATIONS_MAX or rows_taken > COMMIT_ROWS_MAX
                if full and groups:
                    break
                groups.append(group)
            self._waiting.popleft()
            self._waiting_rows -= group.rows
        return groups

    async def _commit(self, groups: Sequence[_Group]) -> None:
        """Decide and save groups as one transaction, and tell each what became of it."""
        try:
            positions = await self._watched(groups)
        except (StoreUnavailable, StoreContended) as error:
            unanswered = without_store(error)
            _logger.warning("lane %s: %s", self.name, error)
            for group in groups:
                group.answer(unanswered)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is one group's, not the lane's
            await self._isolate(groups, error)
        else:
            for group in groups:
                if group.results is not None:
                    group.answer(Answered(group.results, group.left, positions))

    async def _isolate(self, groups: Sequence[_Group], error: Exception) -> None:
        """Let a failure that is nobody's in particular befall only the group that causes it."""
        if len(groups) == 1:
            groups[0].fail(error)
            return
        for group in groups:
            await self._commit([group])

    async def _watched(self, groups: Sequence[_Group]) -> Mapping[int, int]:
        """Run a transaction before the eyes of those who want to know; where the lanes stand then."""
        calls = [group.call for group in groups if group.call is not None]
        if self._tracer is None or not calls:
            return await self._measured(groups)
        traceparents = (request.traceparent for group in groups for request in group.requests)
        name = f"lane {self.name}"
        with spans.shared(self._tracer, name, calls, traceparents) as span:
            span.set_attribute("peculium.lane", self.name)
            operations = sum(len(group.requests) for group in groups)
            span.set_attribute("peculium.batch.operations", operations)
            try:
                return await self._measured(groups)
            except Exception as error:
                spans.fail(span, type(error).__name__)
                raise

    async def _measured(self, groups: Sequence[_Group]) -> Mapping[int, int]:
        meters, clock = self._meters, asyncio.get_running_loop().time
        if meters is None:
            return (await self._run(groups)).positions
        begun = clock()
        try:
            committed = await self._run(groups)
        except (StoreUnavailable, StoreContended):
            meters.ended("unanswered", clock() - begun)
            raise
        except Exception:
            meters.ended("failed", clock() - begun)
            raise
        operations = sum(len(group.requests) for group in groups)
        meters.committed(operations, clock() - begun, committed.saved)
        return committed.positions

    async def _run(self, groups: Sequence[_Group]) -> _Committed:
        """Decide the groups and save what is accepted, in one transaction."""
        raise NotImplementedError


class Lane(_Queue):
    """One lane's queue: requests in it share transactions, and each operation is decided on its own."""

    def __init__(
        self, number: int, writer: Writer, *, queue_rows_max: int, meters: Meters | None = None
    ) -> None:
        super().__init__(str(number), queue_rows_max=queue_rows_max, meters=meters)
        self.number = number
        self._writer = writer

    async def _run(self, groups: Sequence[_Group]) -> _Committed:
        footprints: dict[bytes, Footprint] = {}
        for group in groups:
            for request in group.requests:
                root_id = request.operation.root_id
                footprint = footprints.get(root_id)
                if footprint is None:
                    footprint = footprints[root_id] = Footprint()
                footprint.add(with_carried(request.operation, group.before))
        time = asyncio.get_running_loop().time
        saved: list[Accepted] = []

        def decide(loaded: Loaded) -> Sequence[Accepted]:
            nonlocal saved
            saved = []
            for group in _awaited(groups, time()):
                position = loaded.position + len(saved)
                group.left = dict(group.before)
                group.results, accepted = decide_group(
                    loaded.trees, group.requests, loaded.now, position, group.left
                )
                saved += accepted
            return saved

        position = await self._writer.run(footprints, decide, _latest(groups), self._decided)
        return _Committed({self.number: position}, saved)


class AtomicLane(_Queue):
    """The queue of atomic batches, whatever lanes they belong to: each is accepted whole or not at all."""

    def __init__(
        self,
        writer: LanesWriter,
        lane_of: Callable[[bytes], int],
        *,
        queue_rows_max: int,
        meters: Meters | None = None,
    ) -> None:
        super().__init__("atomic", queue_rows_max=queue_rows_max, meters=meters)
        self._writer = writer
        self._lane_of = lane_of

    async def _run(self, groups: Sequence[_Group]) -> _Committed:
        footprints: dict[int, dict[bytes, Footprint]] = {}
        for group in groups:
            for request in group.requests:
                root_id = request.operation.root_id
                in_lane = footprints.setdefault(self._lane_of(root_id), {})
                in_lane.setdefault(root_id, Footprint()).add(request.operation)
        time = asyncio.get_running_loop().time
        saved: list[Accepted] = []

        def decide(loaded: LoadedLanes) -> Sequence[Accepted]:
            nonlocal saved
            saved = []
            positions = dict(loaded.positions)
            for group in _awaited(groups, time()):
                group.results, accepted = decide_atomic(
                    loaded.trees, group.requests, loaded.now, self._lane_of, positions
                )
                saved += accepted
            return saved

        positions = await self._writer.run(footprints, decide, _latest(groups))
        return _Committed(positions, saved)


def _awaited(groups: Iterable[_Group], now: float) -> Iterator[_Group]:
    """The groups that somebody still waits for; the others have been told, or have gone."""
    return (group for group in groups if not group.abandoned(now))


def _latest(groups: Iterable[_Group]) -> float | None:
    """The time after which none of the callers waits any more; None if one waits for ever."""
    latest = 0.0
    for group in groups:
        if group.deadline is None:
            return None
        latest = max(latest, group.deadline)
    return latest
