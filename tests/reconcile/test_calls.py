"""Calls put together from a journal, and planted differences found among them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from peculium_server.core import cbor
from peculium_server.core.operations import Kind, Usage
from peculium_server.core.state import HoldState
from peculium_server.reconcile.amounts import Tolerance
from peculium_server.reconcile.bill import Line
from peculium_server.reconcile.calls import Call, Calls, Level, Recorded
from peculium_server.reconcile.groups import Groups, GroupStatus
from peculium_server.reconcile.references import Matching, Status, collect
from peculium_server.reconcile.times import DAY_US, Moment, Period
from tests.core.ledger import HOUR, MINUTE, HoldRef, Ledger, Node

USAGE = Usage(provider="openai", model="gpt-4o")
ALWAYS = Period()


def calls_of(ledger: Ledger, *label_keys: str) -> list[Call]:
    levels = {
        budget.budget_id: Level(budget.parent_id, dict(budget.labels))
        for tree in ledger.trees.values()
        for budget in tree.known_budgets()
    }
    calls = Calls(levels, label_keys)
    for entry in ledger.journal:
        if entry.request is not None:
            calls.add(
                Recorded(
                    entry.kind,
                    entry.budget_id,
                    entry.operation_id,
                    entry.at,
                    entry.request,
                    entry.effect_bytes,
                )
            )
    return list(calls)


def only_call(ledger: Ledger, *label_keys: str) -> Call:
    [call] = calls_of(ledger, *label_keys)
    return call


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def root(ledger: Ledger) -> Node:
    return ledger.grant(1_000)


def test_a_settled_hold_is_a_call_with_its_reference_and_model(ledger: Ledger, root: Node) -> None:
    hold = root.hold(10)
    reserved_at = ledger.now
    ledger.pass_time(MINUTE)
    ledger.do(hold.settle(7, reference="r", usage=USAGE))
    call = only_call(ledger)
    assert (call.hold_id, call.state, call.reserved, call.booked) == (
        hold.id,
        HoldState.SETTLED,
        10,
        7,
    )
    assert (call.references, call.model, call.provider) == (("r",), "gpt-4o", "openai")
    assert (call.created_at, call.at, call.counted_at) == (reserved_at, ledger.now, ledger.now)


def test_increments_of_a_stream_are_one_call(ledger: Ledger, root: Node) -> None:
    hold = root.hold(10)
    ledger.do(hold.settle(2, keep_open=True, reference="r"))
    ledger.do(hold.settle(3, keep_open=True, reference="r"))
    assert only_call(ledger).state is HoldState.LIVE
    ledger.do(hold.settle(4, reference="s"))
    call = only_call(ledger)
    assert (call.references, call.booked, call.state) == (("r", "s"), 9, HoldState.SETTLED)


def test_a_spend_is_a_call_without_a_hold(ledger: Ledger, root: Node) -> None:
    ledger.do(root.spend(5, reference="r", usage=USAGE))
    call = only_call(ledger)
    assert (call.hold_id, call.references, call.booked, call.model) == (None, ("r",), 5, "gpt-4o")


def test_a_lapse_leaves_open_what_the_hold_had_and_a_late_settle_closes_it(
    ledger: Ledger, root: Node
) -> None:
    hold = root.hold(10)
    reserved_at = ledger.now
    ledger.pass_time(HOUR)
    ledger.do(hold.lapse())
    call = only_call(ledger)
    assert (call.state, call.booked, call.open) == (HoldState.LAPSED, 0, 10)
    assert (call.at, call.counted_at) == (ledger.now, reserved_at)
    ledger.do(hold.settle(4, reference="r"))
    call = only_call(ledger)
    assert (call.state, call.booked, call.open) == (HoldState.SETTLED, 4, 0)


def test_a_dispute_leaves_open_what_is_booked_to_nobody_until_it_is_resolved(
    ledger: Ledger, root: Node
) -> None:
    child = root.child(50, overrun_factor=0)
    hold = child.hold(10)
    ledger.do(hold.settle(17, reference="r"))
    assert (only_call(ledger).booked, only_call(ledger).open) == (10, 7)
    ledger.pass_time(HOUR)
    settled_at = only_call(ledger).at
    ledger.do(child.admin_resolve(hold, 16, reason="bill"))
    call = only_call(ledger)
    assert (call.booked, call.open, call.at) == (16, 0, settled_at)


def test_labels_are_the_settles_or_the_reserves_or_those_of_the_nearest_budget(
    ledger: Ledger,
) -> None:
    root = ledger.grant(1_000, labels=(("model", "m0"), ("run", "0"), ("team", "a")))
    child = root.child(500, labels=(("run", "1"),))
    cases: list[tuple[Any, Any, tuple[str, str, str]]] = [
        ((), {}, ("m0", "1", "a")),
        ((("run", "2"),), {}, ("m0", "2", "a")),
        ((("run", "2"), ("model", "m2")), {"labels": (("run", "3"),)}, ("m2", "3", "a")),
        ((), {"labels": (("model", "m3"), ("team", "b"))}, ("m3", "1", "b")),
        ((("model", "m2"),), {"usage": USAGE}, ("gpt-4o", "1", "a")),
        ((), {"usage": USAGE, "labels": (("model", "m3"),)}, ("gpt-4o", "1", "a")),
    ]
    for reserve_labels, settle, _ in cases:
        ledger.do(child.hold(10, labels=reserve_labels).settle(1, **settle))
    assert [(call.model, *call.labels) for call in calls_of(ledger, "run", "team")] == [
        expected for _, _, expected in cases
    ]


def test_a_label_without_a_value_is_the_nearest_too() -> None:
    ledger = Ledger()
    root = ledger.grant(1_000, labels=(("team", "a"),))
    ledger.do(root.child(500, labels=(("team", ""),)).spend(5))
    assert only_call(ledger, "team").labels == ("",)


def test_what_is_no_record_of_a_call_is_refused() -> None:
    calls = Calls({})
    for request, effect in (
        (b"\xa0", b"\xa0"),
        (b"", b""),
        (cbor.encode([1]), cbor.encode({11: 1})),
    ):
        with pytest.raises(ValueError, match=r"recorded|cut"):
            calls.add(Recorded(Kind.SETTLE, b"b", b"o", 1, request, effect))
    calls.add(Recorded(Kind.GRANT, b"b", b"o", 1, b"", b""))
    assert list(calls) == []


# -- Planted differences ------------------------------------------------------------------------------

ENDS = ("settle", "stream", "late", "release", "lapse", "live", "spend", "resolved")
PLANTS = ("same", "more", "less", "missing", "twice", "foreign")
END_AND_PLANT = st.tuples(
    st.sampled_from(ENDS), st.sampled_from(PLANTS), st.integers(2, 9), st.integers(0, 2)
)


def _end(ledger: Ledger, root: Node, how: str, amount: int, reference: str, model: str) -> int:
    """Make a call that ends in some way; what of it is booked."""
    usage = Usage(provider="p", model=model)
    if how == "spend":
        ledger.do(root.spend(amount, reference=reference, usage=usage))
        return amount
    hold: HoldRef = root.hold(10, labels=(("model", model),))
    match how:
        case "settle":
            ledger.do(hold.settle(amount, reference=reference, usage=usage))
        case "stream":
            ledger.do(hold.settle(1, keep_open=True, reference=reference, usage=usage))
            ledger.do(hold.settle(amount - 1, reference=reference, usage=usage))
        case "late":
            ledger.pass_time(HOUR)
            ledger.do(hold.lapse())
            ledger.do(hold.settle(amount, reference=reference, usage=usage))
        case "resolved":
            ledger.do(hold.settle(1, reference=reference, usage=usage))
            ledger.do(root.admin_resolve(hold, amount, reason="bill"))
        case "release":
            ledger.do(hold.release())
        case "lapse":
            ledger.pass_time(HOUR)
            ledger.do(hold.lapse())
        case _:
            assert how == "live"
    return 0 if how in {"release", "lapse", "live"} else amount


def _planted(
    plant: str, booked: int, number: int, at: int, model: str
) -> tuple[list[Line], set[tuple[Status, str, int]]]:
    """The lines of a bill for a call, and what is to be found of it."""
    name = f"call-{number}"

    def line(amount: int, reference: str = name) -> Line:
        return Line(number, reference, None, amount, Moment(at, whole_day=False), model, ())

    if not booked:
        return [], set()
    # Dearer than any hold, so that none can explain it.
    foreign = line(1_000, f"foreign-{number}")
    plants: dict[str, tuple[list[Line], set[tuple[Status, str, int]]]] = {
        "same": ([line(booked)], set()),
        "more": ([line(booked + 3)], {(Status.DIFFERENT, name, 3)}),
        "less": ([line(booked - 1)], {(Status.DIFFERENT, name, -1)}),
        "missing": ([], {(Status.LEDGER_ONLY, name, -booked)}),
        "twice": ([line(booked), line(booked)], {(Status.TWICE, name, booked)}),
        "foreign": ([line(booked), foreign], {(Status.BILL_ONLY, f"foreign-{number}", 1_000)}),
    }
    return plants[plant]


@settings(deadline=None, max_examples=60)
@given(st.lists(END_AND_PLANT, max_size=12))
def test_exactly_the_planted_differences_are_found(plan: list[tuple[str, str, int, int]]) -> None:
    ledger = Ledger(checked=False)
    root = ledger.grant(10_000)
    lines: list[Line] = []
    planted: set[tuple[Status, str, int]] = set()
    by_group: dict[tuple[int, str], int] = {}
    for number, (how, plant, amount, variant) in enumerate(plan):
        ledger.pass_time(variant * DAY_US // 2)
        model = f"model-{variant}"
        booked = _end(ledger, root, how, amount, f"call-{number}", model)
        more, expected = _planted(plant, booked, number, ledger.now, model)
        lines += more
        planted |= expected
        key = ledger.now // DAY_US, model
        by_group[key] = by_group.get(key, 0) + sum(int(line.amount) for line in more) - booked
    calls = calls_of(ledger)
    matching = Matching(collect(lines), calls, period=ALWAYS, tolerance=Tolerance())
    assert {
        (found.status, *found.references, found.difference)
        for found in matching
        if found.status is not Status.MATCHED
    } == planted
    _sums_are_found(lines, [call for call in calls if call.booked], by_group)


def _sums_are_found(
    lines: list[Line], calls: list[Call], expected: dict[tuple[int, str], int]
) -> None:
    groups = Groups()
    groups.bill(lines)
    groups.book(calls, ALWAYS)
    if groups.names != ("day", "model"):
        # There is not one line, so that nothing is grouped by anything.
        return
    judged = groups.judged(Tolerance())
    assert sorted(each.difference for each in judged if not each.reconciled) == sorted(
        difference for difference in expected.values() if difference
    )
    assert all((each.status is GroupStatus.MATCHED) == (each.difference == 0) for each in judged)
