"""What is written from the table of metrics: its page, a dashboard, and rules for alerts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from peculium_server.telemetry import instruments as table
from peculium_server.telemetry.instruments import (
    INSTRUMENTS,
    Instrument,
    Label,
    Sort,
    prometheus_label,
)

_RANGE = "$__rate_interval"
_PANEL_WIDTH, _PANEL_HEIGHT, _PANELS_IN_A_ROW = 12, 8, 2


class Alert(NamedTuple):
    """When somebody has to look."""

    name: str
    expression: str
    minutes: int
    """It has to be so for that long."""
    severity: str
    summary: str
    action: str
    """What to do."""


def _rate(instrument: Instrument, minutes: int = 5) -> str:
    return f"rate({instrument.prometheus}[{minutes}m])"


def _quantile(quantile: float, instrument: Instrument, window: str) -> str:
    bucket = f"{instrument.prometheus}_bucket"
    return f"histogram_quantile({quantile}, sum by (le) (rate({bucket}[{window}])))"


_COMMITS = f"{table.COMMIT_DURATION.prometheus}_count"

ALERTS: tuple[Alert, ...] = (
    Alert(
        "PeculiumAbsent",
        f"absent({table.SWEEPER_LAG.prometheus})",
        5,
        "critical",
        "No server tells anything",
        "Look whether servers run, and whether what they export arrives.",
    ),
    Alert(
        "PeculiumNoCommits",
        f'sum(rate({_COMMITS}{{outcome!="committed"}}[5m])) > 0'
        f' unless sum(rate({_COMMITS}{{outcome="committed"}}[5m])) > 0',
        2,
        "critical",
        "Transactions are tried, and none is committed",
        "Look whether the database is there, takes writes and has disk left; the servers' log has its"
        " SQLSTATE.",
    ),
    Alert(
        "PeculiumUnanswered",
        f'sum(rate({table.OPERATIONS.prometheus}{{outcome="unanswered"}}[5m]))'
        f" > 0.01 * sum({_rate(table.OPERATIONS)})",
        5,
        "warning",
        "More than 1 % of operations get no answer",
        "Callers send them again by themselves. Look at lane depth, commit time and retries.",
    ),
    Alert(
        "PeculiumSlowCommits",
        f"{_quantile(0.99, table.COMMIT_DURATION, '5m')} > 1",
        10,
        "warning",
        "1 % of transactions take more than a second",
        "Look at the database's disk and at who else uses it; then at batch size and retries.",
    ),
    Alert(
        "PeculiumRetries",
        f"sum({_rate(table.RETRIES)}) > 0.2 * sum(rate({_COMMITS}[5m]))",
        10,
        "warning",
        "More than one in five transactions has to be made again",
        "By SQLSTATE: 40001 and 55P03 mean that servers share lanes, which is right but slow: let most"
        " callers of a tree use one server. `lost` means the network or a failover.",
    ),
    Alert(
        "PeculiumSweeperBehind",
        f"max({table.SWEEPER_LAG.prometheus}) > 60",
        5,
        "warning",
        "Something has been due for more than a minute",
        "Look whether any server sweeps (`sweep_seconds`), and for `refused` and `failed` among"
        " the sweeper's operations. Money of ended leases stays away meanwhile; nothing is spent twice.",
    ),
    Alert(
        "PeculiumCheckpointsBehind",
        f"max({table.CHECKPOINT_LAG.prometheus}) > 900",
        5,
        "warning",
        "Something was recorded more than 15 minutes ago and is not sealed",
        "Look whether any server has a signing key, and for lanes in the log that are not sealed any"
        " further: those are to be verified at once.",
    ),
    Alert(
        "PeculiumSweeperFails",
        f'sum(rate({table.SWEEPER_OPERATIONS.prometheus}{{outcome=~"refused|failed"}}[15m])) > 0',
        15,
        "critical",
        "What is due cannot be done",
        "Rows contradict each other: the log has the ids. Verify the ledger.",
    ),
    Alert(
        "PeculiumRefusalStorm",
        f"sum by (reason) ({_rate(table.REFUSALS)}) > 50",
        5,
        "warning",
        "More than 50 refusals a second for one reason",
        "`peculium audit refusals` says which budgets. An agent that does not take no for an answer"
        " costs the ledger little, and shows that its own loop has no end.",
    ),
    Alert(
        "PeculiumTokenReuse",
        f"sum by (kind) (increase({table.SECURITY_EVENTS.prometheus}[10m])) > 0",
        0,
        "warning",
        "A secret was shown by another principal than whose it is",
        "`peculium audit security-events` says who has shown whose. A capability was stolen, or handed over and"
        " used once more: freeze the budget, recover it for its owner, and change the key of who it was.",
    ),
    Alert(
        "PeculiumCredentials",
        f'sum(rate({table.REFUSALS.prometheus}{{reason="unauthenticated"}}[5m])) > 1',
        10,
        "warning",
        "More than one call a second has no known credentials",
        "A key that was taken away is still in use, or somebody tries keys: the log of calls says from"
        " which method on.",
    ),
    Alert(
        "PeculiumLimited",
        f"sum by (limit) ({_rate(table.LIMITED)}) > 10",
        5,
        "warning",
        "More than 10 calls a second are told to wait by a limit of their principal",
        "A loop without an end, or a fleet that has outgrown `principal_rate_max` and the like: the log of"
        " calls says which principal.",
    ),
    Alert(
        "PeculiumOverrun",
        f"sum by (unit) (increase({table.OVERRUN.prometheus}[10m])) > 0",
        0,
        "warning",
        "A tree was billed beyond what it had",
        "Nothing can be reserved in that tree until it is topped up. Find the settle with"
        " `peculium entries ROOT --tree --kind settle`; estimates were too low.",
    ),
    Alert(
        "PeculiumLapses",
        f'sum(rate({table.OPERATIONS.prometheus}{{kind="lapse",outcome="accepted"}}[15m]))'
        f' > 0.05 * sum(rate({table.OPERATIONS.prometheus}{{kind="reserve",outcome="accepted"}}[15m]))',
        15,
        "warning",
        "More than 5 % of holds lapse",
        "Their money counts as forfeited. Agents die, or their calls take longer than the holds' ttl.",
    ),
    Alert(
        "PeculiumReadersBusy",
        f'min by (instance) ({table.READERS.prometheus}{{state="idle"}}) == 0',
        10,
        "warning",
        "All connections for reads are in use",
        "Audits, statements and verifications wait for each other: raise `database_connections`, or"
        " ask them of a server of their own.",
    ),
    Alert(
        "PeculiumAlerterBehind",
        f"max({table.ALERTER_LAG.prometheus}) > 60",
        5,
        "warning",
        "Something was recorded more than a minute ago and was not looked at for alerts",
        "Look whether any server looks (`alert_seconds`), and what its log says of rounds that fail."
        " Nothing is missed: what was recorded meanwhile is looked at afterwards.",
    ),
    Alert(
        "PeculiumOutboxBehind",
        f"max({table.OUTBOX_AGE.prometheus}) > 900",
        5,
        "warning",
        "An alert was recorded more than 15 minutes ago and is still to be delivered to a webhook",
        "`peculium webhooks deliveries --state pending` says to which and why; look whether any server"
        " has a `webhook_key_file`.",
    ),
    Alert(
        "PeculiumDeliveriesDead",
        f'sum(increase({table.WEBHOOK_TRIES.prometheus}{{outcome="dead"}}[15m])) > 0',
        0,
        "warning",
        "An alert was tried to be delivered often enough, and is not tried any more",
        "`peculium webhooks deliveries --state dead` says to which webhook and why; once its receiver"
        " answers, `peculium webhooks replay ID --dead`.",
    ),
)


# -- The page -----------------------------------------------------------------------------------------


def metrics_page() -> str:
    """The page of all metrics."""
    lines = [
        "# Metrics",
        "",
        "What a server counts, by OpenTelemetry; how to get it is in [observability](../operating/observability.md).",
        "Labels have closed sets of values: none of them grows with the ledger, and none is an id.",
        "Metrics of the whole ledger are told by every server alike: take the highest, not the sum.",
        "",
        "<!-- Written by tools/reference.py from server/peculium_server/telemetry/instruments.py. -->",
        "",
        "| metric | in Prometheus | sort | unit | labels |",
        "|---|---|---|---|---|",
    ]
    for each in INSTRUMENTS:
        labels = ", ".join(f"`{label.name}`" for label in each.labels) or "none"
        lines.append(
            f"| [{each.name}](#{_anchor(each.name)}) | `{each.prometheus}` | {each.sort.value}"
            f" | `{each.unit}` | {labels} |"
        )
    for each in INSTRUMENTS:
        lines += ["", f"## {each.name}", "", f"{each.meaning}.", *_facts(each)]
    return "\n".join([*lines, ""])


def _anchor(heading: str) -> str:
    return heading.replace(".", "")


def _facts(instrument: Instrument) -> Iterator[str]:
    if instrument.of_ledger:
        yield ""
        yield "Of the whole ledger."
    for label in instrument.labels:
        yield ""
        yield f"`{label.name}`: {_values(label)}."
    if instrument.buckets:
        yield ""
        yield f"Buckets up to {', '.join(f'{bound:g}' for bound in instrument.buckets)}."


def _values(label: Label) -> str:
    return label.closed_by or ", ".join(f"`{value}`" for value in label.values)


# -- The dashboard ------------------------------------------------------------------------------------


def dashboard() -> str:
    """A Grafana dashboard: a panel for each metric."""
    panels = [_panel(index, each) for index, each in enumerate(INSTRUMENTS)]
    document = {
        "title": "Peculium",
        "uid": "peculium",
        "tags": ["peculium"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Data source",
                    "type": "datasource",
                    "query": "prometheus",
                }
            ]
        },
        "panels": panels,
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _panel(index: int, instrument: Instrument) -> dict[str, Any]:
    row, column = divmod(index, _PANELS_IN_A_ROW)
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [
        {"refId": letter, "datasource": source, "expr": expression, "legendFormat": legend}
        | ({"exemplar": True} if instrument.sort is Sort.HISTOGRAM else {})
        for letter, (expression, legend) in zip("ABC", _queries(instrument), strict=False)
    ]
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": instrument.name,
        "description": f"{instrument.meaning}.",
        "datasource": source,
        "gridPos": {
            "x": column * _PANEL_WIDTH,
            "y": row * _PANEL_HEIGHT,
            "w": _PANEL_WIDTH,
            "h": _PANEL_HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": _unit(instrument)}, "overrides": []},
        "targets": targets,
    }


def _unit(instrument: Instrument) -> str:
    if instrument.sort is Sort.COUNTER:
        return "cps"
    return "s" if instrument.unit == "s" else "short"


def _queries(instrument: Instrument) -> Iterator[tuple[str, str]]:
    """What a panel shows of a metric, each with its legend."""
    name = instrument.prometheus
    labels = [prometheus_label(label.name) for label in instrument.labels if len(label.values) != 1]
    by = f" by ({', '.join(labels)})" if labels else ""
    legend = " ".join(f"{{{{{label}}}}}" for label in labels) or instrument.name
    match instrument.sort:
        case Sort.COUNTER:
            yield f"sum{by} (rate({name}[{_RANGE}]))", legend
        case Sort.GAUGE:
            yield f"{'max' if instrument.of_ledger else 'sum'}{by} ({name})", legend
        case Sort.HISTOGRAM:
            yield _quantile(0.5, instrument, _RANGE), "half"
            yield _quantile(0.99, instrument, _RANGE), "99 %"
            yield f"sum(rate({name}_count[{_RANGE}]))", "how many a second"


# -- The alerts ---------------------------------------------------------------------------------------


def alerts() -> str:
    """Prometheus' rules."""
    lines = [
        "# Written by tools/reference.py from tools/metrics.py; copy it, and change the bounds to yours.",
        "groups:",
        "  - name: peculium",
        "    rules:",
    ]
    for alert in ALERTS:
        lines += [
            f"      - alert: {alert.name}",
            f"        expr: {_quoted(alert.expression)}",
            *([f"        for: {alert.minutes}m"] if alert.minutes else []),
            "        labels:",
            f"          severity: {alert.severity}",
            "        annotations:",
            f"          summary: {_quoted(alert.summary)}",
            f"          description: {_quoted(alert.action)}",
        ]
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    """A JSON string is a YAML one."""
    return json.dumps(text, ensure_ascii=False)
