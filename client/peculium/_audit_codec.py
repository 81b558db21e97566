"""From the wire's messages to the values that auditors see."""

from __future__ import annotations

from dataclasses import replace

from peculium import _codec as codec
from peculium._alerts_codec import alert
from peculium._ids import id_text
from peculium.audit import (
    Delegation,
    Movement,
    RefusalCount,
    SecurityEvent,
    Statement,
    TokenStep,
    UsageGroup,
    UsageReport,
    Watched,
)
from peculium.capability import BudgetRef
from peculium.proofs import Checkpoint, Link, MerkleStep, Proof
from peculium.v1 import audit_service_pb2 as audit
from peculium.values import BudgetInfo


def budget(message: audit.GetBudgetResponse) -> BudgetInfo:
    """A budget, with the sums over its subtree if they were asked for."""
    info = codec.budget_info(message.budget, message.ledger)
    return replace(
        info,
        subtree_used=message.used if message.HasField("used") else None,
        subtree_disputed=message.disputed if message.HasField("disputed") else None,
        subtree_held=message.held if message.HasField("held") else None,
        subtree_holds_live=message.holds_live if message.HasField("holds_live") else None,
    )


def delegation(message: audit.Delegation) -> Delegation:
    """One budget of a line."""
    return Delegation(
        budget=codec.budget_info(message.budget),
        made_by=codec.entry_info(message.made_by),
        amount=message.amount,
        by=message.by,
        right=message.WhichOneof("right") or "",
        token=message.token or None,
    )


def token_step(message: audit.TokenStep) -> TokenStep:
    """What was done to a token."""
    return TokenStep(
        seq=message.seq,
        operation_id=id_text(message.operation_id),
        kind=codec.kind(message.kind),
        at=codec.at(message.at),
        by=message.by,
        consumed=message.consumed or None,
        produced=message.produced or None,
        holder=message.holder or None,
    )


def refusal_count(message: audit.RefusalCount) -> RefusalCount:
    """How often a budget was refused something."""
    ref = None
    if message.root_id:
        ref = BudgetRef(message.path, message.root_id, message.budget_id)
    return RefusalCount(
        minute=codec.at(message.minute),
        ref=ref,
        reason=codec.reason(message.reason),
        count=message.count,
    )


def security_event(message: audit.SecurityEvent) -> SecurityEvent:
    """That a secret was shown by another than whose it was."""
    ref = None
    if message.root_id:
        ref = BudgetRef(message.path, message.root_id, message.budget_id)
    consumed = bool(message.consumed_operation_id)
    return SecurityEvent(
        event_id=id_text(message.event_id),
        at=codec.at(message.at),
        kind=_security_event_kind(message.kind),
        ref=ref,
        principal=message.principal,
        operation_id=id_text(message.operation_id),
        consumed_by=message.consumed_by or None,
        consumed_operation_id=id_text(message.consumed_operation_id) if consumed else None,
        consumed_kind=codec.kind(message.consumed_kind) if consumed else None,
        consumed_at=codec.at(message.consumed_at) if consumed else None,
        holder=message.holder or None,
        count=message.count,
        freeze_id=id_text(message.freeze_id) if message.freeze_id else None,
    )


def statement(message: audit.GetStatementResponse) -> Statement:
    """What moved in a period."""
    return Statement(
        unit=message.unit,
        since=codec.at(getattr(message, "from")),
        until=codec.at(message.until),
        opening=codec.balances(message.opening),
        movements=tuple(
            Movement(
                kind=codec.kind(each.kind),
                operations=each.operations,
                entries=each.entries,
                changes=codec.balances(each.changes),
            )
            for each in message.movements
        ),
        closing=codec.balances(message.closing),
        used_opening=message.used_opening,
        used_closing=message.used_closing,
        disputed_closing=message.disputed_closing,
        budgets=message.budgets,
        ledger=codec.position(message.ledger),
    )


def usage(message: audit.GetUsageResponse) -> UsageReport:
    """What was spent in a period."""
    return UsageReport(
        unit=message.unit,
        groups=tuple(map(_group, message.groups)),
        total=_group(message.total),
        ledger=codec.position(message.ledger),
    )


def watched(message: audit.WatchEntriesResponse) -> Watched:
    """What was recorded."""
    return Watched(
        tuple(map(codec.entry_info, message.entries)),
        message.cursor,
        tuple(map(alert, message.alerts)),
        message.alerts_forgotten,
    )


def _security_event_kind(number: audit.SecurityEventKind.ValueType) -> str:
    try:
        return audit.SecurityEventKind.Name(number).removeprefix("SECURITY_EVENT_KIND_")
    except ValueError:
        # A newer server's.
        return str(int(number))


def _group(message: audit.UsageGroup) -> UsageGroup:
    return UsageGroup(
        keys=tuple(message.keys),
        operations=message.operations,
        spent=message.spent,
        forfeited=message.forfeited,
        estimated=message.estimated,
        input_tokens=message.input_tokens,
        output_tokens=message.output_tokens,
        cached_tokens=message.cached_tokens,
    )


def checkpoint(message: audit.Checkpoint) -> Checkpoint:
    """A checkpoint."""
    return Checkpoint(
        number=message.number,
        sealed_at=codec.at(message.sealed_at),
        incarnation=message.incarnation,
        positions=tuple(message.positions),
        merkle_root=message.merkle_root,
        leaves=message.leaves,
        previous_hash=message.previous_hash,
        hash=message.hash,
        key_id=message.key_id,
        signature=message.signature,
        public_key=message.public_key,
    )


def proof(message: audit.ProveEntryResponse) -> Proof:
    """The proof of an entry."""
    return Proof(
        entry=codec.entry_info(message.entry),
        others=tuple(codec.entry_info(part) for part in message.others),
        links=tuple(Link(link.digest, link.part) for link in message.links),
        sealed_seq=message.sealed_seq,
        path=tuple(MerkleStep(step.sibling, step.left) for step in message.path),
        checkpoint=checkpoint(message.checkpoint),
    )
