"""The page that Prometheus comes for: the same instruments that are exported by OTLP, as OpenMetrics or text.

What is measured is OpenTelemetry's; how it is written, its library for Prometheus decides. Only the way from
one to the other is here, since it takes the names from the table, so that the dashboard and the rules for
alerts mean what is on the page, and since it takes the exemplars along.

A thread of its own answers one request after the other. Whoever reads slowly, or asks all the time, is in the
way of others who want the page, and never of a call.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import sys
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from http.server import HTTPServer
from itertools import accumulate
from typing import Any, Final
from urllib.parse import urlsplit

from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from peculium_server.config import Address, CannotListen
from peculium_server.telemetry.instruments import INSTRUMENTS, Instrument, Sort, prometheus_label

PATH: Final = "/metrics"
READ_SECONDS_MAX: Final = 5.0
"""Whoever asks has so long for each part of the question, and for taking the answer."""

_SECONDS: Final = {"s": "seconds"}
"""Units that Prometheus has in names; those in braces are words of ours."""
_BY_NAME: Final = {each.name: each for each in INSTRUMENTS}

_logger = logging.getLogger(__name__)


class Page:
    """The page, served until it is closed."""

    def __init__(self, address: Address, reader: InMemoryMetricReader) -> None:
        """Listen, and answer.

        Args:
            address: Where; port 0 is any free one.
            reader: Collects what is told.

        Raises:
            CannotListen: It is not possible there.
        """
        registry = CollectorRegistry()
        registry.register(_Told(reader))
        server = _Server6 if ":" in address.host else _Server
        try:
            self._server = server((address.host, address.port), _Handler.factory(registry))
        except OSError as error:
            raise CannotListen(address) from error
        self.address = address._replace(port=self._server.server_port)
        """Where it is."""
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(MetricsHandler):
    timeout = READ_SECONDS_MAX
    # Which Python this is, is nobody's business.
    server_version = "peculium"
    sys_version = ""

    def do_GET(self) -> None:  # noqa: N802 - as the library calls it
        if urlsplit(self.path).path == PATH:
            super().do_GET()
        else:
            self.send_error(HTTPStatus.NOT_FOUND, f"There is {PATH}")


class _Server(HTTPServer):
    def server_bind(self) -> None:
        # Without HTTPServer's own, which asks the network for this machine's name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - as above
        error = sys.exception()
        # Whoever has asked may have hung up.
        if not isinstance(error, OSError):
            _logger.error("the page of metrics could not be told", exc_info=error)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Told(Collector):
    """What there is when somebody asks."""

    def __init__(self, reader: InMemoryMetricReader) -> None:
        self._reader = reader

    def collect(self) -> Iterator[Metric]:
        """All metrics of the table that have a value."""
        data = self._reader.get_metrics_data()
        for of_resource in () if data is None else data.resource_metrics:
            yield _target(of_resource.resource)
            for of_scope in of_resource.scope_metrics:
                for metric in of_scope.metrics:
                    # What a library counts in this process is not in the table.
                    if (instrument := _BY_NAME.get(metric.name)) is not None:
                        yield _family(instrument, metric.data.data_points)


def _target(resource: Resource) -> Metric:
    """What the metrics are of, as OpenTelemetry tells it to Prometheus."""
    told = {prometheus_label(name): str(value) for name, value in resource.attributes.items()}
    return InfoMetricFamily("target", "What the metrics are of.", value=told)


def _family(instrument: Instrument, points: Iterable[Any]) -> Metric:
    make = _FAMILIES[instrument.sort]
    family = make(
        instrument.prometheus,
        f"{instrument.meaning}.",
        labels=[prometheus_label(label.name) for label in instrument.labels],
        unit=_SECONDS.get(instrument.unit, ""),
    )
    for point in points:
        labels = [str(point.attributes.get(label.name, "")) for label in instrument.labels]
        if isinstance(family, HistogramMetricFamily):
            family.add_metric(labels, _buckets(point), point.sum)
        else:
            family.add_metric(labels, point.value)
    return family


_FAMILIES: Final[
    dict[Sort, type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]]
] = {
    Sort.COUNTER: CounterMetricFamily,
    Sort.GAUGE: GaugeMetricFamily,
    Sort.HISTOGRAM: HistogramMetricFamily,
}


def _buckets(point: HistogramDataPoint) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
    """The buckets up to each bound, with the trace of one that fell into it since somebody has asked."""
    traces = {
        bisect_left(point.explicit_bounds, each.value): Exemplar(
            {"trace_id": f"{each.trace_id:032x}", "span_id": f"{each.span_id:016x}"},
            each.value,
            each.time_unix_nano / 1e9,
        )
        for each in point.exemplars
        if each.trace_id and each.span_id
    }
    names = [*map(floatToGoString, point.explicit_bounds), "+Inf"]
    return [
        (name, count, traces[index]) if index in traces else (name, count)
        for index, (name, count) in enumerate(
            zip(names, accumulate(point.bucket_counts), strict=True)
        )
    ]
