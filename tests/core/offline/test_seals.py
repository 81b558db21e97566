"""Checkpoints of an export, compared with what they have sealed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peculium_server.core.checkpoint import key_id_of
from peculium_server.core.offline.export import ExportAudit
from peculium_server.core.offline.records import Counts, Header, LeafOf, SealedBy
from peculium_server.core.state import Budget, Entry
from peculium_server.core.verify import Finding
from peculium_server.signing import is_signed
from tests.core.checkpoints import INCARNATION, KEY, Record, public, sealed
from tests.core.every_kind import lived
from tests.core.offline.exported import budget_row, hold_row
from tests.core.tampering import rehashed

LEDGER, ROOT = lived()
JOURNAL = LEDGER.journal
LAST = LEDGER.position
STOPS = (5, 20, LAST - 3)
OTHER = Ed25519PrivateKey.generate()


def audited(
    records: Sequence[Record],
    *,
    journal: Sequence[Entry] = JOURNAL,
    budgets: Sequence[Budget] | None = None,
    key: Ed25519PrivateKey | None = None,
    told: Mapping[bytes, bytes] | None = None,
    published: Mapping[int, bytes] | None = None,
    earlier: tuple[bytes, ...] = (),
) -> tuple[list[Finding], int | None]:
    """What is found in an export with checkpoints, and how many entries are not sealed."""
    keys = None if key is None else {key_id_of(public(key)): public(key)}
    audit = ExportAudit(public_keys=keys, is_signed=is_signed, published=published)
    position = journal[-1].position
    audit.header(Header(1, INCARNATION, LEDGER.now, (position,), None, earlier))
    for entry in journal:
        audit.entry(entry, 0)
    for row in budgets if budgets is not None else ROOT.tree.known_budgets():
        audit.budget(*budget_row(row))
    for hold in ROOT.tree.known_holds():
        audit.hold(*hold_row(ROOT.id, hold))
    for record in records:
        told_key = (told or {}).get(record.sealed.key_id, public(KEY))
        audit.checkpoint(SealedBy(record.sealed, told_key))
        for leaf in record.leaves:
            audit.leaf(LeafOf(record.sealed.checkpoint.number, leaf))
    audit.trailer(Counts(*audit.counts))
    return audit.finish(), audit.unsealed


def test_what_was_sealed_and_not_altered_verifies_with_the_right_key() -> None:
    findings, unsealed = audited(sealed(JOURNAL, STOPS), key=KEY)
    assert findings == []
    assert unsealed == sum(entry.position > STOPS[-1] for entry in JOURNAL)


def test_without_a_key_those_that_the_export_names_are_used() -> None:
    assert audited(sealed(JOURNAL, STOPS))[0] == []


def test_another_key_is_refused() -> None:
    [finding] = audited(sealed(JOURNAL, STOPS), key=OTHER)[0]
    assert finding.rule == "checkpoint"
    assert "which is not known" in finding.detail


def test_a_checkpoint_that_was_signed_again_with_another_key_is_found() -> None:
    forged = sealed(JOURNAL, STOPS, (OTHER,))
    assert audited(forged, key=KEY)[0] != []
    told = {key_id_of(public(OTHER)): public(OTHER)}
    # By itself such an export is consistent: that is what the key is for.
    assert audited(forged, told=told)[0] == []


def test_a_public_key_that_does_not_belong_to_the_id_is_not_used() -> None:
    told = {key_id_of(public(KEY)): public(OTHER)}
    [finding] = audited(sealed(JOURNAL, STOPS), told=told)[0]
    assert "which is not known" in finding.detail


def test_without_checkpoints_nothing_is_said_to_be_sealed() -> None:
    assert audited([]) == ([], None)


@pytest.mark.parametrize("index", [0, 7, 20])
def test_a_chain_that_was_hashed_again_is_found_at_the_sealed_head(index: int) -> None:
    """Rows and hashes were all made anew, as an administrator of the database could."""
    entries = list(JOURNAL)
    first = JOURNAL[index]
    for other, entry in enumerate(JOURNAL):
        if entry.position == first.position:
            entries[other] = entry._replace(trace_id=b"t" * 16)
    forged = rehashed(entries)
    heads = {entry.budget_id: entry.hash for entry in forged}
    budgets = [row._replace(head=heads[row.budget_id]) for row in ROOT.tree.known_budgets()]
    assert audited([], journal=forged, budgets=budgets)[0] == []
    [finding] = audited(sealed(JOURNAL, STOPS), journal=forged, budgets=budgets, key=KEY)[0]
    sealing = next(stop for stop in STOPS if stop >= first.position)
    head = [e for e in JOURNAL if e.budget_id == finding.budget_id and e.position <= sealing][-1]
    assert (finding.rule, finding.seq) == ("checkpoint", head.seq)
    assert "has another hash" in finding.detail


def test_a_truncated_tail_is_found() -> None:
    cut = [entry for entry in JOURNAL if entry.position <= STOPS[-1] - 2]
    findings, _ = audited(sealed(JOURNAL, STOPS), journal=cut, key=KEY)
    assert "checkpoint" in {finding.rule for finding in findings}
    [seal] = [finding for finding in findings if finding.rule == "checkpoint"]
    assert f"seals lane 0 up to {STOPS[-1]}, which ends at {STOPS[-1] - 2}" in seal.detail


def test_a_missing_leaf_is_found() -> None:
    records = sealed(JOURNAL, STOPS)
    records[1] = records[1]._replace(leaves=records[1].leaves[:-1])
    [finding] = audited(records, key=KEY)[0]
    assert "leaves" in finding.detail


def sealed_head() -> int:
    """Where the last entry before the first checkpoint is, which is its budget's head there."""
    return max(at for at, entry in enumerate(JOURNAL) if entry.position <= STOPS[0])


def test_an_entry_that_was_sealed_and_is_missing_is_found() -> None:
    at = sealed_head()
    more = JOURNAL[at]._replace(seq=JOURNAL[at].seq + 1, hash=bytes(32))
    [finding] = audited(sealed([*JOURNAL[: at + 1], more], STOPS[:1]), key=KEY)[0]
    assert (finding.budget_id, finding.seq) == (more.budget_id, more.seq)
    assert finding.detail.endswith("was sealed by checkpoint 1, and is missing")


def test_an_entry_that_was_not_there_when_its_budget_was_sealed_is_found() -> None:
    budget_id = ROOT.id
    at = max(i for i in range(sealed_head() + 1) if JOURNAL[i].budget_id == budget_id)
    fewer = [entry for index, entry in enumerate(JOURNAL) if index != at]
    [finding] = audited(sealed(fewer, STOPS[:1]), key=KEY)[0]
    assert (finding.budget_id, finding.seq) == (budget_id, JOURNAL[at].seq)
    assert finding.detail.endswith("was not there when checkpoint 1 was sealed")


@pytest.mark.parametrize(("earlier", "held"), [((bytes(16),), True), ((), False)])
def test_an_export_says_what_the_ledger_was_before_it_was_restored(
    earlier: tuple[bytes, ...], held: bool
) -> None:
    records = sealed(JOURNAL, STOPS, incarnations=(bytes(16), INCARNATION))
    findings, _ = audited(records, earlier=earlier)
    assert (findings == []) is held


def test_a_leaf_belongs_to_the_checkpoint_before_it() -> None:
    record = sealed(JOURNAL, STOPS)[0]
    audit = ExportAudit(public_keys=None, is_signed=is_signed)
    audit.header(Header(1, INCARNATION, LEDGER.now, (LAST,), ROOT.id))
    audit.checkpoint(SealedBy(record.sealed, public(KEY)))
    audit.leaf(LeafOf(2, record.leaves[0]))
    [finding] = audit.finish()
    assert finding.detail == "checkpoint 1: a leaf of checkpoint 2 is among its leaves"


def test_a_budget_that_moved_and_was_not_sealed_is_found() -> None:
    """Who has the key leaves out what an entry has moved."""
    moved = next(entry for entry in JOURNAL if entry.position > STOPS[0])
    fewer = [entry for entry in JOURNAL if entry.budget_id != moved.budget_id]
    findings, _ = audited(sealed(fewer, STOPS), key=KEY)
    assert [finding.rule for finding in findings] == ["checkpoint"]
    assert "is not sealed by checkpoint" in findings[0].detail
    assert findings[0].budget_id == moved.budget_id


def test_a_missing_checkpoint_is_found() -> None:
    records = sealed(JOURNAL, STOPS)
    [finding] = audited([records[0], records[2]], key=KEY)[0]
    assert finding.detail == "checkpoint 3: checkpoint 2 was expected, and is missing"


def test_what_a_checkpoint_has_left_out_is_found_although_a_later_one_seals_more() -> None:
    """Who has the key leaves out what a budget did at first; what it did later is sealed as it is."""
    moved_later = {e.budget_id for e in JOURNAL if STOPS[0] < e.position <= STOPS[1]}
    budget_id = next(e.budget_id for e in JOURNAL if e.budget_id in moved_later)
    early = [e for e in JOURNAL if e.budget_id == budget_id and e.position <= STOPS[0]]
    assert early
    fewer = [entry for entry in JOURNAL if entry not in early]
    [finding] = audited(sealed(fewer, STOPS), key=KEY)[0]
    assert (finding.budget_id, finding.seq) == (budget_id, 1)
    assert finding.detail == "entry 1 of the budget is not sealed by checkpoint 1"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_checkpoint_that_was_published_has_the_hash_that_was_published(number: int) -> None:
    records = sealed(JOURNAL, STOPS)
    published = {number: records[number - 1].sealed.hash}
    assert audited(records, key=KEY, published=published)[0] == []
    [finding] = audited(records, key=KEY, published={number: bytes(32)})[0]
    assert finding.rule == "checkpoint"
    assert finding.detail == (
        f"checkpoint {number}: it has another hash than the one that was published"
    )


@pytest.mark.parametrize("left", [0, 2])
def test_a_checkpoint_that_was_published_and_cut_off_is_found(left: int) -> None:
    records = sealed(JOURNAL, STOPS)
    published = {3: records[2].sealed.hash}
    # By itself what is left is a ledger that sealed no more.
    assert audited(records[:left], key=KEY)[0] == []
    [finding] = audited(records[:left], key=KEY, published=published)[0]
    assert finding.detail == "checkpoint 3: it was published, and is missing"
