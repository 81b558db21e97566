"""The verbs for operators and auditors: they call a running server through the SDK."""

from __future__ import annotations

import itertools
import uuid
from typing import Annotated, Final

import typer
from rich.console import Console

import peculium
from peculium import BudgetRef, Client, LedgerUnavailable
from peculium_server.cli.amounts import parse_amount, show_amount
from peculium_server.cli.output import (
    budget_json,
    entry_json,
    print_budget,
    print_entries,
    print_json,
    print_line,
    print_tree,
    print_verification,
    receipt_json,
    verification_json,
)
from peculium_server.cli.problems import REFUSED

_ID_PARTS_MAX: Final = 2

Target = Annotated[
    str | None,
    typer.Option(
        "--target", help="The server, as host:port. Default: 127.0.0.1:7415. Or PECULIUM_TARGET."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="The key to call with. Better given as PECULIUM_API_KEY."),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--allow-insecure",
        help="Send the key in clear text to another machine: something else encrypts the connection.",
    ),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.1, help="Seconds to wait for each answer.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for machines.")]
Budget = Annotated[
    str,
    typer.Argument(
        help="Its path, such as acme/research; or ids, as ROOT or ROOT/BUDGET.", show_default=False
    ),
]
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
    labels = _labels(label)
    with _connect(target, api_key, allow_insecure, timeout) as client:
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
    with _connect(target, api_key, allow_insecure, timeout) as client:
        found = client.audit.budget(_reference(budget))
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
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show one budget.

    peculium budget show acme/research/run-7
    """
    with _connect(target, api_key, allow_insecure, timeout) as client:
        found = client.audit.budget(_reference(budget))
    if json:
        print_json(budget_json(found))
    else:
        print_budget(found)


def tree(
    *,
    top: Annotated[
        str | None,
        typer.Argument(
            help="Where to begin: a path or ids. Absent: the roots.", show_default=False
        ),
    ] = None,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show a budget and everything below it, or all roots.

    peculium tree

    peculium tree acme
    """
    with _connect(target, api_key, allow_insecure, timeout) as client:
        budgets = client.audit.budgets(None if top is None else _reference(top))
        if json:
            for found in budgets:
                print_json(budget_json(found))
        else:
            print_tree(list(budgets))


def entries(
    *,
    budget: Budget,
    whole_tree: Annotated[
        bool, typer.Option("--tree", help="Of the whole tree that the budget belongs to.")
    ] = False,
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
    """Show what was recorded of a budget, the latest first.

    peculium entries acme/research --limit 20

    peculium entries acme --tree --oldest-first --limit 0 --json > acme.jsonl
    """
    with _connect(target, api_key, allow_insecure, timeout) as client:
        found = client.audit.budget(_reference(budget))
        listed = itertools.islice(
            client.audit.entries(found.ref, tree=whole_tree, descending=not oldest_first),
            limit or None,
        )
        if json:
            for entry in listed:
                print_json(entry_json(entry))
            return
        print_entries(listed, found.unit, _paths(client, found.ref, whole_tree=whole_tree))


def verify(
    *,
    of: Annotated[
        str | None,
        typer.Argument(
            metavar="[TREE]", help="A root, or any budget of its tree. Absent: the whole ledger."
        ),
    ] = None,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Make every recorded decision again, from the entries alone, and compare. Fails if one differs.

    peculium verify

    peculium verify acme
    """
    last = None
    with (
        _connect(target, api_key, allow_insecure, timeout) as client,
        Console(stderr=True).status("verifying") as status,
    ):
        for last in client.audit.verify(None if of is None else _reference(of)):
            status.update(f"verifying: {last.entries:,} entries of {last.trees:,} trees")
    if last is None or last.verified is None:
        raise LedgerUnavailable("the server ended the verification without a verdict")
    if json:
        print_json(verification_json(last))
    else:
        print_verification(last)
    if not last.verified:
        raise typer.Exit(REFUSED)


def _connect(
    target: str | None, api_key: str | None, allow_insecure: bool, timeout: float
) -> Client:
    return peculium.connect(target, api_key=api_key, allow_insecure=allow_insecure, timeout=timeout)


def _reference(text: str) -> str | BudgetRef:
    """A budget as it was named: by its path, or by its ids as they are printed."""
    parts = text.split("/")
    try:
        ids = [uuid.UUID(part).bytes for part in parts]
    except ValueError:
        return text
    return BudgetRef("", ids[0], ids[-1]) if len(ids) <= _ID_PARTS_MAX else text


def _labels(given: list[str] | None) -> dict[str, str]:
    labels = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{text!r} is no label: write key=value")
        labels[key] = value
    return labels


def _paths(client: Client, ref: BudgetRef, *, whole_tree: bool) -> dict[bytes, str]:
    """The paths of the budgets whose entries are listed."""
    if not whole_tree:
        return {ref.budget_id: ref.path}
    root = BudgetRef("", ref.root_id, ref.root_id)
    return {each.ref.budget_id: each.path for each in client.audit.budgets(root)}
