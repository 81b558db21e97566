"""Where an export goes: JSONL that can be verified and gone on with, CSV and Parquet for analysis."""

from __future__ import annotations

import csv
import gzip
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Protocol, Self

from peculium_server.archive import lines
from peculium_server.archive.files import Begun, ExportUnreadable, begun, is_compressed
from peculium_server.archive.tables import COLUMNS, row_of
from peculium_server.core.offline.records import (
    BudgetRow,
    Counts,
    Header,
    HoldRow,
    Record,
    Recorded,
    SealedBy,
)

_PARQUET_ROWS: Final = 50_000
"""Of one row group: some megabytes."""


class Sink(Protocol):
    """Takes the records of an export. What it was given whole is in its file when it was closed."""

    def take(self, record: Record) -> None:
        """Take the next record."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End; without an error the export is whole."""


class JsonlSink:
    """Writes lines as they come, in a file that was begun behind its last whole operation."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        """Open the file.

        Raises:
            ExportUnreadable: It exists already, or to resume does not, or is no export.
        """
        self.path = path
        self.begun = Begun()
        if resume:
            if is_compressed(path):
                raise ExportUnreadable(f"{path}: a compressed export cannot be gone on with")
            try:
                with path.open("rb") as file:
                    self.begun = begun(file)
            except FileNotFoundError:
                resume = False
            except OSError as error:
                raise ExportUnreadable(f"{path}: cannot be read: {error.strerror}") from error
        self._file = _created(path, "r+b" if resume else "xb")
        if self.begun.header is None:
            self._file.truncate()
        self._file.seek(self.begun.size)
        self._out: IO[bytes] = self._file
        if is_compressed(path):
            self._out = gzip.GzipFile(fileobj=self._file, mode="wb")  # type: ignore[assignment]
        self._counts = [self.begun.entries, 0, 0, 0]

    def take(self, record: Record) -> None:
        """Write the next record.

        Raises:
            ExportUnreadable: It goes on with another export than was begun.
        """
        before = self.begun.header
        if isinstance(record, Header) and before is not None:
            if (record.incarnation, record.root_id) != (before.incarnation, before.root_id):
                raise ExportUnreadable(f"{self.path}: is the export of another ledger or tree")
            # Not before something comes instead: what is there may be whole.
            self._file.truncate()
        elif isinstance(record, Counts):
            # The stream has counted what it brought, the file has what was there before too.
            record = Counts(*self._counts)
        else:
            place = _COUNTED.get(type(record))
            if place is not None:
                self._counts[place] += 1
        self._out.write(lines.write(record).encode() + b"\n")

    def __enter__(self) -> Self:
        """Begin: the file is open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file, and leave what it has, which can be gone on with; nothing if it has nothing."""
        if error is not None and not self._out.tell():
            self._file.close()
            self.path.unlink(missing_ok=True)
            return
        with self._file:
            if self._out is not self._file:
                self._out.close()
            self._file.flush()
            os.fsync(self._file.fileno())


_COUNTED: Final[dict[type, int]] = {Recorded: 0, BudgetRow: 1, HoldRow: 2, SealedBy: 3}


class _TableSink:
    """Writes entries into an unfinished file beside, which takes the name when it is whole."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            ExportUnreadable: It exists already.
        """
        if path.exists():
            raise ExportUnreadable(f"{path}: exists already")
        self._path = path
        self._unfinished = path.with_name(f"{path.name}.unfinished")
        self._complete = False

    def take(self, record: Record) -> None:
        """Write the next record, if it is an entry."""
        if isinstance(record, Recorded):
            self._row(row_of(record))
        elif isinstance(record, Counts):
            self._complete = True

    def _row(self, row: dict[str, Any]) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the file its name, or leave nothing of it."""
        self._close()
        if self._complete and error is None:
            self._unfinished.replace(self._path)
        else:
            self._unfinished.unlink(missing_ok=True)


class CsvSink(_TableSink):
    """Writes CSV with a header line, as of RFC 4180."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            ExportUnreadable: It exists already, or cannot be made.
        """
        super().__init__(path)
        self._file = _created(self._unfinished, "w", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, list(COLUMNS))
        self._writer.writeheader()

    def _row(self, row: dict[str, Any]) -> None:
        self._writer.writerow(row)

    def _close(self) -> None:
        self._file.close()


class ParquetSink(_TableSink):
    """Writes Parquet, a row group after the other."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            ExportUnreadable: It exists already, or pyarrow is not installed.
        """
        super().__init__(path)
        try:
            import pyarrow as pa  # noqa: PLC0415 - an extra
            from pyarrow import parquet  # noqa: PLC0415
        except ImportError as error:
            raise ExportUnreadable(
                "Parquet needs pyarrow: pip install 'peculium[parquet]'"
            ) from error
        types = {
            int: pa.int64(),
            str: pa.string(),
            bool: pa.bool_(),
            datetime: pa.timestamp("us", tz="UTC"),
        }
        self._arrow = pa
        self._schema = pa.schema([(name, types[type_]) for name, type_ in COLUMNS.items()])
        self._writer = parquet.ParquetWriter(self._unfinished, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def _row(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _PARQUET_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def _close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


def _created(path: Path, mode: str, **options: Any) -> Any:
    try:
        return path.open(mode, **options)
    except FileExistsError as error:
        advice = "" if is_compressed(path) else "; --resume goes on with it"
        raise ExportUnreadable(f"{path}: exists already{advice}") from error
    except OSError as error:
        raise ExportUnreadable(f"{path}: cannot be written: {error.strerror}") from error


SINKS: Final[dict[str, Callable[[Path], Sink]]] = {
    "csv": CsvSink,
    "parquet": ParquetSink,
}
"""Formats for analysis."""
