"""The rows of a bill, whatever file it comes in: CSV with a header, JSON, or JSON Lines."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from enum import StrEnum
from typing import Any, BinaryIO, Final, NamedTuple

from peculium_server.reconcile.problems import BillInvalid

_CHUNK: Final = 1 << 18
_LINE_MAX: Final = 1 << 24
"""Bytes of one line or element; longer ones are no bill's."""
_DOCUMENT_MAX: Final = 1 << 28
"""Bytes of a JSON document that cannot be read piece by piece."""
_DELIMITERS: Final = ",;\t"
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_BETWEEN: Final = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")


class Format(StrEnum):
    """How a file is written."""

    CSV = "csv"
    JSON = "json"
    JSONL = "jsonl"


class Row(NamedTuple):
    """One row, as the file has it."""

    line: int
    """Where it begins, from 1."""
    values: Mapping[str, Any]
    path: str = ""
    """Where in a JSON document, for example data[3].results[0]."""
    cents: bool = False
    """The report is one whose amounts are in cents, whatever its columns say."""


def read_rows(file: BinaryIO, form: Format | None = None) -> Iterator[Row]:
    """Read a bill row by row, without keeping them.

    Args:
        file: At its beginning; it is read twice there if the format is to be found out.
        form: The format. None: it is found out.

    Raises:
        BillInvalid: The file is empty, cut, not in UTF-8 or not of the format.
    """
    form = form or _detect(file)
    match form:
        case Format.CSV:
            return _csv_rows(file)
        case Format.JSONL:
            return _pages((_load(text, line), line) for line, text in _lines(file) if text.strip())
        case Format.JSON:
            return _pages(_json_values(file))


def _detect(file: BinaryIO) -> Format:
    # A whole array may be on one line, so that no line is asked for before it is known to be none.
    begins = b""
    while not begins and (chunk := file.read(_CHUNK)):
        begins = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    if not begins:
        raise BillInvalid("the file is empty")
    if begins.startswith(b"["):
        return Format.JSON
    if not begins.startswith(b"{"):
        return Format.CSV
    first = next(line for line in iter(lambda: file.readline(_LINE_MAX), b"") if line.strip())
    file.seek(0)
    try:
        json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return Format.JSON
    return Format.JSONL


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Each line with its number, decoded."""
    number = 0
    while raw := file.readline(_LINE_MAX + 1):
        number += 1
        if len(raw) > _LINE_MAX:
            raise BillInvalid(f"longer than {_LINE_MAX:,} bytes", line=number)
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, raw.decode()
        except UnicodeDecodeError as error:
            raise BillInvalid(
                f"not in UTF-8 (byte {error.start + 1} of the line): save the file in that encoding",
                line=number,
            ) from None


# -- CSV --------------------------------------------------------------------------------------------


def _csv_rows(file: BinaryIO) -> Iterator[Row]:
    csv.field_size_limit(_LINE_MAX)
    lines = _lines(file)
    first = next(((number, text) for number, text in lines if text.strip()), None)
    if first is None:
        raise BillInvalid("the file is empty")
    skipped, header_line = first[0] - 1, first[1]
    delimiter = max(_DELIMITERS, key=header_line.count)
    reader = csv.reader(_again(header_line, lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        _check_header(header, skipped + 1)
        begins = skipped + reader.line_num + 1
        for cells in reader:
            if cells and (len(cells) > 1 or cells[0].strip()):
                if len(cells) != len(header):
                    raise BillInvalid(
                        f"has {len(cells)} columns, the header {len(header)}: was the file cut?",
                        line=begins,
                    )
                yield Row(begins, dict(zip(header, cells, strict=True)))
            begins = skipped + reader.line_num + 1
    except csv.Error as error:
        raise BillInvalid(f"not CSV: {error}", line=skipped + reader.line_num) from None


def _again(first: str, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    yield first
    for _, text in lines:
        yield text


def _check_header(header: list[str], line: int) -> None:
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise BillInvalid("is there twice", line=line, column=twice[0])


# -- JSON -------------------------------------------------------------------------------------------


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


# Of a number in JSON no digit is lost.
_DECODER: Final = json.JSONDecoder(parse_float=Decimal, parse_constant=_refuse)


def _load(text: str, line: int) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BillInvalid(
            f"not JSON: {error.msg} (character {error.colno})", line=line + error.lineno - 1
        ) from None
    except (ValueError, RecursionError) as error:
        raise BillInvalid(f"not JSON that can be read: {error}", line=line) from None


def _json_values(file: BinaryIO) -> Iterator[tuple[Any, int]]:
    """The elements of an array one by one, or the one value that the file is."""
    window = _Window(file)
    window.skip(_SPACE)
    if window.peek() != "[":
        yield _load(window.all(), window.line), window.line
        return
    window.take(1)
    window.skip(_SPACE)
    if window.peek() == "]":
        window.take(1)
    else:
        while True:
            line = window.line
            yield window.value(), line
            comma = window.skip(_BETWEEN)
            if comma == ",":
                continue
            if window.peek() != "]":
                raise BillInvalid(
                    "not JSON: the array has no end: was the file cut?", line=window.line
                )
            window.take(1)
            break
    window.skip(_SPACE)
    if window.peek():
        raise BillInvalid("not JSON: something follows the array", line=window.line)


class _Window:
    """A piece of a text that is decoded as it is needed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._ended = False
        self.line = 1
        """That of the next character."""

    def peek(self) -> str:
        """The next character; empty at the end."""
        while self._at == len(self._text) and not self._ended:
            self._more(_CHUNK)
        return self._text[self._at : self._at + 1]

    def take(self, count: int) -> None:
        """Go on by so many characters."""
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Go on over what matches, and tell its first group."""
        found = ""
        while True:
            match = pattern.match(self._text, self._at)
            if match is not None:
                found = found or (match[1] if pattern.groups else "")
                self.take(match.end() - self._at)
            if self._at < len(self._text) or self._ended:
                return found
            self._more(_CHUNK)

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Perhaps only cut by the window. It doubles, so that all in all little is read twice.
                if self._ended or len(self._text) - self._at > _LINE_MAX:
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    raise BillInvalid(f"not JSON: {error.msg}", line=line) from None
            except (ValueError, RecursionError) as error:
                raise BillInvalid(f"not JSON that can be read: {error}", line=self.line) from None
            else:
                # A number at the end of the window may go on beyond it.
                if end < len(self._text) or self._ended:
                    self.take(end - self._at)
                    return value
            self._more(max(_CHUNK, len(self._text) - self._at))

    def all(self) -> str:
        """What is left."""
        while not self._ended:
            if len(self._text) > _DOCUMENT_MAX:
                raise BillInvalid(
                    f"one JSON document of more than {_DOCUMENT_MAX:,} characters:"
                    " write it as JSON Lines or as an array"
                )
            self._more(_CHUNK)
        return self._text[self._at :]

    def _more(self, count: int) -> None:
        raw = self._file.read(count)
        self._ended = not raw
        before = self._text[self._at :]
        try:
            added = self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            good = raw[: error.start].count(b"\n")
            raise BillInvalid(
                "not in UTF-8: save the file in that encoding",
                line=self.line + before.count("\n") + good,
            ) from None
        self._text = before + added
        self._at = 0


# -- What reports wrap their rows in ----------------------------------------------------------------


def _pages(documents: Iterator[tuple[Any, int]]) -> Iterator[Row]:
    """The rows of documents that are rows, buckets of a report, or pages of either."""
    cut = None
    for document, line in documents:
        data = document.get("data") if isinstance(document, dict) else None
        if isinstance(data, list):
            cut = line if document.get("has_more") is True else None
            for index, item in enumerate(data):
                yield from _bucket(item, line, f"data[{index}]")
        else:
            yield from _bucket(document, line, "")
    if cut is not None:
        raise BillInvalid(
            "the report goes on (has_more is true): add its next pages, each on a line of its own",
            line=cut,
        )


def _bucket(item: Any, line: int, path: str) -> Iterator[Row]:
    """The rows of a bucket of a cost report, each with the bucket's time; or the one row itself."""
    if not isinstance(item, dict):
        raise BillInvalid(f"{path or 'the row'} is not an object", line=line)
    results = item.get("results", item.get("result"))
    begins = next((name for name in ("starting_at", "start_time") if name in item), None)
    if begins is None or not isinstance(results, list):
        yield Row(line, item, path)
        return
    for index, result in enumerate(results):
        where = f"{path}.results[{index}]".lstrip(".")
        if not isinstance(result, dict):
            raise BillInvalid(f"{where} is not an object", line=line)
        # Anthropic's cost report counts in cents; it is the one whose buckets have a starting_at.
        yield Row(line, {begins: item[begins], **result}, where, begins == "starting_at")
