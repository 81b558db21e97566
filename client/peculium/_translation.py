"""From the wire's refusals and failures to errors: the one place that knows both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from peculium._retry import Failure
from peculium.errors import (
    BY_REASON,
    Invalid,
    NotSupported,
    PermissionDenied,
    Refused,
    Unauthenticated,
)
from peculium.v1 import ledger_service_pb2, types_pb2

_DOMAIN = "peculium"
_DETAILS_KEY = "grpc-status-details-bin"
_REASON_PREFIX = "REFUSAL_REASON_"

_NOT_DONE = frozenset(
    {
        *("QUEUE_FULL", "DRAINING", "CONTENDED", "TOO_MANY_WATCHES", "KEYS_OUTDATED"),
        *("RATE_LIMITED", "TOO_MANY_AT_ONCE", "TOO_MANY_STREAMS"),
    }
)
"""Reasons of having no answer that say that nothing was done."""

_NEVER_SENT = ("failed to connect to all addresses", "DNS resolution failed")
"""How grpc begins to describe a call that never left this machine; the status is the same as that
of a connection cut half-way. A text that is not recognised is taken as unknown, which is safe."""

# Definite statuses that something between here and the ledger may send without our details.
_BY_STATUS: dict[grpc.StatusCode, type[Refused | Invalid]] = {
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
}
# Anything else, for example a message that is too large for somebody, would end the same again, unless
# whoever says so asks to be tried again.
_TRANSIENT = frozenset(
    {
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
    }
)


def refusal(
    message: types_pb2.Refused, *, budget: str | None = None, operation_id: str | None = None
) -> Refused | Invalid:
    """The error for a refused operation."""
    try:
        name = types_pb2.RefusalReason.Name(message.reason)
    except ValueError:
        name = f"{_REASON_PREFIX}{int(message.reason)}"
    reason = name.removeprefix(_REASON_PREFIX)
    return _by_reason(reason, message.message, dict(message.metadata), budget, operation_id)


def unavailable(message: ledger_service_pb2.Unavailable) -> Failure:
    """How an operation of a batch failed that got no answer."""
    name = types_pb2.UnavailableReason.Name(message.reason).removeprefix("UNAVAILABLE_REASON_")
    return Failure(
        message.message or name,
        not_done=name in _NOT_DONE,
        retry_seconds=(_seconds(message.retry_delay) if message.HasField("retry_delay") else None),
    )


def failure(
    code: grpc.StatusCode,
    details: str | None,
    trailing_metadata: Sequence[tuple[str, str | bytes]] | None,
) -> Failure:
    """How a whole call failed."""
    text = details or code.name
    info, retry_seconds = _details(trailing_metadata)
    if info is not None and info.reason in BY_REASON:
        error = _by_reason(info.reason, text, dict(info.metadata), None, None)
        return Failure(text, refused=error, not_done=True)
    if code in _BY_STATUS:
        return Failure(text, refused=_BY_STATUS[code](text), not_done=True)
    return Failure(
        f"{code.name}: {text}",
        not_done=text.startswith(_NEVER_SENT) or (info is not None and info.reason in _NOT_DONE),
        retry_seconds=retry_seconds,
        permanent=code not in _TRANSIENT and retry_seconds is None,
    )


def _by_reason(
    reason: str,
    message: str,
    facts: Mapping[str, str],
    budget: str | None,
    operation_id: str | None,
) -> Refused | Invalid:
    # A reason that a newer ledger has and this client does not is a refusal all the same.
    error = BY_REASON.get(reason, Refused)
    text = message or reason
    return error(
        text if error.reason else f"{reason}: {text}",
        budget=budget or facts.get("budget"),
        operation_id=operation_id or facts.get("operation"),
        facts=facts,
    )


def _details(
    trailing_metadata: Sequence[tuple[str, str | bytes]] | None,
) -> tuple[ErrorInfo | None, float | None]:
    info: ErrorInfo | None = None
    retry_seconds: float | None = None
    for key, value in trailing_metadata or ():
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status = Status.FromString(value)
            for detail in status.details:
                found, retry = ErrorInfo(), RetryInfo()
                if detail.Unpack(found) and found.domain == _DOMAIN:
                    info = found
                elif detail.Unpack(retry):
                    retry_seconds = _seconds(retry.retry_delay)
        except DecodeError:
            continue
    return info, retry_seconds


def _seconds(duration: Duration) -> float:
    return max(0.0, duration.seconds + duration.nanos / 1e9)
