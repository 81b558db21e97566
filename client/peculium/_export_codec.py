"""From the wire's pieces of an export to the values that callers see."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from peculium._audit_codec import checkpoint
from peculium._codec import at, balances, entry_info, hold_info
from peculium.exports import (
    ExportedBudget,
    ExportedHold,
    ExportedLeaf,
    ExportHeader,
    ExportPiece,
    ExportTrailer,
)
from peculium.proofs import Checkpoint
from peculium.v1 import audit_service_pb2
from peculium.values import Custody


def pieces(message: audit_service_pb2.ExportResponse) -> Iterator[ExportPiece]:
    """What one message of the stream holds. A kind of piece that is not known yet is passed over."""
    match message.WhichOneof("piece"):
        case "header":
            yield _header(message.header)
        case "entries":
            yield from map(entry_info, message.entries.entries)
        case "budgets":
            yield from map(_budget, message.budgets.budgets)
        case "holds":
            for hold in message.holds.holds:
                yield ExportedHold(hold.root_id, hold_info(hold.hold), hold.token_digest)
        case "checkpoints":
            for each in message.checkpoints.checkpoints:
                yield from _checkpoint(each)
        case "trailer":
            counts = message.trailer
            yield ExportTrailer(counts.entries, counts.budgets, counts.holds, counts.checkpoints)
        case None:
            return


def _header(message: audit_service_pb2.ExportHeader) -> ExportHeader:
    return ExportHeader(
        encoding_version=message.encoding_version,
        incarnation=message.incarnation,
        at=at(message.at),
        positions=tuple(message.positions),
        root_id=message.root_id or None,
        earlier_incarnations=tuple(message.earlier_incarnations),
    )


def _checkpoint(
    message: audit_service_pb2.ExportedCheckpoint,
) -> Iterator[Checkpoint | ExportedLeaf]:
    """The checkpoint, where it is not gone on with, and the leaves that are in the message."""
    sealed = message.checkpoint
    if not message.continued:
        yield checkpoint(sealed)
    for leaf in message.leaves:
        yield ExportedLeaf(sealed.number, leaf.root_id, leaf.budget_id, leaf.seq, leaf.head)


def _budget(message: audit_service_pb2.ExportedBudget) -> ExportedBudget:
    budget = message.budget
    return ExportedBudget(
        root_id=budget.root_id,
        budget_id=budget.budget_id,
        ancestors=tuple(message.ancestors),
        name=budget.name,
        unit=budget.unit,
        custody=Custody(budget.custody),
        holder=budget.holder or None,
        token_digest=message.token_digest or None,
        overrun_factor=budget.overrun_factor if budget.HasField("overrun_factor") else None,
        labels=MappingProxyType(dict(budget.labels)),
        created_at=at(budget.created_at),
        balances=balances(budget.balances),
        disputed=budget.disputed,
        disputes=message.disputes,
        holds_live=budget.holds_live,
        closed=message.closed,
        frozen=message.frozen,
        lease_until=at(budget.lease_expires_at) if budget.HasField("lease_expires_at") else None,
        lease_latest=at(budget.lease_latest_at) if budget.HasField("lease_latest_at") else None,
        version=budget.version,
        seq=budget.seq,
        last_at=at(message.last_at),
        head=budget.head,
    )
