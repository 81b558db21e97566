"""Saving: from what was accepted to the statements that write it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peculium_server.core.operations import Revoke
from peculium_server.core.state import Accepted, Budget, Entry, Hold
from peculium_server.store import rows
from peculium_server.store.known import Key
from peculium_server.store.statements import LaneStatements
from peculium_server.store.wire import Statement, Step

_CHANGED_BUDGET = ("root_id", "budget_id", "before", *rows.BUDGET_CHANGES)
_CHANGED_HOLD = ("root_id", "hold_id", *rows.HOLD_CHANGES)


def changes(
    statements: LaneStatements,
    accepted: Sequence[Accepted],
    existing_holds: Collection[Key],
    position: int,
) -> tuple[list[Step], int]:
    """The steps that save what was accepted, in the order in which rows are written.

    The lane's position comes before them, then roots, budgets, holds, entries, collections, each sorted by
    key: writers that overlap after all meet at the first row, and none waits for another in a circle.

    Args:
        statements: Of the lane.
        accepted: In the order of decision; the last state of a budget or hold wins.
        existing_holds: Those that have a row.
        position: The lane's before.

    Returns:
        The steps, and the lane's position afterwards.
    """
    budgets: dict[Key, Budget] = {}
    holds: dict[Key, Hold] = {}
    entries: list[Entry] = []
    for one in accepted:
        for budget in one.budgets:
            budgets[budget.root_id, budget.budget_id] = budget
        for hold in one.holds:
            holds[one.operation.root_id, hold.hold_id] = hold
        entries += one.entries
    after = max((entry.position for entry in entries), default=position)
    return [
        *_save_budgets(statements, budgets, entries),
        *_save_holds(statements, holds, existing_holds),
        *_add(
            statements.add_entries,
            rows.ENTRY_COLUMNS,
            [rows.from_entry(entry) for entry in sorted(entries, key=_entry_key)],
            one=statements.add_entry,
        ),
        *_add(
            statements.add_collections,
            rows.COLLECTION_COLUMNS,
            sorted(_left_to_collect(one) for one in accepted if one.entries[0].effect.pending),
        ),
    ], after


def _left_to_collect(closing: Accepted) -> tuple[bytes, bytes, int]:
    """The row of `COLLECTION_COLUMNS` for a closing that could not empty everything below at once."""
    operation = closing.operation
    top = operation.descendant_id if isinstance(operation, Revoke) else operation.budget_id
    return operation.root_id, top, closing.entries[0].at


def _entry_key(entry: Entry) -> tuple[bytes, bytes, int]:
    return entry.root_id, entry.operation_id, entry.part


def _save_budgets(
    statements: LaneStatements, budgets: Mapping[Key, Budget], entries: Sequence[Entry]
) -> list[Step]:
    new, changed = [], []
    added = Counter((entry.root_id, entry.budget_id) for entry in entries)
    for key, budget in sorted(budgets.items()):
        if budget.seq == added[key]:
            new.append(budget)
        else:
            changed.append(rows.budget_changes(budget, added[key]))
    roots = [(budget.root_id, budget.name) for budget in new if budget.is_root]
    return [
        *_add(statements.add_roots, ("root_id", "name"), roots),
        *_add(
            statements.add_budgets,
            (*rows.BUDGET_COLUMNS, "parent_id"),
            [rows.from_budget(budget) for budget in new],
        ),
        *_change(statements.save_budget, statements.save_budgets, _CHANGED_BUDGET, changed),
    ]


def _save_holds(
    statements: LaneStatements, holds: Mapping[Key, Hold], existing: Collection[Key]
) -> list[Step]:
    new, changed = [], []
    for (root_id, hold_id), hold in sorted(holds.items()):
        if (root_id, hold_id) in existing:
            changed.append(rows.hold_changes(root_id, hold))
        else:
            new.append(rows.from_hold(root_id, hold))
    return [
        *_add(statements.add_holds, rows.HOLD_COLUMNS, new, one=statements.add_hold),
        *_change(statements.save_hold, statements.save_holds, _CHANGED_HOLD, changed),
    ]


def _add(
    many: Statement,
    columns: Sequence[str],
    new: Sequence[tuple[Any, ...]],
    *,
    one: Statement | None = None,
) -> list[Step]:
    """Insert rows: as arrays, or a single one as values, where there is a statement for it."""
    if not new:
        return []
    if one is not None and len(new) == 1:
        return [Step(one, dict(zip(columns, new[0], strict=True)))]
    return [Step(many, _arrays(columns, new))]


def _change(
    one: Statement, many: Statement, columns: Sequence[str], changed: Sequence[tuple[Any, ...]]
) -> list[Step]:
    """Update rows, as `_add` inserts them; all of them, or the transaction fails."""
    if not changed:
        return []
    if len(changed) == 1:
        return [Step(one, {"rows": 1, **dict(zip(columns, changed[0], strict=True))})]
    return [Step(many, {"rows": len(changed), **_arrays(columns, changed)})]


def _arrays(columns: Sequence[str], table: Sequence[tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """The values of each column."""
    return dict(zip(columns, zip(*table, strict=True), strict=True))
