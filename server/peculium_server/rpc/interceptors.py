"""What surrounds every call of the ledger's services, one concern each.

Health and reflection are not surrounded: they tell nothing of the ledger, and anybody may ask them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import propagate, trace

from peculium_server.core.operations import Actor
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.identity import Identities
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
_REQUEST_ID_BYTES: Final = 8

_logger = logging.getLogger(__name__)
_tracer = trace.get_tracer("peculium_server")

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""A grpc.RpcMethodHandler; its published type is that of the synchronous server."""


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps the handler of each of the ledger's methods; a wrapper is made once and kept."""

    def __init__(self) -> None:
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Give the wrapped handler of the method that is called."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if method not in PERMISSIONS:
            return handler
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            wrapped = self._wrapped[method] = self.wrap(method, handler)
        return wrapped

    def wrap(self, method: str, handler: Handler, /) -> Handler:
        """Surround a handler, whether it answers once or writes a stream."""
        serve = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def surrounded(request: Any, context: Context) -> Any:
            async with self.around(method, context):
                return await serve(request, context)

        return _handler_like(handler, surrounded, handler.request_deserializer)

    def around(self, method: str, context: Context, /) -> AbstractAsyncContextManager[None]:
        """What happens before and after the rest of the call."""
        raise NotImplementedError


class TelemetryInterceptor(Interceptor):
    """Names each call, and spans it as the caller's trace context says."""

    @asynccontextmanager
    async def around(self, method: str, context: Context, /) -> AsyncIterator[None]:
        """Serve the rest of the call in a span."""
        metadata = {
            key: value
            for key, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        }
        request_id = secrets.token_hex(_REQUEST_ID_BYTES)
        # Each call is a task with a context of its own: nothing has to be reset.
        CALL.set(Call(method, request_id))
        with _tracer.start_as_current_span(
            method.removeprefix("/"),
            context=propagate.extract(metadata),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "peculium.request_id": request_id},
            # An exception's text is for the log; a refused call is no error of the server's.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            finally:
                if span.is_recording():
                    span.set_attribute("rpc.grpc.status_code", _code(context))


def _code(context: Context) -> int:
    """The number of the status that the call ends with."""
    code: Any = context.code()
    return int(code.value[0] if isinstance(code, grpc.StatusCode) else code or 0)


class ErrorInterceptor(Interceptor):
    """Ends a call that cannot be answered with a status; the only place where that happens."""

    @asynccontextmanager
    async def around(self, method: str, context: Context, /) -> AsyncIterator[None]:
        """Turn whatever the rest of the call raises into a status."""
        try:
            yield
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: nothing else may reach the caller
            await context.abort_with_status(_status(method, error))


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


class IdentityInterceptor(Interceptor):
    """Finds out who calls, and lets nobody do what no role of theirs may do."""

    def __init__(self, identities: Identities) -> None:
        super().__init__()
        self._identities = identities

    @asynccontextmanager
    async def around(self, method: str, context: Context, /) -> AsyncIterator[None]:
        """Serve the rest of the call to whom its credentials say."""
        CALL.get().actor = self._actor(method, context)
        yield

    def _actor(self, method: str, context: Context) -> Actor:
        identity = self._identities.identify(_key(context))
        if identity is None:
            raise CallRefused(Refused(Refusal.UNAUTHENTICATED, {"header": _AUTHORIZATION}))
        permitted = PERMISSIONS[method]
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


class DeadlineInterceptor(Interceptor):
    """Gives every call an end: the caller's, or the server's own where that is sooner.

    A stream is as long as what it tells; it ends when its caller goes, or takes no answer for so long.
    """

    def __init__(self, seconds_max: float) -> None:
        super().__init__()
        self._seconds_max = seconds_max

    @asynccontextmanager
    async def around(self, _method: str, context: Context, /) -> AsyncIterator[None]:
        """Serve the rest of the call until its end."""
        # None without a deadline, whatever the published type says.
        remaining: float | None = context.time_remaining()
        seconds = self._seconds_max if remaining is None else min(remaining, self._seconds_max)
        call = CALL.get()
        call.deadline = asyncio.get_running_loop().time() + seconds
        end = asyncio.timeout_at(call.deadline)
        try:
            async with end:
                yield
        except TimeoutError as error:
            if end.expired():
                raise DeadlinePassed from error
            raise

    def wrap(self, method: str, handler: Handler, /) -> Handler:
        """Leave streams as they are."""
        return handler if handler.response_streaming else super().wrap(method, handler)


class DecodingInterceptor(Interceptor):
    """Parses requests: bytes that are no message are the caller's mistake, and are told so."""

    def __init__(self, seconds_max: float) -> None:
        super().__init__()
        self._seconds_max = seconds_max

    def wrap(self, _method: str, handler: Handler, /) -> Handler:
        """Take the parser out of the transport, where a failure would be an unknown error."""
        parse = handler.request_deserializer

        def parsed(request: bytes) -> Any:
            try:
                return parse(request)
            except DecodeError as error:
                raise CallRefused.malformed("request", "is not a message of this method") from error

        async def stream(request: bytes, context: Context) -> None:
            # Closed here and now, in the task and the context that it was begun in.
            async with aclosing(handler.unary_stream(parsed(request), context)) as answers:
                async for answer in answers:
                    await self._hand_over(answer, context)

        async def unary(request: bytes, context: Context) -> Any:
            return await handler.unary_unary(parsed(request), context)

        return _handler_like(handler, stream if handler.response_streaming else unary, None)

    async def _hand_over(self, answer: Any, context: Context) -> None:
        """Write an answer of a stream, to a caller who may be slow, but not without end."""
        try:
            async with asyncio.timeout(self._seconds_max):
                await context.write(answer)
        except TimeoutError as error:
            raise DeadlinePassed from error


def _handler_like(handler: Handler, serve: Any, deserializer: Any) -> Handler:
    """The same method, served by another function."""
    make: Any = (
        grpc.unary_stream_rpc_method_handler
        if handler.response_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(serve, deserializer, handler.response_serializer)
