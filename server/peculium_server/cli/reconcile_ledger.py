"""The ledger's side of a reconciliation: its calls are read, and differences booked, through the SDK."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import typer

from peculium import BudgetInfo, BudgetRef, Client, EntryFilter, Reach
from peculium.errors import Malformed, Refused
from peculium_server.cli.options import reference
from peculium_server.cli.output import TOLD_EVERY
from peculium_server.core.times import microseconds
from peculium_server.reconcile.amounts import rounded
from peculium_server.reconcile.calls import CONCERNED, Call, Calls, Level, Recorded
from peculium_server.reconcile.references import Finding

_KINDS = {kind.name: kind for kind in CONCERNED}


@dataclass(frozen=True, slots=True)
class Trees:
    """The budgets whose calls a bill is compared with."""

    unit: str
    """What all of them count."""
    roots: dict[bytes, BudgetRef]
    tops: list[BudgetInfo]
    """The budgets that were named; or all roots."""


@dataclass(frozen=True, slots=True)
class Known:
    """What was read of the trees."""

    calls: list[Call]
    budgets: dict[bytes, BudgetRef]
    """By id, with their paths."""


class Booking(NamedTuple):
    """What became of a finding that was to be booked."""

    finding: Finding
    operation_id: str | None
    """The Resolve that has booked it; None: the ledger refused it."""
    problem: str


def find_trees(client: Client, named: Sequence[str]) -> Trees:
    """The budgets that are named, or all roots.

    Raises:
        typer.BadParameter: They do not count the same, or there are none.
    """
    tops = (
        [client.audit.budget(reference(name)) for name in named]
        if named
        else list(client.audit.budgets())
    )
    units = sorted({top.unit for top in tops})
    if not units:
        raise typer.BadParameter("the ledger has no budget yet")
    if len(units) > 1:
        raise typer.BadParameter(
            f"these budgets count {' and '.join(units)}: name those that the bill is about"
        )
    roots = {top.ref.root_id: BudgetRef("", top.ref.root_id, top.ref.root_id) for top in tops}
    return Trees(units[0], roots, tops)


def read_calls(
    client: Client,
    trees: Trees,
    label_keys: Sequence[str],
    provider: str | None,
    progress: Callable[[int], None],
) -> Known:
    """Read all calls of the trees, as they are now.

    Args:
        client: An auditor's.
        trees: Which.
        label_keys: The labels that matter.
        provider: Only calls of this provider, and those that say none.
        progress: Told now and then how many entries were read.
    """
    calls: list[Call] = []
    budgets: dict[bytes, BudgetRef] = {}
    selected = EntryFilter(kinds=sorted(_KINDS))
    read = 0
    for root_id, root in trees.roots.items():
        levels: dict[bytes, Level] = {}
        for budget in client.audit.budgets(root):
            budgets[budget.ref.budget_id] = budget.ref
            levels[budget.ref.budget_id] = Level(budget.parent_id, budget.labels)
        tops = {top.ref.budget_id for top in trees.tops if top.ref.root_id == root_id}
        wanted = _below(tops, levels)
        found = Calls(levels, label_keys)
        for entry in client.audit.entries(root, reach=Reach.TREE, selected=selected):
            read += 1
            if read % TOLD_EVERY == 0:
                progress(read)
            # A budget made since the levels were read has only calls that are younger than that.
            if not entry.request or entry.budget_id not in wanted:
                continue
            found.add(
                Recorded(
                    _KINDS[entry.kind],
                    entry.budget_id,
                    uuid.UUID(entry.operation_id).bytes,
                    microseconds(entry.at),
                    entry.request,
                    entry.effect,
                )
            )
        calls += (call for call in found if provider is None or call.provider in (provider, ""))
    return Known(calls, budgets)


def _below(tops: set[bytes], levels: dict[bytes, Level]) -> set[bytes]:
    """Those budgets and everything below them. Parents are listed before their children."""
    wanted = set(tops)
    for budget_id, level in levels.items():
        if level.parent_id in wanted:
            wanted.add(budget_id)
    return wanted


def book(
    client: Client, findings: Iterable[Finding], budgets: dict[bytes, BudgetRef], reason: str
) -> Iterator[Booking]:
    """Resolve each finding's hold to what was billed, one after the other.

    What the ledger refuses is told and the next one is tried. An operation says what the hold has
    cost in all, so that booking the same once more changes no balance.

    Raises:
        PeculiumError: The ledger does not answer, or the caller is no admin: what was not told yet
            was not booked, but for perhaps the one that it was raised for.
    """
    for finding in findings:
        [call] = finding.calls
        if call.hold_id is None:
            continue
        try:
            receipt = client.admin.resolve(
                budgets[call.budget_id], call.hold_id, rounded(finding.billed), reason
            )
        except (Refused, Malformed) as error:
            yield Booking(finding, None, str(error))
        else:
            yield Booking(finding, receipt.operation_id, "")
