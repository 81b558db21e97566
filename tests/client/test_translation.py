from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from peculium import errors
from peculium._translation import failure, refusal, unavailable
from peculium.v1 import ledger_service_pb2, types_pb2
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.lanes.answers import Unanswered, Unavailability
from peculium_server.rpc import status

REASONS = [reason for reason in types_pb2.RefusalReason.values() if reason]
UNAVAILABLE = [reason for reason in types_pb2.UnavailableReason.values() if reason]
UNKNOWN_OUTCOME = types_pb2.UNAVAILABLE_REASON_DATABASE_UNAVAILABLE


def name_of(reason: types_pb2.RefusalReason.ValueType) -> str:
    return types_pb2.RefusalReason.Name(reason).removeprefix("REFUSAL_REASON_")


@pytest.mark.parametrize("reason", REASONS, ids=name_of)
def test_every_reason_of_the_wire_has_a_class_of_its_own(
    reason: types_pb2.RefusalReason.ValueType,
) -> None:
    message = types_pb2.Refused(reason=reason, message="No.", metadata={"budget": "0192"})
    error = refusal(message, operation_id="0193")
    assert type(error) is errors.BY_REASON[name_of(reason)]
    assert error.reason == name_of(reason)
    assert (error.message, error.budget, error.operation_id) == ("No.", "0192", "0193")
    assert type(error).__name__.upper() == name_of(reason).replace("_", "")


def test_no_two_reasons_share_a_class() -> None:
    assert len(set(errors.BY_REASON.values())) == len(errors.BY_REASON) == len(REASONS)


@pytest.mark.parametrize("refused", list(Refusal), ids=lambda refused: refused.name)
def test_every_refusal_of_a_whole_call_arrives_with_its_facts(refused: Refusal) -> None:
    sent = status.of_refused(Refused(refused, {"budget": "0192", "fact": "7"}))
    failed = failure(sent.code, sent.details, sent.trailing_metadata)
    assert type(failed.refused) is errors.BY_REASON[refused.name]
    assert failed.refused.facts == {"budget": "0192", "fact": "7"}
    assert failed.not_done


@pytest.mark.parametrize("reason", list(Unavailability), ids=lambda reason: reason.name)
def test_every_reason_of_having_no_answer_says_whether_something_was_done(
    reason: Unavailability,
) -> None:
    sent = status.of_unanswered(Unanswered(reason, {}, 1500))
    whole = failure(sent.code, sent.details, sent.trailing_metadata)
    message = ledger_service_pb2.Unavailable(
        reason=reason.value,  # type: ignore[arg-type]
        retry_delay=Duration(seconds=1, nanos=500_000_000),
    )
    for failed in (whole, unavailable(message)):
        assert failed.refused is None
        assert failed.not_done is (reason is not Unavailability.DATABASE_UNAVAILABLE)
        assert failed.retry_seconds == 1.5
        assert not failed.permanent


def test_having_no_answer_without_words_is_told_by_its_reason() -> None:
    message = ledger_service_pb2.Unavailable(reason=UNKNOWN_OUTCOME)
    assert unavailable(message).message == "DATABASE_UNAVAILABLE"
    assert unavailable(message).retry_seconds is None


def test_a_reason_of_a_newer_ledger_is_a_refusal_all_the_same() -> None:
    message = types_pb2.Refused(message="Not on Sundays.")
    message.reason = 999  # type: ignore[assignment]
    error = refusal(message, budget="acme")
    assert type(error) is errors.Refused
    assert str(error) == "999: Not on Sundays. [budget acme]"


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDenied),
        (grpc.StatusCode.UNIMPLEMENTED, errors.NotSupported),
    ],
)
def test_a_definite_status_without_details_is_believed(
    code: grpc.StatusCode, cls: type[errors.PeculiumError]
) -> None:
    failed = failure(code, "no", ())
    assert type(failed.refused) is cls
    assert failed.not_done


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.ABORTED,
    ],
)
def test_any_other_status_leaves_the_outcome_unknown(code: grpc.StatusCode) -> None:
    failed = failure(code, "connection reset", None)
    assert (failed.refused, failed.not_done, failed.permanent) == (None, False, False)
    assert code.name in failed.message


def test_a_call_that_never_left_this_machine_did_nothing() -> None:
    code = grpc.StatusCode.UNAVAILABLE
    assert failure(code, "failed to connect to all addresses; last error: ...", ()).not_done
    assert failure(code, "DNS resolution failed for ledger", ()).not_done
    assert not failure(code, "recvmsg: failed to connect to all addresses", ()).not_done


def test_too_large_a_message_would_be_as_large_again() -> None:
    failed = failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", ())
    assert failed.permanent
    assert not failed.not_done, "it may have been the answer that was too large"


def test_what_is_asked_to_be_tried_again_is_not_permanent() -> None:
    retry = RetryInfo(retry_delay=Duration(seconds=2))
    failed = failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "slow down", metadata(retry))
    assert (failed.permanent, failed.retry_seconds) == (False, 2)
    assert not failed.not_done, "a proxy may say so of a call that it has passed on"


def metadata(*details: Any) -> list[tuple[str, str | bytes]]:
    packed = [Packed() for _ in details]
    for each, detail in zip(packed, details, strict=True):
        each.Pack(detail)
    return [
        ("x-other", "text"),
        ("grpc-status-details-bin", Status(details=packed).SerializeToString()),
    ]


def test_details_of_somebody_else_are_not_ours() -> None:
    foreign = ErrorInfo(domain="googleapis.com", reason="BUDGET_EXHAUSTED")
    failed = failure(grpc.StatusCode.UNAVAILABLE, "no", metadata(foreign))
    assert failed.refused is None
    negative = RetryInfo(retry_delay=Duration(seconds=-5))
    assert failure(grpc.StatusCode.UNAVAILABLE, "no", metadata(negative)).retry_seconds == 0


def test_details_that_are_none_are_ignored() -> None:
    broken: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", b"\xff\xff\xff")]
    assert failure(grpc.StatusCode.UNAVAILABLE, "no", broken).refused is None
