"""The subset of deterministic CBOR: one value has one encoding, and nothing else is read."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from hypothesis import example, given, strategies as st

from peculium_server.core import cbor

INTEGERS = st.integers(-(2**64), 2**64 - 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
LEAVES = st.none() | st.booleans() | INTEGERS | st.binary(max_size=30) | TEXTS
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=5)
        # Unsigned or text: within each of them the order of the older RFC 7049, which cbor2 has, is the same.
        | st.dictionaries(st.integers(0, 2**64 - 1), inner, max_size=5)
        | st.dictionaries(TEXTS, inner, max_size=5)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_a_value_is_encoded_as_others_encode_it_and_decoded_again(value: Any) -> None:
    encoded = cbor.encode(value)
    assert encoded == cbor2.dumps(value, canonical=True)
    decoded = cbor.decode(encoded)
    assert decoded == value
    assert cbor.encode(decoded) == encoded
    assert cbor.read(b"\x00" + encoded, 1) == value


@given(st.binary(max_size=40))
@example(bytes(40))
def test_bytes_that_are_cut_are_no_item(data: bytes) -> None:
    encoded = cbor.encode([data, len(data)])
    for end in range(len(encoded)):
        with pytest.raises(ValueError):  # noqa: PT011 - cut anywhere
            cbor.read(encoded[:end])


@given(st.binary(max_size=40))
@example(b"")
def test_any_bytes_are_the_one_encoding_of_a_value_or_refused(data: bytes) -> None:
    try:
        value = cbor.decode(data)
    except ValueError:
        return
    assert cbor.encode(value) == data
    assert cbor2.loads(data) == value


@given(VALUES, st.data())
def test_an_encoding_with_a_byte_changed_is_another_value_or_refused(
    value: Any, data: st.DataObject
) -> None:
    encoded = bytearray(cbor.encode(value))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        other = cbor.decode(bytes(encoded))
    except ValueError:
        return
    assert cbor.encode(other) == bytes(encoded)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (23, "17"),
        (24, "1818"),
        (255, "18ff"),
        (256, "190100"),
        (65_535, "19ffff"),
        (65_536, "1a00010000"),
        (2**32 - 1, "1affffffff"),
        (2**32, "1b0000000100000000"),
        (2**64 - 1, "1bffffffffffffffff"),
        (-1, "20"),
        (-24, "37"),
        (-25, "3818"),
        (-(2**64), "3bffffffffffffffff"),
        (b"", "40"),
        (b"\x01\x02", "420102"),
        ("", "60"),
        ("ü", "62c3bc"),
        ([], "80"),
        ([1, [2]], "82018102"),
        ({}, "a0"),
        (False, "f4"),
        (True, "f5"),
        (None, "f6"),
        # Bytewise by the encoded key: numbers before text, and the long number before the short text.
        ({"": 1, 1000: 2, 1: 3, -1: 4}, "a401031903e80220046001"),
        ({"b": 1, "aa": 2}, "a2616201626161" + "02"),
    ],
)
def test_values_are_encoded_as_the_standard_says(value: Any, encoded: str) -> None:
    assert cbor.encode(value).hex() == encoded
    assert cbor.decode(bytes.fromhex(encoded)) == value


@pytest.mark.parametrize(
    ("what", "encoded"),
    [
        ("nothing", ""),
        ("a number in a longer form", "1817"),
        ("a number in a longer form of two bytes", "1900ff"),
        ("a length in a longer form", "580101"),
        ("two values", "0000"),
        ("bytes that are cut short", "4201"),
        ("text that is cut short", "6261"),
        ("a number that is cut short", "1a0000"),
        ("an array that is cut short", "8201"),
        ("a map that is cut short", "a101"),
        ("an array of 2^60", "9b1000000000000000"),
        ("bytes of 2^60", "5b1000000000000000"),
        ("bytes of indefinite length", "5f4101ff"),
        ("an array of indefinite length", "9f01ff"),
        ("a map of indefinite length", "bf0101ff"),
        ("a reserved length", "1c"),
        ("a break", "ff"),
        ("a tag", "c000"),
        ("a float", "f93c00"),
        ("a double", "fb3ff0000000000000"),
        ("undefined", "f7"),
        ("another simple value", "f0"),
        ("keys in another order", "a202010101"),
        ("keys in the order of their length", "a26001190100" + "02"),
        ("a key twice", "a201010101"),
        ("a key of bytes", "a1410100"),
        ("a key of an array", "a1800000"),
        ("a key that is true", "a1f500"),
        ("a key that is null", "a1f600"),
        ("text that is no UTF-8", "61ff"),
        ("half a surrogate pair", "63eda080"),
    ],
)
def test_what_is_no_such_encoding_is_refused(what: str, encoded: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        cbor.decode(bytes.fromhex(encoded))


@pytest.mark.parametrize("depth", [16, 17, 300, 900, 2_000, 100_000])
@pytest.mark.parametrize("level", [b"\x81", b"\xa1\x00"], ids=["arrays", "maps"])
def test_what_is_nested_too_deeply_is_refused(level: bytes, depth: int) -> None:
    encoded = level * depth + b"\x00"
    if depth <= 16:
        assert cbor.encode(cbor.decode(encoded)) == encoded
        return
    with pytest.raises(ValueError, match="nested too deeply"):
        cbor.decode(encoded)


@pytest.mark.parametrize("value", [2**64, -(2**64) - 1])
def test_a_number_beyond_64_bits_is_not_encoded(value: int) -> None:
    with pytest.raises(OverflowError):
        cbor.encode(value)
