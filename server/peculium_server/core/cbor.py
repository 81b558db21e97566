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
_, _, _, _OF_TEXT, _, _OF_MAP = _HEADS
_PACK_16, _PACK_32, _PACK_64 = (Struct(form).pack for form in (">BH", ">BI", ">BQ"))


class _HeadsOfBytes(dict[int, bytes]):
    """The heads of byte strings by their lengths. Those of nearly all that is hashed are at hand."""

    def __missing__(self, size: int) -> bytes:
        return head(2, size)


HEADS_OF_BYTES = _HeadsOfBytes({size: head(2, size) for size in range(1024)})

NULL, TRUE, FALSE = b"\xf6", b"\xf5", b"\xf4"


def integer(value: int) -> bytes:
    """The encoding of a number."""
    if value < 0x100:
        return UNSIGNED[value] if value >= 0 else head(1, -1 - value)
    bits = value.bit_length()
    return _PACK_UNSIGNED[bits](value) if bits <= 64 else head(0, value)


UNSIGNED = _HEADS[0]
# By length in bits: what is encoded most is numbers, and comparisons of large ones are dear.
_PACK_UNSIGNED = (
    [partial(_PACK_16, 25)] * 17 + [partial(_PACK_32, 26)] * 16 + [partial(_PACK_64, 27)] * 32
)


def byte_string(value: bytes) -> bytes:
    """The encoding of bytes."""
    return HEADS_OF_BYTES[len(value)] + value


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
        raise ValueError("something follows the value" if end < len(data) else "cut short")
    return value


# Who knows what has to come reads it piece by piece. Each piece tells where it ends, which may be behind the
# end of the bytes: then it is cut short, and whoever reads the last one says so. IndexError says so too.


def map_head(data: bytes, at: int) -> tuple[int, int]:
    """How many pairs a small map has, and where they begin.

    Raises:
        ValueError: No map of less than 24 pairs is there.
    """
    size = data[at] - SMALL_MAP
    if not 0 <= size < ONE_BYTE_MORE:
        raise ValueError("a small map was expected")
    return size, at + 1


def array_head(data: bytes, at: int) -> tuple[int, int]:
    """How many items an array has, and where they begin.

    Raises:
        ValueError: No array is there.
    """
    first = data[at]
    if _SMALL_ARRAY <= first < _SMALL_ARRAY_END:
        return first - _SMALL_ARRAY, at + 1
    if first >> 5 != 4:
        raise ValueError("an array was expected")
    return _argument(data, at + 1, first & 31)


def number(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends.

    Raises:
        ValueError: No number is there.
    """
    first = data[at]
    at += 1
    if first < ONE_BYTE_MORE:
        return first, at
    if first >= _SHORT_BYTES:
        raise ValueError("a number was expected")
    if first & 31 < ONE_BYTE_MORE:
        return _NEGATIVE - 1 - first, at
    length, shortest = _LONG_NUMBERS[first]
    start, at = at, at + length
    value = _number(data[start:at])
    if value < shortest:
        raise ValueError(_NOT_SHORTEST)
    return (value if first < _NEGATIVE else -1 - value), at


def byte_string_at(data: bytes, at: int) -> tuple[bytes, int]:
    """A byte string, and where it ends.

    Raises:
        ValueError: None is there.
    """
    first = data[at]
    at += 1
    if _SHORT_BYTES <= first < _BYTES_OF_ONE:
        end = at + first - _SHORT_BYTES
    elif first == _BYTES_OF_ONE:
        at += 1
        end = at + data[at - 1]
        if end - at < ONE_BYTE_MORE:
            raise ValueError(_NOT_SHORTEST)
    elif first >> 5 == 2:
        size, at = _argument(data, at, first & 31)
        end = at + size
    else:
        raise ValueError("a byte string was expected")
    return data[at:end], end


def text_at(data: bytes, at: int) -> tuple[str, int]:
    """A text, and where it ends.

    Raises:
        ValueError: None is there.
    """
    first = data[at]
    at += 1
    if _SHORT_TEXT <= first < _SHORT_TEXT_END:
        end = at + first - _SHORT_TEXT
    elif first >> 5 == 3:
        size, at = _argument(data, at, first & 31)
        end = at + size
    else:
        raise ValueError("a text was expected")
    return data[at:end].decode(), end


def texts_end(data: bytes, at: int, count: int) -> int:
    """Where so many texts end, of which nothing but the lengths is looked at.

    Raises:
        ValueError: Something else is there.
    """
    for _ in range(count):
        first = data[at]
        if _SHORT_TEXT <= first < _SHORT_TEXT_END:
            at += first - _SHORT_TEXT + 1
        else:
            _, at = text_at(data, at)
    return at


def item_at(data: bytes, at: int) -> tuple[Value, int]:
    """Any value, and where it ends.

    Raises:
        ValueError: None is there.
    """
    return _item(data, at, _LEVELS_MAX)


def numbers(data: bytes, at: int, size: int, slots: list[int], least: int) -> int:
    """Read the pairs of a map whose values are numbers, of which none is zero, into a list by their keys.

    Args:
        data: The bytes.
        at: Where the pairs begin.
        size: How many there are; one at least.
        slots: Where the numbers go; they may have the keys that it has places for.
        least: The least key.

    Returns:
        Where they end.

    Raises:
        IndexError: There is no place for a key, or the bytes are cut short.
        ValueError: Other pairs are there.
    """
    if not 0 < size < ONE_BYTE_MORE:
        raise ValueError("a small map was expected")
    for _ in range(size):
        key = data[at]
        value = data[at + 1]
        at += 2
        if key < least:
            raise ValueError("keys are out of order")
        least = key + 1
        if value >= ONE_BYTE_MORE:
            long = _LONG_NUMBERS.get(value)
            if long is None:
                slots[key], at = number(data, at - 1)
                continue
            start, at = at, at + long[0]
            argument = _number(data[start:at])
            if argument < long[1]:
                raise ValueError(_NOT_SHORTEST)
            slots[key] = argument if value < _NEGATIVE else -1 - argument
        elif value:
            slots[key] = value
        else:
            raise ValueError("zero is left out")
    return at


def read(data: bytes, at: int = 0) -> Value:
    """The item that begins at a place, whatever follows it.

    Raises:
        ValueError: The bytes are no item.
    """
    try:
        value, end = _item(data, at, _LEVELS_MAX)
    except IndexError as error:
        raise ValueError("cut short") from error
    if end > len(data):
        raise ValueError("cut short")
    return value


# What is not in the deterministic encoding is refused on the way: to encode the value again and compare
# would take twice as long, and auditors read millions. Whether something is cut short is asked once, in
# the end: nothing that was read behind the end of the bytes brings the place back before it.


def _item(data: bytes, at: int, levels: int) -> tuple[Value, int]:
    """The value that begins somewhere and may have so many levels below it, and where it ends."""
    first = data[at]
    at += 1
    argument = first & 31
    if first >= _FIRST_SIMPLE:
        if argument not in _SIMPLE:
            raise ValueError("not a value of the subset")
        return _SIMPLE[argument], at
    argument, at = _argument(data, at, argument)
    major = first >> 5
    if major == 2:
        end = at + argument
        return data[at:end], end
    if major == 3:
        end = at + argument
        return data[at:end].decode(), end
    if major == 0:
        return argument, at
    if major == 1:
        return -1 - argument, at
    if not levels:
        raise ValueError("nested too deeply")
    if major == 4:
        return _items(data, at, argument, levels - 1)
    if major == 5:
        return _pairs(data, at, argument, levels - 1)
    raise ValueError("tags are not part of the subset")


def _argument(data: bytes, at: int, info: int) -> tuple[int, int]:
    """The argument of which an item's first byte has so much, and where it ends."""
    if info < ONE_BYTE_MORE:
        return info, at
    size, least = _LONG[info]
    end = at + size
    argument = _number(data[at:end])
    if argument < least:
        raise ValueError(_NOT_SHORTEST)
    return argument, end


def _items(data: bytes, at: int, size: int, levels: int) -> tuple[list[Value], int]:
    """The items of an array of so many, and where it ends."""
    end = at + size
    if max(data[at:end], default=0) < ONE_BYTE_MORE:
        # Numbers of one byte each, as versions are.
        return list(data[at:end]), end
    items: list[Value] = []
    for _ in range(size):
        item, at = _item(data, at, levels)
        items.append(item)
    return items, at


def _pairs(data: bytes, at: int, size: int, levels: int) -> tuple[dict[Key, Value], int]:
    """A map of so many pairs, and where it ends.

    What is small or short, and so most of everything, is read here and not by a call of `_item`.
    """
    pairs: dict[Key, Value] = {}
    previous = b""
    least = 0
    for _ in range(size):
        start = at
        key: Any = data[at]
        at += 1
        if key < ONE_BYTE_MORE:
            if key < least:
                raise ValueError("keys are out of order")
            least = key + 1
        else:
            if _SHORT_TEXT <= key < _SHORT_TEXT_END:
                at += key - _SHORT_TEXT
                key = data[start + 1 : at].decode()
            else:
                key, at = _item(data, start, levels)
                if isinstance(key, bool) or not isinstance(key, int | str):
                    raise ValueError("keys are integers or text")
            encoded = data[start:at]
            if encoded <= previous:
                raise ValueError("keys are out of order")
            previous = encoded
            least = ONE_BYTE_MORE
        value: Any = data[at]
        at += 1
        if value < ONE_BYTE_MORE:
            pass
        elif value < _SHORT_BYTES:
            argument = value & 31
            if argument >= ONE_BYTE_MORE:
                length, shortest = _LONG[argument]
                start, at = at, at + length
                argument = _number(data[start:at])
                if argument < shortest:
                    raise ValueError(_NOT_SHORTEST)
            value = argument if value < _NEGATIVE else -1 - argument
        elif value < _SHORT_TEXT_END:
            start = at
            if value >= _SHORT_TEXT:
                at += value - _SHORT_TEXT
                value = data[start:at].decode()
            elif value < _BYTES_OF_ONE:
                at += value - _SHORT_BYTES
                value = data[start:at]
            elif value == _BYTES_OF_ONE:
                start += 1
                at = start + data[at]
                if at - start < ONE_BYTE_MORE:
                    raise ValueError(_NOT_SHORTEST)
                value = data[start:at]
            else:
                value, at = _item(data, at - 1, levels)
        elif SMALL_MAP <= value < _SMALL_MAP_END and levels:
            value, at = _pairs(data, at, value - SMALL_MAP, levels - 1)
        elif _SMALL_ARRAY <= value < _SMALL_ARRAY_END and levels:
            value, at = _items(data, at, value - _SMALL_ARRAY, levels - 1)
        else:
            value, at = _item(data, at - 1, levels)
        pairs[key] = value
    return pairs, at


_number = int.from_bytes
_NEGATIVE = 0x20
"""From here on the numbers below zero."""
_SHORT_BYTES = 0x40
_BYTES_OF_ONE = 0x58
"""A byte string of a length of one byte."""
_SHORT_TEXT, _SHORT_TEXT_END = 0x60, 0x78
_SMALL_ARRAY, _SMALL_ARRAY_END = 0x80, 0x98
SMALL_MAP, _SMALL_MAP_END = 0xA0, 0xB8
_LEVELS_MAX = 16
"""Arrays and maps within each other; entries have five."""
ONE_BYTE_MORE = 24
"""From here on the low five bits of an item's first byte say how many bytes its argument has."""
_LONG = dict(enumerate([(1, 24), (2, 1 << 8), (4, 1 << 16), (8, 1 << 32), *[(0, 1)] * 4], 24))
"""By these bits: how many bytes, and from where on; what is smaller has a shorter form. The last four are none."""
_LONG_NUMBERS = {major | info: said for major in (0, _NEGATIVE) for info, said in _LONG.items()}
"""The same by the first byte of a number."""
_NOT_SHORTEST = "not in the shortest form, or of no definite length"
_FIRST_SIMPLE = 0xE0
_SIMPLE: dict[int, bool | None] = {20: False, 21: True, 22: None}
