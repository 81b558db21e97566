"""From the wire's messages to the values that callers see."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from types import MappingProxyType

from google.protobuf.timestamp_pb2 import Timestamp

from peculium._ids import id_text
from peculium._times import moment
from peculium._unread import unread
from peculium.capability import BudgetRef
from peculium.v1 import audit_service_pb2, types_pb2
from peculium.values import (
    Balances,
    BudgetInfo,
    BudgetState,
    Custody,
    EntryInfo,
    Finding,
    HoldInfo,
    HoldState,
    LedgerPosition,
    Receipt,
    Verification,
)


def balances(message: types_pb2.Balances) -> Balances:
    """The money of a budget, or the changes of it."""
    return Balances(
        granted=message.granted,
        available=message.available,
        held=message.held,
        delegated=message.delegated,
        spent=message.spent,
        forfeited=message.forfeited,
        overrun=message.overrun,
        advanced=message.advanced,
    )


def position(message: types_pb2.LedgerPosition) -> LedgerPosition:
    """A place in the ledger's history."""
    return LedgerPosition(message.incarnation, message.lane, message.position)


def budget_info(
    message: types_pb2.Budget, ledger: types_pb2.LedgerPosition | None = None
) -> BudgetInfo:
    """A budget as a read found it."""
    return BudgetInfo(
        ref=BudgetRef(message.path, message.root_id, message.budget_id),
        parent_id=message.parent_id or None,
        name=message.name,
        unit=message.unit,
        custody=Custody(message.custody),
        holder=message.holder or None,
        state=BudgetState(message.state),
        balances=balances(message.balances),
        disputed=message.disputed,
        holds_live=message.holds_live,
        overrun_factor=message.overrun_factor if message.HasField("overrun_factor") else None,
        lease_expires_at=(
            at(message.lease_expires_at) if message.HasField("lease_expires_at") else None
        ),
        lease_latest_at=(
            at(message.lease_latest_at) if message.HasField("lease_latest_at") else None
        ),
        labels=MappingProxyType(dict(message.labels)),
        seq=message.seq,
        created_at=at(message.created_at),
        ledger=None if ledger is None else position(ledger),
    )


def hold_info(message: types_pb2.Hold) -> HoldInfo:
    """A hold as an operation left it, or as a read found it."""
    return HoldInfo(
        hold_id=message.hold_id,
        budget_id=message.budget_id,
        state=HoldState(message.state),
        amount=message.amount,
        remaining=message.remaining,
        booked=message.booked,
        disputed=message.disputed,
        created_at=at(message.created_at),
        expires_at=at(message.expires_at),
    )


def receipt(message: types_pb2.Outcome) -> Receipt:
    """What an accepted operation did. It is decoded when it is looked at: most callers never do."""
    # As bytes: a message would keep all answers that came together with it.
    return unread(Receipt, partial(_receipt, message.SerializeToString()))


def _receipt(encoded: bytes) -> Receipt:
    message = types_pb2.Outcome.FromString(encoded)
    return Receipt(
        operation_id=id_text(message.operation_id),
        replayed=message.replayed,
        dry_run=message.dry_run,
        at=at(message.at),
        budget_id=message.budget_id,
        balances=balances(message.balances),
        state=BudgetState(message.state),
        seq=message.seq,
        lease_expires_at=(
            at(message.lease_expires_at) if message.HasField("lease_expires_at") else None
        ),
        hold=hold_info(message.hold) if message.HasField("hold") else None,
        returned=message.returned,
        pending=message.pending,
        holds=tuple(hold_info(hold) for hold in message.holds),
        holds_truncated=message.holds_truncated,
        ledger=position(message.ledger),
    )


def entry_info(message: audit_service_pb2.Entry) -> EntryInfo:
    """An entry."""
    return EntryInfo(
        root_id=message.root_id,
        budget_id=message.budget_id,
        seq=message.seq,
        lane=message.lane,
        position=message.position,
        part=message.part,
        parts=message.parts,
        operation_id=id_text(message.operation_id),
        kind=kind(message.kind),
        at=at(message.at),
        actor=message.actor,
        amount=message.amount,
        balances=balances(message.balances),
        changes=balances(message.changes),
        trace_id=message.trace_id.hex() or None,
        consumed=message.consumed or None,
        request=message.request,
        effect=message.effect,
        digest=message.digest,
        previous_hash=message.previous_hash,
        hash=message.hash,
    )


def verification(message: audit_service_pb2.VerifyResponse) -> Verification:
    """How far a verification is."""
    verdict = message.verdict if message.HasField("verdict") else None
    findings = () if verdict is None else verdict.findings
    return Verification(
        entries=message.entries,
        trees=message.trees,
        verified=None if verdict is None else verdict.verified,
        findings=tuple(
            Finding(one.root_id, one.budget_id or None, one.seq, one.rule, one.detail)
            for one in findings
        ),
    )


def at(stamp: Timestamp) -> datetime:
    """A time of the ledger, to the microsecond."""
    return moment(stamp.seconds * 1_000_000 + stamp.nanos // 1000)


def kind(number: types_pb2.OperationKind.ValueType) -> str:
    """A kind of operation by its name, or by its number if this client does not know it."""
    try:
        return types_pb2.OperationKind.Name(number).removeprefix("OPERATION_KIND_")
    except ValueError:
        return str(int(number))


def reason(number: types_pb2.RefusalReason.ValueType) -> str:
    """A reason of a refusal by its name, or by its number if this client does not know it."""
    try:
        return types_pb2.RefusalReason.Name(number).removeprefix("REFUSAL_REASON_")
    except ValueError:
        return str(int(number))
