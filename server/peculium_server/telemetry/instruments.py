"""The one table of metrics: names, units, meanings, and what their labels can say.

Whatever records, documents, draws or alerts takes them from here. A label has a closed set of values,
so that no metric grows with the ledger; what names one budget, hold, token or caller is no label.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import Enum
from itertools import product
from typing import Final, NamedTuple

from opentelemetry import metrics

from peculium_server.core.alerts import AlertKind
from peculium_server.core.operations import Kind
from peculium_server.core.refusals import Refusal
from peculium_server.core.reuse import ReuseKind
from peculium_server.core.throttle import Limit

Observe = Callable[[metrics.CallbackOptions], Iterable[metrics.Observation]]
"""Says what there is, when somebody collects."""

_NOT_PROMETHEUS: Final = re.compile(r"[^a-zA-Z0-9_]")


class Sort(Enum):
    """How a metric is to be read."""

    COUNTER = "counter"
    """Only ever grows."""
    GAUGE = "gauge"
    """As it is now."""
    HISTOGRAM = "histogram"
    """How often, by size."""


class Label(NamedTuple):
    """What a metric is told apart by."""

    name: str
    values: tuple[str, ...]
    """All that it can say. Empty: `closed_by` does."""
    closed_by: str = ""
    """What limits the values, where the code that is at hand does not list them."""


class Instrument(NamedTuple):
    """One metric."""

    name: str
    sort: Sort
    unit: str
    """In UCUM, as OpenTelemetry writes it."""
    meaning: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    """Of a histogram: the upper bounds."""
    of_ledger: bool = False
    """It is of the whole ledger, so that every server tells the same: the highest counts, not the sum."""

    @property
    def prometheus(self) -> str:
        """Its name in Prometheus, by the rules of OpenTelemetry: dots, units and counters are written otherwise.

        https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/
        """
        name = prometheus_label(self.name)
        if self.unit == "s":
            name += "_seconds"
        return name + ("_total" if self.sort is Sort.COUNTER else "")

    def observed(self, meter: metrics.Meter, observe: Observe) -> None:
        """Have a counter or gauge read whenever somebody collects."""
        make = (
            meter.create_observable_counter
            if self.sort is Sort.COUNTER
            else meter.create_observable_gauge
        )
        make(self.name, [observe], unit=self.unit, description=self.meaning)

    def counter(self, meter: metrics.Meter) -> metrics.Counter:
        """A counter to be added to, all of whose labels have closed sets of values.

        Each begins with 0: what appears with its first event has not increased by it, and no rule would notice.
        """
        counter = meter.create_counter(self.name, unit=self.unit, description=self.meaning)
        names = [label.name for label in self.labels]
        for values in product(*(label.values for label in self.labels)):
            counter.add(0, dict(zip(names, values, strict=True)))
        return counter

    def histogram(self, meter: metrics.Meter) -> metrics.Histogram:
        """A histogram to record to."""
        return meter.create_histogram(
            self.name,
            unit=self.unit,
            description=self.meaning,
            explicit_bucket_boundaries_advisory=self.buckets,
        )


def prometheus_label(name: str) -> str:
    """How the name of a label is written in Prometheus."""
    return _NOT_PROMETHEUS.sub("_", name)


def label_of(member: Kind | Refusal | AlertKind | ReuseKind) -> str:
    """How a kind, or a reason, is written in a label."""
    return member.name.lower()


OUTCOMES: Final = ("accepted", "replayed", "dry_run", "refused", "unanswered")
UNITS: Final = ("usd_nanos", "usd_micros", "usd_cents", "tokens", "calls", "seconds", "other")
"""Trees may count anything, so their units are no closed set: `other` is all the rest, added up."""
COMMITS: Final = ("committed", "unanswered", "failed")
SQLSTATES: Final = ("40001", "40P01", "55P03", "23505", "22012", "40003", "lost", "other")
"""`22012`: what was remembered was not so any more. `lost`: the connection broke, and with it the answer."""
HOLD_STATES: Final = ("live", "lapsed")
READER_STATES: Final = ("used", "idle")
BALANCES: Final = (
    *("granted", "available", "held", "delegated", "spent", "forfeited", "overrun"),
    "advanced",
)
DUE: Final = ("hold", "lease", "collection")
SWEPT: Final = ("done", "replayed", "overtaken", "refused", "failed", "unanswered")
ROUNDS: Final = ("sealed", "more", "overtaken", "nothing")
LOOKS: Final = ("looked", "more", "overtaken", "nothing")
TRIES: Final = ("delivered", "failed", "dead")
ANSWERS: Final = ("2xx", "3xx", "4xx", "5xx", "other", "none")
LIMITS: Final = tuple(limit.value for limit in Limit)
STATUSES: Final = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND"),
    *("ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"),
    *("ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"),
    "UNAUTHENTICATED",
)

_KIND: Final = Label("kind", tuple(map(label_of, Kind)))
_REASON: Final = Label("reason", tuple(map(label_of, Refusal)))
_LANE: Final = Label("lane", (), "a ledger's lanes by number (0 to 15), and `atomic`")
_UNIT: Final = Label("unit", UNITS)
_METHOD: Final = Label("rpc.method", (), "the methods of the ledger's services")
_ROOT: Final = Label("root", (), "the names in `balance_roots`")

_SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)

CALL_DURATION: Final = Instrument(
    "rpc.server.call.duration",
    Sort.HISTOGRAM,
    "s",
    "How long calls took, by method and status",
    (
        _METHOD,
        Label("rpc.system.name", ("grpc",)),
        Label("rpc.response.status_code", STATUSES),
    ),
    _SECONDS,
)
OPERATIONS: Final = Instrument(
    "peculium.operations",
    Sort.COUNTER,
    "{operation}",
    "Operations that the ledger was asked to decide, those of the sweeper included",
    (_KIND, Label("outcome", OUTCOMES)),
)
REFUSALS: Final = Instrument(
    "peculium.refusals",
    Sort.COUNTER,
    "{refusal}",
    "Refusals that callers were told, of operations and of whole calls",
    (_REASON,),
)
LIMITED: Final = Instrument(
    "peculium.calls.limited",
    Sort.COUNTER,
    "{call}",
    "Calls that were told to wait because their principal has reached a limit",
    (Label("limit", LIMITS),),
)
AMOUNTS: Final = Instrument(
    "peculium.amounts",
    Sort.COUNTER,
    "{unit}",
    "The headline amounts of committed operations: granted, reserved, settled, delegated, …",
    (_KIND, _UNIT),
)
OVERRUN: Final = Instrument(
    "peculium.overrun",
    Sort.COUNTER,
    "{unit}",
    "Booked as overrun of roots: billed beyond what the budget and its ancestors had",
    (_UNIT,),
)
LANE_DEPTH: Final = Instrument(
    "peculium.lane.depth",
    Sort.GAUGE,
    "{operation}",
    "Operations that wait in a lane, counted as `queue_max` counts them",
    (_LANE,),
)
BATCH_SIZE: Final = Instrument(
    "peculium.lane.batch.size",
    Sort.HISTOGRAM,
    "{operation}",
    "Operations that were decided in one transaction",
    (),
    (1, 2, 4, 8, 16, 32, 64, 128, 256),
)
COMMIT_DURATION: Final = Instrument(
    "peculium.lane.commit.duration",
    Sort.HISTOGRAM,
    "s",
    "How long a lane's transaction took, from what it loads to its commit, repetitions included",
    (Label("outcome", COMMITS),),
    _SECONDS,
)
RETRIES: Final = Instrument(
    "peculium.database.retries",
    Sort.COUNTER,
    "{attempt}",
    "Attempts of transactions that failed and were made again, or given up",
    (Label("sqlstate", SQLSTATES),),
)
READERS: Final = Instrument(
    "peculium.database.readers",
    Sort.GAUGE,
    "{connection}",
    "Places for connections that reads share",
    (Label("state", READER_STATES),),
)
HOLDS: Final = Instrument(
    "peculium.holds",
    Sort.GAUGE,
    "{hold}",
    "Holds that can still be settled, in the whole ledger; counted up to 100,000 in each lane",
    (Label("state", HOLD_STATES),),
    of_ledger=True,
)
ROOT_BALANCE: Final = Instrument(
    "peculium.root.balance",
    Sort.GAUGE,
    "{unit}",
    "The balances of the roots that `balance_roots` names, in their own units",
    (_ROOT, Label("balance", BALANCES)),
    of_ledger=True,
)
REFUSALS_UNATTRIBUTED: Final = Instrument(
    "peculium.refusals.unattributed",
    Sort.COUNTER,
    "{refusal}",
    "Refusals that the table of refusals tells by reason and minute only: too many budgets at once",
)
SECURITY_EVENTS: Final = Instrument(
    "peculium.security.events",
    Sort.COUNTER,
    "{event}",
    "Secrets that were shown by another principal than whose they were: signs of stolen capabilities",
    (Label("kind", tuple(map(label_of, ReuseKind))),),
)
SWEEPER_LAG: Final = Instrument(
    "peculium.sweeper.lag",
    Sort.GAUGE,
    "s",
    "How long the earliest hold, lease or collection has been due",
    (Label("kind", DUE),),
    of_ledger=True,
)
SWEEPER_PENDING: Final = Instrument(
    "peculium.sweeper.pending",
    Sort.GAUGE,
    "{budget}",
    "Closed budgets below which something is still to be collected",
    of_ledger=True,
)
SWEEPER_OPERATIONS: Final = Instrument(
    "peculium.sweeper.operations",
    Sort.COUNTER,
    "{operation}",
    "Operations of the sweeper by kind and outcome",
    (Label("kind", DUE), Label("outcome", SWEPT)),
)
CHECKPOINT_LAG: Final = Instrument(
    "peculium.checkpoint.lag",
    Sort.GAUGE,
    "s",
    "How long the earliest operation has been recorded that no checkpoint seals",
    of_ledger=True,
)
CHECKPOINT_UNSEALED: Final = Instrument(
    "peculium.checkpoint.unsealed",
    Sort.GAUGE,
    "{operation}",
    "Operations that no checkpoint seals yet",
    of_ledger=True,
)
CHECKPOINT_ROUNDS: Final = Instrument(
    "peculium.checkpoint.rounds",
    Sort.COUNTER,
    "{round}",
    "Rounds of the sealer by outcome",
    (Label("outcome", ROUNDS),),
)

ALERTS: Final = Instrument(
    "peculium.alerts",
    Sort.COUNTER,
    "{alert}",
    "Alerts that were recorded: thresholds that were crossed, disputes, overruns and freezes",
    (Label("kind", tuple(map(label_of, AlertKind))),),
)
ALERTER_ROUNDS: Final = Instrument(
    "peculium.alerter.rounds",
    Sort.COUNTER,
    "{round}",
    "Rounds of the alerter by outcome",
    (Label("outcome", LOOKS),),
)
ALERTER_LAG: Final = Instrument(
    "peculium.alerter.lag",
    Sort.GAUGE,
    "s",
    "How long the earliest operation has been recorded, in a lane with alert rules, that was not looked at",
    of_ledger=True,
)
ALERTER_DUE: Final = Instrument(
    "peculium.alerter.due",
    Sort.GAUGE,
    "{rule}",
    "Alert rules whose subtree is still to be summed up: new ones, and those whose sum takes long or fails",
    of_ledger=True,
)
WEBHOOK_TRIES: Final = Instrument(
    "peculium.webhook.tries",
    Sort.COUNTER,
    "{try}",
    "Tries to deliver an alert to a webhook: delivered, failed and to be tried again, or dead",
    (Label("outcome", TRIES), Label("answer", ANSWERS)),
)
OUTBOX_DEPTH: Final = Instrument(
    "peculium.outbox.depth",
    Sort.GAUGE,
    "{delivery}",
    "Alerts that are still to be delivered to a webhook, counted once for each",
    of_ledger=True,
)
OUTBOX_AGE: Final = Instrument(
    "peculium.outbox.age",
    Sort.GAUGE,
    "s",
    "How long the earliest alert has been recorded that is still to be delivered to a webhook",
    of_ledger=True,
)

INSTRUMENTS: Final = (
    *(CALL_DURATION, OPERATIONS, REFUSALS, LIMITED, AMOUNTS, OVERRUN),
    *(LANE_DEPTH, BATCH_SIZE, COMMIT_DURATION, RETRIES, READERS),
    *(HOLDS, ROOT_BALANCE, REFUSALS_UNATTRIBUTED, SECURITY_EVENTS),
    *(SWEEPER_LAG, SWEEPER_PENDING, SWEEPER_OPERATIONS),
    *(CHECKPOINT_LAG, CHECKPOINT_UNSEALED, CHECKPOINT_ROUNDS),
    *(ALERTS, ALERTER_ROUNDS, ALERTER_LAG, ALERTER_DUE),
    *(WEBHOOK_TRIES, OUTBOX_DEPTH, OUTBOX_AGE),
)
"""All of them, in the order in which they are documented."""
