"""The encoding of entries: what goes in comes out, and the reference page and its vectors are true."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import cbor2
import pytest
from hypothesis import given, strategies as st

from peculium_server.core import cbor
from peculium_server.core.encoding import (
    FIELDS,
    OPERATION_DOMAIN,
    Part,
    decode_effect,
    decode_request,
    encode_effect,
    encode_request,
    operation_digest,
    token_id,
)
from peculium_server.core.operations import (
    OPERATIONS,
    After,
    AtomicBatch,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Header,
    Kind,
    Operation,
    Rotation,
    Usage,
)
from peculium_server.core.state import Balances, Effect, Hold, HoldState
from tests.core.every_kind import MAKE, World
from tests.core.vectors import FILE, text

PAGE = (FILE.parent / "entry-encoding.md").read_text()
VECTORS = json.loads(FILE.read_text())
OPERATION_VECTORS = VECTORS["operations"]
IDS = [f"{number} {vector['kind']}" for number, vector in enumerate(OPERATION_VECTORS)]

# -- What goes in comes out -----------------------------------------------------------------------------

AMOUNT = st.integers(0, 2**62)
ID, TOKEN = st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SAID = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
LABELS = st.dictionaries(TEXT, TEXT, max_size=3).map(lambda labels: tuple(sorted(labels.items())))
USAGE = st.builds(
    Usage,
    provider=TEXT,
    model=TEXT,
    input_tokens=AMOUNT,
    output_tokens=AMOUNT,
    cached_tokens=AMOUNT,
)
CHILD = st.builds(
    Child,
    budget_id=ID,
    name=SAID,
    amount=AMOUNT,
    token_id=st.none() | TOKEN,
    holder=st.none() | SAID,
    lease_us=st.none() | AMOUNT,
    lease_latest_us=st.none() | AMOUNT,
    labels=LABELS,
    overrun_factor=st.integers(0, 1000),
)
ROTATION = st.builds(Rotation, hold_id=ID, next_token_id=TOKEN)

BY_NAME: dict[str, st.SearchStrategy[Any]] = {
    "operation_id": ID,
    "root_id": ID,
    "budget_id": ID,
    "authority": st.builds(ByToken, TOKEN) | st.just(ByHolder()) | st.just(ByRole()),
    "labels": LABELS,
    "batch": st.none() | st.builds(AtomicBatch, ID, st.integers(1, 256)),
    "trace_id": st.none() | ID,
    "name": SAID,
    "unit": SAID,
    "holder": st.none() | SAID,
    "token_id": st.none() | TOKEN,
    "next_token_id": st.none() | TOKEN,
    "hold_token_id": TOKEN,
    "next_hold_token_id": st.none() | TOKEN,
    "hold_id": ID,
    "descendant_id": ID,
    "ttl_us": AMOUNT,
    "keep_open": st.booleans(),
    "estimated": st.booleans(),
    "cascade": st.booleans(),
    "reference": TEXT,
    "reason": TEXT,
    "usage": st.none() | USAGE,
    "children": st.lists(CHILD, min_size=1, max_size=3).map(tuple),
    "holds": st.lists(ROTATION, max_size=3).map(tuple),
}
REQUIRED = {
    ("ACCEPT", "next_token_id"): TOKEN,
    ("EXTEND", "next_hold_token_id"): TOKEN,
    ("RESOLVE", "actual"): AMOUNT,
    ("RENEW", "lease_us"): AMOUNT,
    ("RESOLVE", "reason"): SAID,
}
OPTIONAL_AMOUNTS = {("SETTLE", "actual"), ("RETURN", "amount"), ("FUND", "lease_us")}


def _field(kind: Kind, name: str) -> st.SearchStrategy[Any]:
    if (kind.name, name) in REQUIRED:
        return REQUIRED[kind.name, name]
    if (kind.name, name) in OPTIONAL_AMOUNTS:
        return st.none() | AMOUNT
    return BY_NAME.get(name, AMOUNT)


def operations(kind: Kind) -> st.SearchStrategy[Operation]:
    type_ = OPERATIONS[kind]
    names = [field.name for field in fields(type_) if field.name != "dry_run"]
    return st.builds(type_, **{name: _field(kind, name) for name in names})


def _decoded(operation: Operation, request: bytes) -> Operation:
    authority = operation.authority
    return decode_request(
        kind=operation.kind,
        root_id=operation.root_id,
        budget_id=operation.budget_id,
        operation_id=operation.operation_id,
        trace_id=operation.trace_id,
        consumed=authority.token_id if isinstance(authority, ByToken) else None,
        request=request,
    )


@pytest.mark.parametrize("kind", Kind)
@given(data=st.data())
def test_a_request_is_decoded_to_what_was_encoded(kind: Kind, data: st.DataObject) -> None:
    operation = data.draw(operations(kind))
    request = encode_request(operation)
    assert _decoded(operation, request) == operation
    assert cbor2.dumps(cbor2.loads(request), canonical=True) == request


@pytest.mark.parametrize("kind", Kind)
def test_what_is_asked_in_full_is_decoded_in_full(kind: Kind) -> None:
    operation = MAKE[kind](World())
    assert _decoded(operation, encode_request(operation)) == operation


def test_a_chained_authority_is_not_recorded() -> None:
    world = World()
    with pytest.raises(AssertionError):
        encode_request(world.child.spend(1, authority=After(0)))


HOLD = st.builds(
    Hold,
    budget_id=st.just(bytes(16)),
    hold_id=ID,
    token=st.just(b""),
    state=st.sampled_from(HoldState),
    amount=AMOUNT,
    remaining=AMOUNT,
    booked=AMOUNT,
    disputed=AMOUNT,
    created_at=AMOUNT,
    expires_at=AMOUNT,
)
CHANGE = st.integers(-(2**62), 2**62)
EFFECT = st.builds(
    Effect,
    changes=st.builds(Balances, *[CHANGE] * 8),
    disputed=AMOUNT,
    disputes=AMOUNT,
    holds_live=AMOUNT,
    closed=st.booleans(),
    frozen=st.booleans(),
    lease_until=st.none() | st.integers(1, 2**62),
    lease_latest=st.none() | st.integers(1, 2**62),
    version=AMOUNT,
    versions=st.lists(AMOUNT, max_size=16).map(tuple),
    hold=st.none() | HOLD,
    returned=AMOUNT,
    pending=AMOUNT,
    holds=st.lists(HOLD, max_size=3).map(tuple),
    holds_truncated=st.booleans(),
)


@given(EFFECT)
def test_an_effect_is_decoded_to_what_was_encoded(effect: Effect) -> None:
    encoded = encode_effect(effect)
    assert decode_effect(encoded, bytes(16)) == effect
    assert cbor2.dumps(cbor2.loads(encoded), canonical=True) == encoded


@pytest.mark.parametrize(
    "value",
    [0, [], None, {1: 1}, {1: []}, {1: [1]}, {11: 1}, {11: [1]}, {11: {}}, {11: {1: b"", 2: 9}},
     {10: 1}, {14: 1}, {14: [1]}, {14: [[0]]}],
)  # fmt: skip
def test_what_is_no_effect_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"effect|not a valid HoldState"):
        decode_effect(cbor.encode(value), bytes(16))


@pytest.mark.parametrize(
    ("what", "encoded"),
    [
        ("nothing", ""),
        ("keys in another order", "a2040102" + "01"),
        ("a key twice", "a2020102" + "01"),
        ("a key that is none", "a10001"),
        ("a key beyond all", "a11001"),
        ("zero", "a10200"),
        ("a number in a longer form", "a1021817"),
        ("a number that is a text", "a10260"),
        ("false", "a105f4"),
        ("a flag that is a number", "a10501"),
        ("no changes", "a101a0"),
        ("a change by zero", "a101a10100"),
        ("changes in another order", "a101a202010101"),
        ("changes of what is no balance", "a101a10901"),
        ("a change in a longer form", "a101a1011900ff"),
        ("a change that is bytes", "a101a10140"),
        ("no versions", "a10a80"),
        ("versions that are texts", "a10a8160"),
        ("a hold without an id", "a10ba10201"),
        ("a hold with a shorter id", "a10ba2014f" + 15 * "00" + "0201"),
        ("a hold without a state", "a10ba1" + "0150" + 16 * "00"),
        ("a hold in no state", "a10ba2" + "0150" + 16 * "00" + "0206"),
        ("no holds", "a10e80"),
        ("something behind it", "a000"),
        ("a number that is cut short", "a10219"),
        ("a change that is cut short", "a101a1011a0001"),
        ("versions that are cut short", "a10a8201"),
    ],
)
def test_what_is_no_encoding_of_an_effect_is_refused(what: str, encoded: str) -> None:
    with pytest.raises(ValueError, match="not an effect"):
        decode_effect(bytes.fromhex(encoded), bytes(16))


@given(EFFECT, st.data())
def test_an_effect_with_a_byte_changed_is_another_or_refused(
    effect: Effect, data: st.DataObject
) -> None:
    encoded = bytearray(encode_effect(effect))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        other = decode_effect(bytes(encoded), bytes(16))
    except ValueError:
        return
    assert encode_effect(other) == bytes(encoded)


# -- Keys -------------------------------------------------------------------------------------------------

HEADER = {field.name for field in fields(Header)}


@pytest.mark.parametrize("kind", Kind)
def test_every_field_of_a_kind_has_a_key(kind: Kind) -> None:
    own = {field.name for field in fields(OPERATIONS[kind])} - HEADER
    assert {field.name for field in FIELDS[kind]} == own | {"labels", "batch"}


def test_a_key_means_the_same_in_every_kind() -> None:
    meanings = {(field.key, field.name) for each in FIELDS.values() for field in each}
    keys = [key for key, _ in meanings]
    assert len(keys) == len(set(keys))
    assert 1 not in keys


# -- The reference page ------------------------------------------------------------------------------------


def _table(heading: str) -> list[list[str]]:
    """The rows of the table on the page whose first column has a heading."""
    lines = PAGE[PAGE.index(f"| {heading} |") :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


KEYS = {name: (int(key), value) for key, name, value in _table("key")}
USAGE_KEYS = {name: (int(key), value) for key, name, value in _table("usage key")}
EFFECT_KEYS = {name: (int(key), value) for key, name, value in _table("effect key")}
HOLD_KEYS = {name: (int(key), value) for key, name, value in _table("hold key")}
KIND_NUMBERS = {name: int(number) for number, name, _, _ in _table("number")}


def test_the_page_tells_every_kind_and_its_keys() -> None:
    told = {name: [int(key) for key in keys.split()] for _, name, keys, _ in _table("number")}
    assert {kind.name: kind.value for kind in Kind} == KIND_NUMBERS
    assert told == {kind.name: sorted([1, *(field.key for field in FIELDS[kind])]) for kind in Kind}


def test_the_page_tells_every_key() -> None:
    own = {field.name: field.key for each in FIELDS.values() for field in each}
    own["authority"] = 1
    told = {name: key for name, (key, _) in KEYS.items()}
    only_in_children = {name for name, (_, value) in KEYS.items() if "in children only" in value}
    assert {name: key for name, key in told.items() if name not in only_in_children} == own
    assert only_in_children == {field.name for field in fields(Child)} - own.keys()
    (listed,) = re.findall(r"\*\*child\*\* is a map of the keys ([\d, and]+)\.", PAGE)
    keys = {told[field.name] for field in fields(Child)}
    assert {int(key) for key in re.findall(r"\d+", listed)} == keys
    assert [*USAGE_KEYS] == [field.name for field in fields(Usage)]
    assert [*EFFECT_KEYS] == [*Effect._fields]
    assert [*HOLD_KEYS] == [name for name in Hold._fields if name not in ("budget_id", "token")]
    assert "granted, available, held, delegated, spent, forfeited,\noverrun, advanced" in PAGE
    for state in HoldState:
        assert f"{state.value} {state.name.lower()}" in HOLD_KEYS["state"][1]


# -- What is written piece by piece is the deterministic encoding of what the page tells -------------------------


def _said(source: Any, keys: dict[str, tuple[int, str]]) -> dict[cbor.Key, cbor.Value]:
    """What is None, False or empty is absent; a number is always said."""
    return {
        keys[field.name][0]: _plain(value)
        for field in fields(source)
        if field.name in keys and ((value := getattr(source, field.name)) or type(value) is int)
    }


def _plain(value: Any) -> cbor.Value:
    match value:
        case Usage():
            return _said(value, USAGE_KEYS)
        case AtomicBatch():
            return [value.batch_id, value.size]
        case (Child(), *_):
            return [_said(child, KEYS) for child in value]
        case (Rotation(), *_):
            return [[rotation.hold_id, rotation.next_token_id] for rotation in value]
        case (tuple(), *_):
            return dict(value)
        case _:
            plain: cbor.Value = value
            return plain


AUTHORITIES = {ByToken: 1, ByHolder: 2, ByRole: 3}
OWN_KEYS = {name: key for name, key in KEYS.items() if name not in ("authority", "budget_id")}


@pytest.mark.parametrize("kind", Kind)
@given(data=st.data())
def test_a_request_is_the_encoding_of_its_map(kind: Kind, data: st.DataObject) -> None:
    operation = data.draw(operations(kind))
    said: dict[cbor.Key, cbor.Value] = {1: AUTHORITIES[type(operation.authority)]}
    assert encode_request(operation) == cbor.encode(said | _said(operation, OWN_KEYS))


def _told(hold: Hold) -> cbor.Value:
    """What is zero is absent."""
    told: dict[cbor.Key, cbor.Value] = {
        key: int(value)
        for name, (key, _) in HOLD_KEYS.items()
        if (value := getattr(hold, name)) and name != "hold_id"
    }
    return told | {1: hold.hold_id}


@given(EFFECT)
def test_an_effect_is_the_encoding_of_its_map(effect: Effect) -> None:
    told: dict[cbor.Key, cbor.Value] = {}
    for name, (key, _) in EFFECT_KEYS.items():
        value = getattr(effect, name)
        if isinstance(value, Balances):
            value = {number: by for number, by in enumerate(value, start=1) if by}
        elif isinstance(value, Hold):
            value = _told(value)
        elif isinstance(value, tuple):
            value = [_told(each) if isinstance(each, Hold) else each for each in value]
        if value:
            told[key] = value
    assert encode_effect(effect) == cbor.encode(told)


@given(
    st.sampled_from(Kind),
    st.lists(ID, min_size=2, max_size=2),
    st.lists(AMOUNT, min_size=3, max_size=3),
    TEXT,
    st.none() | ID,
    st.binary(max_size=300),
    st.lists(
        st.builds(
            Part, ID, AMOUNT, st.none() | TOKEN, st.builds(Balances, *[CHANGE] * 8), st.binary()
        ),
        max_size=30,
    ),
)
def test_a_digest_is_of_the_encoding_of_a_record(
    kind: Kind,
    ids: list[bytes],
    numbers: list[int],
    principal: str,
    trace_id: bytes | None,
    request: bytes,
    parts: list[Part],
) -> None:
    told: list[cbor.Value] = [[*part[:3], [*part.money], part.effect] for part in parts]
    record: cbor.Value = [
        int(kind),
        *ids,
        *numbers[:2],
        principal,
        trace_id,
        numbers[2],
        request,
        told,
    ]
    digest = operation_digest(
        kind=kind,
        root_id=ids[0],
        operation_id=ids[1],
        position=numbers[0],
        at=numbers[1],
        principal=principal,
        trace_id=trace_id,
        amount=numbers[2],
        request=request,
        parts=parts,
    )
    assert digest == hashlib.sha256(OPERATION_DOMAIN + cbor.encode(record)).digest()


# -- The vectors: held to the page by cbor2 and hashlib alone ---------------------------------------------------


def _bytes(value: str | None) -> bytes | None:
    return None if value is None else bytes.fromhex(value)


def _packed(value: Any, told: str) -> Any:
    """A JSON value as the page tells to encode it."""
    if told.startswith("array of the atomic batch"):
        batch_id, size = value
        return [bytes.fromhex(batch_id), size]
    if told.startswith("array of rotations"):
        return [[bytes.fromhex(hold), bytes.fromhex(token)] for hold, token in value]
    if told.startswith("map of balances"):
        return {list(Balances._fields).index(name) + 1: by for name, by in value.items()}
    maps = {"map of usage": USAGE_KEYS, "map of the hold": HOLD_KEYS}
    arrays = {"array of children": KEYS, "array of holds": HOLD_KEYS}
    for start, keys in maps.items():
        if told.startswith(start):
            return _map(value, keys)
    for start, keys in arrays.items():
        if told.startswith(start):
            return [_map(one, keys) for one in value]
    return bytes.fromhex(value) if told.startswith("bytes") else value


def _map(value: dict[str, Any], keys: dict[str, tuple[int, str]]) -> dict[int, Any]:
    return {keys[name][0]: _packed(each, keys[name][1]) for name, each in value.items()}


def _recomputed(vector: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Every encoding and hash of a vector, from its plain fields."""
    request = cbor2.dumps(_map(vector["request"]["fields"], KEYS), canonical=True)
    yield "request", request
    parts = []
    for part in vector["parts"]:
        effect = cbor2.dumps(_map(part["effect"]["fields"], EFFECT_KEYS), canonical=True)
        yield "effect", effect
        balances = [part["balances"][name] for name in Balances._fields]
        budget_id, consumed = _bytes(part["budget_id"]), _bytes(part["consumed"])
        parts.append([budget_id, part["seq"], consumed, balances, effect])
    record = [
        KIND_NUMBERS[vector["kind"]],
        _bytes(vector["root_id"]),
        _bytes(vector["operation_id"]),
        vector["position"],
        vector["at"],
        vector["principal"],
        _bytes(vector["trace_id"]),
        vector["amount"],
        request,
        parts,
    ]
    encoded = cbor2.dumps(record, canonical=True)
    digest = hashlib.sha256(b"peculium.operation.v1\x00" + encoded).digest()
    yield "digest", digest
    for number, part in enumerate(vector["parts"]):
        previous = bytes.fromhex(part["previous_hash"])
        chained = b"peculium.entry.v1\x00" + previous + digest + number.to_bytes(2, "big")
        yield "hash", hashlib.sha256(chained).digest()


@pytest.mark.parametrize("vector", OPERATION_VECTORS, ids=IDS)
def test_a_vector_is_what_the_page_says(vector: dict[str, Any]) -> None:
    told = [
        ("request", vector["request"]["encoded"]),
        *(("effect", part["effect"]["encoded"]) for part in vector["parts"]),
        ("digest", vector["digest"]),
        *(("hash", part["hash"]) for part in vector["parts"]),
    ]
    assert [(name, value.hex()) for name, value in _recomputed(vector)] == told


@pytest.mark.parametrize("vector", OPERATION_VECTORS, ids=IDS)
def test_a_vectors_bytes_say_what_its_fields_say(vector: dict[str, Any]) -> None:
    request = cbor2.loads(bytes.fromhex(vector["request"]["encoded"]))
    assert request == _map(vector["request"]["fields"], KEYS)
    for part in vector["parts"]:
        effect = cbor2.loads(bytes.fromhex(part["effect"]["encoded"]))
        assert effect == _map(part["effect"]["fields"], EFFECT_KEYS)


def test_the_vectors_are_chained() -> None:
    heads: dict[tuple[str, str], tuple[int, str]] = {}
    for vector in OPERATION_VECTORS:
        for part in vector["parts"]:
            key = vector["root_id"], part["budget_id"]
            seq, head = heads.get(key, (0, "00" * 32))
            assert (part["seq"], part["previous_hash"]) == (seq + 1, head)
            heads[key] = part["seq"], part["hash"]


def test_the_vectors_are_what_the_code_makes() -> None:
    """Else the encoding has changed, which it must not; or write them again with vectors.py."""
    assert FILE.read_text() == text()


def test_there_are_vectors_of_every_kind_of_several_parts_and_of_negative_changes() -> None:
    assert {vector["kind"] for vector in OPERATION_VECTORS} == {kind.name for kind in Kind}
    parts = [len(vector["parts"]) for vector in OPERATION_VECTORS]
    assert max(parts) >= 3
    changes = [
        by
        for vector in OPERATION_VECTORS
        for part in vector["parts"]
        for by in part["effect"]["fields"].get("changes", {}).values()
    ]
    assert min(changes) < 0
    assert max(changes) > 2**53
    told = {name for vector in OPERATION_VECTORS for name in vector["request"]["fields"]}
    children = {name for name, (_, value) in KEYS.items() if "in children only" in value}
    assert told == KEYS.keys() - children
    made = [
        name
        for vector in OPERATION_VECTORS
        for child in vector["request"]["fields"].get("children", [])
        for name in child
    ]
    assert children <= set(made)


@pytest.mark.parametrize("vector", VECTORS["tokens"])
def test_a_token_id_is_the_hash_of_a_domain_and_the_secret(vector: dict[str, str]) -> None:
    secret = bytes.fromhex(vector["secret"])
    told = hashlib.sha256(b"peculium.token.v1\x00" + secret).hexdigest()
    assert told == vector["token_id"] == token_id(secret).hex()


# -- The digest covers everything -------------------------------------------------------------------------------

DIGESTED: dict[str, Any] = {
    "kind": Kind.SPEND,
    "root_id": bytes(16),
    "operation_id": bytes(16),
    "position": 1,
    "at": 1,
    "principal": "a",
    "trace_id": None,
    "amount": 1,
    "request": b"",
    "parts": [Part(bytes(16), 1, None, Balances(), b"")],
}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("kind", Kind.RESERVE),
        ("root_id", bytes(15) + b"\x01"),
        ("operation_id", bytes(15) + b"\x01"),
        ("position", 2),
        ("at", 2),
        ("principal", "b"),
        ("trace_id", bytes(16)),
        ("amount", 2),
        ("request", b"\x00"),
        ("parts", []),
        *(
            ("parts", [DIGESTED["parts"][0]._replace(**change)])
            for change in (
                {"budget_id": bytes(15) + b"\x01"},
                {"seq": 2},
                {"consumed": bytes(32)},
                {"money": Balances(advanced=1)},
                {"effect": b"\x00"},
            )
        ),
        ("parts", DIGESTED["parts"] * 2),
    ],
)
def test_the_digest_covers_everything(name: str, other: Any) -> None:
    assert operation_digest(**DIGESTED) != operation_digest(**(DIGESTED | {name: other}))
