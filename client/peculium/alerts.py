"""Alerts: what is watched for, what was found, and whom it is sent to, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

from peculium._ids import id_text
from peculium.v1 import alerts_pb2


class AlertKind(Enum):
    """What a rule watches for."""

    USED = alerts_pb2.ALERT_KIND_USED
    """The subtree has used so much: spent and forfeited, closed budgets included."""
    DISPUTE = alerts_pb2.ALERT_KIND_DISPUTE
    """A dispute was opened in the subtree."""
    OVERRUN = alerts_pb2.ALERT_KIND_OVERRUN
    """The tree was billed beyond what it had, and was not before."""
    FREEZE = alerts_pb2.ALERT_KIND_FREEZE
    """An admin has frozen a budget of the subtree, or one above it."""
    UNKNOWN = alerts_pb2.ALERT_KIND_UNSPECIFIED
    """A kind that this version of the client does not know."""

    @classmethod
    def _missing_(cls, _: object) -> AlertKind:
        return cls.UNKNOWN


class DeliveryState(Enum):
    """Where a delivery is."""

    PENDING = alerts_pb2.DELIVERY_STATE_PENDING
    """It is to be tried, or tried again."""
    DELIVERED = alerts_pb2.DELIVERY_STATE_DELIVERED
    """The receiver has answered that it took it."""
    DEAD = alerts_pb2.DELIVERY_STATE_DEAD
    """It was tried often enough, or its webhook was deleted: only a replay tries it again."""
    UNKNOWN = alerts_pb2.DELIVERY_STATE_UNSPECIFIED
    """A state that this version of the client does not know."""

    @classmethod
    def _missing_(cls, _: object) -> DeliveryState:
        return cls.UNKNOWN


@dataclass(frozen=True, slots=True)
class AlertRule:
    """What is watched for in the subtree of a budget.

    Attributes:
        rule_id: The rule.
        root_id: The tree.
        budget_id: The top of the subtree.
        path: Its path.
        unit: The tree's unit.
        kind: What it watches for.
        percent: The threshold as a share of what the top was granted; None if it is an amount, or there
            is none.
        amount: The threshold in the tree's unit; None if it is a share, or there is none.
        armed: It fires when it finds its threshold crossed; False since it has fired, until it is found
            below again.
        crossings: How often it has fired, if it has a threshold.
        created_at: When it was made.
        created_by: The principal that made it.
        deleted_at: When it was deleted; None if it was not.
        deleted_by: The principal that deleted it; None if it was not.
    """

    rule_id: bytes
    root_id: bytes
    budget_id: bytes
    path: str
    unit: str
    kind: AlertKind
    percent: float | None
    amount: int | None
    armed: bool
    crossings: int
    created_at: datetime
    created_by: str
    deleted_at: datetime | None
    deleted_by: str | None


@dataclass(frozen=True, slots=True)
class Alert:
    """One thing that a rule has found.

    Attributes:
        number: 1, 2, 3, … in the ledger.
        alert_id: Made of the rule and of what has happened. Receivers of webhooks are told it as
            `webhook-id`.
        rule_id: The rule.
        root_id: The tree.
        budget_id: The top of the subtree that is watched.
        path: Its path.
        unit: The tree's unit.
        kind: What has happened.
        at: When it was found to have used so much; or when the event was decided.
        recorded_at: When the alert was recorded.
        amount: What the subtree has used; what the operation left disputed; the overrun after it; 0 of a
            freeze.
        threshold: What was crossed; None of an event.
        granted: What the top was granted; None of an event.
        source_id: The budget where it has happened.
        source_path: Its path.
        operation_id: The operation of an event, a UUID; None of a threshold.
        hold_id: The hold of a dispute; None otherwise.
        principal: Who has done what an event is of; None of a threshold.
    """

    number: int
    alert_id: bytes
    rule_id: bytes
    root_id: bytes
    budget_id: bytes
    path: str
    unit: str
    kind: AlertKind
    at: datetime
    recorded_at: datetime
    amount: int
    threshold: int | None
    granted: int | None
    source_id: bytes
    source_path: str
    operation_id: str | None
    hold_id: bytes | None
    principal: str | None

    def __str__(self) -> str:
        return f"{self.kind.name} of {self.path} ({id_text(self.alert_id)})"


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where alerts are sent to.

    Attributes:
        webhook_id: The webhook.
        url: The address.
        path: The budget whose alerts it gets, with those of all below it; None: all alerts of the ledger.
        created_at: When it was made.
        created_by: The principal that made it.
        deleted_at: When it was deleted; None if it was not.
        deleted_by: The principal that deleted it; None if it was not.
        secret: What its messages are signed with, for their receiver; None but where it was just made.
    """

    webhook_id: bytes
    url: str
    path: str | None
    created_at: datetime
    created_by: str
    deleted_at: datetime | None
    deleted_by: str | None
    secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class TestSent:
    """What became of a test message.

    Attributes:
        status: The HTTP status of the answer; None if there was none.
        problem: What went wrong; None if the receiver took it.
    """

    __test__ = False

    status: int | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """An alert for a webhook, and what became of it.

    Attributes:
        webhook_id: The webhook.
        alert_id: The alert.
        number: The alert's number.
        state: Where it is.
        attempts: How often it was tried, since it was made or replayed.
        next_at: When it is tried next; None unless it is pending.
        last_at: When it was tried last; None: never.
        last_status: The HTTP status of the last answer; None if there was none.
        last_problem: What went wrong the last time; None if nothing did.
    """

    webhook_id: bytes
    alert_id: bytes
    number: int
    state: DeliveryState
    attempts: int
    next_at: datetime | None
    last_at: datetime | None
    last_status: int | None
    last_problem: str | None
