"""From the wire's messages to the values that auditors see."""

from __future__ import annotations

from dataclasses import replace

from peculium import _codec as codec
from peculium._ids import id_text
from peculium.audit import (
    Delegation,
    Movement,
    Statement,
    TokenStep,
    UsageGroup,
    UsageReport,
    Watched,
)
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
    return Watched(tuple(map(codec.entry_info, message.entries)), message.cursor)


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
