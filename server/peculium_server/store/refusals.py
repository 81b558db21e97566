"""How often budgets were refused what, by minute: a bounded table beside the ledger.

It is no part of the record: refusals change nothing, and write nothing when they happen. What was counted in
memory is added up here now and then, and forgotten after some days.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Executable,
    SmallInteger,
    Text,
    any_,
    bindparam,
    delete,
    func,
    literal_column,
    or_,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP, insert

from peculium_server.store.clauses import ID, LIMIT, Scope, in_scope, path_of
from peculium_server.store.connect import Readers
from peculium_server.store.reading import reading
from peculium_server.store.schema import refusals
from peculium_server.store.statements import CLOCK, compiled, unnested
from peculium_server.store.wire import Statement, Step

NOBODY: Final = bytes(16)
"""In place of the root and the budget: of how many that was is not told."""

_TIME: Final = TIMESTAMP(timezone=True)
_KEY: Final = ("minute", "root_id", "budget_id", "reason")
_COLUMNS: Final = ("lane", *_KEY, "number")


class Key(NamedTuple):
    """What refusals are counted by."""

    minute: int
    """When it began, by the database's clock. Microseconds since the Unix epoch."""
    root_id: bytes
    budget_id: bytes
    reason: str


class Counted(NamedTuple):
    """How often a budget was refused something within a minute."""

    key: Key
    number: int
    path: str
    """Empty if there is no such budget."""


# -- Statements -------------------------------------------------------------------------------------


def _now() -> Executable:
    return select(CLOCK)


def _add() -> Executable:
    keys = unnested(
        lane=SmallInteger(),
        minute=_TIME,
        root_id=ID,
        budget_id=ID,
        reason=Text(),
        number=BigInteger(),
    )
    added = insert(refusals).from_select(_COLUMNS, select(*(keys.c[name] for name in _COLUMNS)))
    number = refusals.c.number + added.excluded.number
    return added.on_conflict_do_update(index_elements=_KEY, set_={"number": number})


def _forget() -> Executable:
    return delete(refusals).where(refusals.c.minute < bindparam("before", type_=_TIME))


def _list(scope: Scope, *, descending: bool) -> Executable:
    columns = [refusals.c[name] for name in _KEY]
    key = tuple_(*columns)
    after: Any = tuple_(
        bindparam("minute", type_=_TIME),
        bindparam("after_root", type_=ID),
        bindparam("after_budget", type_=ID),
        bindparam("after_reason", type_=Text()),
    )
    reasons = bindparam("reasons", type_=ARRAY(Text()))
    found = select(*columns, refusals.c.number, path_of(refusals)).where(
        key < after if descending else key > after,
        refusals.c.minute >= bindparam("since", type_=_TIME),
        refusals.c.minute < bindparam("before", type_=_TIME),
        or_(func.cardinality(reasons) == literal_column("0"), refusals.c.reason == any_(reasons)),
        *in_scope(refusals, scope),
    )
    order = [column.desc() if descending else column for column in columns]
    return found.order_by(*order).limit(LIMIT)


def _to_counted(row: Sequence[Any]) -> Counted:
    return Counted(Key._make(row[:4]), row[4], row[5] or "")


def _list_name(scope: Scope, *, descending: bool) -> str:
    return f"list_refusals_{scope.value}{'_descending' if descending else ''}"


RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "refusals_now": (_now(), lambda row: row[0]),
    "add_refusals": (_add(), tuple),
    "forget_refusals": (_forget(), tuple),
    **{
        _list_name(scope, descending=descending): (
            _list(scope, descending=descending),
            _to_counted,
        )
        for scope in Scope
        for descending in (False, True)
    },
}

STATEMENTS: dict[str, Statement] = {
    name: compiled(name, executable, row) for name, (executable, row) in RECIPES.items()
}


class Asked(NamedTuple):
    """Whose refusals are wanted, of which minutes, and for what."""

    scope: Scope = Scope.LEDGER
    lane: int = 0
    root_id: bytes = NOBODY
    budget_id: bytes = NOBODY
    reasons: Sequence[str] = ()
    """None: any."""
    since: int = -(2**62)
    before: int = 2**62


class Refusals:
    """The table."""

    def __init__(self, readers: Readers, lane_of: Callable[[bytes], int]) -> None:
        self._readers = readers
        self._lane_of = lane_of

    async def now(self) -> int:
        """The database's clock. Microseconds since the Unix epoch.

        Raises:
            StoreError: The database does not say.
        """
        [now] = await self._do("refusals_now", {})
        return int(now)

    async def add(self, counts: Sequence[tuple[Key, int]]) -> None:
        """Add counts to what is there, all of them or none.

        Raises:
            StoreError: It was not done, or it is unknown whether it was.
        """
        # In one order, so that of two servers one waits for the other.
        ordered = sorted(counts)
        keys = [key for key, _ in ordered]
        values = {name: [getattr(key, name) for key in keys] for name in _KEY}
        values["lane"] = [
            0 if key.root_id == NOBODY else self._lane_of(key.root_id) for key in keys
        ]
        values["number"] = [number for _, number in ordered]
        await self._do("add_refusals", values)

    async def forget(self, before: int) -> None:
        """Delete what is older.

        Raises:
            StoreError: It was not done.
        """
        await self._do("forget_refusals", {"before": before})

    async def page(
        self, asked: Asked, *, limit: int, after: Key | None, descending: bool
    ) -> list[Counted]:
        """Some of what was counted, in order of minutes.

        Args:
            asked: What is wanted.
            limit: At most so many.
            after: Behind this one; None: from the beginning.
            descending: The latest first.

        Raises:
            StoreError: The database does not say.
        """
        start = after or (_LAST if descending else _FIRST)
        values = {
            "lane": asked.lane,
            "root_id": asked.root_id,
            "budget_id": asked.budget_id,
            "reasons": list(asked.reasons),
            "since": max(asked.since, TIME_MIN),
            "before": min(asked.before, TIME_MAX),
            "minute": start.minute,
            "after_root": start.root_id,
            "after_budget": start.budget_id,
            "after_reason": start.reason,
            "limit": limit,
        }
        return await self._do(_list_name(asked.scope, descending=descending), values)

    async def _do(self, name: str, values: dict[str, Any]) -> list[Any]:
        async with reading(self._readers) as connection:
            return await connection.fetch(Step(STATEMENTS[name], values))


TIME_MIN: Final = -62_135_596_800_000_000
"""The beginning of the year 1, in microseconds of the Unix epoch; 9999 ends before the other one."""
TIME_MAX: Final = 253_402_300_800_000_000
_FIRST: Final = Key(TIME_MIN, NOBODY, NOBODY, "")
_LAST: Final = Key(TIME_MAX, b"\xff" * 16, b"\xff" * 16, "")
