"""Spans of what is done for many callers at once, and the links to those whom it is done for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Final, NamedTuple

from opentelemetry import trace
from opentelemetry.trace import (
    Link,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)

LINKS_MAX: Final = 128
"""Of one span: as many as collectors commonly take."""

_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def tracer() -> trace.Tracer | None:
    """Makes spans; None if nobody collects any: they would be made for nothing."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return provider.get_tracer("peculium_server")


def recording() -> Span | None:
    """The current span, if somebody will see it."""
    span = trace.get_current_span()
    return span if span.is_recording() else None


def context_of(traceparent: str) -> SpanContext | None:
    """The span that a W3C trace context names; None if it names none."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups()[:3])
    context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    return context if context.is_valid else None


@contextmanager
def shared(
    maker: trace.Tracer, name: str, calls: Sequence[Span], traceparents: Iterable[str]
) -> Iterator[Span]:
    """A span of what is done at once for several calls, which is the current one in the block.

    It is a child of the first of them, and is linked with all of them, and with the operations that they
    carry, as many as a span may have links.

    Args:
        maker: Makes it.
        name: Its name.
        calls: The calls' own spans.
        traceparents: Of the operations, as they came; may be empty or wrong.
    """
    others: dict[int, SpanContext] = {}
    for context in chain(
        (call.get_span_context() for call in calls[1:]), map(context_of, traceparents)
    ):
        if len(others) == LINKS_MAX:
            break
        if context is not None:
            others[context.span_id] = context
    with maker.start_as_current_span(
        name,
        context=trace.set_span_in_context(calls[0]),
        kind=SpanKind.INTERNAL,
        links=[Link(each) for each in others.values()],
        # An exception's text is for the log.
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        for call in calls[1:]:
            call.add_link(span.get_span_context())
        yield span


class Database(NamedTuple):
    """Which database transactions are of."""

    system: str
    """As OpenTelemetry names it."""
    namespace: str


def transaction(maker: trace.Tracer, database: Database, *, attempt: int, guessed: bool) -> Span:
    """Begin the span of one attempt of a transaction, below the current one.

    Args:
        maker: Makes it.
        database: Where.
        attempt: Which, from 1.
        guessed: It was decided by what was remembered, and sent as a whole.
    """
    return maker.start_span(
        f"TRANSACTION {database.namespace}",
        kind=SpanKind.CLIENT,
        attributes={
            "db.system.name": database.system,
            "db.namespace": database.namespace,
            "db.operation.name": "TRANSACTION",
            "peculium.attempt": attempt,
            "peculium.guessed": guessed,
        },
    )


def fail_transaction(span: Span, sqlstate: str | None) -> None:
    """Say why an attempt failed; without a code the connection was lost."""
    if sqlstate is not None:
        span.set_attribute("db.response.status_code", sqlstate)
    fail(span, sqlstate or "lost")


def fail(span: Span, error_type: str) -> None:
    """Say that what a span is of has failed, and by what kind of failure."""
    span.set_attribute("error.type", error_type)
    span.set_status(Status(StatusCode.ERROR))
