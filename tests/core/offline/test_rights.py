"""Whose authority an operation names, and the tokens that it consumes and produces: each rule broken alone."""

from __future__ import annotations

from typing import Any

import pytest

from peculium_server.core import cbor
from peculium_server.core.encoding import BY_HOLDER, BY_TOKEN, decode_effect, encode_effect
from peculium_server.core.operations import Kind
from tests.core.ledger import Ledger
from tests.core.offline.exported import Exported
from tests.core.offline.forging import LEDGER, ROOT, asking, at, breaks, forged, request
from tests.core.tampering import rehashed


@pytest.mark.parametrize(
    "kind",
    [
        Kind.RESERVE,
        Kind.SPEND,
        Kind.SETTLE,
        Kind.RELEASE,
        Kind.EXTEND,
        Kind.ACCEPT,
        Kind.RECOVER,
        Kind.DELEGATE,
        Kind.FUND,
        Kind.RENEW,
        Kind.RETURN,
        Kind.REVOKE,
        Kind.RESOLVE,
    ],
)
def test_a_consumed_token_was_the_live_one(kind: Kind) -> None:
    index = at(kind)
    breaks(forged(index, consumed=b"\x01" * 32), "token", index)


def test_a_token_is_consumed_once() -> None:
    index = at(Kind.SPEND)
    entry = LEDGER.journal[index]
    before = next(
        e
        for e in reversed(LEDGER.journal[:index])
        if e.budget_id == entry.budget_id and e.consumed is not None
    )
    breaks(forged(index, consumed=before.consumed), "token", index)


def test_a_token_that_has_to_be_consumed_is() -> None:
    index = at(Kind.SPEND)
    breaks(forged(index, consumed=None), "token", index)


@pytest.mark.parametrize("kind", [Kind.LAPSE, Kind.EXPIRE, Kind.COLLECT, Kind.FREEZE, Kind.TOP_UP])
def test_what_is_not_by_token_consumes_none(kind: Kind) -> None:
    index = at(kind)
    breaks(forged(index, consumed=b"\x01" * 32), "token", index)


def test_the_other_budgets_of_an_operation_consume_none() -> None:
    index = at(Kind.DELEGATE, 1)
    finding = breaks(forged(index, consumed=b"\x01" * 32), "token", index)
    assert "concerned" in finding.detail


def test_a_produced_token_is_new() -> None:
    index = at(Kind.SPEND)
    entry = LEDGER.journal[index]
    breaks(forged(index, request=request(index, {5: entry.consumed})), "token", index)


def test_a_holds_token_is_new() -> None:
    index = at(Kind.RESERVE)
    entry = LEDGER.journal[index]
    breaks(forged(index, request=request(index, {7: entry.consumed})), "token", index)


def test_the_next_token_is_named() -> None:
    index = at(Kind.SPEND)
    breaks(forged(index, request=request(index, {5: None})), "token", index)


def test_a_rotated_hold_has_its_own_token_consumed() -> None:
    index = at(Kind.RECOVER, 1)
    breaks(forged(index, consumed=b"\x01" * 32), "token", index)


def test_a_bound_token_is_its_holders() -> None:
    index = at(Kind.SPEND)
    breaks(forged(index, principal="mallory"), "authority", index)


def reserved_by_holder() -> int:
    """Where a budget that a principal holds was reserved from."""
    index = at(Kind.RESERVE, skip=3)
    asked: Any = cbor.decode(LEDGER.journal[index].request or b"")
    assert asked[1] == BY_HOLDER
    return index


def test_what_a_principal_holds_is_its_own() -> None:
    index = reserved_by_holder()
    breaks(forged(index, principal="mallory"), "authority", index)


@pytest.mark.parametrize("by", [BY_HOLDER, BY_TOKEN])
def test_what_a_principal_holds_has_no_token(by: int) -> None:
    index = reserved_by_holder()
    breaks(forged(index, request=request(index, {1: by, 5: b"\x01" * 32})), "token", index)


def test_a_hold_is_settled_by_its_token_alone() -> None:
    index = at(Kind.SETTLE, skip=1)
    breaks(forged(index, request=request(index, {1: BY_HOLDER})), "authority", index)


def test_a_kind_is_the_admins() -> None:
    index = at(Kind.TOP_UP)
    breaks(forged(index, request=request(index, {1: 2})), "authority", index)


@pytest.mark.parametrize("kind", [Kind.TOP_UP, Kind.FREEZE, Kind.LAPSE, Kind.COLLECT])
def test_what_no_agent_may_is_not_by_a_token_that_is_anyones(kind: Kind) -> None:
    index = at(kind)
    holder = ROOT.tree.budget(LEDGER.journal[index].budget_id).holder
    asked = request(index, {1: BY_TOKEN})
    breaks(forged(index, request=asked, principal=holder or "anyone"), "authority", index)


def test_the_ledgers_own_operations_are_the_systems() -> None:
    index = at(Kind.LAPSE)
    breaks(forged(index, principal="mallory"), "authority", index)


def test_an_admin_does_not_spend() -> None:
    index = at(Kind.SPEND)
    breaks(forged(index, request=request(index, {1: 3})), "authority", index)


def test_a_hold_that_has_ended_is_not_rotated() -> None:
    """Everything that it says of the hold is so, but that there was anything to rotate."""
    ledger = Ledger()
    root = ledger.grant(100, holder="agent")
    ended, live = root.hold(10), root.hold(20)
    ledger.do(ended.release())
    ledger.do(root.recover(holds=(live.rotation(),)))
    *before, first, second = ledger.journal
    assert (first.kind, first.parts) == (Kind.RECOVER, 2)
    asked: Any = cbor.decode(first.request or b"")
    [[_, token]] = asked[HOLDS]
    told = decode_effect(second.effect_bytes, root.id)._replace(hold=ended.hold)
    forged_parts = [
        first._replace(request=asking(first.request, {HOLDS: [[ended.id, token]]})),
        second._replace(consumed=ended.hold.token, effect_bytes=encode_effect(told)),
    ]
    exported = Exported.of(ledger)._replace(entries=rehashed([*before, *forged_parts]))
    finding = breaks(exported, "token", len(before))
    assert finding.detail == "a hold that it rotates has no live token"


HOLDS = 23
"""The key of the holds that a request rotates."""
