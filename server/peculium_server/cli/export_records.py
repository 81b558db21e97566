"""From what the SDK gives of an export to the records of its file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

from peculium import EntryInfo
from peculium.exports import (
    ExportedBudget,
    ExportedHold,
    ExportedLeaf,
    ExportHeader,
    ExportPiece,
    ExportTrailer,
)
from peculium.proofs import Checkpoint as CheckpointInfo
from peculium.values import Balances as BalancesInfo
from peculium_server.core.checkpoint import Checkpoint, Leaf, Sealed
from peculium_server.core.offline.records import (
    BudgetRow,
    Counts,
    Header,
    HoldRow,
    LeafOf,
    Record,
    Recorded,
    SealedBy,
)
from peculium_server.core.operations import Kind
from peculium_server.core.state import Balances, Budget, Custody, Effect, Entry, Hold, HoldState
from peculium_server.core.times import microseconds

_NO_EFFECT: Final = Effect(changes=Balances())


def record_of(piece: ExportPiece) -> Record:
    """The record of a piece."""
    return _CONVERTERS[type(piece)](piece)


def _header(header: ExportHeader) -> Header:
    return Header(
        header.encoding_version,
        header.incarnation,
        microseconds(header.at),
        header.positions,
        header.root_id,
        header.earlier_incarnations,
    )


def _entry(entry: EntryInfo) -> Recorded:
    return Recorded(
        entry.lane,
        Entry(
            root_id=entry.root_id,
            budget_id=entry.budget_id,
            seq=entry.seq,
            position=entry.position,
            part=entry.part,
            parts=entry.parts,
            operation_id=UUID(entry.operation_id).bytes,
            kind=Kind[entry.kind],
            at=microseconds(entry.at),
            principal=entry.actor,
            trace_id=None if entry.trace_id is None else bytes.fromhex(entry.trace_id),
            consumed=entry.consumed,
            amount=entry.amount,
            money=_balances(entry.balances),
            effect=_NO_EFFECT,
            # That of a part which has none is empty; and one where none belongs is for whoever verifies.
            request=entry.request or None,
            effect_bytes=entry.effect,
            digest=entry.digest,
            previous_hash=b"",
            hash=entry.hash,
        ),
    )


def _budget(row: ExportedBudget) -> BudgetRow:
    budget = Budget(
        root_id=row.root_id,
        budget_id=row.budget_id,
        ancestors=row.ancestors,
        name=row.name,
        unit=row.unit,
        custody=Custody[row.custody.name],
        holder=row.holder,
        token=None,
        overrun_factor=row.overrun_factor,
        labels=tuple(sorted(row.labels.items())),
        created_at=microseconds(row.created_at),
        money=_balances(row.balances),
        disputed=row.disputed,
        disputes=row.disputes,
        holds_live=row.holds_live,
        closed=row.closed,
        frozen=row.frozen,
        lease_until=None if row.lease_until is None else microseconds(row.lease_until),
        lease_latest=None if row.lease_latest is None else microseconds(row.lease_latest),
        version=row.version,
        seq=row.seq,
        last_at=microseconds(row.last_at),
        head=row.head,
    )
    return BudgetRow(budget, row.token_digest)


def _hold(row: ExportedHold) -> HoldRow:
    hold = row.hold
    return HoldRow(
        row.root_id,
        Hold(
            budget_id=hold.budget_id,
            hold_id=hold.hold_id,
            token=b"",
            state=HoldState[hold.state.name],
            amount=hold.amount,
            remaining=hold.remaining,
            booked=hold.booked,
            disputed=hold.disputed,
            created_at=microseconds(hold.created_at),
            expires_at=microseconds(hold.expires_at),
        ),
        row.token_digest,
    )


def _checkpoint(sealed: CheckpointInfo) -> SealedBy:
    checkpoint = Checkpoint(
        number=sealed.number,
        sealed_at=microseconds(sealed.sealed_at),
        incarnation=sealed.incarnation,
        positions=sealed.positions,
        merkle_root=sealed.merkle_root,
        leaves=sealed.leaves,
        previous_hash=sealed.previous_hash,
    )
    return SealedBy(
        Sealed(checkpoint, sealed.hash, sealed.key_id, sealed.signature), sealed.public_key
    )


def _leaf(leaf: ExportedLeaf) -> LeafOf:
    return LeafOf(leaf.checkpoint, Leaf(leaf.root_id, leaf.budget_id, leaf.seq, leaf.head))


def _trailer(trailer: ExportTrailer) -> Counts:
    return Counts(trailer.entries, trailer.budgets, trailer.holds, trailer.checkpoints)


_CONVERTERS: Final[dict[type, Callable[[Any], Record]]] = {
    ExportHeader: _header,
    EntryInfo: _entry,
    ExportedBudget: _budget,
    ExportedHold: _hold,
    CheckpointInfo: _checkpoint,
    ExportedLeaf: _leaf,
    ExportTrailer: _trailer,
}


def _balances(money: BalancesInfo) -> Balances:
    return Balances(
        money.granted,
        money.available,
        money.held,
        money.delegated,
        money.spent,
        money.forfeited,
        money.overrun,
        money.advanced,
    )
