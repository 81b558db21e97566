"""Reading requests: nothing but the one encoding of what a kind of operation says is read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from peculium_server.core import cbor
from peculium_server.core.encoding import encode_request, request_fields
from peculium_server.core.operations import Kind
from tests.core.every_kind import World
from tests.core.test_encoding import LABELS, operations


@pytest.mark.parametrize(
    ("what", "encoded"),
    [
        ("nothing", ""),
        ("an array", "80"),
        ("no authority", "a0"),
        ("an authority that is none", "a10104"),
        ("an authority that is true", "a101f5"),
        ("a key that is none", "a2" + "0101" + "0401"),
        ("a key beyond all", "a2" + "0101" + "181d00"),
        ("a key in a longer form", "a2" + "0101" + "180301"),
        ("a key that is a text", "a2" + "0101" + "616101"),
        ("a key below zero", "a2" + "2001" + "0101"),
        ("keys in another order", "a2" + "0301" + "0101"),
        ("a key twice", "a3" + "0101" + "0301" + "0301"),
        ("a number that is a text", "a2" + "0101" + "0360"),
        ("a number that is null", "a2" + "0101" + "03f6"),
        ("a number in a longer form", "a2" + "0101" + "031817"),
        ("a number that is cut short", "a2" + "0101" + "031a0001"),
        ("bytes that are a text", "a2" + "0101" + "0560"),
        ("bytes of a length in a longer form", "a2" + "0101" + "05580100"),
        (
            "bytes of a length in a form that is longer still",
            "a2" + "0101" + "05590018" + 24 * "00",
        ),
        ("bytes that are cut short", "a2" + "0101" + "055820" + 31 * "00"),
        ("bytes that lack their length", "a2" + "0101" + "0558"),
        ("a text that is bytes", "a2" + "0101" + "0b40"),
        ("a text that is no UTF-8", "a2" + "0101" + "0b61ff"),
        ("a text that is cut short", "a2" + "0101" + "0b626b"),
        ("labels that are a text", "a2" + "0101" + "0260"),
        ("a label that is a number", "a2" + "0101" + "02a1616101"),
        ("a label whose key is a number", "a2" + "0101" + "02a10161" + "61"),
        ("labels in another order", "a2" + "0101" + "02a2616260616160"),
        ("a label twice", "a2" + "0101" + "02a2616160616160"),
        ("a label that is no UTF-8", "a2" + "0101" + "02a16161" + "61ff"),
        ("labels that are cut short", "a2" + "0101" + "02a161616261"),
        ("labels that end early", "a2" + "0101" + "02a1"),
        ("usage of what is no field", "a2" + "0101" + "0ca10601"),
        ("usage that is a number", "a2" + "0101" + "0c01"),
        ("a batch of one", "a2" + "0101" + "181b8150" + 16 * "00"),
        ("a batch of three", "a2" + "0101" + "181b8350" + 16 * "00" + "0101"),
        ("a batch without an id", "a2" + "0101" + "181b820101"),
        ("something behind it", "a1010100"),
    ],
)
def test_what_is_no_encoding_of_a_spend_is_refused(what: str, encoded: str) -> None:
    with pytest.raises(ValueError, match=r"not a SPEND|names its authority"):
        request_fields(Kind.SPEND, bytes.fromhex(encoded))


@pytest.mark.parametrize(
    ("kind", "what", "encoded"),
    [
        (Kind.RETURN, "false", "1819f4"),
        (Kind.RETURN, "a flag that is a number", "181901"),
        (Kind.DELEGATE, "a child that is a number", "0e8101"),
        (Kind.DELEGATE, "a child without an id", "0e81a1" + "0301"),
        (Kind.DELEGATE, "children that are missing", "0e9b1000000000000000"),
        (Kind.RECOVER, "a rotation of one", "178181" + "40"),
        (Kind.RECOVER, "rotations that are missing", "179b1000000000000000"),
    ],
)
def test_what_is_no_field_of_a_request_is_refused(kind: Kind, what: str, encoded: str) -> None:
    with pytest.raises(ValueError, match=f"not a {kind.name}"):
        request_fields(kind, bytes.fromhex("a20101" + encoded))


@given(st.sampled_from(Kind), st.data())
def test_a_request_with_a_byte_changed_is_another_or_refused(
    kind: Kind, data: st.DataObject
) -> None:
    whole = encode_request(data.draw(operations(kind)))
    changed = bytearray(whole)
    at = data.draw(st.integers(0, len(changed) - 1))
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        other = request_fields(kind, bytes(changed))
    except ValueError:
        return
    assert cbor.encode(cbor.decode(bytes(changed))) == bytes(changed)
    assert other != request_fields(kind, whole)


@given(LABELS.filter(len), LABELS.filter(len))
def test_labels_are_those_of_their_own_request_whatever_was_read_before(
    before: Any, labels: Any
) -> None:
    world = World()
    for each in (before, labels, before):
        request = encode_request(world.child.spend(1, labels=each))
        assert request_fields(Kind.SPEND, request)["labels"] == each


def test_long_labels_are_read() -> None:
    labels = tuple((f"{number:03}" + 61 * "k", 64 * "€" * (number % 3)) for number in range(16))
    request = encode_request(World().child.spend(1, labels=labels))
    assert request_fields(Kind.SPEND, request)["labels"] == labels
