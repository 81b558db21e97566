"""The verbs for auditors that sum up what was recorded, and follow it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from peculium import (
    Alert,
    BudgetInfo,
    BudgetRef,
    Client,
    EntryFilter,
    EntryInfo,
    Reach,
    Statement,
    UsageGroup,
    UsageReport,
    Watched,
)
from peculium.values import Balances
from peculium_server.cli.alerts import alert_json, alert_text
from peculium_server.cli.amounts import show_amount
from peculium_server.cli.options import (
    ApiKey,
    Budget,
    Insecure,
    Json,
    Kinds,
    Labels,
    Principals,
    Since,
    Target,
    Timeout,
    Until,
    connect,
    parse_kinds,
    parse_labels,
    parse_time,
    reference,
)
from peculium_server.cli.output import (
    balances_json,
    entry_json,
    new_table,
    print_json,
    print_line,
    time_text,
    wide_console,
)
from peculium_server.core.refusals import id_text

_BUDGETS_MAX = 10_000
"""Budgets whose paths are remembered while they are followed."""

Alone = Annotated[bool, typer.Option("--alone", help="Without what is below the budget.")]


def statement(
    *,
    budget: Budget,
    since: Since = None,
    until: Until = None,
    alone: Alone = False,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 60,
    json: Json = False,
) -> None:
    """Sum up what moved in a period: opening, movements by kind of operation, closing.

    A budget with all below it is stated as one account: what they delegate to each other is inside.

    peculium audit statement acme

    peculium audit statement acme/research --since 2026-11-01 --until 2026-12-01
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        told = client.audit.statement(
            reference(budget),
            reach=_reach(alone=alone),
            since=parse_time("--since", since),
            until=parse_time("--until", until),
        )
    if json:
        print_json(_statement_json(told))
    else:
        _print_statement(told)


def usage(
    *,
    budget: Budget,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="What to group by: day, model, principal, budget, provider, label:NAME; may be repeated."
        ),
    ] = None,
    since: Since = None,
    until: Until = None,
    alone: Alone = False,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 60,
    json: Json = False,
) -> None:
    """Attribute what was spent in a period.

    peculium audit usage acme --by day --by model

    peculium audit usage acme --by label:team --since 2026-11-01
    """
    groupings = by or []
    with connect(target, api_key, allow_insecure, timeout) as client:
        told = client.audit.usage(
            reference(budget),
            groupings,
            reach=_reach(alone=alone),
            since=parse_time("--since", since),
            until=parse_time("--until", until),
        )
    if json:
        for group in told.groups:
            print_json(_group_json(group, groupings, told.unit))
    else:
        _print_usage(told, groupings)


def watch(
    *,
    budget: Annotated[
        str | None,
        typer.Argument(
            help="Its path or ids; with all below it. Absent: the whole ledger.", show_default=False
        ),
    ] = None,
    alone: Alone = False,
    kind: Kinds = None,
    principal: Principals = None,
    label: Labels = None,
    from_beginning: Annotated[
        bool, typer.Option("--from-beginning", help="Everything that was recorded, first.")
    ] = False,
    cursor: Annotated[
        str | None,
        typer.Option(help="Go on behind this one, as --json tells it.", show_default=False),
    ] = None,
    alerts: Annotated[
        bool, typer.Option("--alerts", help="Alerts too, of rules on what is followed.")
    ] = False,
    limit: Annotated[
        int, typer.Option(min=0, help="End after so many entries and alerts; 0: never.")
    ] = 0,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Follow what is recorded, as it is recorded; goes on by itself when a server is lost.

    With --json, the last entry or alert of each message has the cursor to go on with; an alert is under
    the key alert.

    peculium audit watch

    peculium audit watch acme --kind settle --kind spend
    """
    selected = EntryFilter(
        kinds=parse_kinds(kind),
        principals=principal or (),
        labels=parse_labels(label),
    )
    with connect(target, api_key, allow_insecure, timeout) as client:
        watching = client.audit.watch(
            None if budget is None else reference(budget),
            reach=_reach(alone=alone),
            selected=selected,
            cursor=_cursor(cursor),
            from_beginning=from_beginning,
            alerts=alerts,
        )
        names = _Names(client)
        try:
            for number, (told, behind) in enumerate(_told(watching), start=1):
                if isinstance(told, Alert):
                    _tell_alert(told, behind, json=json)
                elif json:
                    print_json({**entry_json(told), "cursor": behind})
                else:
                    print_line(_line(told, names.of(told)))
                if number == limit:
                    return
        except KeyboardInterrupt:
            # How everybody ends it.
            return


def _told(watching: Iterator[Watched]) -> Iterator[tuple[EntryInfo | Alert, str | None]]:
    """Each entry and alert, the last one of a message with the cursor to go on with."""
    for watched in watching:
        if watched.alerts_forgotten:
            told = f"{watched.alerts_forgotten} alerts are kept no longer, and are not told"
            Console(stderr=True).print(Text(told))
        both: list[EntryInfo | Alert] = [*watched.entries, *watched.alerts]
        for left, each in zip(range(len(both) - 1, -1, -1), both, strict=True):
            yield each, None if left else watched.cursor.hex()


def _tell_alert(alert: Alert, behind: str | None, *, json: bool) -> None:
    if json:
        print_json({"alert": alert_json(alert), "cursor": behind})
    else:
        print_line(f"{time_text(alert.at)}  ALERT     {alert.path}  {alert_text(alert)}")


class _Names:
    """Knows the budgets that were met, by asking for each once."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: dict[bytes, BudgetInfo] = {}

    def of(self, entry: EntryInfo) -> BudgetInfo:
        """The budget of an entry."""
        if len(self._known) >= _BUDGETS_MAX:
            self._known.clear()
        known = self._known.get(entry.budget_id)
        if known is None:
            known = self._client.audit.budget(BudgetRef("", entry.root_id, entry.budget_id))
            self._known[entry.budget_id] = known
        return known


def _line(entry: EntryInfo, budget: BudgetInfo) -> str:
    amount = show_amount(entry.amount, budget.unit)
    available = show_amount(entry.balances.available, budget.unit)
    at = time_text(entry.at)
    return (
        f"{at}  {entry.kind.lower():<8}  {budget.ref.path}  {amount}  by {entry.actor}"
        f"  available {available}"
    )


# -- What is asked ------------------------------------------------------------------------------------


def _reach(*, alone: bool) -> Reach:
    return Reach.BUDGET if alone else Reach.SUBTREE


def _cursor(text: str | None) -> bytes | None:
    try:
        return None if text is None else bytes.fromhex(text)
    except ValueError:
        raise typer.BadParameter(f"--cursor: {text!r} is none") from None


# -- What is told -------------------------------------------------------------------------------------


def _statement_json(told: Statement) -> dict[str, Any]:
    return {
        "unit": told.unit,
        "since": time_text(told.since),
        "until": time_text(told.until),
        "opening": balances_json(told.opening),
        "movements": [
            {
                "kind": each.kind,
                "operations": each.operations,
                "entries": each.entries,
                "changes": balances_json(each.changes),
            }
            for each in told.movements
        ],
        "closing": balances_json(told.closing),
        "used_opening": told.used_opening,
        "used_closing": told.used_closing,
        "disputed_closing": told.disputed_closing,
        "budgets": told.budgets,
        "ledger": {
            "incarnation": id_text(told.ledger.incarnation),
            "lane": told.ledger.lane,
            "position": told.ledger.position,
        },
    }


def _print_statement(told: Statement) -> None:
    """Print a statement; balances that are never anything but zero are left out."""
    rows = [
        ("opening", "", told.opening),
        *((each.kind.lower(), f"{each.operations:,}", each.changes) for each in told.movements),
        ("closing", "", told.closing),
    ]
    names = [
        name
        for name in balances_json(told.closing)
        if any(getattr(money, name) for _, _, money in rows)
    ]
    table = new_table("", right=("operations", *names))
    for number, (what, operations, money) in enumerate(rows):
        style = "bold" if number in (0, len(rows) - 1) else ""
        table.add_row(Text(what), operations, *_amounts(money, names, told.unit), style=style)
    wide_console().print(table)
    budgets = "1 budget" if told.budgets == 1 else f"{told.budgets:,} budgets"
    print_line(f"{budgets}, from {time_text(told.since)} until before {time_text(told.until)}")
    used = show_amount(told.used_closing - told.used_opening, told.unit)
    print_line(f"used in that time: {used}")
    if told.disputed_closing:
        print_line(f"disputed at its end: {show_amount(told.disputed_closing, told.unit)}")


def _amounts(money: Balances, names: list[str], unit: str) -> Iterator[str]:
    for name in names:
        amount = getattr(money, name)
        yield show_amount(amount, unit) if amount else "0"


def _group_json(group: UsageGroup, groupings: list[str], unit: str) -> dict[str, Any]:
    return {
        "group": dict(zip(groupings, group.keys, strict=True)),
        "unit": unit,
        "operations": group.operations,
        "spent": group.spent,
        "forfeited": group.forfeited,
        "estimated": group.estimated,
        "input_tokens": group.input_tokens,
        "output_tokens": group.output_tokens,
        "cached_tokens": group.cached_tokens,
    }


def _print_usage(told: UsageReport, groupings: list[str]) -> None:
    table = new_table(
        *(groupings or [""]),
        right=("operations", "spent", "forfeited", "input tokens", "output tokens"),
    )
    for group in told.groups if groupings else ():
        table.add_row(*(Text(key or "-") for key in group.keys), *_figures(group, told.unit))
    first = ("total", *[""] * (len(groupings) - 1))
    table.add_row(*first, *_figures(told.total, told.unit), style="bold")
    wide_console().print(table)


def _figures(group: UsageGroup, unit: str) -> Iterator[str]:
    yield f"{group.operations:,}"
    yield show_amount(group.spent, unit)
    yield show_amount(group.forfeited, unit)
    yield f"{group.input_tokens:,}"
    yield f"{group.output_tokens:,}"
