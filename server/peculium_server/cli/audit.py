"""The verbs for auditors: they call a running server through the SDK."""

from __future__ import annotations

import itertools
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from peculium import (
    BudgetFilter,
    BudgetRef,
    BudgetState,
    Client,
    EntryFilter,
    LedgerUnavailable,
    Reach,
)
from peculium_server.cli import checkpoints, sums
from peculium_server.cli.exporting import export, verify_export
from peculium_server.cli.lineage import (
    delegation_json,
    print_delegations,
    print_token_steps,
    token_step_json,
)
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
    Tree,
    Until,
    connect,
    parse_id,
    parse_kinds,
    parse_labels,
    parse_time,
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
from peculium_server.cli.reconcile import reconcile
from peculium_server.cli.refusals import refusals
from peculium_server.cli.security import security_events
from peculium_server.cli.trusting import Known, PublicKeys, PublishedHashes

app = typer.Typer(no_args_is_help=True, help="Read, sum up and verify what was recorded.")
app.command()(sums.statement)
app.command()(sums.usage)
app.command()(sums.watch)
app.command("checkpoints")(checkpoints.checkpoints)
app.command()(checkpoints.prove)
app.command()(checkpoints.new_key)
app.command()(export)
app.command()(reconcile)
app.command()(refusals)
app.command()(security_events)


class State(Enum):
    """States of budgets as they are written."""

    OPEN = "open"
    FROZEN = "frozen"
    EXPIRED = "expired"
    CLOSED = "closed"


@app.command()
def tree(
    *,
    top: Annotated[
        str | None,
        typer.Argument(
            help="Where to begin: a path or ids. Absent: the roots.", show_default=False
        ),
    ] = None,
    state: Annotated[
        list[State] | None,
        typer.Option(help="In this state, ancestors considered; may be repeated: any of them."),
    ] = None,
    holder: Annotated[str | None, typer.Option(help="Held by this principal.")] = None,
    label: Labels = None,
    since: Since = None,
    until: Until = None,
    depth: Annotated[
        int | None, typer.Option(min=0, help="At most so many levels below the top.")
    ] = None,
    name: Annotated[str, typer.Option(help="Whose name begins so.")] = "",
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show a budget and everything below it, or all roots.

    peculium tree

    peculium tree acme --state frozen --state expired

    peculium tree acme --depth 1 --since 2026-11-01
    """
    selected = BudgetFilter(
        states=[BudgetState[each.value.upper()] for each in state or ()],
        holder=holder,
        labels=parse_labels(label),
        since=parse_time("--since", since),
        until=parse_time("--until", until),
        depth=depth,
        name_prefix=name,
    )
    with connect(target, api_key, allow_insecure, timeout) as client:
        budgets = client.audit.budgets(None if top is None else reference(top), selected=selected)
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
    subtree: Annotated[
        bool, typer.Option("--subtree", help="Of the budget and everything below it.")
    ] = False,
    kind: Kinds = None,
    principal: Principals = None,
    operation: Annotated[str | None, typer.Option(help="Of this operation: its id.")] = None,
    trace: Annotated[str | None, typer.Option(help="Of this trace: 32 hexadecimal digits.")] = None,
    hold: Annotated[str | None, typer.Option(help="About this hold: its id.")] = None,
    ref: Annotated[
        str, typer.Option("--reference", help="With this reference, as a bill names the call.")
    ] = "",
    label: Labels = None,
    since: Since = None,
    until: Until = None,
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

    peculium entries acme --subtree --kind settle --label team=search --since 2026-11-01

    peculium entries acme --tree --oldest-first --limit 0 --json > acme.jsonl
    """
    if whole_tree and subtree:
        raise typer.BadParameter("--tree and --subtree exclude each other")
    reach = Reach.TREE if whole_tree else Reach.SUBTREE if subtree else Reach.BUDGET
    selected = EntryFilter(
        kinds=parse_kinds(kind),
        principals=principal or (),
        operation_id=operation,
        trace_id=trace,
        labels=parse_labels(label),
        since=parse_time("--since", since),
        until=parse_time("--until", until),
        hold_id=parse_id(hold),
        reference=ref,
    )
    with connect(target, api_key, allow_insecure, timeout) as client:
        found = client.audit.budget(reference(budget))
        listed = itertools.islice(
            client.audit.entries(
                found.ref, reach=reach, selected=selected, descending=not oldest_first
            ),
            limit or None,
        )
        if json:
            for entry in listed:
                print_json(entry_json(entry))
            return
        print_entries(listed, found.unit, _paths(client, found.ref, reach))


@app.command()
def lineage(
    *,
    budget: Budget,
    limit: Annotated[
        int, typer.Option(min=0, help="At most so many steps of the token; 0: all.")
    ] = 50,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show by whose authority a budget exists, and how its token went from hand to hand.

    peculium audit lineage acme/research/run-7
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        delegations = client.audit.lineage(reference(budget))
        steps = itertools.islice(client.audit.token_steps(reference(budget)), limit or None)
        if json:
            for delegation in delegations:
                print_json(delegation_json(delegation))
            for step in steps:
                print_json(token_step_json(step))
            return
        print_delegations(delegations)
        print_token_steps(steps)


@app.command()
def verify(
    *,
    tree: Tree = None,
    file: Annotated[
        Path | None,
        typer.Option("--export", help="Verify this file instead, without any server."),
    ] = None,
    public_key: PublicKeys = None,
    published: PublishedHashes = None,
    decide: Annotated[
        bool, typer.Option("--decide", help="With --export: make every decision again too.")
    ] = False,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Make every recorded decision again, from the entries alone, and compare. Fails if one differs.

    Of an export, hashes, checkpoints, money, tokens and holds are checked; decisions with --decide.

    peculium verify

    peculium verify acme

    peculium verify --public-key ledger.pub --published 12:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef

    peculium verify --export ledger.jsonl --public-key ledger.pub
    """
    known = Known.parse(public_key, published)
    if file is not None:
        if tree is not None:
            raise typer.BadParameter("an export is verified as a whole: name no tree")
        verify_export(file, known, decide=decide, json=json)
        return
    if decide:
        raise typer.BadParameter("--decide is for an --export: a server always decides again")
    last = None
    with (
        connect(target, api_key, allow_insecure, timeout) as client,
        Console(stderr=True).status("verifying") as status,
    ):
        for last in client.audit.verify(None if tree is None else reference(tree)):
            status.update(f"verifying: {last.entries:,} entries of {last.trees:,} trees")
        contradicted = known.contradicted(client.audit.checkpoints())
    if last is None or last.verified is None:
        raise LedgerUnavailable("the server ended the verification without a verdict")
    if contradicted:
        last = replace(last, verified=False, findings=(*last.findings, *contradicted))
    if json:
        print_json(verification_json(last))
    else:
        print_verification(last)
    if not last.verified:
        raise typer.Exit(REFUSED)


def _paths(client: Client, ref: BudgetRef, reach: Reach) -> dict[bytes, str]:
    """The paths of the budgets whose entries are listed."""
    if reach is Reach.BUDGET:
        return {ref.budget_id: ref.path}
    top = BudgetRef("", ref.root_id, ref.root_id) if reach is Reach.TREE else ref
    return {each.ref.budget_id: each.path for each in client.audit.budgets(top)}
