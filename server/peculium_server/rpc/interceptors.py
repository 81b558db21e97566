"""What surrounds every call of the ledger's services, one concern each.

A method's handler is wrapped once, when its service is added to the server: for each call there is
nothing left to be looked up or put together. Health and reflection are not surrounded: they tell nothing
of the ledger, and anybody may ask them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Protocol

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import propagate, trace

from peculium_server.core.operations import Actor, Role
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.identity import Identities, Identity
from peculium_server.lanes.answers import without_store
from peculium_server.lanes.lane import DeadlinePassed
from peculium_server.rpc import status
from peculium_server.rpc.calls import (
    CALL,
    Call,
    CallRefused,
    CallUnanswered,
)
from peculium_server.rpc.permissions import PERMISSIONS
from peculium_server.store.errors import StoreContended, StoreUnavailable

_AUTHORIZATION: Final = "authorization"
_SCHEME: Final = "bearer"
_PROCESS: Final = secrets.token_hex(4)
"""Begins the names of this process's calls, and its counter ends them."""
_numbers = itertools.count(1)

_logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""A grpc.RpcMethodHandler; its published type is that of the synchronous server."""
Serve = Callable[[Any, Context], Awaitable[Any]]
"""What a handler serves a call by; of a stream, it writes the answers itself."""


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
    """Names each call, and spans it as the caller's trace context says."""

    def __init__(self, tracers: trace.TracerProvider) -> None:
        """Name calls, and span them for those who want spans.

        Args:
            tracers: As it was configured before the server started, if it was.
        """
        # Where none is configured, spans would be made for every call and told to nobody.
        unheard = isinstance(tracers, trace.ProxyTracerProvider)
        self._tracer = None if unheard else tracers.get_tracer("peculium_server")

    def wrap(self, method: str, handler: Handler, /) -> Handler:
        """Name the calls of a method."""
        serve = _serve_of(handler)
        if self._tracer is not None:
            serve = _spanned(self._tracer, method, serve)

        async def named(request: Any, context: Context) -> Any:
            # Each call is a task with a context of its own: nothing has to be reset.
            CALL.set(Call(method, f"{_PROCESS}{next(_numbers):08x}"))
            return await serve(request, context)

        return _handler_like(handler, named, handler.request_deserializer)


def _spanned(tracer: trace.Tracer, method: str, serve: Serve) -> Serve:
    async def spanned(request: Any, context: Context) -> Any:
        metadata = {
            key: value
            for key, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        }
        with tracer.start_as_current_span(
            method.removeprefix("/"),
            context=propagate.extract(metadata),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "peculium.request_id": CALL.get().request_id},
            # An exception's text is for the log; a refused call is no error of the server's.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                return await serve(request, context)
            finally:
                if span.is_recording():
                    span.set_attribute("rpc.grpc.status_code", _code(context))

    return spanned


def _code(context: Context) -> int:
    """The number of the status that the call ends with."""
    code: Any = context.code()
    return int(code.value[0] if isinstance(code, grpc.StatusCode) else code or 0)


class ErrorInterceptor:
    """Ends a call that cannot be answered with a status; the only place where that happens."""

    def wrap(self, method: str, handler: Handler, /) -> Handler:
        """Turn whatever the rest of a call raises into a status."""
        serve = _serve_of(handler)

        async def bounded(request: Any, context: Context) -> Any:
            try:
                return await serve(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the boundary: nothing else may reach the caller
                await context.abort_with_status(_status(method, error))

        return _handler_like(handler, bounded, handler.request_deserializer)


def _status(method: str, error: Exception) -> status.Status:
    match error:
        case CallRefused():
            return status.of_refused(error.refused)
        case CallUnanswered():
            return status.of_unanswered(error.unanswered)
        case DeadlinePassed():
            return status.of_late()
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
        serve, permitted = _serve_of(handler), PERMISSIONS[method]
        identify = self._identities.identify
        # Where nobody needs a key, none is looked for.
        anybody = identify(None)

        def identified(request: Any, context: Context) -> Awaitable[Any]:
            identity = anybody or identify(_key(context))
            if identity is None:
                raise CallRefused(Refused(Refusal.UNAUTHENTICATED, {"header": _AUTHORIZATION}))
            CALL.get().actor = _actor(identity, permitted)
            return serve(request, context)

        return _handler_like(handler, identified, handler.request_deserializer)


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


def _key(context: Context) -> str | None:
    """The key that the call presents; None unless there is exactly one."""
    presented = [
        value for name, value in context.invocation_metadata() or () if name == _AUTHORIZATION
    ]
    if len(presented) != 1 or not isinstance(presented[0], str):
        return None
    scheme, _, key = presented[0].partition(" ")
    return key.strip() if scheme.lower() == _SCHEME else None


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
        serve, seconds_max = _serve_of(handler), self._seconds_max

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

        return _handler_like(handler, ending, handler.request_deserializer)


class DecodingInterceptor:
    """Parses requests: bytes that are no message are the caller's mistake, and are told so."""

    def __init__(self, seconds_max: float) -> None:
        self._seconds_max = seconds_max

    def wrap(self, _method: str, handler: Handler, /) -> Handler:
        """Take the parser out of the transport, where a failure would be an unknown error."""
        parse, serve = handler.request_deserializer, _serve_of(handler)

        def parsed(request: bytes) -> Any:
            try:
                return parse(request)
            except DecodeError as error:
                raise CallRefused.malformed("request", "is not a message of this method") from error

        def unary(request: bytes, context: Context) -> Awaitable[Any]:
            return serve(parsed(request), context)

        async def stream(request: bytes, context: Context) -> None:
            # Closed here and now, in the task and the context that it was begun in.
            async with aclosing(handler.unary_stream(parsed(request), context)) as answers:
                async for answer in answers:
                    await self._hand_over(answer, context)

        return _handler_like(handler, stream if handler.response_streaming else unary, None)

    async def _hand_over(self, answer: Any, context: Context) -> None:
        """Write an answer of a stream, to a caller who may be slow, but not without end."""
        try:
            async with asyncio.timeout(self._seconds_max):
                await context.write(answer)
        except TimeoutError as error:
            raise DeadlinePassed from error


def _serve_of(handler: Handler) -> Serve:
    serve: Serve = handler.unary_stream if handler.response_streaming else handler.unary_unary
    return serve


def _handler_like(handler: Handler, serve: Serve, deserializer: Any) -> Handler:
    """The same method, served by another function."""
    make: Any = (
        grpc.unary_stream_rpc_method_handler
        if handler.response_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(serve, deserializer, handler.response_serializer)
