"""From the wire's messages to the values that auditors see."""

from __future__ import annotations

from peculium import _codec as codec
from peculium.audit import Movement, Statement, UsageGroup, UsageReport, Watched
from peculium.v1 import audit_service_pb2 as audit


def statement(message: audit.GetStatementResponse) -> Statement:
    """What moved in a period."""
    return Statement(
        unit=message.unit,
        since=codec.at(getattr(message, "from")),
        until=codec.at(message.until),
        opening=codec.balances(message.opening),
        movements=tuple(
            Movement(
                kind=codec.kind(each.kind),
                operations=each.operations,
                entries=each.entries,
                changes=codec.balances(each.changes),
            )
            for each in message.movements
        ),
        closing=codec.balances(message.closing),
        used_opening=message.used_opening,
        used_closing=message.used_closing,
        disputed_closing=message.disputed_closing,
        budgets=message.budgets,
        ledger=codec.position(message.ledger),
    )


def usage(message: audit.GetUsageResponse) -> UsageReport:
    """What was spent in a period."""
    return UsageReport(
        unit=message.unit,
        groups=tuple(map(_group, message.groups)),
        total=_group(message.total),
        ledger=codec.position(message.ledger),
    )


def watched(message: audit.WatchEntriesResponse) -> Watched:
    """What was recorded."""
    return Watched(tuple(map(codec.entry_info, message.entries)), message.cursor)


def _group(message: audit.UsageGroup) -> UsageGroup:
    return UsageGroup(
        keys=tuple(message.keys),
        operations=message.operations,
        spent=message.spent,
        forfeited=message.forfeited,
        estimated=message.estimated,
        input_tokens=message.input_tokens,
        output_tokens=message.output_tokens,
        cached_tokens=message.cached_tokens,
    )
