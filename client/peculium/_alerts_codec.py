"""Alerts between the wire's messages and the values that callers see."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal, InvalidOperation

from google.protobuf.timestamp_pb2 import Timestamp

from peculium import _codec as codec
from peculium._ids import id_text, new_id
from peculium._requests import budget_ref, malformed
from peculium.alerts import (
    Alert,
    AlertKind,
    AlertRule,
    Delivery,
    DeliveryState,
    TestSent,
    Webhook,
)
from peculium.capability import BudgetRef
from peculium.v1 import admin_service_pb2 as admin, alerts_pb2

_BASIS_POINTS = 100
"""In a percent."""


# --- what is asked ---


def create_rule(
    budget: str | BudgetRef,
    kind: AlertKind,
    percent: float | None,
    amount: int | None,
    rule_id: bytes | None,
) -> admin.CreateAlertRuleRequest:
    """Ask for something to be watched for."""
    if kind is AlertKind.UNKNOWN:
        raise malformed("kind", "must be one that can be watched for")
    if (kind is AlertKind.USED) is not ((percent is None) is not (amount is None)):
        raise malformed("kind", "USED needs a percent or an amount; the others have neither")
    return admin.CreateAlertRuleRequest(
        rule_id=rule_id or new_id(),
        budget=budget_ref(budget),
        kind=kind.value,
        basis_points=0 if percent is None else _basis_points(percent),
        amount=0 if amount is None else _positive("amount", amount),
    )


def create_webhook(
    url: str, budget: str | BudgetRef | None, webhook_id: bytes | None
) -> admin.CreateWebhookRequest:
    """Ask for alerts to be sent somewhere."""
    return admin.CreateWebhookRequest(
        webhook_id=webhook_id or new_id(),
        url=url,
        budget=None if budget is None else budget_ref(budget),
    )


def list_deliveries(
    webhook_id: bytes | None, states: Sequence[DeliveryState], page_size: int
) -> admin.ListDeliveriesRequest:
    """Ask what became of alerts."""
    return admin.ListDeliveriesRequest(
        webhook_id=webhook_id or b"",
        states=[state.value for state in states],
        page_size=page_size,
    )


def _basis_points(percent: float) -> int:
    """Exactly what was written, in hundredths."""
    try:
        hundredths = Decimal(str(percent)) * _BASIS_POINTS
    except InvalidOperation:
        raise malformed("percent", "must be a number") from None
    if not hundredths.is_finite() or hundredths != int(hundredths):
        raise malformed("percent", "must have two digits behind the point at most")
    return _positive("percent", int(hundredths))


def _positive(name: str, value: int) -> int:
    # What the wire takes for "not said" would be another question.
    if value < 1:
        raise malformed(name, "must be above zero")
    return value


# --- what is told ---


def rule(message: alerts_pb2.AlertRule) -> AlertRule:
    """What is watched for."""
    return AlertRule(
        rule_id=message.rule_id,
        root_id=message.root_id,
        budget_id=message.budget_id,
        path=message.path,
        unit=message.unit,
        kind=AlertKind(message.kind),
        percent=message.basis_points / _BASIS_POINTS if message.basis_points else None,
        amount=message.amount or None,
        armed=message.armed,
        crossings=message.crossings,
        created_at=codec.at(message.created_at),
        created_by=message.created_by,
        deleted_at=_at(message.deleted_at, said=message.HasField("deleted_at")),
        deleted_by=message.deleted_by or None,
    )


def alert(message: alerts_pb2.Alert) -> Alert:
    """What was found."""
    crossed = message.kind == alerts_pb2.ALERT_KIND_USED
    return Alert(
        number=message.number,
        alert_id=message.alert_id,
        rule_id=message.rule_id,
        root_id=message.root_id,
        budget_id=message.budget_id,
        path=message.path,
        unit=message.unit,
        kind=AlertKind(message.kind),
        at=codec.at(message.at),
        recorded_at=codec.at(message.recorded_at),
        amount=message.amount,
        threshold=message.threshold if crossed else None,
        granted=message.granted if crossed else None,
        source_id=message.source_id,
        source_path=message.source_path,
        operation_id=id_text(message.operation_id) if message.operation_id else None,
        hold_id=message.hold_id or None,
        principal=message.principal or None,
    )


def webhook(message: alerts_pb2.Webhook, secret: str | None = None) -> Webhook:
    """Where alerts are sent to."""
    return Webhook(
        webhook_id=message.webhook_id,
        url=message.url,
        path=message.path or None,
        created_at=codec.at(message.created_at),
        created_by=message.created_by,
        deleted_at=_at(message.deleted_at, said=message.HasField("deleted_at")),
        deleted_by=message.deleted_by or None,
        secret=secret,
    )


def test_sent(message: admin.TestWebhookResponse) -> TestSent:
    """What became of a test."""
    return TestSent(message.status or None, message.problem or None)


def delivery(message: alerts_pb2.Delivery) -> Delivery:
    """What became of an alert at a webhook."""
    return Delivery(
        webhook_id=message.webhook_id,
        alert_id=message.alert_id,
        number=message.number,
        state=DeliveryState(message.state),
        attempts=message.attempts,
        next_at=_at(message.next_at, said=message.HasField("next_at")),
        last_at=_at(message.last_at, said=message.HasField("last_at")),
        last_status=message.last_status or None,
        last_problem=message.last_problem or None,
    )


def _at(stamp: Timestamp, *, said: bool) -> datetime | None:
    return codec.at(stamp) if said else None
