"""What is wrong with a bill, and where in the file."""

from __future__ import annotations


class BillInvalid(Exception):
    """A bill cannot be read, or is not of what the tree counts.

    Attributes:
        problem: What is wrong.
        line: In which line of the file, from 1; None if it is about the whole of it.
        column: In which column; empty if it is about the whole line.
    """

    def __init__(self, problem: str, *, line: int | None = None, column: str = "") -> None:
        self.problem = problem
        self.line = line
        self.column = column
        places = [f"line {line}"] if line is not None else []
        if column:
            places.append(f"column {column}")
        super().__init__(f"{', '.join(places)}: {problem}" if places else problem)
