"""What a running server tells a collector, and that the table of metrics says all of it, and no more."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import promql_parser
import psycopg
import pytest

import peculium
from peculium import Child, Usage
from peculium.errors import BudgetExhausted, CapabilityUnknown, LedgerUnavailable
from peculium_server.rpc.permissions import PERMISSIONS
from peculium_server.signing import SigningKey
from peculium_server.telemetry import instruments
from peculium_server.telemetry.instruments import INSTRUMENTS, Sort
from peculium_server.webhooks.keys import WebhookKeys
from tests.forked import Forked
from tests.postgres import Server as PostgresServer
from tests.server import starting
from tests.telemetry.receiver import Receiver, receiving
from tools import metrics

ROOT = "acme-of-the-metrics"
UNIT = "usd_nanos"
CLOSED_ELSEWHERE = {
    "rpc.method": {method.removeprefix("/") for method in PERMISSIONS},
    "lane": {*map(str, range(16)), "atomic"},
    "root": {ROOT},
}


@dataclass(frozen=True)
class Driven:
    """A server that was made to do one of everything that is counted, and what it told."""

    receiver: Receiver
    private: list[str]
    """What must not be found in any label: ids, names, labels, principals, secrets."""


@pytest.fixture(scope="module")
def driven(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    with (
        receiving() as receiver,
        postgres.fresh_database(postgres.migrated_template()) as database,
        starting(tmp_path_factory.mktemp("server"), Forked) as start,
    ):
        server = start(
            *("--database-url", database, "--balance-roots", ROOT, "--seal-seconds", "1"),
            *("--signing-key-file", str(_key(tmp_path_factory)), "--principal-streams-max", "1"),
            *("--webhook-key-file", str(_webhook_key(tmp_path_factory))),
            **receiver.variables,
        )
        with peculium.connect(server.address) as client:
            private = _drive(client)
            _contend(client, database, receiver)
        receiver.wait(lambda: receiver.value("peculium.operations", kind="lapse") == 1)
        receiver.wait(lambda: receiver.names() >= {each.name for each in INSTRUMENTS})
        receiver.wait(lambda: receiver.value("peculium.holds", state="lapsed") == 1)
        yield Driven(receiver, private)
        assert server.stop() == 0


def _key(folders: pytest.TempPathFactory) -> Path:
    path = folders.mktemp("key") / "key.pem"
    SigningKey.make(path)
    return path


def _webhook_key(folders: pytest.TempPathFactory) -> Path:
    path = folders.mktemp("webhook-key") / "key"
    WebhookKeys.make(path)
    return path


def _contend(client: peculium.Client, database: str, receiver: Receiver) -> None:
    """Have a transaction made again: another session is in its way until that is seen."""
    with (
        ThreadPoolExecutor(1) as others,
        psycopg.connect(database) as connection,
    ):
        connection.execute("UPDATE lanes SET position = position")
        granting = others.submit(client.admin.grant, "late", unit="calls", amount=1)
        receiver.wait(lambda: receiver.value("peculium.database.retries", sqlstate="55P03"))
        connection.rollback()
        granting.result()


def _drive(client: peculium.Client) -> list[str]:
    granted = client.admin.grant(ROOT, unit=UNIT, amount=1_000, labels={"team": "whales"})
    text = granted.capability.reveal()
    root = client.accept(text)
    [made] = root.delegate([Child("run-of-the-metrics", 100)])
    run = client.accept(made.capability)
    with run.reserve(60, labels={"agent": "ishmael"}) as hold:
        # 40 beyond the hold are there; 10 more are borrowed from above.
        hold.settle(110, usage=Usage(model="m", input_tokens=1, output_tokens=1), reference="ref-7")
    root.reserve(1, ttl=1)
    for _ in range(3):
        with pytest.raises(BudgetExhausted):
            run.spend(5_000)
    with pytest.raises(CapabilityUnknown):
        client.open("no-such-budget")
    other = client.accept(client.admin.grant("fish", unit="fish", amount=10).capability)
    with other.reserve(10) as hold:
        hold.settle(13)
    assert list(client.audit.budgets(page_size=1))
    following = client.audit.watch()
    assert not next(following).entries
    with pytest.raises(LedgerUnavailable, match="as many streams open"):
        list(client.audit.verify())
    ids = [*(ref.hex() for ref in (root.ref.root_id, run.ref.budget_id, hold.hold_id))]
    return [*ids, text, "run-of-the-metrics", "whales", "ishmael", "ref-7", "dev", "fish"]


def test_every_metric_of_the_table_is_told(driven: Driven) -> None:
    assert driven.receiver.names() == {each.name for each in INSTRUMENTS}


def test_what_is_told_of_a_metric_is_what_the_table_says(driven: Driven) -> None:
    for each in INSTRUMENTS:
        for told in driven.receiver.of(each.name):
            assert (told.metric.unit, told.metric.description) == (each.unit, each.meaning)
            sort = {"sum": Sort.COUNTER, "gauge": Sort.GAUGE, "histogram": Sort.HISTOGRAM}
            assert sort[told.metric.WhichOneof("data") or ""] is each.sort
            if each.sort is Sort.HISTOGRAM:
                [bounds, *_] = [list(p.explicit_bounds) for p in told.metric.histogram.data_points]
                assert bounds == list(each.buckets)


def test_labels_say_nothing_but_what_the_table_allows(driven: Driven) -> None:
    for each in INSTRUMENTS:
        for told in driven.receiver.of(each.name):
            assert set(told.labels) == {label.name for label in each.labels}
            for label in each.labels:
                allowed = set(label.values) or CLOSED_ELSEWHERE[label.name]
                assert told.labels[label.name] in allowed


def test_no_label_says_an_id_a_name_or_a_secret(driven: Driven) -> None:
    said = [value for told in driven.receiver.points.values() for value in told.labels.values()]
    assert [value for value in said for word in driven.private if word in value] == []


def test_a_closed_set_is_closed_and_small() -> None:
    for each in INSTRUMENTS:
        for label in each.labels:
            assert bool(label.values) != bool(label.closed_by)
            assert len({*label.values}) == len(label.values) <= 40


def test_operations_are_counted_by_kind_and_outcome(driven: Driven) -> None:
    def counted(kind: str, outcome: str) -> float:
        return driven.receiver.value("peculium.operations", kind=kind, outcome=outcome)

    assert counted("grant", "accepted") == 3
    assert counted("accept", "accepted") == 3
    assert counted("reserve", "accepted") == 3
    assert counted("settle", "accepted") == 2
    assert counted("spend", "refused") == 3
    assert counted("spend", "accepted") == 0


def test_refusals_are_counted_by_reason_of_operations_and_of_calls(driven: Driven) -> None:
    value = driven.receiver.value
    assert value("peculium.refusals", reason="budget_exhausted") == 3
    assert value("peculium.refusals", reason="capability_unknown") == 1
    assert value("peculium.refusals") == 4


def test_calls_that_have_to_wait_are_counted_by_the_limit_of_their_principal(
    driven: Driven,
) -> None:
    assert driven.receiver.value("peculium.calls.limited", limit="streams") == 1
    assert driven.receiver.value("peculium.calls.limited") == 1


def test_amounts_are_added_up_by_kind_and_known_units(driven: Driven) -> None:
    value = driven.receiver.value
    assert value("peculium.amounts", kind="grant", unit=UNIT) == 1_000
    assert value("peculium.amounts", kind="grant", unit="other") == 10
    assert value("peculium.amounts", kind="grant", unit="calls") == 1
    assert value("peculium.amounts", kind="reserve", unit=UNIT) == 61
    assert value("peculium.amounts", kind="settle", unit=UNIT) == 110


def test_overrun_is_what_a_tree_did_not_have(driven: Driven) -> None:
    assert driven.receiver.value("peculium.overrun", unit="other") == 3
    assert driven.receiver.value("peculium.overrun", unit=UNIT) == 0


def test_overruns_begin_with_0_so_that_the_first_is_an_increase(driven: Driven) -> None:
    assert {told.labels["unit"] for told in driven.receiver.of("peculium.overrun")} == {
        *instruments.UNITS
    }


def test_calls_are_measured_by_method_and_status(driven: Driven) -> None:
    def calls(method: str, status: str) -> float:
        labels = {"rpc.method": f"peculium.v1.{method}", "rpc.response.status_code": status}
        return driven.receiver.value("rpc.server.call.duration", **labels)

    assert calls("AdminService/Grant", "OK") == 3
    assert calls("LedgerService/GetBudget", "NOT_FOUND") == 1
    # Refusals within a batch are no failures of the call.
    assert calls("LedgerService/Batch", "OK") >= 3


def test_the_balances_of_a_chosen_root_are_told(driven: Driven) -> None:
    def balance(name: str) -> float:
        return driven.receiver.value("peculium.root.balance", root=ROOT, balance=name)

    driven.receiver.wait(lambda: balance("forfeited") == 1)
    # The child was lent 10 for what its call was billed beyond all that it had.
    assert (balance("granted"), balance("delegated"), balance("available")) == (1_000, 110, 889)


def test_exemplars_lead_to_traces_that_were_exported(driven: Driven) -> None:
    receiver = driven.receiver

    def traced(metric: str) -> bool:
        """Whether the metric names traces, and all of them have arrived."""
        named = receiver.exemplars.get(metric, set())
        return bool(named) and named <= {span.trace_id.hex() for span in receiver.spans}

    receiver.wait(lambda: traced("rpc.server.call.duration"))
    receiver.wait(lambda: traced("peculium.lane.commit.duration"))


def test_a_server_says_what_it_is(driven: Driven) -> None:
    assert {service["service.name"] for service in driven.receiver.services} == {"peculium"}
    [instance] = {service["service.instance.id"] for service in driven.receiver.services}
    assert instance
    assert all(service["service.version"] for service in driven.receiver.services)


# -- What is written from the table -----------------------------------------------------------------------


def _metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:peculium|rpc_server)_[a-z_]+", expression))


def _known() -> set[str]:
    names = set()
    for each in INSTRUMENTS:
        parts = ("_bucket", "_count", "_sum") if each.sort is Sort.HISTOGRAM else ("",)
        names |= {each.prometheus + part for part in parts}
    return names


def test_alerts_and_dashboard_ask_for_metrics_that_there_are() -> None:
    panels = json.loads(metrics.dashboard())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    rules = [alert.expression for alert in metrics.ALERTS]
    for expression in (*queries, *rules):
        asked = _metrics_in(expression)
        assert asked
        assert asked <= _known(), expression
    assert [panel["title"] for panel in panels] == [each.name for each in INSTRUMENTS]


def test_names_in_prometheus_are_those_of_opentelemetrys_rules() -> None:
    assert {each.name: each.prometheus for each in INSTRUMENTS if each.unit == "s"} == {
        "rpc.server.call.duration": "rpc_server_call_duration_seconds",
        "peculium.lane.commit.duration": "peculium_lane_commit_duration_seconds",
        "peculium.sweeper.lag": "peculium_sweeper_lag_seconds",
        "peculium.checkpoint.lag": "peculium_checkpoint_lag_seconds",
        "peculium.alerter.lag": "peculium_alerter_lag_seconds",
        "peculium.outbox.age": "peculium_outbox_age_seconds",
    }
    for each in INSTRUMENTS:
        assert each.prometheus.endswith("_total") is (each.sort is Sort.COUNTER)
        # Other units would be a part of the name, and the rules would be different for them.
        assert each.unit == "s" or re.fullmatch(r"\{[a-z]+\}", each.unit)
        assert re.fullmatch(r"[a-z]+(\.[a-z]+)+", each.name)
        assert not each.name.endswith((".total", ".seconds", ".bucket", ".count", ".sum"))
    assert len({each.prometheus for each in INSTRUMENTS}) == len(INSTRUMENTS)


def _queries() -> list[str]:
    panels = json.loads(metrics.dashboard())["panels"]
    # Grafana puts a duration there.
    return [
        target["expr"].replace("$__rate_interval", "1m")
        for panel in panels
        for target in panel["targets"]
    ]


@pytest.mark.parametrize(
    "expression", [*_queries(), *(alert.expression for alert in metrics.ALERTS)]
)
def test_whatever_prometheus_is_asked_is_promql(expression: str) -> None:
    promql_parser.parse(expression)


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    dashboard = json.loads(metrics.dashboard())
    assert {"title", "uid", "schemaVersion", "time", "templating", "panels"} <= set(dashboard)
    # From Grafana 10 on.
    assert dashboard["schemaVersion"] == 39
    [variable] = dashboard["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    source = {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set()
    for panel in panels:
        assert panel["type"] == "timeseries"
        assert panel["fieldConfig"]["defaults"]["unit"] in {"cps", "s", "short"}
        for target in panel["targets"]:
            assert panel["datasource"] == target["datasource"] == source
            assert not re.findall(r"\$\w+", target["expr"].replace("$__rate_interval", ""))
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        grid = panel["gridPos"]
        assert 0 <= grid["x"] <= 24 - grid["w"]
        places.add((grid["x"], grid["y"]))
    # Panels are as large as each other, so none lies over another one.
    assert len(places) == len(panels)


def test_alerts_ask_for_label_values_that_there_are() -> None:
    values = {value for each in INSTRUMENTS for label in each.labels for value in label.values}
    for alert in metrics.ALERTS:
        for _, asked in re.findall(r'(\w+)(?:!=|=~|=)"([^"]+)"', alert.expression):
            assert set(asked.split("|")) <= values, alert.name


def test_the_page_for_operators_says_what_to_do_about_each_alert() -> None:
    page = Path(metrics.__file__).parents[1] / "docs" / "operating" / "observability.md"
    said = page.read_text(encoding="utf-8")
    assert [alert.name for alert in metrics.ALERTS if alert.name not in said] == []


def test_units_that_are_added_up_are_those_that_trees_may_have() -> None:
    assert instruments.UNITS[-1] == "other"
    with contextlib.suppress(StopIteration):
        assert next(unit for unit in instruments.UNITS if not re.fullmatch(r"[a-z0-9_]+", unit))
