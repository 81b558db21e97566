"""The verb that tells of stolen capabilities: secrets that another showed than whose they were."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from peculium import Reach, SecurityEvent
from peculium_server.cli.options import (
    ApiKey,
    Insecure,
    Json,
    Since,
    Target,
    Timeout,
    Until,
    connect,
    parse_time,
    reference,
)
from peculium_server.cli.output import (
    new_table,
    print_json,
    time_text,
    told,
    told_json,
    wide_console,
)


def security_events(
    *,
    budget: Annotated[
        str | None,
        typer.Argument(
            help="Of this budget and all below it: a path or ids. Absent: of any.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            help="Of this kind: consumed_token, consumed_hold_token, bound_token; may be repeated: any of"
            " them.",
        ),
    ] = None,
    since: Since = None,
    until: Until = None,
    oldest_first: Annotated[
        bool, typer.Option("--oldest-first", help="In the order of time.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 50,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show where a secret was shown by another principal than whose it was, the latest first.

    A token that two principals present was stolen, or handed over and used once more.

    peculium audit security-events acme --since 2026-11-01T14:00

    peculium audit security-events --kind consumed_token --kind bound_token
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        listed = itertools.islice(
            client.audit.security_events(
                None if budget is None else reference(budget),
                reach=Reach.SUBTREE,
                kinds=[each.upper() for each in kind or ()],
                since=parse_time("--since", since),
                until=parse_time("--until", until),
                descending=not oldest_first,
            ),
            limit or None,
        )
        if json:
            for event in listed:
                print_json(_event_json(event))
        else:
            _print_events(listed)


def _event_json(event: SecurityEvent) -> dict[str, Any]:
    return {
        "event_id": event.event_id,
        "at": time_text(event.at),
        "kind": event.kind,
        "count": event.count,
        **told_json(event.ref),
        "principal": event.principal or None,
        "operation_id": event.operation_id,
        "consumed_by": event.consumed_by,
        "consumed_operation_id": event.consumed_operation_id,
        "consumed_kind": event.consumed_kind,
        "consumed_at": time_text(event.consumed_at),
        "holder": event.holder,
        "freeze_id": event.freeze_id,
    }


def _print_events(listed: Iterable[SecurityEvent]) -> None:
    table = new_table("at", "kind", "budget", "shown by", "whose", "frozen", right=("count",))
    for event in listed:
        table.add_row(
            event.at.strftime("%Y-%m-%d %H:%M:%S"),
            event.kind,
            told(event.ref),
            event.principal,
            _whose(event),
            "" if event.freeze_id is None else "yes",
            str(event.count),
        )
    wide_console().print(table)


def _whose(event: SecurityEvent) -> str:
    if event.consumed_by is None or event.consumed_at is None:
        return event.holder or ""
    at = event.consumed_at.strftime("%Y-%m-%d %H:%M:%S")
    return f"{event.consumed_by} ({event.consumed_kind} at {at})"
