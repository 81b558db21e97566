"""Spans and the W3C trace context: of whoever calls, of each operation, and of each request.

With OpenTelemetry's API alone: whether spans are made is decided by what the program has set up. Without
that, a program's operations still carry the context that it was called in, or handed with its budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from peculium._ids import id_text
from peculium._requests import Operation
from peculium.errors import PeculiumError

LINKS_MAX = 128
"""Of one span: as many as collectors commonly take."""

_KEY = "traceparent"
_MODEL_LABEL = "model"
_propagator = TraceContextTextMapPropagator()

Metadata = tuple[tuple[str, str], ...]

_NO_CONTEXT: Metadata = ()


def traceparent() -> str:
    """The current span's, or nothing if there is none."""
    # Nearly always there is none, and this is asked for each operation.
    outside = trace.get_current_span() is trace.INVALID_SPAN
    return "" if outside else dict(_carried(None)).get(_KEY, "")


def carrier_of(text: str) -> dict[str, str]:
    """A trace context as what travels beside something else: nothing if there is none."""
    return {_KEY: text} if text else {}


def read_carrier(carrier: Mapping[str, str] | None) -> str:
    """The trace context of what came along; nothing if there is none, or what came is none."""
    return _written(_propagator.extract(carrier, Context())) if carrier else ""


def _written(context: Context) -> str:
    return dict(_carried(context)).get(_KEY, "")


def _carried(context: Context | None) -> Metadata:
    """What a request carries of a context: where it is, and what tracers say to each other; never baggage."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, context)
    return tuple(carrier.items())


_OF_CALLS = frozenset({"reserve", "settle", "spend"})


def _call_facts(operation: Operation) -> dict[str, str | int]:
    """What an operation says of the call to a model that it pays for."""
    request: Any = getattr(operation.message, operation.kind)
    facts: dict[str, str | int] = {}
    labelled = operation.header.labels.get(_MODEL_LABEL)
    if labelled:
        facts["gen_ai.request.model"] = labelled
    if operation.kind == "reserve" or not request.HasField("usage"):
        return facts
    usage = request.usage
    if usage.provider:
        facts["gen_ai.provider.name"] = usage.provider
    if usage.model:
        facts.setdefault("gen_ai.request.model", usage.model)
        facts["gen_ai.response.model"] = usage.model
    facts["gen_ai.usage.input_tokens"] = usage.input_tokens
    facts["gen_ai.usage.output_tokens"] = usage.output_tokens
    if usage.cached_tokens:
        facts["gen_ai.usage.cache_read.input_tokens"] = usage.cached_tokens
    return facts


@contextmanager
def ending(span: Span) -> Iterator[None]:
    """End the span of an operation with the block that waits for it."""
    try:
        yield
    except PeculiumError as error:
        _fail(span, type(error).__name__)
        raise
    finally:
        span.end()


class Call:
    """The span of one request, if there is any; and what the request has to carry for it."""

    __slots__ = ("_span", "metadata")

    def __init__(self, span: Span | None, metadata: Metadata) -> None:
        self._span = span
        self.metadata = metadata

    def ended(self, error: grpc.RpcError | BaseException | None = None) -> None:
        """It was answered, or it failed."""
        span = self._span
        if span is None:
            return
        code: Any = getattr(error, "code", None)
        status: Any = code() if callable(code) else None
        if error is None:
            span.set_attribute("rpc.response.status_code", "OK")
        else:
            name = status.name if isinstance(status, grpc.StatusCode) else type(error).__name__
            span.set_attribute("rpc.response.status_code", name)
            _fail(span, name)
        span.end()


def around() -> Metadata:
    """What a request carries of the current span; for one that has no span of its own."""
    return _NO_CONTEXT if trace.get_current_span() is trace.INVALID_SPAN else _carried(None)


class Tracing:
    """Makes the spans of one client.

    Whether anybody collects them is asked for each request, and not for each operation: OpenTelemetry
    looks into the environment for the answer. Who begins to collect them has all but those of the
    operations that were under way or in the next request.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._tracer = _tracer()

    def begin(self, operation: Operation | None, budget: str, handed: str) -> Span | None:
        """Begin the span of an operation, which carries the context of it from now on.

        It is below the current span; without one, below the context that the budget was handed over with.

        Args:
            operation: It has not been sent yet.
            budget: What it is about, for people.
            handed: The context that came with the budget, or nothing.

        Returns:
            The span; None if nobody collects any.
        """
        tracer = self._tracer
        if operation is None or (tracer is None and not handed):
            return None
        outside = trace.get_current_span() is trace.INVALID_SPAN
        if tracer is None:
            if outside:
                operation.carry(handed)
            return None
        parent = _propagator.extract(carrier_of(handed), Context()) if outside else None
        span = tracer.start_span(
            f"peculium.{operation.kind}",
            context=parent,
            attributes={
                "peculium.operation": operation.kind,
                "peculium.operation_id": id_text(operation.operation_id),
                "peculium.budget": budget,
                **(_call_facts(operation) if operation.kind in _OF_CALLS else {}),
            },
        )
        operation.carry(_written(trace.set_span_in_context(span, Context())))
        return span

    def call(self, method: object) -> Call:
        """Begin a request that the current span's program makes for itself, by a method of a stub."""
        tracer = self._tracer = _tracer()
        if tracer is None:
            return Call(None, around())
        span = _begin_call(tracer, method, self._target, None, ())
        return Call(span, _metadata(span))

    def call_for(self, method: object, operations: Iterable[Span | None]) -> Call:
        """Begin a request that carries operations of several callers.

        Its span is below the first of theirs that is sampled, and linked with the others.
        """
        tracer = self._tracer = _tracer()
        sampled = [each for each in operations if each is not None and each.is_recording()]
        if tracer is None or not sampled:
            return Call(None, _NO_CONTEXT)
        first, *others = sampled
        context = trace.set_span_in_context(first, Context())
        span = _begin_call(tracer, method, self._target, context, others)
        return Call(span, _metadata(span))


def _begin_call(
    tracer: trace.Tracer,
    method: object,
    target: str,
    context: Context | None,
    linked: Iterable[Span],
) -> Span:
    host, _, port = target.rpartition(":")
    server: dict[str, str | int] = {"server.address": host or target}
    if host and port.isdigit():
        server["server.port"] = int(port)
    name = _name(method)
    return tracer.start_span(
        name,
        context=context,
        kind=SpanKind.CLIENT,
        links=[Link(each.get_span_context()) for each in islice(linked, LINKS_MAX)],
        attributes={"rpc.system.name": "grpc", "rpc.method": name, **server},
    )


def _name(method: object) -> str:
    """What a stub's method is called; grpc says it nowhere else."""
    said: bytes | str = getattr(method, "_method", b"")
    return (said.decode() if isinstance(said, bytes) else said).removeprefix("/")


def _metadata(span: Span) -> Metadata:
    return _carried(trace.set_span_in_context(span, Context()))


def _tracer() -> trace.Tracer | None:
    """Makes spans; None if this program has set up nobody who collects them."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return provider.get_tracer("peculium")


def _fail(span: Span, error_type: str) -> None:
    span.set_attribute("error.type", error_type)
    span.set_status(Status(StatusCode.ERROR))
