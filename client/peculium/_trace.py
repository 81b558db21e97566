"""The W3C trace context of whoever calls, as each operation carries it."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_KEY = "traceparent"
_propagator = TraceContextTextMapPropagator()


def traceparent() -> str:
    """The current span's, or nothing if there is none."""
    if trace.get_current_span() is trace.INVALID_SPAN:
        return ""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get(_KEY, "")
