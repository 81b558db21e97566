"""The requests to be replayed, from a file in the format of the Azure LLM inference traces.

A header and a line for each request, with LF or CRLF:

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:17:03.9799600,4808,10
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

HEADER: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
TOKENS_MAX: Final = 2**53
"""What the ledger's usage facts can count."""
PROBLEMS_SHOWN_MAX: Final = 10

_OUTPUT_LIMIT_LEAST: Final = 16
_OUTPUT_LIMIT_STEP: Final = 4
_COUNT = re.compile(r"[0-9]{1,16}", re.ASCII)


class TraceInvalid(Exception):
    """The file cannot be replayed; carries every problem, with the number of its line."""

    def __init__(self, source: str, problems: list[str]) -> None:
        shown = problems[:PROBLEMS_SHOWN_MAX]
        more = len(problems) - len(shown)
        super().__init__(
            "\n".join(f"{source}: {problem}" for problem in shown)
            + (f"\n{source}: and {more} more" if more else "")
        )
        self.problems = problems


class Request(NamedTuple):
    """One request of the trace."""

    number: int
    """Its place in the trace, from 1."""
    context_tokens: int
    """Known before the call: the agent has counted its prompt."""
    generated_tokens: int
    """Known to the provider only, until it answers."""

    @property
    def output_limit(self) -> int:
        """The most tokens that the provider may write for it.

        A trace does not tell what limits its requests carried. Applications set one for each kind of
        request, from a few sizes; so the smallest of 16, 64, 256, 1024, ... that was not in the way.
        """
        limit = _OUTPUT_LIMIT_LEAST
        while limit < self.generated_tokens:
            limit *= _OUTPUT_LIMIT_STEP
        return min(limit, TOKENS_MAX)


def read(path: Path | None) -> list[Request]:
    """Read a trace; None for the one that comes with the demonstration.

    Raises:
        TraceInvalid: The file cannot be read, has no requests, or has lines of another form.
    """
    source = "the bundled trace" if path is None else str(path)
    try:
        data = bundled().read_bytes() if path is None else path.read_bytes()
    except OSError as error:
        raise TraceInvalid(source, [f"cannot be read: {error.strerror}"]) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TraceInvalid(source, [f"line {line}: is not UTF-8"]) from error
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    return _parse(source, lines)


def bundled() -> resources.abc.Traversable:
    """The trace that comes with the demonstration."""
    return resources.files("peculium_server.demo") / "data" / "AzureLLMInferenceTrace_code.csv"


def _parse(source: str, lines: list[str]) -> list[Request]:
    if not lines:
        raise TraceInvalid(source, ["is empty"])
    if tuple(lines[0].split(",")) != HEADER:
        raise TraceInvalid(source, [f"line 1: must be {','.join(HEADER)}"])
    if len(lines) == 1:
        raise TraceInvalid(source, ["has no requests"])
    requests: list[Request] = []
    problems: list[str] = []
    for number, line in enumerate(lines[1:], start=1):
        fields = line.split(",")
        wrong = _problem(fields)
        if wrong is None:
            requests.append(Request(number, int(fields[1]), int(fields[2])))
        else:
            problems.append(f"line {number + 1}: {wrong}")
    if problems:
        raise TraceInvalid(source, problems)
    return requests


def _problem(fields: list[str]) -> str | None:
    if len(fields) != len(HEADER):
        return f"must have {len(HEADER)} fields, not {len(fields)}"
    try:
        datetime.fromisoformat(fields[0])
    except ValueError:
        return f"{HEADER[0]} must be a time, such as 2023-11-16 18:17:03.9799600"
    wrong = _not_counts(zip(HEADER[1:], fields[1:], strict=True))
    return f"{' and '.join(wrong)} must be a whole number from 0 to 2^53" if wrong else None


def _not_counts(named: Iterable[tuple[str, str]]) -> list[str]:
    return [name for name, text in named if not _COUNT.fullmatch(text) or int(text) > TOKENS_MAX]
