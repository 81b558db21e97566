"""The verbs about webhooks: whom alerts are sent to, and what became of that."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from peculium import Delivery, DeliveryState, Webhook
from peculium_server.cli.options import (
    ApiKey,
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
from peculium_server.cli.problems import REFUSED
from peculium_server.core.refusals import id_text

app = typer.Typer(no_args_is_help=True, help="Have alerts sent, and see what became of them.")

WebhookId = Annotated[
    str, typer.Argument(help="The webhook's id, as it is printed.", show_default=False)
]


class State(Enum):
    """States of deliveries as they are written."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


@app.command()
def create(
    *,
    url: Annotated[
        str,
        typer.Argument(help="https; shown to admins, no place for a secret.", show_default=False),
    ],
    budget: Annotated[
        str | None,
        typer.Option(help="Only alerts of rules on this budget, a path or ids, and below it."),
    ] = None,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Have alerts sent to an address, from now on. Prints the secret that its messages are signed with.

    peculium webhooks create https://hooks.example.com/peculium

    peculium webhooks create https://hooks.example.com/research --budget acme/research
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        made = client.webhooks.create(url, budget=None if budget is None else reference(budget))
    if json:
        print_json({**_webhook_json(made), "secret": made.secret})
        return
    print_line(f"alerts of {made.path or 'the whole ledger'} are sent to {made.url}")
    print_line(f"webhook {id_text(made.webhook_id)}")
    print_line("its secret, for the receiver, which checks signatures with it:")
    print_line(made.secret or "")


@app.command("list")
def listed(
    *,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show whom alerts are sent to.

    peculium webhooks list
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        webhooks = client.webhooks.list()
    if json:
        for webhook in webhooks:
            print_json(_webhook_json(webhook))
        return
    table = new_table("address", "alerts of", "made", "by", whole=("webhook",))
    for webhook in webhooks:
        table.add_row(
            Text(webhook.url),
            Text(webhook.path or "the whole ledger"),
            time_text(webhook.created_at),
            Text(webhook.created_by),
            id_text(webhook.webhook_id),
        )
    wide_console().print(table)


@app.command()
def delete(
    *,
    webhook: WebhookId,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """End a webhook. What is pending for it is not sent any more.

    peculium webhooks delete 019acd1e-6d3a-7c11-8a4e-0f3f5a0f7c11
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        ended = client.webhooks.delete(_id(webhook))
    if json:
        print_json(_webhook_json(ended))
        return
    print_line(f"no more alerts are sent to {ended.url}")


@app.command("test")
def send_test(
    *,
    webhook: WebhookId,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 30,
    json: Json = False,
) -> None:
    """Send a message of the type webhook.test at once, and show the answer. Fails if it is not taken.

    peculium webhooks test 019acd1e-6d3a-7c11-8a4e-0f3f5a0f7c11
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        sent = client.webhooks.test(_id(webhook))
    if json:
        print_json({"status": sent.status, "problem": sent.problem})
    else:
        print_line(f"not taken: {sent.problem}" if sent.problem else f"taken: {sent.status}")
    if sent.problem:
        raise typer.Exit(REFUSED)


@app.command()
def deliveries(
    *,
    webhook: Annotated[
        str | None,
        typer.Argument(help="The webhook's id. Absent: of all webhooks.", show_default=False),
    ] = None,
    state: Annotated[
        list[State] | None, typer.Option(help="In this state; may be repeated: any of them.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 50,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show what became of alerts at webhooks, the latest first.

    peculium webhooks deliveries --state dead
    """
    states = [DeliveryState[each.name] for each in state or ()]
    with connect(target, api_key, allow_insecure, timeout) as client:
        found = itertools.islice(
            client.webhooks.deliveries(parse_id(webhook), states=states), limit or None
        )
        if json:
            for delivery in found:
                print_json(_delivery_json(delivery))
        else:
            _print_deliveries(found)


@app.command()
def replay(
    *,
    webhook: WebhookId,
    alert: Annotated[
        list[str] | None, typer.Option(help="This alert, by its id; may be repeated.")
    ] = None,
    dead: Annotated[bool, typer.Option("--dead", help="All that are dead.")] = False,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Have deliveries tried as if for the first time, under the same webhook-id as before.

    peculium webhooks replay 019acd1e-6d3a-7c11-8a4e-0f3f5a0f7c11 --dead
    """
    if bool(alert) is dead:
        raise typer.BadParameter("say which: --alert, or --dead")
    alerts = [_id(each) for each in alert or ()]
    with connect(target, api_key, allow_insecure, timeout) as client:
        count = client.webhooks.replay(_id(webhook), alerts)
    if json:
        print_json({"deliveries": count})
        return
    print_line(f"{count} {'is' if count == 1 else 'are'} tried again")


@app.command()
def new_key(
    *,
    file: Annotated[Path, typer.Argument(help="The new file of the key.", show_default=False)],
    json: Json = False,
) -> None:
    """Make a key that webhooks' secrets are made of. All servers of a ledger need the same one.

    peculium webhooks new-key webhook-key
    """
    # Here, so that the other verbs do not wait for it.
    from peculium_server.webhooks.keys import WebhookKeys  # noqa: PLC0415

    WebhookKeys.make(file)
    if json:
        print_json({"file": str(file)})
        return
    print_line(f"the key is in {file}: give that to every server as webhook_key_file")


def _id(text: str) -> bytes:
    return parse_id(text) or b""


def _webhook_json(webhook: Webhook) -> dict[str, Any]:
    return {
        "webhook_id": id_text(webhook.webhook_id),
        "url": webhook.url,
        "path": webhook.path,
        "created_at": time_text(webhook.created_at),
        "created_by": webhook.created_by,
        "deleted_at": time_text(webhook.deleted_at),
        "deleted_by": webhook.deleted_by,
    }


def _print_deliveries(deliveries: Iterable[Delivery]) -> None:
    table = new_table(
        *("state", "last tried", "tried next", "problem"),
        right=("number", "attempts"),
        whole=("alert", "webhook"),
    )
    for each in deliveries:
        table.add_row(
            each.state.name.lower(),
            time_text(each.last_at) or "",
            time_text(each.next_at) or "",
            Text(each.last_problem or ""),
            str(each.number),
            str(each.attempts),
            id_text(each.alert_id),
            id_text(each.webhook_id),
        )
    wide_console().print(table)


def _delivery_json(delivery: Delivery) -> dict[str, Any]:
    return {
        "webhook_id": id_text(delivery.webhook_id),
        "alert_id": id_text(delivery.alert_id),
        "number": delivery.number,
        "state": delivery.state.name.lower(),
        "attempts": delivery.attempts,
        "next_at": time_text(delivery.next_at),
        "last_at": time_text(delivery.last_at),
        "last_status": delivery.last_status,
        "last_problem": delivery.last_problem,
    }
