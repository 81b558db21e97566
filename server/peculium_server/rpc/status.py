"""From a refusal or a failure to a gRPC status: the only place where that is decided.

Every status carries a `google.rpc.ErrorInfo` with a reason, and those that ask the caller to try
again a `google.rpc.RetryInfo`.
"""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as StatusMessage

from peculium_server.core.refusals import Refusal, Refused
from peculium_server.lanes.answers import Unanswered, Unavailability

DOMAIN: Final = "peculium"
_DETAILS_KEY: Final = "grpc-status-details-bin"

CODES: Final[dict[Refusal, grpc.StatusCode]] = {
    Refusal.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Refusal.TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    Refusal.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Refusal.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Refusal.CAPABILITY_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Refusal.BUDGET_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Refusal.NOT_TOKEN_HELD: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.OPERATION_ID_REUSED: grpc.StatusCode.ALREADY_EXISTS,
    Refusal.OPERATION_TOO_OLD: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.TOKEN_CONSUMED: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.TOKEN_ID_REUSED: grpc.StatusCode.ALREADY_EXISTS,
    Refusal.DESCENDANT_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Refusal.HOLD_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Refusal.ID_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Refusal.NAME_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Refusal.NOT_FOR_ROOTS: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.ONLY_FOR_ROOTS: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.BUDGET_CLOSED: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.BUDGET_EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.BUDGET_FROZEN: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.TREE_OVERRUN: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.HOLD_ENDED: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.HOLD_LAPSED: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.NOT_DUE: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.TREE_TOO_DEEP: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.LIVE_HOLDS: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.OPEN_CHILDREN: grpc.StatusCode.FAILED_PRECONDITION,
    # Not RESOURCE_EXHAUSTED, which many retry layers take for "back off and try again".
    Refusal.BUDGET_EXHAUSTED: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.AMOUNT_OVERFLOW: grpc.StatusCode.FAILED_PRECONDITION,
    # Not ABORTED, for the same reason.
    Refusal.BATCH_REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.BUDGET_CHANGED: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.NOT_SEALED: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.KEY_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Refusal.KEY_ENDED: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.ALERT_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Refusal.WEBHOOK_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Refusal.TOO_MANY: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.WEBHOOKS_OFF: grpc.StatusCode.FAILED_PRECONDITION,
}

OF_ONE_CALLER: Final = frozenset(
    {
        Unavailability.RATE_LIMITED,
        Unavailability.TOO_MANY_AT_ONCE,
        Unavailability.TOO_MANY_STREAMS,
    }
)
"""What is said to one caller and to nobody else: proxies take UNAVAILABLE for a server that is not well."""


class Status(grpc.Status):
    """A status as grpc takes it: code, message, and details in the trailing metadata."""

    def __init__(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        packed = [Any() for _ in details]
        for envelope, detail in zip(packed, details, strict=True):
            envelope.Pack(detail)
        # The number of a code is the first of its two values.
        status = StatusMessage(code=code.value[0], message=message, details=packed)
        self.code = code
        self.details = message
        self.trailing_metadata = ((_DETAILS_KEY, status.SerializeToString()),)


def of_refused(refused: Refused) -> Status:
    """The status of a call whose one operation was refused."""
    info = ErrorInfo(reason=refused.reason.name, domain=DOMAIN, metadata=refused.facts)
    return Status(CODES[refused.reason], refused.message, info)


def of_unanswered(unanswered: Unanswered) -> Status:
    """The status of a call that got no answer from the ledger."""
    info = ErrorInfo(reason=unanswered.reason.name, domain=DOMAIN, metadata=unanswered.facts)
    retry = RetryInfo()
    retry.retry_delay.FromMilliseconds(unanswered.retry_delay_ms)
    code = (
        grpc.StatusCode.RESOURCE_EXHAUSTED
        if unanswered.reason in OF_ONE_CALLER
        else grpc.StatusCode.UNAVAILABLE
    )
    return Status(code, unanswered.message, info, retry)


def of_unknown(request_id: str) -> Status:
    """The status of a call that failed for a reason that is the server's own: a bug.

    It says nothing but the id under which the log has the rest.
    """
    info = ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"request": request_id})
    message = f"The server has failed; its log knows more under {request_id}."
    return Status(grpc.StatusCode.INTERNAL, message, info)


def of_late() -> Status:
    """The status of a call whose time is over; what it asked for may have happened or not."""
    info = ErrorInfo(reason="DEADLINE_EXCEEDED", domain=DOMAIN)
    return Status(grpc.StatusCode.DEADLINE_EXCEEDED, "The call's deadline has passed.", info)
