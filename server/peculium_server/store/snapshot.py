"""The whole ledger at one instant, for those who verify it or take it away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Executable,
    FromClause,
    select,
)

from peculium_server.core.lanes import lane_of
from peculium_server.core.state import Budget, Entry, Hold
from peculium_server.store import reads, rows, tail
from peculium_server.store.clauses import LANE, ROOT, columns, in_positions
from peculium_server.store.reading import stream
from peculium_server.store.schema import budgets, entries, holds
from peculium_server.store.seals import SnapshotSeals
from peculium_server.store.statements import compiled
from peculium_server.store.wire import Connection, Statement

_WINDOW = 4_096
"""Positions that are sorted at once, instead of a whole lane; the index finds them together."""


def _entries(*of: ColumnElement[bool]) -> Executable:
    return (
        select(*columns(entries, rows.ENTRY_COLUMNS))
        .where(
            entries.c.lane == LANE,
            *in_positions(),
            *of,
        )
        .order_by(entries.c.position, entries.c.part)
    )


def _all_of_lane(table: FromClause, names: Sequence[str]) -> Executable:
    return select(*columns(table, names)).where(table.c.lane == LANE)


RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "entries_of_lane": (_entries(), rows.to_entry_as_found),
    "entries_of_tree": (_entries(entries.c.root_id == ROOT), rows.to_entry_as_found),
    "budgets_of_lane": (_all_of_lane(budgets, rows.BUDGET_COLUMNS), rows.to_budget),
    "holds_of_lane": (_all_of_lane(holds, rows.HOLD_COLUMNS), rows.to_hold_of_root),
}

STATEMENTS: dict[str, Statement] = {
    name: compiled(name, executable, row) for name, (executable, row) in RECIPES.items()
}


class Snapshot:
    """The ledger at one instant, however long it is read. One list at a time."""

    def __init__(self, connection: Connection, now: int, lanes: int) -> None:
        self.now = now
        """The database's clock when the snapshot was taken. Microseconds since the Unix epoch."""
        self.seals = SnapshotSeals(connection, lanes)
        """Its checkpoints."""
        self._connection = connection
        self._lanes = lanes

    def roots(self) -> AsyncIterator[bytes]:
        """The ids of all roots that any entry, budget or hold belongs to."""
        return stream(self._connection, reads.STATEMENTS["all_roots"])

    def entries_in_order(self, root_id: bytes) -> AsyncIterator[Entry]:
        """All entries of a tree by position and part. Their previous hash is left empty."""
        return self._of_tree("all_entries", root_id)

    def budgets_of(self, root_id: bytes) -> AsyncIterator[Budget]:
        """All budgets of a tree, in no order."""
        return self._of_tree("all_budgets", root_id)

    def holds_of(self, root_id: bytes) -> AsyncIterator[Hold]:
        """All holds of a tree, ended ones included, in no order."""
        return self._of_tree("all_holds", root_id)

    async def positions(self) -> tuple[int, ...]:
        """Where all lanes stand: so many operations are committed in each, by lane."""
        statement = tail.STATEMENTS["positions"]
        found = [row async for row in stream(self._connection, statement)]
        return tail.to_positions(found, self._lanes)

    async def entries_between(
        self, lane: int, *, after: int, until: int, root_id: bytes | None = None
    ) -> AsyncIterator[Entry]:
        """The entries of a lane, or of one tree of it, by position and part.

        Their previous hash is left empty.

        Args:
            lane: Which lane.
            after: Behind this position.
            until: Up to this one.
            root_id: The only tree that is wanted.
        """
        name = "entries_of_lane" if root_id is None else "entries_of_tree"
        of: tuple[Any, ...] = () if root_id is None else (UUID(bytes=root_id),)
        for low in range(after, until, _WINDOW):
            window = (lane, low, min(low + _WINDOW, until))
            async for entry in stream(self._connection, STATEMENTS[name], *window, *of):
                yield entry

    def budgets_of_lane(self, lane: int) -> AsyncIterator[Budget]:
        """All budgets of a lane, in no order."""
        return stream(self._connection, STATEMENTS["budgets_of_lane"], lane)

    def holds_of_lane(self, lane: int) -> AsyncIterator[tuple[bytes, Hold]]:
        """All holds of a lane, each with its root, ended ones included, in no order."""
        return stream(self._connection, STATEMENTS["holds_of_lane"], lane)

    def _of_tree(self, name: str, root_id: bytes) -> AsyncIterator[Any]:
        lane = lane_of(root_id, self._lanes)
        return stream(self._connection, reads.STATEMENTS[name], lane, UUID(bytes=root_id))
