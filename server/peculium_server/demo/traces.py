"""What the demonstration's processes tell a collector, if there is one, and how to see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from peculium_server.config import Exporting
from peculium_server.telemetry import providers

SERVICE: Final = "peculium-demo"
"""The coordinator and the workers; the ledger that is started is a service of its own."""
EXPORT_SECONDS_MAX: Final = 2.0
"""How long the last spans of a process may take to the collector."""
TRACER: Final = trace.get_tracer("peculium_server.demo")


def handed(carrier: Mapping[str, str]) -> Context:
    """The context of whoever has handed something on."""
    return TraceContextTextMapPropagator().extract(carrier)


def how_to_see(exporting: Exporting, *, server_started: bool) -> str:
    """What to tell people about traces before a run begins."""
    if not exporting.traces:
        return (
            "traces: with a collector or Jaeger that takes OTLP at port 4317, run this again with\n"
            "  OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317 OTEL_TRACES_SAMPLER=parentbased_always_on"
        )
    services = f"{SERVICE!r} and {providers.SERVICE!r}" if server_started else f"{SERVICE!r}"
    told = f"traces: look for {services} where OTEL_EXPORTER_OTLP_ENDPOINT leads"
    if exporting.sampler:
        return told
    return (
        f"{told}; one in {providers.TRACE_ONE_IN_DEFAULT} is recorded,"
        " all are with OTEL_TRACES_SAMPLER=parentbased_always_on"
    )
