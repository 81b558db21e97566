from __future__ import annotations

import secrets
from dataclasses import fields, replace
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given, strategies as st

from peculium.v1 import admin_service_pb2 as admin, ledger_service_pb2 as ledger, types_pb2
from peculium_server.core.encoding import token_id
from peculium_server.core.limits import HOLD_TTL_US_DEFAULT
from peculium_server.core.operations import (
    OPERATIONS,
    After,
    Authority,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Kind,
    Operation,
    Rotation,
    Usage,
)
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.rpc.requests import decode, decode_authority, decode_batched, trace_id
from tests.rpc.messages import BY_ADMIN, BY_AGENT, message_of

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"

# Whatever a wire field can say, well-formed or not: to judge it is not the codec's.
_bytes = st.binary(max_size=40)
_given_bytes = st.binary(min_size=1, max_size=40)
_text = st.text(max_size=20)
_int64 = st.integers(-(2**63), 2**63 - 1)
_MOST = 315_576_000_000 * 10**6
_duration = st.integers(-_MOST, _MOST)
_labels = st.dictionaries(_text, _text, max_size=16).map(lambda kv: tuple(sorted(kv.items())))
_usage = st.builds(
    Usage,
    provider=_text,
    model=_text,
    input_tokens=_int64,
    output_tokens=_int64,
    cached_tokens=_int64,
)
_child = st.builds(
    Child,
    budget_id=_bytes,
    name=_text,
    amount=_int64,
    token_id=st.none() | _given_bytes,
    holder=st.none() | st.text(min_size=1, max_size=20),
    lease_us=st.none() | _duration,
    lease_latest_us=st.none() | _duration,
    labels=_labels,
    overrun_factor=st.integers(0, 2**32 - 1),
)
_rotation = st.builds(Rotation, hold_id=_bytes, next_token_id=_bytes)
_BY_NAME: dict[str, st.SearchStrategy[Any]] = {
    "operation_id": _bytes,
    "root_id": _bytes,
    "budget_id": _bytes,
    "labels": _labels,
    "dry_run": st.booleans(),
    "trace_id": st.sampled_from([None, bytes.fromhex(TRACE)]),
    "name": _text,
    "unit": _text,
    "amount": _int64,
    "token_id": st.none() | _given_bytes,
    "holder": st.none() | st.text(min_size=1, max_size=20),
    "ttl_us": _duration,
    "next_token_id": st.none() | _given_bytes,
    "hold_id": _bytes,
    "hold_token_id": _bytes,
    "next_hold_token_id": st.none() | _given_bytes,
    "actual": st.none() | _int64,
    "keep_open": st.booleans(),
    "reference": _text,
    "usage": st.none() | _usage,
    "estimated": st.booleans(),
    "children": st.lists(_child, max_size=3).map(tuple),
    "holds": st.lists(_rotation, max_size=3).map(tuple),
    "if_seq": st.none() | _int64,
    "descendant_id": _bytes,
    "lease_us": st.none() | _duration,
    "cascade": st.booleans(),
    "reason": _text,
}
_REQUIRED: dict[Kind, dict[str, st.SearchStrategy[Any]]] = {
    Kind.ACCEPT: {"next_token_id": _bytes},
    Kind.EXTEND: {"next_hold_token_id": _bytes},
    Kind.RENEW: {"lease_us": _duration},
    Kind.RESOLVE: {"actual": _int64},
    Kind.RETURN: {"amount": st.none() | _int64},
}


@st.composite
def _asked(draw: st.DrawFn, by_admin: bool) -> tuple[Operation, types_pb2.Authority | None]:
    kind = draw(st.sampled_from(sorted(BY_ADMIN if by_admin else BY_AGENT)))
    proof, authority = (None, ByRole()) if by_admin else draw(_proofs())
    values = {
        field.name: draw((_BY_NAME | _REQUIRED.get(kind, {}))[field.name])
        for field in fields(OPERATIONS[kind])
        # Whether it is part of an atomic batch is the batch's to say.
        if field.name not in ("authority", "batch")
    }
    # What a service has no field for is not asked there.
    if kind is Kind.RESOLVE and by_admin:
        values["next_token_id"] = None
    if kind is Kind.RECOVER and not by_admin:
        values["holder"] = None
    if kind is Kind.RECOVER and by_admin:
        values["if_seq"] = None
    return OPERATIONS[kind](authority=authority, **values), proof


@st.composite
def _proofs(draw: st.DrawFn) -> tuple[types_pb2.Authority, Authority]:
    secret = draw(st.binary(min_size=32, max_size=32))
    index = draw(st.integers(0, 2**32 - 1))
    cases: list[tuple[types_pb2.Authority, Authority]] = [
        (types_pb2.Authority(secret=secret), ByToken(token_id(secret))),
        (types_pb2.Authority(after=index), After(index)),
        (types_pb2.Authority(holder=types_pb2.Holder()), ByHolder()),
    ]
    return draw(st.sampled_from(cases))


@given(st.booleans().flatmap(_asked))
def test_every_request_becomes_the_operation_that_it_asks_for(
    asked: tuple[Operation, types_pb2.Authority | None],
) -> None:
    operation, proof = asked
    traceparent = TRACEPARENT if operation.trace_id is not None else ""
    request = message_of(operation, proof, traceparent)
    parsed = type(request).FromString(request.SerializeToString())
    assert decode(parsed) == operation


@given(_asked(by_admin=False))
def test_an_operation_of_a_batch_is_the_same_as_alone(
    asked: tuple[Operation, types_pb2.Authority | None],
) -> None:
    operation, proof = asked
    operation = replace(operation, trace_id=None)
    element: Any = {operation.kind.name.lower(): message_of(operation, proof)}
    batched = ledger.Operation(**element)
    assert decode_batched(batched) == operation


def test_no_secret_gets_past_the_decoder() -> None:
    secret = secrets.token_bytes(32)
    request = ledger.SpendRequest(
        header=types_pb2.OperationHeader(authority=types_pb2.Authority(secret=secret))
    )
    decoded = repr(decode(request))
    assert repr(secret) not in decoded
    assert secret.hex() not in decoded


def header(**changes: Any) -> types_pb2.OperationHeader:
    proof = types_pb2.Authority(holder=types_pb2.Holder())
    return types_pb2.OperationHeader(**{"authority": proof, **changes})


BAD = [
    (ledger.SpendRequest(), "authority", "is missing"),
    (
        ledger.SpendRequest(header=header(authority=types_pb2.Authority())),
        "authority",
        "is missing",
    ),
    (
        ledger.SpendRequest(header=header(authority=types_pb2.Authority(secret=b""))),
        "authority.secret",
        "must be 32 bytes, not 0",
    ),
    (
        ledger.SpendRequest(header=header(authority=types_pb2.Authority(secret=b"x" * 33))),
        "authority.secret",
        "must be 32 bytes, not 33",
    ),
    (
        admin.TopUpRequest(header=header()),
        "authority",
        "must be absent: the caller's role is the authority",
    ),
    (ledger.ExtendRequest(header=header()), "ttl", "is missing"),
    (ledger.RenewRequest(header=header()), "lease", "is missing"),
    (ledger.ReturnRequest(header=header()), "extent", "is missing: name an amount or all"),
    (ledger.ReturnRequest(header=header(), all=False), "all", "must be true where it is said"),
    (
        ledger.ReserveRequest(header=header(), ttl=Duration(seconds=2**63 - 1)),
        "ttl",
        "is not a duration",
    ),
    (
        ledger.ReserveRequest(header=header(), ttl=Duration(seconds=1, nanos=-1)),
        "ttl",
        "is not a duration",
    ),
    (
        ledger.ReserveRequest(header=header(), ttl=Duration(seconds=-1, nanos=1)),
        "ttl",
        "is not a duration",
    ),
    (
        ledger.FundRequest(header=header(), lease=Duration(nanos=1_000_000_000)),
        "lease",
        "is not a duration",
    ),
    (
        ledger.DelegateRequest(
            header=header(),
            children=[
                types_pb2.ChildSpec(),
                types_pb2.ChildSpec(lease=Duration(seconds=-(2**63))),
            ],
        ),
        "children[1].lease",
        "is not a duration",
    ),
    (
        ledger.DelegateRequest(
            header=header(),
            children=[types_pb2.ChildSpec(lease_latest=Duration(seconds=2**40))],
        ),
        "children[0].lease_latest",
        "is not a duration",
    ),
]


@pytest.mark.parametrize(("request_", "field", "problem"), BAD, ids=range(len(BAD)))
def test_what_no_operation_can_say_is_malformed(request_: Any, field: str, problem: str) -> None:
    refused = decode(request_)
    assert refused == Refused(Refusal.MALFORMED, {"field": field, "problem": problem})


def test_an_element_of_a_batch_without_an_operation_is_malformed() -> None:
    refused = decode_batched(ledger.Operation())
    assert refused == Refused(Refusal.MALFORMED, {"field": "operation", "problem": "is missing"})


LABELS = {f"key{number}": "value" for number in range(17)}
LARGE = [
    (ledger.SpendRequest(header=header(labels=LABELS)), "labels", 16, 17),
    (
        ledger.DelegateRequest(header=header(), children=[types_pb2.ChildSpec()] * 100_000),
        "children",
        256,
        100_000,
    ),
    (
        ledger.RecoverRequest(header=header(), holds=[types_pb2.HoldRotation()] * 257),
        "holds",
        256,
        257,
    ),
    (
        admin.AdminServiceRecoverRequest(holds=[types_pb2.HoldRotation()] * 257),
        "holds",
        256,
        257,
    ),
]


@pytest.mark.parametrize(
    ("request_", "field", "limit", "size"), LARGE, ids=["labels", "children", "holds", "by admin"]
)
def test_more_than_a_request_may_carry_is_refused_before_it_is_read(
    request_: Any, field: str, limit: int, size: int
) -> None:
    refused = decode(request_)
    facts = {"field": field, "limit": str(limit), "size": str(size)}
    assert refused == Refused(Refusal.TOO_LARGE, facts)


def test_a_reserve_without_a_time_to_live_gets_the_default() -> None:
    operation = decode(ledger.ReserveRequest(header=header()))
    assert not isinstance(operation, Refused)
    assert operation.kind is Kind.RESERVE
    assert operation.ttl_us == HOLD_TTL_US_DEFAULT  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given_duration", "microseconds"),
    [
        (Duration(seconds=1, nanos=999), 1_000_000),
        (Duration(seconds=1, nanos=1_999), 1_000_001),
        (Duration(nanos=-1_999), -1),
        (Duration(seconds=-1, nanos=-500_000_000), -1_500_000),
    ],
)
def test_what_is_finer_than_a_microsecond_is_cut_off(
    given_duration: Duration, microseconds: int
) -> None:
    operation = decode(ledger.ReserveRequest(header=header(), ttl=given_duration))
    assert operation.ttl_us == microseconds  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("traceparent", "expected"),
    [
        ("", None),
        (TRACEPARENT, bytes.fromhex(TRACE)),
        (f"cc-{TRACE}-00f067aa0ba902b7-01-what-the-future-brings", bytes.fromhex(TRACE)),
        (TRACEPARENT.upper(), None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}", None),
        (f"00-{TRACE[:-1]}g-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-00f067aa0ba902b7-01\n", None),
        ("x" * 100_000, None),
    ],
)
def test_a_trace_context_that_is_none_is_left_out(traceparent: str, expected: bytes | None) -> None:
    assert trace_id(traceparent) == expected


def test_the_authority_of_a_read_is_decoded_as_that_of_an_operation() -> None:
    secret = secrets.token_bytes(32)
    assert decode_authority(types_pb2.Authority(secret=secret)) == ByToken(token_id(secret))
    assert decode_authority(types_pb2.Authority()) == Refused(
        Refusal.MALFORMED, {"field": "authority", "problem": "is missing"}
    )
