"""What the command line prints: tables for people, one JSON object per line for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peculium import BudgetInfo, BudgetRef, BudgetState, EntryInfo, Receipt, Verification
from peculium.values import Balances, Finding
from peculium_server.cli.amounts import show_amount
from peculium_server.core.encoding import request_fields
from peculium_server.core.operations import Kind
from peculium_server.core.refusals import id_text
from peculium_server.core.verify import Finding as FindingInExport

_STATE_STYLES: Final = {
    BudgetState.FROZEN: "cyan",
    BudgetState.EXPIRED: "yellow",
    BudgetState.CLOSED: "dim",
}
TOLD_EVERY: Final = 1_000
"""Lines or entries after which progress is told again."""
_BALANCE_NAMES: Final = tuple(Balances.__dataclass_fields__)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own."""
    Console(soft_wrap=True, highlight=False).out(json.dumps(value, ensure_ascii=False))


def print_line(text: str) -> None:
    """Print a sentence, as it is."""
    Console(soft_wrap=True, highlight=False).print(Text(text))


def new_table(*folded: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """A table without lines, by the names of its columns in this order.

    Args:
        folded: What may go over several lines.
        right: Numbers and amounts.
        whole: What is to be copied, as ids.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in folded:
        table.add_column(Text(name), overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for name in whole:
        table.add_column(name, no_wrap=True)
    return table


def budget_json(budget: BudgetInfo) -> dict[str, Any]:
    """A budget for machines: amounts are integers of the unit."""
    return {
        "path": budget.path,
        "root_id": id_text(budget.ref.root_id),
        "budget_id": id_text(budget.ref.budget_id),
        "parent_id": None if budget.parent_id is None else id_text(budget.parent_id),
        "unit": budget.unit,
        "custody": budget.custody.name.lower(),
        "holder": budget.holder,
        "state": budget.state.name.lower(),
        **balances_json(budget.balances),
        "disputed": budget.disputed,
        "holds_live": budget.holds_live,
        "overrun_factor": budget.overrun_factor,
        "lease_expires_at": time_text(budget.lease_expires_at),
        "lease_latest_at": time_text(budget.lease_latest_at),
        "labels": dict(budget.labels),
        "entries": budget.seq,
        "created_at": time_text(budget.created_at),
        **_subtree_json(budget),
    }


def _subtree_json(budget: BudgetInfo) -> dict[str, int | None]:
    if budget.subtree_used is None:
        return {}
    return {
        "subtree_used": budget.subtree_used,
        "subtree_disputed": budget.subtree_disputed,
        "subtree_held": budget.subtree_held,
        "subtree_holds_live": budget.subtree_holds_live,
    }


def print_budget(budget: BudgetInfo) -> None:
    """Print all that is known of one budget."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _budget_facts(budget):
        table.add_row(name, Text(value))
    Console().print(table)


def _budget_facts(budget: BudgetInfo) -> Iterator[tuple[str, str]]:
    yield "budget", budget.path
    yield "id", f"{id_text(budget.ref.root_id)}/{id_text(budget.ref.budget_id)}"
    yield "state", budget.state.name.lower()
    yield "held by", _held_by(budget)
    for name in _BALANCE_NAMES:
        yield name, show_amount(getattr(budget.balances, name), budget.unit)
    if budget.disputed:
        yield "disputed", show_amount(budget.disputed, budget.unit)
    if budget.subtree_used is not None:
        yield "used below", show_amount(budget.subtree_used, budget.unit)
    if budget.subtree_held is not None:
        yield "held below", show_amount(budget.subtree_held, budget.unit)
    if budget.subtree_disputed:
        yield "disputed below", show_amount(budget.subtree_disputed, budget.unit)
    yield "live holds", str(budget.holds_live)
    if budget.overrun_factor is not None:
        yield "overrun factor", str(budget.overrun_factor)
    if budget.lease_expires_at is not None:
        yield "lease until", str(time_text(budget.lease_expires_at))
        yield "renewable until", str(time_text(budget.lease_latest_at))
    if budget.labels:
        yield "labels", ", ".join(f"{key}={value}" for key, value in budget.labels.items())
    yield "entries", str(budget.seq)
    yield "made", str(time_text(budget.created_at))


def print_tree(budgets: Sequence[BudgetInfo]) -> None:
    """Print budgets as a tree, with where their money is."""
    amounts = ("granted", "available", "held", "delegated", "spent")
    rare = [
        name
        for name in ("forfeited", "overrun", "advanced")
        if any(getattr(budget.balances, name) for budget in budgets)
    ]
    table = new_table("budget", "state", right=(*amounts, *rare))
    table.add_column("held by", overflow="fold")
    for depth, budget in _in_depth(budgets):
        style = _STATE_STYLES.get(budget.state, "")
        table.add_row(
            Text("  " * depth + budget.name),
            Text(budget.state.name.lower()),
            *(
                show_amount(getattr(budget.balances, name), budget.unit)
                for name in (*amounts, *rare)
            ),
            Text(_held_by(budget)),
            style=style,
        )
    wide_console().print(table)


def _in_depth(budgets: Sequence[BudgetInfo]) -> Iterator[tuple[int, BudgetInfo]]:
    """Each budget with its depth below the tops: parents before children, siblings by name."""
    listed = {budget.ref.budget_id for budget in budgets}
    children: dict[bytes | None, list[BudgetInfo]] = {}
    for budget in budgets:
        above = budget.parent_id if budget.parent_id in listed else None
        children.setdefault(above, []).append(budget)
    pending = [(0, budget) for budget in _by_name(children.get(None, []))]
    while pending:
        depth, budget = pending.pop()
        yield depth, budget
        below = _by_name(children.get(budget.ref.budget_id, []))
        pending += [(depth + 1, child) for child in below]


def _by_name(budgets: list[BudgetInfo]) -> list[BudgetInfo]:
    """The last one first: the caller takes from the end."""
    return sorted(budgets, key=lambda budget: budget.name, reverse=True)


def entry_json(entry: EntryInfo) -> dict[str, Any]:
    """An entry for machines; what is bytes is hexadecimal."""
    said = _said(entry)
    return {
        "root_id": id_text(entry.root_id),
        "budget_id": id_text(entry.budget_id),
        "seq": entry.seq,
        "lane": entry.lane,
        "position": entry.position,
        "part": entry.part,
        "parts": entry.parts,
        "operation_id": entry.operation_id,
        "kind": entry.kind,
        "at": time_text(entry.at),
        "actor": entry.actor,
        "amount": entry.amount,
        "balances": balances_json(entry.balances),
        "changes": balances_json(entry.changes),
        "trace_id": entry.trace_id,
        "consumed": None if entry.consumed is None else entry.consumed.hex(),
        "labels": dict(said.get("labels", ())),
        "reference": said.get("reference") or None,
        "reason": said.get("reason") or None,
        "request": entry.request.hex(),
        "effect": entry.effect.hex(),
        "digest": entry.digest.hex(),
        "previous_hash": entry.previous_hash.hex(),
        "hash": entry.hash.hex(),
    }


def _said(entry: EntryInfo) -> dict[str, Any]:
    """What was asked for, by the names of the operation's fields: in part 0 only, and if it can be read."""
    if entry.part:
        return {}
    try:
        return request_fields(Kind[entry.kind], entry.request)
    except (KeyError, ValueError):
        return {}


def print_entries(entries: Iterable[EntryInfo], unit: str, paths: Mapping[bytes, str]) -> None:
    """Print entries, each with what it changed and what it left available, and why if that was said."""
    listed = [(entry, _said(entry).get("reason") or "") for entry in entries]
    reasons = any(reason for _, reason in listed)
    table = new_table(
        *("at", "budget", "seq", "kind", "actor"),
        right=("amount", "available", "held", "spent"),
        whole=("operation",),
    )
    if reasons:
        table.add_column("reason", overflow="fold")
    for entry, reason in listed:
        table.add_row(
            time_text(entry.at),
            Text(paths.get(entry.budget_id, id_text(entry.budget_id))),
            str(entry.seq),
            entry.kind.lower(),
            Text(entry.actor),
            show_amount(entry.amount, unit),
            show_amount(entry.balances.available, unit),
            show_amount(entry.balances.held, unit),
            show_amount(entry.balances.spent, unit),
            entry.operation_id,
            *([Text(reason)] if reasons else ()),
        )
    wide_console().print(table)


def receipt_json(receipt: Receipt) -> dict[str, Any]:
    """What an operation did, for machines."""
    return {
        "operation_id": receipt.operation_id,
        "budget_id": id_text(receipt.budget_id),
        "at": time_text(receipt.at),
        "replayed": receipt.replayed,
        "state": receipt.state.name.lower(),
        **balances_json(receipt.balances),
    }


def verification_json(verification: Verification) -> dict[str, Any]:
    """A verdict for machines."""
    return {
        "verified": verification.verified,
        "entries": verification.entries,
        "trees": verification.trees,
        "findings": [finding_json(finding) for finding in verification.findings],
    }


def print_verification(verification: Verification) -> None:
    """Print a verdict."""
    counted = f"{verification.entries:,} entries of {verification.trees:,} trees"
    if verification.verified:
        print_line(f"verified: {counted}; every hash, every decision and every balance holds")
        return
    print_findings(counted, verification.findings)


def finding_json(finding: Finding | FindingInExport) -> dict[str, Any]:
    """A finding for machines."""
    return {
        "root_id": _id_said(finding.root_id),
        "budget_id": _id_said(finding.budget_id),
        "seq": finding.seq,
        "rule": finding.rule,
        "detail": finding.detail,
    }


def print_findings(counted: str, findings: Iterable[Finding | FindingInExport]) -> None:
    """Print that something does not verify, and what."""
    print_line(f"NOT verified: {counted}; the first finding of each tree:")
    for finding in findings:
        ids = filter(None, (_id_said(finding.root_id), _id_said(finding.budget_id)))
        at = f"entry {finding.seq}" if finding.seq else ""
        where = " ".join(filter(None, ("/".join(ids), at)))
        print_line(f"  {where}{': ' if where else ''}{finding.rule}: {finding.detail}")


def _id_said(value: bytes | None) -> str | None:
    """An id that was found somewhere: there may be none, or what is in a file may not be one."""
    if not value:
        return None
    return id_text(value) if len(value) == _ID_BYTES else value.hex()


_ID_BYTES: Final = 16


def _held_by(budget: BudgetInfo) -> str:
    custody = "token" if budget.custody.name == "TOKEN" else "principal"
    return f"{custody} {budget.holder}" if budget.holder else custody


def balances_json(balances: Balances) -> dict[str, int]:
    """Balances, or changes of them, for machines."""
    return {name: getattr(balances, name) for name in _BALANCE_NAMES}


def time_text(at: datetime | None) -> str | None:
    """A time of the ledger, in UTC."""
    return None if at is None else at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def told(ref: BudgetRef | None) -> str:
    """A budget of which something was counted, or that there was too much at once to tell which."""
    return "(too many at once to tell)" if ref is None else str(ref)


def told_json(ref: BudgetRef | None) -> dict[str, str | None]:
    """The same for machines."""
    if ref is None:
        return dict.fromkeys(("path", "root_id", "budget_id"))
    return {
        "path": ref.path or None,
        "root_id": id_text(ref.root_id),
        "budget_id": id_text(ref.budget_id),
    }


def wide_console() -> Console:
    """A terminal's own width; a pipe's reader has room for whole lines."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_COLUMNS)


_PIPE_COLUMNS: Final = 240
