"""The lines of an export as JSONL: one record each, see `docs/reference/export.md`.

Bytes are hexadecimal, times microseconds since the Unix epoch, balances arrays in the order of the entry
encoding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec
from msgspec.structs import astuple

from peculium_server.core.checkpoint import Checkpoint, Leaf, Sealed
from peculium_server.core.offline.records import (
    BudgetRow,
    Counts,
    Header,
    HoldRow,
    LeafOf,
    Record,
    Recorded,
    SealedBy,
)
from peculium_server.core.operations import Kind
from peculium_server.core.state import (
    Balances,
    Budget,
    Custody,
    Effect,
    Entry,
    Hold,
    HoldState,
    new,
)

FORMAT: Final = "peculium.export"
VERSION: Final = 1

_KINDS: Final[dict[Any, Kind]] = {kind.name: kind for kind in Kind}
_CUSTODIES: Final[dict[Any, Custody]] = {custody.name: custody for custody in Custody}
_HOLD_STATES: Final[dict[Any, HoldState]] = {state.name: state for state in HoldState}
_NO_EFFECT: Final = Effect(changes=Balances())

_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_from_hex = bytes.fromhex


class LineInvalid(ValueError):
    """A line is no record of an export."""


# -- Writing ------------------------------------------------------------------------------------------


def write(record: Record) -> str:
    """A record as a line, without its end."""
    return _dumps(_WRITERS[type(record)](record))


def _write_header(header: Header) -> dict[str, Any]:
    return {
        "record": "header",
        "format": FORMAT,
        "version": VERSION,
        "encoding": header.encoding_version,
        "incarnation": header.incarnation.hex(),
        "at": header.at,
        "positions": header.positions,
        "root_id": _hex(header.root_id),
        "earlier_incarnations": [each.hex() for each in header.earlier_incarnations],
    }


def _write_entry(recorded: Recorded) -> dict[str, Any]:
    lane, entry = recorded
    return {
        "record": "entry",
        "root_id": entry.root_id.hex(),
        "budget_id": entry.budget_id.hex(),
        "lane": lane,
        "position": entry.position,
        "part": entry.part,
        "parts": entry.parts,
        "seq": entry.seq,
        "operation_id": entry.operation_id.hex(),
        "kind": entry.kind.name,
        "at": entry.at,
        "principal": entry.principal,
        "trace_id": _hex(entry.trace_id),
        "consumed": _hex(entry.consumed),
        "amount": entry.amount,
        "balances": entry.money,
        "request": _hex(entry.request),
        "effect": entry.effect_bytes.hex(),
        "digest": entry.digest.hex(),
        "hash": entry.hash.hex(),
    }


def _write_budget(row: BudgetRow) -> dict[str, Any]:
    budget = row.budget
    return {
        "record": "budget",
        "root_id": budget.root_id.hex(),
        "budget_id": budget.budget_id.hex(),
        "ancestors": [ancestor.hex() for ancestor in budget.ancestors],
        "name": budget.name,
        "unit": budget.unit,
        "custody": budget.custody.name,
        "holder": budget.holder,
        "token_digest": _hex(row.token_digest),
        "overrun_factor": budget.overrun_factor,
        "labels": dict(budget.labels),
        "created_at": budget.created_at,
        "balances": budget.money,
        "disputed": budget.disputed,
        "disputes": budget.disputes,
        "holds_live": budget.holds_live,
        "closed": budget.closed,
        "frozen": budget.frozen,
        "lease_until": budget.lease_until,
        "lease_latest": budget.lease_latest,
        "version": budget.version,
        "seq": budget.seq,
        "last_at": budget.last_at,
        "head": budget.head.hex(),
    }


def _write_hold(row: HoldRow) -> dict[str, Any]:
    hold = row.hold
    return {
        "record": "hold",
        "root_id": row.root_id.hex(),
        "budget_id": hold.budget_id.hex(),
        "hold_id": hold.hold_id.hex(),
        "token_digest": row.token_digest.hex(),
        "state": hold.state.name,
        "amount": hold.amount,
        "remaining": hold.remaining,
        "booked": hold.booked,
        "disputed": hold.disputed,
        "created_at": hold.created_at,
        "expires_at": hold.expires_at,
    }


def _write_checkpoint(record: SealedBy) -> dict[str, Any]:
    checkpoint, hash_, key_id, signature = record.sealed
    return {
        "record": "checkpoint",
        "number": checkpoint.number,
        "sealed_at": checkpoint.sealed_at,
        "incarnation": checkpoint.incarnation.hex(),
        "positions": checkpoint.positions,
        "merkle_root": checkpoint.merkle_root.hex(),
        "leaves": checkpoint.leaves,
        "previous_hash": checkpoint.previous_hash.hex(),
        "hash": hash_.hex(),
        "key_id": key_id.hex(),
        "signature": signature.hex(),
        "public_key": record.public_key.hex(),
    }


def _write_leaf(record: LeafOf) -> dict[str, Any]:
    leaf = record.leaf
    return {
        "record": "leaf",
        "checkpoint": record.checkpoint,
        "root_id": leaf.root_id.hex(),
        "budget_id": leaf.budget_id.hex(),
        "seq": leaf.seq,
        "head": leaf.head.hex(),
    }


def _write_trailer(counts: Counts) -> dict[str, Any]:
    return {"record": "trailer", **counts._asdict()}


_WRITERS: Final[dict[type, Callable[[Any], dict[str, Any]]]] = {
    Header: _write_header,
    Recorded: _write_entry,
    BudgetRow: _write_budget,
    HoldRow: _write_hold,
    SealedBy: _write_checkpoint,
    LeafOf: _write_leaf,
    Counts: _write_trailer,
}


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


# -- Reading ------------------------------------------------------------------------------------------

_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Money = tuple[_Number, _Number, _Number, _Number, _Number, _Number, _Number, _Number]


class _Line(msgspec.Struct, gc=False, kw_only=True, tag_field="record", forbid_unknown_fields=True):
    """What a line says, of the right types, before its hexadecimal digits are read."""


class _Opening(msgspec.Struct):
    """What the headers of all versions say."""

    format: str
    version: int


class _HeaderLine(_Line, tag="header"):
    format: str
    version: _Number
    encoding: _Number
    incarnation: str
    at: _Number
    positions: Annotated[tuple[_Number, ...], msgspec.Meta(min_length=1)]
    root_id: str | None
    earlier_incarnations: tuple[str, ...]


class _EntryLine(_Line, tag="entry"):
    root_id: str
    budget_id: str
    lane: _Number
    position: _Number
    part: _Number
    parts: _Number
    seq: _Number
    operation_id: str
    kind: str
    at: _Number
    principal: str
    trace_id: str | None
    consumed: str | None
    amount: _Number
    balances: _Money
    request: str | None
    effect: str
    digest: str
    hash: str


class _BudgetLine(_Line, tag="budget"):
    root_id: str
    budget_id: str
    ancestors: list[str]
    name: str
    unit: str
    custody: str
    holder: str | None
    token_digest: str | None
    overrun_factor: _Number | None
    labels: dict[str, str]
    created_at: _Number
    balances: _Money
    disputed: _Number
    disputes: _Number
    holds_live: _Number
    closed: bool
    frozen: bool
    lease_until: _Number | None
    lease_latest: _Number | None
    version: _Number
    seq: _Number
    last_at: _Number
    head: str


class _HoldLine(_Line, tag="hold"):
    root_id: str
    budget_id: str
    hold_id: str
    token_digest: str
    state: str
    amount: _Number
    remaining: _Number
    booked: _Number
    disputed: _Number
    created_at: _Number
    expires_at: _Number


class _CheckpointLine(_Line, tag="checkpoint"):
    number: _Number
    sealed_at: _Number
    incarnation: str
    positions: tuple[_Number, ...]
    merkle_root: str
    leaves: _Number
    previous_hash: str
    hash: str
    key_id: str
    signature: str
    public_key: str


class _LeafLine(_Line, tag="leaf"):
    checkpoint: _Number
    root_id: str
    budget_id: str
    seq: _Number
    head: str


class _TrailerLine(_Line, tag="trailer"):
    entries: _Number
    budgets: _Number
    holds: _Number
    checkpoints: _Number


_decode = msgspec.json.Decoder(
    _HeaderLine | _EntryLine | _BudgetLine | _HoldLine | _CheckpointLine | _LeafLine | _TrailerLine
).decode
_decode_opening = msgspec.json.Decoder(_Opening).decode


def read(line: bytes) -> Record:
    """The record of a line.

    Raises:
        LineInvalid: It is none.
    """
    try:
        said = _decode(line)
        return _READERS[type(said)](said)
    except KeyError as error:
        raise LineInvalid(f"{error} is not known") from error
    except msgspec.ValidationError as error:
        _check_opening(line)
        raise LineInvalid(f"no record of an export: {error}") from error
    except (ValueError, RecursionError) as error:
        raise LineInvalid(f"no record of an export: {error}") from error


def _check_opening(line: bytes) -> None:
    """Whether a line that cannot be read is the header of a later version of the format."""
    try:
        opening = _decode_opening(line)
    except msgspec.ValidationError:
        return
    _check_version(opening.format, opening.version)


def _check_version(form: str, version: int) -> None:
    if form != FORMAT:
        raise LineInvalid(f"not a {FORMAT}")
    if version != VERSION:
        raise LineInvalid(f"version {version} of the format is not known, only {VERSION}")


def _read_header(said: _HeaderLine) -> Header:
    _check_version(said.format, said.version)
    return Header(
        said.encoding,
        _from_hex(said.incarnation),
        said.at,
        said.positions,
        None if said.root_id is None else _from_hex(said.root_id),
        tuple(_from_hex(each) for each in said.earlier_incarnations),
    )


def _read_entry(said: _EntryLine) -> Recorded:
    (
        root_id,
        budget_id,
        lane,
        position,
        part,
        parts,
        seq,
        operation_id,
        kind,
        at,
        principal,
        trace_id,
        consumed,
        amount,
        money,
        request,
        effect,
        digest,
        hash_,
    ) = astuple(said)
    entry = new(
        Entry,
        (
            _from_hex(root_id),
            _from_hex(budget_id),
            seq,
            position,
            part,
            parts,
            _from_hex(operation_id),
            _KINDS[kind],
            at,
            principal,
            None if trace_id is None else _from_hex(trace_id),
            None if consumed is None else _from_hex(consumed),
            amount,
            new(Balances, money),
            _NO_EFFECT,
            None if request is None else _from_hex(request),
            _from_hex(effect),
            _from_hex(digest),
            b"",
            _from_hex(hash_),
        ),
    )
    return new(Recorded, (lane, entry))


def _read_budget(said: _BudgetLine) -> BudgetRow:
    budget = Budget(
        root_id=_from_hex(said.root_id),
        budget_id=_from_hex(said.budget_id),
        ancestors=tuple(map(_from_hex, said.ancestors)),
        name=said.name,
        unit=said.unit,
        custody=_CUSTODIES[said.custody],
        holder=said.holder,
        token=None,
        overrun_factor=said.overrun_factor,
        labels=tuple(sorted(said.labels.items())),
        created_at=said.created_at,
        money=Balances(*said.balances),
        disputed=said.disputed,
        disputes=said.disputes,
        holds_live=said.holds_live,
        closed=said.closed,
        frozen=said.frozen,
        lease_until=said.lease_until,
        lease_latest=said.lease_latest,
        version=said.version,
        seq=said.seq,
        last_at=said.last_at,
        head=_from_hex(said.head),
    )
    return BudgetRow(budget, None if said.token_digest is None else _from_hex(said.token_digest))


def _read_hold(said: _HoldLine) -> HoldRow:
    root_id, budget_id, hold_id, token_digest, state, *numbers = astuple(said)
    hold = new(Hold, (_from_hex(budget_id), _from_hex(hold_id), b"", _HOLD_STATES[state], *numbers))
    return new(HoldRow, (_from_hex(root_id), hold, _from_hex(token_digest)))


def _read_checkpoint(said: _CheckpointLine) -> SealedBy:
    checkpoint = Checkpoint(
        number=said.number,
        sealed_at=said.sealed_at,
        incarnation=_from_hex(said.incarnation),
        positions=said.positions,
        merkle_root=_from_hex(said.merkle_root),
        leaves=said.leaves,
        previous_hash=_from_hex(said.previous_hash),
    )
    sealed = Sealed(
        checkpoint, _from_hex(said.hash), _from_hex(said.key_id), _from_hex(said.signature)
    )
    return SealedBy(sealed, _from_hex(said.public_key))


def _read_leaf(said: _LeafLine) -> LeafOf:
    checkpoint, root_id, budget_id, seq, head = astuple(said)
    leaf = new(Leaf, (_from_hex(root_id), _from_hex(budget_id), seq, _from_hex(head)))
    return new(LeafOf, (checkpoint, leaf))


def _read_trailer(said: _TrailerLine) -> Counts:
    return Counts(*astuple(said))


_READERS: Final[dict[type, Callable[[Any], Record]]] = {
    _HeaderLine: _read_header,
    _EntryLine: _read_entry,
    _BudgetLine: _read_budget,
    _HoldLine: _read_hold,
    _CheckpointLine: _read_checkpoint,
    _LeafLine: _read_leaf,
    _TrailerLine: _read_trailer,
}
