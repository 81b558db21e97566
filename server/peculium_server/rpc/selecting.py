"""Filters as the wire has them, checked."""

from __future__ import annotations

from typing import Final

from peculium.v1.audit_service_pb2 import EntryFilter
from peculium_server.core.limits import ID_BYTES
from peculium_server.core.operations import Kind
from peculium_server.core.selection import Selection
from peculium_server.rpc.calls import CallRefused

_TRACE_ID_BYTES: Final = 16


def read_selection(field: str, message: EntryFilter) -> Selection:
    """Which entries are wanted, whenever they were decided.

    Raises:
        CallRefused: Something in it cannot be, or it asks for a time.
    """
    for name in ("from", "until"):
        if message.HasField(name):
            raise CallRefused.malformed(f"{field}.{name}", "is not for those who follow")
    kinds = set()
    for index, number in enumerate(message.kinds):
        try:
            kinds.add(Kind(number))
        except ValueError:
            problem = "must be a kind that this server knows"
            raise CallRefused.malformed(f"{field}.kinds[{index}]", problem) from None
    return Selection(
        kinds=frozenset(kinds),
        principals=frozenset(message.principals),
        operation_id=_id(f"{field}.operation_id", message.operation_id, ID_BYTES),
        trace_id=_id(f"{field}.trace_id", message.trace_id, _TRACE_ID_BYTES),
        labels=tuple(sorted(message.labels.items())),
        hold_id=_id(f"{field}.hold_id", message.hold_id, ID_BYTES),
        reference=message.reference,
    )


def _id(field: str, value: bytes, size: int) -> bytes | None:
    if not value:
        return None
    if len(value) != size:
        raise CallRefused.malformed(field, f"must be {size} bytes")
    return value
