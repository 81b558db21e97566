"""Hands what is traced and counted to whoever collects it, as OpenTelemetry's variables and the settings say.

By OTLP over gRPC to a collector, and on a page that Prometheus comes for. Nothing is set up, and nothing of it
imported, unless an endpoint or an address for the page is configured. Export is in threads of its own: a
collector that is slow or away costs spans and points, and never a call.
"""

from __future__ import annotations

import importlib.metadata
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from opentelemetry import metrics, trace

from peculium_server.config import Address, Exporting

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.resources import Resource

SERVICE: Final = "peculium"
_UNNAMED: Final = "unknown_service"
"""How the SDK begins the name of what has none."""

TRACE_ONE_IN_DEFAULT: Final = 100
"""Of the calls whose callers do not say themselves whether they are traced, one in so many is."""

Shutdown = Callable[[], object]


class Providers:
    """What was set up, to be shut down at the end."""

    def __init__(
        self, *shutdowns: Shutdown, metered: bool = False, page: Address | None = None
    ) -> None:
        """Nothing, unless said.

        Args:
            shutdowns: Each hands over what it has, and ends.
            metered: Somebody wants to know what is counted.
            page: Where the page for Prometheus is, if there is one.
        """
        self._shutdowns = shutdowns
        self.metered = metered
        self.page = page

    def shutdown(self, seconds: float) -> None:
        """Hand over what there is, within so many seconds, and end."""
        until = time.monotonic() + seconds
        # A collector that does not answer would keep the SDK for longer.
        ending = [threading.Thread(target=each, daemon=True) for each in self._shutdowns]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join(max(0.0, until - time.monotonic()))


def trace_one_in(exporting: Exporting) -> int:
    """Of the calls that come without W3C trace context one in so many is to be given to the SDK.

    Where the environment names a sampler, or other contexts that calls may come with, the SDK decides.
    """
    return 1 if exporting.sampler or exporting.propagators else TRACE_ONE_IN_DEFAULT


def start(exporting: Exporting, page: Address | None = None) -> Providers:
    """Set up what is asked for, for the whole process, which others call.

    Args:
        exporting: What is to be exported.
        page: Where Prometheus may come for the metrics; None: nowhere.

    Raises:
        CannotListen: The page cannot be there.
    """
    shutdowns: list[Shutdown] = []
    address = None
    if exporting.metrics or page is not None:
        ends, address = _start_metrics(export=exporting.metrics, page=page)
        shutdowns += ends
    if exporting.traces:
        # Without a name the SDK takes the sampler of the environment, or all that is given to it.
        share = 1 if exporting.sampler or not exporting.propagators else TRACE_ONE_IN_DEFAULT
        shutdowns.append(_start_traces(SERVICE, share))
    metered = exporting.metrics or page is not None
    return Providers(*shutdowns, metered=metered, page=address)


def start_caller(exporting: Exporting, service: str) -> Providers:
    """Set up tracing for a process that calls a server, and begins traces itself.

    Args:
        exporting: What is to be exported.
        service: The process's name there, unless the environment says another one.
    """
    if not exporting.traces:
        return Providers()
    return Providers(_start_traces(service, 1 if exporting.sampler else TRACE_ONE_IN_DEFAULT))


def _start_traces(service: str, one_in: int) -> Shutdown:
    """Have spans exported; of traces that begin here one in so many, as far as the environment says nothing."""
    # Here, since most servers do without, and they take a while.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio  # noqa: PLC0415

    sampler = None if one_in == 1 else ParentBasedTraceIdRatio(1 / one_in)
    provider = TracerProvider(sampler, _resource(service), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def _start_metrics(*, export: bool, page: Address | None) -> tuple[list[Shutdown], Address | None]:
    # As above.
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
    from opentelemetry.sdk.metrics.export import (  # noqa: PLC0415
        InMemoryMetricReader,
        PeriodicExportingMetricReader,
    )

    readers: list[MetricReader] = []
    if export:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (  # noqa: PLC0415
            OTLPMetricExporter,
        )

        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    asked = InMemoryMetricReader()
    if page is not None:
        readers.append(asked)
    provider = MeterProvider(readers, _resource(SERVICE), shutdown_on_exit=False)
    metrics.set_meter_provider(provider)
    if page is None:
        return [provider.shutdown], None
    from peculium_server.telemetry.page import Page  # noqa: PLC0415

    told = Page(page, asked)
    return [provider.shutdown, told.close], told.address


def _resource(service: str) -> Resource:
    """What the telemetry is of; what the environment says of it comes first."""
    # As above.
    from opentelemetry.sdk.resources import (  # noqa: PLC0415
        SERVICE_NAME,
        SERVICE_VERSION,
        Resource,
    )

    found = Resource.create()
    if str(found.attributes[SERVICE_NAME]).startswith(_UNNAMED):
        found = found.merge(Resource({SERVICE_NAME: service}))
    return Resource({SERVICE_VERSION: importlib.metadata.version("peculium")}).merge(found)
