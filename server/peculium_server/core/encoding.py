"""The canonical, versioned encoding of entries, and the two hashes that chain them.

`docs/reference/entry-encoding.md` is the same in prose, with test vectors. A change of anything
here is a new version: what was recorded keeps the encoding that it was recorded in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
from peculium_server.core.state import Balances, Effect, Hold, HoldState

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
    pack: Callable[[Any], cbor.Value]
    unpack: Callable[[Any], Any]


def _plain(value: cbor.Value) -> cbor.Value:
    return value


def _only(type_: type) -> Callable[[Any], Any]:
    """Take a value of exactly this type: what the decoder gives for a hostile entry may be any."""

    def unpack(value: Any) -> Any:
        if type(value) is not type_:
            raise TypeError(f"{type_.__name__} expected, not {type(value).__name__}")
        return value

    return unpack


_int, _str, _bytes, _bool, _list, _dict = map(_only, (int, str, bytes, bool, list, dict))


def _pack_labels(labels: Labels) -> cbor.Value:
    return dict(labels)


def _unpack_labels(labels: Any) -> Labels:
    return tuple(sorted((_str(key), _str(value)) for key, value in _dict(labels).items()))


def _pack_usage(usage: Usage) -> cbor.Value:
    return _pack(_USAGE, usage)


def _unpack_usage(packed: Any) -> Usage:
    return Usage(**_unpack(_USAGE, packed))


def _pack_children(children: tuple[Child, ...]) -> cbor.Value:
    return [_pack(_CHILD, child) for child in children]


def _unpack_children(packed: Any) -> tuple[Child, ...]:
    return tuple(Child(**_unpack(_CHILD, child)) for child in _list(packed))


def _pack_rotations(rotations: tuple[Rotation, ...]) -> cbor.Value:
    return [[rotation.hold_id, rotation.next_token_id] for rotation in rotations]


def _unpack_rotations(packed: Any) -> tuple[Rotation, ...]:
    return tuple(
        Rotation(hold_id=_bytes(hold_id), next_token_id=_bytes(token))
        for hold_id, token in map(_list, _list(packed))
    )


def _pack_batch(batch: AtomicBatch) -> cbor.Value:
    return [batch.batch_id, batch.size]


def _unpack_batch(packed: Any) -> AtomicBatch:
    batch_id, size = _list(packed)
    return AtomicBatch(_bytes(batch_id), _int(size))


def _same(key: int, name: str, unpack: Callable[[Any], Any]) -> _Field:
    return _Field(key, name, _plain, unpack)


_LABELS = _Field(2, "labels", _pack_labels, _unpack_labels)
_AMOUNT = _same(3, "amount", _int)
_TTL = _same(4, "ttl_us", _int)
_NEXT = _same(5, "next_token_id", _bytes)
_HOLD = _same(6, "hold_id", _bytes)
_ACTUAL = _same(8, "actual", _int)
_NEXT_HOLD = _same(10, "next_hold_token_id", _bytes)
_REFERENCE = _same(11, "reference", _str)
_USAGE_FIELD = _Field(12, "usage", _pack_usage, _unpack_usage)
_NAME = _same(15, "name", _str)
_TOKEN = _same(17, "token_id", _bytes)
_HOLDER = _same(18, "holder", _str)
_LEASE = _same(19, "lease_us", _int)
_DESCENDANT = _same(24, "descendant_id", _bytes)
_REASON = _same(26, "reason", _str)

_BATCH = _Field(27, "batch", _pack_batch, _unpack_batch)

_USAGE = (
    _same(1, "provider", _str),
    _same(2, "model", _str),
    _same(3, "input_tokens", _int),
    _same(4, "output_tokens", _int),
    _same(5, "cached_tokens", _int),
)
_CHILD = (
    _LABELS,
    _AMOUNT,
    _NAME,
    _TOKEN,
    _HOLDER,
    _LEASE,
    _same(20, "lease_latest_us", _int),
    _same(21, "overrun_factor", _int),
    _same(22, "budget_id", _bytes),
)
FIELDS: dict[Kind, tuple[_Field, ...]] = {
    Kind.GRANT: (_LABELS, _BATCH, _AMOUNT, _NAME, _same(16, "unit", _str), _TOKEN, _HOLDER),
    Kind.TOP_UP: (_LABELS, _BATCH, _AMOUNT),
    Kind.WITHDRAW: (_LABELS, _BATCH, _AMOUNT),
    Kind.RESERVE: (_LABELS, _BATCH, _AMOUNT, _TTL, _NEXT, _HOLD, _same(7, "hold_token_id", _bytes)),
    Kind.SETTLE: (
        _LABELS,
        _BATCH,
        _HOLD,
        _ACTUAL,
        _same(9, "keep_open", _bool),
        _NEXT_HOLD,
        _REFERENCE,
        _USAGE_FIELD,
        _same(13, "estimated", _bool),
    ),
    Kind.RELEASE: (_LABELS, _BATCH, _HOLD),
    Kind.EXTEND: (_LABELS, _BATCH, _TTL, _HOLD, _NEXT_HOLD),
    Kind.SPEND: (_LABELS, _BATCH, _AMOUNT, _NEXT, _REFERENCE, _USAGE_FIELD),
    Kind.DELEGATE: (
        _LABELS,
        _BATCH,
        _NEXT,
        _Field(14, "children", _pack_children, _unpack_children),
    ),
    Kind.ACCEPT: (_LABELS, _BATCH, _NEXT),
    Kind.RECOVER: (
        _LABELS,
        _BATCH,
        _NEXT,
        _HOLDER,
        _Field(23, "holds", _pack_rotations, _unpack_rotations),
        _same(28, "if_seq", _int),
    ),
    Kind.FUND: (_LABELS, _BATCH, _AMOUNT, _NEXT, _LEASE, _DESCENDANT),
    Kind.RENEW: (_LABELS, _BATCH, _NEXT, _LEASE),
    Kind.RETURN: (_LABELS, _BATCH, _AMOUNT, _NEXT, _same(25, "cascade", _bool)),
    Kind.REVOKE: (_LABELS, _BATCH, _NEXT, _DESCENDANT),
    Kind.RESOLVE: (_LABELS, _BATCH, _NEXT, _HOLD, _ACTUAL, _REASON),
    Kind.FREEZE: (_LABELS, _BATCH, _REASON),
    Kind.UNFREEZE: (_LABELS, _BATCH, _REASON),
    Kind.LAPSE: (_LABELS, _BATCH, _HOLD),
    Kind.EXPIRE: (_LABELS, _BATCH),
    Kind.COLLECT: (_LABELS, _BATCH),
}
"""The attributes of each kind, beside the header's; key 1 is the authority. Keys are never reused."""

_AUTHORITY_KEY = 1
_BY_TOKEN, _BY_HOLDER, _BY_ROLE = 1, 2, 3


def _pack(fields: Sequence[_Field], source: object) -> dict[cbor.Key, cbor.Value]:
    """Absent is what is None, False or empty; a number is always said."""
    packed: dict[cbor.Key, cbor.Value] = {}
    for key, name, pack, _ in fields:
        value = getattr(source, name)
        if value or (value is not None and value is not False and isinstance(value, int)):
            packed[key] = pack(value)
    return packed


def _unpack(fields: Sequence[_Field], packed: Any) -> dict[str, Any]:
    unknown = _dict(packed).keys() - {field.key for field in fields}
    if unknown:
        raise TypeError(f"there is no field {min(map(str, unknown))}")
    return {name: unpack(packed[key]) for key, name, _, unpack in fields if key in packed}


def encode_request(operation: Operation) -> bytes:
    """What was asked, beside what an entry says of itself (ids, kind, time, actor, consumed token)."""
    packed = _pack(FIELDS[operation.kind], operation)
    match operation.authority:
        case ByToken():
            packed[_AUTHORITY_KEY] = _BY_TOKEN
        case ByHolder():
            packed[_AUTHORITY_KEY] = _BY_HOLDER
        case ByRole():
            packed[_AUTHORITY_KEY] = _BY_ROLE
        case _:
            raise AssertionError("a chained authority is resolved before it is recorded")
    return cbor.encode(packed)


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
    packed = cbor.decode(request)
    if not isinstance(packed, dict):
        raise ValueError("a request is a map")  # noqa: TRY004 - of bytes, not of an argument
    by = packed.pop(_AUTHORITY_KEY, None)
    authority: Authority
    if by == _BY_TOKEN and consumed is not None:
        authority = ByToken(consumed)
    elif by == _BY_HOLDER:
        authority = ByHolder()
    elif by == _BY_ROLE:
        authority = ByRole()
    else:
        raise ValueError("a request names its authority")
    try:
        return OPERATIONS[kind](
            operation_id=operation_id,
            root_id=root_id,
            budget_id=budget_id,
            authority=authority,
            trace_id=trace_id,
            **_unpack(FIELDS[kind], packed),
        )
    except TypeError as error:
        raise ValueError(f"not a {kind.name}: {error}") from error


def encode_effect(effect: Effect) -> bytes:
    """The state after an operation, beside the balances; absent is what is zero, false or None."""
    packed: dict[cbor.Key, cbor.Value] = {}
    changes: dict[cbor.Key, cbor.Value] = {
        index: change for index, change in enumerate(effect.changes, start=1) if change
    }
    if changes:
        packed[1] = changes
    packed |= {key: value for key, value in enumerate(effect[1:9], start=2) if value}
    if effect.versions:
        packed[10] = list(effect.versions)
    if effect.hold is not None:
        packed[11] = _pack_hold(effect.hold)
    if effect.returned:
        packed[12] = effect.returned
    if effect.pending:
        packed[13] = effect.pending
    if effect.holds:
        packed[14] = [_pack_hold(hold) for hold in effect.holds]
    if effect.holds_truncated:
        packed[15] = True
    return cbor.encode(packed)


def _pack_hold(hold: Hold) -> cbor.Value:
    packed: dict[cbor.Key, cbor.Value] = {1: hold.hold_id, 2: int(hold.state)}
    return packed | {key: value for key, value in enumerate(hold[4:], start=3) if value}


def decode_effect(data: bytes, budget_id: bytes) -> Effect:
    """The effect of an entry on a budget. Its holds have no token: the requests name those.

    Raises:
        ValueError: The bytes are not an encoded effect.
    """
    packed: Any = cbor.decode(data)
    try:
        changes = packed.get(1, {})
        hold = packed.get(11)
        return Effect(
            changes=Balances(*(changes.get(index, 0) for index in range(1, 9))),
            disputed=packed.get(2, 0),
            disputes=packed.get(3, 0),
            holds_live=packed.get(4, 0),
            closed=packed.get(5, False),
            frozen=packed.get(6, False),
            lease_until=packed.get(7),
            lease_latest=packed.get(8),
            version=packed.get(9, 0),
            versions=tuple(packed.get(10, ())),
            hold=None if hold is None else _unpack_hold(hold, budget_id),
            returned=packed.get(12, 0),
            pending=packed.get(13, 0),
            holds=tuple(_unpack_hold(one, budget_id) for one in packed.get(14, ())),
            holds_truncated=packed.get(15, False),
        )
    except (AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"not an effect: {error}") from error


def _unpack_hold(packed: dict[int, Any], budget_id: bytes) -> Hold:
    return Hold(
        budget_id=budget_id,
        hold_id=packed[1],
        token=b"",
        state=HoldState(packed[2]),
        amount=packed.get(3, 0),
        remaining=packed.get(4, 0),
        booked=packed.get(5, 0),
        disputed=packed.get(6, 0),
        created_at=packed.get(7, 0),
        expires_at=packed.get(8, 0),
    )


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
    record: list[cbor.Value] = [
        int(kind),
        root_id,
        operation_id,
        position,
        at,
        principal,
        trace_id,
        amount,
        request,
        [[part[0], part[1], part[2], list(part[3]), part[4]] for part in parts],
    ]
    return hashlib.sha256(OPERATION_DOMAIN + cbor.encode(record)).digest()


def entry_hash(previous_hash: bytes, digest: bytes, part: int) -> bytes:
    """SHA-256 that chains an entry to the one before it of its budget."""
    return hashlib.sha256(ENTRY_DOMAIN + previous_hash + digest + part.to_bytes(2)).digest()
