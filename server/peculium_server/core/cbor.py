"""The subset of deterministic CBOR (RFC 8949, section 4.2.1) that entries are encoded in.

Unsigned and negative integers, byte and text strings, arrays, maps with keys in bytewise order of
their encoding, true and null. Shortest form of every length; one value has one encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

Value = int | bytes | str | bool | None | list["Value"] | dict["Key", "Value"]
Key = int | str


def encode(value: Value) -> bytes:
    """The one encoding of a value."""
    return _ENCODERS[type(value)](value)


def head(major: int, argument: int) -> bytes:
    """The first bytes of an item: its major type and its argument in the shortest form."""
    if argument < 24:
        return _SHORT[major][argument]
    bits = argument.bit_length()
    if bits > 64:
        raise OverflowError(f"{argument} does not fit into 64 bits")
    first, size = _LONG[major][bits]
    return first + argument.to_bytes(size)


_SHORT = [[bytes((major << 5 | argument,)) for argument in range(24)] for major in range(6)]
_SIZES = [1] * 9 + [2] * 8 + [4] * 16 + [8] * 32
"""How many bytes an argument takes, by its length in bits."""
_LONG = [
    [(bytes((major << 5 | 23 + size.bit_length(),)), size) for size in _SIZES] for major in range(6)
]


def _integer(value: int) -> bytes:
    if 0 <= value < 24:
        return _SHORT[0][value]
    return head(0, value) if value >= 0 else head(1, -1 - value)


def _bytes(value: bytes) -> bytes:
    return head(2, len(value)) + value


def _text(value: str) -> bytes:
    data = value.encode()
    return head(3, len(data)) + data


def _array(value: list[Value]) -> bytes:
    return head(4, len(value)) + b"".join([_ENCODERS[type(item)](item) for item in value])


def _map(value: dict[Key, Value]) -> bytes:
    # No key's encoding begins with another's, so the items come in the order of their keys.
    items = [_ENCODERS[type(key)](key) + _ENCODERS[type(item)](item) for key, item in value.items()]
    items.sort()
    return head(5, len(items)) + b"".join(items)


def _boolean(value: bool) -> bytes:
    return b"\xf5" if value else b"\xf4"


def _null(_: None) -> bytes:
    return b"\xf6"


# By the exact type: entries are encoded on the hot path, and a chain of tests takes twice as long.
_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    int: _integer,
    bytes: _bytes,
    str: _text,
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
        value, end = _item(data, 0)
        canonical = end == len(data) and encode(value) == data
    except (IndexError, RecursionError) as error:
        raise ValueError("cut short, or nested too deeply") from error
    if not canonical:
        raise ValueError("not in the deterministic encoding")
    return value


def _item(data: bytes, at: int) -> tuple[Value, int]:
    major, info = data[at] >> 5, data[at] & 31
    at += 1
    if major == 7:
        if info not in _SIMPLE:
            raise ValueError("not a value of the subset")
        return _SIMPLE[info], at
    if info < 24:
        argument = info
    elif info <= 27:
        size = 1 << info - 24
        argument = int.from_bytes(data[at : at + size])
        at += size
    else:
        raise ValueError("lengths have to be definite")
    if major == 0:
        return argument, at
    if major == 1:
        return -1 - argument, at
    if major in (2, 3):
        end = at + argument
        if end > len(data):
            raise ValueError("cut short")
        return (data[at:end] if major == 2 else data[at:end].decode()), end
    if major == 4:
        items: list[Value] = []
        for _ in range(argument):
            item, at = _item(data, at)
            items.append(item)
        return items, at
    if major == 5:
        pairs: dict[Key, Value] = {}
        for _ in range(argument):
            key, at = _item(data, at)
            if isinstance(key, bool) or not isinstance(key, int | str):
                raise ValueError("keys are integers or text")  # noqa: TRY004 - of bytes
            pairs[key], at = _item(data, at)
        return pairs, at
    raise ValueError("tags are not part of the subset")


_SIMPLE: dict[int, bool | None] = {20: False, 21: True, 22: None}
