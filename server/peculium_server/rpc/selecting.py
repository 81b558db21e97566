"""Filters as the wire has them, checked: which budgets and entries somebody asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from google.protobuf.message import Message

from peculium.v1 import audit_service_pb2
from peculium.v1.audit_service_pb2 import BudgetFilter, EntryFilter
from peculium_server.core import limits
from peculium_server.core.operations import Kind, Labels
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.selection import Period, Selection
from peculium_server.core.shape import labels_problem, text_problem
from peculium_server.core.state import BudgetState
from peculium_server.rpc.calls import CallRefused
from peculium_server.rpc.times import read_time
from peculium_server.store.lists import BudgetSelection, Reach

PRINCIPALS_MAX: Final = 100
"""Principals that one filter names."""

_TRACE_ID_BYTES: Final = 16


def read_reach(reach: audit_service_pb2.Reach.ValueType) -> Reach:
    """How far around a budget a question reaches.

    Raises:
        CallRefused: MALFORMED.
    """
    if reach == audit_service_pb2.REACH_UNSPECIFIED:
        return Reach.BUDGET
    try:
        return Reach(reach)
    except ValueError:
        raise CallRefused.malformed("reach", f"there is no reach {reach}") from None


def read_budget_filter(
    message: BudgetFilter,
) -> tuple[BudgetSelection, frozenset[BudgetState]]:
    """Which budgets are selected, and in which states; none: in any.

    Raises:
        CallRefused: MALFORMED, TOO_LARGE.
    """
    _read_text("filter.name_prefix", message.name_prefix, limits.NAME_BYTES_MAX)
    _read_text("filter.holder", message.holder, limits.PRINCIPAL_BYTES_MAX)
    since, until = read_period(message, "created_from", "created_until", within="filter.")
    states = set()
    for state in message.states:
        try:
            states.add(BudgetState(state))
        except ValueError:
            raise CallRefused.malformed("filter.states", f"there is no state {state}") from None
    selection = BudgetSelection(
        holder=message.holder or None,
        labels=_read_labels("filter.labels", message.labels),
        created_from=since,
        created_until=until,
        # A tree is not deeper.
        depth=min(message.depth, limits.DEPTH_MAX) if message.HasField("depth") else None,
        name_prefix=message.name_prefix,
    )
    return selection, frozenset(states)


def read_selection(message: EntryFilter) -> Selection:
    """Which entries are wanted, whenever they were decided.

    Raises:
        CallRefused: Something in it cannot be, or it asks for a time.
    """
    for name in ("from", "until"):
        if message.HasField(name):
            raise CallRefused.malformed(f"filter.{name}", "is not for those who follow")
    return _read_selection(message)


def read_entry_filter(message: EntryFilter) -> tuple[Selection, Period]:
    """Which entries are wanted, and when they were decided.

    Raises:
        CallRefused: MALFORMED, TOO_LARGE.
    """
    return _read_selection(message), read_period(message, within="filter.")


def read_period(
    message: Message, since_name: str = "from", until_name: str = "until", *, within: str = ""
) -> Period:
    """The time that two fields of a message enclose; `within` is said before their names.

    Raises:
        CallRefused: MALFORMED.
    """
    since, until = (
        read_time(within + name, getattr(message, name)) if message.HasField(name) else None
        for name in (since_name, until_name)
    )
    if since is not None and until is not None and until < since:
        raise CallRefused.malformed(within + until_name, f"must not be before {since_name}")
    return Period(since, until)


def _read_selection(message: EntryFilter) -> Selection:
    kinds = set()
    for index, number in enumerate(message.kinds):
        try:
            kinds.add(Kind(number))
        except ValueError:
            problem = "must be a kind that this server knows"
            raise CallRefused.malformed(f"filter.kinds[{index}]", problem) from None
    _bounded("filter.principals", message.principals, PRINCIPALS_MAX)
    for principal in message.principals:
        _read_text("filter.principals", principal, limits.PRINCIPAL_BYTES_MAX, least=1)
    _read_text("filter.reference", message.reference, limits.REFERENCE_BYTES_MAX)
    return Selection(
        kinds=frozenset(kinds),
        principals=frozenset(message.principals),
        operation_id=_read_id("filter.operation_id", message.operation_id, limits.ID_BYTES),
        trace_id=_read_id("filter.trace_id", message.trace_id, _TRACE_ID_BYTES),
        labels=_read_labels("filter.labels", message.labels),
        hold_id=_read_id("filter.hold_id", message.hold_id, limits.ID_BYTES),
        reference=message.reference,
    )


def _read_labels(field: str, message: Mapping[str, str]) -> Labels:
    _bounded(field, message, limits.LABELS_MAX)
    labels = tuple(sorted(message.items()))
    problem = labels_problem(field, labels)
    if problem is not None:
        raise CallRefused.malformed(*problem)
    return labels


def _read_text(field: str, value: str, most: int, least: int = 0) -> None:
    problem = text_problem(field, value, most, least)
    if problem is not None:
        raise CallRefused.malformed(*problem)


def _read_id(field: str, value: bytes, length: int) -> bytes | None:
    if not value:
        return None
    if len(value) != length:
        raise CallRefused.malformed(field, f"must be {length} bytes")
    return value


def _bounded(field: str, values: Sequence[str] | Mapping[str, str], limit: int) -> None:
    if len(values) > limit:
        facts = {"field": field, "limit": str(limit), "size": str(len(values))}
        raise CallRefused(Refused(Refusal.TOO_LARGE, facts))
