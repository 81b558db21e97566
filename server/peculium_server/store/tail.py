"""What was recorded last: where the lanes stand, and their entries from a position on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Executable,
    literal_column,
    or_,
    select,
    true,
)

from peculium_server.core.state import Entry
from peculium_server.store import rows
from peculium_server.store.clauses import (
    BUDGET,
    LANE,
    ROOT,
    chained,
    in_positions,
    of_subtree,
    to_chained_entry,
)
from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.schema import entries, lanes
from peculium_server.store.statements import compiled
from peculium_server.store.wire import Statement

TAIL_ROWS_MAX: Final = 2_000
"""Rows that are read at once: more than any operation has."""
_AT_A_TIME: Final = 64
"""Entries that are decoded before other calls get their turn."""


class Within(NamedTuple):
    """Whose entries are wanted."""

    root_id: bytes
    budget_id: bytes | None = None
    """None: those of the whole tree."""
    subtree: bool = False
    """With everything below the budget."""


class Recorded(NamedTuple):
    """An operation, as far as it is wanted."""

    position: int
    request: bytes | None
    """As recorded."""
    entries: tuple[Entry, ...]
    """The parts that are wanted; none where the others are of other budgets."""


class Tail(NamedTuple):
    """The operations of a lane up to a position."""

    operations: tuple[Recorded, ...]
    until: int
    """Up to this position everything was looked at."""


def _positions() -> Executable:
    return select(lanes.c.lane, lanes.c.position).order_by(lanes.c.lane)


def _tail(wanted: ColumnElement[bool], *of: ColumnElement[bool]) -> Executable:
    """Wanted entries, and part 0 of each operation, which says what was asked."""
    return (
        chained()
        .add_columns(wanted.label("wanted"))
        .where(
            entries.c.lane == LANE,
            *of,
            *in_positions(),
            or_(entries.c.part == literal_column("0"), wanted),
        )
        .order_by(entries.c.position, entries.c.part)
        .limit(literal_column(str(TAIL_ROWS_MAX)))
    )


_OF_TREE = entries.c.root_id == ROOT
RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "positions": (_positions(), tuple),
    "tail_of_lane": (_tail(true()), tuple),
    "tail_of_tree": (_tail(true(), _OF_TREE), tuple),
    "tail_of_budget": (_tail(entries.c.budget_id == BUDGET, _OF_TREE), tuple),
    "tail_of_subtree": (_tail(of_subtree(), _OF_TREE), tuple),
}

STATEMENTS: dict[str, Statement] = {
    name: compiled(name, executable, row) for name, (executable, row) in RECIPES.items()
}


def tail_of(within: Within | None) -> tuple[Statement, dict[str, Any]]:
    """The statement that reads what is wanted, and the values that it needs beside the positions."""
    if within is None:
        return STATEMENTS["tail_of_lane"], {}
    root_id, budget_id, subtree = within
    if budget_id is None:
        return STATEMENTS["tail_of_tree"], {"root_id": root_id}
    name = "tail_of_subtree" if subtree else "tail_of_budget"
    return STATEMENTS[name], {"root_id": root_id, "budget_id": budget_id}


def to_positions(found: Sequence[Sequence[Any]], lanes: int) -> tuple[int, ...]:
    """Where all lanes stand, by lane.

    Raises:
        LedgerCorrupt: A lane is missing.
    """
    if [lane for lane, _ in found] != list(range(lanes)):
        raise LedgerCorrupt("a lane has no position")
    return tuple(position for _, position in found)


async def to_tail(found: Sequence[Sequence[Any]], until: int) -> Tail:
    """The operations of rows; if there are as many as may be, the last one may lack a part.

    Raises:
        LedgerCorrupt: A row is no entry.
    """
    operations: list[Recorded] = []
    decoded = 0
    for position, parts in groupby(found, key=_position):
        request = None
        wanted = []
        for row in parts:
            entry = to_chained_entry(row)
            request = request or entry.request
            if row[-1]:
                wanted.append(entry)
            decoded += 1
            if decoded % _AT_A_TIME == 0:
                await asyncio.sleep(0)
        operations.append(Recorded(position, request, tuple(wanted)))
    if len(found) < TAIL_ROWS_MAX:
        return Tail(tuple(operations), until)
    *whole, cut = operations
    if not whole:
        raise LedgerCorrupt(f"the operation at position {cut.position} has too many parts")
    return Tail(tuple(whole), cut.position - 1)


_POSITION: Final = rows.ENTRY_COLUMNS.index("position")


def _position(row: Sequence[Any]) -> int:
    position: int = row[_POSITION]
    return position
