"""The W3C trace context of whoever calls, as each operation carries it."""

from __future__ import annotations

from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_KEY = "traceparent"
_propagator = TraceContextTextMapPropagator()


def traceparent() -> str:
    """The current span's, or nothing if there is none."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get(_KEY, "")
