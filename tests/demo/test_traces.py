"""The demonstration's traces: a run over all its processes is one, and so is each request of an agent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from peculium_server.config import Exporting
from peculium_server.demo.trace import HEADER
from peculium_server.demo.traces import how_to_see
from tests.forked import Forked
from tests.postgres import Server
from tests.server import starting
from tests.telemetry.receiver import Receiver, attributes, receiving

REQUESTS = 20
AGENTS = ("--processes", "2", "--agents", "2")


def demonstrate(folder: Path, server: str, **variables: str) -> str:
    """Run the demonstration against a server that runs; what it tells people."""
    file = folder / "trace.csv"
    rows = ["2023-11-16 18:17:03.9799600,1000,20"] * REQUESTS
    file.write_text("\n".join([",".join(HEADER), *rows, ""]))
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "peculium_server", "demo", "--trace", str(file)),
            *("--target", server, "--cap-percent", "200", *AGENTS),
        ],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


@pytest.fixture(scope="module")
def traced(
    postgres: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Receiver, str]]:
    """A run, what was told of it, and what it said."""
    with (
        receiving() as receiver,
        postgres.fresh_database(postgres.migrated_template()) as url,
        starting(tmp_path_factory.mktemp("ledger"), Forked) as start,
    ):
        server = start("--database-url", url, **receiver.variables)
        said = demonstrate(tmp_path_factory.mktemp("demo"), server.address, **receiver.variables)
        receiver.wait(lambda: receiver.spans_named("demo"))
        assert server.stop() == 0
        yield receiver, said


def by_trace(receiver: Receiver) -> dict[bytes, list[Span]]:
    traces = defaultdict(list)
    for span in receiver.spans:
        traces[span.trace_id].append(span)
    return traces


def processes(receiver: Receiver, spans: list[Span]) -> set[tuple[str, str]]:
    """Which processes have told of some spans: each one's service and instance."""
    told = [receiver.told_by[span.span_id] for span in spans]
    return {(each["service.name"], each["service.instance.id"]) for each in told}


def test_a_run_over_several_processes_is_one_trace(traced: tuple[Receiver, str]) -> None:
    receiver, _ = traced
    [run] = receiver.spans_named("demo")
    spans = by_trace(receiver)[run.trace_id]
    assert not run.parent_span_id
    # The coordinator, two workers and the server.
    services = [service for service, _ in processes(receiver, spans)]
    assert sorted(services) == ["peculium", *["peculium-demo"] * 3]
    names = [span.name for span in spans]
    assert names.count("worker") == 2
    assert names.count("peculium.accept") == 3
    granted = "peculium.v1.AdminService/Grant"
    assert {granted, "peculium.delegate", "peculium.return"} <= set(names)
    # It hangs together: whatever is in it was begun by something in it.
    ids = {span.span_id for span in spans}
    assert [span.name for span in spans if span.parent_span_id not in ids] == ["demo"]


def test_each_request_of_an_agent_is_one_trace_that_leads_to_the_run(
    traced: tuple[Receiver, str],
) -> None:
    receiver, _ = traced
    traces = by_trace(receiver)
    [run] = receiver.spans_named("demo")
    workers = {span.span_id for span in receiver.spans_named("worker")}
    served = 0
    for request in receiver.spans_named("agent request"):
        spans = traces[request.trace_id]
        names = {span.name for span in spans}
        [link] = request.links
        assert link.trace_id == run.trace_id
        assert link.span_id in workers
        if "peculium.settle" in names:
            served += 1
            assert {"peculium.reserve", "chat example-large"} <= names
    assert served == REQUESTS
    # What an agent asks for is answered by the server in the same trace, unless it travels with others'.
    both = [spans for spans in traces.values() if len(processes(receiver, spans)) == 2]
    assert len(both) > 1


def test_the_usage_of_a_call_is_on_its_span(traced: tuple[Receiver, str]) -> None:
    receiver, _ = traced
    settled = attributes(receiver.spans_named("peculium.settle")[0].attributes)
    assert settled["gen_ai.request.model"] == "example-large"
    assert settled["gen_ai.usage.input_tokens"] == "1000"


def test_people_are_told_where_to_look(traced: tuple[Receiver, str]) -> None:
    assert "traces: look for 'peculium-demo' where OTEL_EXPORTER_OTLP_ENDPOINT leads" in traced[1]


@pytest.mark.parametrize(
    ("exporting", "told"),
    [
        (Exporting(), "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317 OTEL_TRACES_SAMPLER"),
        (Exporting(traces=True), "'peculium-demo' and 'peculium' where"),
        (Exporting(traces=True), "one in 100 is recorded"),
    ],
)
def test_people_are_told_how_to_see_traces_whatever_is_configured(
    exporting: Exporting, told: str
) -> None:
    assert told in how_to_see(exporting, server_started=True)
