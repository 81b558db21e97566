"""What is exported, and that a collector which is away costs no call."""

from __future__ import annotations

import threading
import time

import pytest

import peculium
from peculium_server.config import Exporting
from peculium_server.telemetry import providers
from tests.server import StartServer

NOBODY = "http://127.0.0.1:1"


def test_a_collector_that_is_away_costs_no_call_and_no_orderly_end(
    start_server: StartServer, served_database: str
) -> None:
    server = start_server(
        "--database-url",
        served_database,
        OTEL_EXPORTER_OTLP_ENDPOINT=NOBODY,
        OTEL_TRACES_SAMPLER="always_on",
        OTEL_METRIC_EXPORT_INTERVAL="50",
        OTEL_BSP_SCHEDULE_DELAY="50",
    )
    with peculium.connect(server.address) as client:
        client.admin.grant("acme", unit="calls", amount=10, holder="dev")
        acme = client.open("acme")
        assert [acme.spend(1).balances.available for _ in range(5)] == [9, 8, 7, 6, 5]
    assert server.stop() == 0
    # What exports may still say afterwards that nobody is there.
    assert [line for line in server.said if " opentelemetry." not in line][-1] == "stopped"


def test_what_cannot_be_exported_is_told_and_the_server_serves(
    start_server: StartServer, served_database: str
) -> None:
    server = start_server(
        "--database-url",
        served_database,
        OTEL_EXPORTER_OTLP_ENDPOINT=NOBODY,
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
    )
    warned = [line for line in server.said if "OTEL_EXPORTER_OTLP_PROTOCOL" in line]
    assert warned
    assert all("is not exported" in line for line in warned)


def test_the_end_waits_for_an_exporter_no_longer_than_it_may() -> None:
    never = threading.Event()
    ended: list[str] = []
    exporters = providers.Providers(never.wait, lambda: ended.append("the other"))
    begun = time.monotonic()
    exporters.shutdown(0.05)
    assert ended == ["the other"]
    assert time.monotonic() - begun < 30
    never.set()


@pytest.mark.parametrize(
    ("exporting", "one_in"),
    [
        (Exporting(traces=True), providers.TRACE_ONE_IN_DEFAULT),
        (Exporting(traces=True, sampler=True), 1),
        (Exporting(traces=True, propagators=True), 1),
    ],
)
def test_who_decides_what_is_traced(exporting: Exporting, one_in: int) -> None:
    assert providers.trace_one_in(exporting) == one_in
