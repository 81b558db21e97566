"""Sends what the coalescer says, for any number of threads.

One thread owns the coalescer; the others put what they want into its inbox and wait for their own
answer. So the state needs no lock, and a caller that is interrupted cannot leave it half changed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from peculium import _trace
from peculium._coalescer import Batch, Coalescer, Line, Ticket
from peculium._config import CLOSE_SECONDS_DEFAULT, Config
from peculium._handles import Process
from peculium._history import History
from peculium._recorder import Recorder
from peculium._requests import Operation
from peculium._retry import Attempts, Failure, Policy, Resumable, Resuming, delay_before
from peculium._translation import failure
from peculium.errors import Invalid, LedgerUnavailable, OutcomeUnknown
from peculium.v1 import (
    admin_service_pb2_grpc,
    audit_service_pb2_grpc,
    ledger_service_pb2_grpc,
)

if TYPE_CHECKING:
    from peculium.v1.admin_service_pb2_grpc import AdminServiceStub
    from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
    from peculium.v1.ledger_service_pb2_grpc import LedgerServiceStub

FLIGHTS_MAX = 4
"""How many batches are on their way at once: enough to keep the ledger busy, few enough to be full."""

_JITTER_STEPS = 1 << 20
_TOLD_SECONDS = 5.0
"""Long enough for the owner of the coalescer to say what it knows, if there still is one."""
_Task = Callable[[float], None]
"""Is told the time."""

_Q = TypeVar("_Q")
_R = TypeVar("_R")
_F = TypeVar("_F", bound=Resuming)
_T = TypeVar("_T", bound=Resumable)

_log = logging.getLogger("peculium")


class Sender:
    """One connection, shared by the threads of one process."""

    def __init__(
        self, config: Config, policy: Policy | None = None, recorder: Recorder | None = None
    ) -> None:
        self.process = Process()
        self.recorder = recorder or Recorder()
        self.timeout = config.timeout
        self._config = config
        self._tracing = _trace.Tracing(config.target)
        self._policy = policy or Policy()
        self._history = History()
        self._brain = Coalescer(
            policy=self._policy,
            jitter=_jitter,
            flights_max=FLIGHTS_MAX,
            history=self._history,
            recorder=self.recorder,
        )
        self._inbox: SimpleQueue[_Task] = SimpleQueue()
        self._opening = threading.Lock()
        self._thread: threading.Thread | None = None
        self._channel: grpc.Channel | None = None
        self._closed = False
        self._over = False
        """The owner of the coalescer ends at once."""
        self._finishing = False
        """The owner of the coalescer ends when nothing is left to do."""
        self._ledger: LedgerServiceStub
        self._admin: AdminServiceStub
        self._audit: AuditServiceStub

    # --- operations ---

    def submit(
        self,
        line: Line,
        operation: Operation | None,
        timeout: float | None = None,
        wait: float | None = None,
    ) -> Ticket:
        """Put an operation on its way; `wait` for it. The time runs from now."""
        self._begin()
        until = time.monotonic() + (wait or 0.0)
        deadline = until + self._seconds(timeout)
        ticket = Ticket(line, operation, Future(), deadline, until if wait else 0.0)
        ticket.span = self._tracing.begin(operation, line.name, line.handed)
        self._inbox.put(lambda _: self._brain.submit(ticket))
        return ticket

    def detach(self, line: Line, operation: Operation) -> None:
        """Put an operation on its way that has to happen although nobody waits for it."""
        self._begin(closing=True)
        ticket = Ticket(line, operation, None, time.monotonic())
        self._inbox.put(lambda _: self._brain.submit(ticket))

    def wait(self, ticket: Ticket) -> Ticket:
        """Wait for an operation that was submitted, until its deadline.

        Raises:
            PeculiumError: It was refused, or there was no answer in time.
        """
        return self._take(ticket, ticket.future, ticket.deadline)

    def wait_again(self, ticket: Ticket, timeout: float | None = None) -> Ticket:
        """Wait for an operation once more whose outcome was unknown.

        Raises:
            PeculiumError: It was refused, or there was no answer in time.
        """
        self._begin()
        future: Future[None] = Future()
        deadline = time.monotonic() + self._seconds(timeout)
        self._inbox.put(lambda _: self._brain.wait_again(ticket, future, deadline=deadline))
        return self._take(ticket, future, deadline)

    def _take(self, ticket: Ticket, future: Any, deadline: float) -> Ticket:
        span = ticket.span
        if span is None or not span.is_recording():
            return self._answered(ticket, future, deadline)
        with _trace.ending(span):
            return self._answered(ticket, future, deadline)

    def _answered(self, ticket: Ticket, future: Any, deadline: float) -> Ticket:
        try:
            try:
                future.exception(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                self._inbox.put(lambda now: self._brain.expire(ticket, now))
            future.result(_TOLD_SECONDS)
        except TimeoutError:
            # The client was closed meanwhile, by another thread.
            raise OutcomeUnknown(
                "the client was closed before there was an answer", budget=ticket.line.name
            ) from None
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            future.cancel()
            self._inbox.put(lambda now: self._brain.abandon(ticket, now))
            raise
        return ticket

    def beware(self, line: Line, operation: Operation) -> None:
        """An operation that another process has sent did not happen; it may still."""
        self._begin()
        self._inbox.put(lambda now: self._brain.beware(line, operation, now))

    @contextmanager
    def section(self, line: Line, timeout: float | None = None) -> Iterator[bytes | None]:
        """Have the line's secret for oneself, with nothing on its way that could change it."""
        if not line.linear:
            yield None
            return
        ticket = self.wait(self.submit(line, None, timeout))
        try:
            yield line.secret
        finally:
            self._inbox.put(lambda _: self._brain.leave_section(ticket))

    # --- calls that travel alone ---

    @property
    def ledger(self) -> LedgerServiceStub:
        """The agents' service."""
        self._begin()
        return self._ledger

    @property
    def admin(self) -> AdminServiceStub:
        """The operators' service."""
        self._begin()
        return self._admin

    @property
    def audit(self) -> AuditServiceStub:
        """The auditors' service."""
        self._begin()
        return self._audit

    def unary(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Q, _R],
        request: _Q,
        timeout: float | None = None,
        *,
        budget: str | None = None,
        operation_id: str | None = None,
        patient: bool = False,
    ) -> _R:
        """Call a method, again if need be, until the time is over.

        `patient`: it may take long; an answer that does not come is not taken for a lost one.

        Raises:
            PeculiumError: It was refused, or there was no answer in time.
        """
        self._begin()
        attempts = Attempts(
            replace(self._policy, attempt_seconds=math.inf) if patient else self._policy,
            _jitter,
            deadline=time.monotonic() + self._seconds(timeout),
            budget=budget,
            operation_id=operation_id,
        )
        while True:
            seconds = attempts.timeout(time.monotonic())
            known = self._history.known()
            call = self._tracing.call(method)
            metadata = self._config.metadata + call.metadata
            try:
                response = method(request, timeout=seconds, metadata=metadata)
            except grpc.RpcError as error:
                call.ended(error)
                failed = _failure(error)
            except BaseException as error:
                call.ended(error)
                raise
            else:
                call.ended()
                self._history.observe(known, response)
                return response
            time.sleep(attempts.delay(failed, time.monotonic()))

    def stream(
        self, method: grpc.UnaryStreamMultiCallable[_Q, _R], request: _Q, timeout: float | None
    ) -> Iterator[_R]:
        """Call a method that only reads, and take its answers as they come.

        Raises:
            PeculiumError: It was refused, or the stream was cut.
        """
        self._begin()
        try:
            metadata = self._config.metadata + _trace.around()
            yield from method(request, timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            failed = _failure(error)
            raise failed.refused or LedgerUnavailable(failed.message) from None

    def follow(
        self, method: grpc.UnaryStreamMultiCallable[_F, _T], request: _F, timeout: float | None
    ) -> Iterator[_T]:
        """Take the answers of a call that never ends; where it is cut, go on with the last cursor.

        `timeout`: how many seconds it may be away at a time; None: it is waited for.

        Raises:
            PeculiumError: It was refused, or was away for too long.
        """
        self._begin()
        failures, deadline = 0, math.inf
        while True:
            call = method(request, metadata=self._config.metadata + _trace.around())
            try:
                for answer in call:
                    request.cursor, request.from_beginning = answer.cursor, False
                    failures = 0
                    yield answer
                failed = Failure("the ledger has ended a stream that has no end")
            except grpc.RpcError as error:
                failed = _failure(error)
            finally:
                call.cancel()
            failures += 1
            if failures == 1 and timeout is not None:
                deadline = time.monotonic() + timeout
            delay = delay_before(failures, failed, self._policy, _jitter())
            if delay is None or time.monotonic() + delay > deadline:
                raise failed.refused or LedgerUnavailable(failed.message)
            time.sleep(delay)

    # --- its own life ---

    def open(self) -> None:
        """Connect in the background."""
        self._begin()

    def close(self) -> None:
        """Finish what is on its way, within bounds, and disconnect."""
        with self._opening:
            thread, self._closed = self._thread, True
        if thread is None or self._over:
            self.recorder.close()
            return
        self._inbox.put(self._finish)
        thread.join(CLOSE_SECONDS_DEFAULT)
        if thread.is_alive():
            _log.warning(
                "closed with %d operations of unknown outcome; holds among them lapse",
                self._brain.unresolved,
            )
            self._over = True
            self._inbox.put(self._finish)
            thread.join()
        if self._channel is not None:
            self._channel.close()
        self.recorder.close()

    def _finish(self, _: float) -> None:
        self._finishing = True

    def _begin(self, *, closing: bool = False) -> None:
        self.process.check("client")
        if self._closed and not closing:
            raise Invalid("the client is closed")
        if not closing:
            self._history.check()
        if self._thread is None:
            with self._opening:
                if self._thread is None:
                    self._channel = self._connect()
                    self._thread = threading.Thread(target=self._own, name="peculium", daemon=True)
                    self._thread.start()

    def _connect(self) -> grpc.Channel:
        target, options = self._config.target, self._config.options
        credentials = self._config.credentials
        if credentials is None:
            channel = grpc.insecure_channel(target, options=options)
        else:
            channel = grpc.secure_channel(target, credentials, options=options)
        self._ledger = ledger_service_pb2_grpc.LedgerServiceStub(channel)
        self._admin = admin_service_pb2_grpc.AdminServiceStub(channel)
        self._audit = audit_service_pb2_grpc.AuditServiceStub(channel)
        return channel

    def _seconds(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else timeout

    # --- the owner of the coalescer ---

    def _own(self) -> None:
        while not (self._over or (self._finishing and self._brain.idle)):
            try:
                self._turn()
            except Exception:  # noqa: BLE001 - a bug; it must not take the other callers with it
                _log.exception("the client has failed in an unforeseen way")

    def _turn(self) -> None:
        """Do what has come, all of it, and then send what can go: so it goes together."""
        wake_at = self._brain.wake_at()
        seconds = None if wake_at is None else max(0.0, wake_at - time.monotonic())
        with contextlib.suppress(Empty):
            self._inbox.get(timeout=seconds)(time.monotonic())
            while True:
                self._inbox.get_nowait()(time.monotonic())
        while (batch := self._brain.next_batch(time.monotonic())) is not None:
            self._send(batch)

    def _send(self, batch: Batch) -> None:
        try:
            self.recorder.flush()
        except OSError as error:
            self._brain.failed(batch, _unwritten(error), time.monotonic())
            return
        spans = (ticket.span for ticket in batch.tickets)
        told = self._tracing.call_for(self._ledger.Batch, spans)
        call: Any = self._ledger.Batch.future(
            batch.request,
            timeout=batch.timeout,
            metadata=self._config.metadata + told.metadata,
        )
        call.add_done_callback(
            lambda _: self._inbox.put(lambda now: self._land(batch, told, call, now))
        )

    def _land(self, batch: Batch, told: _trace.Call, call: Any, now: float) -> None:
        try:
            response = call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            told.ended(error)
            self._brain.failed(batch, _failure(error), now)
        else:
            told.ended()
            self._brain.completed(batch, response, now)


def _failure(error: Any) -> Failure:
    if not isinstance(error, grpc.Call):
        return Failure("the call was cancelled")
    return failure(error.code(), error.details(), tuple(error.trailing_metadata() or ()))


def _unwritten(error: OSError) -> Failure:
    return Failure(f"the journal cannot be written: {error}", not_done=True, permanent=True)


def _jitter() -> float:
    return secrets.randbelow(_JITTER_STEPS) / _JITTER_STEPS
