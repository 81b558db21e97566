"""A collector in the test's own process: takes what is exported by OTLP over gRPC, and keeps it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import (
    metrics_service_pb2,
    metrics_service_pb2_grpc,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

ARRIVE_SECONDS_MAX = 30
AT_ONCE = {
    # So that a test waits for nothing but what it asks for.
    "OTEL_BSP_SCHEDULE_DELAY": "20",
    "OTEL_METRIC_EXPORT_INTERVAL": "100",
    "OTEL_TRACES_SAMPLER": "parentbased_always_on",
}


@dataclass(frozen=True)
class Told:
    """One point of a metric."""

    metric: Metric
    labels: Mapping[str, str]
    value: float
    """Of a histogram: how many were recorded."""


@dataclass
class Receiver:
    """Everything that has arrived."""

    address: str = ""
    spans: list[Span] = field(default_factory=list)
    services: list[dict[str, str]] = field(default_factory=list)
    """The resources that something was told of."""
    told_by: dict[bytes, dict[str, str]] = field(default_factory=dict)
    """Of each span, by its id, the resource that has told it: which process that was."""
    points: dict[tuple[str, frozenset[tuple[str, str]]], Told] = field(default_factory=dict)
    """The latest of each metric and its labels."""
    exemplars: dict[str, set[str]] = field(default_factory=dict)
    """The traces that metrics have named, by metric; each is told once."""
    raw: list[bytes] = field(default_factory=list, repr=False)
    """Every request, logs included, as it came."""
    arrived: threading.Condition = field(default_factory=threading.Condition, repr=False)

    @property
    def variables(self) -> dict[str, str]:
        """What a program has to be told to export to it."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self.address}", **AT_ONCE}

    def wait(self, found: Callable[[], Any]) -> Any:
        """What is found as soon as it is anything; fails if that takes too long."""
        result: Any = None

        def there() -> bool:
            nonlocal result
            result = found()
            return bool(result)

        with self.arrived:
            assert self.arrived.wait_for(there, ARRIVE_SECONDS_MAX), self.said()
        return result

    def said(self) -> str:
        """What has arrived, for who looks in vain."""
        names = sorted({span.name for span in self.spans})
        return f"spans {names}, metrics {sorted({name for name, _ in self.points})}"

    def of(self, name: str, **labels: str) -> list[Told]:
        """The points of a metric that have these labels, maybe among others."""
        wanted = set(labels.items())
        return [told for (each, has), told in self.points.items() if each == name and wanted <= has]

    def value(self, name: str, **labels: str) -> float:
        """The sum of a metric over all points that have these labels."""
        return sum(told.value for told in self.of(name, **labels))

    def names(self) -> set[str]:
        """The metrics that have arrived."""
        return {name for name, _ in self.points}

    def spans_named(self, beginning: str) -> list[Span]:
        """The spans whose name begins so."""
        return [span for span in self.spans if span.name.startswith(beginning)]


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - as the wire has it
        with self._receiver.arrived:
            self._receiver.raw.append(request.SerializeToString())
            for resource in request.resource_spans:
                service = attributes(resource.resource.attributes)
                self._receiver.services.append(service)
                for scope in resource.scope_spans:
                    self._receiver.spans += scope.spans
                    self._receiver.told_by |= {span.span_id: service for span in scope.spans}
            self._receiver.arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - as the wire has it
        with self._receiver.arrived:
            self._receiver.raw.append(request.SerializeToString())
            for resource in request.resource_metrics:
                self._receiver.services.append(attributes(resource.resource.attributes))
                for scope in resource.scope_metrics:
                    for metric in scope.metrics:
                        named = self._receiver.exemplars.setdefault(metric.name, set())
                        named |= _exemplars(metric)
                        for told in _points(metric):
                            key = metric.name, frozenset(told.labels.items())
                            self._receiver.points[key] = told
            self._receiver.arrived.notify_all()
        return metrics_service_pb2.ExportMetricsServiceResponse()


class _Logs(logs_service_pb2_grpc.LogsServiceServicer):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - as the wire has it
        with self._receiver.arrived:
            self._receiver.raw.append(request.SerializeToString())
        return logs_service_pb2.ExportLogsServiceResponse()


def _points(metric: Metric) -> Iterator[Told]:
    data: Any = getattr(metric, metric.WhichOneof("data") or "")
    for point in data.data_points:
        if metric.HasField("histogram"):
            value = float(point.count)
        else:
            value = float(point.as_int if point.HasField("as_int") else point.as_double)
        yield Told(metric, attributes(point.attributes), value)


def _exemplars(metric: Metric) -> set[str]:
    data: Any = getattr(metric, metric.WhichOneof("data") or "")
    return {
        exemplar.trace_id.hex()
        for point in data.data_points
        for exemplar in point.exemplars
        if exemplar.trace_id
    }


def attributes(pairs: Iterator[KeyValue] | Any) -> dict[str, str]:
    """Attributes by name, their values as text."""
    return {pair.key: _text(pair.value) for pair in pairs}


def _text(value: AnyValue) -> str:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return " ".join(_text(each) for each in value.array_value.values)
    return str(getattr(value, kind)) if kind else ""


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A collector on a port of its own."""
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(4))
    add_traces: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add_traces(_Traces(receiver), server)
    add_metrics: Any = metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server
    add_metrics(_Metrics(receiver), server)
    add_logs: Any = logs_service_pb2_grpc.add_LogsServiceServicer_to_server
    add_logs(_Logs(receiver), server)
    receiver.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield receiver
    finally:
        server.stop(0).wait()
