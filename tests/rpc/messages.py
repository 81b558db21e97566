"""From operations to the messages that ask for them: what a client does, by field names alone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from peculium.v1 import admin_service_pb2 as admin, ledger_service_pb2 as ledger, types_pb2
from peculium_server.core.operations import (
    Child,
    Kind,
    Operation,
    Rotation,
    Usage,
)

BY_AGENT: dict[Kind, type[Message]] = {
    Kind.RESERVE: ledger.ReserveRequest,
    Kind.SETTLE: ledger.SettleRequest,
    Kind.RELEASE: ledger.ReleaseRequest,
    Kind.EXTEND: ledger.ExtendRequest,
    Kind.SPEND: ledger.SpendRequest,
    Kind.DELEGATE: ledger.DelegateRequest,
    Kind.ACCEPT: ledger.AcceptRequest,
    Kind.RECOVER: ledger.RecoverRequest,
    Kind.FUND: ledger.FundRequest,
    Kind.RENEW: ledger.RenewRequest,
    Kind.RETURN: ledger.ReturnRequest,
    Kind.REVOKE: ledger.RevokeRequest,
    Kind.RESOLVE: ledger.ResolveRequest,
}
BY_ADMIN: dict[Kind, type[Message]] = {
    Kind.GRANT: admin.GrantRequest,
    Kind.TOP_UP: admin.TopUpRequest,
    Kind.WITHDRAW: admin.WithdrawRequest,
    Kind.FREEZE: admin.FreezeRequest,
    Kind.UNFREEZE: admin.UnfreezeRequest,
    Kind.RECOVER: admin.AdminServiceRecoverRequest,
    Kind.RESOLVE: admin.AdminServiceResolveRequest,
}
_HEADER = {"operation_id", "root_id", "budget_id", "labels", "dry_run"}
_DURATION = "_us"


def message_of(
    operation: Operation, proof: types_pb2.Authority | None, traceparent: str = ""
) -> Any:
    """The request that asks for an operation: by an agent with a proof, by an admin without one."""
    by_kind = BY_ADMIN if proof is None else BY_AGENT
    message: Any = by_kind[operation.kind]()
    header = message.header
    if proof is not None:
        header.authority.CopyFrom(proof)
    header.traceparent = traceparent
    for field in fields(operation):
        value = getattr(operation, field.name)
        if field.name in _HEADER:
            _set(header, field.name, value)
        elif field.name not in ("authority", "trace_id"):
            _set(message, field.name, value)
    if operation.kind is Kind.RETURN and not message.HasField("amount"):
        message.all = True
    return message


def duration(microseconds: int) -> Duration:
    """Microseconds as the wire has them; seconds and nanoseconds have one sign."""
    sign = -1 if microseconds < 0 else 1
    seconds, rest = divmod(abs(microseconds), 1_000_000)
    return Duration(seconds=sign * seconds, nanos=sign * rest * 1000)


def _set(message: Any, name: str, value: Any) -> None:
    if value is None:
        return
    if name.endswith(_DURATION):
        getattr(message, name.removesuffix(_DURATION)).CopyFrom(duration(value))
    elif name == "labels":
        message.labels.update(value)
    elif isinstance(value, Usage):
        message.usage.SetInParent()
        _set_all(message.usage, value)
    elif isinstance(value, tuple):
        for element in value:
            _set_all(getattr(message, name).add(), element)
    else:
        setattr(message, name, value)


def _set_all(message: Any, value: Usage | Child | Rotation) -> None:
    for field in fields(value):
        _set(message, field.name, getattr(value, field.name))


__all__ = ["BY_ADMIN", "BY_AGENT", "duration", "message_of"]
