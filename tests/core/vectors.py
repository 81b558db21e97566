"""The vectors of docs/reference/entry-vectors.json: run this module to write them again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from peculium_server.core.encoding import token_id
from peculium_server.core.limits import AMOUNT_MAX
from peculium_server.core.operations import (
    AtomicBatch,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Operation,
    Rotation,
    Usage,
)
from peculium_server.core.state import Effect, Entry, Hold
from tests.core.every_kind import lived
from tests.core.ledger import HOUR, Ledger, requested

FILE = Path(__file__).parents[2] / "docs" / "reference" / "entry-vectors.json"

_AUTHORITY: dict[type, int] = {ByToken: 1, ByHolder: 2, ByRole: 3}


def made() -> dict[str, Any]:
    """What the code makes of every kind, of the largest amounts, and of an atomic batch."""
    ledger, _ = lived()
    entries = [*ledger.journal, *_wide().journal, *_together().journal]
    operations: dict[bytes, list[Entry]] = {}
    for entry in entries:
        operations.setdefault(entry.root_id + entry.operation_id, []).append(entry)
    secrets = [bytes(32), bytes(range(32)), b"\xff" * 32]
    return {
        "encoding_version": 1,
        "tokens": [
            {"secret": secret.hex(), "token_id": token_id(secret).hex()} for secret in secrets
        ],
        "operations": [_operation(parts) for parts in operations.values()],
    }


def _wide() -> Ledger:
    ledger = Ledger()
    ledger.pass_time(HOUR)
    root = ledger.grant(AMOUNT_MAX)
    child = root.child(AMOUNT_MAX // 2, overrun_factor=0)
    ledger.do(child.hold(1).settle(AMOUNT_MAX))
    ledger.do(root.hold(1).settle(AMOUNT_MAX))
    return ledger


def _together() -> Ledger:
    ledger = Ledger()
    ledger.pass_time(2 * HOUR)
    first, second = ledger.grant(10), ledger.grant(20)
    ledger.atomic([first.reserve(10), second.reserve(20)])
    return ledger


def _operation(parts: Sequence[Entry]) -> dict[str, Any]:
    first = parts[0]
    assert first.request is not None
    return {
        "kind": first.kind.name,
        "root_id": first.root_id.hex(),
        "operation_id": first.operation_id.hex(),
        "position": first.position,
        "at": first.at,
        "principal": first.principal,
        "trace_id": first.trace_id and first.trace_id.hex(),
        "amount": first.amount,
        "request": {"fields": _asked(requested(first)), "encoded": first.request.hex()},
        "parts": [_part(part) for part in parts],
        "digest": first.digest.hex(),
    }


def _asked(operation: Operation) -> dict[str, Any]:
    asked = {
        name: _plain(value)
        for name, value in _attributes(operation).items()
        if name not in ("operation_id", "root_id", "budget_id", "trace_id", "authority", "dry_run")
    }
    return {"authority": _AUTHORITY[type(operation.authority)]} | _said(asked)


def _attributes(value: Operation | Child | Usage) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _part(entry: Entry) -> dict[str, Any]:
    return {
        "budget_id": entry.budget_id.hex(),
        "seq": entry.seq,
        "consumed": entry.consumed and entry.consumed.hex(),
        "balances": entry.money._asdict(),
        "effect": {"fields": _done(entry.effect), "encoded": entry.effect_bytes.hex()},
        "previous_hash": entry.previous_hash.hex(),
        "hash": entry.hash.hex(),
    }


def _done(effect: Effect) -> dict[str, Any]:
    changes = {name: by for name, by in effect.changes._asdict().items() if by}
    told = effect._asdict() | {"changes": changes}
    return {name: _plain(value) for name, value in told.items() if value}


def _plain(value: Any) -> Any:  # noqa: PLR0911 - one case for each type
    """As JSON has it."""
    match value:
        case bytes():
            return value.hex()
        case Hold():
            told = value._asdict()
            del told["budget_id"], told["token"]
            return {name: _plain(each) for name, each in told.items() if each}
        case Usage() | Child():
            return _said({name: _plain(each) for name, each in _attributes(value).items()})
        case AtomicBatch():
            return [value.batch_id.hex(), value.size]
        case Rotation():
            return [value.hold_id.hex(), value.next_token_id.hex()]
        case ((str(), str()), *_):
            return dict(value)
        case _:
            return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _said(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was not said."""
    return {
        name: value
        for name, value in asked.items()
        if value or (isinstance(value, int) and not isinstance(value, bool))
    }


def text() -> str:
    """The contents of the file."""
    return json.dumps(made(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
