"""A trace is read whole, or refused with the number of every line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from peculium_server.demo import trace
from peculium_server.demo.trace import TOKENS_MAX, Request, TraceInvalid

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
TIME = "2023-11-16 18:17:03.9799600"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace.csv"


def test_the_bundled_trace_is_the_published_one() -> None:
    requests = trace.read(None)
    assert len(requests) == 8819
    assert requests[0] == Request(1, 4808, 10)
    assert requests[-1] == Request(8819, 549, 173)
    assert sum(request.context_tokens for request in requests) == 18_059_974
    assert sum(request.generated_tokens for request in requests) == 245_896


def test_the_bundled_trace_keeps_its_line_ends() -> None:
    data = trace.bundled().read_bytes()
    assert data.count(b"\r\n") == data.count(b"\n") == 8819
    assert not data.endswith(b"\n")


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("last", [True, False], ids=["last line ended", "last line not ended"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_line_ends_and_a_byte_order_mark_do_not_matter(
    file: Path, end: str, last: bool, mark: str
) -> None:
    lines = [HEADER, f"{TIME},4808,10", f"{TIME},0,0"]
    file.write_bytes((mark + end.join(lines) + (end if last else "")).encode())
    assert trace.read(file) == [Request(1, 4808, 10), Request(2, 0, 0)]


@pytest.mark.parametrize(
    "time", ["2023-11-16 18:17:03", "2023-11-16T18:17:03.1Z", "2024-05-10 00:00:00.009930+00:00"]
)
def test_times_are_taken_as_the_traces_write_them(file: Path, time: str) -> None:
    file.write_text(f"{HEADER}\n{time},1,1\n")
    assert trace.read(file) == [Request(1, 1, 1)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "must have 3 fields, not 1"),
        (f"{TIME},1", "must have 3 fields, not 2"),
        (f"{TIME},1,2,3", "must have 3 fields, not 4"),
        ("yesterday,1,2", "TIMESTAMP must be a time"),
        (",1,2", "TIMESTAMP must be a time"),
        (f"{TIME},-1,2", "ContextTokens must be a whole number"),
        (f"{TIME},1,2.0", "GeneratedTokens must be a whole number"),
        (f"{TIME},,2", "ContextTokens must be a whole number"),
        (f"{TIME},1, 2", "GeneratedTokens must be a whole number"),
        (f"{TIME},1e3,2", "ContextTokens must be a whole number"),
        (f"{TIME},1_000,2", "ContextTokens must be a whole number"),
        (f"{TIME},٣,2", "ContextTokens must be a whole number"),
        (f"{TIME},{TOKENS_MAX + 1},2", "ContextTokens must be a whole number"),
        (f"{TIME},{'9' * 5000},x", "ContextTokens and GeneratedTokens must be a whole number"),
        (f'"{TIME}",1,2', "TIMESTAMP must be a time"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(file: Path, line: str, problem: str) -> None:
    file.write_text(f"{HEADER}\n{TIME},1,1\n{line}\n{TIME},1,1\n", encoding="utf-8")
    with pytest.raises(TraceInvalid) as caught:
        trace.read(file)
    (told,) = caught.value.problems
    assert told.startswith(f"line 3: {problem}")


def test_every_bad_line_is_named_and_the_first_ten_are_told(file: Path) -> None:
    file.write_text(f"{HEADER}\n" + "x\n" * 25)
    with pytest.raises(TraceInvalid) as caught:
        trace.read(file)
    assert [told.partition(":")[0] for told in caught.value.problems] == [
        f"line {number}" for number in range(2, 27)
    ]
    told = str(caught.value).splitlines()
    assert len(told) == 11
    assert told[0].startswith(f"{file}: line 2: ")
    assert told[-1] == f"{file}: and 15 more"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        ("\ufeff".encode(), "is empty"),
        (HEADER.encode(), "has no requests"),
        (f"{HEADER}\r\n".encode(), "has no requests"),
        (f"{TIME},1,1\n".encode(), f"line 1: must be {HEADER}"),
        (b"ContextTokens,TIMESTAMP,GeneratedTokens\n", f"line 1: must be {HEADER}"),
        (f"{HEADER}\n{TIME},1,1\n\xff\n".encode("latin-1"), "line 3: is not UTF-8"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(file: Path, content: bytes, problem: str) -> None:
    file.write_bytes(content)
    with pytest.raises(TraceInvalid) as caught:
        trace.read(file)
    assert caught.value.problems == [problem]


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceInvalid, match="cannot be read: No such file"):
        trace.read(tmp_path / "missing.csv")
    with pytest.raises(TraceInvalid, match="cannot be read: Is a directory"):
        trace.read(tmp_path)


@pytest.mark.parametrize(
    ("generated", "limit"),
    [(0, 16), (16, 16), (17, 64), (256, 256), (257, 1024), (TOKENS_MAX, TOKENS_MAX)],
)
def test_a_request_carries_the_smallest_usual_limit_that_is_not_in_its_way(
    generated: int, limit: int
) -> None:
    assert Request(1, 0, generated).output_limit == limit
