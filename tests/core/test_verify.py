"""What an auditor finds who has the entries and the rows, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from peculium_server.core import cbor
from peculium_server.core.encoding import encode_request
from peculium_server.core.operations import ByHolder, ByToken, Kind
from peculium_server.core.state import Budget, Entry, Hold
from peculium_server.core.verify import Finding, Verifier
from tests.core.every_kind import lived
from tests.core.ledger import DAY, HOUR, Ledger, requested, verify
from tests.core.tampering import ENTRY_COLUMNS, altered, rehashed

LEDGER, ROOT = lived()
ENTRIES = tuple(LEDGER.journal)
BUDGETS = tuple(ROOT.tree.known_budgets())
HOLDS = tuple(ROOT.tree.known_holds())
MANY_PARTS = [index for index, entry in enumerate(ENTRIES) if entry.parts > 1]


def _verify(
    entries: Sequence[Entry] = ENTRIES,
    budgets: Sequence[Budget] = BUDGETS,
    holds: Sequence[Hold] = HOLDS,
) -> Finding | None:
    return verify(entries, budgets, holds, ROOT.id)


def _name(entry: Entry) -> str:
    return f"{entry.position}.{entry.part} {entry.kind.name}"


def test_what_was_not_altered_is_verified() -> None:
    assert _verify() is None
    assert len(MANY_PARTS) > 20


def test_the_verifier_counts_what_it_was_shown() -> None:
    verifier = Verifier(ROOT.id)
    for entry in ENTRIES:
        verifier.entry(entry)
    assert verifier.entries == len(ENTRIES)


def test_it_does_not_matter_what_else_was_loaded_when_something_was_closed() -> None:
    assert _verify(rehashed(ENTRIES)) is None


# -- One thing altered ------------------------------------------------------------------------------------


def _found_at(finding: Finding | None, index: int, column: str) -> None:
    """The finding names the altered entry, or one of the parts that disagree with it."""
    assert finding is not None
    entry = ENTRIES[index]
    there = {
        (each.budget_id, each.seq) for each in ENTRIES if each.operation_id == entry.operation_id
    }
    tampered = altered(entry, column)
    there.add((tampered.budget_id, tampered.seq))
    if column in ("part", "parts", "operation_id") and index + 1 < len(ENTRIES):
        # The operation seems to lack a part, which is noticed at the next entry.
        there.add((ENTRIES[index + 1].budget_id, ENTRIES[index + 1].seq))
    assert (finding.budget_id, finding.seq) in there
    assert finding.root_id == ROOT.id


@pytest.mark.parametrize("column", ENTRY_COLUMNS)
@pytest.mark.parametrize("index", range(len(ENTRIES)), ids=[_name(entry) for entry in ENTRIES])
def test_an_altered_column_of_any_entry_is_found_there(index: int, column: str) -> None:
    entries = list(ENTRIES)
    entries[index] = altered(entries[index], column)
    _found_at(_verify(entries), index, column)


@pytest.mark.parametrize("column", ["request", "effect_bytes", "consumed", "digest", "hash"])
def test_an_altered_byte_anywhere_is_found(column: str) -> None:
    for index, entry in enumerate(ENTRIES):
        value = getattr(entry, column)
        for at in range(0, len(value or b""), 9):
            entries = list(ENTRIES)
            entries[index] = altered(entry, column, at)
            assert _verify(entries) is not None


@pytest.mark.parametrize("fewer", [1, 2, 3])
def test_fewer_parts_than_there_are_are_found(fewer: int) -> None:
    for index, entry in enumerate(ENTRIES):
        entries = list(ENTRIES)
        entries[index] = entry._replace(parts=entry.parts - fewer)
        finding = _verify(entries)
        assert finding is not None
        assert finding.rule in ("parts", "digest")


@pytest.mark.parametrize("balance", range(8))
def test_an_altered_balance_is_found(balance: int) -> None:
    index = MANY_PARTS[5]
    money = list(ENTRIES[index].money)
    money[balance] += 1
    entries = list(ENTRIES)
    entries[index] = entries[index]._replace(money=type(ENTRIES[index].money)(*money))
    finding = _verify(entries)
    assert finding is not None
    assert finding.rule == "digest"
    _found_at(finding, index, "money")


# -- Entries that are missing, doubled or in another order ------------------------------------------------------


@pytest.mark.parametrize("index", range(len(ENTRIES)), ids=[_name(entry) for entry in ENTRIES])
def test_a_missing_entry_is_found(index: int) -> None:
    assert _verify([*ENTRIES[:index], *ENTRIES[index + 1 :]]) is not None


def test_a_missing_operation_is_found_at_the_next_entry_of_its_budget() -> None:
    index = next(at for at, entry in enumerate(ENTRIES) if entry.kind is Kind.WITHDRAW)
    following = next(e for e in ENTRIES[index + 1 :] if e.budget_id == ENTRIES[index].budget_id)
    finding = _verify([*ENTRIES[:index], *ENTRIES[index + 1 :]])
    assert finding is not None
    assert (finding.rule, finding.budget_id, finding.seq) == (
        "seq",
        following.budget_id,
        following.seq,
    )
    assert finding.detail == f"{ENTRIES[index].seq} was expected"


def test_an_operation_of_which_the_last_parts_are_missing_is_found_without_any_row() -> None:
    index = next(at for at in MANY_PARTS if ENTRIES[at].part == 1)
    finding = _verify(ENTRIES[:index], (), ())
    assert finding is not None
    assert (finding.rule, finding.seq) == ("parts", ENTRIES[index - 1].seq)
    assert finding.detail == f"{ENTRIES[index].parts - 1} are missing"


@pytest.mark.parametrize("index", range(len(ENTRIES)), ids=[_name(entry) for entry in ENTRIES])
def test_a_doubled_entry_is_found(index: int) -> None:
    assert _verify([*ENTRIES[: index + 1], *ENTRIES[index:]]) is not None


@pytest.mark.parametrize("index", range(len(ENTRIES) - 1))
def test_two_entries_in_another_order_are_found(index: int) -> None:
    first, second = ENTRIES[index : index + 2]
    assert _verify([*ENTRIES[:index], second, first, *ENTRIES[index + 2 :]]) is not None


def test_two_operations_in_another_order_are_found_even_if_they_are_renumbered() -> None:
    """A reserve moved behind the revocation that forbids it."""
    ledger = Ledger()
    root = ledger.grant(100)
    child = root.child(50)
    ledger.do(child.reserve(10))
    ledger.do(root.revoke(child))
    grant, *delegate, reserve, close, emptied = ledger.journal
    entries = [grant, *delegate]
    entries += [close._replace(position=3), emptied._replace(position=3)]
    entries.append(reserve._replace(position=4))
    tree = root.tree
    finding = verify(entries, tree.known_budgets(), tree.known_holds(), root.id)
    assert finding is not None
    assert finding.rule in ("seq", "chain", "digest")


@pytest.mark.parametrize("left", range(len(ENTRIES)))
def test_a_truncated_journal_is_found_by_the_rows(left: int) -> None:
    finding = _verify(ENTRIES[:left])
    assert finding is not None
    assert finding.rule in ("parts", "fold")


def test_an_operation_of_another_tree_is_found() -> None:
    other = Ledger()
    other.grant(1)
    (grant,) = other.journal
    finding = _verify([*ENTRIES, grant._replace(position=ENTRIES[-1].position + 1)])
    assert finding is not None


def test_the_first_thing_that_is_wrong_is_told() -> None:
    entries = list(ENTRIES)
    for index in (10, 20, 30):
        entries[index] = altered(entries[index], "hash")
    finding = _verify(entries, (), ())
    assert finding is not None
    assert (finding.budget_id, finding.seq) == (ENTRIES[10].budget_id, ENTRIES[10].seq)
    assert finding.rule == "chain"


# -- Rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", Budget._fields)
def test_an_altered_column_of_a_budgets_row_is_found(column: str) -> None:
    for index, row in enumerate(BUDGETS):
        rows = list(BUDGETS)
        rows[index] = altered(row, column)
        finding = _verify(budgets=rows)
        assert finding is not None
        assert (finding.rule, finding.seq) == ("fold", 0)
        if column != "budget_id":
            assert finding.budget_id == row.budget_id
            assert column in finding.detail


@pytest.mark.parametrize("column", Hold._fields)
def test_an_altered_column_of_a_holds_row_is_found(column: str) -> None:
    for index, row in enumerate(HOLDS):
        rows = list(HOLDS)
        rows[index] = altered(row, column)
        finding = _verify(holds=rows)
        assert finding is not None
        assert (finding.rule, finding.seq) == ("fold", 0)


def test_a_row_that_is_missing_or_too_many_is_found() -> None:
    unknown = BUDGETS[0]._replace(budget_id=LEDGER.id())
    for finding, budget_id in (
        (_verify(budgets=BUDGETS[1:]), BUDGETS[0].budget_id),
        (_verify(holds=HOLDS[1:]), HOLDS[0].budget_id),
        (_verify(budgets=[*BUDGETS, unknown]), unknown.budget_id),
        (_verify(holds=[*HOLDS, HOLDS[0]._replace(hold_id=LEDGER.id())]), HOLDS[0].budget_id),
    ):
        assert finding is not None
        assert (finding.rule, finding.seq, finding.budget_id) == ("fold", 0, budget_id)


def test_of_several_rows_that_are_missing_one_is_told() -> None:
    for finding in (_verify(budgets=()), _verify(holds=()), _verify(budgets=(), holds=())):
        assert finding is not None
        assert (finding.rule, finding.seq) == ("fold", 0)


# -- Forgeries: all hashes are computed anew ---------------------------------------------------------------------


def _forged(
    kind: Kind, change: Callable[[Entry], dict[str, Any]], rule: str, ledger: Ledger = LEDGER
) -> Finding:
    """The finding on a journal in which the first operation of a kind was forged and rehashed."""
    entries = list(ledger.journal)
    index = next(at for at, entry in enumerate(entries) if entry.kind is kind and entry.part == 0)
    where = entries[index].budget_id, entries[index].seq
    entries[index] = entries[index]._replace(**change(entries[index]))
    root_id = entries[0].root_id
    tree = ledger.trees[root_id]
    finding = verify(rehashed(entries), tree.known_budgets(), tree.known_holds(), root_id)
    assert finding is not None
    assert (finding.budget_id, finding.seq) == where, finding
    assert finding.rule == rule, finding
    return finding


def _asked(**changes: Any) -> Callable[[Entry], dict[str, Any]]:
    def change(entry: Entry) -> dict[str, Any]:
        return {"request": encode_request(replace(requested(entry), **changes))}

    return change


def _packed(change: Callable[[dict[Any, Any]], object]) -> Callable[[Entry], dict[str, Any]]:
    def changed(entry: Entry) -> dict[str, Any]:
        assert entry.request is not None
        packed: Any = cbor.decode(entry.request)
        change(packed)
        return {"request": cbor.encode(packed)}

    return changed


def test_money_from_nowhere_is_found() -> None:
    finding = _forged(Kind.TOP_UP, _asked(amount=101), "decision")
    assert "another effect" in finding.detail


def test_a_balance_that_nobody_moved_is_found() -> None:
    _forged(
        Kind.SPEND,
        lambda entry: {"money": entry.money._replace(available=0, spent=entry.money.spent + 1)},
        "decision",
    )


def test_what_was_never_allowed_is_found() -> None:
    finding = _forged(Kind.SPEND, _asked(amount=10**6), "decision")
    assert "BUDGET_EXHAUSTED" in finding.detail


def test_another_principal_is_found_where_the_budget_was_bound() -> None:
    finding = _forged(Kind.SPEND, lambda _: {"principal": "somebody"}, "decision")
    assert "CAPABILITY_UNKNOWN" in finding.detail


def test_a_token_that_was_never_live_is_found() -> None:
    finding = _forged(Kind.SPEND, lambda _: {"consumed": bytes(32)}, "decision")
    assert "CAPABILITY_UNKNOWN" in finding.detail


def test_another_time_is_found_where_it_mattered() -> None:
    finding = _forged(Kind.RENEW, lambda entry: {"at": entry.at + 10 * DAY}, "decision")
    assert "BUDGET_EXPIRED" in finding.detail


def test_a_time_before_the_one_before_is_found() -> None:
    _forged(Kind.RENEW, lambda entry: {"at": entry.at - 10 * DAY}, "decision")


def test_an_operation_that_was_recorded_twice_is_found() -> None:
    ledger = Ledger()
    root = ledger.grant(100)
    ledger.do(root.top_up(1))
    ledger.do(root.top_up(1))
    grant, first, second = ledger.journal
    entries = rehashed([grant, first])
    again = rehashed([grant, first, second])[2]._replace(operation_id=first.operation_id)
    finding = verify([*entries, again], root.tree.known_budgets(), (), root.id)
    assert finding is not None
    assert finding.rule == "operation"


def test_parts_that_an_operation_has_no_reason_for_are_found() -> None:
    ledger = Ledger()
    root = ledger.grant(100)
    child = root.child(10)
    ledger.do(child.spend(1))
    spend = ledger.journal[-1]
    at_root = root.budget
    extra = ledger.journal[-3]._replace(
        part=1,
        parts=2,
        seq=at_root.seq + 1,
        position=spend.position,
        operation_id=spend.operation_id,
        kind=spend.kind,
        at=spend.at,
        amount=spend.amount,
        principal=spend.principal,
        request=None,
        consumed=None,
    )
    entries = rehashed([*ledger.journal[:-1], spend._replace(parts=2), extra])
    finding = verify(entries, root.tree.known_budgets(), (), root.id)
    assert finding is not None
    assert finding.rule == "decision"


def test_a_return_of_everything_over_an_open_child_is_found() -> None:
    """Also if the child has something available, of which the entries of the return say nothing."""
    ledger = Ledger(eager=0)
    root = ledger.grant(100)
    child = root.child(50)
    child.child(30)
    ledger.do(child.return_all(cascade=True))
    assert ledger.journal[-2].effect.pending == 30
    finding = _forged(Kind.RETURN, _asked(cascade=False), "decision", ledger)
    assert "OPEN_CHILDREN" in finding.detail


def test_a_return_of_everything_over_live_holds_is_found() -> None:
    ledger = Ledger()
    root = ledger.grant(100)
    child = root.child(50)
    child.hold(30)
    ledger.do(child.return_all(cascade=True))
    finding = _forged(Kind.RETURN, _asked(cascade=False), "decision", ledger)
    assert "LIVE_HOLDS" in finding.detail


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Kind.TOP_UP, {"amount": -100}),
        (Kind.TOP_UP, {"amount": 0}),
        (Kind.TOP_UP, {"labels": (("", ""),)}),
        (Kind.RESERVE, {"ttl_us": 1}),
        (Kind.RESERVE, {"hold_id": b"short"}),
        (Kind.DELEGATE, {"children": ()}),
        (Kind.SPEND, {"authority": ByHolder()}),
        (Kind.TOP_UP, {"authority": ByToken(bytes(32))}),
    ],
)
def test_a_request_that_is_malformed_is_found(kind: Kind, changes: dict[str, Any]) -> None:
    _forged(kind, _asked(**changes), "request")


HOSTILE: list[Any] = [
    None,
    True,
    -1,
    2**64 - 1,
    "text",
    b"bytes",
    [],
    [1, 2, 3],
    {},
    {1: 1},
    {"a": 1},
]


@pytest.mark.parametrize("kind", Kind)
def test_no_value_of_a_request_ends_the_verifier(kind: Kind) -> None:
    """Whatever it is, it is a finding."""
    first = next(entry for entry in ENTRIES if entry.kind is kind and entry.part == 0)
    assert first.request is not None
    packed: Any = cbor.decode(first.request)
    for key in (*packed, 99, "a"):
        for value in HOSTILE:
            if packed.get(key) == value:
                continue
            changed = cbor.encode(packed | {key: value})
            entries = [
                entry._replace(request=changed) if entry is first else entry for entry in ENTRIES
            ]
            finding = _verify(rehashed(entries))
            assert finding is not None
            # What could have been asked for is noticed by what came of it, or by the rows alone.
            assert finding.rule in ("request", "decision", "fold")
            if finding.rule == "request":
                assert (finding.budget_id, finding.seq) == (first.budget_id, first.seq)


@pytest.mark.parametrize(
    "request_", [b"", b"\x00", b"\xf6", b"\x80", b"\xa1", b"\xff", b"\xa0\x00"]
)
def test_bytes_that_are_no_request_are_found(request_: bytes) -> None:
    _forged(Kind.SPEND, lambda _: {"request": request_}, "request")


def test_a_request_without_its_authority_is_found() -> None:
    _forged(Kind.SPEND, _packed(lambda packed: packed.pop(1)), "request")
    _forged(Kind.SPEND, lambda _: {"consumed": None}, "request")


@pytest.mark.parametrize("at", [2**62, -(2**62), 253_402_300_800_000_000])
def test_no_time_ends_the_verifier(at: int) -> None:
    for kind in Kind:
        entries = [
            entry._replace(at=at) if entry.kind is kind else entry for entry in LEDGER.journal
        ]
        assert _verify(rehashed(entries)) is not None


def test_a_time_that_cannot_be_told_is_found() -> None:
    """Behind the year 9999 a refusal cannot say when a lease has ended."""
    ledger = Ledger()
    ledger.now = 253_402_300_800_000_000
    child = ledger.grant(100).child(50, lease_us=HOUR)
    ledger.do(child.spend(1))
    assert ledger.verify(child.root_id) is None
    _forged(Kind.SPEND, lambda entry: {"at": entry.at + HOUR}, "decision", ledger)


def test_a_part_that_says_what_was_asked_is_found() -> None:
    index = next(at for at in MANY_PARTS if ENTRIES[at].part == 1)
    entries = list(ENTRIES)
    entries[index] = entries[index]._replace(request=entries[index - 1].request)
    finding = _verify(entries)
    assert finding is not None
    assert finding.rule == "request"
