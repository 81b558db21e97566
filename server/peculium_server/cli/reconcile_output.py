"""What a reconciliation prints: tables for people, one JSON object per line for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from peculium import BudgetRef
from peculium_server.cli.amounts import show_amount
from peculium_server.cli.output import new_table, print_json, print_line, wide_console
from peculium_server.cli.reconcile_ledger import Booking
from peculium_server.core.refusals import id_text
from peculium_server.reconcile.amounts import Amount, add, rounded
from peculium_server.reconcile.bill import Bill
from peculium_server.reconcile.groups import Group
from peculium_server.reconcile.references import Finding, Status
from peculium_server.reconcile.times import Period, time_text

ROWS_MAX: Final = 100
"""Findings in a table; machines get all of them."""

_MEANINGS: Final[Mapping[Status, str]] = {
    Status.MATCHED: "the bill and the ledger agree",
    Status.DIFFERENT: "different amounts",
    Status.LAPSED: "explain holds that lapsed",
    Status.LIVE: "of holds that are still live",
    Status.TWICE: "several times in the bill",
    Status.AMBIGUOUS: "settled by several calls",
    Status.BILL_ONLY: "in the bill only",
    Status.LEDGER_ONLY: "in the ledger only",
    Status.EDGE: "in the ledger only, at the edge of the period: the bill before or after may have them",
}


@dataclass(slots=True)
class Sums:
    """What all findings of one status add up to."""

    count: int = 0
    billed: Amount = 0
    booked: int = 0


@dataclass(slots=True)
class Tally:
    """All findings counted, and those kept that there is something to say about."""

    by_status: dict[Status, Sums] = field(default_factory=dict)
    kept: list[Finding] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        """Count one."""
        sums = self.by_status.setdefault(finding.status, Sums())
        sums.count += 1
        sums.billed = add(sums.billed, finding.billed)
        sums.booked += finding.booked
        if finding.status is not Status.MATCHED:
            self.kept.append(finding)


class Shown:
    """Tells about findings in a tree's unit and with its paths."""

    def __init__(self, unit: str, budgets: Mapping[bytes, BudgetRef]) -> None:
        self._unit = unit
        self._budgets = budgets

    # -- by reference -------------------------------------------------------------------------------

    def findings_json(self, findings: Sequence[Finding]) -> None:
        """Print findings for machines."""
        for finding in findings:
            print_json(self._finding_json(finding))

    def _finding_json(self, finding: Finding) -> dict[str, Any]:
        fits = finding.fits
        return {
            "status": finding.status.value,
            "references": list(finding.references),
            "line": finding.line,
            "lines": finding.lines,
            "billed": rounded(finding.billed),
            "booked": finding.booked,
            "difference": finding.difference,
            "reconciled": finding.reconciled,
            "bookable": finding.bookable,
            "calls": [
                {
                    "budget": self._path(call.budget_id),
                    "budget_id": id_text(call.budget_id),
                    "hold_id": None if call.hold_id is None else id_text(call.hold_id),
                    "state": call.state.name.lower(),
                    "reserved": call.reserved,
                    "booked": call.booked,
                    "at": time_text(call.at),
                }
                for call in finding.calls
            ],
            "fits_hold_id": None if fits is None or fits.hold_id is None else id_text(fits.hold_id),
        }

    def findings(self, findings: Sequence[Finding]) -> None:
        """Print findings for people, the first of many."""
        if not findings:
            return
        table = new_table(
            *("status", "line", "reference", "budget", "hold"),
            right=("billed", "booked", "difference"),
        )
        for finding in findings[:ROWS_MAX]:
            calls = finding.calls or (() if finding.fits is None else (finding.fits,))
            holds = [id_text(call.hold_id) for call in calls if call.hold_id is not None]
            table.add_row(
                finding.status.value.replace("_", " "),
                "" if finding.line is None else str(finding.line),
                Text(", ".join(finding.references) or "(none)"),
                Text(", ".join(dict.fromkeys(self._path(call.budget_id) for call in calls))),
                Text(", ".join(holds) + ("" if finding.fits is None else " would fit")),
                self._amount(rounded(finding.billed)),
                self._amount(finding.booked),
                self._amount(finding.difference),
            )
        wide_console().print(table)
        if len(findings) > ROWS_MAX:
            print_line(f"… and {len(findings) - ROWS_MAX:,} more: --json shows all")

    def tally(self, tally: Tally, bill: Bill, period: Period) -> None:
        """Print what all findings add up to, for people."""
        for status in Status:
            sums = tally.by_status.get(status)
            if sums is None:
                continue
            difference = self._amount(rounded(add(sums.billed, -sums.booked)))
            print_line(
                f"{sums.count:>10,}  {_MEANINGS[status]}: billed {self._amount(rounded(sums.billed))},"
                f" booked {self._amount(sums.booked)}, difference {difference}"
            )
        self._bill(bill, period)

    def booking(self, booking: Booking) -> None:
        """Print what became of what was to be booked, for people."""
        finding, operation_id, problem = booking
        name = ", ".join(finding.references) or f"line {finding.line}"
        if operation_id is None:
            print_line(f"NOT booked: {name}: {problem}")
        else:
            amount = self._amount(rounded(finding.billed))
            print_line(f"booked: {name} has cost {amount} (operation {operation_id})")

    def booking_json(self, booking: Booking) -> None:
        """Print what became of what was to be booked, for machines."""
        finding, operation_id, problem = booking
        [call] = finding.calls
        print_json(
            {
                "status": "not_booked" if operation_id is None else "booked",
                "references": list(finding.references),
                "hold_id": None if call.hold_id is None else id_text(call.hold_id),
                "actual": rounded(finding.billed),
                "operation_id": operation_id,
                "problem": problem or None,
            }
        )

    # -- by group -----------------------------------------------------------------------------------

    def groups_json(self, names: Sequence[str], groups: Sequence[Group]) -> None:
        """Print groups for machines, those that matched included."""
        for group in groups:
            print_json(
                {
                    "status": group.status.value,
                    "group": dict(zip(names, group.key, strict=True)),
                    **_group_json(group),
                }
            )

    def groups(self, names: Sequence[str], groups: Sequence[Group], total: Group) -> None:
        """Print groups for people, and what they add up to."""
        table = new_table(
            *("status", *names),
            right=("billed", "booked", "difference", "left open", "unexplained"),
        )
        for group in groups[:ROWS_MAX]:
            self._group_row(table, group, group.key)
        total_key = ("total", *("" for _ in names[1:])) if names else ()
        self._group_row(table, total, total_key)
        wide_console().print(table)
        if len(groups) > ROWS_MAX:
            print_line(f"… and {len(groups) - ROWS_MAX:,} more groups: --json shows all")

    def _group_row(self, table: Table, group: Group, key: Sequence[str]) -> None:
        amounts = (
            rounded(group.billed),
            group.booked,
            group.difference,
            group.open,
            group.rest,
        )
        table.add_row(
            group.status.value.replace("_", " "),
            *(Text(text or "(none)") if group.key else Text(text) for text in key),
            *map(self._amount, amounts),
        )

    def grouped(self, groups: Sequence[Group], bill: Bill, period: Period) -> None:
        """Print how many groups there are of each status, for people."""
        counted = Counter(group.status for group in groups)
        told = ", ".join(
            f"{number:,} {status.value.replace('_', ' ')}" for status, number in counted.items()
        )
        print_line(f"{len(groups):,} groups: {told}")
        self._bill(bill, period)

    def _bill(self, bill: Bill, period: Period) -> None:
        outside = f", {bill.outside:,} of another time left out" if bill.outside else ""
        print_line(
            f"the bill: {bill.lines:,} lines, {self._amount(rounded(bill.total))}{outside};"
            f" {_period_text(period)}"
        )

    def _path(self, budget_id: bytes) -> str:
        ref = self._budgets.get(budget_id)
        return id_text(budget_id) if ref is None else ref.path

    def _amount(self, amount: int) -> str:
        return show_amount(amount, self._unit)


def tally_json(tally: Tally) -> dict[str, Any]:
    """What all findings add up to, for machines."""
    return {
        status.value: {
            "count": sums.count,
            "billed": rounded(sums.billed),
            "booked": sums.booked,
        }
        for status, sums in tally.by_status.items()
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "billed": rounded(group.billed),
        "booked": group.booked,
        "difference": group.difference,
        "open": group.open,
        "unexplained": group.rest,
        "lines": group.lines,
        "calls": group.calls,
    }


def total_json(total: Group) -> dict[str, Any]:
    """The sum of all groups, for machines."""
    return {"status": total.status.value, **_group_json(total)}


def period_json(period: Period) -> dict[str, Any]:
    """A period, for machines."""
    return {
        "from": None if period.start is None else time_text(period.start),
        "until": None if period.end is None else time_text(period.end),
    }


def _period_text(period: Period) -> str:
    if period.start is None and period.end is None:
        return "it says no time: compared with all that was recorded"
    start = "the beginning" if period.start is None else time_text(period.start)
    end = "now" if period.end is None else time_text(period.end)
    return f"from {start} until {end}"
