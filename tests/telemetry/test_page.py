"""The page of metrics: all that is exported by OTLP, under the names that the dashboard and the alerts use."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import peculium
from peculium_server.signing import SigningKey
from peculium_server.telemetry.instruments import INSTRUMENTS, Sort, prometheus_label
from peculium_server.webhooks.keys import WebhookKeys
from tests.forked import Forked
from tests.postgres import Server as PostgresServer
from tests.server import RunningServer, ServerFailed, StartServer, starting
from tests.telemetry.page import ask, families, page_of
from tests.telemetry.receiver import Receiver, receiving

ROOT = "acme"
PARTS = {
    Sort.COUNTER: ("",),
    Sort.GAUGE: ("",),
    Sort.HISTOGRAM: ("_bucket", "_count", "_sum"),
}


@dataclass(frozen=True)
class Told:
    """A server that tells the same to a collector and on a page."""

    receiver: Receiver
    server: RunningServer
    page: str


@pytest.fixture(scope="module")
def told(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    folder = tmp_path_factory.mktemp("server")
    SigningKey.make(folder / "key.pem")
    WebhookKeys.make(folder / "webhook-key")
    with (
        receiving() as receiver,
        postgres.fresh_database(postgres.migrated_template()) as database,
        starting(folder, Forked) as start,
    ):
        server = start(
            *("--database-url", database, "--balance-roots", ROOT),
            *("--signing-key-file", str(folder / "key.pem")),
            *("--webhook-key-file", str(folder / "webhook-key")),
            *("--metrics-listen", "127.0.0.1:0"),
            **receiver.variables,
        )
        with peculium.connect(server.address) as client:
            client.admin.grant(ROOT, unit="calls", amount=100, holder="dev")
            client.open(ROOT).spend(7)
        # Balances come a while after the grant.
        receiver.wait(lambda: receiver.value("peculium.root.balance", root=ROOT, balance="spent"))
        yield Told(receiver, server, page_of(server))


def test_the_page_has_the_metrics_of_the_table_under_their_names_and_nothing_else(
    told: Told,
) -> None:
    known = {each.prometheus + part for each in INSTRUMENTS for part in PARTS[each.sort]}
    found = {sample.name for family in families(told.page) for sample in family.samples}
    # What has not happened has no value yet.
    assert found - {"target_info"} <= known
    assert {each.prometheus for each in INSTRUMENTS if each.sort is Sort.GAUGE} <= found
    assert {"peculium_operations_total", "peculium_lane_commit_duration_seconds_bucket"} <= found


def test_whatever_is_exported_is_on_the_page_with_the_same_labels(told: Told) -> None:
    exported = {
        (
            each.prometheus + ("_count" if each.sort is Sort.HISTOGRAM else ""),
            frozenset((prometheus_label(name), value) for name, value in point.labels.items()),
        )
        for each in INSTRUMENTS
        for point in told.receiver.of(each.name)
    }
    samples = [sample for family in families(told.page) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())) for sample in samples}
    assert exported
    assert exported - found == set()


def test_what_the_page_says_of_a_metric_is_what_the_table_says(told: Told) -> None:
    known = {each.prometheus.removesuffix("_total"): each for each in INSTRUMENTS}
    for family in families(told.page):
        if family.name in known:
            each = known[family.name]
            assert family.documentation == f"{each.meaning}."
            assert family.unit == ("seconds" if each.unit == "s" else "")
            assert family.type == each.sort.value


def test_what_was_counted_is_on_the_page_at_once(told: Told) -> None:
    with peculium.connect(told.server.address) as client:
        client.admin.grant("other", unit="calls", amount=5, holder="dev")
    [operations] = [each for each in families(told.page) if each.name == "peculium_operations"]
    counted = {tuple(each.labels.values()): each.value for each in operations.samples}
    assert counted["grant", "accepted"] == 2


def test_the_buckets_of_a_histogram_add_up(told: Told) -> None:
    [family] = [each for each in families(told.page) if each.name == "peculium_lane_batch_size"]
    buckets = [each for each in family.samples if each.name.endswith("_bucket")]
    assert [each.labels["le"] for each in buckets] == [
        *("1.0", "2.0", "4.0", "8.0", "16.0", "32.0", "64.0", "128.0", "256.0", "+Inf")
    ]
    counts = [each.value for each in buckets]
    assert counts == sorted(counts)
    [count] = [each.value for each in family.samples if each.name.endswith("_count")]
    assert counts[-1] == count > 0


def test_exemplars_lead_to_traces_that_were_exported(told: Told) -> None:
    with peculium.connect(told.server.address) as client:
        client.open(ROOT).spend(1)
    named = {
        sample.exemplar.labels["trace_id"]
        for name in ("rpc_server_call_duration_seconds", "peculium_lane_commit_duration_seconds")
        for family in families(told.page)
        if family.name == name
        for sample in family.samples
        if sample.exemplar
    }
    assert named
    told.receiver.wait(lambda: named <= {span.trace_id.hex() for span in told.receiver.spans})


def test_who_does_not_ask_for_openmetrics_gets_the_text_before_that(told: Told) -> None:
    status, kind, text = ask(told.page, accept="*/*")
    assert (status, kind.partition(";")[0]) == (200, "text/plain")
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"peculium_operations", "peculium_holds", "target_info"} <= names


def test_the_page_says_what_it_is_of(told: Told) -> None:
    [target] = [each for each in families(told.page) if each.name == "target"]
    [sample] = target.samples
    assert sample.labels["service_name"] == "peculium"
    assert sample.labels["service_version"]


def test_there_is_nothing_else_at_that_address(told: Told) -> None:
    for path in ("/", "/metrics/", "/healthz"):
        assert ask(told.page, path)[0] == 404
    assert ask(told.page, "/metrics?x=1")[0] == 200


def test_who_asks_and_says_nothing_more_is_in_the_way_of_no_call(told: Told) -> None:
    host, _, port = told.page.rpartition(":")
    with socket.create_connection((host, int(port))) as silent:
        silent.sendall(b"GET /metrics HTTP/1.1\r\n")
        with peculium.connect(told.server.address) as client:
            assert client.open(ROOT).spend(1).balances.available > 0
    assert ask(told.page)[0] == 200


def test_an_address_that_is_taken_ends_the_server(
    start_server: StartServer, served_database: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerFailed, match=f"cannot listen on {address}") as caught:
            start_server("--database-url", served_database, "--metrics-listen", address)
    assert "exit code 3" in str(caught.value)


def test_without_opentelemetry_there_is_no_page_and_the_server_says_so(
    start_server: StartServer, served_database: str
) -> None:
    server = start_server(
        *("--database-url", served_database, "--metrics-listen", "127.0.0.1:0"),
        OTEL_SDK_DISABLED="true",
    )
    assert any("OTEL_SDK_DISABLED" in line for line in server.said)
    assert not any("metrics are told" in line for line in server.said)


def test_a_page_at_an_ipv6_address_is_there_too(
    start_server: StartServer, served_database: str, tmp_path: Path
) -> None:
    if not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    server = start_server("--database-url", served_database, "--metrics-listen", "[::1]:0")
    assert ask(page_of(server))[0] == 200


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False
