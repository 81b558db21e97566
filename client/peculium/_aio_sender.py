"""Sends what the coalescer says, on an event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Coroutine, Generator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc

from peculium import _trace
from peculium._coalescer import Batch, Coalescer, Line, Ticket
from peculium._config import CLOSE_SECONDS_DEFAULT, Config
from peculium._deadlines import Deadlines
from peculium._handles import Process
from peculium._history import History
from peculium._recorder import Recorder
from peculium._requests import Operation
from peculium._retry import Attempts, Failure, Policy, Resumable, Resuming, delay_before
from peculium._translation import failure
from peculium.errors import Invalid, LedgerUnavailable
from peculium.v1 import (
    admin_service_pb2_grpc,
    audit_service_pb2_grpc,
    ledger_service_pb2,
    ledger_service_pb2_grpc,
)

if TYPE_CHECKING:
    from peculium.v1.admin_service_pb2_grpc import AdminServiceAsyncStub
    from peculium.v1.audit_service_pb2_grpc import AuditServiceAsyncStub
    from peculium.v1.ledger_service_pb2_grpc import LedgerServiceAsyncStub

FLIGHTS_MAX = 4
"""How many batches are on their way at once: enough to keep the ledger busy, few enough to be full."""

_JITTER_STEPS = 1 << 20

_Q = TypeVar("_Q")
_R = TypeVar("_R")
_F = TypeVar("_F", bound=Resuming)
_T = TypeVar("_T", bound=Resumable)
_T_co = TypeVar("_T_co", covariant=True)

_log = logging.getLogger("peculium")


class AsyncContext(Protocol[_T_co]):
    """What can be entered with `async with`."""

    async def __aenter__(self) -> _T_co:
        """Enter."""
        ...

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave."""
        ...


_C = TypeVar("_C", bound=AsyncContext[Any])


class Pending(Coroutine[Any, Any, _C]):
    """A handle that is being made: await it, enter it with `async with`, or make a task of it."""

    def __init__(self, making: Coroutine[Any, Any, _C]) -> None:
        self._making = making
        self._made: _C | None = None

    def __await__(self) -> Generator[Any, Any, _C]:
        """Wait until it is made."""
        return self._making.__await__()

    def send(self, value: Any, /) -> Any:
        """As of any coroutine."""
        return self._making.send(value)

    def throw(self, *error: Any) -> Any:
        """As of any coroutine."""
        return self._making.throw(*error)

    def close(self) -> None:
        """As of any coroutine."""
        self._making.close()

    async def __aenter__(self) -> _C:
        """Wait until it is made, and enter it."""
        self._made = await self._making
        await self._made.__aenter__()
        return self._made

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave it."""
        if self._made is not None:
            await self._made.__aexit__(exc_type, exc, traceback)


class Sender:
    """One connection, and the tasks that use it."""

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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: grpc.aio.Channel | None = None
        self._closed = False
        self._pump_soon = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._deadlines = Deadlines()
        self._looking: asyncio.TimerHandle | None = None
        self._looking_at = math.inf
        self._tasks: set[asyncio.Task[None]] = set()
        self._quiet: asyncio.Event | None = None
        self._ledger: LedgerServiceAsyncStub
        self._admin: AdminServiceAsyncStub
        self._audit: AuditServiceAsyncStub

    # --- operations ---

    def submit(
        self,
        line: Line,
        operation: Operation | None,
        timeout: float | None = None,
        wait: float | None = None,
    ) -> Ticket:
        """Put an operation on its way; `wait` for it. The time runs from now."""
        loop = self._begin()
        until = loop.time() + (wait or 0.0)
        deadline = until + self._seconds(timeout)
        ticket = Ticket(line, operation, loop.create_future(), deadline, until if wait else 0.0)
        ticket.span = self._tracing.begin(operation, line.name, line.handed)
        self._brain.submit(ticket)
        self._soon(loop)
        return ticket

    def detach(self, line: Line, operation: Operation) -> None:
        """Put an operation on its way that has to happen although nobody waits for it."""
        loop = self._begin(closing=True)
        self._brain.submit(Ticket(line, operation, None, loop.time()))
        self._soon(loop)

    async def wait(self, ticket: Ticket) -> Ticket:
        """Wait for an operation that was submitted, until its deadline.

        Raises:
            PeculiumError: It was refused, or there was no answer in time.
        """
        span = ticket.span
        if span is None or not span.is_recording():
            return await self._answered(ticket)
        with _trace.ending(span):
            return await self._answered(ticket)

    async def _answered(self, ticket: Ticket) -> Ticket:
        future: Any = ticket.future
        loop: asyncio.AbstractEventLoop = future.get_loop()
        self._look_at(loop, self._deadlines.add(ticket))
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                # Looked at, so that the event loop does not complain of an error nobody saw.
                future.exception()
            self._brain.abandon(ticket, loop.time())
            self._soon(loop)
            raise
        else:
            return ticket
        finally:
            self._deadlines.leave()

    async def wait_again(self, ticket: Ticket, timeout: float | None = None) -> Ticket:
        """Wait for an operation once more whose outcome was unknown.

        Raises:
            PeculiumError: It was refused, or there was no answer in time.
        """
        loop = self._begin()
        deadline = loop.time() + self._seconds(timeout)
        self._brain.wait_again(ticket, loop.create_future(), deadline=deadline)
        self._soon(loop)
        return await self.wait(ticket)

    def beware(self, line: Line, operation: Operation) -> None:
        """An operation that another process has sent did not happen; it may still."""
        loop = self._begin()
        self._brain.beware(line, operation, loop.time())
        self._soon(loop)

    @asynccontextmanager
    async def section(
        self, line: Line, timeout: float | None = None
    ) -> AsyncIterator[bytes | None]:
        """Have the line's secret for oneself, with nothing on its way that could change it."""
        if not line.linear:
            yield None
            return
        ticket = await self.wait(self.submit(line, None, timeout))
        try:
            yield line.secret
        finally:
            self._brain.leave_section(ticket)
            self._soon(self._begin(closing=True))

    # --- calls that travel alone ---

    @property
    def ledger(self) -> LedgerServiceAsyncStub:
        """The agents' service."""
        self._begin()
        return self._ledger

    @property
    def admin(self) -> AdminServiceAsyncStub:
        """The operators' service."""
        self._begin()
        return self._admin

    @property
    def audit(self) -> AuditServiceAsyncStub:
        """The auditors' service."""
        self._begin()
        return self._audit

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Q, _R],
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
        loop = self._begin()
        attempts = Attempts(
            replace(self._policy, attempt_seconds=math.inf) if patient else self._policy,
            _jitter,
            deadline=loop.time() + self._seconds(timeout),
            budget=budget,
            operation_id=operation_id,
        )
        while True:
            seconds = attempts.timeout(loop.time())
            known = self._history.known()
            call = self._tracing.call(method)
            metadata = self._config.metadata + call.metadata
            try:
                response = await method(request, timeout=seconds, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                call.ended(error)
                failed = _failure(error)
            except BaseException as error:
                call.ended(error)
                raise
            else:
                call.ended()
                self._history.observe(known, response)
                return response
            await asyncio.sleep(attempts.delay(failed, loop.time()))

    async def stream(
        self, method: grpc.aio.UnaryStreamMultiCallable[_Q, _R], request: _Q, timeout: float | None
    ) -> AsyncIterator[_R]:
        """Call a method that only reads, and take its answers as they come.

        Raises:
            PeculiumError: It was refused, or the stream was cut.
        """
        self._begin()
        try:
            metadata = self._config.metadata + _trace.around()
            async for answer in method(request, timeout=timeout, metadata=metadata):
                yield answer
        except grpc.aio.AioRpcError as error:
            failed = _failure(error)
            raise failed.refused or LedgerUnavailable(failed.message) from None

    async def follow(
        self, method: grpc.aio.UnaryStreamMultiCallable[_F, _T], request: _F, timeout: float | None
    ) -> AsyncIterator[_T]:
        """Take the answers of a call that never ends; where it is cut, go on with the last cursor.

        `timeout`: how many seconds it may be away at a time; None: it is waited for.

        Raises:
            PeculiumError: It was refused, or was away for too long.
        """
        loop = self._begin()
        failures, deadline = 0, math.inf
        while True:
            call = method(request, metadata=self._config.metadata + _trace.around())
            try:
                async for answer in call:
                    request.cursor, request.from_beginning = answer.cursor, False
                    failures = 0
                    yield answer
                failed = Failure("the ledger has ended a stream that has no end")
            except grpc.aio.AioRpcError as error:
                failed = _failure(error)
            finally:
                call.cancel()
            failures += 1
            if failures == 1 and timeout is not None:
                deadline = loop.time() + timeout
            delay = delay_before(failures, failed, self._policy, _jitter())
            if delay is None or loop.time() + delay > deadline:
                raise failed.refused or LedgerUnavailable(failed.message)
            await asyncio.sleep(delay)

    # --- its own life ---

    async def open(self) -> None:
        """Connect in the background."""
        self._begin()

    async def close(self) -> None:
        """Finish what is on its way, within bounds, and disconnect."""
        if self._closed or self._loop is None:
            self._closed = True
            self.recorder.close()
            return
        self._closed = True
        self._quiet = asyncio.Event()
        self._soon(self._loop)
        try:
            async with asyncio.timeout(CLOSE_SECONDS_DEFAULT):
                await self._quiet.wait()
        except TimeoutError:
            _log.warning(
                "closed with %d operations of unknown outcome; holds among them lapse",
                self._brain.unresolved,
            )
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for task in self._tasks:
                task.cancel()
            if self._channel is not None:
                await self._channel.close()
            self.recorder.close()

    def _begin(self, *, closing: bool = False) -> asyncio.AbstractEventLoop:
        self.process.check("client")
        if self._closed and not closing:
            raise Invalid("the client is closed")
        if not closing:
            self._history.check()
        running = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = running
            self._connect()
        elif running is not self._loop:
            raise Invalid("the client belongs to another event loop: make one for each")
        return self._loop

    def _connect(self) -> None:
        target, options = self._config.target, self._config.options
        credentials = self._config.credentials
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options=options)
        self._ledger = ledger_service_pb2_grpc.LedgerServiceStub(self._channel)
        self._admin = admin_service_pb2_grpc.AdminServiceStub(self._channel)
        self._audit = audit_service_pb2_grpc.AuditServiceStub(self._channel)

    def _seconds(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else timeout

    def _look_at(self, loop: asyncio.AbstractEventLoop, time: float) -> None:
        """Look for callers whose time is over, not later than then."""
        if time < self._looking_at:
            if self._looking is not None:
                self._looking.cancel()
            self._looking_at = time
            self._looking = loop.call_at(time, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._looking, self._looking_at = None, math.inf
        now = loop.time()
        for ticket in self._deadlines.due(now):
            self._brain.expire(ticket, now)
            self._soon(loop)
        self._look_at(loop, self._deadlines.next())

    def _soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send once the tasks that are ready now have had their say: they go together."""
        if not self._pump_soon:
            self._pump_soon = True
            loop.call_soon(self._pump, loop)

    def _pump(self, loop: asyncio.AbstractEventLoop) -> None:
        self._pump_soon = False
        while (batch := self._brain.next_batch(loop.time())) is not None:
            # Unless something has to be written before, the call begins right now.
            doing = (
                self._write(batch, loop)
                if self.recorder.durable
                else self._land(batch, self._call(batch), loop)
            )
            task = loop.create_task(doing)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._set_timer(loop)
        if self._quiet is not None and self._brain.idle:
            self._quiet.set()

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        wake_at = self._brain.wake_at()
        if self._timer is not None and (wake_at is None or wake_at != self._timer_at):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and wake_at is not None:
            self._timer_at = wake_at
            self._timer = loop.call_at(wake_at, self._wake, loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._soon(loop)

    async def _write(self, batch: Batch, loop: asyncio.AbstractEventLoop) -> None:
        try:
            await loop.run_in_executor(None, self.recorder.flush)
        except OSError as error:
            self._brain.failed(batch, _unwritten(error), loop.time())
            self._soon(loop)
        else:
            await self._land(batch, self._call(batch), loop)

    def _call(
        self, batch: Batch
    ) -> tuple[_trace.Call, Awaitable[ledger_service_pb2.BatchResponse]]:
        spans = (ticket.span for ticket in batch.tickets)
        told = self._tracing.call_for(self._ledger.Batch, spans)
        call = self._ledger.Batch(
            batch.request,
            timeout=batch.timeout,
            metadata=self._config.metadata + told.metadata,
        )
        return told, call

    async def _land(
        self,
        batch: Batch,
        calling: tuple[_trace.Call, Awaitable[ledger_service_pb2.BatchResponse]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        told, call = calling
        try:
            response = await call
        except grpc.aio.AioRpcError as error:
            told.ended(error)
            self._brain.failed(batch, _failure(error), loop.time())
        else:
            told.ended()
            self._brain.completed(batch, response, loop.time())
        self._soon(loop)


def _failure(error: grpc.aio.AioRpcError) -> Failure:
    return failure(error.code(), error.details(), tuple(error.trailing_metadata()))


def _unwritten(error: OSError) -> Failure:
    return Failure(f"the journal cannot be written: {error}", not_done=True, permanent=True)


def _jitter() -> float:
    return secrets.randbelow(_JITTER_STEPS) / _JITTER_STEPS
