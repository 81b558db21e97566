"""The report says what was found, and one check that fails is a run that failed."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from rich.console import Console

from peculium import Balances, BudgetInfo, BudgetRef, BudgetState, Custody, Finding, Verification
from peculium_server.demo.messages import Bill, Done
from peculium_server.demo.report import Plan, Report

ROOT, WORKER, SLICE, OTHER = (bytes([number]) * 16 for number in range(1, 5))


def budget(
    budget_id: bytes, parent_id: bytes | None, name: str, *, spent: int, available: int
) -> BudgetInfo:
    return BudgetInfo(
        ref=BudgetRef(name, ROOT, budget_id),
        parent_id=parent_id,
        name=name,
        unit="usd_nanos",
        custody=Custody.TOKEN,
        holder=None,
        state=BudgetState.OPEN,
        balances=Balances(
            granted=spent + available,
            available=available,
            held=0,
            delegated=0,
            spent=spent,
            forfeited=0,
            overrun=0,
            advanced=0,
        ),
        disputed=0,
        holds_live=0,
        overrun_factor=None,
        lease_expires_at=None,
        lease_latest_at=None,
        labels={},
        seq=1,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


GOOD = Report(
    plan=Plan(
        requests=7,
        cost=5_000_000_000,
        granted=3_000_000_000,
        processes=1,
        agents_per_process=2,
    ),
    done={"worker-1": Done(calls=[3, 1], refused=[1, 2])},
    bill=Bill(calls=4, input_tokens=10, output_tokens=20, amount=2_999_999_999),
    budgets=[
        budget(ROOT, None, "demo", spent=0, available=1),
        budget(WORKER, ROOT, "worker-1", spent=0, available=0),
        budget(SLICE, WORKER, "agent-1.1", spent=2_000_000_000, available=0),
        budget(OTHER, WORKER, "agent-2.2", spent=999_999_999, available=0),
    ],
    verification=Verification(entries=40, trees=1, verified=True, findings=()),
    seconds=1.26,
)
FINDING = Finding(ROOT, SLICE, 3, "chain", "the entry before has another hash")


def test_a_run_of_which_everything_holds_says_so_in_one_line_of_json() -> None:
    assert GOOD.holds
    assert "\n" not in GOOD.line
    assert json.loads(GOOD.line) == {
        "agents": 2,
        "processes": 1,
        "calls": 4,
        "refused": 3,
        "granted": 3_000_000_000,
        "spent": 2_999_999_999,
        "billed": 2_999_999_999,
        "overshoot": 0,
        "utilisation": 0.999999,
        "entries": 40,
        "verified": True,
        "seconds": 1.3,
    }


BAD_BILL = replace(GOOD.bill, amount=3_000_000_007)


@pytest.mark.parametrize(
    ("report", "failing"),
    [
        (replace(GOOD, bill=BAD_BILL), ["$0.000000007 too much", "the provider's own bill says"]),
        (replace(GOOD, bill=replace(GOOD.bill, amount=1)), ["the provider's own bill says"]),
        (replace(GOOD, bill=replace(GOOD.bill, calls=5)), ["5 on the bill"]),
        (replace(GOOD, budgets=GOOD.budgets[1:]), ["are the cap"]),
        (replace(GOOD, plan=replace(GOOD.plan, requests=8)), ["are all of the 8 requests"]),
        (
            replace(GOOD, verification=replace(GOOD.verification, verified=None)),
            ["40 entries in 4 budgets"],
        ),
        (
            replace(
                GOOD,
                verification=replace(GOOD.verification, verified=False, findings=(FINDING,)),
            ),
            ["chain: the entry before has another hash"],
        ),
    ],
)
def test_whatever_does_not_hold_is_named_and_fails_the_run(
    report: Report, failing: list[str]
) -> None:
    failed = [check.statement for check in report.checks if not check.holds]
    assert len(failed) == len(failing)
    for statement, part in zip(failed, failing, strict=True):
        assert part in statement
    assert not report.holds


def test_what_is_billed_beyond_the_cap_is_the_overshoot() -> None:
    assert json.loads(replace(GOOD, bill=BAD_BILL).line)["overshoot"] == 7


def shown(report: Report) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    report.show(console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return [" ".join(line.split()) for line in file.getvalue().splitlines()]


def test_the_tree_sums_slices_up_by_agent_and_worker() -> None:
    lines = shown(GOOD)
    assert "demo (coordinator) 4 3 $2.999999 $0.000000" in lines
    assert "└─ worker-1 2 4 3 $2.999999 $0.000000" in lines
    assert "├─ agent-1 1 3 1 $2.000000 $0.000000" in lines
    assert "└─ agent-2 1 1 2 $0.999999 $0.000000" in lines


def test_not_quite_all_of_the_cap_is_not_shown_as_all_of_it() -> None:
    assert any("of which 99.99 % was spent" in line for line in shown(GOOD))
