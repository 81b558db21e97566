"""Every rule of the offline verification, each broken alone: the chains are hashed again, the rows made anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from peculium_server.core import cbor
from peculium_server.core.encoding import BY_HOLDER, BY_TOKEN, decode_effect, encode_effect
from peculium_server.core.lanes import lane_of
from peculium_server.core.limits import BALANCE_MAX
from peculium_server.core.offline.export import ExportAudit
from peculium_server.core.operations import Kind
from peculium_server.core.state import Balances, Entry, HoldState
from peculium_server.core.verify import Finding
from peculium_server.signing import is_signed
from tests.core.every_kind import lived
from tests.core.ledger import HOUR, Ledger
from tests.core.offline.exported import Exported
from tests.core.tampering import altered, rehashed

LEDGER, ROOT = lived()
WHOLE = Exported.of(LEDGER)


def only(findings: Sequence[Finding]) -> Finding:
    assert len(findings) >= 1
    return findings[0]


def at(kind: Kind, part: int = 0, *, skip: int = 0, of: Sequence[Entry] = LEDGER.journal) -> int:
    """Where an entry of a kind is."""
    found = [i for i, entry in enumerate(of) if entry.kind is kind and entry.part == part]
    return found[skip]


def forged(index: int, **changes: Any) -> Exported:
    """An entry altered, and all hashes computed anew, as who knows the encoding could."""
    entries = list(LEDGER.journal)
    entries[index] = entries[index]._replace(**changes)
    return WHOLE._replace(entries=rehashed(entries))


def effect(index: int, **changes: Any) -> bytes:
    entry = LEDGER.journal[index]
    return encode_effect(decode_effect(entry.effect_bytes, entry.budget_id)._replace(**changes))


def request(index: int, keys: dict[int, Any]) -> bytes:
    """The request of an entry with other values of some keys; None: without it."""
    asked = LEDGER.journal[index].request
    assert asked is not None
    said: Any = cbor.decode(asked)
    said.update(keys)
    return cbor.encode({key: value for key, value in said.items() if value is not None})


def breaks(exported: Exported, rule: str, index: int | None) -> Finding:
    """The first finding, which has to be of the rule and the entry."""
    finding = only(exported.findings())
    assert finding.rule == rule, finding
    if index is not None:
        entry = exported.entries[index]
        assert (finding.budget_id, finding.seq) == (entry.budget_id, entry.seq), finding
    return finding


def test_what_was_not_altered_breaks_no_rule() -> None:
    assert WHOLE.findings(decide=True) == []
    assert WHOLE._replace(entries=rehashed(WHOLE.entries)).findings() == []


# -- Hashes, parts and places ---------------------------------------------------------------------------


def test_digest() -> None:
    index = at(Kind.SPEND)
    entries = list(WHOLE.entries)
    entries[index] = entries[index]._replace(amount=entries[index].amount + 1)
    breaks(WHOLE._replace(entries=entries), "digest", index)


def test_chain() -> None:
    index = at(Kind.SPEND)
    entries = list(WHOLE.entries)
    entries[index] = entries[index]._replace(hash=bytes(32))
    breaks(WHOLE._replace(entries=entries), "chain", index)


def test_seq() -> None:
    index = at(Kind.SPEND)
    breaks(forged(index, seq=LEDGER.journal[index].seq + 1), "seq", index)


def test_position_has_no_gap() -> None:
    index = at(Kind.SPEND)
    entries = [entry for i, entry in enumerate(WHOLE.entries) if i != index]
    finding = only(WHOLE._replace(entries=entries).findings())
    assert finding.rule == "position"
    assert (finding.budget_id, finding.seq) == (entries[index].budget_id, entries[index].seq)


def test_position_ascends() -> None:
    index = at(Kind.SPEND)
    moved = LEDGER.journal[index].position - 1
    breaks(forged(index, position=moved), "position", index)


def test_a_lane_ends_where_the_header_says() -> None:
    cut = WHOLE._replace(header=WHOLE.header._replace(positions=(LEDGER.position + 1,)))
    assert breaks(cut, "position", None).detail.startswith("lane 0 ends at")


@pytest.mark.parametrize("part", [0, 1, 2])
def test_parts_are_all_there(part: int) -> None:
    index = next(i for i, e in enumerate(WHOLE.entries) if e.kind is Kind.DELEGATE and e.parts == 3)
    entries = [entry for i, entry in enumerate(WHOLE.entries) if i != index + part]
    assert only(WHOLE._replace(entries=entries).findings()).rule == "parts"


def test_parts_agree() -> None:
    index = at(Kind.DELEGATE, 1)
    entries = list(WHOLE.entries)
    entries[index] = entries[index]._replace(at=entries[index].at + 1)
    breaks(WHOLE._replace(entries=entries), "parts", index)


def test_only_part_0_says_what_was_asked() -> None:
    index = at(Kind.DELEGATE, 1)
    breaks(forged(index, request=b"\xa0"), "request", index)


def test_request_can_be_read() -> None:
    index = at(Kind.SPEND)
    breaks(forged(index, request=request(index, {28: 1})), "request", index)


def test_effect_can_be_read() -> None:
    index = at(Kind.SPEND)
    raw = cbor.encode({1: {2: -3, 5: 3}, 4: "text"})
    breaks(forged(index, effect_bytes=raw), "effect", index)


def test_operation_ids_are_new() -> None:
    first, second = at(Kind.TOP_UP), at(Kind.WITHDRAW)
    again = forged(second, operation_id=b"x" * 16)
    entries = list(again.entries)
    entries[second] = entries[second]._replace(operation_id=entries[first].operation_id)
    breaks(WHOLE._replace(entries=entries), "operation", second)


def test_a_lane_has_its_trees_only() -> None:
    lanes = next(lanes for lanes in range(2, 20) if lane_of(ROOT.id, lanes) != 0)
    positions = (LEDGER.position, *[0] * (lanes - 1))
    breaks(WHOLE._replace(header=WHOLE.header._replace(positions=positions)), "lane", 0)


def test_a_later_entry_of_a_tree_is_of_its_lane_too() -> None:
    index = at(Kind.SPEND)
    lane = lane_of(ROOT.id, 2)
    positions = [0, 0]
    positions[lane] = LEDGER.position
    # Of one tree, whose positions may have gaps.
    audit = ExportAudit(public_keys=None, is_signed=is_signed)
    audit.header(WHOLE.header._replace(positions=tuple(positions), root_id=ROOT.id))
    for other, entry in enumerate(WHOLE.entries):
        audit.entry(entry, 1 - lane if other == index else lane)
    finding = only(audit.findings)
    entry = WHOLE.entries[index]
    assert (finding.rule, finding.budget_id, finding.seq) == ("lane", entry.budget_id, entry.seq)


def test_time_does_not_go_back_in_a_budget() -> None:
    index = at(Kind.COLLECT)
    assert only(forged(index, at=1).findings()).rule in ("time", "parts")


# -- Money ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", Balances._fields)
def test_balances_add_up(balance: str) -> None:
    index = at(Kind.SPEND)
    money = LEDGER.journal[index].money
    # The root may have overrun; in a child it is out of bounds as well.
    altered = money._replace(**{balance: getattr(money, balance) + 1_000_000})
    breaks(forged(index, money=altered), "balances", index)


def test_balances_are_not_negative() -> None:
    index = at(Kind.SPEND)
    money = LEDGER.journal[index].money
    altered = money._replace(available=-5, held=money.held + money.available + 5)
    # A forged number below zero has an encoding too, so the hashes do not tell.
    breaks(forged(index, money=altered), "balances", index)


def moved(index: int, **by: int) -> Exported:
    """An entry after which the balances are others, as its changes say too."""
    entry = LEDGER.journal[index]
    changes = decode_effect(entry.effect_bytes, entry.budget_id).changes
    told = changes._replace(**{name: getattr(changes, name) + more for name, more in by.items()})
    money = entry.money._replace(
        **{name: getattr(entry.money, name) + more for name, more in by.items()}
    )
    return forged(index, money=money, effect_bytes=effect(index, changes=told))


def test_balances_have_a_bound() -> None:
    index = at(Kind.TOP_UP)
    breaks(moved(index, granted=BALANCE_MAX, available=BALANCE_MAX), "balances", index)


def test_one_budget_alone_delegates_nothing() -> None:
    index = at(Kind.SPEND)
    breaks(moved(index, delegated=1, available=-1), "conservation", index)


def test_overrun_is_the_roots_alone() -> None:
    index = at(Kind.ACCEPT)
    money = LEDGER.journal[index].money
    altered = money._replace(overrun=5, spent=money.spent + 5)
    breaks(forged(index, money=altered), "balances", index)


def test_balances_are_those_before_and_the_changes() -> None:
    index = at(Kind.SPEND)
    money = LEDGER.journal[index].money
    altered = money._replace(available=money.available + 1, spent=money.spent - 1)
    breaks(forged(index, money=altered), "changes", index)


def test_what_leaves_a_budget_arrives_in_another() -> None:
    """A delegation of which the child gets one less; both entries are consistent by themselves."""
    index = at(Kind.DELEGATE)
    breaks(moved(index, delegated=1, available=-1), "conservation", index)


def test_money_does_not_come_from_nowhere() -> None:
    index = at(Kind.SPEND)
    breaks(moved(index, granted=7, available=7), "conservation", index)


def test_versions_are_those_of_the_ancestors() -> None:
    index = at(Kind.SPEND)
    told = decode_effect(LEDGER.journal[index].effect_bytes, b"")
    older = (told.versions[0] + 1, *told.versions[1:])
    breaks(forged(index, effect_bytes=effect(index, versions=older)), "versions", index)


def test_a_version_counts_what_others_read() -> None:
    index = at(Kind.FREEZE)
    told = decode_effect(LEDGER.journal[index].effect_bytes, b"")
    breaks(forged(index, effect_bytes=effect(index, version=told.version - 1)), "versions", index)


# -- Tokens, authority and holds -------------------------------------------------------------------------


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


def test_the_ledgers_own_operations_are_the_systems() -> None:
    index = at(Kind.LAPSE)
    breaks(forged(index, principal="mallory"), "authority", index)


def test_an_admin_does_not_spend() -> None:
    index = at(Kind.SPEND)
    breaks(forged(index, request=request(index, {1: 3})), "authority", index)


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


def test_a_child_is_made_once_and_by_its_parent() -> None:
    index = at(Kind.DELEGATE)
    asked: Any = cbor.decode(LEDGER.journal[index].request or b"")
    children = asked[14]
    breaks(forged(index, request=request(index, {14: [*children, children[0]]})), "budget", index)
    fewer = forged(index, request=request(index, {14: []}))
    assert only(fewer.findings()).rule in ("budget", "amount")


def test_each_child_has_what_was_asked_for_it() -> None:
    index = next(i for i, e in enumerate(WHOLE.entries) if e.kind is Kind.DELEGATE and e.parts == 3)
    asked: Any = cbor.decode(LEDGER.journal[index].request or b"")
    one, other = asked[14]
    one[3], other[3] = one[3] + 1, other[3] - 1
    breaks(forged(index, request=request(index, {14: [one, other]})), "budget", index + 1)


def test_a_childs_id_is_no_longer_than_others() -> None:
    index = at(Kind.DELEGATE)
    asked: Any = cbor.decode(LEDGER.journal[index].request or b"")
    children = asked[14]
    longer = children[0][22] + b"\x00"
    children[0][22] = longer
    entries = list(LEDGER.journal)
    entries[index] = entries[index]._replace(request=request(index, {14: children}))
    entries[index + 1] = entries[index + 1]._replace(budget_id=longer)
    breaks(WHOLE._replace(entries=rehashed(entries)), "budget", index)


def test_a_root_is_granted_once() -> None:
    other = Ledger()
    other.grant(5)
    [entry] = other.journal
    again = entry._replace(
        operation_id=b"y" * 16,
        root_id=ROOT.id,
        budget_id=ROOT.id,
        position=LEDGER.position + 1,
        seq=ROOT.budget.seq + 1,
    )
    exported = WHOLE._replace(
        entries=rehashed([*WHOLE.entries, again]),
        header=WHOLE.header._replace(positions=(LEDGER.position + 1,)),
    )
    breaks(exported, "budget", len(WHOLE.entries))


def test_an_atomic_batch_is_there_whole() -> None:
    ledger = Ledger()
    one, two = ledger.grant(holder="agent"), ledger.grant(holder="agent")
    ledger.atomic([one.reserve(1), two.reserve(1)])
    exported = Exported.of(ledger)
    assert exported.findings() == []
    # Without the other tree's operation nothing in this tree is wrong by itself.
    kept = [entry for entry in exported.entries if entry is not exported.entries[-1]]
    cut = exported._replace(
        entries=kept, header=exported.header._replace(positions=(ledger.position - 1,))
    )
    rules = {finding.rule for finding in cut.findings()}
    assert "batch" in rules


# -- Rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", WHOLE.budgets[0]._fields)
def test_a_row_of_a_budget_is_what_its_entries_say(column: str) -> None:
    for index, row in enumerate(WHOLE.budgets):
        budgets = list(WHOLE.budgets)
        budgets[index] = altered(row, column)
        assert only(WHOLE._replace(budgets=budgets).findings()).rule == "fold"


@pytest.mark.parametrize("column", WHOLE.holds[0][1]._fields)
def test_a_row_of_a_hold_is_what_its_entries_say(column: str) -> None:
    for index, (root_id, row) in enumerate(WHOLE.holds):
        holds = list(WHOLE.holds)
        holds[index] = root_id, altered(row, column)
        assert only(WHOLE._replace(holds=holds).findings()).rule == "fold"


def test_no_row_is_missing_or_there_twice() -> None:
    for fewer in (
        WHOLE._replace(budgets=WHOLE.budgets[1:]),
        WHOLE._replace(holds=WHOLE.holds[1:]),
        WHOLE._replace(holds=[*WHOLE.holds, WHOLE.holds[0]]),
    ):
        assert only(fewer.findings()).rule == "fold"


def test_a_rehashed_tail_is_found_by_the_rows() -> None:
    index = at(Kind.FREEZE)
    finding = only(forged(index, trace_id=bytes(16)).findings())
    assert (finding.rule, finding.seq) == ("fold", 0)
    assert "head" in finding.detail


# -- Deciding again -----------------------------------------------------------------------------------------


def test_a_decision_that_the_rules_would_not_make_is_found_by_deciding_again() -> None:
    """Who held a budget whose lease was over reserved all the same: nothing but the rules forbids it."""
    ledger = Ledger()
    child = ledger.grant(100).child(50, lease_us=HOUR)
    ledger.do(child.spend(5))
    entries = list(ledger.journal)
    entries[-1] = entries[-1]._replace(at=entries[-1].at + 2 * HOUR)
    made = rehashed(entries)
    budgets = [_with_head(row, made) for row in Exported.of(ledger).budgets]
    exported = Exported.of(ledger)._replace(entries=made, budgets=budgets)
    assert exported.findings() == []
    finding = only(exported.findings(decide=True))
    assert (finding.rule, finding.budget_id, finding.seq) == ("decision", child.id, 2)


def _with_head(row: Any, entries: Sequence[Entry]) -> Any:
    last = [entry for entry in entries if entry.budget_id == row.budget_id][-1]
    return row._replace(head=last.hash, last_at=last.at)


# -- Random ledgers -----------------------------------------------------------------------------------------


def test_every_altered_column_of_every_entry_is_found() -> None:
    for seed in range(600):
        assert WHOLE.tampered(seed).findings() != [], seed
