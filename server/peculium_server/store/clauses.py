"""What the statements outside of a lane's transaction are made of: their parameters and conditions."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Select,
    SmallInteger,
    Uuid,
    and_,
    any_,
    bindparam,
    func,
    literal_column,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by

from peculium_server.core.state import GENESIS, Entry
from peculium_server.store import rows
from peculium_server.store.schema import budgets, entries, seq_group

ID = Uuid(as_uuid=False)

LANE = bindparam("lane", type_=SmallInteger)
ROOT = bindparam("root_id", type_=ID)
BUDGET = bindparam("budget_id", type_=ID)
AFTER = bindparam("after", type_=BigInteger)
UNTIL = bindparam("until", type_=BigInteger)
LIMIT = bindparam("limit", type_=BigInteger)


def in_tree(table: FromClause) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """The row is of the tree."""
    return table.c.lane == LANE, table.c.root_id == ROOT


def in_positions() -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """The entry is behind one position and up to another."""
    return entries.c.position > AFTER, entries.c.position <= UNTIL


def in_subtree(table: FromClause = budgets) -> ColumnElement[bool]:
    """The budget's row is the one that is named, or below it."""
    return or_(table.c.budget_id == BUDGET, any_(table.c.ancestors) == BUDGET)


class Scope(Enum):
    """Whose rows are listed, of a table beside the ledger."""

    LEDGER = "ledger"
    TREE = "tree"
    SUBTREE = "subtree"
    BUDGET = "budget"


def in_scope(table: FromClause, scope: Scope) -> list[ColumnElement[bool]]:
    """The row is of the ledger, of the tree, or of the budget that is named or those below it."""
    if scope is Scope.LEDGER:
        return []
    of_tree = table.c.root_id == ROOT
    if scope is Scope.TREE:
        return [of_tree]
    if scope is Scope.BUDGET:
        return [of_tree, table.c.budget_id == BUDGET]
    below = select(budgets.c.budget_id).where(*in_tree(budgets), in_subtree())
    return [of_tree, table.c.budget_id.in_(below)]


def of_subtree() -> ColumnElement[bool]:
    """The entry is of the budget that is named, or of one below it."""
    return entries.c.budget_id.in_(
        select(budgets.c.budget_id).where(*in_tree(budgets), in_subtree())
    )


def path_of(table: FromClause) -> ColumnElement[str]:
    """The names from the root down to the budget that the row names; NULL if there is none."""
    above, named = budgets.alias("above"), budgets.alias("named")
    line = func.array_append(named.c.ancestors, named.c.budget_id)
    depth = func.cardinality(above.c.ancestors)
    return (
        select(func.string_agg(above.c.name, aggregate_order_by(literal_column("'/'"), depth)))
        .select_from(named)
        .join(
            above,
            and_(
                above.c.lane == named.c.lane,
                above.c.root_id == named.c.root_id,
                above.c.budget_id == any_(line),
            ),
        )
        .where(
            named.c.lane == table.c.lane,
            named.c.root_id == table.c.root_id,
            named.c.budget_id == table.c.budget_id,
        )
        .scalar_subquery()
    )


def columns(table: FromClause, names: Sequence[str]) -> list[ColumnElement[Any]]:
    """Columns by their names."""
    return [table.c[name] for name in names]


def chained() -> Select[Any]:
    """Entries of the lane, each with the hash before it of its budget; NULL for the first one."""
    before = entries.alias("before")
    seq_before = entries.c.seq - literal_column("1")
    previous_hash = (
        select(before.c.hash)
        .where(
            # By the parameter, so that there is one partition to plan for.
            before.c.lane == LANE,
            before.c.root_id == entries.c.root_id,
            before.c.budget_id == entries.c.budget_id,
            seq_group(before.c.seq) == seq_group(seq_before),
            before.c.seq == seq_before,
        )
        .scalar_subquery()
    )
    return select(*columns(entries, rows.ENTRY_COLUMNS), previous_hash)


def to_chained_entry(row: Sequence[Any]) -> Entry:
    """An entry, of a row of `chained`.

    Raises:
        LedgerCorrupt: It is none.
    """
    return rows.to_entry(row, previous_hash=row[len(rows.ENTRY_COLUMNS)] or GENESIS)


def first(row: Sequence[Any]) -> Any:
    """The value of a row that has one."""
    return row[0]
