"""Files that were cut, are old, or were never an export."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from peculium_server.archive import files, lines
from peculium_server.archive.files import ExportCut, ExportUnreadable, begun
from peculium_server.archive.verifying import verify_file
from peculium_server.archive.writing import CsvSink, JsonlSink, ParquetSink
from peculium_server.core.offline.records import (
    Counts,
    Header,
    LeafOf,
    Record,
    Recorded,
    SealedBy,
)
from peculium_server.core.state import Effect
from peculium_server.signing import is_signed
from tests.core.checkpoints import INCARNATION, KEY, public, sealed
from tests.core.every_kind import lived
from tests.core.offline.exported import budget_row, hold_row

LEDGER, ROOT = lived()
HEADER = Header(1, INCARNATION, LEDGER.now, (LEDGER.position,), None, (bytes(16),))


def exported(after: int = 0) -> Iterator[Record]:
    """What a server streams, from behind a position on."""
    yield HEADER
    entries = [entry for entry in LEDGER.journal if entry.position > after]
    for entry in entries:
        bare = entry._replace(effect=Effect(changes=type(entry.money)()), previous_hash=b"")
        yield Recorded(0, bare)
    budgets, holds = ROOT.tree.known_budgets(), ROOT.tree.known_holds()
    for budget in budgets:
        yield budget_row(budget)
    for hold in holds:
        yield hold_row(ROOT.id, hold)
    records = sealed(LEDGER.journal, (5, LEDGER.position - 2))
    for record in records:
        yield SealedBy(record.sealed, public(KEY))
        for leaf in record.leaves:
            yield LeafOf(record.sealed.checkpoint.number, leaf)
    yield Counts(len(entries), len(budgets), len(holds), len(records))


WHOLE = "".join(lines.write(record) + "\n" for record in exported()).encode()

POSITIONS = b'"positions":[%d]' % LEDGER.position


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write(path: Path, stream: Iterable[Record], *, resume: bool = False) -> None:
    """Write what is streamed, as the command line does."""
    with JsonlSink(path, resume=resume) as sink:
        for record in stream:
            sink.take(record)


def findings(path: Path) -> tuple[object, ...]:
    return verify_file(path, public_keys=None, is_signed=is_signed).findings


def test_each_record_is_the_same_after_it_was_written_and_read() -> None:
    for record in exported():
        assert lines.read(lines.write(record).encode()) == record


def test_a_whole_file_verifies(tmp_path: Path) -> None:
    assert findings(written(tmp_path / "e.jsonl", WHOLE)) == ()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(WHOLE)))
def test_a_file_cut_anywhere_is_found_and_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, size: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "e.jsonl"
    written(path, WHOLE[:size])
    if size < len(WHOLE):
        with pytest.raises(ExportCut):
            findings(path)
    with JsonlSink(path, resume=True) as sink:
        after = sink.begun.after[0] if sink.begun.after else 0
        for record in exported(after):
            sink.take(record)
    assert findings(path) == ()
    # What was there whole was not asked for again.
    entries = [line for line in path.read_bytes().splitlines() if b'"record":"entry"' in line]
    assert len(entries) == len(LEDGER.journal)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (WHOLE + b"\n", "something follows the trailer"),
        (WHOLE + WHOLE, "something follows the trailer"),
        (b"hello\n", "line 1: no record"),
        (b"\xff\xfe\n", "line 1"),
        (b"[]\n", "line 1"),
        (b"{}\n", "line 1"),
        (b'{"record":"entry"}\n', "line 1"),
        (b'{"record":"song"}\n', "'song'"),
        (WHOLE.split(b"\n", 1)[1], "begins with its header"),
        (WHOLE.replace(b'"version":1', b'"version":2', 1), "version 2 of the format is not known"),
        (WHOLE.replace(b"peculium.export", b"acme.export", 1), "not a peculium.export"),
        (WHOLE.replace(b'"kind":"SPEND"', b'"kind":"STEAL"', 1), "'STEAL'"),
        (WHOLE.replace(b'"seq":', b'"seq":-', 1), "Expected `int` >= 0 - at `$.seq`"),
        (WHOLE.replace(b'"part":0', b'"part":0.0', 1), "got `float`"),
        (WHOLE.replace(b'"part":0', b'"part":false', 1), "got `bool`"),
        (WHOLE.replace(b'"part":0', b'"part":0,"more":1', 1), "unknown field `more`"),
        (WHOLE.replace(POSITIONS, b'"positions":[]', 1), "`array` of length >= 1"),
        (WHOLE.replace(b'"seq":1,', b'"seq":9223372036854775808,', 1), "Expected `int` <= "),
        (WHOLE.replace(b'"balances":[', b'"balances":[0,', 1), "`array` of length 8"),
        (WHOLE.replace(b'"principal":"', b'"principal":1,"other":"', 1), "Expected `str`"),
        (WHOLE.replace(b'"principal":"', b'"principal":"\\ud800', 1), "surrogate"),
        (WHOLE.replace(b"}\n", b"} more\n", 1), "trailing characters"),
        (b"[" * 100_000 + b"\n", "line 1"),
    ],
)
def test_what_is_no_export_is_told_by_its_line(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    with pytest.raises(ExportUnreadable) as told:
        findings(written(tmp_path / "e.jsonl", content))
    assert problem in str(told.value)
    assert not isinstance(told.value, ExportCut)


@pytest.mark.parametrize("content", [b"hello\n", WHOLE.split(b"\n", 1)[1]])
def test_what_is_no_export_is_not_gone_on_with(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "e.jsonl", content)
    with pytest.raises(ExportUnreadable):
        JsonlSink(path, resume=True)
    assert path.read_bytes() == content


def test_a_file_that_is_not_there_is_begun(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    write(path, exported(), resume=True)
    assert path.read_bytes() == WHOLE
    with pytest.raises(ExportUnreadable, match="cannot be read"):
        findings(tmp_path / "other.jsonl")


def test_an_export_that_never_began_leaves_no_file(tmp_path: Path) -> None:
    for name in ("e.jsonl", "e.jsonl.gz"):
        with pytest.raises(ConnectionError), JsonlSink(tmp_path / name, resume=False):
            raise ConnectionError
    assert list(tmp_path.iterdir()) == []


def another_ledgers() -> Iterator[Record]:
    yield HEADER._replace(incarnation=b"another ledger's")


def no_server() -> Iterator[Record]:
    raise ConnectionError
    yield HEADER


@pytest.mark.parametrize(
    ("stream", "error"), [(no_server, ConnectionError), (another_ledgers, ExportUnreadable)]
)
def test_a_whole_export_that_is_not_gone_on_with_stays_whole(
    tmp_path: Path, stream: Callable[[], Iterator[Record]], error: type[Exception]
) -> None:
    path = written(tmp_path / "e.jsonl", WHOLE)
    with pytest.raises(error):
        write(path, stream(), resume=True)
    assert path.read_bytes() == WHOLE


def test_a_cut_compressed_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl.gz"
    write(path, exported())
    assert findings(path) == ()
    written(path, path.read_bytes()[:-50])
    with pytest.raises(ExportCut):
        findings(path)
    with pytest.raises(ExportUnreadable, match="cannot be gone on with"):
        JsonlSink(path, resume=True)


def test_bytes_that_are_no_deflated_ones_are_told_as_damage(tmp_path: Path) -> None:
    """A block of the type that there is not."""
    header = gzip.compress(b"")[:10]
    with pytest.raises(ExportCut, match="cut or damaged"):
        findings(written(tmp_path / "e.jsonl.gz", header + b"\x07" * 20))


def test_a_wrong_checksum_is_told_as_damage(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl.gz"
    content = bytearray(gzip.compress(WHOLE))
    content[-8] ^= 1
    with pytest.raises(ExportCut, match="cut or damaged"):
        findings(written(path, bytes(content)))


def test_a_line_that_never_ends_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(map(len, WHOLE.splitlines(keepends=True)))
    path = written(tmp_path / "e.jsonl", WHOLE)
    monkeypatch.setattr(files, "LINE_BYTES_MAX", longest + 1)
    assert findings(path) == ()
    monkeypatch.setattr(files, "LINE_BYTES_MAX", longest)
    with pytest.raises(ExportUnreadable, match="longer than any record"):
        findings(path)


def test_an_export_is_gone_on_with_behind_the_highest_position_whatever_came_last() -> None:
    whole = [entry for entry in LEDGER.journal if entry.parts == 1]
    first, second = lines.write(Recorded(0, whole[0])), lines.write(Recorded(0, whole[1]))
    header = lines.write(HEADER)
    for order in ((header, first, second), (header, second, first), (header, second, header)):
        found = begun(io.BytesIO("".join(f"{line}\n" for line in order).encode()))
        assert found.after == [whole[1].position]


def test_the_last_operation_is_gone_on_with_from_its_first_part() -> None:
    several = next(entry for entry in LEDGER.journal if entry.parts > 2)
    index = LEDGER.journal.index(several)
    part_of_it = b"".join(WHOLE.splitlines(keepends=True)[: index + 3])
    found = begun(io.BytesIO(part_of_it))
    assert found.after == [several.position - 1]
    assert found.entries == index


def test_entries_are_a_table_for_analysis(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import csv as arrow_csv, parquet

    for sink in (CsvSink(tmp_path / "e.csv"), ParquetSink(tmp_path / "e.parquet")):
        with sink:
            for record in exported():
                sink.take(record)
    columns = parquet.read_table(tmp_path / "e.parquet").to_pylist()
    assert [row["kind"] for row in columns] == [entry.kind.name for entry in LEDGER.journal]
    for row, entry in zip(columns, LEDGER.journal, strict=True):
        assert row["granted"] == entry.money.granted
        assert row["change_spent"] == entry.effect.changes.spent
        assert row["at"].timestamp() * 1_000_000 == entry.at
    spent = next(row for row in columns if row["reference"] == "call-1")
    assert (spent["kind"], spent["model"], spent["input_tokens"]) == ("SPEND", "m", 3)
    assert json.loads(spent["labels"]) == {"model": "m", "run": "7"}
    assert arrow_csv.read_csv(tmp_path / "e.csv").num_rows == len(LEDGER.journal)


@pytest.mark.parametrize("make", [CsvSink, ParquetSink])
def test_a_table_that_was_cut_leaves_no_file(tmp_path: Path, make: type[CsvSink]) -> None:
    with make(tmp_path / "e.table") as sink:
        for record, _ in zip(exported(), range(10), strict=False):
            sink.take(record)
    assert list(tmp_path.iterdir()) == []
