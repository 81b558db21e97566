"""What was played so far, in a file, so that a run that was broken off goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Kept:
    """Cells by scenario and contestant, a line of JSON for each.

    Args:
        file: Is begun anew if it is of another run.
        run: What the run is: two with the same may be one.
        begun: When it begins, if it does now.
    """

    def __init__(self, file: Path, run: str, begun: str) -> None:
        self._file = file
        self._cells: dict[tuple[str, str], dict[str, Any]] = {}
        self.begun = begun
        lines = _lines(file)
        first = next(lines, {})
        if first.get("run") == run:
            self.begun = first["begun"]
            self._cells = {(cell["scenario"], cell["contestant"]): cell for cell in lines}
        # Written again: the last line may be half of one.
        with file.open("w") as to:
            for line in ({"run": run, "begun": self.begun}, *self._cells.values()):
                to.write(json.dumps(line) + "\n")

    def __len__(self) -> int:
        return len(self._cells)

    def get(self, scenario: str, contestant: str) -> dict[str, Any] | None:
        """A cell, if it was played."""
        return self._cells.get((scenario, contestant))

    def add(self, cell: Mapping[str, Any]) -> None:
        """Keep one more."""
        self._cells[cell["scenario"], cell["contestant"]] = dict(cell)
        with self._file.open("a") as to:
            to.write(json.dumps(cell) + "\n")

    def forget(self) -> None:
        """The run is over: what it has found is elsewhere."""
        self._file.unlink()


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Those that are whole."""
    if file.exists():
        for line in file.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return
