"""The canonical, versioned encoding of entries, and the two hashes that chain them.

`docs/reference/entry-encoding.md` is the same in prose, with test vectors. A change of anything
here is a new version: what was recorded keeps the encoding that it was recorded in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from peculium_server.core import cbor
from peculium_server.core.limits import ID_BYTES
from peculium_server.core.operations import (
    OPERATIONS,
    AtomicBatch,
    Authority,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Kind,
    Labels,
    Operation,
    Rotation,
    Usage,
)
from peculium_server.core.state import Balances, Effect, Entry, Hold, HoldState, new

ENCODING_VERSION = 1
"""Of the requests, effects and hashes of entries."""

OPERATION_DOMAIN = b"peculium.operation.v1\x00"
ENTRY_DOMAIN = b"peculium.entry.v1\x00"
TOKEN_DOMAIN = b"peculium.token.v1\x00"


def token_id(secret: bytes) -> bytes:
    """The id under which the ledger knows a secret."""
    return hashlib.sha256(TOKEN_DOMAIN + secret).digest()


_Reader = Callable[[bytes, int], tuple[Any, int]]
"""Reads a value that begins at a place of the bytes: the value, and where it ends. See `cbor`."""


class _Field(NamedTuple):
    """How one attribute of an operation is encoded."""

    key: int
    name: str
    write: Callable[[Any], bytes]
    read: _Reader


class _Layout:
    """How the attributes of a value are written as a map: in the order of their keys."""

    def __init__(self, fields: Sequence[_Field]) -> None:
        ordered = sorted(fields, key=lambda field: field.key)
        self._values = attrgetter(*(field.name for field in ordered))
        self._writers = tuple((cbor.integer(field.key), field.write) for field in ordered)

    def items(self, source: object) -> list[bytes]:
        """Absent is what is None, False or empty; a number is always said."""
        return [
            key + write(value)
            for (key, write), value in zip(self._writers, self._values(source), strict=True)
            if value or type(value) is int
        ]


def _read_fields(readers: _Readers, data: bytes, at: int) -> tuple[dict[str, Any], int]:
    """The fields of a map by their names, and where it ends."""
    size, at = cbor.map_head(data, at)
    fields = {}
    last = -1
    for _ in range(size):
        key = data[at]
        at += 1
        if key >= cbor.ONE_BYTE_MORE:
            key, at = cbor.number(data, at - 1)
        if key <= last:
            raise ValueError("keys are out of order")
        last = key
        reader = readers.get(key)
        if reader is None:
            raise ValueError(f"there is no field {key}")
        name, read = reader
        fields[name], at = read(data, at)
    return fields, at


def _write_labels(labels: Labels) -> bytes:
    return cbor.encode(dict(labels))


def _read_labels(data: bytes, at: int) -> tuple[Labels, int]:
    size, start = cbor.map_head(data, at)
    end = cbor.texts_end(data, start, 2 * size)
    return _labels(data[at:end]), end


@lru_cache(maxsize=1024)
def _labels(encoded: bytes) -> Labels:
    """What is said with operation after operation, and so decoded once."""
    said = cbor.decode(encoded)
    assert type(said) is dict, "a map of texts"
    return tuple(sorted(said.items()))  # type: ignore[arg-type]


def _write_usage(usage: Usage) -> bytes:
    return cbor.mapping(_USAGE_LAYOUT.items(usage))


def _read_usage(data: bytes, at: int) -> tuple[Usage, int]:
    said, at = _read_fields(_USAGE_READERS, data, at)
    return Usage(**said), at


def _write_children(children: tuple[Child, ...]) -> bytes:
    return cbor.array([cbor.mapping(_CHILD_LAYOUT.items(child)) for child in children])


def _read_children(data: bytes, at: int) -> tuple[tuple[Child, ...], int]:
    size, at = cbor.array_head(data, at)
    children = []
    for _ in range(size):
        said, at = _read_fields(_CHILD_READERS, data, at)
        children.append(Child(**said))
    return tuple(children), at


def _write_rotations(rotations: tuple[Rotation, ...]) -> bytes:
    return cbor.encode([[rotation.hold_id, rotation.next_token_id] for rotation in rotations])


def _read_rotations(data: bytes, at: int) -> tuple[tuple[Rotation, ...], int]:
    size, at = cbor.array_head(data, at)
    rotations = []
    for _ in range(size):
        at = _pair(data, at)
        hold_id, at = cbor.byte_string_at(data, at)
        token, at = cbor.byte_string_at(data, at)
        rotations.append(Rotation(hold_id=hold_id, next_token_id=token))
    return tuple(rotations), at


def _write_batch(batch: AtomicBatch) -> bytes:
    return cbor.encode([batch.batch_id, batch.size])


def _read_batch(data: bytes, at: int) -> tuple[AtomicBatch, int]:
    batch_id, at = cbor.byte_string_at(data, _pair(data, at))
    size, at = cbor.number(data, at)
    return AtomicBatch(batch_id, size), at


def _pair(data: bytes, at: int) -> int:
    """Where the first one of an array of two begins."""
    size, at = cbor.array_head(data, at)
    if size != 2:  # noqa: PLR2004 - as it says
        raise ValueError("an array of two was expected")
    return at


def _read_true(data: bytes, at: int, _: bytes = b"") -> tuple[bool, int]:
    if data[at] != cbor.TRUE[0]:
        raise ValueError("false is left out")
    return True, at + 1


def _number(key: int, name: str) -> _Field:
    return _Field(key, name, cbor.integer, cbor.number)


def _binary(key: int, name: str) -> _Field:
    return _Field(key, name, cbor.byte_string, cbor.byte_string_at)


def _text(key: int, name: str) -> _Field:
    return _Field(key, name, cbor.text, cbor.text_at)


def _flag(key: int, name: str) -> _Field:
    return _Field(key, name, cbor.encode, _read_true)


_LABELS = _Field(2, "labels", _write_labels, _read_labels)
_AMOUNT = _number(3, "amount")
_TTL = _number(4, "ttl_us")
_NEXT = _binary(5, "next_token_id")
_HOLD = _binary(6, "hold_id")
_ACTUAL = _number(8, "actual")
_NEXT_HOLD = _binary(10, "next_hold_token_id")
_REFERENCE = _text(11, "reference")
_USAGE_FIELD = _Field(12, "usage", _write_usage, _read_usage)
_NAME = _text(15, "name")
_TOKEN = _binary(17, "token_id")
_HOLDER = _text(18, "holder")
_LEASE = _number(19, "lease_us")
_DESCENDANT = _binary(24, "descendant_id")
_REASON = _text(26, "reason")

_BATCH = _Field(27, "batch", _write_batch, _read_batch)

_USAGE = (
    _text(1, "provider"),
    _text(2, "model"),
    _number(3, "input_tokens"),
    _number(4, "output_tokens"),
    _number(5, "cached_tokens"),
)
_CHILD = (
    _LABELS,
    _AMOUNT,
    _NAME,
    _TOKEN,
    _HOLDER,
    _LEASE,
    _number(20, "lease_latest_us"),
    _number(21, "overrun_factor"),
    _binary(22, "budget_id"),
)
FIELDS: dict[Kind, tuple[_Field, ...]] = {
    Kind.GRANT: (_LABELS, _BATCH, _AMOUNT, _NAME, _text(16, "unit"), _TOKEN, _HOLDER),
    Kind.TOP_UP: (_LABELS, _BATCH, _AMOUNT),
    Kind.WITHDRAW: (_LABELS, _BATCH, _AMOUNT),
    Kind.RESERVE: (_LABELS, _BATCH, _AMOUNT, _TTL, _NEXT, _HOLD, _binary(7, "hold_token_id")),
    Kind.SETTLE: (
        _LABELS,
        _BATCH,
        _HOLD,
        _ACTUAL,
        _flag(9, "keep_open"),
        _NEXT_HOLD,
        _REFERENCE,
        _USAGE_FIELD,
        _flag(13, "estimated"),
    ),
    Kind.RELEASE: (_LABELS, _BATCH, _HOLD),
    Kind.EXTEND: (_LABELS, _BATCH, _TTL, _HOLD, _NEXT_HOLD),
    Kind.SPEND: (_LABELS, _BATCH, _AMOUNT, _NEXT, _REFERENCE, _USAGE_FIELD),
    Kind.DELEGATE: (
        _LABELS,
        _BATCH,
        _NEXT,
        _Field(14, "children", _write_children, _read_children),
    ),
    Kind.ACCEPT: (_LABELS, _BATCH, _NEXT),
    Kind.RECOVER: (
        _LABELS,
        _BATCH,
        _NEXT,
        _HOLDER,
        _Field(23, "holds", _write_rotations, _read_rotations),
        _number(28, "if_seq"),
    ),
    Kind.FUND: (_LABELS, _BATCH, _AMOUNT, _NEXT, _LEASE, _DESCENDANT),
    Kind.RENEW: (_LABELS, _BATCH, _NEXT, _LEASE),
    Kind.RETURN: (_LABELS, _BATCH, _AMOUNT, _NEXT, _flag(25, "cascade")),
    Kind.REVOKE: (_LABELS, _BATCH, _NEXT, _DESCENDANT),
    Kind.RESOLVE: (_LABELS, _BATCH, _NEXT, _HOLD, _ACTUAL, _REASON),
    Kind.FREEZE: (_LABELS, _BATCH, _REASON),
    Kind.UNFREEZE: (_LABELS, _BATCH, _REASON),
    Kind.LAPSE: (_LABELS, _BATCH, _HOLD),
    Kind.EXPIRE: (_LABELS, _BATCH),
    Kind.COLLECT: (_LABELS, _BATCH),
}
"""The attributes of each kind, beside the header's; key 1 is the authority. Keys are never reused."""

REQUEST_KEYS = {field.name: field.key for fields in FIELDS.values() for field in fields}
USAGE_KEYS = {field.name: field.key for field in _USAGE}
BALANCE_KEYS = {name: key for key, name in enumerate(Balances._fields, start=1)}
"""Of what is read without decoding all of it."""

_LAYOUTS = {kind: _Layout(fields) for kind, fields in FIELDS.items()}
_USAGE_LAYOUT, _CHILD_LAYOUT = _Layout(_USAGE), _Layout(_CHILD)

_AUTHORITY_KEY = 1
BY_TOKEN, BY_HOLDER, BY_ROLE = 1, 2, 3
_AUTHORITIES: dict[type[Authority], bytes] = {
    type_: cbor.integer(_AUTHORITY_KEY) + cbor.integer(number)
    for type_, number in ((ByToken, BY_TOKEN), (ByHolder, BY_HOLDER), (ByRole, BY_ROLE))
}


def _read_authority(data: bytes, at: int) -> tuple[int, int]:
    by = data[at]
    if by not in (BY_TOKEN, BY_HOLDER, BY_ROLE):
        raise ValueError("there is no such authority")
    return by, at + 1


_Readers = dict[int, tuple[str, _Reader]]


def _readers(fields: Sequence[_Field]) -> _Readers:
    return {field.key: (field.name, field.read) for field in fields}


_READERS = {
    kind: {_AUTHORITY_KEY: ("authority", _read_authority), **_readers(fields)}
    for kind, fields in FIELDS.items()
}
_USAGE_READERS, _CHILD_READERS = _readers(_USAGE), _readers(_CHILD)


def encode_request(operation: Operation) -> bytes:
    """What was asked, beside what an entry says of itself (ids, kind, time, actor, consumed token)."""
    authority = _AUTHORITIES.get(type(operation.authority))
    assert authority is not None, "a chained authority is resolved before it is recorded"
    return cbor.mapping([authority, *_LAYOUTS[operation.kind].items(operation)])


def decode_request(
    *,
    kind: Kind,
    root_id: bytes,
    budget_id: bytes,
    operation_id: bytes,
    trace_id: bytes | None,
    consumed: bytes | None,
    request: bytes,
) -> Operation:
    """The operation as it was asked, from part 0 of its entries.

    Raises:
        ValueError: The bytes are not an encoded request of that kind.
    """
    fields = request_fields(kind, request)
    by = fields.pop("authority")
    authority: Authority
    if by == BY_HOLDER:
        authority = ByHolder()
    elif by == BY_ROLE:
        authority = ByRole()
    elif consumed is not None:
        authority = ByToken(consumed)
    else:
        raise ValueError("a request by token has consumed one")
    try:
        return OPERATIONS[kind](
            operation_id=operation_id,
            root_id=root_id,
            budget_id=budget_id,
            authority=authority,
            trace_id=trace_id,
            **fields,
        )
    except TypeError as error:
        raise ValueError(f"not a {kind.name}: {error}") from error


def request_fields(kind: Kind, request: bytes) -> dict[str, Any]:
    """What a request says, by the names of the operation's fields; `authority` is a number.

    Raises:
        ValueError: The bytes are not an encoded request of that kind.
    """
    readers = _READERS[kind]
    try:
        fields, end = _read_fields(readers, request, 0)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"not a {kind.name}: {error}") from error
    if end != len(request):
        raise ValueError(f"not a {kind.name}: it is cut short, or something follows it")
    if "authority" not in fields:
        raise ValueError("a request names its authority")
    return fields


def encode_effect(effect: Effect) -> bytes:
    """The state after an operation, beside the balances; absent is what is zero, false or None."""
    items = []
    changes = [
        key + cbor.integer(change)
        for key, change in zip(_CHANGE_KEYS, effect.changes, strict=True)
        if change
    ]
    if changes:
        items.append(_CHANGES + cbor.mapping(changes))
    for key, value in zip(_STATE_KEYS, effect[1:9], strict=True):
        if value:
            items.append(key + (cbor.TRUE if value is True else cbor.integer(value)))
    if effect.versions:
        items.append(_VERSIONS + cbor.array([*map(cbor.integer, effect.versions)]))
    if effect.hold is not None:
        items.append(_HOLD_AFTER + _write_hold(effect.hold))
    if effect.returned:
        items.append(_RETURNED + cbor.integer(effect.returned))
    if effect.pending:
        items.append(_PENDING + cbor.integer(effect.pending))
    if effect.holds:
        items.append(_HOLDS + cbor.array([*map(_write_hold, effect.holds)]))
    if effect.holds_truncated:
        items.append(_HOLDS_TRUNCATED + cbor.TRUE)
    return cbor.mapping(items)


def _write_hold(hold: Hold) -> bytes:
    items = [_HOLD_ID + cbor.byte_string(hold.hold_id), _HOLD_STATE + cbor.integer(hold.state)]
    items += [
        key + cbor.integer(value) for key, value in zip(_HOLD_KEYS, hold[4:], strict=True) if value
    ]
    return cbor.mapping(items)


_CHANGES, *_STATE_KEYS = (cbor.integer(key) for key in range(1, 10))
_VERSIONS, _HOLD_AFTER, _RETURNED, _PENDING, _HOLDS, _HOLDS_TRUNCATED = (
    cbor.integer(key) for key in range(10, 16)
)
_CHANGE_KEYS = [cbor.integer(key) for key in BALANCE_KEYS.values()]
_HOLD_ID, _HOLD_STATE, *_HOLD_KEYS = (cbor.integer(key) for key in range(1, 9))


def decode_effect(data: bytes, budget_id: bytes) -> Effect:
    """The effect of an entry on a budget. Its holds have no token: the requests name those.

    Raises:
        ValueError: The bytes are not an encoded effect.
    """
    # Into a list by the keys, and not by way of a map: effects are read by the million.
    slots = _EMPTY_EFFECT[:]
    last = 0
    try:
        size, at = cbor.map_head(data, 0)
        for _ in range(size):
            key = data[at]
            value = data[at + 1]
            if key <= last:
                raise ValueError("keys are out of order")  # noqa: TRY301 - as others here
            last = key
            reader = _EFFECT_READERS[key]
            if reader is not None:
                slots[key], at = reader(data, at + 1, budget_id)
            elif not value:
                raise ValueError("zero is left out")  # noqa: TRY301 - as others here
            elif value < cbor.ONE_BYTE_MORE:
                slots[key] = value
                at += 2
            else:
                slots[key], at = cbor.number(data, at + 1)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"not an effect: {error}") from error
    if at != len(data):
        raise ValueError("not an effect: it is cut short, or something follows it")
    return new(Effect, slots[1:])


# What is absent is zero, false or null: a value that is there is none of these.


def _read_changes(data: bytes, at: int, _: bytes) -> tuple[Balances, int]:
    slots = [0] * (_BALANCES + 1)
    at = cbor.numbers(data, at + 1, data[at] - cbor.SMALL_MAP, slots, 1)
    return new(Balances, slots[1:]), at


def _read_versions(data: bytes, at: int, _: bytes) -> tuple[tuple[int, ...], int]:
    size, at = cbor.array_head(data, at)
    if not size:
        raise ValueError("no versions are left out")
    versions = tuple(data[at : at + size])
    if versions and max(versions) < cbor.ONE_BYTE_MORE:
        # They have a byte each.
        return versions, at + size
    numbers: list[int] = []
    while len(numbers) < size:
        version, at = cbor.number(data, at)
        numbers.append(version)
    return tuple(numbers), at


def _read_hold(data: bytes, at: int, budget_id: bytes) -> tuple[Hold, int]:
    start = at + 1 + len(_HOLD_ID_HEAD)
    end = start + ID_BYTES
    if data[at + 1 : start] != _HOLD_ID_HEAD:
        raise ValueError("a hold has an id")
    # Behind its id the numbers.
    slots: list[Any] = [0] * _HOLD_SLOTS
    at = cbor.numbers(data, end, data[at] - cbor.SMALL_MAP - 1, slots, _HOLD_STATE_KEY)
    slots[_HOLD_STATE_KEY] = _HOLD_STATES[slots[_HOLD_STATE_KEY]]
    hold = new(Hold, (budget_id, data[start:end], b"", *slots[_HOLD_STATE_KEY:]))
    return hold, at


def _read_holds(data: bytes, at: int, budget_id: bytes) -> tuple[tuple[Hold, ...], int]:
    size, at = cbor.array_head(data, at)
    if not size:
        raise ValueError("no holds are left out")
    holds = []
    for _ in range(size):
        hold, at = _read_hold(data, at, budget_id)
        holds.append(hold)
    return tuple(holds), at


_EFFECT_READERS: tuple[Callable[[bytes, int, bytes], tuple[Any, int]] | None, ...] = (
    None,
    _read_changes,
    None,
    None,
    None,
    _read_true,
    _read_true,
    None,
    None,
    None,
    _read_versions,
    _read_hold,
    None,
    None,
    _read_holds,
    _read_true,
)
"""By the keys, from 1 on, which are in the order of an effect's fields; None: a number."""
_EMPTY_EFFECT: list[Any] = [None, *Effect(changes=Balances())]
_BALANCES = len(Balances._fields)
_HOLD_STATES = {int(state): state for state in HoldState}
_HOLD_STATE_KEY = 2
_HOLD_SLOTS = 9
_HOLD_ID_HEAD = _HOLD_ID + cbor.head(2, ID_BYTES)


class Part(NamedTuple):
    """One entry's share of an operation's digest."""

    budget_id: bytes
    seq: int
    consumed: bytes | None
    money: Balances
    effect: bytes


def operation_digest(
    parts: Sequence[Part],
    kind: Kind,
    root_id: bytes,
    operation_id: bytes,
    position: int,
    at: int,
    principal: str,
    trace_id: bytes | None,
    amount: int,
    request: bytes,
) -> bytes:
    """SHA-256 over an operation and all its parts, in order."""
    integer, of_bytes = cbor.integer, cbor.HEADS_OF_BYTES
    pieces = [
        _BEGINNING,
        integer(kind),
        of_bytes[len(root_id)],
        root_id,
        of_bytes[len(operation_id)],
        operation_id,
        integer(position),
        integer(at),
        cbor.text(principal),
        cbor.NULL if trace_id is None else of_bytes[len(trace_id)] + trace_id,
        integer(amount),
        of_bytes[len(request)],
        request,
        cbor.head(_ARRAY, len(parts)),
    ]
    small = cbor.UNSIGNED
    for budget_id, seq, consumed, money, effect in parts:
        pieces += (
            _PART,
            of_bytes[len(budget_id)],
            budget_id,
            integer(seq),
            cbor.NULL if consumed is None else of_bytes[len(consumed)] + consumed,
            _OF_BALANCES,
            *[small[value] if 0 <= value < _SMALL else integer(value) for value in money],
            of_bytes[len(effect)],
            effect,
        )
    return hashlib.sha256(b"".join(pieces)).digest()


def digest_of_parts(parts: Sequence[Entry]) -> bytes:
    """The digest that an operation's entries have to have, by what they say; the first has the request."""
    return operation_digest([*map(_of_part, parts)], *_of_operation(parts[0]))


def _columns(*names: str) -> Callable[[Entry], tuple[Any, ...]]:
    """Takes some columns of an entry: half as dear as by their names."""
    return itemgetter(*map(Entry._fields.index, names))


_of_operation = _columns(
    "kind",
    "root_id",
    "operation_id",
    "position",
    "at",
    "principal",
    "trace_id",
    "amount",
    "request",
)
"""What its digest begins with."""
_of_part: Callable[[Entry], Any] = _columns("budget_id", "seq", "consumed", "money", "effect_bytes")
"""A `Part`, or its equal."""


_SMALL = len(cbor.UNSIGNED)
_ARRAY = 4
"""The major type of arrays."""
_BEGINNING, _PART = OPERATION_DOMAIN + cbor.head(_ARRAY, 10), cbor.head(_ARRAY, 5)
_OF_BALANCES = cbor.head(_ARRAY, len(Balances._fields))


def entry_hash(previous_hash: bytes, digest: bytes, part: int) -> bytes:
    """SHA-256 that chains an entry to the one before it of its budget."""
    return hashlib.sha256(ENTRY_DOMAIN + previous_hash + digest + part.to_bytes(2)).digest()
