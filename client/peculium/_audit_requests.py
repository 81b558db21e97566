"""What auditors ask, as messages. Checked first, so that a mistake costs no call."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from peculium._requests import budget_ref, malformed
from peculium._times import microseconds
from peculium.audit import BudgetFilter, EntryFilter, Reach
from peculium.capability import BudgetRef
from peculium.v1 import audit_service_pb2 as audit, types_pb2

_REACHES = {
    Reach.BUDGET: audit.REACH_BUDGET,
    Reach.SUBTREE: audit.REACH_SUBTREE,
    Reach.TREE: audit.REACH_TREE,
}
_KIND_PREFIX = "OPERATION_KIND_"
_REASON_PREFIX = "REFUSAL_REASON_"
_SECURITY_EVENT_PREFIX = "SECURITY_EVENT_KIND_"
_LABEL_PREFIX = "label:"
_BY = {
    "day": audit.UsageGrouping.BY_DAY,
    "model": audit.UsageGrouping.BY_MODEL,
    "principal": audit.UsageGrouping.BY_PRINCIPAL,
    "budget": audit.UsageGrouping.BY_BUDGET,
    "provider": audit.UsageGrouping.BY_PROVIDER,
}


def budget(
    budget: str | BudgetRef, as_of: datetime | None, *, sum_subtree: bool
) -> audit.GetBudgetRequest:
    """Ask for a budget, as it is or as it was."""
    return audit.GetBudgetRequest(
        budget=budget_ref(budget), as_of=_time("as_of", as_of), sum_subtree=sum_subtree
    )


def budgets(
    below: str | BudgetRef | None, selected: BudgetFilter | None, page_size: int
) -> audit.ListBudgetsRequest:
    """Ask for a list of budgets."""
    return audit.ListBudgetsRequest(
        below=None if below is None else budget_ref(below),
        page_size=page_size,
        filter=None if selected is None else _budget_filter(selected),
    )


def entries(
    budget: str | BudgetRef,
    reach: Reach,
    selected: EntryFilter | None,
    page_size: int,
    *,
    descending: bool,
) -> audit.ListEntriesRequest:
    """Ask for a list of entries."""
    return audit.ListEntriesRequest(
        budget=budget_ref(budget),
        reach=_REACHES[reach],
        page_size=page_size,
        descending=descending,
        filter=None if selected is None else entry_filter(selected),
    )


def lineage(budget: str | BudgetRef, page_size: int) -> audit.GetLineageRequest:
    """Ask where a budget comes from."""
    return audit.GetLineageRequest(budget=budget_ref(budget), page_size=page_size)


def statement(
    budget: str | BudgetRef, reach: Reach, since: datetime | None, until: datetime | None
) -> audit.GetStatementRequest:
    """Ask what moved in a period."""
    request = audit.GetStatementRequest(
        budget=budget_ref(budget), reach=_REACHES[reach], until=_time("until", until)
    )
    _since(request, since)
    return request


def usage(
    budget: str | BudgetRef,
    by: Sequence[str],
    reach: Reach,
    since: datetime | None,
    until: datetime | None,
) -> audit.GetUsageRequest:
    """Ask what was spent in a period, by group."""
    if isinstance(by, str):
        raise malformed("by", "is a sequence of things to group by")
    request = audit.GetUsageRequest(
        budget=budget_ref(budget),
        reach=_REACHES[reach],
        until=_time("until", until),
        group_by=[_grouping(each) for each in by],
    )
    _since(request, since)
    return request


def watch(
    budget: str | BudgetRef | None,
    reach: Reach,
    selected: EntryFilter | None,
    cursor: bytes | None,
    *,
    from_beginning: bool,
    alerts: bool = False,
) -> audit.WatchEntriesRequest:
    """Ask for what is recorded."""
    return audit.WatchEntriesRequest(
        budget=None if budget is None else budget_ref(budget),
        reach=audit.REACH_UNSPECIFIED if budget is None else _REACHES[reach],
        filter=None if selected is None else entry_filter(selected),
        cursor=cursor or b"",
        from_beginning=from_beginning,
        alerts=alerts,
    )


def refusals(
    budget: str | BudgetRef | None,
    reach: Reach,
    reasons: Sequence[str],
    since: datetime | None,
    until: datetime | None,
    page_size: int,
    *,
    descending: bool,
) -> audit.ListRefusalsRequest:
    """Ask for what was refused."""
    request = audit.ListRefusalsRequest(
        budget=None if budget is None else budget_ref(budget),
        reach=audit.REACH_UNSPECIFIED if budget is None else _REACHES[reach],
        reasons=[_reason(reason) for reason in reasons],
        until=_time("until", until),
        page_size=page_size,
        descending=descending,
    )
    _since(request, since)
    return request


def security_events(
    budget: str | BudgetRef | None,
    reach: Reach,
    kinds: Sequence[str],
    since: datetime | None,
    until: datetime | None,
    page_size: int,
    *,
    descending: bool,
) -> audit.ListSecurityEventsRequest:
    """Ask for secrets that were shown by others."""
    request = audit.ListSecurityEventsRequest(
        budget=None if budget is None else budget_ref(budget),
        reach=audit.REACH_UNSPECIFIED if budget is None else _REACHES[reach],
        kinds=[_security_event_kind(kind) for kind in kinds],
        until=_time("until", until),
        page_size=page_size,
        descending=descending,
    )
    _since(request, since)
    return request


def entry_filter(selected: EntryFilter) -> audit.EntryFilter:
    """Which entries are wanted."""
    message = audit.EntryFilter(
        kinds=[_kind(kind) for kind in selected.kinds],
        principals=selected.principals,
        operation_id=_operation_id(selected.operation_id),
        trace_id=_hexadecimal("trace_id", selected.trace_id),
        labels=selected.labels,
        until=_time("until", selected.until),
        hold_id=selected.hold_id or b"",
        reference=selected.reference,
    )
    _since(message, selected.since)
    return message


def _budget_filter(selected: BudgetFilter) -> audit.BudgetFilter:
    if selected.depth is not None and selected.depth < 0:
        raise malformed("depth", "must not be negative")
    return audit.BudgetFilter(
        states=[state.value for state in selected.states],
        holder=selected.holder or "",
        labels=selected.labels,
        created_from=_time("since", selected.since),
        created_until=_time("until", selected.until),
        depth=selected.depth,
        name_prefix=selected.name_prefix,
    )


def _grouping(by: str) -> audit.UsageGrouping:
    if by.startswith(_LABEL_PREFIX):
        label = by.removeprefix(_LABEL_PREFIX)
        return audit.UsageGrouping(by=audit.UsageGrouping.BY_LABEL, label=label)
    if by not in _BY:
        known = ", ".join(_BY)
        raise malformed("by", f"{by!r} is none of {known}, {_LABEL_PREFIX}NAME")
    return audit.UsageGrouping(by=_BY[by])


def _kind(name: str) -> types_pb2.OperationKind.ValueType:
    try:
        return types_pb2.OperationKind.Value(_KIND_PREFIX + name)
    except ValueError:
        raise malformed("kinds", f"{name!r} is no kind of operation") from None


def _reason(name: str) -> types_pb2.RefusalReason.ValueType:
    try:
        return types_pb2.RefusalReason.Value(_REASON_PREFIX + name)
    except ValueError:
        raise malformed("reasons", f"{name!r} is no reason of a refusal") from None


def _security_event_kind(name: str) -> audit.SecurityEventKind.ValueType:
    try:
        return audit.SecurityEventKind.Value(_SECURITY_EVENT_PREFIX + name)
    except ValueError:
        raise malformed("kinds", f"{name!r} is no kind of security event") from None


def _operation_id(text: str | None) -> bytes:
    try:
        return b"" if text is None else UUID(text).bytes
    except ValueError:
        raise malformed("operation_id", "must be a UUID") from None


def _hexadecimal(field: str, text: str | None) -> bytes:
    try:
        return b"" if text is None else bytes.fromhex(text)
    except ValueError:
        raise malformed(field, "must be hexadecimal digits") from None


def _since(
    message: audit.GetStatementRequest
    | audit.GetUsageRequest
    | audit.EntryFilter
    | audit.ListRefusalsRequest
    | audit.ListSecurityEventsRequest,
    since: datetime | None,
) -> None:
    """Set what is a word of Python's own."""
    stamp = _time("since", since)
    if stamp is not None:
        getattr(message, "from").CopyFrom(stamp)


def _time(field: str, moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    if moment.tzinfo is None:
        raise malformed(field, "must say its time zone")
    seconds, rest = divmod(microseconds(moment), 1_000_000)
    return Timestamp(seconds=seconds, nanos=rest * 1000)
