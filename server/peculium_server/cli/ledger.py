"""The verbs for operators: they call a running server through the SDK."""

from __future__ import annotations

from typing import Annotated

import typer

from peculium_server.cli.amounts import parse_amount, show_amount
from peculium_server.cli.options import (
    ApiKey,
    Budget,
    Insecure,
    Json,
    Target,
    Timeout,
    connect,
    parse_labels,
    parse_time,
    reference,
)
from peculium_server.cli.output import (
    budget_json,
    print_budget,
    print_json,
    print_line,
    receipt_json,
)

Amount = Annotated[
    str, typer.Argument(help="12.50usd, or a whole number of the tree's unit.", show_default=False)
]


def grant(
    *,
    name: Annotated[str, typer.Argument(help="Unique among all roots.", show_default=False)],
    amount: Amount,
    holder: Annotated[
        str | None,
        typer.Option(help="The principal that may spend from it, by its own credentials."),
    ] = None,
    token: Annotated[
        bool, typer.Option("--token", help="Held by token although a holder is named.")
    ] = False,
    unit: Annotated[
        str | None, typer.Option(help="What is counted: tokens, calls. Dollars say it themselves.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="key=value, stays with the budget; may be repeated.")
    ] = None,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Make a root budget.

    For a service with its own credentials:

        peculium grant acme 100usd --holder research-gateway

    For whoever gets the capability, which is printed once and never again:

        peculium grant acme 100usd
    """
    value, counted = parse_amount(amount, unit)
    labels = parse_labels(label)
    with connect(target, api_key, allow_insecure, timeout) as client:
        made = client.admin.grant(
            name, unit=counted, amount=value, holder=holder, token=token, labels=labels
        )
    by_token = holder is None or token
    if json:
        capability = {"capability": made.capability.reveal()} if by_token else {}
        print_json({"path": name, "unit": counted, **receipt_json(made.receipt), **capability})
        return
    print_line(f"granted {show_amount(value, counted)} to {name}")
    if by_token:
        print_line("its capability, shown this once; whoever accepts it first owns the budget:")
        print_line(made.capability.reveal())
    else:
        print_line(f"held by {holder}: client.open({name!r}) with its key")


def topup(
    *,
    budget: Budget,
    amount: Amount,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Put more into a root; repays its overrun first.

    peculium topup acme 25usd
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        found = client.audit.budget(reference(budget))
        value, unit = parse_amount(amount, found.unit)
        receipt = client.admin.top_up(found.ref, value)
    if json:
        print_json({"path": found.path, "unit": unit, **receipt_json(receipt)})
        return
    available = show_amount(receipt.balances.available, unit)
    print_line(f"put {show_amount(value, unit)} into {found.path}; available now: {available}")


def budget_show(
    *,
    budget: Budget,
    as_of: Annotated[
        str | None, typer.Option(help="As it was then: 2026-11-26, 2026-11-26T09:30Z.")
    ] = None,
    sum_subtree: Annotated[
        bool, typer.Option("--sum", help="Sum up what its whole subtree has used.")
    ] = False,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show one budget, as it is or as it was.

    peculium budget show acme/research/run-7

    peculium budget show acme --as-of 2026-11-01 --sum
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        found = client.audit.budget(
            reference(budget), as_of=parse_time("--as-of", as_of), sum_subtree=sum_subtree
        )
    if json:
        print_json(budget_json(found))
    else:
        print_budget(found)
