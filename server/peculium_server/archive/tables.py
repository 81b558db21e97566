"""Entries as rows of a table, decoded, for analysis."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final

from peculium_server.core.encoding import decode_effect, request_fields
from peculium_server.core.offline.records import Recorded
from peculium_server.core.state import Balances
from peculium_server.core.times import moment

COLUMNS: Final[dict[str, type]] = {
    "root_id": str,
    "budget_id": str,
    "lane": int,
    "position": int,
    "part": int,
    "parts": int,
    "seq": int,
    "operation_id": str,
    "kind": str,
    "at": datetime,
    "principal": str,
    "trace_id": str,
    "consumed": str,
    "amount": int,
    **{f"change_{name}": int for name in Balances._fields},
    **dict.fromkeys(Balances._fields, int),
    "disputed": int,
    "closed": bool,
    "frozen": bool,
    "hold_id": str,
    "hold_state": str,
    "hold_amount": int,
    "hold_booked": int,
    "labels": str,
    "reference": str,
    "reason": str,
    "provider": str,
    "model": str,
    "input_tokens": int,
    "output_tokens": int,
    "cached_tokens": int,
    "estimated": bool,
    "hash": str,
}
"""What the columns are called, and of what type. All can be absent."""


def row_of(recorded: Recorded) -> dict[str, Any]:
    """An entry as a row. What was asked for is in the row of part 0 only.

    Raises:
        ValueError: Its request or effect cannot be decoded.
    """
    lane, entry = recorded
    effect = decode_effect(entry.effect_bytes, entry.budget_id)
    asked = {} if entry.request is None else request_fields(entry.kind, entry.request)
    usage, labels = asked.get("usage"), asked.get("labels")
    hold = effect.hold
    return {
        "root_id": entry.root_id.hex(),
        "budget_id": entry.budget_id.hex(),
        "lane": lane,
        "position": entry.position,
        "part": entry.part,
        "parts": entry.parts,
        "seq": entry.seq,
        "operation_id": entry.operation_id.hex(),
        "kind": entry.kind.name,
        "at": moment(entry.at),
        "principal": entry.principal,
        "trace_id": None if entry.trace_id is None else entry.trace_id.hex(),
        "consumed": None if entry.consumed is None else entry.consumed.hex(),
        "amount": entry.amount,
        **{f"change_{name}": value for name, value in effect.changes._asdict().items()},
        **entry.money._asdict(),
        "disputed": effect.disputed,
        "closed": effect.closed,
        "frozen": effect.frozen,
        "hold_id": None if hold is None else hold.hold_id.hex(),
        "hold_state": None if hold is None else hold.state.name,
        "hold_amount": None if hold is None else hold.amount,
        "hold_booked": None if hold is None else hold.booked,
        "labels": None if labels is None else json.dumps(dict(labels), ensure_ascii=False),
        "reference": asked.get("reference"),
        "reason": asked.get("reason"),
        "provider": None if usage is None else usage.provider,
        "model": None if usage is None else usage.model,
        "input_tokens": None if usage is None else usage.input_tokens,
        "output_tokens": None if usage is None else usage.output_tokens,
        "cached_tokens": None if usage is None else usage.cached_tokens,
        "estimated": asked.get("estimated", False) if entry.request else None,
        "hash": entry.hash.hex(),
    }
