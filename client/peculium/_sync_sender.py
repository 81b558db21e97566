"""Sends what the coalescer says, for any number of threads.

There is no thread of our own on the way: a call that finds something to send starts it, and grpc's
thread that brings the answer starts what has gathered meanwhile.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from peculium._coalescer import Batch, Coalescer, Line, Ticket
from peculium._config import CLOSE_SECONDS_DEFAULT, Config
from peculium._handles import Process
from peculium._requests import Operation
from peculium._retry import Attempts, Failure, Policy
from peculium._translation import failure
from peculium.errors import Invalid, LedgerUnavailable
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

_Q = TypeVar("_Q")
_R = TypeVar("_R")

_log = logging.getLogger("peculium")


class Sender:
    """One connection, shared by the threads of one process."""

    def __init__(self, config: Config, policy: Policy | None = None) -> None:
        self.process = Process()
        self.timeout = config.timeout
        self._config = config
        self._policy = policy or Policy()
        self._brain = Coalescer(policy=self._policy, jitter=_jitter, flights_max=FLIGHTS_MAX)
        self._lock = threading.RLock()
        """Guards the brain and everything below."""
        self._quiet = threading.Condition(self._lock)
        self._channel: grpc.Channel | None = None
        self._closed = False
        self._timer: threading.Timer | None = None
        self._timer_at = 0.0
        self._calls: set[Any] = set()
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
        with self._lock:
            self._begin()
            now = time.monotonic()
            until = now + (wait or 0.0)
            ticket = self._brain.submit(
                line,
                operation,
                Future(),
                now=now,
                deadline=until + self._seconds(timeout),
                wait_until=until if wait else 0.0,
            )
        self._pump()
        return ticket

    def detach(self, line: Line, operation: Operation) -> Ticket:
        """Put an operation on its way that has to happen although nobody waits for it."""
        with self._lock:
            self._begin(closing=True)
            now = time.monotonic()
            ticket = self._brain.submit(line, operation, None, now=now, deadline=now)
        self._pump()
        return ticket

    def wait(self, ticket: Ticket) -> Ticket:
        """Wait for an operation that was submitted, until its deadline.

        Raises:
            PeculiumError: It was refused, or there was no answer in time.
        """
        future: Any = ticket.future
        try:
            try:
                future.exception(max(0.0, ticket.deadline - time.monotonic()))
            except TimeoutError:
                with self._lock:
                    self._brain.expire(ticket, time.monotonic())
                self._pump()
            done: Ticket = future.result()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            with self._lock:
                future.cancel()
                self._brain.abandon(ticket, time.monotonic())
            self._pump()
            raise
        return done

    def wait_again(self, ticket: Ticket, timeout: float | None = None) -> Ticket:
        """Wait for an operation once more whose outcome was unknown.

        Raises:
            PeculiumError: It was refused, or there was no answer in time.
        """
        with self._lock:
            self._begin()
            deadline = time.monotonic() + self._seconds(timeout)
            self._brain.wait_again(ticket, Future(), deadline=deadline)
        self._pump()
        return self.wait(ticket)

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
            with self._lock:
                self._brain.leave_section(ticket)
            self._pump()

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
    ) -> _R:
        """Call a method, again if need be, until the time is over.

        Raises:
            PeculiumError: It was refused, or there was no answer in time.
        """
        self._begin()
        attempts = Attempts(
            self._policy,
            _jitter,
            deadline=time.monotonic() + self._seconds(timeout),
            budget=budget,
            operation_id=operation_id,
        )
        while True:
            seconds = attempts.timeout(time.monotonic())
            try:
                return method(request, timeout=seconds, metadata=self._config.metadata)
            except grpc.RpcError as error:
                failed = _failure(error)
            time.sleep(attempts.delay(failed, time.monotonic()))

    def stream(self, method: grpc.UnaryStreamMultiCallable[_Q, _R], request: _Q) -> Iterator[_R]:
        """Call a method that only reads, and take its answers as they come.

        Raises:
            PeculiumError: It was refused, or the stream was cut.
        """
        self._begin()
        try:
            yield from method(request, timeout=None, metadata=self._config.metadata)
        except grpc.RpcError as error:
            failed = _failure(error)
            raise failed.refused or LedgerUnavailable(failed.message) from None

    # --- its own life ---

    def open(self) -> None:
        """Connect in the background."""
        self._begin()

    def close(self) -> None:
        """Finish what is on its way, within bounds, and disconnect."""
        with self._lock:
            if self._closed or self._channel is None:
                self._closed = True
                return
            self._closed = True
            if not self._quiet.wait_for(lambda: self._brain.idle, CLOSE_SECONDS_DEFAULT):
                _log.warning(
                    "closed with %d operations of unknown outcome; holds among them lapse",
                    self._brain.unresolved,
                )
            if self._timer is not None:
                self._timer.cancel()
            channel = self._channel
        # Without the lock: closing waits for grpc's threads, which take it.
        channel.close()

    def _begin(self, *, closing: bool = False) -> None:
        self.process.check("client")
        with self._lock:
            if self._closed and not closing:
                raise Invalid("the client is closed")
            if self._channel is None:
                self._channel = self._connect()

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

    def _pump(self) -> None:
        """Send whatever can go."""
        while True:
            with self._lock:
                batch = self._brain.next_batch(time.monotonic())
                if batch is None:
                    self._set_timer()
                    if self._brain.idle:
                        self._quiet.notify_all()
                    return
            self._send(batch)

    def _set_timer(self) -> None:
        wake_at = self._brain.wake_at()
        if self._timer is not None and (wake_at is None or wake_at != self._timer_at):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and wake_at is not None:
            self._timer_at = wake_at
            self._timer = threading.Timer(max(0.0, wake_at - time.monotonic()), self._wake)
            self._timer.daemon = True
            self._timer.start()

    def _wake(self) -> None:
        with self._lock:
            self._timer = None
        self._pump()

    def _send(self, batch: Batch) -> None:
        def done(call: grpc.Future[Any]) -> None:
            self._take(batch, call)

        call = self._ledger.Batch.future(
            batch.request, timeout=batch.timeout, metadata=self._config.metadata
        )
        call.add_done_callback(done)

    def _take(self, batch: Batch, call: Any) -> None:
        try:
            response = call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            failed = _failure(error)
            with self._lock:
                self._brain.failed(batch, failed, time.monotonic())
        else:
            with self._lock:
                self._brain.completed(batch, response, time.monotonic())
        self._pump()


def _failure(error: Any) -> Failure:
    if not isinstance(error, grpc.Call):
        return Failure("the call was cancelled")
    return failure(error.code(), error.details(), tuple(error.trailing_metadata() or ()))


def _jitter() -> float:
    return secrets.randbelow(_JITTER_STEPS) / _JITTER_STEPS
