"""The whole ledger at one instant, for those who verify it or take it away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from itertools import groupby
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Executable,
    FromClause,
    SmallInteger,
    any_,
    bindparam,
    literal_column,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY

from peculium_server.core.lanes import lane_of
from peculium_server.core.placement import Lying, Named
from peculium_server.core.state import Budget, Entry, Hold
from peculium_server.store import reads, rows, tail
from peculium_server.store.clauses import LANE, ROOT, columns, first, in_positions, in_tree
from peculium_server.store.reading import stream
from peculium_server.store.schema import (
    budgets,
    checkpoint_leaves,
    collections,
    entries,
    holds,
    incarnations,
    roots,
)
from peculium_server.store.seals import SnapshotSeals
from peculium_server.store.statements import LEDGER, Ledger, compiled
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


_LANES = bindparam("lanes", type_=ARRAY(SmallInteger))


def _lying(*, of_tree: bool) -> Executable:
    """Where rows of trees are, whether they are looked for there or not."""
    return union_all(
        *(
            select(literal_column(f"'{table.name}'"), table.c.lane, table.c.root_id)
            .where(table.c.lane == any_(_LANES), table.c.root_id == ROOT if of_tree else true())
            .distinct()
            for table in (entries, budgets, holds, checkpoint_leaves)
        )
    )


def _names(*of: ColumnElement[bool]) -> Executable:
    return select(*columns(roots, Named._fields)).where(*of)


def _misplaced(*of: ColumnElement[bool]) -> Executable:
    """Budgets that are listed below another one than the first of their ancestors."""
    above = literal_column("budgets.ancestors[1]", budgets.c.parent_id.type)
    return select(budgets.c.root_id, budgets.c.budget_id).where(
        *of, budgets.c.parent_id.is_distinct_from(above)
    )


def _collected(*of: ColumnElement[bool]) -> Executable:
    """Budgets on the list of what is to be collected, as far as they are found there."""
    return select(collections.c.lane, collections.c.root_id, collections.c.budget_id).where(*of)


RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "lying": (_lying(of_tree=False), Lying._make),
    "lying_of_tree": (_lying(of_tree=True), Lying._make),
    "names": (_names(), Named._make),
    "names_of_tree": (_names(roots.c.root_id == ROOT), Named._make),
    "misplaced": (_misplaced(), tuple),
    "misplaced_of_tree": (_misplaced(*in_tree(budgets)), tuple),
    "collected": (_collected(), tuple),
    "collected_of_tree": (_collected(*in_tree(collections)), tuple),
    "entries_of_lane": (_entries(), rows.to_entry_as_found),
    "entries_of_tree": (_entries(entries.c.root_id == ROOT), rows.to_entry_as_found),
    "budgets_of_lane": (_all_of_lane(budgets, rows.BUDGET_COLUMNS), rows.to_budget),
    "holds_of_lane": (_all_of_lane(holds, rows.HOLD_COLUMNS), rows.to_hold_of_root),
    "incarnations": (
        select(incarnations.c.incarnation).order_by(incarnations.c.number),
        first,
    ),
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

    async def ledger(self) -> list[Ledger]:
        """What was fixed when the ledger was made: one, if nobody has changed it."""
        return [row async for row in stream(self._connection, LEDGER)]

    def lying(self, root_id: bytes | None) -> AsyncIterator[Lying]:
        """Where entries, budgets, holds and leaves of a tree, or of all trees, are."""
        return self._of_some("lying", root_id, list(range(self._lanes)))

    def names(self, root_id: bytes | None) -> AsyncIterator[Named]:
        """The names by which a root, or all roots, are found."""
        return self._of_some("names", root_id)

    async def misplaced(self, root_id: bytes | None) -> list[tuple[bytes, bytes]]:
        """Root and id of the budgets whose parent is not the first of their ancestors."""
        if root_id is None:
            found = stream(self._connection, STATEMENTS["misplaced"])
        else:
            found = self._of_tree(STATEMENTS["misplaced_of_tree"], root_id)
        return [each async for each in found]

    async def collected(self, root_id: bytes | None) -> list[tuple[bytes, bytes]]:
        """Root and id of the budgets that the sweeper finds on the list of what is to be collected."""
        if root_id is None:
            found = stream(self._connection, STATEMENTS["collected"])
        else:
            found = self._of_tree(STATEMENTS["collected_of_tree"], root_id)
        return [(root, budget) async for lane, root, budget in found if lane == self._lane(root)]

    def entries_in_order(self, root_id: bytes) -> AsyncIterator[Entry]:
        """All entries of a tree by position and part. Their previous hash is left empty."""
        return self._of_tree(reads.STATEMENTS["all_entries"], root_id)

    def budgets_of(self, root_id: bytes) -> AsyncIterator[Budget]:
        """All budgets of a tree, in no order."""
        return self._of_tree(reads.STATEMENTS["all_budgets"], root_id)

    def holds_of(self, root_id: bytes) -> AsyncIterator[Hold]:
        """All holds of a tree, ended ones included, in no order."""
        return self._of_tree(reads.STATEMENTS["all_holds"], root_id)

    async def standing(self) -> dict[int, int]:
        """Where the lanes stand that say so: so many operations are committed in each."""
        statement = tail.STATEMENTS["positions"]
        return dict([row async for row in stream(self._connection, statement)])

    async def positions(self) -> tuple[int, ...]:
        """Where all lanes stand, by lane.

        Raises:
            LedgerCorrupt: One does not say.
        """
        return tail.to_positions([*(await self.standing()).items()], self._lanes)

    async def incarnations(self) -> list[bytes]:
        """All incarnations that the ledger has had, the present one last; one that came back, twice."""
        found = [each async for each in stream(self._connection, STATEMENTS["incarnations"])]
        return [each for each, _ in groupby(found)]

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

    def _lane(self, root_id: bytes) -> int:
        return lane_of(root_id, self._lanes)

    def _of_tree(self, statement: Statement, root_id: bytes) -> AsyncIterator[Any]:
        return stream(self._connection, statement, self._lane(root_id), UUID(bytes=root_id))

    def _of_some(self, name: str, root_id: bytes | None, *values: Any) -> AsyncIterator[Any]:
        """The rows of one tree, or of all."""
        if root_id is None:
            return stream(self._connection, STATEMENTS[name], *values)
        return stream(self._connection, STATEMENTS[f"{name}_of_tree"], *values, UUID(bytes=root_id))
