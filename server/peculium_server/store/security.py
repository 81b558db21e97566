"""Secrets that were shown by another than whose they were: a table beside the ledger that is only added to.

It is no part of the record: a refusal changes nothing in the ledger. Who serves may add to it, and neither
change nor take away what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    Executable,
    SmallInteger,
    any_,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP, insert

from peculium_server.core.operations import Kind
from peculium_server.core.reuse import ReuseKind
from peculium_server.store.clauses import ID, LIMIT, Scope, in_scope, path_of
from peculium_server.store.connect import Readers
from peculium_server.store.reading import reading
from peculium_server.store.refusals import NOBODY, TIME_MAX, TIME_MIN
from peculium_server.store.schema import security_events
from peculium_server.store.statements import compiled, unnested
from peculium_server.store.wire import Statement, Step

_TIME: Final = TIMESTAMP(timezone=True)


class SecurityEvent(NamedTuple):
    """That a secret was shown by another than whose it was, so many times within a minute."""

    at: int
    """When it was noticed first, by the database's clock. Microseconds since the Unix epoch."""
    event_id: bytes
    kind: ReuseKind
    number: int
    root_id: bytes
    """`NOBODY`: there were too many at once to tell which; so of the budget."""
    budget_id: bytes
    principal: str
    """Who has shown it; empty: there were too many at once to tell."""
    operation_id: bytes
    """What they have asked, the first one."""
    consumed_by: str | None
    """Whoever had consumed the token; None, as all that follows about it: nobody, or it is not told."""
    consumed_operation_id: bytes | None
    consumed_kind: Kind | None
    consumed_at: int | None
    holder: str | None
    """Whom the budget was bound to."""
    freeze_id: bytes | None
    """The Freeze that it led to."""


class Listed(NamedTuple):
    """An event, and the budget's path; empty if it is not told which."""

    event: SecurityEvent
    path: str


class Place(NamedTuple):
    """Where an event is among the others."""

    at: int
    event_id: bytes


class Asked(NamedTuple):
    """Whose events are wanted, of which time, and of which kinds."""

    scope: Scope = Scope.LEDGER
    lane: int = 0
    root_id: bytes = NOBODY
    budget_id: bytes = NOBODY
    kinds: Sequence[int] = ()
    """None: any."""
    since: int = TIME_MIN
    before: int = TIME_MAX


# -- Statements -------------------------------------------------------------------------------------

_FIELDS: Final = SecurityEvent._fields
_COLUMNS: Final = ("lane", *_FIELDS)


def _add() -> Executable:
    keys = unnested(**{name: security_events.c[name].type for name in _COLUMNS})
    added = insert(security_events).from_select(
        _COLUMNS, select(*(keys.c[name] for name in _COLUMNS))
    )
    # What was added although its answer was lost is added again.
    return added.on_conflict_do_nothing(index_elements=Place._fields)


def _list(scope: Scope, *, descending: bool) -> Executable:
    place = [security_events.c[name] for name in Place._fields]
    key = tuple_(*place)
    after: Any = tuple_(bindparam("after_at", type_=_TIME), bindparam("after_event", type_=ID))
    kinds = bindparam("kinds", type_=ARRAY(SmallInteger()))
    found = select(*(security_events.c[name] for name in _FIELDS), path_of(security_events)).where(
        key < after if descending else key > after,
        security_events.c.at >= bindparam("since", type_=_TIME),
        security_events.c.at < bindparam("before", type_=_TIME),
        or_(func.cardinality(kinds) == literal_column("0"), security_events.c.kind == any_(kinds)),
        *in_scope(security_events, scope),
    )
    order = [column.desc() if descending else column for column in place]
    return found.order_by(*order).limit(LIMIT)


def _to_listed(row: Sequence[Any]) -> Listed:
    event = SecurityEvent._make(row[: len(_FIELDS)])
    kind = event.consumed_kind
    typed = event._replace(
        kind=ReuseKind(event.kind), consumed_kind=None if kind is None else Kind(kind)
    )
    return Listed(typed, row[len(_FIELDS)] or "")


def _list_name(scope: Scope, *, descending: bool) -> str:
    return f"list_security_events_{scope.value}{'_descending' if descending else ''}"


RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "add_security_events": (_add(), tuple),
    **{
        _list_name(scope, descending=descending): (
            _list(scope, descending=descending),
            _to_listed,
        )
        for scope in Scope
        for descending in (False, True)
    },
}

STATEMENTS: dict[str, Statement] = {
    name: compiled(name, executable, row) for name, (executable, row) in RECIPES.items()
}


class Security:
    """The table."""

    def __init__(self, readers: Readers, lane_of: Callable[[bytes], int]) -> None:
        self._readers = readers
        self._lane_of = lane_of

    async def add(self, events: Sequence[SecurityEvent]) -> None:
        """Add events, all of them or none; those that are there already stay as they are.

        Raises:
            StoreError: It was not done, or it is unknown whether it was.
        """
        values: dict[str, Any] = {
            name: [getattr(event, name) for event in events] for name in _FIELDS
        }
        values["lane"] = [
            0 if event.root_id == NOBODY else self._lane_of(event.root_id) for event in events
        ]
        await self._do("add_security_events", values)

    async def page(
        self, asked: Asked, *, limit: int, after: Place | None, descending: bool
    ) -> list[Listed]:
        """Some of the events, in order of time.

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
            "kinds": list(asked.kinds),
            "since": asked.since,
            "before": asked.before,
            "after_at": start.at,
            "after_event": start.event_id,
            "limit": limit,
        }
        return await self._do(_list_name(asked.scope, descending=descending), values)

    async def _do(self, name: str, values: dict[str, Any]) -> list[Any]:
        async with reading(self._readers) as connection:
            return await connection.fetch(Step(STATEMENTS[name], values))


_FIRST: Final = Place(TIME_MIN, NOBODY)
_LAST: Final = Place(TIME_MAX, b"\xff" * 16)
