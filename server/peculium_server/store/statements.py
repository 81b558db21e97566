"""Every statement that the ledger sends, built over the tables and compiled to text once.

Those of a lane name it literally: Postgres then plans for the one partition, when it prepares them.
Where a statement has to change an exact number of rows, it divides by zero if it does not, so that
the commit that travels behind it is never tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Dialect,
    Executable,
    FromClause,
    LargeBinary,
    Select,
    SmallInteger,
    Table,
    Text,
    Update,
    Uuid,
    and_,
    bindparam,
    case,
    cast,
    column,
    func,
    insert,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP, psycopg
from sqlalchemy.types import TypeEngine

from peculium_server.core.limits import EAGER_COLLECTIONS_MAX, OPEN_HOLDS_MAX
from peculium_server.store import rows, wire
from peculium_server.store.schema import (
    OPEN_HOLD,
    budgets,
    collections,
    entries,
    holds,
    lanes,
    ledger,
    roots,
)

Given = Callable[..., FromClause]
"""How rows are handed over: as arrays, or one as values. Of names and types it makes a table k."""

POSTGRES: Dialect = psycopg.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]

_ID = Uuid(as_uuid=False)

_SCALARS: dict[type[TypeEngine[Any]], wire.Encoder] = {
    BigInteger: wire.encode_int8,
    Boolean: wire.encode_bool,
    LargeBinary: wire.encode_bytea,
    SmallInteger: wire.encode_int2,
    TIMESTAMP: wire.encode_time,
    Text: wire.encode_text,
    Uuid: wire.encode_uuid,
}
_ARRAYS: dict[type[TypeEngine[Any]], wire.Encoder] = {
    BigInteger: wire.encode_int8s,
    Boolean: wire.encode_bools,
    LargeBinary: wire.encode_byteas,
    SmallInteger: wire.encode_int2s,
    TIMESTAMP: wire.encode_times,
    Text: wire.encode_texts,
    Uuid: wire.encode_uuids,
}


def compiled(
    name: str,
    executable: Executable,
    row: Callable[[Sequence[Any]], Any] = tuple,
    dialect: Dialect = POSTGRES,
) -> wire.Statement:
    """The statement as text, and how each of its parameters is encoded."""
    result = executable.compile(dialect=dialect)  # type: ignore[attr-defined]
    parameters = []
    for parameter in result.positiontup or ():
        kind = result.binds[parameter].type
        if isinstance(kind, ARRAY):
            parameters.append((parameter, _ARRAYS[type(kind.item_type)]))
        else:
            parameters.append((parameter, _SCALARS[type(kind)]))
    return wire.Statement(name.encode(), str(result).encode(), tuple(parameters), row)


def unnested(**types: TypeEngine[Any]) -> FromClause:
    """Arrays as rows of a table k: one array, and parameter, for each column."""
    arrays = [bindparam(name, type_=ARRAY(kind)) for name, kind in types.items()]
    columns = [column(name, kind) for name, kind in types.items()]
    return func.unnest(*arrays).table_valued(*columns).render_derived(name="k")


def one_row(**types: TypeEngine[Any]) -> FromClause:
    """Values as the only row of a table k: a parameter for each column.

    For what a lone operation writes PostgreSQL takes a good third less time than for arrays, each of which is
    unnested into a store of its own.
    """
    # The type has to be said: not every one is part of its parameter.
    values = [cast(bindparam(name, type_=kind), kind).label(name) for name, kind in types.items()]
    return select(*values).subquery("k")


def _types(table: Table, names: Sequence[str]) -> dict[str, TypeEngine[Any]]:
    """The columns' types as parameters: arrays and documents are texts, so that arrays of them can be unnested."""
    return {
        name: Text() if isinstance(table.c[name].type, ARRAY | JSONB | Text) else table.c[name].type
        for name in names
    }


def _columns(table: FromClause, names: Sequence[str]) -> list[ColumnElement[Any]]:
    return [table.c[name] for name in names]


def _matching(table: FromClause, lane: ColumnElement[int], keys: FromClause) -> ColumnElement[bool]:
    """Rows of the lane whose columns equal the keys of the same names."""
    same = [table.c[key.name] == key for key in keys.c]
    return and_(table.c.lane == lane, *same)


def inserted(
    table: Table,
    names: Sequence[str],
    lane: ColumnElement[int] | None = None,
    given: Given = unnested,
) -> Executable:
    """Insert rows, of a table with lanes into one's partition."""
    keys = given(**_types(table, names))
    values = [
        cast(keys.c[name], table.c[name].type)
        if isinstance(table.c[name].type, ARRAY | JSONB)
        else keys.c[name]
        for name in names
    ]
    if lane is None:
        return insert(table).from_select(list(names), select(*values))
    return insert(table).from_select(["lane", *names], select(lane, *values))


def _exactly(change: Update, expected: ColumnElement[int]) -> Select[Any]:
    """Make a change, and fail unless it changed as many rows as expected."""
    changed = change.returning(literal_column("1")).cte("changed")
    one: ColumnElement[int] = literal_column("1")
    verdict = case((func.count() == expected, one), else_=literal_column("0"))
    return select(one.op("/")(verdict)).select_from(changed)


# -- A lane's transaction ---------------------------------------------------------------------------

LOCK_KEYS = 0x7065636C << 32
"""Plus a lane's number: its advisory lock, among those of others in the same database."""

_ROWS = bindparam("rows", type_=BigInteger)
CLOCK = func.clock_timestamp(type_=TIMESTAMP(timezone=True))


def _load_budgets(lane: ColumnElement[int]) -> Executable:
    keys = unnested(root_id=_ID, budget_id=_ID)
    return select(*_columns(budgets, rows.BUDGET_COLUMNS)).select_from(
        keys.join(budgets, _matching(budgets, lane, keys))
    )


def _load_holds(lane: ColumnElement[int]) -> Executable:
    keys = unnested(root_id=_ID, hold_id=_ID)
    return select(*_columns(holds, rows.HOLD_COLUMNS)).select_from(
        keys.join(holds, _matching(holds, lane, keys))
    )


def _load_tokens(lane: ColumnElement[int]) -> Select[Any]:
    """Who consumed a token, and which open hold has it.

    Each is looked up for itself: joined, the open holds are so few by what PostgreSQL knows of them that it
    would look through all of them for each token, and through all that were open since it has last tidied up.
    """
    keys = unnested(root_id=_ID, budget_id=_ID, token=LargeBinary())
    one: ColumnElement[int] = literal_column("1")
    consumed = (
        select(*_columns(entries, ("operation_id", "kind", "at", "principal", "part", "request")))
        .where(
            entries.c.lane == lane,
            entries.c.root_id == keys.c.root_id,
            entries.c.budget_id == keys.c.budget_id,
            entries.c.consumed == keys.c.token,
        )
        .limit(one)
        .lateral("used")
    )
    held = (
        select(holds.c.hold_id)
        .where(_matching(holds, lane, keys), OPEN_HOLD)
        .limit(one)
        .lateral("held")
    )
    return (
        select(*keys.c, *held.c, *consumed.c)
        .select_from(keys.outerjoin(consumed, true()).outerjoin(held, true()))
        .where(or_(consumed.c.operation_id.is_not(None), held.c.hold_id.is_not(None)))
    )


def _load_recorded(lane: ColumnElement[int]) -> Executable:
    keys = unnested(root_id=_ID, operation_id=_ID)
    return (
        select(*_columns(entries, rows.ENTRY_COLUMNS))
        .select_from(keys.join(entries, _matching(entries, lane, keys)))
        .order_by(entries.c.root_id, entries.c.operation_id, entries.c.part)
    )


def _load_names(lane: ColumnElement[int]) -> Executable:
    keys = unnested(root_id=_ID, parent_id=_ID, name=Text())
    return select(*keys.c, budgets.c.budget_id).select_from(
        keys.join(budgets, _matching(budgets, lane, keys))
    )


def _load_open_holds(lane: ColumnElement[int]) -> Executable:
    keys = unnested(root_id=_ID, budget_id=_ID)
    some = (
        select(*_columns(holds, rows.HOLD_COLUMNS))
        .where(_matching(holds, lane, keys), OPEN_HOLD)
        .order_by(holds.c.hold_id)
        .limit(literal_column(str(OPEN_HOLDS_MAX)))
        .lateral("some")
    )
    return select(*some.c).select_from(keys.join(some, true()))


def _load_below(lane: ColumnElement[int]) -> Executable:
    """What is available below a budget: in sum, and the first of those that have it."""
    keys = unnested(root_id=_ID, budget_id=_ID)
    wanted = _columns(budgets, ("budget_id", "ancestors", "available"))
    below = (
        select(keys.c.root_id, keys.c.budget_id.label("top"), *wanted)
        .select_from(
            keys.join(
                budgets,
                and_(
                    budgets.c.lane == lane,
                    budgets.c.root_id == keys.c.root_id,
                    budgets.c.parent_id == keys.c.budget_id,
                ),
            )
        )
        .cte("below", recursive=True)
    )
    below = below.union_all(
        select(below.c.root_id, below.c.top, *wanted).select_from(
            below.join(
                budgets,
                and_(
                    budgets.c.lane == lane,
                    budgets.c.root_id == below.c.root_id,
                    budgets.c.parent_id == below.c.budget_id,
                ),
            )
        )
    )
    top = (below.c.root_id, below.c.top)
    nearest = (func.cardinality(below.c.ancestors), below.c.budget_id)
    ranked = (
        select(
            *below.c,
            func.sum(below.c.available).over(partition_by=top).label("total"),
            func.row_number().over(partition_by=top, order_by=nearest).label("rank"),
        )
        .where(below.c.available > literal_column("0"))
        .subquery("ranked")
    )
    return select(*_columns(ranked, ("root_id", "top", "budget_id", "ancestors", "total"))).where(
        ranked.c.rank <= literal_column(str(EAGER_COLLECTIONS_MAX))
    )


def _load_open_children(lane: ColumnElement[int]) -> Executable:
    """An open child of each budget that is not among those known already."""
    keys = unnested(root_id=_ID, parent_id=_ID)
    known = (
        func.unnest(
            bindparam("known_root_id", type_=ARRAY(_ID)),
            bindparam("known_budget_id", type_=ARRAY(_ID)),
        )
        .table_valued(column("root_id", _ID), column("budget_id", _ID))
        .render_derived(name="known")
    )
    one = (
        select(budgets.c.budget_id)
        .where(
            _matching(budgets, lane, keys),
            ~budgets.c.closed,
            ~select(literal_column("1"))
            .select_from(known)
            .where(known.c.root_id == budgets.c.root_id, known.c.budget_id == budgets.c.budget_id)
            .exists(),
        )
        .limit(literal_column("1"))
        .lateral("one")
    )
    return select(*keys.c, one.c.budget_id).select_from(keys.join(one, true()))


def _load_position(lane: ColumnElement[int]) -> Executable:
    """The lane's position and the clock: the last of what is loaded."""
    return select(lanes.c.position, CLOCK).where(lanes.c.lane == lane)


def _save_position(lane: ColumnElement[int]) -> Executable:
    change = (
        update(lanes)
        .where(lanes.c.lane == lane, lanes.c.position == bindparam("before", type_=BigInteger))
        .values(position=bindparam("after", type_=BigInteger))
    )
    return _exactly(change, literal_column("1"))


def _advance_position(lane: ColumnElement[int]) -> Executable:
    """As `save_position`, for what was decided without asking first; the clock is its answer.

    Fails unless the lane is where it was taken to be, nobody else has its lock, the time used lies a little
    way back, and the flight before, if it has not landed yet, was committed. Whoever has the lock would come
    too late each time, since it needs two flights. The flight before has left its name in the session,
    from which the database takes it again if it is not committed after all.
    """
    previous, own = bindparam("previous", type_=Text()), bindparam("own", type_=Text())
    name: ColumnElement[str] = literal_column("'peculium.flight'")
    at = bindparam("at", type_=TIMESTAMP(timezone=True))
    latest = bindparam("latest", type_=TIMESTAMP(timezone=True))
    none: ColumnElement[str] = literal_column("''")
    change = (
        update(lanes)
        .where(
            lanes.c.lane == lane,
            lanes.c.position == bindparam("before", type_=BigInteger),
            or_(previous == none, previous == func.current_setting(name, literal_column("true"))),
        )
        .values(position=bindparam("after", type_=BigInteger))
        .returning(literal_column("1"))
        .cte("changed")
    )
    one: ColumnElement[int] = literal_column("1")
    unlocked = func.pg_try_advisory_xact_lock(literal_column(str(LOCK_KEYS)) + lane)
    held = and_(func.count() == one, CLOCK.between(at, latest), unlocked)
    verdict = one.op("/")(case((held, one), else_=literal_column("0")))
    named = func.set_config(name, own, literal_column("false"))
    return select(CLOCK, verdict, named).select_from(change)


def _refuse_seen(lane: ColumnElement[int]) -> Executable:
    """Fail if one of the tokens was consumed before, or is an open hold's."""
    one: ColumnElement[int] = literal_column("1")
    seen = _load_tokens(lane).exists()
    return select(one.op("/")(case((seen, literal_column("0")), else_=one)))


def _save_budgets(lane: ColumnElement[int], given: Given = unnested) -> Executable:
    keys = given(
        root_id=_ID, budget_id=_ID, before=BigInteger(), **_types(budgets, rows.BUDGET_CHANGES)
    )
    change = (
        update(budgets)
        .where(
            budgets.c.lane == lane,
            budgets.c.root_id == keys.c.root_id,
            budgets.c.budget_id == keys.c.budget_id,
            budgets.c.seq == keys.c.before,
        )
        .values({name: keys.c[name] for name in rows.BUDGET_CHANGES})
    )
    return _exactly(change, _ROWS)


def _save_holds(lane: ColumnElement[int], given: Given = unnested) -> Executable:
    keys = given(root_id=_ID, hold_id=_ID, **_types(holds, rows.HOLD_CHANGES))
    change = (
        update(holds)
        .where(
            holds.c.lane == lane,
            holds.c.root_id == keys.c.root_id,
            holds.c.hold_id == keys.c.hold_id,
        )
        .values({name: keys.c[name] for name in rows.HOLD_CHANGES})
    )
    return _exactly(change, _ROWS)


def _load_roots(_: ColumnElement[int]) -> Executable:
    """Names are unique over the whole ledger, so this table alone is not a lane's."""
    names = func.any(bindparam("name", type_=ARRAY(Text())))
    return select(roots.c.name, roots.c.root_id).where(roots.c.name == names)


def _add_roots(lane: ColumnElement[int]) -> Executable:
    return inserted(roots, ("root_id", "name"), lane)


def _add_budgets(lane: ColumnElement[int]) -> Executable:
    return inserted(budgets, (*rows.BUDGET_COLUMNS, "parent_id"), lane)


def _add_holds(lane: ColumnElement[int], given: Given = unnested) -> Executable:
    return inserted(holds, rows.HOLD_COLUMNS, lane, given)


def _add_entries(lane: ColumnElement[int], given: Given = unnested) -> Executable:
    return inserted(entries, rows.ENTRY_COLUMNS, lane, given)


def _add_collections(lane: ColumnElement[int]) -> Executable:
    return inserted(collections, rows.COLLECTION_COLUMNS, lane)


class _Recipe(NamedTuple):
    build: Callable[[ColumnElement[int]], Executable]
    row: Callable[[Sequence[Any]], Any] = tuple


LANE_RECIPES: dict[str, _Recipe] = {
    "load_budgets": _Recipe(_load_budgets, rows.to_budget),
    "load_holds": _Recipe(_load_holds, rows.to_hold_of_root),
    "load_tokens": _Recipe(_load_tokens),
    "load_recorded": _Recipe(_load_recorded, rows.to_entry),
    "load_names": _Recipe(_load_names),
    "load_roots": _Recipe(_load_roots),
    "load_open_holds": _Recipe(_load_open_holds, rows.to_hold_of_root),
    "load_below": _Recipe(_load_below),
    "load_open_children": _Recipe(_load_open_children),
    "load_position": _Recipe(_load_position),
    "save_position": _Recipe(_save_position),
    "advance_position": _Recipe(_advance_position),
    "refuse_seen": _Recipe(_refuse_seen),
    "add_roots": _Recipe(_add_roots),
    "add_budgets": _Recipe(_add_budgets),
    "save_budget": _Recipe(partial(_save_budgets, given=one_row)),
    "save_budgets": _Recipe(_save_budgets),
    "add_hold": _Recipe(partial(_add_holds, given=one_row)),
    "add_holds": _Recipe(_add_holds),
    "save_hold": _Recipe(partial(_save_holds, given=one_row)),
    "save_holds": _Recipe(_save_holds),
    "add_entry": _Recipe(partial(_add_entries, given=one_row)),
    "add_entries": _Recipe(_add_entries),
    "add_collections": _Recipe(_add_collections),
}


class LaneStatements(NamedTuple):
    """The statements of a lane's transaction."""

    load_budgets: wire.Statement
    load_holds: wire.Statement
    load_tokens: wire.Statement
    load_recorded: wire.Statement
    load_names: wire.Statement
    load_roots: wire.Statement
    load_open_holds: wire.Statement
    load_below: wire.Statement
    load_open_children: wire.Statement
    load_position: wire.Statement
    save_position: wire.Statement
    advance_position: wire.Statement
    refuse_seen: wire.Statement
    add_roots: wire.Statement
    add_budgets: wire.Statement
    save_budget: wire.Statement
    save_budgets: wire.Statement
    add_hold: wire.Statement
    add_holds: wire.Statement
    save_hold: wire.Statement
    save_holds: wire.Statement
    add_entry: wire.Statement
    add_entries: wire.Statement
    add_collections: wire.Statement


@cache
def of_lane(lane: int) -> LaneStatements:
    """The statements of a lane, which they name literally."""
    here: ColumnElement[int] = literal_column(str(lane), SmallInteger)
    return LaneStatements(
        **{
            name: compiled(f"{name}_{lane}", recipe.build(here), recipe.row)
            for name, recipe in LANE_RECIPES.items()
        }
    )


# -- The ledger itself ------------------------------------------------------------------------------


class Ledger(NamedTuple):
    """What was fixed when the ledger was made."""

    incarnation: bytes
    """The first one."""
    lanes: int
    encoding_version: int


def _ledger() -> Executable:
    return select(*_columns(ledger, Ledger._fields))


LEDGER = compiled("ledger", _ledger(), Ledger._make)
