"""The canonical, versioned encoding of entries, and the two hashes that chain them.

`docs/reference/entry-encoding.md` is the same in prose, with test vectors. A change of anything
here is a new version: what was recorded keeps the encoding that it was recorded in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from peculium_server.core import cbor
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


class _Field(NamedTuple):
    """How one attribute of an operation is encoded."""

    key: int
    name: str
    write: Callable[[Any], bytes]
    unpack: Callable[[Any], Any]


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


def _only(type_: type) -> Callable[[Any], Any]:
    """Take a value of exactly this type: what the decoder gives for a hostile entry may be any."""

    def unpack(value: Any) -> Any:
        if type(value) is not type_:
            raise TypeError(f"{type_.__name__} expected, not {type(value).__name__}")
        return value

    return unpack


_int, _str, _bytes, _bool, _list, _dict = map(_only, (int, str, bytes, bool, list, dict))


def _write_labels(labels: Labels) -> bytes:
    return cbor.encode(dict(labels))


def _unpack_labels(labels: Any) -> Labels:
    said = _dict(labels)
    if {*map(type, said), *map(type, said.values())} - {str}:
        raise TypeError("labels are texts")
    return tuple(sorted(said.items()))


def _write_usage(usage: Usage) -> bytes:
    return cbor.mapping(_USAGE_LAYOUT.items(usage))


def _unpack_usage(packed: Any) -> Usage:
    return Usage(**_unpack(_USAGE_READERS, packed))


def _write_children(children: tuple[Child, ...]) -> bytes:
    return cbor.array([cbor.mapping(_CHILD_LAYOUT.items(child)) for child in children])


def _unpack_children(packed: Any) -> tuple[Child, ...]:
    return tuple(Child(**_unpack(_CHILD_READERS, child)) for child in _list(packed))


def _write_rotations(rotations: tuple[Rotation, ...]) -> bytes:
    return cbor.encode([[rotation.hold_id, rotation.next_token_id] for rotation in rotations])


def _unpack_rotations(packed: Any) -> tuple[Rotation, ...]:
    return tuple(
        Rotation(hold_id=_bytes(hold_id), next_token_id=_bytes(token))
        for hold_id, token in map(_list, _list(packed))
    )


def _write_batch(batch: AtomicBatch) -> bytes:
    return cbor.encode([batch.batch_id, batch.size])


def _unpack_batch(packed: Any) -> AtomicBatch:
    batch_id, size = _list(packed)
    return AtomicBatch(_bytes(batch_id), _int(size))


def _number(key: int, name: str) -> _Field:
    return _Field(key, name, cbor.integer, _int)


def _binary(key: int, name: str) -> _Field:
    return _Field(key, name, cbor.byte_string, _bytes)


def _text(key: int, name: str) -> _Field:
    return _Field(key, name, cbor.text, _str)


def _flag(key: int, name: str) -> _Field:
    return _Field(key, name, cbor.encode, _bool)


_LABELS = _Field(2, "labels", _write_labels, _unpack_labels)
_AMOUNT = _number(3, "amount")
_TTL = _number(4, "ttl_us")
_NEXT = _binary(5, "next_token_id")
_HOLD = _binary(6, "hold_id")
_ACTUAL = _number(8, "actual")
_NEXT_HOLD = _binary(10, "next_hold_token_id")
_REFERENCE = _text(11, "reference")
_USAGE_FIELD = _Field(12, "usage", _write_usage, _unpack_usage)
_NAME = _text(15, "name")
_TOKEN = _binary(17, "token_id")
_HOLDER = _text(18, "holder")
_LEASE = _number(19, "lease_us")
_DESCENDANT = _binary(24, "descendant_id")
_REASON = _text(26, "reason")

_BATCH = _Field(27, "batch", _write_batch, _unpack_batch)

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
        _Field(14, "children", _write_children, _unpack_children),
    ),
    Kind.ACCEPT: (_LABELS, _BATCH, _NEXT),
    Kind.RECOVER: (
        _LABELS,
        _BATCH,
        _NEXT,
        _HOLDER,
        _Field(23, "holds", _write_rotations, _unpack_rotations),
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


_Readers = dict[Any, tuple[str, type | None, Callable[[Any], Any]]]
_PLAIN = {_int: int, _str: str, _bytes: bytes, _bool: bool}


def _readers(fields: Sequence[_Field]) -> _Readers:
    """By the keys; a value of the plain type, if there is one, needs no unpacking."""
    return {field.key: (field.name, _PLAIN.get(field.unpack), field.unpack) for field in fields}


_READERS = {kind: _readers(fields) for kind, fields in FIELDS.items()}
_USAGE_READERS, _CHILD_READERS = _readers(_USAGE), _readers(_CHILD)


def _unpack(readers: _Readers, packed: Any) -> dict[str, Any]:
    unpacked = {}
    for key, value in _dict(packed).items():
        reader = readers.get(key)
        if reader is None:
            raise TypeError(f"there is no field {key}")
        name, plain, unpack = reader
        unpacked[name] = value if type(value) is plain else unpack(value)
    return unpacked


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
    packed = cbor.decode(request)
    if not isinstance(packed, dict):
        raise ValueError("a request is a map")  # noqa: TRY004 - of bytes, not of an argument
    by = packed.pop(_AUTHORITY_KEY, None)
    if type(by) is not int or by not in (BY_TOKEN, BY_HOLDER, BY_ROLE):
        raise ValueError("a request names its authority")
    try:
        fields = _unpack(_READERS[kind], packed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a {kind.name}: {error}") from error
    fields["authority"] = by
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
    packed: Any = cbor.decode(data)
    try:
        slots = _EMPTY_EFFECT[:]
        for key, value in packed.items():
            # What is absent is zero, false or null: a value that is there is none of these.
            if type(value) is not _EFFECT_TYPES[key] or not value:
                raise TypeError(f"the value of {key} is none")  # noqa: TRY301 - as others here
            slots[key - 1] = value
        if slots[0] is not None:
            slots[0] = new(Balances, _numbers(slots[0], _BALANCES, 1))
        else:
            slots[0] = _NO_CHANGES
        if slots[9]:
            slots[9] = tuple(map(_int, slots[9]))
        if slots[10] is not None:
            slots[10] = _unpack_hold(slots[10], budget_id)
        if slots[13]:
            slots[13] = tuple([_unpack_hold(one, budget_id) for one in slots[13]])
        return new(Effect, slots)
    except (AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"not an effect: {error}") from error


def _numbers(packed: Any, size: int, first: int) -> list[int]:
    """The numbers of a map by their keys from the first one on; those that are absent are zero."""
    slots = [0] * size
    for key, value in packed.items():
        if type(value) is not int or not value or key < first:
            raise TypeError(f"the value of {key} is none")
        slots[key - first] = value
    return slots


_NO_CHANGES = Balances()
_BALANCES = len(Balances._fields)
_EFFECT_TYPES: dict[Any, type] = {
    1: dict,
    5: bool,
    6: bool,
    10: list,
    11: dict,
    14: list,
    15: bool,
} | dict.fromkeys((2, 3, 4, 7, 8, 9, 12, 13), int)
_EMPTY_EFFECT: list[Any] = [None, 0, 0, 0, False, False, None, None, 0, (), None, 0, 0, (), False]
"""By the keys, from 1 on, which are in the order of an effect's fields."""
_HOLD_STATES = {int(state): state for state in HoldState}
_HOLD_NUMBERS = 7


def _unpack_hold(packed: Any, budget_id: bytes) -> Hold:
    hold_id = _bytes(packed.pop(1))
    state, *numbers = _numbers(packed, _HOLD_NUMBERS, 2)
    return new(Hold, (budget_id, hold_id, b"", _HOLD_STATES[state], *numbers))


class Part(NamedTuple):
    """One entry's share of an operation's digest."""

    budget_id: bytes
    seq: int
    consumed: bytes | None
    money: Balances
    effect: bytes


def operation_digest(
    *,
    kind: Kind,
    root_id: bytes,
    operation_id: bytes,
    position: int,
    at: int,
    principal: str,
    trace_id: bytes | None,
    amount: int,
    request: bytes,
    parts: Sequence[Part],
) -> bytes:
    """SHA-256 over an operation and all its parts, in order."""
    pieces = [
        OPERATION_DOMAIN,
        _RECORD,
        cbor.integer(kind),
        cbor.byte_string(root_id),
        cbor.byte_string(operation_id),
        cbor.integer(position),
        cbor.integer(at),
        cbor.text(principal),
        cbor.NULL if trace_id is None else cbor.byte_string(trace_id),
        cbor.integer(amount),
        cbor.byte_string(request),
        cbor.head(_ARRAY, len(parts)),
    ]
    integer = cbor.integer
    for budget_id, seq, consumed, money, effect in parts:
        pieces += (
            _PART,
            cbor.byte_string(budget_id),
            cbor.integer(seq),
            cbor.NULL if consumed is None else cbor.byte_string(consumed),
            _OF_BALANCES,
            *map(integer, money),
            cbor.byte_string(effect),
        )
    return hashlib.sha256(b"".join(pieces)).digest()


def digest_of_parts(parts: Sequence[Entry]) -> bytes:
    """The digest that an operation's entries have to have, by what they say; the first has the request."""
    first = parts[0]
    assert first.request is not None
    return operation_digest(
        kind=first.kind,
        root_id=first.root_id,
        operation_id=first.operation_id,
        position=first.position,
        at=first.at,
        principal=first.principal,
        trace_id=first.trace_id,
        amount=first.amount,
        request=first.request,
        parts=[
            new(Part, (part.budget_id, part.seq, part.consumed, part.money, part.effect_bytes))
            for part in parts
        ],
    )


_ARRAY = 4
"""The major type of arrays."""
_RECORD, _PART = cbor.head(_ARRAY, 10), cbor.head(_ARRAY, 5)
_OF_BALANCES = cbor.head(_ARRAY, len(Balances._fields))


def entry_hash(previous_hash: bytes, digest: bytes, part: int) -> bytes:
    """SHA-256 that chains an entry to the one before it of its budget."""
    return hashlib.sha256(ENTRY_DOMAIN + previous_hash + digest + part.to_bytes(2)).digest()
