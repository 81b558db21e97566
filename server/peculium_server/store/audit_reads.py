"""The statements that auditors' questions need: lists that are filtered, and what was before.

Each is short: it looks at a window of keys, or takes so many rows at most. What a statement selects
by an entry's request or effect it selects by their bytes, which may let too much through; whoever reads
the rows decodes them and looks again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    Executable,
    LargeBinary,
    SmallInteger,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    false,
    func,
    literal_column,
    or_,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP

from peculium_server.core.operations import HOLD_OPERATIONS, Kind
from peculium_server.core.state import GENESIS, Entry
from peculium_server.store import rows
from peculium_server.store.clauses import (
    AFTER,
    BUDGET,
    ID,
    LIMIT,
    UNTIL,
    chained,
    columns,
    first,
    in_positions,
    in_subtree,
    in_tree,
    to_chained_entry,
)
from peculium_server.store.schema import SEQ_GROUP_BITS, budgets, entries, holds, roots, seq_group
from peculium_server.store.statements import compiled
from peculium_server.store.wire import Statement

_IDS = bindparam("ids", type_=ARRAY(ID))
_AT = bindparam("at", type_=TIMESTAMP(timezone=True))
_SKIPPED = bindparam("skipped", type_=BigInteger)
_ZERO, _ONE, _TWO = (literal_column(number, BigInteger) for number in "012")
_SEQ_GROUP_BITS = literal_column(str(SEQ_GROUP_BITS), BigInteger)
_NOTHING = literal_column("''", Text)

_BIGINT_MAX = literal_column(str(2**63 - 1), BigInteger)


# -- What is said of a subtree ------------------------------------------------------------------------


def _with_totals() -> Executable:
    """A budget and its ancestors, each with the sums over the budget's subtree: at one instant."""
    named, below = budgets.alias("named"), budgets.alias("below")
    line = func.array_append(named.c.ancestors, named.c.budget_id)
    subtree = (
        *in_tree(below),
        in_subtree(below),
    )
    totals = [
        select(cast(func.least(func.coalesce(func.sum(amount), _ZERO), _BIGINT_MAX), BigInteger))
        .where(*subtree)
        .scalar_subquery()
        for amount in (
            below.c.spent + below.c.forfeited,
            below.c.disputed,
            below.c.held,
            below.c.holds_live,
        )
    ]
    return (
        select(*columns(budgets, rows.BUDGET_COLUMNS), *totals)
        .select_from(named)
        .join(budgets, and_(*in_tree(budgets), budgets.c.budget_id == any_(line)))
        .where(*in_tree(named), named.c.budget_id == BUDGET)
        .order_by(func.cardinality(budgets.c.ancestors).desc())
    )


# -- As of a time -------------------------------------------------------------------------------------


def _groups_at(*which: ColumnElement[bool]) -> CTE:
    """Of budgets the group of seqs that the last entry by a time is in; those made later are left out.

    Within a budget the time never decreases with the seq, so each is found by halving what is left,
    all of them at once. It is groups that are halved, since the index has one key for each.
    """
    last = seq_group(budgets.c.seq)
    search = (
        select(
            budgets.c.budget_id,
            case((budgets.c.last_at <= _AT, last), else_=_ZERO).label("low"),
            last.label("high"),
        )
        .where(*in_tree(budgets), budgets.c.created_at <= _AT, *which)
        .cte("search", recursive=True)
    )
    low, high = search.c.low, search.c.high
    middle = (low + high + _ONE).bitwise_rshift(_ONE)
    not_later = entries.c.at <= _AT
    halved = (
        select(
            search.c.budget_id,
            case((not_later, middle), else_=low),
            case((not_later, high), else_=middle - _ONE),
        )
        .select_from(
            search.join(
                entries,
                and_(
                    *in_tree(entries),
                    entries.c.budget_id == search.c.budget_id,
                    seq_group(entries.c.seq) == middle,
                    # The first one of the group.
                    entries.c.seq == middle.bitwise_lshift(_SEQ_GROUP_BITS),
                ),
            )
        )
        .where(low < high)
    )
    return search.union_all(halved)


def _last_at(
    which: Sequence[ColumnElement[bool]], columns: Sequence[ColumnElement[Any]]
) -> Executable:
    """Something of the last entries, by a time, of those budgets that there were."""
    found = _groups_at(*which)
    last = (
        select(*(column.label(f"c{index}") for index, column in enumerate(columns)))
        .where(
            *in_tree(entries),
            entries.c.budget_id == found.c.budget_id,
            seq_group(entries.c.seq) == found.c.low,
            entries.c.at <= _AT,
        )
        .order_by(entries.c.seq.desc())
        .limit(_ONE)
        .lateral("last")
    )
    return select(last).select_from(found.join(last, true())).where(found.c.low == found.c.high)


def _line_at() -> Executable:
    """The last entries, by a time, of a budget and its ancestors that there were."""
    return _last_at([budgets.c.budget_id == any_(_IDS)], columns(entries, rows.ENTRY_COLUMNS))


def _seq_at() -> Executable:
    """The seq that a budget had at a time."""
    return _last_at([budgets.c.budget_id == BUDGET], [entries.c.seq])


def _used_at() -> Executable:
    """What budgets in a window of ids had used by a time, with the effect that says what is disputed."""
    after, until = bindparam("after", type_=ID), bindparam("until", type_=ID)
    return _last_at(
        [budgets.c.budget_id > after, budgets.c.budget_id <= until, in_subtree()],
        [
            entries.c.budget_id,
            entries.c.spent + func.coalesce(entries.c.forfeited, _ZERO),
            entries.c.effect,
        ],
    )


_BY_TOKEN, _BY_HOLDER = (literal_column(f"'{value}'", Text) for value in ("0101", "0102"))
"""How a request begins after its map's head, in hexadecimal: key 1, the authority, and which it is."""

_REBINDING = (Kind.ACCEPT, Kind.RECOVER)


def _authority() -> ColumnElement[str]:
    return func.encode(func.substr(entries.c.request, _TWO, _TWO), literal_column("'hex'"))


def _of_kind(kinds: Sequence[int]) -> ColumnElement[bool]:
    return entries.c.kind.in_([literal_column(str(int(kind))) for kind in kinds])


def _holder_told() -> Executable:
    """Of a budget's entries in a window of seqs the last one that says, or changes, who holds it."""
    group = seq_group(entries.c.seq)
    return (
        select(*columns(entries, rows.ENTRY_COLUMNS))
        .where(
            *_in_window_of_budget(),
            entries.c.request.is_not(None),
            or_(_of_kind(_REBINDING), _authority() == _BY_HOLDER),
        )
        .order_by(group.desc(), entries.c.seq.desc())
        .limit(_ONE)
    )


def _token_steps() -> Executable:
    """Of a budget's entries in a window of seqs those that gave it another token or holder."""
    own_token = and_(
        _authority() == _BY_TOKEN, ~_of_kind([operation.kind for operation in HOLD_OPERATIONS])
    )
    return (
        select(*columns(entries, rows.ENTRY_COLUMNS))
        .where(
            *_in_window_of_budget(),
            or_(
                entries.c.seq == _ONE,
                and_(entries.c.request.is_not(None), or_(_of_kind(_REBINDING), own_token)),
            ),
        )
        .order_by(seq_group(entries.c.seq), entries.c.seq)
        .limit(LIMIT)
    )


def _in_window_of_budget() -> tuple[ColumnElement[bool], ...]:
    seq, group = entries.c.seq, seq_group(entries.c.seq)
    return (
        *in_tree(entries),
        entries.c.budget_id == BUDGET,
        group >= seq_group(AFTER),
        group <= seq_group(UNTIL),
        seq > AFTER,
        seq <= UNTIL,
    )


# -- Lists of entries ---------------------------------------------------------------------------------


def _any_or(parameter: ColumnElement[Any], matches: ColumnElement[bool]) -> ColumnElement[bool]:
    """An empty list selects all."""
    return or_(func.cardinality(parameter) == _ZERO, matches)


def _has_bytes(name: str, value: ColumnElement[Any]) -> ColumnElement[bool]:
    """The value has these bytes somewhere, given in hexadecimal; none selects all."""
    wanted = bindparam(name, type_=Text())
    encoded = func.encode(value, literal_column("'hex'"))
    return or_(wanted == _NOTHING, func.strpos(encoded, wanted) > _ZERO)


def _selected() -> list[ColumnElement[bool]]:
    kinds = bindparam("kinds", type_=ARRAY(SmallInteger))
    principals = bindparam("principals", type_=ARRAY(Text))
    traces = bindparam("traces", type_=ARRAY(LargeBinary))
    among = bindparam("among", type_=ARRAY(ID))
    first = entries.alias("first")
    # That of an operation's part 0, which says what was asked for.
    request = (
        select(first.c.request)
        .where(
            *in_tree(first),
            first.c.operation_id == entries.c.operation_id,
            first.c.part == _ZERO,
        )
        .scalar_subquery()
    )
    return [
        _any_or(kinds, entries.c.kind == any_(kinds)),
        _any_or(principals, entries.c.principal == any_(principals)),
        _any_or(traces, entries.c.trace_id == any_(traces)),
        _any_or(among, entries.c.budget_id == any_(among)),
        entries.c.at >= bindparam("since", type_=TIMESTAMP(timezone=True)),
        entries.c.at < bindparam("before", type_=TIMESTAMP(timezone=True)),
        _has_bytes("effect_bytes", entries.c.effect),
        _has_bytes("request_bytes", func.coalesce(entries.c.request, request)),
    ]


def _budget_entries(*, descending: bool) -> Executable:
    """A budget's entries in a window of seqs, as far as they are selected."""
    order = [seq_group(entries.c.seq), entries.c.seq]
    return (
        chained()
        .where(*_in_window_of_budget(), *_selected())
        .order_by(*(key.desc() if descending else key for key in order))
        .limit(LIMIT)
    )


def _lane_entries(*, subtree: bool, descending: bool) -> Executable:
    """A tree's or subtree's entries in a window of positions, as far as they are selected."""
    position = entries.c.position
    wanted = [*in_tree(entries), *in_positions(), *_selected()]
    if subtree:
        # Not as a join, which the planner would turn around: it is looked up for what is left.
        wanted.append(
            func.coalesce(
                select(in_subtree())
                .where(*in_tree(budgets), budgets.c.budget_id == entries.c.budget_id)
                .scalar_subquery(),
                false(),
            )
        )
    return (
        chained()
        .where(*wanted)
        .order_by(position.desc() if descending else position, entries.c.part)
        .limit(LIMIT)
    )


def _parts() -> Executable:
    """All parts of some operations."""
    return (
        select(*columns(entries, rows.ENTRY_COLUMNS))
        .where(*in_tree(entries), entries.c.operation_id == any_(_IDS))
        .order_by(entries.c.operation_id, entries.c.part)
    )


def _first_parts() -> Executable:
    """Part 0 of some operations."""
    return select(*columns(entries, rows.ENTRY_COLUMNS)).where(
        *in_tree(entries),
        entries.c.operation_id == any_(_IDS),
        entries.c.part == _ZERO,
    )


def _first_entries() -> Executable:
    """The entries of some budgets' making, each with the hash before it: none."""
    return select(*columns(entries, rows.ENTRY_COLUMNS)).where(
        *in_tree(entries),
        entries.c.budget_id == any_(_IDS),
        seq_group(entries.c.seq) == seq_group(_ONE),
        entries.c.seq == _ONE,
    )


def _hold() -> Executable:
    return select(*columns(holds, rows.HOLD_COLUMNS)).where(
        *in_tree(holds), holds.c.hold_id == bindparam("hold_id", type_=ID)
    )


# -- Lists of budgets ---------------------------------------------------------------------------------


def _chosen() -> list[ColumnElement[bool]]:
    holders = bindparam("holders", type_=ARRAY(Text))
    prefix = bindparam("prefix", type_=Text())
    labels = cast(bindparam("labels", type_=Text()), JSONB)
    return [
        _any_or(holders, budgets.c.holder == any_(holders)),
        budgets.c.labels.op("@>", return_type=Boolean())(labels),
        budgets.c.created_at >= bindparam("since", type_=TIMESTAMP(timezone=True)),
        budgets.c.created_at < bindparam("before", type_=TIMESTAMP(timezone=True)),
        func.cardinality(budgets.c.ancestors) <= bindparam("depth", type_=BigInteger),
        func.substr(budgets.c.name, _ONE, func.char_length(prefix)) == prefix,
    ]


_AMONG_ROOTS = bindparam("among", type_=ARRAY(ID))


def _window_of_budgets() -> Executable:
    """The last id of a window of a tree's budgets."""
    return (
        select(budgets.c.budget_id)
        .where(*in_tree(budgets), budgets.c.budget_id > bindparam("after", type_=ID))
        .order_by(budgets.c.budget_id)
        .offset(_SKIPPED)
        .limit(_ONE)
    )


def _budgets() -> Executable:
    """The top, if it is named, and what is below it in a window of ids, as far as it is selected."""
    after, until = bindparam("after", type_=ID), bindparam("until", type_=ID)
    chosen = select(*columns(budgets, rows.BUDGET_COLUMNS)).where(*in_tree(budgets), *_chosen())
    top = chosen.where(budgets.c.budget_id == bindparam("top_id", type_=ID))
    below = (
        chosen.where(
            any_(budgets.c.ancestors) == BUDGET,
            budgets.c.budget_id > after,
            budgets.c.budget_id <= until,
        )
        .order_by(budgets.c.budget_id)
        .limit(LIMIT)
        .subquery("below")
    )
    listed = union_all(top, select(below)).subquery("listed")
    return (
        select(*columns(listed, rows.BUDGET_COLUMNS))
        .order_by(listed.c.budget_id != BUDGET, listed.c.budget_id)
        .limit(LIMIT)
    )


def _window_of_roots() -> Executable:
    """The last name of a window of roots."""
    return (
        select(roots.c.name)
        .where(roots.c.name > bindparam("after", type_=Text()))
        .order_by(roots.c.name)
        .offset(_SKIPPED)
        .limit(_ONE)
    )


def _roots() -> Executable:
    """Roots in a window of names, as far as they are selected."""
    name = roots.c.name
    return (
        select(*columns(budgets, rows.BUDGET_COLUMNS))
        .select_from(roots)
        .join(
            budgets,
            (budgets.c.lane == roots.c.lane)
            & (budgets.c.root_id == roots.c.root_id)
            & (budgets.c.budget_id == roots.c.root_id),
        )
        .where(
            name > bindparam("after", type_=Text()),
            name <= bindparam("until", type_=Text()),
            _any_or(_AMONG_ROOTS, roots.c.root_id == any_(_AMONG_ROOTS)),
            *_chosen(),
        )
        .order_by(name)
        .limit(LIMIT)
    )


def _to_first_entry(row: Sequence[Any]) -> Entry:
    return rows.to_entry(row, previous_hash=GENESIS)


def _to_totals(row: Sequence[Any]) -> tuple[Any, ...]:
    return rows.to_budget(row[:-4]), *row[-4:]


RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "with_totals": (_with_totals(), _to_totals),
    "line_at": (_line_at(), rows.to_entry),
    "seq_at": (_seq_at(), first),
    "used_at": (_used_at(), tuple),
    "holder_told": (_holder_told(), rows.to_entry),
    "token_steps": (_token_steps(), rows.to_entry),
    "budget_entries": (_budget_entries(descending=False), to_chained_entry),
    "budget_entries_descending": (_budget_entries(descending=True), to_chained_entry),
    "tree_entries": (_lane_entries(subtree=False, descending=False), to_chained_entry),
    "tree_entries_descending": (_lane_entries(subtree=False, descending=True), to_chained_entry),
    "subtree_entries": (_lane_entries(subtree=True, descending=False), to_chained_entry),
    "subtree_entries_descending": (
        _lane_entries(subtree=True, descending=True),
        to_chained_entry,
    ),
    "parts": (_parts(), rows.to_entry),
    "first_parts": (_first_parts(), rows.to_entry),
    "first_entries": (_first_entries(), _to_first_entry),
    "hold": (_hold(), rows.to_hold),
    "window_of_budgets": (_window_of_budgets(), first),
    "budgets": (_budgets(), rows.to_budget),
    "window_of_roots": (_window_of_roots(), first),
    "roots": (_roots(), rows.to_budget),
}

_PLANNED: dict[str, str] = {
    # For the parameters that are there: the lane's partition alone, and no filter that selects all.
    "plan_cache_mode": "force_custom_plan",
    # Everything is looked up by a key or in a window of keys. While a table has grown since it was
    # analyzed, the planner would rather read all of it.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
BY_INDEX: Statement = compiled(
    "audit_by_index",
    select(
        *(
            func.set_config(literal_column(f"'{name}'"), literal_column(f"'{value}'"), true())
            for name, value in _PLANNED.items()
        )
    ),
)
"""How PostgreSQL plans what follows in the same transaction."""

STATEMENTS: dict[str, Statement] = {
    name: compiled(f"audit_{name}", executable, row) for name, (executable, row) in RECIPES.items()
}
