"""Ways to spoil a request: as a message, and as bytes on the wire."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

EDGES: Final = (0, 1, -1, 2**31, 2**62 - 1, 2**62, 2**63 - 1, -(2**63))
_SMALL_EDGES: Final = (-1, -(2**31), 2**31 - 1)
_ENUM_EDGES: Final = (-1, 99, 2**31 - 1, -(2**31))
_TEXTS: Final = (
    "",
    "\0",
    "x" * 100_000,
    "a/b",
    "\x85",
    "\U0001d54f" * 300,
    "' OR 1=1; --",
    "../..",
    "%n%s",
)
_BYTES: Final = (b"", b"\0", bytes(15), bytes(16), bytes(17), bytes(31), bytes(33), bytes(65_536))
_REPEATED_MAX: Final = 300
"""More than anything may be repeated."""
_DEPTHS: Final = (90, 110, 10_000)
"""Around the depth that parsers go to, and far beyond."""


class Twister:
    """Spoils requests by chance."""

    def __init__(self, chance: random.Random) -> None:
        self._random = chance
        self._foreign = [bytes(16)]
        """Ids that mean something elsewhere."""

    def remember(self, ids: Sequence[bytes]) -> None:
        """Put these ids where they do not belong."""
        self._foreign = list(ids)

    def message(self, request: Message) -> bytes:
        """The same request with one to three of its fields spoilt."""
        spoilt = type(request)()
        spoilt.CopyFrom(request)
        for _ in range(self._random.randint(1, 3)):
            fields = list(_fields(spoilt))
            if fields:
                self._spoil(*self._random.choice(fields))
        data = spoilt.SerializeToString()
        if self._random.random() < 0.05:
            return data + self._deep()
        if self._random.random() < 0.1:
            # Fields that are there twice: of scalars the last one counts, messages are merged.
            return data + data[self._random.randrange(len(data) or 1) :] + data
        return data

    def wire(self, data: bytes) -> bytes:
        """The same bytes with some changed, inserted, doubled or cut off."""
        spoilt = bytearray(data or b"\0")
        for _ in range(self._random.randint(1, 4)):
            place = self._random.randrange(len(spoilt) or 1)
            match self._random.randrange(5):
                case 0:
                    spoilt[place : place + 1] = self._random.randbytes(1)
                case 1:
                    spoilt[place:place] = self._random.randbytes(self._random.randint(1, 8))
                case 2:
                    del spoilt[place : place + self._random.randint(1, 8)]
                case 3:
                    del spoilt[place:]
                case _:
                    spoilt += spoilt[place:]
        return bytes(spoilt)

    def noise(self) -> bytes:
        """Bytes that mean nothing."""
        return self._random.randbytes(self._random.choice((0, 1, 2, 10, 40, 300, 5_000)))

    def _spoil(self, parent: Any, field: FieldDescriptor) -> None:
        ways: list[Callable[[Any, FieldDescriptor], None]] = [self._drop, self._edge]
        if field.is_repeated and not _is_map(field):
            ways.append(self._repeat)
        if field.type == FieldDescriptor.TYPE_BYTES and not field.is_repeated:
            ways += [self._move, self._move]
        self._random.choice(ways)(parent, field)

    def _drop(self, parent: Any, field: FieldDescriptor) -> None:
        parent.ClearField(field.name)

    def _move(self, parent: Any, field: FieldDescriptor) -> None:
        setattr(parent, field.name, self._random.choice(self._foreign))

    def _repeat(self, parent: Any, field: FieldDescriptor) -> None:
        """The same again and again."""
        repeated = getattr(parent, field.name)
        if len(repeated):
            times = self._random.choice((1, 2, _REPEATED_MAX))
            repeated.extend(list(repeated)[:1] * times)

    def _edge(self, parent: Any, field: FieldDescriptor) -> None:
        """As large, negative, unknown or empty as can be said."""
        if _is_map(field):
            labels = getattr(parent, field.name)
            for number in range(self._random.choice((1, 17, _REPEATED_MAX))):
                labels[f"{number}{self._random.choice(_TEXTS)[:200]}"] = self._random.choice(
                    _TEXTS
                )[:1_000]
        elif field.message_type is not None:
            # There, and nothing in it.
            parent.ClearField(field.name)
            if field.is_repeated:
                getattr(parent, field.name).add()
            else:
                getattr(parent, field.name).SetInParent()
        elif field.is_repeated:
            getattr(parent, field.name).append(self._value(field))
        else:
            setattr(parent, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                of_bytes = field.type == FieldDescriptor.TYPE_BYTES
                return self._random.choice(_BYTES if of_bytes else _TEXTS)
            case FieldDescriptor.CPPTYPE_BOOL:
                return self._random.random() < 0.5
            case FieldDescriptor.CPPTYPE_ENUM:
                return self._random.choice(_ENUM_EDGES)
            case FieldDescriptor.CPPTYPE_INT64:
                return self._random.choice(EDGES)
            case FieldDescriptor.CPPTYPE_UINT32 | FieldDescriptor.CPPTYPE_UINT64:
                return self._random.choice((0, 2**31, 2**32 - 1))
            case _:
                return self._random.choice(_SMALL_EDGES)

    def _deep(self) -> bytes:
        """A field that nobody knows, in which there is one, in which there is one."""
        depth = self._random.choice(_DEPTHS)
        if self._random.random() < 0.5:
            return b"\xc3\x3e" * depth + b"\xc4\x3e" * depth
        inner = b""
        for _ in range(min(depth, 110)):
            inner = b"\x0a" + _varint(len(inner)) + inner
        return inner


def _fields(message: Any) -> Iterator[tuple[Any, FieldDescriptor]]:
    """Every field of a message and of those that are in it, set or not."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.message_type is None or _is_map(field):
            continue
        value = getattr(message, field.name)
        if field.is_repeated:
            for element in value[:2]:
                yield from _fields(element)
        elif message.HasField(field.name):
            yield from _fields(value)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _varint(value: int) -> bytes:
    said = bytearray()
    while value > 127:
        said.append(value & 127 | 128)
        value >>= 7
    return bytes((*said, value))
