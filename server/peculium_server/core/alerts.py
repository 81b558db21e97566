"""Alerts: what is watched for, when it has happened, and what is told of it.

A rule watches the subtree of one budget. What an entry tells (a dispute, an overrun, a freeze) is an
event, and every event is an alert. What a subtree has used is looked at now and then: a rule fires when
it is found at or above its threshold, once, and is armed again when it is found below.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Any, Final, NamedTuple
from uuid import UUID

from peculium_server.core.limits import SECOND_US
from peculium_server.core.operations import Kind
from peculium_server.core.refusals import id_text, time_text
from peculium_server.core.state import Entry, HoldState

RULES_MAX: Final = 64
"""Rules of one tree: each threshold is looked at whenever the tree moves."""
RULES_OF_ALL_MAX: Final = 4_096
WEBHOOKS_MAX: Final = 32
"""Of a ledger: each alert is a row, and a call, for each of them that it concerns."""
URL_BYTES_MAX: Final = 2_048

BASIS_POINTS: Final = 10_000
"""Hundredths of a percent in the whole."""
BASIS_POINTS_MAX: Final = 10 * BASIS_POINTS

_DOMAIN: Final = b"peculium.alert.v1\x00"


class AlertKind(IntEnum):
    """What a rule watches for. Numbers are those of the wire and of the rows."""

    USED = 1
    """The subtree has used so much: spent and forfeited, closed budgets included."""
    DISPUTE = 2
    """A dispute was opened in the subtree."""
    OVERRUN = 3
    """The tree was billed beyond what it had, and was not before."""
    FREEZE = 4
    """An admin has frozen a budget of the subtree, or one above it."""


class Rule(NamedTuple):
    """What is watched for, and how far that is."""

    rule_id: bytes
    lane: int
    root_id: bytes
    budget_id: bytes
    """The top of the subtree."""
    line: tuple[bytes, ...]
    """The top and its ancestors, upwards."""
    path: str
    unit: str
    kind: AlertKind
    basis_points: int
    """Of what the top was granted; 0 if the threshold is an amount, or there is none."""
    amount: int
    """In the tree's unit; 0 if the threshold is a share, or there is none."""
    since: int
    """The lane's position when the rule was made: only what came after it is an event."""
    created_at: int
    created_by: str
    deleted_at: int | None = None
    deleted_by: str | None = None
    armed: bool = True
    """It fires when it finds its threshold crossed."""
    due: bool = True
    """It is to be looked at although its tree may not have moved."""
    crossings: int = 0
    """How often it has fired, if it has a threshold."""

    def threshold(self, granted: int) -> int:
        """The least that crosses it, where the top was granted so much; at least 1."""
        if not self.basis_points:
            return self.amount
        return max(1, -(-granted * self.basis_points // BASIS_POINTS))


class Reading(NamedTuple):
    """A subtree as it was found."""

    at: int
    used: int
    granted: int
    """What its top was granted."""
    closed: bool
    """Its top, or a budget above it, is closed."""


class Alert(NamedTuple):
    """One thing that has happened, once for each rule that watches for it."""

    alert_id: bytes
    """Made of the rule and of what has happened: telling it twice is telling the same."""
    lane: int
    rule_id: bytes
    root_id: bytes
    budget_id: bytes
    """The top of the subtree that is watched."""
    line: tuple[bytes, ...]
    path: str
    unit: str
    kind: AlertKind
    at: int
    """When it was found to have used so much; or when the event was decided."""
    amount: int
    """Used; disputed by the operation; the overrun after it; 0 of a freeze."""
    threshold: int
    """What was crossed; 0 of an event."""
    granted: int
    """What the top was granted; 0 of an event."""
    source_id: bytes
    """The budget where it has happened; of what was used, the top."""
    source_path: str
    operation_id: bytes | None = None
    """Of an event."""
    hold_id: bytes | None = None
    """Of a dispute."""
    principal: str | None = None
    """Who has done what the event is of."""


class Numbered(NamedTuple):
    """An alert as it was recorded."""

    number: int
    """1, 2, 3, … in the ledger."""
    recorded_at: int
    alert: Alert


class Event(NamedTuple):
    """What an entry tells that rules may watch for."""

    kind: AlertKind
    amount: int
    hold_id: bytes | None = None


def event_of(entry: Entry) -> Event | None:
    """What an entry tells that rules may watch for; None if that is nothing."""
    hold = entry.effect.hold
    if entry.kind is Kind.FREEZE:
        return Event(AlertKind.FREEZE, 0)
    # Nothing but an admin's Resolve, which has no limit, is possible with a disputed hold: so whatever
    # leaves one disputed has opened the dispute.
    if hold is not None and hold.state is HoldState.DISPUTED:
        return Event(AlertKind.DISPUTE, hold.disputed, hold.hold_id)
    overrun = entry.money.overrun
    if overrun and overrun == entry.effect.changes.overrun:
        return Event(AlertKind.OVERRUN, overrun)
    return None


def concerns(rule: Rule, event: Event, line: tuple[bytes, ...]) -> bool:
    """Say whether an event of the rule's tree is one that it watches for.

    Args:
        rule: Of the tree.
        event: What has happened.
        line: The budget where it has happened, and its ancestors.
    """
    if rule.kind is not event.kind:
        return False
    if rule.kind is AlertKind.OVERRUN:
        # It is the root's, and blocks everything below.
        return True
    below = rule.budget_id in line
    return below or (rule.kind is AlertKind.FREEZE and line[0] in rule.line)


def alert_of(rule: Rule, event: Event, entry: Entry, path: str) -> Alert:
    """The alert of an event; `path` is where it has happened."""
    return Alert(
        alert_id=_alert_id(rule, entry.operation_id),
        **_of_rule(rule),
        at=entry.at,
        amount=event.amount,
        threshold=0,
        granted=0,
        source_id=entry.budget_id,
        source_path=path,
        operation_id=entry.operation_id,
        hold_id=event.hold_id,
        principal=entry.principal,
    )


def look(rule: Rule, reading: Reading) -> tuple[Rule, Alert | None]:
    """The rule after its subtree was looked at, and the alert if it has fired.

    A share of a closed budget is not crossed, nor is the rule armed again: what a closed budget has not
    used flows back, so that all that it is granted in the end is what it has used.
    """
    rule = rule._replace(due=False)
    if rule.basis_points and reading.closed:
        return rule, None
    threshold = rule.threshold(reading.granted)
    if reading.used < threshold:
        return rule._replace(armed=True), None
    if not rule.armed:
        return rule, None
    rule = rule._replace(armed=False, crossings=rule.crossings + 1)
    return rule, Alert(
        alert_id=_alert_id(rule, rule.crossings.to_bytes(8)),
        **_of_rule(rule),
        at=reading.at,
        amount=reading.used,
        threshold=threshold,
        granted=reading.granted,
        source_id=rule.budget_id,
        source_path=rule.path,
    )


def _of_rule(rule: Rule) -> dict[str, Any]:
    return {
        name: getattr(rule, name)
        for name in (
            "lane",
            "rule_id",
            "root_id",
            "budget_id",
            "line",
            "path",
            "unit",
            "kind",
        )
    }


def _alert_id(rule: Rule, happened: bytes) -> bytes:
    """A UUIDv8 of the rule and of what has happened."""
    made = bytearray(hashlib.sha256(_DOMAIN + rule.rule_id + happened).digest()[:16])
    made[6] = made[6] & 0x0F | 0x80
    made[8] = made[8] & 0x3F | 0x80
    return bytes(made)


# -- Webhooks -----------------------------------------------------------------------------------------


class Webhook(NamedTuple):
    """Where alerts are sent to. Its secret is not among what is known of it."""

    webhook_id: bytes
    url: str
    root_id: bytes | None
    budget_id: bytes | None
    """Only alerts of rules on this budget or below it; None: all alerts of the ledger."""
    path: str
    created_at: int
    created_by: str
    deleted_at: int | None = None
    deleted_by: str | None = None

    def wants(self, alert: Alert) -> bool:
        """Say whether an alert is sent to it."""
        if self.deleted_at is not None:
            return False
        return self.budget_id is None or self.budget_id in alert.line


class DeliveryState(IntEnum):
    """Where a delivery is. Numbers are those of the wire and of the rows."""

    PENDING = 1
    """To be tried, or tried again."""
    DELIVERED = 2
    """The receiver has answered that it took it."""
    DEAD = 3
    """It was tried often enough, or its webhook was deleted: only a replay tries it again."""


WEBHOOK_DELETED: Final = "the webhook was deleted"

ATTEMPTS_MAX: Final = 10
_DELAY_FIRST_US: Final = 5 * SECOND_US
_DELAY_SHIFT: Final = 2
"""Each delay is four times the one before."""
DELAY_US_MAX: Final = 86_400 * SECOND_US
JITTER_STEPS: Final = 1 << 16


def delay_after(attempts: int, jitter: int) -> int | None:
    """How long a delivery waits that has failed so often, in microseconds; None: it is dead.

    Args:
        attempts: At least 1.
        jitter: By chance, from 0 to JITTER_STEPS: as much of the second half of the delay is waited.
    """
    if attempts >= ATTEMPTS_MAX:
        return None
    whole = min(_DELAY_FIRST_US << _DELAY_SHIFT * (attempts - 1), DELAY_US_MAX)
    return whole // 2 + whole * jitter // (2 * JITTER_STEPS)


def document(numbered: Numbered) -> dict[str, Any]:
    """What receivers are told of an alert, as JSON. Amounts are texts: they may be above 2⁵³."""
    number, recorded_at, alert = numbered
    data: dict[str, Any] = {
        "alert_id": id_text(alert.alert_id),
        "number": number,
        "rule_id": id_text(alert.rule_id),
        "budget": alert.path,
        "root_id": id_text(alert.root_id),
        "budget_id": id_text(alert.budget_id),
        "unit": alert.unit,
        "recorded_at": time_text(recorded_at),
    }
    if alert.kind is AlertKind.USED:
        data |= {
            "used": str(alert.amount),
            "threshold": str(alert.threshold),
            "granted": str(alert.granted),
        }
    else:
        data |= {
            "happened_in": alert.source_path,
            "operation_id": str(UUID(bytes=alert.operation_id or bytes(16))),
            "by": alert.principal or "",
        }
    if alert.kind is AlertKind.DISPUTE:
        data |= {"disputed": str(alert.amount), "hold_id": id_text(alert.hold_id or bytes(16))}
    if alert.kind is AlertKind.OVERRUN:
        data["overrun"] = str(alert.amount)
    return {
        "type": f"budget.{alert.kind.name.lower()}",
        "timestamp": time_text(alert.at),
        "data": data,
    }


def trial(webhook_id: bytes, now: int) -> dict[str, Any]:
    """What a receiver is told to see whether it is one."""
    return {
        "type": "webhook.test",
        "timestamp": time_text(now),
        "data": {"webhook_id": id_text(webhook_id)},
    }
