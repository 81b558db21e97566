"""The verb that tells why agents were stopped: what was refused, by minute."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from peculium import Reach, RefusalCount
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


def refusals(
    *,
    budget: Annotated[
        str | None,
        typer.Argument(
            help="Of this budget and all below it: a path or ids. Absent: of any.",
            show_default=False,
        ),
    ] = None,
    reason: Annotated[
        list[str] | None,
        typer.Option(
            "--reason", help="For this reason, as budget_exhausted; may be repeated: any of them."
        ),
    ] = None,
    since: Since = None,
    until: Until = None,
    oldest_first: Annotated[
        bool, typer.Option("--oldest-first", help="In the order of minutes.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="At most so many rows; 0: all.")] = 50,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show how often budgets were refused what, by minute, the latest first.

    It is no part of the record: servers count refusals, and keep the counts for some days.

    peculium audit refusals acme --since 2026-11-01T14:00 --until 2026-11-01T14:10

    peculium audit refusals --reason budget_exhausted --limit 10
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        listed = itertools.islice(
            client.audit.refusals(
                None if budget is None else reference(budget),
                reach=Reach.SUBTREE,
                reasons=[each.upper() for each in reason or ()],
                since=parse_time("--since", since),
                until=parse_time("--until", until),
                descending=not oldest_first,
            ),
            limit or None,
        )
        if json:
            for counted in listed:
                print_json(_refusal_json(counted))
        else:
            _print_refusals(listed)


def _refusal_json(counted: RefusalCount) -> dict[str, Any]:
    return {
        "minute": time_text(counted.minute),
        "reason": counted.reason,
        "count": counted.count,
        **told_json(counted.ref),
    }


def _print_refusals(listed: Iterable[RefusalCount]) -> None:
    table = new_table("minute", "reason", "budget", right=("count",))
    for counted in listed:
        minute = counted.minute.strftime("%Y-%m-%d %H:%M")
        table.add_row(minute, counted.reason, told(counted.ref), str(counted.count))
    wide_console().print(table)
