"""The file of an export: its lines, and where it was cut."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from peculium_server.archive import lines
from peculium_server.core.offline.records import Counts, Header, Record, Recorded

LINE_BYTES_MAX: Final = 4 * 1024 * 1024
"""No record is longer: an operation says at most some hundred children."""
_BUFFER_BYTES: Final = 1024 * 1024
_LINE_FEED: Final = ord("\n")


class ExportUnreadable(Exception):
    """A file is no whole export; the message says where, and what helps."""


class ExportCut(ExportUnreadable):
    """The end is missing."""


def is_compressed(path: Path) -> bool:
    """Say whether a file of that name is compressed."""
    return path.suffix == ".gz"


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed.

    Raises:
        ExportUnreadable: It cannot be opened.
    """
    try:
        with path.open("rb", buffering=_BUFFER_BYTES) as file:
            if is_compressed(path):
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield unpacked  # type: ignore[misc]
            else:
                yield file
    except OSError as error:
        raise ExportUnreadable(f"{path}: cannot be read: {error.strerror or error}") from error


def records(file: IO[bytes]) -> Iterator[Record]:
    """All records of a complete export, the trailer last.

    Raises:
        ExportCut: It ends without a trailer.
        ExportUnreadable: A line is no record, or something follows the trailer.
    """
    began = ended = False
    for number, line in _lines(file):
        if ended:
            raise ExportUnreadable(f"line {number}: something follows the trailer")
        if line[-1] != _LINE_FEED:
            raise ExportCut(
                f"line {number}: the export is cut in the middle of a record: {_RESUME}"
            )
        record = _record(number, line)
        if not began:
            if not isinstance(record, Header):
                raise ExportUnreadable("line 1: an export begins with its header")
            began = True
        yield record
        ended = type(record) is Counts
    if not ended:
        raise ExportCut(f"the export is cut: it has no trailer: {_RESUME}")


_RESUME: Final = "go on with it by `peculium audit export --resume`"


def _record(number: int, line: bytes) -> Record:
    try:
        return lines.read(line)
    except ValueError as error:
        raise ExportUnreadable(f"line {number}: {error}") from error


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, the last one perhaps without an end."""
    number = 0
    try:
        while line := file.readline(LINE_BYTES_MAX):
            number += 1
            if len(line) == LINE_BYTES_MAX:
                raise ExportUnreadable(f"line {number}: longer than any record")
            yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ExportCut(f"after line {number}: the compressed file is cut or damaged") from error


class Begun:
    """How much of an export there is to go on with; what is there is not verified."""

    def __init__(self) -> None:
        self.header: Header | None = None
        """The last one; None: there is nothing to go on with."""
        self.size = 0
        """Its first bytes, up to the end of the last operation that is there whole."""
        self.after: list[int] = []
        """Of each lane, the last position that is there whole."""
        self.entries = 0
        """In these bytes."""
        self._read = 0

    def take(self, record: Header | Recorded, end: int) -> None:
        """Take the next record, whose line ends there.

        Raises:
            LineInvalid: It cannot be where it is.
        """
        if isinstance(record, Header):
            self.after = self.after or [0] * len(record.positions)
            self.header, self.size = record, end
            return
        lane, entry = record
        if lane >= len(self.after):
            raise lines.LineInvalid(f"there is no lane {lane}")
        self._read += 1
        if entry.part + 1 == entry.parts:
            self.after[lane] = max(self.after[lane], entry.position)
            self.size, self.entries = end, self._read


def begun(file: IO[bytes]) -> Begun:
    """Find where an export was cut.

    Raises:
        ExportUnreadable: A whole line is no record, or the first one is no header.
    """
    found = Begun()
    end = 0
    try:
        for number, line in _lines(file):
            record = _record(number, line) if line.endswith(b"\n") else None
            end += len(line)
            # The rows come anew.
            if not isinstance(record, Header | Recorded):
                break
            try:
                found.take(record, end)
            except lines.LineInvalid as error:
                raise ExportUnreadable(f"line {number}: {error}") from error
    except ExportCut:
        pass
    return found
