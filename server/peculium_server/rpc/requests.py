"""From the wire to the core: a request's message becomes an operation, or a refusal.

Pure. What cannot be said as an operation at all is refused here; whether an operation is well-formed
is the core's to check. A secret ends here: nothing behind this module ever sees one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from peculium.v1 import admin_service_pb2, ledger_service_pb2, types_pb2
from peculium_server.core.encoding import token_id
from peculium_server.core.limits import (
    CHILDREN_MAX,
    HOLD_TTL_US_DEFAULT,
    LABELS_MAX,
    ROTATIONS_MAX,
    SECOND_US,
    SECRET_BYTES,
)
from peculium_server.core.operations import (
    Accept,
    After,
    Authority,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Delegate,
    Extend,
    Freeze,
    Fund,
    Grant,
    Labels,
    Operation,
    Recover,
    Release,
    Renew,
    Reserve,
    Resolve,
    Return,
    Revoke,
    Rotation,
    Settle,
    Spend,
    TopUp,
    Unfreeze,
    Usage,
    Withdraw,
)
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.rpc.calls import CallRefused

_NANOS_MAX: Final = 999_999_999
_DURATION_SECONDS_MAX: Final = 315_576_000_000
"""Ten thousand years: the range of google.protobuf.Duration."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", re.ASCII)
_NO_TRACE: Final = bytes(16)
_BY_HOLDER: Final = ByHolder()
_BY_ROLE: Final = ByRole()


class _UndecodableError(Exception):
    """The message says something that no operation can say. Never leaves this module."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason.name)
        self.refused = refused


def _malformed(field: str, problem: str) -> _UndecodableError:
    return _UndecodableError(Refused(Refusal.MALFORMED, {"field": field, "problem": problem}))


def _bounded(field: str, repeated: Sized, limit: int) -> None:
    """Refuse a million elements before a million values are made of them."""
    if len(repeated) > limit:
        facts = {"field": field, "limit": str(limit), "size": str(len(repeated))}
        raise _UndecodableError(Refused(Refusal.TOO_LARGE, facts))


def decode(request: Message) -> Operation | Refused:
    """The operation that a request of any service asks for, or why it asks for none."""
    try:
        return _DECODERS[type(request)](request)
    except _UndecodableError as error:
        return error.refused


def decode_batched(operation: ledger_service_pb2.Operation) -> Operation | Refused:
    """The operation that an element of a batch asks for, or why it asks for none."""
    kind = operation.WhichOneof("operation")
    if kind is None:
        return Refused(Refusal.MALFORMED, {"field": "operation", "problem": "is missing"})
    return decode(getattr(operation, kind))


def decode_authority(authority: types_pb2.Authority) -> Authority | Refused:
    """By what right a read is asked for. Its secret, if it has one, is forgotten here."""
    try:
        return _authority(authority)
    except _UndecodableError as error:
        return error.refused


def read_duration(message: Any, field: str) -> int | None:
    """A duration of a request, in microseconds; None if it is absent.

    Raises:
        CallRefused: MALFORMED: it is none.
    """
    try:
        return _optional_microseconds(message, field)
    except _UndecodableError as error:
        raise CallRefused(error.refused) from None


def _authority(authority: types_pb2.Authority) -> Authority:
    secret = authority.secret
    if len(secret) == SECRET_BYTES:
        return ByToken(token_id(secret))
    match authority.WhichOneof("proof"):
        case "secret":
            raise _malformed("authority.secret", f"must be {SECRET_BYTES} bytes, not {len(secret)}")
        case "after":
            return After(authority.after)
        case "holder":
            return _BY_HOLDER
        case _:
            raise _malformed("authority", "is missing")


def _proven(header: types_pb2.OperationHeader) -> dict[str, Any]:
    """A header whose authority is the caller's proof."""
    return _header(header, _authority(header.authority))


def _by_role(header: types_pb2.OperationHeader) -> dict[str, Any]:
    """A header of the administrators' service, where the caller's role is the authority."""
    if header.HasField("authority"):
        raise _malformed("authority", "must be absent: the caller's role is the authority")
    return _header(header, _BY_ROLE)


def _header(header: types_pb2.OperationHeader, authority: Authority) -> dict[str, Any]:
    labels, traceparent = header.labels, header.traceparent
    return {
        "operation_id": header.operation_id,
        "root_id": header.root_id,
        "budget_id": header.budget_id,
        "authority": authority,
        "labels": _labels(labels) if labels else (),
        "dry_run": header.dry_run,
        "trace_id": trace_id(traceparent) if traceparent else None,
    }


def trace_id(traceparent: str) -> bytes | None:
    """The trace id of a W3C trace context; None if it is not one.

    Tracing is a courtesy: what is wrong with it never fails an operation.
    """
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    trace = bytes.fromhex(found[1])
    return None if trace == _NO_TRACE else trace


def traceparent_of(message: Message) -> str:
    """The W3C trace context of an operation that could be decoded, alone or in a batch, as it came."""
    if isinstance(message, ledger_service_pb2.Operation):
        message = getattr(message, message.WhichOneof("operation") or "")
    header: types_pb2.OperationHeader = getattr(message, "header")  # noqa: B009 - no type has it
    return header.traceparent


def _labels(labels: Mapping[str, str]) -> Labels:
    _bounded("labels", labels, LABELS_MAX)
    return tuple(sorted(labels.items()))


def _microseconds(field: str, duration: Duration) -> int:
    """A duration in whole microseconds. What is finer is cut off, towards zero."""
    seconds, nanos = duration.seconds, duration.nanos
    if (
        abs(seconds) > _DURATION_SECONDS_MAX
        or abs(nanos) > _NANOS_MAX
        or (seconds < 0 < nanos)
        or (nanos < 0 < seconds)
    ):
        raise _malformed(field, "is not a duration")
    return seconds * SECOND_US + (nanos // 1000 if nanos >= 0 else -(-nanos // 1000))


def _optional_microseconds(message: Any, field: str) -> int | None:
    return _microseconds(field, getattr(message, field)) if message.HasField(field) else None


def _required_microseconds(message: Any, field: str) -> int:
    if not message.HasField(field):
        raise _malformed(field, "is missing")
    return _microseconds(field, getattr(message, field))


def _usage(usage: types_pb2.Usage) -> Usage:
    return Usage(
        usage.provider,
        usage.model,
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_tokens,
    )


def _rotations(rotations: Sequence[types_pb2.HoldRotation]) -> tuple[Rotation, ...]:
    _bounded("holds", rotations, ROTATIONS_MAX)
    return tuple(
        Rotation(hold_id=rotation.hold_id, next_token_id=rotation.next_token_id)
        for rotation in rotations
    )


def _child(index: int, child: types_pb2.ChildSpec) -> Child:
    lease = lease_latest = None
    if child.HasField("lease"):
        lease = _microseconds(f"children[{index}].lease", child.lease)
    if child.HasField("lease_latest"):
        lease_latest = _microseconds(f"children[{index}].lease_latest", child.lease_latest)
    return Child(
        budget_id=child.budget_id,
        name=child.name,
        amount=child.amount,
        token_id=child.token_id or None,
        holder=child.holder or None,
        lease_us=lease,
        lease_latest_us=lease_latest,
        labels=_labels(child.labels),
        overrun_factor=child.overrun_factor if child.HasField("overrun_factor") else 1,
    )


def _reserve(request: ledger_service_pb2.ReserveRequest) -> Reserve:
    ttl = _microseconds("ttl", request.ttl) if request.HasField("ttl") else HOLD_TTL_US_DEFAULT
    return Reserve(
        **_proven(request.header),
        amount=request.amount,
        ttl_us=ttl,
        next_token_id=request.next_token_id or None,
        hold_id=request.hold_id,
        hold_token_id=request.hold_token_id,
    )


def _settle(request: ledger_service_pb2.SettleRequest) -> Settle:
    return Settle(
        **_proven(request.header),
        hold_id=request.hold_id,
        actual=request.actual if request.HasField("actual") else None,
        keep_open=request.keep_open,
        next_hold_token_id=request.next_hold_token_id or None,
        reference=request.reference,
        usage=_usage(request.usage) if request.HasField("usage") else None,
        estimated=request.estimated,
    )


def _release(request: ledger_service_pb2.ReleaseRequest) -> Release:
    return Release(**_proven(request.header), hold_id=request.hold_id)


def _extend(request: ledger_service_pb2.ExtendRequest) -> Extend:
    return Extend(
        **_proven(request.header),
        hold_id=request.hold_id,
        ttl_us=_required_microseconds(request, "ttl"),
        next_hold_token_id=request.next_hold_token_id,
    )


def _spend(request: ledger_service_pb2.SpendRequest) -> Spend:
    return Spend(
        **_proven(request.header),
        amount=request.amount,
        next_token_id=request.next_token_id or None,
        reference=request.reference,
        usage=_usage(request.usage) if request.HasField("usage") else None,
    )


def _delegate(request: ledger_service_pb2.DelegateRequest) -> Delegate:
    _bounded("children", request.children, CHILDREN_MAX)
    return Delegate(
        **_proven(request.header),
        next_token_id=request.next_token_id or None,
        children=tuple(_child(index, child) for index, child in enumerate(request.children)),
    )


def _accept(request: ledger_service_pb2.AcceptRequest) -> Accept:
    return Accept(**_proven(request.header), next_token_id=request.next_token_id)


def _recover(request: ledger_service_pb2.RecoverRequest) -> Recover:
    return Recover(
        **_proven(request.header),
        next_token_id=request.next_token_id or None,
        holds=_rotations(request.holds),
        if_seq=request.if_seq if request.HasField("if_seq") else None,
    )


def _fund(request: ledger_service_pb2.FundRequest) -> Fund:
    return Fund(
        **_proven(request.header),
        next_token_id=request.next_token_id or None,
        descendant_id=request.descendant_id,
        amount=request.amount,
        lease_us=_optional_microseconds(request, "lease"),
    )


def _renew(request: ledger_service_pb2.RenewRequest) -> Renew:
    return Renew(
        **_proven(request.header),
        next_token_id=request.next_token_id or None,
        lease_us=_required_microseconds(request, "lease"),
    )


def _return(request: ledger_service_pb2.ReturnRequest) -> Return:
    extent = request.WhichOneof("extent")
    if extent is None:
        raise _malformed("extent", "is missing: name an amount or all")
    if extent == "all" and not request.all:
        raise _malformed("all", "must be true where it is said")
    return Return(
        **_proven(request.header),
        next_token_id=request.next_token_id or None,
        amount=request.amount if extent == "amount" else None,
        cascade=request.cascade,
    )


def _revoke(request: ledger_service_pb2.RevokeRequest) -> Revoke:
    return Revoke(
        **_proven(request.header),
        next_token_id=request.next_token_id or None,
        descendant_id=request.descendant_id,
    )


def _resolve(request: ledger_service_pb2.ResolveRequest) -> Resolve:
    return Resolve(
        **_proven(request.header),
        next_token_id=request.next_token_id or None,
        hold_id=request.hold_id,
        actual=request.actual,
        reason=request.reason,
    )


def _grant(request: admin_service_pb2.GrantRequest) -> Grant:
    return Grant(
        **_by_role(request.header),
        name=request.name,
        unit=request.unit,
        amount=request.amount,
        token_id=request.token_id or None,
        holder=request.holder or None,
    )


def _top_up(request: admin_service_pb2.TopUpRequest) -> TopUp:
    return TopUp(**_by_role(request.header), amount=request.amount)


def _withdraw(request: admin_service_pb2.WithdrawRequest) -> Withdraw:
    return Withdraw(**_by_role(request.header), amount=request.amount)


def _freeze(request: admin_service_pb2.FreezeRequest) -> Freeze:
    return Freeze(**_by_role(request.header), reason=request.reason)


def _unfreeze(request: admin_service_pb2.UnfreezeRequest) -> Unfreeze:
    return Unfreeze(**_by_role(request.header), reason=request.reason)


def _admin_recover(request: admin_service_pb2.AdminServiceRecoverRequest) -> Recover:
    return Recover(
        **_by_role(request.header),
        next_token_id=request.next_token_id or None,
        holder=request.holder or None,
        holds=_rotations(request.holds),
    )


def _admin_resolve(request: admin_service_pb2.AdminServiceResolveRequest) -> Resolve:
    return Resolve(
        **_by_role(request.header),
        hold_id=request.hold_id,
        actual=request.actual,
        reason=request.reason,
    )


_DECODERS: Final[dict[type[Message], Callable[[Any], Operation]]] = {
    ledger_service_pb2.ReserveRequest: _reserve,
    ledger_service_pb2.SettleRequest: _settle,
    ledger_service_pb2.ReleaseRequest: _release,
    ledger_service_pb2.ExtendRequest: _extend,
    ledger_service_pb2.SpendRequest: _spend,
    ledger_service_pb2.DelegateRequest: _delegate,
    ledger_service_pb2.AcceptRequest: _accept,
    ledger_service_pb2.RecoverRequest: _recover,
    ledger_service_pb2.FundRequest: _fund,
    ledger_service_pb2.RenewRequest: _renew,
    ledger_service_pb2.ReturnRequest: _return,
    ledger_service_pb2.RevokeRequest: _revoke,
    ledger_service_pb2.ResolveRequest: _resolve,
    admin_service_pb2.GrantRequest: _grant,
    admin_service_pb2.TopUpRequest: _top_up,
    admin_service_pb2.WithdrawRequest: _withdraw,
    admin_service_pb2.FreezeRequest: _freeze,
    admin_service_pb2.UnfreezeRequest: _unfreeze,
    admin_service_pb2.AdminServiceRecoverRequest: _admin_recover,
    admin_service_pb2.AdminServiceResolveRequest: _admin_resolve,
}
