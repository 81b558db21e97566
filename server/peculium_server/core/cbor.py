"""The subset of deterministic CBOR (RFC 8949, section 4.2.1) that entries are encoded in.

Unsigned and negative integers, byte and text strings, arrays, maps with keys in bytewise order of
their encoding, true and null. Shortest form of every length; one value has one encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from struct import Struct
from types import NoneType
from typing import Any

Value = int | bytes | str | bool | None | list["Value"] | dict["Key", "Value"]
Key = int | str


def encode(value: Value) -> bytes:
    """The one encoding of a value."""
    return _ENCODERS[type(value)](value)


def head(major: int, argument: int) -> bytes:
    """The first bytes of an item: its major type and its argument in the shortest form."""
    if argument < 0x100:
        return _HEADS[major][argument]
    if argument < 0x1_0000:
        return _PACK_16(major << 5 | 25, argument)
    if argument < 0x1_0000_0000:
        return _PACK_32(major << 5 | 26, argument)
    if argument < 0x1_0000_0000_0000_0000:
        return _PACK_64(major << 5 | 27, argument)
    raise OverflowError(f"{argument} does not fit into 64 bits")


_HEADS = [
    [bytes((major << 5 | argument,)) for argument in range(24)]
    + [bytes((major << 5 | 24, argument)) for argument in range(24, 256)]
    for major in range(6)
]
_, _, _OF_BYTES, _OF_TEXT, _, _OF_MAP = _HEADS
_PACK_16, _PACK_32, _PACK_64 = (Struct(form).pack for form in (">BH", ">BI", ">BQ"))

NULL, TRUE, FALSE = b"\xf6", b"\xf5", b"\xf4"


def integer(value: int) -> bytes:
    """The encoding of a number."""
    if 0 <= value < 0x100:
        return _UNSIGNED[value]
    bits = value.bit_length()
    if value > 0 and bits <= 64:
        return _PACK_UNSIGNED[bits](value)
    return head(0, value) if value > 0 else head(1, -1 - value)


_UNSIGNED = _HEADS[0]
# By length in bits: what is encoded most is numbers, and comparisons of large ones are dear.
_PACK_UNSIGNED = (
    [partial(_PACK_16, 25)] * 17 + [partial(_PACK_32, 26)] * 16 + [partial(_PACK_64, 27)] * 32
)


def byte_string(value: bytes) -> bytes:
    """The encoding of bytes."""
    size = len(value)
    return (_OF_BYTES[size] if size < 0x100 else head(2, size)) + value


def text(value: str) -> bytes:
    """The encoding of a text."""
    data = value.encode()
    size = len(data)
    return (_OF_TEXT[size] if size < 0x100 else head(3, size)) + data


def array(items: list[bytes]) -> bytes:
    """The encoding of an array of items that are encoded."""
    return head(4, len(items)) + b"".join(items)


def mapping(items: list[bytes]) -> bytes:
    """The encoding of a map of items that are encoded, each its key and value, by ascending keys."""
    size = len(items)
    return (_OF_MAP[size] if size < 0x100 else head(5, size)) + b"".join(items)


def _array(value: list[Value]) -> bytes:
    return array([_ENCODERS[type(item)](item) for item in value])


def _map(value: dict[Key, Value]) -> bytes:
    # No key's encoding begins with another's, so the items come in the order of their keys.
    return mapping(
        sorted(
            [_ENCODERS[type(key)](key) + _ENCODERS[type(item)](item) for key, item in value.items()]
        )
    )


def _boolean(value: bool) -> bytes:
    return TRUE if value else FALSE


def _null(_: None) -> bytes:
    return NULL


# By the exact type: entries are encoded on the hot path, and a chain of tests takes twice as long.
_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    int: integer,
    bytes: byte_string,
    str: text,
    list: _array,
    dict: _map,
    bool: _boolean,
    NoneType: _null,
}


def decode(data: bytes) -> Value:
    """The value of an encoding.

    Raises:
        ValueError: The bytes are not the one encoding of a value.
    """
    try:
        value, end = _item(data, 0, _LEVELS_MAX)
    except IndexError as error:
        raise ValueError("cut short") from error
    if end != len(data):
        raise ValueError("something follows the value")
    return value


def read(data: bytes, at: int = 0) -> Value:
    """The item that begins at a place, whatever follows it.

    Raises:
        ValueError: The bytes are no item.
    """
    try:
        return _item(data, at, _LEVELS_MAX)[0]
    except IndexError as error:
        raise ValueError("cut short") from error


def _item(data: bytes, at: int, levels: int) -> tuple[Value, int]:
    """The value that begins somewhere and may have so many levels below it, and where it ends.

    What is not in the deterministic encoding is refused on the way: to encode the value again and
    compare would take twice as long, and auditors read millions.
    """
    first = data[at]
    at += 1
    argument = first & 31
    if first >= _FIRST_SIMPLE:
        if argument not in _SIMPLE:
            raise ValueError("not a value of the subset")
        return _SIMPLE[argument], at
    if argument >= _ONE_BYTE_MORE:
        argument, at = _argument(data, at, argument)
    major = first >> 5
    if major == 2:
        end = at + argument
        if end > len(data):
            raise ValueError("cut short")
        return data[at:end], end
    if major == 3:
        end = at + argument
        if end > len(data):
            raise ValueError("cut short")
        return data[at:end].decode(), end
    if major == 0:
        return argument, at
    if major == 1:
        return -1 - argument, at
    if not levels:
        raise ValueError("nested too deeply")
    if major == 4:
        items: list[Value] = []
        for _ in range(argument):
            item, at = _item(data, at, levels - 1)
            items.append(item)
        return items, at
    if major == 5:
        return _pairs(data, at, argument, levels - 1)
    raise ValueError("tags are not part of the subset")


def _argument(data: bytes, at: int, info: int) -> tuple[int, int]:
    """A number of one to eight bytes, and where it ends."""
    if info not in _LEAST:
        raise ValueError("lengths have to be definite")
    end = at + (1 << info - _ONE_BYTE_MORE)
    argument = int.from_bytes(data[at:end])
    if end > len(data):
        raise ValueError("cut short")
    if argument < _LEAST[info]:
        raise ValueError("not in the shortest form")
    return argument, end


def _pairs(data: bytes, at: int, size: int, levels: int) -> tuple[dict[Key, Value], int]:
    """A map of so many pairs, and where it ends.

    What is small or short, and so most of everything, is read here and not by a call of `_item`.
    """
    pairs: dict[Key, Value] = {}
    length = len(data)
    previous = b""
    least = 0
    for _ in range(size):
        start = at
        key: Any = data[at]
        if key < _ONE_BYTE_MORE:
            at += 1
            if key < least:
                raise ValueError("keys are out of order")
            least = key + 1
        else:
            if _SHORT_TEXT <= key < _SHORT_TEXT_END:
                at += 1 + key - _SHORT_TEXT
                # If it is cut short, there is no value behind it.
                key = data[start + 1 : at].decode()
            else:
                key, at = _item(data, start, levels)
                if isinstance(key, bool) or not isinstance(key, int | str):
                    raise ValueError("keys are integers or text")
            encoded = data[start:at]
            if encoded <= previous:
                raise ValueError("keys are out of order")
            previous = encoded
            least = _ONE_BYTE_MORE
        value: Any = data[at]
        at += 1
        if value < _ONE_BYTE_MORE:
            pass
        elif value < _LONG_NUMBER_END:
            start, at = at, at + (1 << value - _ONE_BYTE_MORE)
            number = int.from_bytes(data[start:at])
            if number < _LEAST[value]:
                raise ValueError("not in the shortest form")
            value = number
        elif _SHORT_BYTES <= value < _SHORT_BYTES_END:
            start, at = at, at + value - _SHORT_BYTES
            value = data[start:at]
        elif value == _BYTES_OF_ONE:
            start = at + 1
            at = start + data[at]
            if at - start < _ONE_BYTE_MORE:
                raise ValueError("not in the shortest form")
            value = data[start:at]
        elif _SHORT_TEXT <= value < _SHORT_TEXT_END:
            start, at = at, at + value - _SHORT_TEXT
            value = data[start:at].decode()
        elif _SMALL_MAP <= value < _SMALL_MAP_END and levels:
            value, at = _pairs(data, at, value - _SMALL_MAP, levels - 1)
        else:
            value, at = _item(data, at - 1, levels)
        if at > length:
            raise ValueError("cut short")
        pairs[key] = value
    return pairs, at


_LONG_NUMBER_END = 0x1C
_SHORT_BYTES, _SHORT_BYTES_END = 0x40, 0x58
_BYTES_OF_ONE = 0x58
"""A byte string of a length of one byte."""
_SHORT_TEXT, _SHORT_TEXT_END = 0x60, 0x78
_SMALL_MAP, _SMALL_MAP_END = 0xA0, 0xB8
_LEVELS_MAX = 16
"""Arrays and maps within each other; entries have five."""
_ONE_BYTE_MORE = 24
"""From here on the low five bits of an item's first byte say how many bytes its argument has."""
_LEAST = {24: 24, 25: 1 << 8, 26: 1 << 16, 27: 1 << 32}
"""What is smaller has a shorter form."""
_FIRST_SIMPLE = 0xE0
_SIMPLE: dict[int, bool | None] = {20: False, 21: True, 22: None}
