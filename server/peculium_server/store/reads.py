"""The statements outside of a lane's transaction, each a short one of its own. All but one only read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Executable,
    Text,
    TextClause,
    and_,
    any_,
    bindparam,
    delete,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP

from peculium_server.store import rows
from peculium_server.store.clauses import BUDGET, ID, LANE, LIMIT, columns, first, in_tree
from peculium_server.store.schema import (
    LIVE_HOLD,
    OPEN_HOLD,
    budgets,
    collections,
    entries,
    holds,
    lanes,
    roots,
    seq_group,
)
from peculium_server.store.statements import CLOCK, compiled
from peculium_server.store.wire import Statement

_AFTER_ID = bindparam("after", type_=ID)
_IDS = bindparam("ids", type_=ARRAY(ID))


def _standing() -> Executable:
    return select(CLOCK, lanes.c.position).where(lanes.c.lane == LANE)


def _root_named() -> Executable:
    return select(roots.c.root_id).where(roots.c.name == bindparam("name", type_=Text()))


def _child_named() -> Executable:
    return select(budgets.c.budget_id).where(
        *in_tree(budgets),
        budgets.c.parent_id == BUDGET,
        budgets.c.name == bindparam("name", type_=Text()),
    )


def _ancestry() -> Executable:
    """A budget and its ancestors, as one statement sees them: never half an operation."""
    named = budgets.alias("named")
    line = func.array_append(named.c.ancestors, named.c.budget_id)
    return (
        select(*columns(budgets, rows.BUDGET_COLUMNS))
        .select_from(named)
        .join(budgets, and_(*in_tree(budgets), budgets.c.budget_id == any_(line)))
        .where(*in_tree(named), named.c.budget_id == BUDGET)
        .order_by(func.cardinality(budgets.c.ancestors).desc())
    )


def _budgets() -> Executable:
    return select(*columns(budgets, rows.BUDGET_COLUMNS)).where(
        *in_tree(budgets), budgets.c.budget_id == any_(_IDS)
    )


def _list_holds(*conditions: ColumnElement[bool] | TextClause) -> Executable:
    return (
        select(*columns(holds, rows.HOLD_COLUMNS))
        .where(
            *in_tree(holds),
            holds.c.budget_id == BUDGET,
            holds.c.hold_id > _AFTER_ID,
            *conditions,
        )
        .order_by(holds.c.hold_id)
        .limit(LIMIT)
    )


def _last_use() -> Executable:
    """The time of a budget's latest entry that ended a token, from the end of the index."""
    seq = entries.c.seq
    return (
        select(entries.c.at)
        .where(*in_tree(entries), entries.c.budget_id == BUDGET, entries.c.consumed.is_not(None))
        .order_by(seq_group(seq).desc(), seq.desc())
        .limit(literal_column("1"))
    )


def _all_entries() -> Executable:
    return (
        select(*columns(entries, rows.ENTRY_COLUMNS))
        .where(*in_tree(entries))
        .order_by(entries.c.position, entries.c.part)
    )


def _all_budgets() -> Executable:
    return select(*columns(budgets, rows.BUDGET_COLUMNS)).where(*in_tree(budgets))


def _all_holds() -> Executable:
    return select(*columns(holds, rows.HOLD_COLUMNS)).where(*in_tree(holds))


# -- What is due --------------------------------------------------------------------------------------

_NOW = func.statement_timestamp(type_=TIMESTAMP(timezone=True))
"""The database's clock as an index can be searched by it: one value for all rows."""

_LEASED = budgets.c.lease_until.is_not(None), ~budgets.c.closed


def _earliest_due() -> Executable:
    """Of a lane, the first hold, lease and collection, whether they are due yet or not."""
    hold = (
        select(holds.c.expires_at)
        .where(holds.c.lane == LANE, LIVE_HOLD)
        .order_by(holds.c.expires_at)
        .limit(literal_column("1"))
    )
    lease = (
        select(budgets.c.lease_until)
        .where(budgets.c.lane == LANE, *_LEASED)
        .order_by(budgets.c.lease_until)
        .limit(literal_column("1"))
    )
    of_lane = collections.c.lane == LANE
    return select(
        _NOW,
        hold.scalar_subquery(),
        lease.scalar_subquery(),
        select(func.min(collections.c.closed_at)).where(of_lane).scalar_subquery(),
        select(func.count()).select_from(collections).where(of_lane).scalar_subquery(),
    )


def _due_holds() -> Executable:
    return (
        select(holds.c.root_id, holds.c.budget_id, holds.c.hold_id)
        .where(holds.c.lane == LANE, LIVE_HOLD, holds.c.expires_at <= _NOW)
        .order_by(holds.c.expires_at)
        .limit(LIMIT)
    )


def _due_leases() -> Executable:
    return (
        select(budgets.c.root_id, budgets.c.budget_id)
        .where(budgets.c.lane == LANE, *_LEASED, budgets.c.lease_until <= _NOW)
        .order_by(budgets.c.lease_until)
        .limit(LIMIT)
    )


def _collections() -> Executable:
    return (
        select(collections.c.root_id, collections.c.budget_id)
        .where(collections.c.lane == LANE)
        .order_by(collections.c.closed_at)
        .limit(LIMIT)
    )


def _to_collect() -> Executable:
    """Some budgets below another one that have something available, in no order."""
    wanted = columns(budgets, ("budget_id", "available"))
    below = (
        select(*wanted)
        .where(*in_tree(budgets), budgets.c.parent_id == BUDGET)
        .cte("below", recursive=True)
    )
    below = below.union_all(
        select(*wanted).select_from(
            below.join(budgets, and_(*in_tree(budgets), budgets.c.parent_id == below.c.budget_id))
        )
    )
    return select(below.c.budget_id).where(below.c.available > literal_column("0")).limit(LIMIT)


OPEN_HOLDS_MAX = 100_000
"""Of a lane and state, that are counted: more of them are told to be so many."""


def _open_holds() -> Executable:
    """How many holds of a lane are live, and how many are live or lapsed."""
    counts = []
    for state in (LIVE_HOLD, OPEN_HOLD):
        some = (
            select(literal_column("1"))
            .select_from(holds)
            .where(holds.c.lane == LANE, state)
            .limit(literal_column(str(OPEN_HOLDS_MAX)))
            .subquery()
        )
        counts.append(select(func.count()).select_from(some).scalar_subquery())
    return select(*counts)


def _end_collection() -> Executable:
    return delete(collections).where(*in_tree(collections), collections.c.budget_id == BUDGET)


RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "standing": (_standing(), tuple),
    "root_named": (_root_named(), first),
    "child_named": (_child_named(), first),
    "ancestry": (_ancestry(), rows.to_budget),
    "budgets": (_budgets(), rows.to_budget),
    "list_open_holds": (_list_holds(OPEN_HOLD), rows.to_hold),
    "list_all_holds": (_list_holds(), rows.to_hold),
    "last_use": (_last_use(), first),
    "earliest_due": (_earliest_due(), tuple),
    "due_holds": (_due_holds(), tuple),
    "due_leases": (_due_leases(), tuple),
    "collections": (_collections(), tuple),
    "to_collect": (_to_collect(), first),
    "end_collection": (_end_collection(), tuple),
    "open_holds": (_open_holds(), tuple),
    "all_entries": (_all_entries(), rows.to_entry_as_found),
    "all_budgets": (_all_budgets(), rows.to_budget_as_found),
    "all_holds": (_all_holds(), rows.to_hold_as_found),
}

STATEMENTS: dict[str, Statement] = {
    name: compiled(name, executable, row) for name, (executable, row) in RECIPES.items()
}
