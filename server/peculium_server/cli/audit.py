"""The verbs for auditors: they call a running server through the SDK."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer
from rich.console import Console

from peculium import BudgetRef, Client, LedgerUnavailable
from peculium_server.cli import checkpoints, sums
from peculium_server.cli.options import (
    ApiKey,
    Budget,
    Insecure,
    Json,
    Target,
    Timeout,
    connect,
    reference,
)
from peculium_server.cli.output import (
    budget_json,
    entry_json,
    print_entries,
    print_json,
    print_tree,
    print_verification,
    verification_json,
)
from peculium_server.cli.problems import REFUSED

app = typer.Typer(no_args_is_help=True, help="Read, sum up and verify what was recorded.")
app.command()(sums.statement)
app.command()(sums.usage)
app.command()(sums.watch)
app.command()(checkpoints.new_key)


@app.command()
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
    with connect(target, api_key, allow_insecure, timeout) as client:
        budgets = client.audit.budgets(None if top is None else reference(top))
        if json:
            for found in budgets:
                print_json(budget_json(found))
        else:
            print_tree(list(budgets))


@app.command()
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
    with connect(target, api_key, allow_insecure, timeout) as client:
        found = client.audit.budget(reference(budget))
        listed = itertools.islice(
            client.audit.entries(found.ref, tree=whole_tree, descending=not oldest_first),
            limit or None,
        )
        if json:
            for entry in listed:
                print_json(entry_json(entry))
            return
        print_entries(listed, found.unit, _paths(client, found.ref, whole_tree=whole_tree))


@app.command()
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
        connect(target, api_key, allow_insecure, timeout) as client,
        Console(stderr=True).status("verifying") as status,
    ):
        for last in client.audit.verify(None if of is None else reference(of)):
            status.update(f"verifying: {last.entries:,} entries of {last.trees:,} trees")
    if last is None or last.verified is None:
        raise LedgerUnavailable("the server ended the verification without a verdict")
    if json:
        print_json(verification_json(last))
    else:
        print_verification(last)
    if not last.verified:
        raise typer.Exit(REFUSED)


def _paths(client: Client, ref: BudgetRef, *, whole_tree: bool) -> dict[bytes, str]:
    """The paths of the budgets whose entries are listed."""
    if not whole_tree:
        return {ref.budget_id: ref.path}
    root = BudgetRef("", ref.root_id, ref.root_id)
    return {each.ref.budget_id: each.path for each in client.audit.budgets(root)}
