"""What surrounds every call of the ledger's services, one concern each.

A method's handler is wrapped once, when its service is added to the server: for each call there is
nothing left to be looked up or put together. Health and reflection are not surrounded: they tell nothing
of the ledger, and anybody may ask them.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import propagate, trace

from peculium_server.certificates import CertificateUnusable, read_certificate
from peculium_server.core.operations import Actor, Role
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.identity import (
    STALE_SECONDS_MAX,
    Certificate,
    Identities,
    Identity,
    KeysOutdated,
)
from peculium_server.lanes.answers import (
    UNAVAILABLE_RETRY_MS,
    Unanswered,
    Unavailability,
    without_store,
)
from peculium_server.lanes.lane import DeadlinePassed
from peculium_server.rpc import scope, status
from peculium_server.rpc.call_log import calls_are_logged, log_call
from peculium_server.rpc.calls import (
    CALL,
    Call,
    CallRefused,
    CallUnanswered,
)
from peculium_server.rpc.permissions import ROWS, Names
from peculium_server.rpc.tls import peer_certificate
from peculium_server.store.errors import StoreContended, StoreUnavailable
from peculium_server.telemetry import spans
from peculium_server.telemetry.instruments import label_of
from peculium_server.telemetry.meters import Meters

_AUTHORIZATION: Final = "authorization"
_SCHEME: Final = "bearer"
_PROCESS: Final = secrets.token_hex(4)
"""Begins the names of this process's calls, and its counter ends them."""
_numbers = itertools.count(1)
_TRACEPARENT: Final = "traceparent"
_SLOW_SECONDS: Final = 1.0
"""Who takes longer for a request is asked again who they are: their key may have ended meanwhile."""
_CUT_OFF_SECONDS: Final = 1.0
"""By then the transport has ended a call whose request will not come."""
_STATUS_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}
_SERVER_ERRORS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Statuses that are the server's fault; others are the caller's, and no errors of the server's span."""

_logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""A grpc.RpcMethodHandler; its published type is that of the synchronous server."""
Serve = Callable[[Any, Context], Awaitable[Any]]
"""What a handler serves a call by, whose request it asks the context for; of a stream, it writes the answers
itself."""

_Step = TypeVar("_Step")


class Interceptor(Protocol):
    """One concern of every call."""

    def wrap(self, method: str, handler: Handler, /) -> Handler:
        """Surround the handler of one of the ledger's methods."""
        ...


class Registry:
    """Takes services as a server does, and adds them to it with their handlers surrounded."""

    def __init__(self, server: grpc.aio.Server, interceptors: Sequence[Interceptor]) -> None:
        """Surround what is added.

        Args:
            server: To which it is added.
            interceptors: From the outside to the inside.
        """
        self._server = server
        self._interceptors = interceptors

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """Add nothing yet: the same handlers come once more, by name."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Surround a service's handlers, and add them.

        They are added as generic ones: for registered methods the server waits one by one, and begins
        and ends all these waits for every call.
        """
        surrounded = {
            name: self._surround(f"/{service}/{name}", handler)
            for name, handler in handlers.items()
        }
        generic = grpc.method_handlers_generic_handler(service, surrounded)
        self._server.add_generic_rpc_handlers((generic,))

    def _surround(self, method: str, handler: Handler) -> Handler:
        for interceptor in reversed(self._interceptors):
            handler = interceptor.wrap(method, handler)
        return handler


class TelemetryInterceptor:
    """Names each call, spans it as the caller's trace context says, measures it, and logs it."""

    def __init__(
        self, tracers: trace.TracerProvider, meters: Meters | None = None, *, one_in: int = 1
    ) -> None:
        """Name calls, and tell of them those who want to know.

        Args:
            tracers: As it was configured before the server started, if it was.
            meters: Counts what happens, if anybody wants to know.
            one_in: Of the calls that come without a trace context one in so many is spanned.
        """
        # Where none is configured, spans would be made for every call and told to nobody.
        unheard = isinstance(tracers, trace.ProxyTracerProvider)
        self._tracer = None if unheard else tracers.get_tracer("peculium_server")
        self._meters = meters
        self._one_in = one_in

    def wrap(self, method: str, handler: Handler, /) -> Handler:
        """Name the calls of a method."""
        serve, name = serve_of(handler), method.removeprefix("/")
        if self._meters is not None or calls_are_logged():
            serve = _watched(name, serve, self._meters)
        if self._tracer is not None:
            serve = _spanned(self._tracer, name, serve, self._one_in)

        async def named(request: Any, context: Context) -> Any:
            call = Call(method, f"{_PROCESS}{next(_numbers):08x}")
            for key, value in context.invocation_metadata() or ():
                if key == _TRACEPARENT and isinstance(value, str):
                    call.traceparent = value
            # Each call is a task with a context of its own: nothing has to be reset.
            CALL.set(call)
            return await serve(request, context)

        return handler_like(handler, named)


def _spanned(tracer: trace.Tracer, name: str, serve: Serve, one_in: int) -> Serve:
    numbers = itertools.count()

    async def spanned(request: Any, context: Context) -> Any:
        call = CALL.get()
        if not call.traceparent and next(numbers) % one_in:
            # Decided here, since a span that nobody will see costs as much as a few other things together.
            return await serve(request, context)
        # Several fields of one name are one, in their order.
        metadata: dict[str, list[str]] = {}
        for key, value in context.invocation_metadata() or ():
            if isinstance(value, str):
                metadata.setdefault(key, []).append(value)
        with tracer.start_as_current_span(
            name,
            context=propagate.extract(metadata),
            kind=trace.SpanKind.SERVER,
            attributes={
                "rpc.system.name": "grpc",
                "rpc.method": name,
                "peculium.request_id": call.request_id,
            },
            # An exception's text is for the log; a refused call is no error of the server's.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            cancelled = False
            try:
                return await serve(request, context)
            except asyncio.CancelledError:
                cancelled = True
                raise
            finally:
                if span.is_recording():
                    _finish(span, call, _status_name(context, cancelled=cancelled))

    return spanned


def _finish(span: trace.Span, call: Call, ended: str) -> None:
    """Say on a call's span what has become of it."""
    span.set_attribute("rpc.response.status_code", ended)
    if call.operations:
        span.set_attribute("peculium.operations", call.operations)
    if call.refused:
        span.set_attribute("peculium.refusals", [label_of(reason) for reason in call.refused])
    if ended in _SERVER_ERRORS:
        spans.fail(span, ended)


def _watched(name: str, serve: Serve, meters: Meters | None) -> Serve:
    """Measure and log the calls of a method."""

    async def watched(request: Any, context: Context) -> Any:
        begun, cancelled = time.monotonic(), False
        try:
            return await serve(request, context)
        except asyncio.CancelledError:
            cancelled = True
            raise
        finally:
            seconds = time.monotonic() - begun
            ended, call = _status_name(context, cancelled=cancelled), CALL.get()
            if meters is not None:
                meters.called(name, ended, seconds)
                for reason, number in call.refused.items():
                    meters.refused(reason, number)
            log_call(name, ended, seconds, call)

    return watched


def _status_name(context: Context, *, cancelled: bool) -> str:
    """The status that a call ends with, by its name on the wire."""
    if cancelled:
        return grpc.StatusCode.CANCELLED.name
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    return _STATUS_NAMES.get(code or 0, grpc.StatusCode.UNKNOWN.name)


class ErrorInterceptor:
    """Ends a call that cannot be answered with a status; the only place where that happens."""

    def wrap(self, method: str, handler: Handler, /) -> Handler:
        """Turn whatever the rest of a call raises into a status."""
        serve = serve_of(handler)

        async def bounded(request: Any, context: Context) -> Any:
            try:
                return await serve(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the boundary: nothing else may reach the caller
                await context.abort_with_status(_status(method, error))

        return handler_like(handler, bounded)


def _status(method: str, error: Exception) -> status.Status:
    match error:
        case CallRefused():
            CALL.get().refuse(error.refused.reason)
            return status.of_refused(error.refused)
        case CallUnanswered():
            return status.of_unanswered(error.unanswered)
        case DeadlinePassed():
            return status.of_late()
        case KeysOutdated():
            facts = {"limit_seconds": f"{STALE_SECONDS_MAX:g}"}
            unanswered = Unanswered(Unavailability.KEYS_OUTDATED, facts, UNAVAILABLE_RETRY_MS)
            return status.of_unanswered(unanswered)
        case StoreUnavailable() | StoreContended():
            return status.of_unanswered(without_store(error))
        case _:
            request_id = CALL.get().request_id
            _logger.error("%s failed, request %s", method, request_id, exc_info=error)
            return status.of_unknown(request_id)


class IdentityInterceptor:
    """Finds out who calls, and lets nobody do what no role of theirs may do."""

    def __init__(self, identities: Identities) -> None:
        self._identities = identities

    def wrap(self, method: str, handler: Handler, /) -> Handler:
        """Serve a method to whom their credentials say, if they may call it."""
        serve, row = serve_of(handler), ROWS[method]

        def identified(request: Any, context: Context) -> Awaitable[Any]:
            identity, call = self._identify(context), CALL.get()
            call.actor = _actor(identity, row.roles)
            call.key_id, call.roots = identity.key_id, identity.roots
            call.check = functools.partial(self._check_again, context, identity)
            if row.names is Names.ALL:
                scope.check_all_roots()
            return serve(request, context)

        return handler_like(handler, identified)

    def _check_again(self, context: Context, identity: Identity) -> None:
        """End a call whose caller has lost what it began with.

        Raises:
            CallRefused: The key was revoked, or has expired; or another is meant by it now.
            KeysOutdated: That is not known.
        """
        if self._identify(context) != identity:
            raise _unauthenticated()

    def _identify(self, context: Context) -> Identity:
        """Who calls.

        Raises:
            CallRefused: Nobody who is known.
            KeysOutdated: Who is known, is not known.
        """
        identities = self._identities
        # Where nobody needs a key, none is looked for.
        identity = (
            identities.identify(None)
            if identities.dev_mode
            else identities.identify(*_credentials(context))
        )
        if identity is None:
            raise _unauthenticated()
        return identity


def _actor(identity: Identity, permitted: Sequence[Role]) -> Actor:
    """The caller in the role in which they may call."""
    for role in permitted:
        if role in identity.roles:
            return Actor(identity.principal, role)
    facts = {
        "principal": identity.principal,
        "role": " ".join(sorted(role.name.lower() for role in identity.roles)),
        "needs": " or ".join(role.name.lower() for role in permitted),
    }
    raise CallRefused(Refused(Refusal.PERMISSION_DENIED, facts))


def _credentials(context: Context) -> tuple[str | None, Certificate | None]:
    """The key that the call presents; only if there is none, the certificate of its connection.

    Raises:
        CallRefused: The header is not one key, or there is none and the certificate names nobody.
    """
    presented = [
        value for name, value in context.invocation_metadata() or () if name == _AUTHORIZATION
    ]
    if not presented:
        pem = peer_certificate(context)
        try:
            return None, None if pem is None else read_certificate(pem)
        except CertificateUnusable as error:
            facts = {"certificate": str(error)}
            raise CallRefused(Refused(Refusal.UNAUTHENTICATED, facts)) from None
    if len(presented) != 1 or not isinstance(presented[0], str):
        raise _unauthenticated()
    scheme, _, key = presented[0].partition(" ")
    if scheme.lower() != _SCHEME:
        raise _unauthenticated()
    return key.strip(), None


def _unauthenticated() -> CallRefused:
    return CallRefused(Refused(Refusal.UNAUTHENTICATED, {"header": _AUTHORIZATION}))


class DeadlineInterceptor:
    """Gives every call an end: the caller's, or the server's own where that is sooner.

    A stream is as long as what it tells; it ends when its caller goes, or takes no answer for so long.
    """

    def __init__(self, seconds_max: float) -> None:
        self._seconds_max = seconds_max

    def wrap(self, _method: str, handler: Handler, /) -> Handler:
        """Serve the calls of a method until their end; leave streams as they are."""
        if handler.response_streaming:
            return handler
        serve, seconds_max = serve_of(handler), self._seconds_max

        async def ending(request: Any, context: Context) -> Any:
            # None without a deadline, whatever the published type says.
            remaining: float | None = context.time_remaining()
            seconds = seconds_max if remaining is None else min(remaining, seconds_max)
            CALL.get().deadline = deadline = asyncio.get_running_loop().time() + seconds
            end = asyncio.timeout_at(deadline)
            try:
                async with end:
                    return await serve(request, context)
            except TimeoutError as error:
                if end.expired():
                    raise DeadlinePassed from error
                raise

        return handler_like(handler, ending)


class DecodingInterceptor:
    """Receives requests and parses them: bytes that are no message are the caller's mistake, and are told so.

    This is the innermost one. Would the transport do it, it would wait for each request, however long its
    caller takes and however large it is, before anybody is asked who calls.
    """

    def __init__(self, seconds_max: float) -> None:
        self._seconds_max = seconds_max

    def wrap(self, _method: str, handler: Handler, /) -> Handler:
        """Serve a method as it was written, with a request that is there and was parsed."""
        parse, unary, streaming = (
            handler.request_deserializer,
            handler.unary_unary,
            handler.unary_stream,
        )

        async def received(context: Context) -> Any:
            request = await context.read()
            if request is grpc.aio.EOF:
                # Who has gone, or says more than may be said, is cut off by the transport, and so is this.
                await asyncio.sleep(_CUT_OFF_SECONDS)
                raise CallRefused.malformed("request", "is missing")
            try:
                return parse(request)
            except DecodeError as error:
                raise CallRefused.malformed("request", "is not a message of this method") from error

        async def one(_requests: Any, context: Context) -> Any:
            begun, check = time.monotonic(), CALL.get().check
            request = await received(context)
            if check is not None and time.monotonic() - begun > _SLOW_SECONDS:
                check()
            return await unary(request, context)

        async def stream(_requests: Any, context: Context) -> None:
            check = CALL.get().check
            request = await self._in_time(received(context))
            # Closed here and now, in the task and the context that it was begun in.
            async with aclosing(streaming(request, context)) as answers:
                async for answer in answers:
                    if check is not None:
                        check()
                    await self._in_time(context.write(answer))

        return handler_like(handler, stream if handler.response_streaming else one)

    async def _in_time(self, step: Awaitable[_Step]) -> _Step:
        """Wait for the caller of a stream, who may be slow to ask and to listen, but not without end."""
        try:
            async with asyncio.timeout(self._seconds_max):
                return await step
        except TimeoutError as error:
            raise DeadlinePassed from error


def serve_of(handler: Handler) -> Serve:
    """What serves the calls of a method that an interceptor has wrapped."""
    serve: Serve = handler.stream_stream if handler.response_streaming else handler.stream_unary
    return serve


def handler_like(handler: Handler, serve: Serve) -> Handler:
    """The same method, served by another function, to which a call comes before its request does."""
    make: Any = (
        grpc.stream_stream_rpc_method_handler
        if handler.response_streaming
        else grpc.stream_unary_rpc_method_handler
    )
    return make(serve, None, handler.response_serializer)
