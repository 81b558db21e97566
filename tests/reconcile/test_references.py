"""Bill and ledger compared call by call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import pytest

from peculium_server.core.state import HoldState
from peculium_server.reconcile.amounts import Amount, Tolerance
from peculium_server.reconcile.bill import Line
from peculium_server.reconcile.calls import Call
from peculium_server.reconcile.references import Finding, Matching, Status, collect
from peculium_server.reconcile.times import Moment, Period

BUDGET = b"b" * 16
NONE = Tolerance()
DAY = Period(1_000, 2_000)


def call(
    *references: str,
    booked: int = 0,
    number: int = 1,
    state: HoldState = HoldState.SETTLED,
    created_at: int = 1_400,
    at: int = 1_500,
    **changes: Any,
) -> Call:
    made = Call(
        budget_id=BUDGET,
        hold_id=number.to_bytes(16),
        state=state,
        reserved=100,
        booked=booked,
        open=0,
        created_at=created_at,
        settled=bool(references),
        at=at,
        references=references,
        model="",
        provider="",
        labels=(),
    )
    return dataclasses.replace(made, **changes)


def line(reference: str, amount: Amount, number: int = 2, **changes: Any) -> Line:
    made = Line(number, reference, None, amount, None, "", ())
    return made._replace(**changes)


def findings(
    lines: Iterable[Line],
    calls: Iterable[Call],
    *,
    tolerance: Tolerance = NONE,
    sum_lines: bool = False,
    by_time: bool = False,
) -> list[Finding]:
    return list(
        Matching(
            collect(lines),
            calls,
            period=DAY,
            tolerance=tolerance,
            sum_lines=sum_lines,
            by_time=by_time,
        )
    )


LIVE, LAPSED, DISPUTED = HoldState.LIVE, HoldState.LAPSED, HoldState.DISPUTED
SPEND: dict[str, Any] = {"hold_id": None}

# What the bill says, what the ledger says, and what is to be said of it: status, difference,
# reconciled, bookable.
CASES = {
    "the same": ([line("r", 7)], [call("r", booked=7)], (Status.MATCHED, 0, True, False)),
    "the bill has more": (
        [line("r", 9)],
        [call("r", booked=7)],
        (Status.DIFFERENT, 2, False, True),
    ),
    "the bill has less": (
        [line("r", 0)],
        [call("r", booked=7)],
        (Status.DIFFERENT, -7, False, True),
    ),
    "nothing was settled but the bill": (
        [line("r", 7)],
        [call("r")],
        (Status.DIFFERENT, 7, False, True),
    ),
    "a spend cannot be resolved": (
        [line("r", 9)],
        [call("r", booked=7, **SPEND)],
        (Status.DIFFERENT, 2, False, False),
    ),
    "a dispute is not booked": (
        [line("r", 9)],
        [call("r", booked=7, open=2, state=DISPUTED)],
        (Status.DIFFERENT, 2, False, True),
    ),
    "in the bill only": ([line("r", 7)], [], (Status.BILL_ONLY, 7, False, False)),
    "a line without a reference": ([line("", 7)], [], (Status.BILL_ONLY, 7, False, False)),
    "in the ledger only": ([], [call("r", booked=7)], (Status.LEDGER_ONLY, -7, False, False)),
    "settled without a reference": (
        [],
        [call(booked=7, settled=True)],
        (Status.LEDGER_ONLY, -7, False, False),
    ),
    "begun before the period": (
        [],
        [call("r", booked=7, created_at=999)],
        (Status.EDGE, -7, True, False),
    ),
    "ended after the period": ([], [call("r", booked=7, at=2_000)], (Status.EDGE, -7, True, False)),
    "twice, the same again": (
        [line("r", 7), line("r", 7, 3)],
        [call("r", booked=7)],
        (Status.TWICE, 7, False, False),
    ),
    "in two parts": (
        [line("r", 3), line("r", 4, 3)],
        [call("r", booked=7)],
        (Status.MATCHED, 0, True, False),
    ),
    "settled by two calls": (
        [line("r", 9)],
        [call("r", booked=3), call("r", booked=4, number=2)],
        (Status.AMBIGUOUS, 2, False, False),
    ),
    "settled by two calls, and the sum is right": (
        [line("r", 7)],
        [call("r", booked=3), call("r", booked=4, number=2)],
        (Status.AMBIGUOUS, 0, True, False),
    ),
    "one call of two references": (
        [line("r", 3), line("s", 5, 3)],
        [call("r", "s", booked=7)],
        (Status.DIFFERENT, 1, False, True),
    ),
    "a chain of calls and references": (
        [line("r", 3), line("s", 4, 3)],
        [call("r", "s", booked=3), call("s", booked=4, number=2)],
        (Status.AMBIGUOUS, 0, True, False),
    ),
    "still live": (
        [line("r", 9)],
        [call("r", booked=7, state=LIVE)],
        (Status.LIVE, 2, False, False),
    ),
    "still live, and right so far": (
        [line("r", 7)],
        [call("r", booked=7, state=LIVE)],
        (Status.MATCHED, 0, True, False),
    ),
    "a stream that lapsed": (
        [line("r", 9)],
        [call("r", booked=7, state=LAPSED, open=93)],
        (Status.LAPSED, 2, False, True),
    ),
    "a lapsed hold by its id": (
        [line("r", 9, hold_id=(1).to_bytes(16))],
        [call(state=LAPSED, open=100)],
        (Status.LAPSED, 9, False, True),
    ),
    "a lapsed hold by its id alone": (
        [line("", 9, hold_id=(1).to_bytes(16))],
        [call(state=LAPSED, open=100)],
        (Status.LAPSED, 9, False, True),
    ),
    "a released hold by its id": (
        [line("r", 9, hold_id=(1).to_bytes(16))],
        [call(state=HoldState.RELEASED)],
        (Status.DIFFERENT, 9, False, True),
    ),
    "the reference goes before the id": (
        [line("r", 7, hold_id=(2).to_bytes(16))],
        [call("r", booked=7)],
        (Status.MATCHED, 0, True, False),
    ),
    "an id of no hold": (
        [line("", 7, hold_id=(2).to_bytes(16))],
        [],
        (Status.BILL_ONLY, 7, False, False),
    ),
    "finer than the unit, booked rounded up": (
        [line("r", Decimal("6.1"))],
        [call("r", booked=7)],
        (Status.MATCHED, -1, True, False),
    ),
    "of a hold that lapsed after more was booked than the bill says": (
        [line("r", 7)],
        [call("r", booked=9, state=LAPSED)],
        (Status.DIFFERENT, -2, False, True),
    ),
    "not billed, of two calls of which one is not all within the period": (
        [],
        [call("r", booked=7), call("r", booked=7, number=2, created_at=999)],
        (Status.EDGE, -14, True, False),
    ),
    "named by its id in the second line": (
        [line("r", 3), line("r", 4, 3, hold_id=(1).to_bytes(16))],
        [call(booked=7)],
        (Status.MATCHED, 0, True, False),
    ),
    "finer than the unit, and more than that": (
        [line("r", Decimal("5.9"))],
        [call("r", booked=7)],
        (Status.DIFFERENT, -1, False, True),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_of_a_reference(name: str) -> None:
    lines, calls, expected = CASES[name]
    [found] = findings(lines, calls)
    assert (found.status, found.difference, found.reconciled, found.bookable) == expected


SILENT = {
    "released, and not billed": ([], [call(state=HoldState.RELEASED)]),
    "lapsed, and not billed": ([], [call(state=LAPSED, open=100)]),
    "live, and not billed": ([], [call(state=LIVE)]),
    "of another day": ([], [call("r", booked=7, created_at=1, at=2)]),
    "free of charge": ([line("r", 0)], []),
}


@pytest.mark.parametrize("name", SILENT)
def test_of_what_concerns_nobody_nothing_is_said(name: str) -> None:
    lines, calls = SILENT[name]
    assert findings(lines, calls) == []


@pytest.mark.parametrize(
    ("tolerance", "agrees"),
    [
        (Tolerance(absolute=9), False),
        (Tolerance(absolute=10), True),
        (Tolerance(percent=Decimal("0.99")), False),
        (Tolerance(percent=Decimal(1)), True),
        (Tolerance(9, Decimal(1)), True),
        (Tolerance(10, Decimal("0.5")), True),
    ],
)
def test_a_difference_within_either_tolerance_is_none(tolerance: Tolerance, agrees: bool) -> None:
    for billed, booked in ((1_000, 990), (990, 1_000)):
        [found] = findings([line("r", billed)], [call("r", booked=booked)], tolerance=tolerance)
        assert (found.status is Status.MATCHED) == agrees


def test_lines_of_one_reference_are_summed_on_request() -> None:
    lines = [line("r", 7), line("r", 7, 3)]
    [found] = findings(lines, [call("r", booked=7)], sum_lines=True)
    assert (found.status, found.billed, found.lines, found.bookable) == (
        Status.DIFFERENT,
        14,
        2,
        True,
    )


def moment(at: int) -> Moment:
    return Moment(at, whole_day=False)


def lapsed(number: int, **changes: Any) -> Call:
    return call(number=number, state=LAPSED, open=100, **changes)


FITS = {
    "made in its time": (moment(1_450), 50, "", True),
    "made when it was reserved": (moment(1_400), 100, "m", True),
    "made when it lapsed": (moment(1_500), 50, "", True),
    "made before": (moment(1_399), 50, "", False),
    "made after": (moment(1_501), 50, "", False),
    "dearer than what was reserved": (moment(1_450), 101, "", False),
    "of another model": (moment(1_450), 50, "n", False),
    "of a day only": (Moment(1_450, whole_day=True), 50, "", False),
    "of no time": (None, 50, "", False),
}


@pytest.mark.parametrize("name", FITS)
def test_a_call_that_only_the_bill_has_may_fit_a_hold_that_lapsed(name: str) -> None:
    at, amount, model, fits = FITS[name]
    lines, calls = [line("r", amount, moment=at, model=model)], [lapsed(1, model="m")]
    [found] = findings(lines, calls)
    assert found.status is Status.BILL_ONLY
    assert (found.fits is calls[0]) == fits
    [found] = findings(lines, calls, by_time=True)
    assert (found.status is Status.LAPSED) == found.bookable == fits


def test_what_fits_several_holds_or_lines_is_left_to_people() -> None:
    at = moment(1_450)
    for lines, calls in (
        ([line("r", 5, moment=at)], [lapsed(1), lapsed(2)]),
        ([line("r", 5, moment=at), line("s", 5, 3, moment=at)], [lapsed(1)]),
        ([line("r", 5, moment=at)], [lapsed(1), lapsed(2), lapsed(3)]),
    ):
        found = findings(lines, calls, by_time=True)
        assert [each.status for each in found] == [Status.BILL_ONLY] * len(lines)
        assert [each.fits for each in found] == [None] * len(lines)


def test_what_was_resolved_after_a_lapse_is_found_again_by_its_time() -> None:
    resolved = call(booked=5)
    for amount, expected in (
        (5, [(Status.MATCHED, 0)]),
        (4, [(Status.BILL_ONLY, 4), (Status.LEDGER_ONLY, -5)]),
    ):
        found = findings([line("r", amount, moment=moment(1_450))], [resolved], by_time=True)
        assert [(each.status, each.difference) for each in found] == expected
