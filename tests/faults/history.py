"""What was asked of the ledger and what came back, for whoever has to find out what went wrong.

A history is a file in the shape that Jepsen gave to such things: one JSON object per line, with
`process`, `type` (invoke, ok, fail, info), `f`, `value` and `time` (nanoseconds since it began). The
first line tells the part of the campaign and its seed. It has token ids, never a secret.
"""

from __future__ import annotations

import json
import time
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Self

from peculium_server.core.operations import ByToken, Operation


class History:
    """A file that grows; a context manager."""

    def __init__(self, path: Path, part: str, seed: int) -> None:
        self.path = path
        self._begun = time.monotonic_ns()
        self._file = path.open("w", encoding="utf-8")
        self._write({"part": part, "seed": seed})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def invoke(self, process: int | str, f: str, value: object) -> None:
        """Somebody asks."""
        self._event(process, "invoke", f, value)

    def ok(self, process: int | str, f: str, value: object) -> None:
        """It was done."""
        self._event(process, "ok", f, value)

    def fail(self, process: int | str, f: str, value: object) -> None:
        """It was refused: nothing was done."""
        self._event(process, "fail", f, value)

    def info(self, process: int | str, f: str, value: object) -> None:
        """Nobody knows; or it is no operation, but something that was done to the ledger."""
        self._event(process, "info", f, value)

    def _event(self, process: int | str, type_: str, f: str, value: object) -> None:
        self._write(
            {
                "process": process,
                "type": type_,
                "f": f,
                "value": value,
                "time": time.monotonic_ns() - self._begun,
            }
        )

    def _write(self, line: dict[str, Any]) -> None:
        # What still arrives after the end belongs to nobody's history.
        if not self._file.closed:
            self._file.write(json.dumps(line, default=str) + "\n")


def told(operation: Operation) -> dict[str, Any]:
    """An operation for a history: of authority the token's id at most, as the core knows it."""
    value = _told(operation)
    assert isinstance(value, dict)
    by = operation.authority
    value["authority"] = by.token_id.hex() if isinstance(by, ByToken) else type(by).__name__
    return value


def _told(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        named = {field.name: _told(getattr(value, field.name)) for field in fields(value)}
        return {name: each for name, each in named.items() if each not in (None, (), [], False, "")}
    if isinstance(value, tuple):
        return [_told(each) for each in value]
    return value
