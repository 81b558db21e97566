"""What an operation may say of holds: each rule broken alone, in entries that agree with themselves otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from peculium_server.core.encoding import decode_effect, encode_effect
from peculium_server.core.operations import Kind
from peculium_server.core.state import Hold, HoldState
from tests.core.ledger import Ledger
from tests.core.offline.exported import Exported
from tests.core.offline.forging import (
    LEDGER,
    WHOLE,
    asking,
    at,
    breaks,
    effect,
    forged,
    moved,
    only,
    request,
)
from tests.core.tampering import rehashed


def hold_of(index: int) -> Hold:
    entry = LEDGER.journal[index]
    hold = decode_effect(entry.effect_bytes, entry.budget_id).hold
    assert hold is not None
    return hold


@pytest.mark.parametrize(
    ("kind", "by"),
    [
        (Kind.EXTEND, {"held": -1, "available": 1}),
        (Kind.SETTLE, {"held": -1, "available": 1}),
        (Kind.LAPSE, {"forfeited": -1, "available": 1}),
    ],
    ids=lambda value: value.name if isinstance(value, Kind) else "",
)
def test_a_hold_that_goes_on_gives_nothing_back(kind: Kind, by: dict[str, int]) -> None:
    index = at(kind)
    hold = hold_of(index)
    less = hold._replace(remaining=hold.remaining - 1)
    breaks(moved(index, {"hold": less}, **by), "hold", index)


def test_a_hold_is_kept_open_by_who_asks_for_it() -> None:
    index = at(Kind.SETTLE)
    breaks(forged(index, request=request(index, {9: None})), "hold", index)


def test_money_moves_in_the_first_entry_on_a_budget_only() -> None:
    index = at(Kind.RECOVER, 2)
    breaks(moved(index, advanced=1), "changes", index)


@pytest.mark.parametrize("kind", [Kind.RECOVER, Kind.RESOLVE])
def test_further_entries_say_the_hold_as_it_is(kind: Kind) -> None:
    index = at(kind, 1)
    other = hold_of(index)._replace(expires_at=1)
    breaks(forged(index, effect_bytes=effect(index, hold=other)), "hold", index)


@pytest.mark.parametrize(("kind", "part"), [(Kind.SPEND, 0), (Kind.DELEGATE, 1)])
def test_what_concerns_no_hold_says_none(kind: Kind, part: int) -> None:
    index = at(kind, part)
    hold = hold_of(at(Kind.RESERVE))
    breaks(forged(index, effect_bytes=effect(index, hold=hold)), "hold", index)


def test_what_is_returned_is_what_was_asked_for() -> None:
    index = at(Kind.RETURN)
    breaks(forged(index, request=request(index, {3: 1})), "amount", index)


def test_a_budget_releases_holds_of_its_own_only() -> None:
    ledger = Ledger()
    root = ledger.grant(100)
    one, other = root.child(50), root.child(50)
    others = other.hold(10)
    ledger.do(one.hold(10).release())
    entries = list(ledger.journal)
    released = entries[-1]
    effect_ = decode_effect(released.effect_bytes, released.budget_id)
    assert effect_.hold is not None
    theirs = others.hold
    claimed = effect_.hold._replace(
        hold_id=theirs.hold_id, created_at=theirs.created_at, expires_at=theirs.expires_at
    )
    entries[-1] = released._replace(
        consumed=theirs.token,
        effect_bytes=encode_effect(effect_._replace(hold=claimed)),
        request=asking(released.request, {6: theirs.hold_id}),
    )
    finding = Exported.of(ledger)._replace(entries=rehashed(entries)).findings()[0]
    assert (finding.rule, finding.budget_id, finding.seq) == ("hold", one.id, released.seq)


def test_the_amount_is_what_was_asked_for() -> None:
    for kind in (Kind.TOP_UP, Kind.RESERVE, Kind.SPEND, Kind.DELEGATE, Kind.RELEASE, Kind.RETURN):
        index = at(kind)
        parts = LEDGER.journal[index].parts
        entries = list(LEDGER.journal)
        for part in range(index, index + parts):
            entries[part] = entries[part]._replace(amount=entries[part].amount + 1)
        finding = only(WHOLE._replace(entries=rehashed(entries)).findings())
        assert finding.rule in ("amount", "conservation", "hold"), (kind, finding)
        assert finding.seq == LEDGER.journal[index].seq


def test_what_was_reported_is_what_was_recorded() -> None:
    index = at(Kind.SETTLE)
    breaks(forged(index, request=request(index, {8: 4})), "amount", index)


@pytest.mark.parametrize(
    "changes",
    [
        {"amount": 31},
        {"booked": 6},
        {"remaining": 1},
        {"created_at": 1},
        {"state": HoldState.DISPUTED},
        {"disputed": 1},
        {"expires_at": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_hold_goes_on_as_it_was(changes: dict[str, Any]) -> None:
    index = at(Kind.SETTLE)
    entry = LEDGER.journal[index]
    hold = decode_effect(entry.effect_bytes, entry.budget_id).hold
    assert hold is not None
    altered = effect(index, hold=hold._replace(**changes))
    finding = only(forged(index, effect_bytes=altered).findings())
    assert finding.rule in ("hold", "amount")
    assert (finding.budget_id, finding.seq) == (entry.budget_id, entry.seq)


@pytest.mark.parametrize("name", ["disputed", "disputes", "holds_live"])
def test_a_budget_counts_its_holds(name: str) -> None:
    index = at(Kind.SETTLE)
    told = decode_effect(LEDGER.journal[index].effect_bytes, b"")
    more: dict[str, Any] = {name: getattr(told, name) + 1}
    if name == "disputes":
        # An open dispute freezes, which others read.
        more["version"] = told.version + 1
    breaks(forged(index, effect_bytes=effect(index, **more)), "hold", index)


def test_money_is_held_by_holds_alone() -> None:
    index = at(Kind.SPEND)
    breaks(moved(index, spent=-1, forfeited=1), "hold", index)


def test_an_open_dispute_is_counted() -> None:
    ledger = Ledger()
    child = ledger.grant(1_000).child(100, overrun_factor=1)
    ledger.do(child.hold(10).settle(50))
    assert child.budget.disputes == 1
    assert Exported.of(ledger).findings(decide=True) == []
    [disputed] = [e for e in ledger.journal if e.kind is Kind.SETTLE and e.budget_id == child.id]
    told = decode_effect(disputed.effect_bytes, child.id)
    # So that nothing says that it is frozen: neither does its version.
    hidden = encode_effect(told._replace(disputes=0, version=0))
    entries = [e._replace(effect_bytes=hidden) if e is disputed else e for e in ledger.journal]
    finding = only(Exported.of(ledger)._replace(entries=rehashed(entries)).findings())
    assert (finding.rule, finding.seq) == ("hold", disputed.seq)
    assert "disputes" in finding.detail


@pytest.mark.parametrize("name", ["state", "amount", "booked", "created_at", "expires_at"])
def test_a_new_hold_is_as_it_was_asked_for(name: str) -> None:
    index = at(Kind.RESERVE)
    hold = hold_of(index)
    other: Any = HoldState.LAPSED if name == "state" else getattr(hold, name) + 1
    breaks(
        forged(index, effect_bytes=effect(index, hold=hold._replace(**{name: other}))),
        "hold",
        index,
    )


@pytest.mark.parametrize("kind", [Kind.RESERVE, Kind.SETTLE, Kind.LAPSE])
def test_an_operation_says_the_hold_that_it_names(kind: Kind) -> None:
    index = at(kind)
    other = hold_of(index)._replace(hold_id=b"another hold's 1")
    finding = breaks(forged(index, effect_bytes=effect(index, hold=other)), "hold", index)
    assert "that it names" in finding.detail
