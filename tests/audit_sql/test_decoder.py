"""The decoder in SQL says of every request and effect what the code says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from peculium_server.core import cbor
from peculium_server.core.encoding import (
    FIELDS,
    decode_effect,
    decode_request,
    encode_effect,
    encode_request,
)
from peculium_server.core.operations import (
    AtomicBatch,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Kind,
    Operation,
    Rotation,
    Usage,
)
from peculium_server.core.state import Effect, Hold
from tests.core.every_kind import MAKE, World
from tests.core.test_encoding import EFFECT, IDS, OPERATION_VECTORS, operations

AUTHORITIES = {ByToken: "TOKEN", ByHolder: "HOLDER", ByRole: "ROLE"}
DECODER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def fingerprint(token_id: bytes) -> str:
    """What is shown of a token."""
    return hashlib.sha256(token_id).digest()[:8].hex()


def told_request(operation: Operation) -> dict[str, Any]:
    """What auditors are told of a request."""
    told = _told(operation, [name for _, name, *_ in FIELDS[operation.kind]])
    return {"authority": AUTHORITIES[type(operation.authority)]} | told


def _told(source: object, names: Any) -> dict[str, Any]:
    values = {name: getattr(source, name) for name in names}
    return {
        name.removesuffix("_id") if name.endswith("token_id") else name: _value(name, value)
        for name, value in values.items()
        if value or type(value) is int
    }


def _value(name: str, value: Any) -> Any:
    match value:
        case bytes():
            return fingerprint(value) if name.endswith("token_id") else str(UUID(bytes=value))
        case Usage() | Child() | Rotation():
            return _told(value, type(value).__dataclass_fields__)
        case AtomicBatch():
            return {"batch_id": str(UUID(bytes=value.batch_id)), "size": value.size}
        case tuple() if name == "labels":
            return dict(value)
        case tuple():
            return [_value(name, item) for item in value]
        case _:
            return value


def told_effect(effect: Effect) -> dict[str, Any]:
    """What auditors are told of an effect."""
    told = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in effect._asdict().items()
        if value
    }
    told["changes"] = {name: value for name, value in effect.changes._asdict().items() if value}
    if effect.hold:
        told["hold"] = _told_hold(effect.hold)
    told["holds"] = [_told_hold(hold) for hold in effect.holds]
    return {name: value for name, value in told.items() if value}


def _told_hold(hold: Hold) -> dict[str, Any]:
    numbers = {name: value for name, value in hold._asdict().items() if value}
    del numbers["state"], numbers["budget_id"]
    numbers.pop("token", None)
    return numbers | {"hold_id": str(UUID(bytes=hold.hold_id)), "state": hold.state.name}


@pytest.fixture(scope="module")
def connection(postgres: Any) -> Iterator[psycopg.Connection]:
    with (
        postgres.fresh_database(postgres.migrated_template()) as dsn,
        psycopg.connect(dsn, autocommit=True) as connection,
    ):
        yield connection


def asked(connection: psycopg.Connection, function: str, encoded: bytes) -> Any:
    """What the database makes of the bytes."""
    query = f"SELECT audit.{function}(%b)"
    ((told,),) = connection.execute(query.encode(), [encoded]).fetchall()
    return told


@pytest.mark.parametrize("vector", OPERATION_VECTORS, ids=IDS)
def test_the_vectors_are_told_as_the_code_decodes_them(
    vector: dict[str, Any], connection: psycopg.Connection
) -> None:
    request = bytes.fromhex(vector["request"]["encoded"])
    consumed = vector["parts"][0]["consumed"]
    operation = decode_request(
        kind=Kind[vector["kind"]],
        root_id=bytes(16),
        budget_id=bytes(16),
        operation_id=bytes(16),
        trace_id=None,
        consumed=consumed and bytes.fromhex(consumed),
        request=request,
    )
    assert asked(connection, "request", request) == told_request(operation)
    for part in vector["parts"]:
        encoded = bytes.fromhex(part["effect"]["encoded"])
        effect = decode_effect(encoded, bytes(16))
        assert asked(connection, "effect", encoded) == told_effect(effect)


@pytest.mark.parametrize("kind", Kind)
def test_every_field_of_every_kind_is_told(kind: Kind, connection: psycopg.Connection) -> None:
    operation = MAKE[kind](World())
    assert asked(connection, "request", encode_request(operation)) == told_request(operation)


@pytest.mark.parametrize("kind", Kind)
@DECODER
@given(data=st.data())
def test_any_request_is_told_as_it_was_asked(
    kind: Kind, data: st.DataObject, connection: psycopg.Connection
) -> None:
    operation = data.draw(operations(kind))
    request = encode_request(operation)
    told = told_request(operation)
    # A text with the character that PostgreSQL's texts do not have cannot be told.
    assert asked(connection, "request", request) == (None if "\\x00" in repr(told) else told)


@DECODER
@given(effect=EFFECT)
def test_any_effect_is_told(effect: Effect, connection: psycopg.Connection) -> None:
    assert asked(connection, "effect", encode_effect(effect)) == told_effect(effect)


@pytest.mark.parametrize(
    "encoded",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xa1", id="a map without its items"),
        pytest.param(b"\xa1\x01", id="a key without a value"),
        pytest.param(b"\xa0\xa0", id="more than one value"),
        pytest.param(b"\xa1\x0b\x62\xc3\x28", id="a text that is not UTF-8"),
        pytest.param(b"\xa1\x0b\x63\xed\xa0\x80", id="half of a surrogate pair"),
        pytest.param(b"\xa1\x0b\x61\x00", id="the character zero"),
        pytest.param(b"\xa1\x0b\x7b\x7f" + b"\xff" * 7, id="a text longer than anything"),
        pytest.param(b"\xbb\x7f" + b"\xff" * 7, id="a map larger than anything"),
        pytest.param(b"\xa1\x03\x1b" + b"\xff" * 8, id="a number beyond a bigint"),
        pytest.param(b"\xa1\x03\x19\x01", id="a number cut short"),
        pytest.param(b"\x81" * 1_000 + b"\x01", id="a list in a list in a list"),
        pytest.param(b"\xbf\xff", id="an indefinite length"),
        pytest.param(b"\xc0\x01", id="a tag"),
        pytest.param(b"\xa1\x03\xf9\x00\x00", id="a float"),
        pytest.param(b"\xa1\xf5\x01", id="a key that is none"),
    ],
)
def test_what_is_no_request_is_told_as_nothing(
    encoded: bytes, connection: psycopg.Connection
) -> None:
    assert asked(connection, "request", encoded) is None


@DECODER
@given(data=st.data(), kind=st.sampled_from(Kind))
def test_whatever_was_done_to_its_bytes_a_request_breaks_no_query(
    data: st.DataObject, kind: Kind, connection: psycopg.Connection
) -> None:
    altered = bytearray(encode_request(MAKE[kind](World())))
    for _ in range(data.draw(st.integers(1, 3))):
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    told = asked(connection, "request", bytes(altered))
    asked(connection, "effect", bytes(altered))
    assert told is None or isinstance(told, dict | list | str | int)


def test_a_key_of_a_later_version_is_told_by_its_number(connection: psycopg.Connection) -> None:
    encoded = cbor.encode({1: 3, 99: [1, {"a": None}]})
    told = asked(connection, "request", encoded)
    assert told == {"authority": "ROLE", "99": [1, {"a": None}]}


def test_bytes_that_are_no_id_are_told_by_their_fingerprint_under_any_key(
    connection: psycopg.Connection,
) -> None:
    secret = bytes(range(32))
    told = asked(connection, "request", cbor.encode({99: secret, 26: secret[:31]}))
    assert told == {"99": fingerprint(secret), "reason": fingerprint(secret[:31])}
