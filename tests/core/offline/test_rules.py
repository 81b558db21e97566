"""Every rule of the offline verification, each broken alone: the chains are hashed again, the rows made anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from peculium_server.core import cbor
from peculium_server.core.encoding import decode_effect
from peculium_server.core.lanes import lane_of
from peculium_server.core.limits import BALANCE_MAX
from peculium_server.core.offline.export import ExportAudit
from peculium_server.core.offline.records import Counts
from peculium_server.core.operations import Kind
from peculium_server.core.state import Balances, Entry
from peculium_server.signing import is_signed
from tests.core.ledger import HOUR, Ledger
from tests.core.offline.exported import Exported
from tests.core.offline.forging import (
    LEDGER,
    ROOT,
    WHOLE,
    at,
    breaks,
    effect,
    forged,
    moved,
    only,
    request,
)
from tests.core.tampering import altered, rehashed


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


def test_seq_goes_on_within_an_operation() -> None:
    index = at(Kind.RECOVER, 1)
    assert LEDGER.journal[index].budget_id == LEDGER.journal[index - 1].budget_id
    breaks(forged(index, seq=LEDGER.journal[index].seq + 1), "seq", index)


def test_labels_are_texts() -> None:
    index = at(Kind.SPEND)
    for labels in ({"run": 7}, {7: "run"}):
        breaks(forged(index, request=request(index, {2: labels})), "request", index)


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


def of_one_tree(exported: Exported, root_id: bytes = ROOT.id) -> Exported:
    return exported._replace(header=exported.header._replace(root_id=root_id))


def test_position_ascends_in_one_tree_too() -> None:
    index = at(Kind.SPEND)
    before = LEDGER.journal[index].position - 1
    breaks(of_one_tree(forged(index, position=before)), "position", index)


def test_one_trees_export_has_no_other() -> None:
    breaks(of_one_tree(WHOLE, b"another root's 1"), "lane", 0)


def test_a_lane_ends_where_the_header_says() -> None:
    cut = WHOLE._replace(header=WHOLE.header._replace(positions=(LEDGER.position + 1,)))
    assert breaks(cut, "position", None).detail.startswith("lane 0 ends at")


@pytest.mark.parametrize("part", [0, 1, 2])
def test_parts_are_all_there(part: int) -> None:
    index = next(i for i, e in enumerate(WHOLE.entries) if e.kind is Kind.DELEGATE and e.parts == 3)
    entries = [entry for i, entry in enumerate(WHOLE.entries) if i != index + part]
    assert only(WHOLE._replace(entries=entries).findings()).rule == "parts"


def test_the_part_of_another_operation_makes_none_whole() -> None:
    """The first one lacks its last part, the next one its first: what is left looks like one operation."""
    entries = WHOLE.entries
    index = next(
        i
        for i, (e, other) in enumerate(zip(entries, entries[2:], strict=False))
        if (e.part, e.parts, other.part) == (0, 2, 0) and other.parts > 1
    )
    left = [*entries[: index + 1], *entries[index + 3 :]]
    assert left[index].operation_id != left[index + 1].operation_id
    assert left[index + 1].part == 1
    finding = breaks(WHOLE._replace(entries=left), "parts", index)
    assert finding.detail == "1 are missing"


def test_a_part_that_is_missing_at_the_end_is_told_before_the_rows_that_differ_for_it() -> None:
    last = WHOLE.entries[-1]
    entries = [*WHOLE.entries[:-1], last._replace(parts=last.parts + 1)]
    finding = breaks(WHOLE._replace(entries=entries), "parts", len(entries) - 1)
    assert finding.detail == "1 are missing"


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


# -- Budgets and batches, headers and trailers --------------------------------------------------------


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


@pytest.mark.parametrize(
    "changes",
    [
        {"incarnation": b"another ledger's"},
        {"root_id": ROOT.id},
        {"positions": (LEDGER.position, 0)},
        {"positions": (LEDGER.position - 1,)},
        {"encoding_version": 2},
    ],
    ids=["ledger", "tree", "lanes", "position", "encoding"],
)
def test_a_header_goes_on_with_the_one_before(changes: dict[str, Any]) -> None:
    audit = ExportAudit(public_keys=None, is_signed=is_signed)
    audit.header(WHOLE.header)
    assert audit.findings == []
    audit.header(WHOLE.header._replace(**changes))
    assert only(audit.findings).rule == "header"


@pytest.mark.parametrize("name", Counts._fields)
def test_a_trailer_counts_what_is_there(name: str) -> None:
    audit = ExportAudit(public_keys=None, is_signed=is_signed)
    audit.trailer(Counts())
    assert audit.findings == []
    audit.trailer(Counts()._replace(**{name: 1}))
    finding = only(audit.findings)
    assert finding.rule == "trailer"
    assert f"other {name} than" in finding.detail


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
