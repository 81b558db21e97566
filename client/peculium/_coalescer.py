"""Puts concurrent operations into few requests, keeps tokens in order, and finds out what is unknown.

Pure: it sends nothing, waits for nothing and has no clock; times are its callers' `monotonic`. It is
not thread-safe either: a sender that has threads puts a lock around it.

A *line* is the order in which the operations of one authority have to go:

- The line of a token is linear. Its operations travel as a chain: the first reveals the secret, each
  further one follows the one before (`after`). While a request is on its way, the token that it will
  leave is not known, so what comes meanwhile waits for the answer.
- The line of a principal-held budget is not: its operations are independent of each other.

An operation whose answer was lost stays at the head of its line and is sent again, unchanged, before
anything else of that line. If nobody waits for it any more when it turns out to have been accepted,
it is undone where it can be: a hold is released, a child that nobody can reach is revoked.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from opentelemetry.trace import Span

from peculium import _requests as requests
from peculium._history import History, Known
from peculium._ids import id_bytes, id_text
from peculium._limits import OPERATIONS_MAX, REQUEST_BYTES_MAX
from peculium._recorder import Recorder
from peculium._requests import Asked, HoldTarget, Operation, Target
from peculium._retry import Failure, Policy, delay_before
from peculium._translation import refusal, unavailable
from peculium._waiting import Pool, Waiting
from peculium.errors import (
    BudgetExhausted,
    CapabilityMoved,
    CapabilityUnknown,
    DeadlineExceeded,
    DescendantUnknown,
    HoldEnded,
    HoldUnknown,
    LedgerUnavailable,
    LedgerWentBack,
    OutcomeUnknown,
    PeculiumError,
    TokenConsumed,
)
from peculium.v1 import ledger_service_pb2 as ledger, types_pb2

FINISH_SECONDS = 30.0
"""How long an operation that nobody waits for is still pursued before it rests until its handle is
used again."""

SHARE_OPERATIONS_MIN = 64
"""So many operations of one tree go together at least, before others of it are put into the next request."""

_CAPABILITY_UNKNOWN = types_pb2.REFUSAL_REASON_CAPABILITY_UNKNOWN
_TOKEN_CONSUMED = types_pb2.REFUSAL_REASON_TOKEN_CONSUMED
_LOST = Failure("the answer was not one to what was asked")
_TOO_LATE = Failure("the time was over before the operation could be sent", not_done=True)
_TIMEOUT_LEAST_SECONDS = 0.001

_NO_HOLD = (CapabilityUnknown, HoldEnded, HoldUnknown, TokenConsumed)
"""What is answered about a hold that was never made, or has ended."""
_NOTHING_LEFT = (*_NO_HOLD, DescendantUnknown)
"""What is answered to who undoes what was never done."""

_log = logging.getLogger("peculium")


class Future(Protocol):
    """What a caller waits on: both asyncio's and concurrent.futures' have this.

    Its result is nothing: the ticket has the outcome. A ticket whose future led back to it would be left, with
    all its messages, to the collector of cycles, which stops the process for as long as it takes.
    """

    def done(self) -> bool:
        """Whether it has a result, an error, or was cancelled."""
        ...

    def set_result(self, result: None, /) -> None:
        """Wake the caller."""
        ...

    def set_exception(self, exception: BaseException, /) -> None:
        """Wake the caller with an error."""
        ...


class Place(Enum):
    """Where a ticket is."""

    QUEUED = "in its line"
    FLYING = "in a request, or inside its section"
    PAUSING = "before its next attempt"
    WAITING = "waiting for money to come free"
    PARKED = "of unknown outcome, until its line is used again"
    DONE = "resolved"


@dataclass(slots=True, eq=False)
class Line:
    """The order of one authority's operations, and its secret while that is known."""

    name: str
    """The budget, for errors."""
    linear: bool
    secret: bytes | None = field(default=None, repr=False)
    """The live token's; with operations unresolved: the one that the first of them presents."""
    queue: deque[Ticket] = field(default_factory=deque, repr=False)
    parked: list[Ticket] = field(default_factory=list, repr=False)
    refused: dict[bytes, Operation] = field(default_factory=dict, repr=False)
    """By id: refused after an attempt whose answer was lost: a delayed duplicate may still win, until the
    token that they presented is consumed."""
    handed: str = ""
    """The W3C trace context that came with the budget, for operations that have none of their own."""
    flying: int = 0
    """How many of its tickets are on their way; a section counts as one."""
    listed: bool = False
    """It is among the lines that are ready, or will be."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One operation on its way, or a place in a line for whoever needs the token itself."""

    line: Line
    operation: Operation | None
    """None: a section, in which its caller has the line's secret for itself."""
    future: Future | None
    """None: nobody waits, and it has to happen all the same."""
    deadline: float
    """Until when its caller waits."""
    wait_until: float = 0.0
    """Until when a reserve waits for money that holds of this process may free."""
    give_up_at: float = math.inf
    """Until when it is pursued."""
    place: Place = Place.QUEUED
    wake_at: float = 0.0
    """Until when it pauses or waits."""
    attempts: int = 0
    maybe_done: bool = False
    """An attempt's fate is unknown."""
    pool: Pool[Ticket] | None = field(default=None, repr=False)
    """Whose money it may wait for."""
    ends: int = 0
    """How often holds had freed money when it was sent."""
    adopted: bool = False
    """It was refused here, and turned out to have won later."""
    woken: bool = False
    """It was told that money came free, and has no answer since."""
    span: Span | None = field(default=None, repr=False)
    """Of the operation, if anybody collects them."""
    failure: Failure | None = None
    outcome: types_pb2.Outcome | None = None
    error: PeculiumError | None = None

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for it."""
        return self.future is not None and not self.future.done()

    @property
    def droppable(self) -> bool:
        """Whether it need not happen once nobody waits for it."""
        return self.operation is None or (
            self.future is not None and not self.operation.must_finish
        )


@dataclass(slots=True, eq=False)
class Batch:
    """Some operations of some lines in one request."""

    request: ledger.BatchRequest = field(repr=False)
    tickets: list[Ticket]
    """In the request's order; those of one line are together."""
    timeout: float
    """How long the attempt may take, in seconds."""
    known: Known
    """What the answers have to know, too."""


_Answered = tuple[Ticket, ledger.OperationResult]


class Coalescer:
    """The state of all lines of one client."""

    def __init__(
        self,
        *,
        policy: Policy,
        jitter: Callable[[], float],
        flights_max: int,
        history: History,
        recorder: Recorder,
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        self._policy = policy
        self._history = history
        self._recorder = recorder
        self._jitter = jitter
        self._flights_max = flights_max
        self._finish_seconds = finish_seconds
        self._flights = 0
        self._ready: deque[Line] = deque()
        self._later: list[tuple[float, int, Line]] = []
        self._sleepers: list[tuple[float, int, Ticket]] = []
        self._sweeps: list[tuple[float, int, Line, Operation]] = []
        """Operations that were refused but may win later, and when to undo what they made."""
        self._order = itertools.count()
        self._waiting: Waiting[Ticket] = Waiting()
        self._pursued = 0
        """How many tickets are neither resolved nor parked."""

    # --- what callers do ---

    def submit(self, ticket: Ticket) -> None:
        """Put an operation at the end of its line, behind whatever is still unresolved in it."""
        self._pursue_until(ticket, ticket.deadline + self._finish_seconds)
        ticket.line.queue.append(ticket)
        self._pursued += 1
        self._list(ticket.line)

    def wait_again(self, ticket: Ticket, future: Future, *, deadline: float) -> None:
        """Attach a new caller to an operation whose outcome was unknown."""
        ticket.future = future
        ticket.deadline = deadline
        self._pursue_until(ticket, deadline + self._finish_seconds)
        if ticket.place is Place.DONE:
            self._wake(ticket)
            return
        if ticket.place is Place.PARKED:
            self._unpark(ticket.line, ticket.give_up_at)
        elif ticket.place is Place.PAUSING:
            self._hurry([ticket])
        self._list(ticket.line)

    def expire(self, ticket: Ticket, now: float) -> None:
        """Its caller's time is over: tell what is known, and pursue the rest without it."""
        future = ticket.future
        if future is not None and not future.done():
            future.set_exception(self._leave(ticket, now))

    def abandon(self, ticket: Ticket, now: float) -> None:
        """Its caller went away. An outcome that it did not take any more is undone."""
        if ticket.outcome is not None:
            self._undo(ticket, now)
        elif ticket.operation is None and ticket.place is Place.FLYING:
            self.leave_section(ticket)
        elif ticket.place is not Place.DONE:
            self._leave(ticket, now)

    def beware(self, line: Line, operation: Operation, now: float) -> None:
        """An operation that another process has sent did not happen; it may still."""
        if line.linear:
            line.refused[operation.operation_id] = operation
        self._sweep_later(line, operation, now)

    def leave_section(self, ticket: Ticket) -> None:
        """The caller of a section is done with the token: the line goes on."""
        self._finish(ticket)
        ticket.line.flying -= 1
        self._list(ticket.line)

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way or to be sent."""
        return self._pursued == 0 and not self._sweeps

    @property
    def unresolved(self) -> int:
        """How many operations are neither resolved nor parked."""
        return self._pursued

    # --- what senders do ---

    def next_batch(self, now: float) -> Batch | None:
        """What to send now, if anything."""
        went_back = self._history.went_back
        if went_back is not None:
            self._stop(went_back, now)
            return None
        self._rouse(now)
        if self._flights >= self._flights_max:
            return None
        draft = _Draft(self._share())
        crowded: list[Line] = []
        while self._ready and not draft.full:
            line = self._ready.popleft()
            line.listed = False
            if self._board(line, draft, now):
                self._list(line, first=draft.full)
            else:
                crowded.append(line)
        for line in crowded:
            self._list(line)
        if not draft.tickets:
            return None
        self._flights += 1
        awaited = [ticket.deadline for ticket in draft.tickets if ticket.awaited]
        limit = max(awaited or [ticket.give_up_at for ticket in draft.tickets])
        timeout = max(min(limit - now, self._policy.attempt_seconds), _TIMEOUT_LEAST_SECONDS)
        return Batch(draft.request, draft.tickets, timeout, self._history.known())

    def wake_at(self) -> float | None:
        """When there may be something to do although nothing else happens before."""
        times = [heap[0][0] for heap in (self._later, self._sleepers, self._sweeps) if heap]
        return min(times, default=None)

    def completed(self, batch: Batch, response: ledger.BatchResponse, now: float) -> None:
        """The answer to a batch came."""
        results = list(response.results)
        if len(results) != len(batch.tickets):
            self.failed(batch, _LOST, now)
            return
        self._flights -= 1
        try:
            self._history.observe_batch(batch.known, results)
        except LedgerWentBack as error:
            self._disbelieve(batch, error, now)
            return
        pairs = zip(batch.tickets, results, strict=True)
        for line, group in itertools.groupby(pairs, key=lambda pair: pair[0].line):
            answered = list(group)
            line.flying -= len(answered)
            if line.linear:
                self._apply_chain(line, answered, now)
            else:
                for ticket, result in answered:
                    self._apply(ticket, result, now)
            self._list(line)

    def failed(self, batch: Batch, failure: Failure, now: float) -> None:
        """No answer to a batch came, or one to the whole of it."""
        self._flights -= 1
        for line, group in itertools.groupby(batch.tickets, key=lambda ticket: ticket.line):
            tickets = list(group)
            line.flying -= len(tickets)
            self._fail(line, tickets, failure, now)
            self._list(line)

    # --- a ledger that went back in time ---

    def _disbelieve(self, batch: Batch, error: LedgerWentBack, now: float) -> None:
        """Take the answers to a batch for none: neither what was accepted nor what was refused may last."""
        for ticket in batch.tickets:
            ticket.line.flying -= 1
            self._resolve(ticket, now, error=_told_of(error, ticket))

    def _stop(self, error: LedgerWentBack, now: float) -> None:
        """Send nothing more: whatever waits, in whatever place, is told why."""
        lines = [*self._ready, *(line for _, _, line in self._later)]
        sleeping = [ticket for _, _, ticket in self._sleepers]
        self._ready.clear()
        self._later.clear()
        self._sleepers.clear()
        self._sweeps.clear()
        for ticket in sleeping:
            if ticket.place is Place.WAITING:
                _stop_waiting(ticket)
            if ticket.place in {Place.WAITING, Place.PAUSING}:
                self._resolve(ticket, now, error=_told_of(error, ticket))
        for line in lines:
            line.listed = False
            while line.queue:
                ticket = line.queue.popleft()
                self._resolve(ticket, now, error=_told_of(error, ticket))

    # --- sending ---

    def _rouse(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            self._ready.append(heapq.heappop(self._later)[2])
        while self._sleepers and self._sleepers[0][0] <= now:
            ticket = heapq.heappop(self._sleepers)[2]
            # What was woken before may sleep again by now: then it is on the heap once more.
            if ticket.place is Place.PAUSING and ticket.wake_at <= now:
                self._hurry([ticket])
                self._list(ticket.line)
            elif ticket.place is Place.WAITING and ticket.wake_at <= now:
                _stop_waiting(ticket)
                self._resolve(ticket, now, error=ticket.error)
        while self._sweeps and self._sweeps[0][0] <= now:
            _, _, line, operation = heapq.heappop(self._sweeps)
            self._take_back(line, operation, now)

    def _share(self) -> int:
        """How many operations of one tree go into the next request.

        A tree's operations are decided one after the other. If all went together, client and ledger would
        work in turns: everybody is answered at once, and asks at once.
        """
        ready = sum(len(line.queue) for line in self._ready)
        return max(SHARE_OPERATIONS_MIN, math.ceil(ready / (self._flights_max - self._flights)))

    def _board(self, line: Line, draft: _Draft, now: float) -> bool:
        """Take from a line what may go now; False if it has more, which is for another request."""
        if line.parked and line.queue:
            self._unpark(line, line.queue[-1].give_up_at)
        previous: int | None = None
        while line.queue and not draft.full:
            ticket = line.queue[0]
            if ticket.operation is None:
                # A section is first in its request, or waits for what is before it in this one.
                if line.flying == 0:
                    self._enter(line.queue.popleft())
                return True
            if not draft.fits(ticket.operation):
                return True
            # A chain is not cut: what is behind would have to wait for the answer.
            if (previous is None or not line.linear) and draft.crowded(ticket.operation):
                return False
            line.queue.popleft()
            if self._may_go(ticket, now):
                if line.linear and ticket.operation.kind != "recover":
                    _authorise(ticket.operation.header, line, previous)
                previous = self._add(ticket, ticket.operation, draft, now)
        return True

    def _may_go(self, ticket: Ticket, now: float) -> bool:
        """Whether it still has to be sent, and can; otherwise it is resolved."""
        line = ticket.line
        if not ticket.awaited and not ticket.maybe_done and ticket.droppable:
            self._resolve(ticket, now, error=_error(DeadlineExceeded, ticket, _TOO_LATE))
            return False
        if line.linear and line.secret is None:
            self._resolve(ticket, now, error=_used_up(ticket))
            return False
        return True

    def _add(self, ticket: Ticket, operation: Operation, draft: _Draft, now: float) -> int:
        line = ticket.line
        ticket.place = Place.FLYING
        ticket.attempts += 1
        line.flying += 1
        self._recorder.sending(line.name, operation, secret=line.secret)
        if ticket.wait_until > now:
            ticket.pool = self._waiting.pool(operation.budget_id)
            ticket.ends = ticket.pool.ends
        return draft.add(ticket, operation)

    def _enter(self, ticket: Ticket) -> None:
        if not ticket.awaited:
            self._finish(ticket)
            return
        ticket.place = Place.FLYING
        ticket.line.flying += 1
        self._wake(ticket)

    def _pursue_until(self, ticket: Ticket, time: float) -> None:
        """Nobody may use the line of what has to happen again, so it is not left to that."""
        ticket.give_up_at = time if ticket.droppable else math.inf

    def _list(self, line: Line, *, first: bool = False) -> None:
        """Note that a line has something that can go."""
        if line.listed or not line.queue or (line.linear and line.flying):
            return
        line.listed = True
        if first:
            self._ready.appendleft(line)
        else:
            self._ready.append(line)

    def _unpark(self, line: Line, give_up_at: float) -> None:
        for ticket in line.parked:
            ticket.give_up_at = give_up_at
        self._pursued += len(line.parked)
        self._hurry(line.parked)
        line.parked = []

    def _hurry(self, tickets: list[Ticket]) -> None:
        """Put tickets of one line at its head, in their order."""
        for ticket in reversed(tickets):
            ticket.place = Place.QUEUED
            ticket.line.queue.appendleft(ticket)

    # --- answers ---

    def _apply_chain(self, line: Line, answered: list[_Answered], now: float) -> None:
        """Follow the token through a chain's answers, as far as they tell where it is."""
        tickets = [ticket for ticket, _ in answered]
        skipped: list[Ticket] = []
        winners: list[Ticket] = []
        failure: Failure | None = None
        told = 0
        for ticket, result in answered:
            case = result.WhichOneof("result")
            consumer = _consumer(result.refused) if case == "refused" else None
            if case == "outcome":
                self._accepted(ticket, result.outcome, now)
            elif case != "refused":
                failure = unavailable(result.unavailable) if case == "unavailable" else _LOST
                break
            elif consumer in line.refused:
                winners = [self._adopted(line, line.refused.pop(consumer), now)]
                break
            elif _comes(consumer, tickets[told + 1 :]):
                # One behind it consumed the token in an attempt whose answer was lost, so this one
                # was refused then. Why is lost, too: it is asked anew, after the others.
                skipped.append(ticket)
            elif told and result.refused.reason == _CAPABILITY_UNKNOWN:
                # It says nothing of this one: the one before left no token to go on with.
                break
            else:
                self._refused(ticket, result.refused, now)
            told += 1
        rest = _in_doubt(answered[told:])
        self._hurry([ticket for ticket in skipped if self._anew(ticket, now)])
        if failure is None:
            self._hurry(winners + rest)
        else:
            self._fail(line, rest, failure, now)

    def _adopted(self, line: Line, winner: Operation, now: float) -> Ticket:
        """A delayed duplicate of a refused operation has won: its outcome is to be found out."""
        self._pursued += 1
        return Ticket(line, winner, None, now, maybe_done=True, adopted=True)

    def _apply(self, ticket: Ticket, result: ledger.OperationResult, now: float) -> None:
        match result.WhichOneof("result"):
            case "outcome":
                self._accepted(ticket, result.outcome, now)
            case "refused":
                self._refused(ticket, result.refused, now)
            case "unavailable":
                self._fail(ticket.line, [ticket], unavailable(result.unavailable), now)
            case _:
                self._fail(ticket.line, [ticket], _LOST, now)

    def _accepted(self, ticket: Ticket, outcome: types_pb2.Outcome, now: float) -> None:
        operation, line = ticket.operation, ticket.line
        if operation is None:
            return
        if line.linear and not outcome.dry_run:
            line.secret = None if _closed(operation, outcome) else operation.produced
            if not ticket.adopted:
                # What was refused behind a winner may have won with the token that the winner left.
                line.refused.clear()
        self._recorder.accepted(
            line.name, operation, outcome, secret=line.secret, alone=not line.refused
        )
        self._resolve(ticket, now, outcome=outcome)
        woken, in_vain = self._waiting.observe(operation, outcome)
        for waiter in woken:
            waiter.error = None
            if self._anew(waiter, now):
                waiter.woken = True
                waiter.place = Place.QUEUED
                waiter.line.queue.append(waiter)
                self._list(waiter.line)
            elif waiter.pool is not None:
                in_vain += self._waiting.tried(waiter.pool)
        self._disappoint(in_vain, now)

    def _refused(self, ticket: Ticket, message: types_pb2.Refused, now: float) -> None:
        line, operation = ticket.line, ticket.operation
        error = refusal(message, budget=line.name, operation_id=_operation_id(ticket))
        if isinstance(error, TokenConsumed) and line.linear and line.secret is None:
            # By the one before it in this very line, which gave everything back.
            error = _used_up(ticket)
        self._tried(ticket, now)
        if ticket.maybe_done and operation is not None:
            self._beware(line, operation, error, now)
            if not isinstance(error, TokenConsumed):
                self._recorder.refused(operation)
        if isinstance(error, BudgetExhausted) and self._waits(ticket, error, now):
            return
        self._resolve(ticket, now, error=error)
        if operation is not None and isinstance(error, _NO_HOLD):
            self._disappoint(self._waiting.forget(operation), now)

    def _beware(self, line: Line, operation: Operation, error: PeculiumError, now: float) -> None:
        """A duplicate of a refused operation may still be on its way, and win later."""
        if isinstance(error, TokenConsumed):
            line.refused.clear()
            self._recorder.outrun(operation)
        elif line.linear:
            line.refused[operation.operation_id] = operation
        self._sweep_later(line, operation, now)

    def _sweep_later(self, line: Line, operation: Operation, now: float) -> None:
        if operation.kind == "reserve" or (operation.kind == "delegate" and not line.linear):
            # No attempt is decided after its time is over, so what it may make is there by then. The
            # children of a token's line are found when its next operation is told who was before it.
            due = now + self._policy.attempt_seconds
            heapq.heappush(self._sweeps, (due, next(self._order), line, operation))

    def _waits(self, ticket: Ticket, error: BudgetExhausted, now: float) -> bool:
        """Let a reserve wait if this process's own holds could make it fit in time."""
        pool = ticket.pool
        if pool is None or ticket.wait_until <= now or not ticket.awaited:
            return False
        if pool.ends != ticket.ends:
            # Money came free since it was sent: the refusal may be older than that.
            self._anew(ticket, now)
            self._hurry([ticket])
            return True
        if not pool.may_free(error.requested - error.available):
            return False
        ticket.error = error
        pool.queue.append((error.requested, ticket))
        self._sleep(ticket, Place.WAITING, ticket.wait_until)
        return True

    def _sleep(self, ticket: Ticket, place: Place, until: float) -> None:
        ticket.place, ticket.wake_at = place, until
        heapq.heappush(self._sleepers, (until, next(self._order), ticket))

    def _tried(self, ticket: Ticket, now: float) -> None:
        if ticket.woken and ticket.pool is not None:
            ticket.woken = False
            self._disappoint(self._waiting.tried(ticket.pool), now)

    def _disappoint(self, waiters: list[Ticket], now: float) -> None:
        for waiter in waiters:
            self._resolve(waiter, now, error=waiter.error)

    def _anew(self, ticket: Ticket, now: float) -> bool:
        """Make a new operation of what surely never happened, if it still has to."""
        if not ticket.awaited and ticket.droppable:
            self._resolve(ticket, now, error=_error(DeadlineExceeded, ticket, _TOO_LATE))
            return False
        if ticket.operation is not None:
            self._recorder.ended(ticket.operation)
            ticket.operation = ticket.operation.again()
        ticket.attempts = 0
        ticket.maybe_done = False
        return True

    def _fail(self, line: Line, tickets: list[Ticket], failure: Failure, now: float) -> None:
        """An attempt did not bring an answer: again, later, or not at all."""
        attempts = max(ticket.attempts for ticket in tickets)
        delay = delay_before(attempts, failure, self._policy, self._jitter())
        for ticket in tickets:
            ticket.failure = failure
            ticket.maybe_done = ticket.maybe_done or not failure.not_done
        if delay is None:
            self._fail_for_good(line, tickets, failure, now)
            return
        kept = [ticket for ticket in tickets if not self._dropped(ticket, now)]
        if kept and max(ticket.give_up_at for ticket in kept) <= now:
            self._park(line, kept)
            return
        if not line.linear:
            for ticket in kept:
                self._sleep(ticket, Place.PAUSING, now + delay)
        elif kept:
            self._hurry(kept)
            if not line.listed:
                line.listed = True
                heapq.heappush(self._later, (now + delay, next(self._order), line))

    def _fail_for_good(
        self, line: Line, tickets: list[Ticket], failure: Failure, now: float
    ) -> None:
        unknown = [ticket for ticket in tickets if ticket.maybe_done]
        for ticket in tickets:
            if ticket.maybe_done:
                # A refusal of the whole request does not say what an attempt before it did.
                if ticket.awaited and ticket.future is not None:
                    ticket.future.set_exception(_error(OutcomeUnknown, ticket, failure))
            elif failure.refused is not None:
                error = failure.refused.concerning(line.name, _operation_id(ticket))
                self._resolve(ticket, now, error=error)
            else:
                self._resolve(ticket, now, error=_error(LedgerUnavailable, ticket, failure))
        self._park(line, unknown)

    def _park(self, line: Line, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            ticket.place = Place.PARKED
            kind = "" if ticket.operation is None else ticket.operation.kind
            _log.warning(
                "the outcome of %s %s on %s stays unknown until its handle is used again",
                kind,
                _operation_id(ticket),
                line.name,
            )
        self._pursued -= len(tickets)
        line.parked += tickets

    def _dropped(self, ticket: Ticket, now: float) -> bool:
        if ticket.awaited or ticket.maybe_done or not ticket.droppable:
            return False
        self._resolve(ticket, now, error=_error(LedgerUnavailable, ticket, ticket.failure))
        return True

    # --- ends ---

    def _leave(self, ticket: Ticket, now: float) -> PeculiumError:
        """Go on without a caller; what is to be said to it."""
        self._pursue_until(ticket, now + self._finish_seconds)
        if ticket.place is Place.WAITING:
            _stop_waiting(ticket)
            self._finish(ticket)
            return ticket.error or _error(DeadlineExceeded, ticket, _TOO_LATE)
        settled = ticket.place in {Place.QUEUED, Place.PAUSING} and not ticket.maybe_done
        if not settled or not ticket.droppable:
            return _error(OutcomeUnknown, ticket, ticket.failure)
        if ticket.failure is None:
            error = _error(DeadlineExceeded, ticket, _TOO_LATE)
        else:
            error = _error(LedgerUnavailable, ticket, ticket.failure)
        if ticket.place is Place.QUEUED:
            ticket.line.queue.remove(ticket)
        ticket.error = error
        self._did_not(ticket)
        self._finish(ticket)
        return error

    def _did_not(self, ticket: Ticket) -> None:
        if ticket.operation is not None and not ticket.operation.dry_run:
            self._recorder.ended(ticket.operation)

    def _finish(self, ticket: Ticket) -> None:
        ticket.place = Place.DONE
        self._pursued -= 1

    def _resolve(
        self,
        ticket: Ticket,
        now: float,
        *,
        outcome: types_pb2.Outcome | None = None,
        error: PeculiumError | None = None,
    ) -> None:
        ticket.outcome, ticket.error = outcome, error
        if error is not None and not isinstance(error, LedgerWentBack):
            self._did_not(ticket)
        self._finish(ticket)
        self._tried(ticket, now)
        if ticket.awaited:
            self._wake(ticket)
        elif outcome is not None:
            self._undo(ticket, now)
        elif ticket.future is None and not isinstance(error, _NOTHING_LEFT):
            _log.warning("what was to be done in the background was not: %s", error)

    def _wake(self, ticket: Ticket) -> None:
        future = ticket.future
        if future is None or future.done():
            return
        if ticket.error is not None:
            future.set_exception(ticket.error)
        else:
            future.set_result(None)

    def _undo(self, ticket: Ticket, now: float) -> None:
        """Give back what an operation took for a caller that is gone."""
        operation, outcome, line = ticket.operation, ticket.outcome, ticket.line
        if operation is None or outcome is None or operation.dry_run:
            return
        if not outcome.dry_run:
            self._take_back(line, operation, now)

    def _take_back(self, line: Line, operation: Operation, now: float) -> None:
        if operation.kind == "reserve":
            self._release(line.name, operation, now)
        elif operation.kind == "delegate" and not (line.linear and line.secret is None):
            target = Target(operation.root_id, operation.budget_id, by_token=line.linear)
            for child in operation.children:
                if child.secret is not None:
                    undoing = requests.revoke(target, Asked(), descendant_id=child.budget_id)
                    self.submit(Ticket(line, undoing, None, now))

    def _release(self, name: str, reserve: Operation, now: float) -> None:
        """Give back the hold of a reserve whose caller is gone."""
        hold = HoldTarget(reserve.root_id, reserve.budget_id, reserve.hold_id)
        line = Line(name, linear=True, secret=reserve.hold_secret)
        self.submit(Ticket(line, requests.release(hold, Asked()), None, now))


class _Draft:
    """A request in the making."""

    def __init__(self, share: int) -> None:
        self.request = ledger.BatchRequest()
        self.tickets: list[Ticket] = []
        self.full = False
        self._bytes = 0
        self._share = share
        self._of_tree: dict[bytes, int] = {}

    def crowded(self, operation: Operation) -> bool:
        """Whether the share of the operation's tree is in it."""
        return self._of_tree.get(operation.root_id, 0) >= self._share

    def fits(self, operation: Operation) -> bool:
        """Whether there is room; if not, the draft is full."""
        if self.tickets and self._bytes + operation.size > REQUEST_BYTES_MAX:
            self.full = True
        return not self.full

    def add(self, ticket: Ticket, operation: Operation) -> int:
        """Append an operation; its index."""
        self.request.operations.append(operation.message)
        self.tickets.append(ticket)
        self._bytes += operation.size
        self._of_tree[operation.root_id] = self._of_tree.get(operation.root_id, 0) + 1
        self.full = len(self.tickets) >= OPERATIONS_MAX
        return len(self.tickets) - 1


def _authorise(header: types_pb2.OperationHeader, line: Line, previous: int | None) -> None:
    if previous is not None:
        header.authority.after = previous
    elif line.secret is not None:
        header.authority.secret = line.secret


def _closed(operation: Operation, outcome: types_pb2.Outcome) -> bool:
    """Whether the line has no token any more: an increment beyond what a hold has left ends it."""
    ended = operation.kind == "settle" and outcome.hold.state != types_pb2.HOLD_STATE_LIVE
    return operation.closes or ended


def _consumer(message: types_pb2.Refused) -> bytes | None:
    if message.reason != _TOKEN_CONSUMED:
        return None
    return id_bytes(message.metadata.get("consumed_by", ""))


def _comes(operation_id: bytes | None, tickets: list[Ticket]) -> bool:
    """Whether the operation is among the tickets."""
    return operation_id is not None and any(
        ticket.operation is not None and ticket.operation.operation_id == operation_id
        for ticket in tickets
    )


def _in_doubt(answered: list[_Answered]) -> list[Ticket]:
    """The tickets; those that were accepted have to be asked once more, in their order."""
    for ticket, result in answered:
        if result.HasField("outcome"):
            ticket.maybe_done = True
    return [ticket for ticket, _ in answered]


def _stop_waiting(ticket: Ticket) -> None:
    if ticket.pool is not None:
        ticket.pool.remove(ticket)


def _operation_id(ticket: Ticket) -> str | None:
    return None if ticket.operation is None else id_text(ticket.operation.operation_id)


def _used_up(ticket: Ticket) -> CapabilityMoved:
    return CapabilityMoved(
        "the operation before left no token to go on with",
        budget=ticket.line.name,
        operation_id=_operation_id(ticket),
    )


def _told_of(error: LedgerWentBack, ticket: Ticket) -> LedgerWentBack:
    return error.concerning(ticket.line.name, _operation_id(ticket))


def _error(cls: type[PeculiumError], ticket: Ticket, failure: Failure | None) -> PeculiumError:
    said = "no answer came in time" if failure is None else failure.message
    return cls(said, budget=ticket.line.name, operation_id=_operation_id(ticket))
