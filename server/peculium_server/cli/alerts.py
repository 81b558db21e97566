"""The verbs about alerts: what is watched for, and what was found."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final

import typer
from rich.text import Text

from peculium import Alert, AlertKind, AlertRule
from peculium_server.cli.amounts import parse_amount, show_amount
from peculium_server.cli.options import (
    ApiKey,
    Budget,
    Insecure,
    Json,
    Target,
    Timeout,
    connect,
    parse_id,
    reference,
)
from peculium_server.cli.output import (
    new_table,
    print_json,
    print_line,
    time_text,
    wide_console,
)
from peculium_server.core.refusals import id_text

app = typer.Typer(no_args_is_help=True, help="Be told of what happens: rules, and what they found.")

Below = Annotated[
    str | None,
    typer.Argument(
        help="A path or ids: of rules on it and below it. Absent: the whole ledger.",
        show_default=False,
    ),
]
RuleId = Annotated[str, typer.Argument(help="The rule's id, as it is printed.", show_default=False)]

_EVENTS: Final = {
    "dispute": AlertKind.DISPUTE,
    "overrun": AlertKind.OVERRUN,
    "freeze": AlertKind.FREEZE,
}


@app.command()
def create(
    *,
    budget: Budget,
    used: Annotated[
        list[str] | None,
        typer.Option(
            help="So much of the subtree is used: 80%, 12.50usd, or a whole number of the unit; may be"
            " repeated."
        ),
    ] = None,
    dispute: Annotated[
        bool, typer.Option("--dispute", help="A dispute was opened in the subtree.")
    ] = False,
    overrun: Annotated[
        bool, typer.Option("--overrun", help="The tree was billed beyond what it had.")
    ] = False,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="An admin has frozen it, or something below or above.")
    ] = False,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Have something watched for in the subtree of a budget; each thing is a rule.

    peculium alerts create acme --used 50% --used 80% --used 100%

    peculium alerts create acme/research --used 12.50usd --dispute --overrun --freeze
    """
    events = {"dispute": dispute, "overrun": overrun, "freeze": freeze}
    wanted = [_EVENTS[name] for name, said in events.items() if said]
    if not used and not wanted:
        raise typer.BadParameter("say what to watch for: --used, --dispute, --overrun, --freeze")
    with connect(target, api_key, allow_insecure, timeout) as client:
        found = client.audit.budget(reference(budget))
        thresholds = [_threshold(each, found.unit) for each in used or ()]
        rules = [client.alerts.create(found.ref, **each) for each in thresholds]
        rules += [client.alerts.create(found.ref, kind) for kind in wanted]
    _tell_rules(rules, json=json)


@app.command()
def rules(
    *,
    budget: Below = None,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show what is watched for.

    peculium alerts rules

    peculium alerts rules acme/research
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        found = client.alerts.rules(None if budget is None else reference(budget))
        _tell_rules(found, json=json)


@app.command()
def delete(
    *,
    rule: RuleId,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """End a rule. What it has found stays.

    peculium alerts delete 019acd1e-6d3a-7c11-8a4e-0f3f5a0f7c11
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        ended = client.alerts.delete(_id(rule))
    if json:
        print_json(_rule_json(ended))
        return
    print_line(f"{_condition(ended)} of {ended.path} is watched for no more")


@app.command("list")
def found(
    *,
    budget: Below = None,
    oldest_first: Annotated[
        bool, typer.Option("--oldest-first", help="In the order of recording.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 50,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show what was found, the latest first.

    peculium alerts list

    peculium alerts list acme --oldest-first --limit 0 --json
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        listed = itertools.islice(
            client.alerts.found(
                None if budget is None else reference(budget), descending=not oldest_first
            ),
            limit or None,
        )
        if json:
            for alert in listed:
                print_json(alert_json(alert))
        else:
            _print_alerts(listed)


# -- What is asked ------------------------------------------------------------------------------------


def _threshold(text: str, unit: str) -> dict[str, Any]:
    """A threshold as it is written: a share, or an amount of the tree's unit."""
    if not text.endswith("%"):
        return {"amount": parse_amount(text, unit)[0]}
    try:
        return {"percent": float(text[:-1])}
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no share: write 80%") from None


def _id(text: str) -> bytes:
    return parse_id(text) or b""


# -- What is told -------------------------------------------------------------------------------------


def _tell_rules(rules: Iterable[AlertRule], *, json: bool) -> None:
    if json:
        for rule in rules:
            print_json(_rule_json(rule))
        return
    table = new_table("budget", "watched for", "state", right=("crossed",), whole=("rule",))
    for rule in rules:
        used = rule.kind is AlertKind.USED
        table.add_row(
            Text(rule.path),
            _condition(rule),
            "armed" if rule.armed else "crossed",
            str(rule.crossings) if used else "",
            id_text(rule.rule_id),
        )
    wide_console().print(table)


def _condition(rule: AlertRule) -> str:
    if rule.percent is not None:
        return f"{rule.percent:g}% used"
    if rule.amount is not None:
        return f"{show_amount(rule.amount, rule.unit)} used"
    return rule.kind.name.lower()


def _rule_json(rule: AlertRule) -> dict[str, Any]:
    return {
        "rule_id": id_text(rule.rule_id),
        "path": rule.path,
        "root_id": id_text(rule.root_id),
        "budget_id": id_text(rule.budget_id),
        "unit": rule.unit,
        "kind": rule.kind.name.lower(),
        "percent": rule.percent,
        "amount": rule.amount,
        "armed": rule.armed,
        "crossings": rule.crossings,
        "created_at": time_text(rule.created_at),
        "created_by": rule.created_by,
        "deleted_at": time_text(rule.deleted_at),
        "deleted_by": rule.deleted_by,
    }


def _print_alerts(alerts: Iterable[Alert]) -> None:
    table = new_table("at", "budget", "what", right=("number",), whole=("alert",))
    for alert in alerts:
        table.add_row(
            time_text(alert.at),
            Text(alert.path),
            Text(alert_text(alert)),
            str(alert.number),
            id_text(alert.alert_id),
        )
    wide_console().print(table)


def alert_text(alert: Alert) -> str:
    """What has happened, for people."""
    return " ".join(_said(alert))


def _said(alert: Alert) -> Iterator[str]:
    amount = show_amount(alert.amount, alert.unit)
    if alert.kind is AlertKind.USED:
        threshold = show_amount(alert.threshold or 0, alert.unit)
        granted = show_amount(alert.granted or 0, alert.unit)
        yield f"used {amount}, which is at least {threshold}, of {granted}"
        return
    if alert.kind is AlertKind.DISPUTE:
        yield f"disputed {amount}"
    elif alert.kind is AlertKind.OVERRUN:
        yield f"billed {amount} beyond what there was"
    else:
        yield alert.kind.name.lower()
    if alert.source_id != alert.budget_id:
        yield f"in {alert.source_path}"
    yield f"by {alert.principal}"


def alert_json(alert: Alert) -> dict[str, Any]:
    """An alert for machines; amounts are integers of the unit."""
    return {
        "number": alert.number,
        "alert_id": id_text(alert.alert_id),
        "rule_id": id_text(alert.rule_id),
        "path": alert.path,
        "root_id": id_text(alert.root_id),
        "budget_id": id_text(alert.budget_id),
        "unit": alert.unit,
        "kind": alert.kind.name.lower(),
        "at": time_text(alert.at),
        "recorded_at": time_text(alert.recorded_at),
        "amount": alert.amount,
        "threshold": alert.threshold,
        "granted": alert.granted,
        "source_path": alert.source_path,
        "source_id": id_text(alert.source_id),
        "operation_id": alert.operation_id,
        "hold_id": None if alert.hold_id is None else id_text(alert.hold_id),
        "principal": alert.principal,
    }
