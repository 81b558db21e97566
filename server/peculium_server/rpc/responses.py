"""From the core to the wire: outcomes, refusals, budgets, holds and entries fill messages.

Pure. Messages are filled in place: to build them apart and copy them in would take twice as long, and
this runs for every operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from peculium.v1 import alerts_pb2, audit_service_pb2, ledger_service_pb2, types_pb2
from peculium_server.core.alerts import DeliveryState, Numbered, Rule, Webhook
from peculium_server.core.limits import SECOND_US
from peculium_server.core.operations import Kind
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refused
from peculium_server.core.state import Balances, Budget, BudgetState, Entry, Hold
from peculium_server.core.verify import Finding
from peculium_server.lanes.answers import Answer, Position, Unanswered
from peculium_server.store.alerts import Delivery
from peculium_server.store.checkpoints import Kept

_NANOS_PER_US: Final = 1000
_ENTRY_BYTES: Final = 512
"""What an entry takes beside its request and effect."""
_ALERT_BYTES: Final = 320
"""What an alert takes beside its texts."""
_PLAIN_KINDS: Final = frozenset({Kind.RESERVE, Kind.SETTLE, Kind.RELEASE, Kind.EXTEND, Kind.SPEND})
"""These have an effect on one budget and one hold; most operations are of these kinds."""


def write_answer(answer: Answer, result: ledger_service_pb2.OperationResult) -> None:
    """Write what became of one operation of a batch."""
    told, position = answer
    if isinstance(told, Outcome):
        write_outcome(told, position, result.outcome)
    elif isinstance(told, Refused):
        write_refused(told, result.refused)
        if position is not None:
            write_position(position, result.refused.ledger)
    else:
        write_unanswered(told, result.unavailable)


def write_outcome(outcome: Outcome, position: Position | None, message: types_pb2.Outcome) -> None:
    """Write what an accepted operation did."""
    message.operation_id = outcome.operation_id
    message.kind = outcome.kind  # type: ignore[assignment]
    message.budget_id = outcome.budget_id
    message.state = outcome.state  # type: ignore[assignment]
    message.seq = outcome.seq
    write_time(outcome.at, message.at)
    write_balances(outcome.money, message.balances)
    if outcome.replayed:
        message.replayed = True
    if outcome.dry_run:
        message.dry_run = True
    if outcome.lease_until is not None:
        write_time(outcome.lease_until, message.lease_expires_at)
    if outcome.hold is not None:
        write_hold(outcome.hold, message.hold)
    if outcome.kind not in _PLAIN_KINDS:
        _write_wider_effects(outcome, message)
    if position is not None:
        write_position(position, message.ledger)


def _write_wider_effects(outcome: Outcome, message: types_pb2.Outcome) -> None:
    """Write what only some kinds have: effects on other budgets, and lists."""
    for child in outcome.children:
        made = message.children.add()
        made.budget_id = child.budget_id
        made.granted = child.granted
        if child.lease_until is not None:
            write_time(child.lease_until, made.lease_expires_at)
    message.returned = outcome.returned
    message.pending = outcome.pending
    for hold in outcome.holds:
        write_hold(hold, message.holds.add())
    message.holds_truncated = outcome.holds_truncated
    if outcome.descendant_id is not None:
        message.descendant_id = outcome.descendant_id


def write_refused(refused: Refused, message: types_pb2.Refused) -> None:
    """Write why an operation was refused."""
    message.reason = refused.reason  # type: ignore[assignment]
    message.message = refused.message
    message.metadata.update(refused.facts)


def write_unanswered(unanswered: Unanswered, message: ledger_service_pb2.Unavailable) -> None:
    """Write why an operation got no answer."""
    message.reason = unanswered.reason  # type: ignore[assignment]
    message.message = unanswered.message
    message.retry_delay.FromMilliseconds(unanswered.retry_delay_ms)


def write_position(position: Position, message: types_pb2.LedgerPosition) -> None:
    """Write where in the ledger's history an answer stands."""
    message.incarnation = position.incarnation
    message.lane = position.lane
    message.position = position.number


def write_use(
    used_at: int | None, at: int, message: ledger_service_pb2.LedgerServiceGetBudgetResponse
) -> None:
    """Write when a token-held budget was last used, and when that was asked."""
    write_time(at, message.at)
    if used_at is not None:
        write_time(used_at, message.token_used_at)


def write_balances(money: Balances, message: types_pb2.Balances) -> None:
    """Write the money of a budget, or differences of it; what is zero is left out."""
    granted, available, held, delegated, spent, forfeited, overrun, advanced = money
    if granted:
        message.granted = granted
    else:
        # An absent message would read as zeros too, but a reader tells "no money" from "not told".
        message.SetInParent()
    if available:
        message.available = available
    if held:
        message.held = held
    if delegated:
        message.delegated = delegated
    if spent:
        message.spent = spent
    if forfeited:
        message.forfeited = forfeited
    if overrun:
        message.overrun = overrun
    if advanced:
        message.advanced = advanced


def write_hold(hold: Hold, message: types_pb2.Hold) -> None:
    """Write a hold, without its token."""
    message.hold_id = hold.hold_id
    message.budget_id = hold.budget_id
    message.state = hold.state  # type: ignore[assignment]
    message.amount = hold.amount
    message.remaining = hold.remaining
    if hold.booked:
        message.booked = hold.booked
    if hold.disputed:
        message.disputed = hold.disputed
    write_time(hold.created_at, message.created_at)
    write_time(hold.expires_at, message.expires_at)


def write_budget(
    budget: Budget, path: Sequence[str], state: BudgetState | None, message: types_pb2.Budget
) -> None:
    """Write a budget as a read found it.

    Args:
        budget: Its row.
        path: Names from the root downwards.
        state: What it allows, its ancestors considered; None: nobody looked at them.
        message: To be filled.
    """
    message.root_id = budget.root_id
    message.budget_id = budget.budget_id
    if budget.parent_id is not None:
        message.parent_id = budget.parent_id
    message.name = budget.name
    message.path = "/".join(path)
    message.unit = budget.unit
    message.custody = budget.custody  # type: ignore[assignment]
    message.holder = budget.holder or ""
    if state is not None:
        message.state = state  # type: ignore[assignment]
    write_balances(budget.money, message.balances)
    message.disputed = budget.disputed
    message.holds_live = budget.holds_live
    if budget.overrun_factor is not None:
        message.overrun_factor = budget.overrun_factor
    if budget.lease_until is not None:
        write_time(budget.lease_until, message.lease_expires_at)
    if budget.lease_latest is not None:
        write_time(budget.lease_latest, message.lease_latest_at)
    message.labels.update(budget.labels)
    message.seq = budget.seq
    message.version = budget.version
    write_time(budget.created_at, message.created_at)
    message.head = budget.head


def write_entry(entry: Entry, lane: int, message: audit_service_pb2.Entry) -> None:
    """Write an entry as it is recorded."""
    message.root_id = entry.root_id
    message.budget_id = entry.budget_id
    message.seq = entry.seq
    message.lane = lane
    message.position = entry.position
    message.part = entry.part
    message.parts = entry.parts
    message.operation_id = entry.operation_id
    message.kind = entry.kind  # type: ignore[assignment]
    write_time(entry.at, message.at)
    message.actor = entry.principal
    message.trace_id = entry.trace_id or b""
    message.consumed = entry.consumed or b""
    write_balances(entry.money, message.balances)
    write_balances(entry.effect.changes, message.changes)
    message.request = entry.request or b""
    message.effect = entry.effect_bytes
    message.digest = entry.digest
    message.previous_hash = entry.previous_hash
    message.hash = entry.hash
    message.amount = entry.amount


def entry_bytes(entry: Entry) -> int:
    """About how much an entry takes in a message."""
    return _ENTRY_BYTES + len(entry.request or b"") + len(entry.effect_bytes)


def write_checkpoint(kept: Kept, message: audit_service_pb2.Checkpoint) -> None:
    """Write a checkpoint as it is recorded."""
    sealed = kept.sealed
    checkpoint = sealed.checkpoint
    message.number = checkpoint.number
    write_time(checkpoint.sealed_at, message.sealed_at)
    message.merkle_root = checkpoint.merkle_root
    message.leaves = checkpoint.leaves
    message.previous_hash = checkpoint.previous_hash
    message.hash = sealed.hash
    message.key_id = sealed.key_id
    message.signature = sealed.signature
    message.public_key = kept.public_key
    message.positions.extend(checkpoint.positions)
    message.incarnation = checkpoint.incarnation


def write_finding(finding: Finding, message: audit_service_pb2.Finding) -> None:
    """Write what verification has found."""
    message.root_id = finding.root_id
    message.budget_id = finding.budget_id
    message.seq = finding.seq
    message.rule = finding.rule
    message.detail = finding.detail


def write_rule(rule: Rule, message: alerts_pb2.AlertRule) -> None:
    """Write what is watched for."""
    message.rule_id = rule.rule_id
    message.root_id = rule.root_id
    message.budget_id = rule.budget_id
    message.path = rule.path
    message.unit = rule.unit
    message.kind = rule.kind  # type: ignore[assignment]
    message.basis_points = rule.basis_points
    message.amount = rule.amount
    message.armed = rule.armed
    message.crossings = rule.crossings
    write_time(rule.created_at, message.created_at)
    message.created_by = rule.created_by
    if rule.deleted_at is not None:
        write_time(rule.deleted_at, message.deleted_at)
        message.deleted_by = rule.deleted_by or ""


def write_alert(numbered: Numbered, message: alerts_pb2.Alert) -> None:
    """Write what a rule has found."""
    number, recorded_at, alert = numbered
    message.number = number
    message.alert_id = alert.alert_id
    message.rule_id = alert.rule_id
    message.root_id = alert.root_id
    message.budget_id = alert.budget_id
    message.path = alert.path
    message.unit = alert.unit
    message.kind = alert.kind  # type: ignore[assignment]
    write_time(alert.at, message.at)
    write_time(recorded_at, message.recorded_at)
    message.amount = alert.amount
    message.threshold = alert.threshold
    message.granted = alert.granted
    message.source_id = alert.source_id
    message.source_path = alert.source_path
    message.operation_id = alert.operation_id or b""
    message.hold_id = alert.hold_id or b""
    message.principal = alert.principal or ""


def alert_bytes(numbered: Numbered) -> int:
    """About how much an alert takes in a message."""
    alert = numbered.alert
    texts = (alert.path, alert.source_path, alert.unit, alert.principal or "")
    return _ALERT_BYTES + sum(len(text.encode()) for text in texts)


def write_webhook(webhook: Webhook, message: alerts_pb2.Webhook) -> None:
    """Write where alerts are sent to."""
    message.webhook_id = webhook.webhook_id
    message.url = webhook.url
    message.root_id = webhook.root_id or b""
    message.budget_id = webhook.budget_id or b""
    message.path = webhook.path
    write_time(webhook.created_at, message.created_at)
    message.created_by = webhook.created_by
    if webhook.deleted_at is not None:
        write_time(webhook.deleted_at, message.deleted_at)
        message.deleted_by = webhook.deleted_by or ""


def write_delivery(delivery: Delivery, alert_id: bytes, message: alerts_pb2.Delivery) -> None:
    """Write what became of an alert at a webhook."""
    message.webhook_id = delivery.webhook_id
    message.alert_id = alert_id
    message.number = delivery.number
    message.state = delivery.state  # type: ignore[assignment]
    message.attempts = delivery.attempts
    if delivery.state is DeliveryState.PENDING:
        write_time(delivery.next_at, message.next_at)
    if delivery.last_at is not None:
        write_time(delivery.last_at, message.last_at)
    message.last_status = delivery.last_status
    message.last_problem = delivery.last_problem


def write_time(microseconds: int, message: Timestamp) -> None:
    """Write a time of the ledger."""
    seconds, rest = divmod(microseconds, SECOND_US)
    message.seconds = seconds
    message.nanos = rest * _NANOS_PER_US
