"""Checkpoints: what they have sealed cannot be altered, and the reference page and its vectors are true."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import cbor2
import pytest
from hypothesis import given, strategies as st

from peculium_server.core.checkpoint import Chain, Leaf, SealedHeads, key_id_of, signed_message
from peculium_server.core.encoding import entry_hash
from peculium_server.core.merkle import Step, leaf_hash
from peculium_server.core.state import Entry
from peculium_server.signing import is_signed
from tests.core.checkpoints import (
    FILE,
    INCARNATION,
    KEY,
    OTHER_KEY,
    Record,
    public,
    sealed,
    signed,
    text,
    verified,
)
from tests.core.every_kind import lived
from tests.core.merkle import root_by, root_of
from tests.core.tampering import rehashed

PAGE = (FILE.parent / "checkpoints.md").read_text()
VECTORS = json.loads(FILE.read_text())

JOURNAL: Sequence[Entry] = tuple(lived()[0].journal)
LAST = JOURNAL[-1].position
STOPS = st.sets(st.integers(1, LAST), min_size=1, max_size=6).map(sorted)

Tamper = Callable[[list[Record]], None]


# -- What is sealed ---------------------------------------------------------------------------------------


@given(stops=STOPS)
def test_whatever_is_sealed_verifies_with_the_entries_behind_it(stops: list[int]) -> None:
    assert verified(sealed(JOURNAL, stops), JOURNAL) is None


def test_nothing_sealed_is_nothing_wrong() -> None:
    assert verified([], JOURNAL) is None


def test_a_lane_in_which_nothing_moved_seals_nothing() -> None:
    [record] = sealed(JOURNAL, [LAST])
    same = record.sealed.checkpoint._replace(number=2, previous_hash=record.sealed.hash)
    finding = verified([record, Record(signed(same), record.leaves)], JOURNAL)
    assert finding is not None
    assert "seals nothing" in finding.detail


@given(stops=STOPS, at=st.integers(0, len(JOURNAL) - 1))
def test_a_sealed_entry_that_is_altered_is_found_whatever_is_hashed_again(
    stops: list[int], at: int
) -> None:
    forged = list(JOURNAL)
    money = forged[at].money
    forged[at] = forged[at]._replace(money=money._replace(spent=money.spent + 1))
    # All parts of an operation are hashed again, and all entries behind.
    finding = verified(sealed(JOURNAL, stops), rehashed(forged))
    if JOURNAL[at].position > stops[-1]:
        assert finding is None
        return
    assert finding is not None
    assert finding.rule == "checkpoint"
    assert "another hash" in finding.detail


@given(stops=STOPS, at=st.integers(0, len(JOURNAL) - 1))
def test_a_sealed_entry_that_is_taken_out_is_found(stops: list[int], at: int) -> None:
    taken = JOURNAL[at]
    rest = [entry for entry in JOURNAL if entry is not taken]
    finding = verified(sealed(JOURNAL, stops), rest)
    head = taken.position <= stops[-1] and not any(
        entry.budget_id == taken.budget_id
        and entry.seq > taken.seq
        and _covered_by(stops, entry.position) == _covered_by(stops, taken.position)
        for entry in JOURNAL
    )
    if head:
        assert finding is not None
        assert (finding.budget_id, finding.rule) == (taken.budget_id, "checkpoint")
        assert finding.detail.endswith("is missing")
    else:
        # That the seq has a gap is found by whoever checks the chain.
        assert finding is None


def _covered_by(stops: Sequence[int], position: int) -> int:
    return sum(stop < position for stop in stops)


def test_a_truncated_tail_is_found_at_its_first_entry() -> None:
    last = JOURNAL[-1].budget_id
    of_budget = [entry for entry in JOURNAL if entry.budget_id == last]
    cut = [entry for entry in JOURNAL if entry not in of_budget[-2:]]
    finding = verified(sealed(JOURNAL, [of_budget[-3].position, LAST]), cut)
    assert finding is not None
    assert (finding.budget_id, finding.detail) == (
        last,
        f"entry {of_budget[-1].seq} of the budget was sealed by checkpoint 2, and is missing",
    )


def test_a_truncated_tail_is_found_behind_what_the_checkpoint_has_seen_too() -> None:
    last = JOURNAL[-1].budget_id
    of_budget = [entry for entry in JOURNAL if entry.budget_id == last]
    cut = [entry for entry in JOURNAL if entry not in of_budget[-2:]]
    finding = verified(sealed(JOURNAL, [LAST]), cut)
    assert finding is not None
    assert finding.seq == of_budget[-2].seq


def several() -> tuple[bytes, list[Entry]]:
    """A budget with the last three entries of its own up to some position."""
    for entry in reversed(JOURNAL):
        of_budget = [each for each in JOURNAL if each.budget_id == entry.budget_id]
        if len(of_budget) > 4:
            return entry.budget_id, of_budget[-3:]
    raise AssertionError("no budget has so many entries")


def test_of_entries_that_no_leaf_seals_the_first_is_named() -> None:
    budget_id, last = several()
    before = last[0].position - 1
    fewer = [entry for entry in JOURNAL if entry not in last]
    finding = verified(sealed(fewer, [before, LAST]), JOURNAL)
    assert finding is not None
    assert (finding.budget_id, finding.seq) == (budget_id, last[0].seq)
    assert finding.detail.endswith("is not sealed by checkpoint 2")


def test_of_entries_behind_a_sealed_one_the_first_is_named() -> None:
    budget_id, last = several()
    fewer = [entry for entry in JOURNAL if entry not in last[1:]]
    finding = verified(sealed(fewer, [LAST]), JOURNAL)
    assert finding is not None
    assert (finding.budget_id, finding.seq) == (budget_id, last[1].seq)
    assert finding.detail.endswith("was not there when checkpoint 1 was sealed")


def test_an_entry_that_is_put_in_before_a_checkpoint_is_found() -> None:
    first = JOURNAL[0]
    head = max(
        (entry for entry in JOURNAL if entry.budget_id == first.budget_id and entry.position <= 3),
        key=lambda entry: entry.seq,
    )
    forged = head._replace(
        seq=head.seq + 1, position=3, hash=entry_hash(head.hash, head.digest, 0), part=9
    )
    journal = sorted([*JOURNAL, forged], key=lambda entry: (entry.position, entry.part))
    finding = verified(sealed(JOURNAL, [3]), journal)
    assert finding is not None
    assert (finding.budget_id, finding.seq) == (first.budget_id, head.seq + 1)
    assert "was not there" in finding.detail


def test_a_budget_that_is_put_in_before_a_checkpoint_is_found() -> None:
    made_up = JOURNAL[0]._replace(budget_id=b"\xff" * 16)
    finding = verified(sealed(JOURNAL, [3, LAST]), [made_up, *JOURNAL])
    assert finding is not None
    assert (finding.budget_id, finding.seq) == (made_up.budget_id, 1)
    assert finding.detail.endswith("is not sealed by checkpoint 1")


def test_entries_after_the_last_checkpoint_are_nobodys_business() -> None:
    later = JOURNAL[-1]._replace(position=LAST + 1, seq=1, budget_id=bytes(16))
    assert verified(sealed(JOURNAL, [LAST]), [*JOURNAL, later]) is None


# -- What cannot be done to checkpoints --------------------------------------------------------------------


def _sealed_again(records: list[Record], **changes: Any) -> None:
    """Alter the second checkpoint and sign it again, as who has the key could."""
    records[1] = Record(signed(records[1].sealed.checkpoint._replace(**changes)), records[1].leaves)


def _with_leaves(records: list[Record], *leaves: Leaf) -> None:
    records[1] = records[1]._replace(leaves=leaves)


def _resealed_with_leaves(records: list[Record], *leaves: Leaf) -> None:
    root = root_of(leaf.hash() for leaf in leaves)
    _sealed_again(records, merkle_root=root, leaves=len(leaves))
    _with_leaves(records, *leaves)


def _with_signature(records: list[Record], **changes: Any) -> None:
    records[1] = records[1]._replace(sealed=records[1].sealed._replace(**changes))


def _resealed_with_none(records: list[Record]) -> None:
    _sealed_again(records, leaves=0)
    _with_leaves(records)


def _with_key(records: list[Record], key: Any) -> None:
    records[1] = records[1]._replace(sealed=signed(records[1].sealed.checkpoint, key))


CHAIN_TAMPERINGS: dict[str, tuple[Tamper, str]] = {
    "one is missing": (lambda records: records.__delitem__(1), "checkpoint 2 was expected"),
    "two change places": (lambda records: records.reverse(), "checkpoint 1 was expected"),
    "one comes twice": (lambda records: records.insert(1, records[0]), "checkpoint 2 was expected"),
    "another ledger's": (
        lambda records: _sealed_again(records, incarnation=bytes(16)),
        "of another ledger",
    ),
    "another predecessor": (
        lambda records: _sealed_again(records, previous_hash=bytes(32)),
        "does not follow",
    ),
    "another hash": (lambda records: _with_signature(records, hash=bytes(32)), "its hash"),
    "a time that was before": (
        lambda records: _sealed_again(records, sealed_at=0),
        "sealed before",
    ),
    "a lane too many": (lambda records: _sealed_again(records, positions=(5, 5)), "2 lanes, not 1"),
    "positions go back": (lambda records: _sealed_again(records, positions=(1,)), "takes back"),
    "no leaves": (_resealed_with_none, "seals nothing"),
    "a leaf less": (lambda records: _with_leaves(records, *records[1].leaves[1:]), "leaves"),
    "a leaf altered": (
        lambda records: _with_leaves(
            records, *records[1].leaves[:-1], records[1].leaves[-1]._replace(head=bytes(32))
        ),
        "Merkle root",
    ),
    "leaves in another order": (
        lambda records: _resealed_with_leaves(records, *records[1].leaves[::-1]),
        "order of their ids",
    ),
    "a leaf twice": (
        lambda records: _resealed_with_leaves(records, records[1].leaves[0], *records[1].leaves),
        "order of their ids",
    ),
    "a leaf without a number": (
        lambda records: _with_leaves(records, records[1].leaves[0]._replace(seq=-1)),
        "a leaf of it is none",
    ),
    "a leaf cut elsewhere": (
        lambda records: _with_leaves(
            records,
            records[1].leaves[0]._replace(root_id=bytes(15), budget_id=bytes(17)),
        ),
        "a leaf of it is none",
    ),
    "a signature altered": (
        lambda records: _with_signature(records, signature=bytes(64)),
        "not signed with the key",
    ),
    "a key that is not known": (
        lambda records: _with_key(records, OTHER_KEY),
        "which is not known",
    ),
}


@pytest.mark.parametrize(("tamper", "told"), CHAIN_TAMPERINGS.values(), ids=list(CHAIN_TAMPERINGS))
def test_a_chain_that_was_altered_is_found_at_its_first_checkpoint(
    tamper: Tamper, told: str
) -> None:
    records = sealed(JOURNAL, [2, 5, LAST])
    tamper(records)
    finding = verified(records, JOURNAL)
    assert finding is not None
    assert finding.rule == "checkpoint"
    assert told in finding.detail


def test_a_leaf_that_its_checkpoints_entries_do_not_have_is_found() -> None:
    records = sealed(JOURNAL, [2, LAST])
    alien = Leaf(b"\xff" * 16, b"\xff" * 16, 1, bytes(32))
    _resealed_with_leaves(records, *records[1].leaves, alien)
    finding = verified(records, JOURNAL)
    assert finding is not None
    assert (finding.root_id, finding.seq) == (alien.root_id, 1)


def test_a_checkpoint_that_was_cut_off_is_found_by_the_leaves_that_are_left() -> None:
    records = sealed(JOURNAL, [2, LAST])
    numbered = [
        (number, leaf) for number, record in enumerate(records, 1) for leaf in record.leaves
    ]
    heads = SealedHeads((2,), numbered)
    for entry in JOURNAL:
        heads.entry(entry)
    finding = heads.finish()
    assert finding is not None
    assert finding.detail.endswith("is sealed by checkpoint 2, which is missing")


def test_keys_change_and_old_signatures_stay_good() -> None:
    records = sealed(JOURNAL, [2, 5, LAST], keys=[KEY, OTHER_KEY])
    assert len({record.sealed.key_id for record in records}) == 2
    assert verified(records, JOURNAL, keys=[KEY, OTHER_KEY]) is None
    finding = verified(records, JOURNAL, keys=[OTHER_KEY])
    assert finding is not None
    assert finding.detail.startswith("checkpoint 1: it is signed with the key")


FIRST, SECOND = bytes([1]) * 16, bytes([2]) * 16
"""What a ledger was before it was restored, twice."""


@pytest.mark.parametrize(
    "incarnations",
    [
        (FIRST, SECOND, INCARNATION),
        (FIRST, FIRST, INCARNATION),
        # Nothing was sealed between two restores, or since the last.
        (FIRST, INCARNATION),
        (FIRST, SECOND),
        (FIRST,),
        (INCARNATION,),
    ],
)
def test_a_ledger_that_was_restored_goes_on_with_its_checkpoints(
    incarnations: tuple[bytes, ...],
) -> None:
    records = sealed(JOURNAL, [2, 5, LAST], incarnations=incarnations)
    assert verified(records, JOURNAL, earlier=[FIRST, SECOND]) is None


@pytest.mark.parametrize(
    ("incarnations", "number"),
    [
        ((SECOND, FIRST), 2),
        ((FIRST, INCARNATION, FIRST), 3),
        ((bytes(16),), 1),
    ],
)
def test_no_checkpoint_is_of_an_earlier_incarnation_than_the_one_before(
    incarnations: tuple[bytes, ...], number: int
) -> None:
    records = sealed(JOURNAL, [2, 5, LAST], incarnations=incarnations)
    finding = verified(records, JOURNAL, earlier=[FIRST, SECOND])
    assert finding is not None
    assert finding.detail == f"checkpoint {number}: it is of another ledger"


def test_a_ledger_that_got_its_incarnation_back_has_it_twice() -> None:
    records = sealed(JOURNAL, [2, 5, LAST], incarnations=(INCARNATION, FIRST, INCARNATION))
    assert verified(records, JOURNAL, earlier=[INCARNATION, FIRST]) is None
    assert verified(records, JOURNAL, earlier=[FIRST]) is not None


def test_a_key_under_another_keys_id_is_not_believed() -> None:
    records = sealed(JOURNAL, [LAST], keys=[OTHER_KEY])
    forged = records[0].sealed._replace(key_id=key_id_of(public(KEY)))
    chain = Chain(INCARNATION, 1, {forged.key_id: public(OTHER_KEY)}, is_signed)
    chain.checkpoint(forged)
    finding = chain.finish()
    assert finding is not None
    assert "which is not known" in finding.detail


def test_a_leaf_belongs_to_a_checkpoint() -> None:
    chain = Chain(INCARNATION, 1, {}, is_signed)
    with pytest.raises(ValueError, match="without a checkpoint"):
        chain.leaf(Leaf(bytes(16), bytes(16), 1, bytes(32)))


# -- The reference page and its vectors ----------------------------------------------------------------------


def test_the_vectors_are_what_the_code_makes() -> None:
    assert FILE.read_text() == text()


def test_the_page_says_what_is_hashed_and_signed() -> None:
    for said in (
        '"peculium.checkpoint.v1" 0x00 ‖ checkpoint',
        '"peculium.checkpoint-signature.v1" 0x00 ‖ hash',
        '"peculium.leaf.v1" 0x00 ‖ root id ‖ budget id ‖ seq ‖ head',
        '"peculium.node.v1" 0x00 ‖ left ‖ right',
        "checkpoint = [ number, sealed at, incarnation, positions, Merkle root, leaves, previous hash ]",
    ):
        assert said in PAGE


@pytest.mark.parametrize("vector", VECTORS["checkpoints"], ids=lambda vector: str(vector["number"]))
def test_the_encoding_is_that_of_the_page_by_an_independent_implementation(
    vector: dict[str, Any],
) -> None:
    encoded = cbor2.dumps(
        [
            vector["number"],
            vector["sealed_at"],
            bytes.fromhex(vector["incarnation"]),
            vector["positions"],
            bytes.fromhex(vector["merkle_root"]),
            len(vector["leaves"]),
            bytes.fromhex(vector["previous_hash"]),
        ],
        canonical=True,
    )
    assert encoded.hex() == vector["encoded"]


@pytest.mark.parametrize("vector", VECTORS["checkpoints"], ids=lambda vector: str(vector["number"]))
def test_the_vectors_prove_and_are_signed(vector: dict[str, Any]) -> None:
    assert is_signed(
        bytes.fromhex(VECTORS["public_key"]),
        bytes.fromhex(vector["signature"]),
        signed_message(bytes.fromhex(vector["hash"])),
    )
    for leaf in vector["leaves"]:
        hashed = leaf_hash(
            bytes.fromhex(leaf["root_id"])
            + bytes.fromhex(leaf["budget_id"])
            + leaf["seq"].to_bytes(8)
            + bytes.fromhex(leaf["head"])
        )
        assert hashed.hex() == leaf["hash"]
        path = [Step(bytes.fromhex(step["sibling"]), step["left"]) for step in leaf["path"]]
        assert root_by(hashed, path).hex() == vector["merkle_root"]
