"""What a run came to: the checks, the tables for people, and the one line for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peculium import BudgetInfo, Verification
from peculium_server.demo.messages import Bill, Done
from peculium_server.demo.progress import dollars, exact_dollars

_MILLION: Final = 1_000_000

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was to be done."""

    requests: int
    cost: int
    """Of all requests, if nothing were refused."""
    granted: int
    processes: int
    agents_per_process: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A statement that has to be true, in words that also say what was found."""

    statement: str
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that is known at the end."""

    plan: Plan
    done: Mapping[str, Done]
    """By worker."""
    bill: Bill
    budgets: Sequence[BudgetInfo]
    """The whole tree, closed budgets included."""
    verification: Verification
    seconds: float

    @property
    def calls(self) -> int:
        """Requests served."""
        return sum(sum(done.calls) for done in self.done.values())

    @property
    def refused(self) -> int:
        """Requests given up, since nothing that was left could pay them."""
        return sum(sum(done.refused) for done in self.done.values())

    @property
    def spent(self) -> int:
        """What the ledger says was spent."""
        return sum(budget.balances.spent for budget in self.budgets)

    @property
    def left(self) -> int:
        """What the ledger says is still there."""
        return sum(budget.balances.available + budget.balances.held for budget in self.budgets)

    @property
    def overshoot(self) -> int:
        """What the provider bills beyond the cap."""
        return max(0, self.bill.amount - self.plan.granted)

    @property
    def checks(self) -> tuple[Check, ...]:
        """What has to hold."""
        bill, plan = self.bill, self.plan
        told = self.calls + self.refused
        verification = self.verification
        finding = "".join(f"; {found.rule}: {found.detail}" for found in verification.findings[:1])
        return (
            Check(
                statement=f"the provider bills {exact_dollars(bill.amount)}, the cap is"
                f" {exact_dollars(plan.granted)}: {exact_dollars(self.overshoot)} too much",
                holds=self.overshoot == 0,
            ),
            Check(
                statement=f"the ledger has {exact_dollars(self.spent)} as spent, the provider's own bill"
                f" says {exact_dollars(bill.amount)}",
                holds=self.spent == bill.amount,
            ),
            Check(
                statement=f"{exact_dollars(self.spent)} spent and {exact_dollars(self.left)} left are the cap",
                holds=self.spent + self.left == plan.granted,
            ),
            Check(
                statement=f"{self.calls:,} calls served, {bill.calls:,} on the bill",
                holds=self.calls == bill.calls,
            ),
            Check(
                statement=f"{self.calls:,} served and {self.refused:,} refused are all of the"
                f" {plan.requests:,} requests",
                holds=told == plan.requests,
            ),
            Check(
                statement=f"every decision and every hash of {verification.entries:,} entries in"
                f" {len(self.budgets):,} budgets verified{finding}",
                holds=verification.verified is True,
            ),
        )

    @property
    def holds(self) -> bool:
        """Whether all checks do."""
        return all(check.holds for check in self.checks)

    @property
    def line(self) -> str:
        """The result as one line of JSON; money in integer `usd_nanos`."""
        plan = self.plan
        return json.dumps(
            {
                "agents": plan.processes * plan.agents_per_process,
                "processes": plan.processes,
                "calls": self.calls,
                "refused": self.refused,
                "granted": plan.granted,
                "spent": self.spent,
                "billed": self.bill.amount,
                "overshoot": self.overshoot,
                "utilisation": self.spent * _MILLION // plan.granted / _MILLION,
                "entries": self.verification.entries,
                "verified": self.verification.verified is True,
                "seconds": round(self.seconds, 1),
            }
        )

    def show(self, console: Console) -> None:
        """Print the report for people."""
        console.print(self._tree())
        for line in self._sentences():
            console.print(line, soft_wrap=True, highlight=False)

    @property
    def _percent(self) -> str:
        """How much of the cap was spent; cut, not rounded, so that not quite all is never all."""
        whole, rest = divmod(self.spent * 10_000 // self.plan.granted, 100)
        return f"{whole}.{rest:02}"

    def _tree(self) -> Table:
        """Who has spent how much: the coordinator, its workers, their agents with all their slices."""
        table = Table(title="The tree", title_justify="left", title_style="bold", box=None)
        table.add_column("budget", no_wrap=True)
        for heading in ("slices", "calls", "refused", "spent", "left"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows():
            table.add_row(*row)
        return table

    def _rows(self) -> Iterator[tuple[str, ...]]:
        below: dict[bytes | None, list[BudgetInfo]] = {}
        for budget in self.budgets:
            below.setdefault(budget.parent_id, []).append(budget)
        (root,) = below[None]
        yield _row(f"{root.name} (coordinator)", None, self.calls, self.refused, self.budgets)
        workers = {worker.name: worker for worker in below[root.ref.budget_id]}
        for branch, stem, (name_of_worker, done) in _branches(list(self.done.items())):
            worker = workers[name_of_worker]
            slices = below.get(worker.ref.budget_id, [])
            told = sum(done.calls), sum(done.refused)
            yield _row(branch + worker.name, len(slices), *told, [worker, *slices])
            agents = enumerate(zip(done.calls, done.refused, strict=True), start=1)
            for branch_of_agent, _, (number, told) in _branches(list(agents)):
                name = f"agent-{number}"
                own = [slice_ for slice_ in slices if slice_.name.startswith(f"{name}.")]
                yield _row(stem + branch_of_agent + name, len(own), *told, own)

    def _sentences(self) -> Iterator[Text]:
        plan = self.plan
        yield Text(
            f"\n{plan.requests:,} requests would cost {dollars(plan.cost)}. The cap was"
            f" {dollars(plan.granted)}, of which {self._percent} % was spent."
        )
        yield Text(
            f"{plan.processes} processes with {plan.agents_per_process} agents each,"
            f" {self.seconds:.1f} seconds for everything.\n"
        )
        for check in self.checks:
            sign, style = ("✓", "green") if check.holds else ("✗", "bold red")
            yield Text.assemble((f"{sign} ", style), check.statement)


def _branches(items: Sequence[_T]) -> Iterator[tuple[str, str, _T]]:
    """Each item with what is drawn before it, and before what is below it."""
    for item in items[:-1]:
        yield "├─ ", "│  ", item
    for item in items[-1:]:
        yield "└─ ", "   ", item


def _row(
    name: str, slices: int | None, calls: int, refused: int, budgets: Sequence[BudgetInfo]
) -> tuple[str, ...]:
    return (
        name,
        "" if slices is None else f"{slices:,}",
        f"{calls:,}",
        f"{refused:,}",
        dollars(sum(budget.balances.spent for budget in budgets)),
        dollars(sum(budget.balances.available for budget in budgets)),
    )
