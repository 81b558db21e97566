"""Prometheus itself: it accepts the rules, fires when it should, and finds on the page what rules ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import peculium
from peculium.errors import BudgetExhausted
from peculium_server.telemetry import instruments as table
from tests.forked import Forked
from tests.postgres import Server as PostgresServer
from tests.server import RunningServer, starting
from tests.telemetry.page import page_of
from tests.telemetry.prometheus import Prometheus, needs_prometheus, promtool, scraping
from tests.telemetry.receiver import Receiver, receiving
from tools import metrics

DEPLOY = Path(metrics.__file__).parents[1] / "deploy" / "prometheus"
RULES = DEPLOY / "alerts.yaml"
MINUTES = 40
"""After so many it is looked which alerts fire; values are those of each minute."""

Series = Mapping[str, str]
_COMMITTED = f"{table.COMMIT_DURATION.prometheus}_count"
_UP_TO = f"{table.COMMIT_DURATION.prometheus}_bucket"
_OPERATIONS = table.OPERATIONS.prometheus
_DEAD = f'{table.WEBHOOK_TRIES.prometheus}{{outcome="dead",answer="5xx"}}'


def growing(each_minute: int) -> str:
    """A counter."""
    return f"0+{each_minute}x{MINUTES}"


def constant(value: int) -> str:
    return f"{value}x{MINUTES}"


def for_the_last(minutes: int, value: int, before: int = 0) -> str:
    """Something that has been so for some minutes."""
    return f"{before}x{MINUTES - minutes - 1} {value}x{minutes}"


class Case(NamedTuple):
    """What there is, and whether an alert fires then."""

    alert: str
    series: Series
    fires: Mapping[str, str] | None
    """With which labels of its own; None: it does not."""


def gauge(alert: str, name: str, most: int, minutes: int) -> list[Case]:
    """The cases of an alert on a gauge that has been above a bound for some minutes."""
    return [
        Case(alert, {name: constant(most + 1)}, {}),
        Case(alert, {name: for_the_last(minutes + 1, most + 1)}, {}),
        Case(alert, {name: for_the_last(minutes - 1, most + 1)}, None),
        Case(alert, {name: constant(most)}, None),
    ]


CASES = [
    Case("PeculiumAbsent", {f'{table.HOLDS.prometheus}{{state="live"}}': constant(1)}, {}),
    Case("PeculiumAbsent", {f'{table.SWEEPER_LAG.prometheus}{{kind="hold"}}': constant(0)}, None),
    *(
        Case(
            "PeculiumNoCommits",
            {
                f'{_COMMITTED}{{outcome="failed"}}': growing(failed),
                f'{_COMMITTED}{{outcome="committed"}}': growing(committed),
            },
            fires,
        )
        for failed, committed, fires in ((5, 0, {}), (5, 1, None), (0, 0, None), (0, 5, None))
    ),
    Case("PeculiumNoCommits", {f'{_COMMITTED}{{outcome="unanswered"}}': growing(1)}, {}),
    *(
        Case(
            "PeculiumUnanswered",
            {
                f'{_OPERATIONS}{{kind="spend",outcome="unanswered"}}': growing(unanswered),
                f'{_OPERATIONS}{{kind="spend",outcome="accepted"}}': growing(1_000),
            },
            fires,
        )
        for unanswered, fires in ((11, {}), (10, None), (0, None))
    ),
    *(
        Case(
            "PeculiumSlowCommits",
            {
                f'{_UP_TO}{{outcome="committed",le="1"}}': growing(1_000 - slow),
                f'{_UP_TO}{{outcome="committed",le="2.5"}}': growing(1_000),
                f'{_UP_TO}{{outcome="committed",le="+Inf"}}': growing(1_000),
            },
            fires,
        )
        for slow, fires in ((11, {}), (9, None))
    ),
    *(
        Case(
            "PeculiumRetries",
            {
                f'{table.RETRIES.prometheus}{{sqlstate="40001"}}': growing(again),
                f'{_COMMITTED}{{outcome="committed"}}': growing(1_000),
            },
            fires,
        )
        for again, fires in ((201, {}), (199, None))
    ),
    *gauge("PeculiumSweeperBehind", f'{table.SWEEPER_LAG.prometheus}{{kind="lease"}}', 60, 5),
    *gauge("PeculiumCheckpointsBehind", table.CHECKPOINT_LAG.prometheus, 900, 5),
    *(
        Case(
            "PeculiumSweeperFails",
            {f'{table.SWEEPER_OPERATIONS.prometheus}{{kind="hold",outcome="{outcome}"}}': values},
            fires,
        )
        for outcome, values, fires in (
            ("refused", growing(1), {}),
            ("failed", growing(1), {}),
            ("failed", for_the_last(10, 1), None),
            ("overtaken", growing(9), None),
        )
    ),
    Case(
        "PeculiumRefusalStorm",
        {
            f'{table.REFUSALS.prometheus}{{reason="budget_exhausted"}}': growing(51 * 60),
            f'{table.REFUSALS.prometheus}{{reason="hold_unknown"}}': growing(49 * 60),
        },
        {"reason": "budget_exhausted"},
    ),
    Case(
        "PeculiumRefusalStorm",
        {f'{table.REFUSALS.prometheus}{{reason="budget_exhausted"}}': growing(49 * 60)},
        None,
    ),
    *(
        Case(
            "PeculiumCredentials",
            {f'{table.REFUSALS.prometheus}{{reason="{reason}"}}': growing(each_minute)},
            fires,
        )
        for reason, each_minute, fires in (
            ("unauthenticated", 61, {}),
            ("unauthenticated", 59, None),
            ("budget_exhausted", 600, None),
        )
    ),
    *(
        Case(
            "PeculiumLimited",
            {f'{table.LIMITED.prometheus}{{limit="rate"}}': growing(each_minute)},
            fires,
        )
        for each_minute, fires in ((601, {"limit": "rate"}), (599, None))
    ),
    *(
        Case("PeculiumOverrun", {f'{table.OVERRUN.prometheus}{{unit="calls"}}': values}, fires)
        for values, fires in (
            # The first ever, since every counter begins with 0.
            (for_the_last(3, 7), {"unit": "calls"}),
            (for_the_last(20, 7), None),
            # The server was started again.
            (for_the_last(3, 0, before=7), None),
        )
    ),
    *(
        Case(
            "PeculiumTokenReuse",
            {f'{table.SECURITY_EVENTS.prometheus}{{kind="bound_token"}}': values},
            fires,
        )
        for values, fires in (
            (for_the_last(3, 1), {"kind": "bound_token"}),
            (for_the_last(20, 1), None),
        )
    ),
    *(
        Case(
            "PeculiumLapses",
            {
                f'{_OPERATIONS}{{kind="lapse",outcome="accepted"}}': growing(lapsed),
                f'{_OPERATIONS}{{kind="reserve",outcome="accepted"}}': growing(1_000),
            },
            fires,
        )
        for lapsed, fires in ((51, {}), (49, None))
    ),
    *(
        Case(
            "PeculiumReadersBusy",
            {
                f'{table.READERS.prometheus}{{instance="a",state="idle"}}': constant(idle),
                f'{table.READERS.prometheus}{{instance="a",state="used"}}': constant(0),
                f'{table.READERS.prometheus}{{instance="b",state="idle"}}': constant(3),
            },
            fires,
        )
        for idle, fires in ((0, {"instance": "a"}), (1, None))
    ),
    *gauge("PeculiumAlerterBehind", table.ALERTER_LAG.prometheus, 60, 5),
    *gauge("PeculiumOutboxBehind", table.OUTBOX_AGE.prometheus, 900, 5),
    Case("PeculiumDeliveriesDead", {_DEAD: for_the_last(3, 1)}, {}),
    Case("PeculiumDeliveriesDead", {_DEAD: for_the_last(20, 1)}, None),
    Case(
        "PeculiumDeliveriesDead",
        {f'{table.WEBHOOK_TRIES.prometheus}{{outcome="failed",answer="5xx"}}': growing(9)},
        None,
    ),
]


@pytest.mark.parametrize("alert", metrics.ALERTS, ids=lambda alert: alert.name)
def test_of_every_alert_it_is_said_when_it_fires_and_when_not(alert: metrics.Alert) -> None:
    fires = {case.fires is not None for case in CASES if case.alert == alert.name}
    assert fires == {True, False}


def _as_promtool_has_it(case: Case) -> dict[str, Any]:
    [alert] = [each for each in metrics.ALERTS if each.name == case.alert]
    fired = {
        "exp_labels": {"severity": alert.severity, **(case.fires or {})},
        "exp_annotations": {"summary": alert.summary, "description": alert.action},
    }
    return {
        "interval": "1m",
        "input_series": [
            {"series": name, "values": values} for name, values in case.series.items()
        ],
        "alert_rule_test": [
            {
                "eval_time": f"{MINUTES}m",
                "alertname": case.alert,
                "exp_alerts": [] if case.fires is None else [fired],
            }
        ],
    }


@needs_prometheus
def test_alerts_fire_when_they_should_and_not_when_they_should_not(tmp_path: Path) -> None:
    file = tmp_path / "cases.json"
    tests = [_as_promtool_has_it(case) for case in CASES]
    file.write_text(
        json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests})
    )
    ran = promtool("test", "rules", str(file))
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_prometheus
def test_prometheus_accepts_the_rules_and_the_settings_to_begin_with() -> None:
    ran = promtool("check", "config", str(DEPLOY / "prometheus.yaml"))
    assert ran.returncode == 0, ran.stderr
    assert f"{len(metrics.ALERTS)} rules found" in ran.stdout


# -- One that runs ------------------------------------------------------------------------------------


class Scraped(NamedTuple):
    """A Prometheus that comes to a server, whose spans are exported elsewhere."""

    prometheus: Prometheus
    server: RunningServer
    receiver: Receiver


@pytest.fixture(scope="module")
def scraped(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scraped]:
    with (
        receiving() as receiver,
        postgres.fresh_database(postgres.migrated_template()) as database,
        starting(tmp_path_factory.mktemp("server"), Forked) as start,
    ):
        server = start(
            *("--database-url", database, "--metrics-listen", "127.0.0.1:0"),
            **receiver.variables,
            OTEL_METRICS_EXPORTER="none",
        )
        with scraping(page_of(server), RULES, tmp_path_factory.mktemp("prometheus")) as prometheus:
            yield Scraped(prometheus, server, receiver)


@needs_prometheus
def test_prometheus_knows_what_a_server_has_done(scraped: Scraped) -> None:
    prometheus = scraped.prometheus
    with peculium.connect(scraped.server.address) as client:
        client.admin.grant("acme", unit="calls", amount=10, holder="dev")
        acme = client.open("acme")
        for _ in range(3):
            acme.spend(1)
        with pytest.raises(BudgetExhausted):
            acme.spend(100)
    spent = f"sum by (outcome) ({_OPERATIONS}{{kind='spend'}})"
    assert prometheus.wait(
        lambda: found if (found := prometheus.query(spent)).keys() >= {("refused",)} else None
    ) == {("accepted",): 3, ("refused",): 1}
    assert prometheus.query(f"{table.REFUSALS.prometheus}{{reason='budget_exhausted'}} == 1")
    slower = prometheus.query(f"sum({_COMMITTED}) - sum({_UP_TO}{{le='+Inf'}})")
    assert list(slower.values()) == [0]


@needs_prometheus
def test_prometheus_answers_all_that_the_dashboard_asks(scraped: Scraped) -> None:
    panels = json.loads(metrics.dashboard())["panels"]
    asked = [
        (target["expr"].replace("$__rate_interval", "1m"), panel["title"])
        for panel in panels
        for target in panel["targets"]
    ]
    assert scraped.prometheus.wait(lambda: scraped.prometheus.query("up == 1"))
    for expression, _ in asked:
        scraped.prometheus.query(expression)
    known = set(scraped.prometheus.get("label/__name__/values"))
    assert {each.prometheus for each in table.INSTRUMENTS if each.sort is table.Sort.GAUGE} - {
        # These are told with a signing key, and where roots are named.
        *(each.prometheus for each in (table.CHECKPOINT_LAG, table.CHECKPOINT_UNSEALED)),
        table.ROOT_BALANCE.prometheus,
    } <= known


@needs_prometheus
def test_no_alert_fires_of_a_server_that_is_well_and_no_rule_fails(scraped: Scraped) -> None:
    def evaluated() -> list[dict[str, Any]] | None:
        groups = (scraped.prometheus.get("rules") or {"groups": []})["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return rules if rules and all(rule["health"] != "unknown" for rule in rules) else None

    assert scraped.prometheus.wait(lambda: scraped.prometheus.query("up == 1"))
    rules = scraped.prometheus.wait(evaluated)
    assert [rule["name"] for rule in rules] == [alert.name for alert in metrics.ALERTS]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


@needs_prometheus
def test_prometheus_keeps_exemplars_that_lead_to_traces(scraped: Scraped) -> None:
    with peculium.connect(scraped.server.address) as client:
        client.admin.grant("traced", unit="calls", amount=10)

    def named() -> set[str]:
        found = scraped.prometheus.get("query_exemplars", query=_UP_TO, start="0", end="9999999999")
        return {
            exemplar["labels"]["trace_id"] for each in found or () for exemplar in each["exemplars"]
        }

    traces = scraped.prometheus.wait(named)
    scraped.receiver.wait(
        lambda: traces <= {span.trace_id.hex() for span in scraped.receiver.spans}
    )
