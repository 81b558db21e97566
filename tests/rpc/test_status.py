from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as StatusMessage

from peculium.v1 import types_pb2
from peculium_server.core.refusals import RULES, Refusal, Refused
from peculium_server.lanes.answers import SENTENCES, Unanswered, Unavailability, without_store
from peculium_server.rpc import interceptors, status
from peculium_server.rpc.calls import CALL, Call
from peculium_server.store import errors

TAKEN_FOR_TRY_AGAIN = {
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Codes on which retry layers send the same call again."""


def of_wire(enum: Any, prefix: str) -> dict[str, int]:
    return {
        name.removeprefix(prefix): number
        for name, number in enum.items()
        if not name.endswith("_UNSPECIFIED")
    }


def of_core(enum: type[IntEnum]) -> dict[str, int]:
    return {member.name: member.value for member in enum}


def details(sent: status.Status) -> tuple[StatusMessage, list[Message]]:
    [(key, value)] = sent.trailing_metadata
    assert key == "grpc-status-details-bin"
    assert isinstance(value, bytes)
    message = StatusMessage.FromString(value)
    unpacked: list[Message] = []
    for detail in message.details:
        kind = ErrorInfo if detail.TypeName() == "google.rpc.ErrorInfo" else RetryInfo
        into = kind()
        assert detail.Unpack(into)
        unpacked.append(into)
    return message, unpacked


def test_every_refusal_of_the_core_is_one_of_the_wire_with_the_same_number() -> None:
    assert of_core(Refusal) == of_wire(types_pb2.RefusalReason, "REFUSAL_REASON_")


def test_every_unavailability_is_one_of_the_wire_with_the_same_number() -> None:
    assert of_core(Unavailability) == of_wire(types_pb2.UnavailableReason, "UNAVAILABLE_REASON_")


def test_every_refusal_has_a_code_and_a_sentence() -> None:
    assert set(status.CODES) == set(Refusal) == set(RULES)


def test_every_unavailability_has_a_sentence() -> None:
    assert set(SENTENCES) == set(Unavailability)


def test_no_refusal_looks_like_something_to_try_again() -> None:
    assert TAKEN_FOR_TRY_AGAIN.isdisjoint(status.CODES.values())


def test_an_exhausted_budget_is_a_failed_precondition() -> None:
    assert status.CODES[Refusal.BUDGET_EXHAUSTED] is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("reason", Refusal)
def test_a_refusal_tells_its_reason_and_facts(reason: Refusal) -> None:
    refused = Refused(reason, {"budget": "0192", "available": "30"})
    sent = status.of_refused(refused)
    message, [info] = details(sent)
    assert sent.code is status.CODES[reason]
    assert message.code == sent.code.value[0]
    assert message.message == sent.details == refused.message
    assert info == ErrorInfo(reason=reason.name, domain="peculium", metadata=refused.facts)


@pytest.mark.parametrize("reason", Unavailability)
def test_an_unavailability_says_when_to_try_again(reason: Unavailability) -> None:
    sent = status.of_unanswered(Unanswered(reason, {"lane": "3"}, 1_500))
    _, [info, retry] = details(sent)
    assert sent.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert info == ErrorInfo(reason=reason.name, domain="peculium", metadata={"lane": "3"})
    assert isinstance(retry, RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1_500


def test_who_has_reached_a_limit_of_ones_own_does_not_hear_that_the_server_is_unavailable() -> None:
    told = {
        reason: status.of_unanswered(Unanswered(reason, {}, 1)).code for reason in Unavailability
    }
    of_one = {each for each in told if told[each] is grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert of_one == {
        Unavailability.RATE_LIMITED,
        Unavailability.TOO_MANY_AT_ONCE,
        Unavailability.TOO_MANY_STREAMS,
    }


def subclasses(kind: type[Any]) -> Iterable[type[Any]]:
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


MADE: dict[type[errors.StoreError], errors.StoreError] = {
    errors.StoreUnavailable: errors.StoreUnavailable("gone"),
    errors.LedgerRestored: errors.LedgerRestored("it is on timeline 2, and was on 1"),
    errors.StoreContended: errors.StoreContended(10),
    errors.SchemaOutdated: errors.SchemaOutdated(None, "0001"),
    errors.ServerOutdated: errors.ServerOutdated("0003", "0002", "0001"),
    errors.SettingsUnsafe: errors.SettingsUnsafe({"fsync": "off"}),
    errors.StatementRefused: errors.StatementRefused("42501"),
    errors.LedgerCorrupt: errors.LedgerCorrupt("rows"),
}
NOBODY_ANSWERED = (errors.StoreUnavailable, errors.StoreContended)
"""What may be otherwise when the same operation is sent again; anything else is for an operator."""


def test_every_error_of_the_store_is_known_here() -> None:
    assert set(subclasses(errors.StoreError)) == set(MADE)


@pytest.mark.parametrize("error", MADE.values(), ids=lambda error: type(error).__name__)
def test_only_an_outage_of_the_database_asks_to_try_again(error: errors.StoreError) -> None:
    CALL.set(Call("a method", "ab12"))
    sent, [info, *retry] = details(interceptors._status("a method", error))
    assert isinstance(info, ErrorInfo)
    if isinstance(error, NOBODY_ANSWERED):
        assert sent.code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert [type(detail) for detail in retry] == [RetryInfo]
        assert info.metadata == without_store(error).facts
    else:
        assert sent.code == grpc.StatusCode.INTERNAL.value[0]
        assert info.metadata == {"request": "ab12"}
        assert not retry
    assert str(error) not in sent.message


def test_an_outage_and_other_writers_in_the_way_are_told_apart() -> None:
    gone = without_store(errors.StoreUnavailable("gone"))
    assert (gone.reason, gone.facts) == (Unavailability.DATABASE_UNAVAILABLE, {})
    contended = without_store(errors.StoreContended(10))
    assert (contended.reason, contended.facts) == (Unavailability.CONTENDED, {"attempts": "10"})


def test_a_bug_is_told_by_nothing_but_the_requests_id() -> None:
    sent = status.of_unknown("ab12")
    _, [info] = details(sent)
    assert sent.code is grpc.StatusCode.INTERNAL
    assert info == ErrorInfo(reason="INTERNAL", domain="peculium", metadata={"request": "ab12"})
    assert "ab12" in sent.details


def test_a_reason_is_fit_for_error_info() -> None:
    for name in [*of_core(Refusal), *of_core(Unavailability)]:
        assert len(name) <= 63
        assert name.replace("_", "").isalnum()
        assert name == name.upper()
