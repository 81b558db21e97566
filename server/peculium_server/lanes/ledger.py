"""The ledger as the wire sees it: a request goes in, an answer for each of its operations comes out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, Protocol

from peculium_server.core.batch import Left, Request, check_atomic
from peculium_server.core.operations import After, ByToken
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.lanes.answers import Answer, Position, Unanswered, Unavailability
from peculium_server.lanes.lane import Answered, AtomicLane, Lane, LanesWriter, Writer
from peculium_server.lanes.weight import GROUP_ROWS_MAX, rows, rows_of
from peculium_server.telemetry.meters import Meters

DRAINING_RETRY_MS: Final = 1_000
"""By then a load balancer or a restart has brought another server."""

DRAINING: Final = Unanswered(Unavailability.DRAINING, {}, DRAINING_RETRY_MS)
"""What is said to all by a server that is about to stop."""


class Lanes(Protocol):
    """What the ledger needs of the store."""

    incarnation: bytes
    lanes: int

    def lane_of(self, root_id: bytes) -> int:
        """The lane that a root's operations are committed in."""
        ...

    def writer(self, lane: int) -> Writer:
        """The writer of a lane."""
        ...

    def lanes_writer(self) -> LanesWriter:
        """The writer of what concerns several lanes at once."""
        ...


class Ledger:
    """All lanes of one open ledger."""

    def __init__(self, store: Lanes, *, queue_rows_max: int, meters: Meters | None = None) -> None:
        """Begin with nothing waiting.

        Args:
            store: Where it is.
            queue_rows_max: How much may wait in one lane, in rows to be written.
            meters: Counts what happens, if anybody wants to know.
        """
        self._incarnation = store.incarnation
        self._lane_of = store.lane_of
        self._lanes = [
            Lane(number, store.writer(number), queue_rows_max=queue_rows_max, meters=meters)
            for number in range(store.lanes)
        ]
        self._atomic = AtomicLane(
            store.lanes_writer(), store.lane_of, queue_rows_max=queue_rows_max, meters=meters
        )
        self._draining = False
        self._meters = meters
        if meters is not None:
            meters.watch_lanes(self._depths)

    async def execute(self, requests: Sequence[Request], deadline: float | None) -> list[Answer]:
        """Decide and save the operations of one client request, each on its own.

        Those of one root are decided in order. A refusal, or a lane that gives no answer, changes
        nothing for the others.

        Args:
            requests: The operations, by ascending index; chains refer to those indexes.
            deadline: On the event loop's clock; what is not decided by then is dropped.

        Returns:
            An answer for each operation, in the same order.

        Raises:
            DeadlinePassed: The deadline passed before some were decided.
        """
        answers = await self._answers(requests, deadline)
        self._count(requests, answers)
        return answers

    async def _answers(self, requests: Sequence[Request], deadline: float | None) -> list[Answer]:
        if self._draining:
            return [Answer(DRAINING, None)] * len(requests)
        admitted, refused = _admit(requests)
        by_lane = self._split(admitted)
        execute = [self._execute_in(lane, group, deadline) for lane, group in by_lane.items()]
        # Several at once: who cancels has to take all of them back. One alone needs no task.
        answered = [await execute[0]] if len(execute) == 1 else await asyncio.gather(*execute)
        answers = {index: Answer(refusal, None) for index, refusal in refused.items()}
        for group, results in zip(by_lane.values(), answered, strict=True):
            answers |= {
                request.index: result for request, result in zip(group, results, strict=True)
            }
        return [answers[request.index] for request in requests]

    async def execute_atomic(
        self, batch: Sequence[Request], deadline: float | None
    ) -> list[Answer]:
        """Decide and save the operations of one client request together: all of them, or none.

        Args:
            batch: All operations of an atomic batch, by ascending index.
            deadline: On the event loop's clock; past it nothing is begun.

        Returns:
            An answer for each operation, in the same order: if one is refused, so are all others
            (BATCH_REFUSED).

        Raises:
            DeadlinePassed: The deadline passed before the batch was decided.
        """
        answers = await self._atomic_answers(batch, deadline)
        self._count(batch, answers)
        return answers

    async def _atomic_answers(
        self, batch: Sequence[Request], deadline: float | None
    ) -> list[Answer]:
        if self._draining:
            return [Answer(DRAINING, None)] * len(batch)
        refused = check_atomic(batch) or _check_weight(batch)
        if refused is not None:
            return [Answer(refusal, None) for refusal in refused]
        answered = await self._atomic.submit(batch, {}, deadline)
        if isinstance(answered, Unanswered):
            return [Answer(answered, None)] * len(batch)
        return [
            Answer(result, self._position(self._lane_of(request.operation.root_id), answered))
            for request, result in zip(batch, answered.results, strict=True)
        ]

    async def _execute_in(
        self, number: int, requests: Sequence[Request], deadline: float | None
    ) -> list[Answer]:
        """Decide and save the operations of one lane, in as few transactions as their rows allow."""
        answers: list[Answer] = []
        left: Left = {}
        for part in _parts(requests):
            answered = await self._lanes[number].submit(part, left, deadline)
            answers += self._tell(number, part, answered)
            if isinstance(answered, Unanswered):
                # What follows may be chained to what has no answer.
                rest = len(requests) - len(answers)
                return answers + [Answer(answered, None)] * rest
            left = answered.left
        return answers

    async def drain(self) -> None:
        """Take nothing more, and wait until everything that was taken is committed and answered."""
        self._draining = True
        for lane in (*self._lanes, self._atomic):
            await lane.idle()

    def abandon(self) -> None:
        """Give up what is not committed yet; what became of it, its callers find out by asking again."""
        for lane in (*self._lanes, self._atomic):
            lane.abandon()

    def _count(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        meters = self._meters
        if meters is not None:
            for request, answer in zip(requests, answers, strict=True):
                meters.answered(request.operation.kind, _told(answer))

    def _depths(self) -> Iterator[tuple[str, int]]:
        for lane in (*self._lanes, self._atomic):
            yield lane.name, lane.depth

    def _split(self, requests: Sequence[Request]) -> dict[int, list[Request]]:
        by_lane: dict[int, list[Request]] = {}
        for request in requests:
            by_lane.setdefault(self._lane_of(request.operation.root_id), []).append(request)
        return by_lane

    def _tell(
        self, number: int, group: Sequence[Request], answered: Answered | Unanswered
    ) -> list[Answer]:
        if isinstance(answered, Unanswered):
            return [Answer(answered, None)] * len(group)
        position = self._position(number, answered)
        return [Answer(result, position) for result in answered.results]

    def _position(self, number: int, answered: Answered) -> Position:
        return Position(self._incarnation, number, answered.positions[number])


def _told(answer: Answer) -> str:
    """The answer as metrics tell it: one of `instruments.OUTCOMES`."""
    match answer.result:
        case Outcome(replayed=True):
            return "replayed"
        case Outcome(dry_run=True):
            return "dry_run"
        case Outcome():
            return "accepted"
        case Refused():
            return "refused"
        case Unanswered():
            return "unanswered"


def _check_weight(batch: Sequence[Request]) -> list[Outcome | Refused] | None:
    """Refuse an atomic batch that would write more than one transaction may: it cannot be cut."""
    size = rows(request.operation for request in batch)
    if size <= GROUP_ROWS_MAX:
        return None
    facts = {"field": "operations", "limit": str(GROUP_ROWS_MAX), "size": str(size)}
    return [Refused(Refusal.TOO_LARGE, facts)] * len(batch)


def _admit(requests: Sequence[Request]) -> tuple[Sequence[Request], dict[int, Refused]]:
    """Sort out what no state of the ledger could accept, so that it costs no transaction."""
    refused: dict[int, Refused] = {}
    untouched: dict[int, ByToken | After] = {}
    admitted: list[Request] = []
    for each in requests:
        request = _past_refused(each, untouched) if untouched else each
        refusal = request.malformed()
        if refusal is None:
            admitted.append(request)
            continue
        refused[request.index] = refusal
        authority = request.operation.authority
        if isinstance(authority, ByToken | After):
            untouched[request.index] = authority
    return admitted, refused


def _past_refused(request: Request, untouched: dict[int, ByToken | After]) -> Request:
    """Chain an operation to what came before a refused one, which left its token as it was."""
    authority = request.operation.authority
    if not isinstance(authority, After) or authority.index not in untouched:
        return request
    operation = replace(request.operation, authority=untouched[authority.index])
    return Request(operation, request.actor, request.index, request.traceparent)


def _parts(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    """Cut the operations of one lane, in their order, into what one transaction may write each."""
    part: list[Request] = []
    size = 0
    for request in requests:
        own = rows_of(request.operation)
        if part and size + own > GROUP_ROWS_MAX:
            yield part
            part, size = [], 0
        part.append(request)
        size += own
    yield part
