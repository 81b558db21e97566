"""Bill and ledger compared by day, model and labels."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from peculium_server.core.state import HoldState
from peculium_server.reconcile.amounts import Amount, Tolerance, rounded
from peculium_server.reconcile.bill import Line
from peculium_server.reconcile.calls import Call
from peculium_server.reconcile.groups import Group, Groups, GroupStatus, total
from peculium_server.reconcile.times import DAY_US, Moment, Period

ALWAYS = Period()


def line(
    amount: Amount, *, day: int | None = 0, model: str = "", labels: tuple[str, ...] = ()
) -> Line:
    moment = None if day is None else Moment(day * DAY_US, whole_day=True)
    return Line(2, "", None, amount, moment, model, labels)


def call(booked: int, *, day: int = 0, **changes: Any) -> Call:
    fields: dict[str, Any] = {
        "budget_id": b"b",
        "hold_id": b"h",
        "state": HoldState.SETTLED,
        "reserved": 100,
        "booked": booked,
        "open": 0,
        "created_at": day * DAY_US,
        "settled": True,
        "at": day * DAY_US + 5,
        "references": (),
        "model": "",
        "provider": "",
        "labels": (),
    }
    return Call(**{**fields, **changes})


def compared(
    lines: list[Line],
    calls: list[Call],
    *,
    labels: tuple[str, ...] = (),
    period: Period = ALWAYS,
    tolerance: Tolerance = Tolerance(),  # noqa: B008 - it is frozen
) -> tuple[Groups, list[Group]]:
    groups = Groups(labels)
    groups.bill(lines)
    groups.book(calls, period)
    return groups, groups.judged(tolerance)


# Billed, booked and left open; what is allowed; what is said and what stays unexplained.
STATUSES = [
    ((100, 100, 0), Tolerance(), GroupStatus.MATCHED, 0),
    ((101, 100, 0), Tolerance(), GroupStatus.DIFFERENT, 1),
    ((99, 100, 0), Tolerance(), GroupStatus.DIFFERENT, -1),
    ((101, 100, 0), Tolerance(absolute=1), GroupStatus.MATCHED, 0),
    ((199, 200, 0), Tolerance(percent=Decimal("0.5")), GroupStatus.MATCHED, 0),
    ((197, 200, 0), Tolerance(percent=Decimal("0.5")), GroupStatus.DIFFERENT, -3),
    ((110, 100, 10), Tolerance(), GroupStatus.EXPLAINED, 0),
    ((105, 100, 10), Tolerance(), GroupStatus.EXPLAINED, 0),
    ((111, 100, 10), Tolerance(), GroupStatus.DIFFERENT, 1),
    ((111, 100, 10), Tolerance(absolute=1), GroupStatus.EXPLAINED, 0),
    ((99, 100, 10), Tolerance(), GroupStatus.DIFFERENT, -1),
    ((Decimal("99.5"), 100, 0), Tolerance(), GroupStatus.MATCHED, 0),
    ((Decimal("98.5"), 100, 0), Tolerance(), GroupStatus.DIFFERENT, -2),
]


@pytest.mark.parametrize(("sums", "tolerance", "status", "rest"), STATUSES)
def test_what_is_said_of_a_group(
    sums: tuple[Amount, int, int], tolerance: Tolerance, status: GroupStatus, rest: int
) -> None:
    billed, booked, left_open = sums
    _, [group] = compared([line(billed)], [call(booked, open=left_open)], tolerance=tolerance)
    assert (group.status, group.rest) == (status, rest)
    everything = total([group], tolerance)
    assert (everything.status, everything.rest) == (status, rest)


def test_groups_are_of_a_day_a_model_and_the_labels() -> None:
    groups, judged = compared(
        [
            line(1, day=0, model="m", labels=("a",)),
            line(2, day=0, model="m", labels=("a",)),
            line(4, day=0, model="m", labels=("b",)),
            line(8, day=1, model="", labels=("a",)),
        ],
        [
            call(3, model="m", labels=("a",)),
            call(16, day=1, model="n", labels=("a",)),
            call(32, day=9, model="n", labels=("a",)),
        ],
        labels=("team",),
        period=Period(0, 2 * DAY_US),
    )
    assert groups.names == ("day", "model", "team")
    assert [(group.key, group.status.value, group.difference) for group in judged] == [
        (("1970-01-01", "m", "a"), "matched", 0),
        (("1970-01-01", "m", "b"), "bill_only", 4),
        (("1970-01-02", "", "a"), "bill_only", 8),
        (("1970-01-02", "n", "a"), "ledger_only", -16),
    ]
    everything = total(judged, Tolerance())
    assert (everything.billed, everything.booked, everything.lines, everything.calls) == (
        15,
        19,
        4,
        2,
    )


def test_what_the_bill_does_not_tell_is_not_grouped_by() -> None:
    groups, [group] = compared(
        [line(7, day=None)], [call(3, day=1, model="m"), call(4, day=2, model="n")]
    )
    assert (groups.names, group.key, group.status) == ((), (), GroupStatus.MATCHED)


def test_a_call_counts_on_the_day_that_it_was_settled_or_else_reserved() -> None:
    _, judged = compared(
        [line(1, day=5)],
        [
            call(1, day=4, at=5 * DAY_US),
            call(0, day=5, at=6 * DAY_US, settled=False, state=HoldState.LAPSED, open=9),
        ],
    )
    assert [(group.key, group.booked, group.open) for group in judged] == [(("1970-01-06",), 1, 9)]


def test_a_million_fine_lines_are_summed_without_rounding() -> None:
    lines = [line(Decimal("0.1"))] * 1_000
    _, [group] = compared(lines, [call(100)])
    assert (group.billed, group.difference) == (Decimal(100), 0)


@pytest.mark.parametrize(("exact", "whole"), [("0.5", 0), ("1.5", 2), ("2.5", 2), ("2.51", 3)])
def test_a_sum_is_rounded_to_the_nearest_and_halves_to_the_even_one(exact: str, whole: int) -> None:
    assert rounded(Decimal(exact)) == whole
