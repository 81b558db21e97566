"""The lines of an export as JSONL: one record each, see `docs/reference/export.md`.

Bytes are hexadecimal, times microseconds since the Unix epoch, balances arrays in the order of the entry
encoding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

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

_INT_MAX: Final = 2**63 - 1
_KINDS: Final[dict[Any, Kind]] = {kind.name: kind for kind in Kind}
_CUSTODIES: Final[dict[Any, Custody]] = {custody.name: custody for custody in Custody}
_HOLD_STATES: Final[dict[Any, HoldState]] = {state.name: state for state in HoldState}
_NO_EFFECT: Final = Effect(changes=Balances())
_BALANCES: Final = len(Balances._fields)

_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_scan = json.scanner.make_scanner(json.JSONDecoder())  # type: ignore[attr-defined]
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


def read(line: str) -> Record:
    """The record of a line.

    Raises:
        LineInvalid: It is none.
    """
    try:
        said, end = _scan(line, 0)
        reader, fields = _READERS[said["record"]]
        record = reader(said)
    except LineInvalid:
        raise
    except KeyError as error:
        raise LineInvalid(f"a record without, or with an unknown, {error}") from error
    except StopIteration as error:
        raise LineInvalid("no record of an export: no JSON") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LineInvalid(f"no record of an export: {error}") from error
    if len(said) != fields:
        raise LineInvalid("a record with fields that are not known")
    if line[end:] not in ("", "\n"):
        raise LineInvalid("something follows the record")
    return record


def _read_header(said: dict[str, Any]) -> Header:
    if said["format"] != FORMAT:
        raise LineInvalid(f"not a {FORMAT}")
    if said["version"] != VERSION:
        raise LineInvalid(f"version {said['version']} of the format is not known, only {VERSION}")
    root_id, positions = said["root_id"], said["positions"]
    _check_numbers(*positions)
    return Header(
        _number(said["encoding"]),
        _from_hex(said["incarnation"]),
        _number(said["at"]),
        tuple(positions),
        None if root_id is None else _from_hex(root_id),
    )


def _read_entry(said: dict[str, Any]) -> Recorded:
    money = said["balances"]
    lane, amount, at = said["lane"], said["amount"], said["at"]
    seq, position, part, parts = said["seq"], said["position"], said["part"], said["parts"]
    _check_numbers(lane, amount, at, seq, position, part, parts, *money)
    if len(money) != _BALANCES:
        raise LineInvalid("an entry has eight balances")
    principal = said["principal"]
    if type(principal) is not str:
        raise LineInvalid("a principal is a text")
    trace_id, consumed, request = said["trace_id"], said["consumed"], said["request"]
    entry = new(
        Entry,
        (
            _from_hex(said["root_id"]),
            _from_hex(said["budget_id"]),
            seq,
            position,
            part,
            parts,
            _from_hex(said["operation_id"]),
            _KINDS[said["kind"]],
            at,
            principal,
            None if trace_id is None else _from_hex(trace_id),
            None if consumed is None else _from_hex(consumed),
            amount,
            new(Balances, money),
            _NO_EFFECT,
            None if request is None else _from_hex(request),
            _from_hex(said["effect"]),
            _from_hex(said["digest"]),
            b"",
            _from_hex(said["hash"]),
        ),
    )
    return new(Recorded, (lane, entry))


def _read_budget(said: dict[str, Any]) -> BudgetRow:
    money = said["balances"]
    _check_numbers(*money)
    if len(money) != _BALANCES:
        raise LineInvalid("a budget has eight balances")
    budget = Budget(
        root_id=_from_hex(said["root_id"]),
        budget_id=_from_hex(said["budget_id"]),
        ancestors=tuple(map(_from_hex, said["ancestors"])),
        name=said["name"],
        unit=said["unit"],
        custody=_CUSTODIES[said["custody"]],
        holder=said["holder"],
        token=None,
        overrun_factor=said["overrun_factor"],
        labels=tuple(sorted(said["labels"].items())),
        created_at=said["created_at"],
        money=Balances(*money),
        disputed=said["disputed"],
        disputes=said["disputes"],
        holds_live=said["holds_live"],
        closed=said["closed"],
        frozen=said["frozen"],
        lease_until=said["lease_until"],
        lease_latest=said["lease_latest"],
        version=said["version"],
        seq=said["seq"],
        last_at=said["last_at"],
        head=_from_hex(said["head"]),
    )
    token_digest = said["token_digest"]
    return BudgetRow(budget, None if token_digest is None else _from_hex(token_digest))


def _read_hold(said: dict[str, Any]) -> HoldRow:
    hold = new(
        Hold,
        (
            _from_hex(said["budget_id"]),
            _from_hex(said["hold_id"]),
            b"",
            _HOLD_STATES[said["state"]],
            said["amount"],
            said["remaining"],
            said["booked"],
            said["disputed"],
            said["created_at"],
            said["expires_at"],
        ),
    )
    return HoldRow(_from_hex(said["root_id"]), hold, _from_hex(said["token_digest"]))


def _read_checkpoint(said: dict[str, Any]) -> SealedBy:
    checkpoint = Checkpoint(
        number=_number(said["number"]),
        sealed_at=_number(said["sealed_at"]),
        incarnation=_from_hex(said["incarnation"]),
        positions=tuple(map(_number, said["positions"])),
        merkle_root=_from_hex(said["merkle_root"]),
        leaves=_number(said["leaves"]),
        previous_hash=_from_hex(said["previous_hash"]),
    )
    sealed = Sealed(
        checkpoint,
        _from_hex(said["hash"]),
        _from_hex(said["key_id"]),
        _from_hex(said["signature"]),
    )
    return SealedBy(sealed, _from_hex(said["public_key"]))


def _read_leaf(said: dict[str, Any]) -> LeafOf:
    leaf = Leaf(
        _from_hex(said["root_id"]),
        _from_hex(said["budget_id"]),
        _number(said["seq"]),
        _from_hex(said["head"]),
    )
    return LeafOf(_number(said["checkpoint"]), leaf)


def _read_trailer(said: dict[str, Any]) -> Counts:
    return Counts(*(_number(said[name]) for name in Counts._fields))


_READERS: Final[dict[str, tuple[Callable[[dict[str, Any]], Record], int]]] = {
    "header": (_read_header, 8),
    "entry": (_read_entry, 20),
    "budget": (_read_budget, 24),
    "hold": (_read_hold, 12),
    "checkpoint": (_read_checkpoint, 12),
    "leaf": (_read_leaf, 6),
    "trailer": (_read_trailer, 5),
}
"""Each with how many fields its record has."""


def _check_numbers(*numbers: Any) -> None:
    if {*map(type, numbers)} != _ONLY_INT or min(numbers) < 0 or max(numbers) > _INT_MAX:
        raise LineInvalid("a number is none, or beyond 64 bits")


_ONLY_INT: Final = {int}


def _number(value: Any) -> int:
    _check_numbers(value)
    assert isinstance(value, int)  # noqa: S101 - just checked
    return value
