"""What auditors sum up: the statement of an account, and what was booked in a period.

Everything is asked of one snapshot. The database adds up, so that no entry of a statement travels;
bookings come in portions.

An account is a budget alone, or a budget with everything below it, seen as one. Of the latter, what it
was granted, its overrun and what was advanced to it are those of its top; what its budgets have
delegated to each other is inside of it and does not count; all else is the sum. So the money equation
holds of it as of a budget, and no money is counted twice.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple
from uuid import UUID

from psycopg import AsyncRawCursor, AsyncRawServerCursor
from sqlalchemy import (
    ColumnElement,
    Executable,
    Select,
    and_,
    any_,
    bindparam,
    case,
    distinct,
    func,
    literal_column,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP

from peculium_server.core.lanes import lane_of
from peculium_server.core.operations import Kind
from peculium_server.core.selection import Period
from peculium_server.core.state import Balances
from peculium_server.core.times import FIRST, LAST, moment
from peculium_server.core.usage import Booking, Level
from peculium_server.store.clauses import BUDGET, ID, in_subtree, in_tree, of_subtree
from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.rows import to_effect
from peculium_server.store.schema import SPARSE, budgets, entries
from peculium_server.store.statements import compiled
from peculium_server.store.wire import Connection, Statement, Step

_PORTION_ROWS: Final = 500
"""Rows that are fetched at once, so that memory stays bounded."""

BOOKING_KINDS: Final = (Kind.SETTLE, Kind.RELEASE, Kind.SPEND, Kind.RESOLVE, Kind.LAPSE)
"""Nothing else changes what is spent or forfeited, and these do only in the budget that they name."""

_OF_TOP: Final = ("granted", "overrun", "advanced")
"""Balances of a subtree that are those of its top."""
_INSIDE: Final = "delegated"
"""The balance that a subtree seen as one does not have."""


class Account(NamedTuple):
    """What is summed up."""

    root_id: bytes
    budget_id: bytes
    subtree: bool
    """Everything below the budget too."""


class Movement(NamedTuple):
    """What the operations of one kind have moved."""

    kind: Kind
    operations: int
    entries: int
    changes: Balances


class Totals(NamedTuple):
    """An account in a period. Sums may be beyond what a balance may be."""

    opening: Balances
    movements: tuple[Movement, ...]
    """By kind; only kinds of which there is an entry."""
    closing: Balances
    disputed: int
    """Of the account, at the closing."""
    budgets: int
    """How many there were at the closing."""
    first: int | None
    """When the account's first entry was decided; None if there is none before the period's end."""
    last: int | None
    """When the last one before the period's end was decided."""


# -- Statements ---------------------------------------------------------------------------------------

_IDS = bindparam("budget_ids", type_=ARRAY(ID))
_SINCE = bindparam("since", type_=TIMESTAMP(timezone=True))
_UNTIL = bindparam("until", type_=TIMESTAMP(timezone=True))
_ZERO: ColumnElement[int] = literal_column("0")


def _of_next(value: ColumnElement[Any]) -> ColumnElement[Any]:
    """What the budget's next entry has."""
    return func.lead(value).over(partition_by=entries.c.budget_id, order_by=entries.c.seq)


def _of_previous(value: ColumnElement[Any]) -> ColumnElement[Any]:
    """What the budget's entry before has."""
    return func.lag(value).over(partition_by=entries.c.budget_id, order_by=entries.c.seq)


def _concerned(*, subtree: bool) -> tuple[ColumnElement[bool], ...]:
    """Which entries are of the account."""
    of_account = of_subtree() if subtree else entries.c.budget_id == BUDGET
    return (*in_tree(entries), of_account)


def _balance(name: str, *, subtree: bool) -> ColumnElement[int]:
    """What an entry's balance counts in the account."""
    if subtree and name == _INSIDE:
        return _ZERO
    column: ColumnElement[int] = entries.c[name]
    value = func.coalesce(column, _ZERO) if name in SPARSE else column
    if subtree and name in _OF_TOP:
        return case((entries.c.budget_id == BUDGET, value), else_=_ZERO)
    return value


def _totals(*, subtree: bool) -> Executable:
    """By kind of operation: what moved, and what was last before the period and before its end."""
    names = Balances._fields
    balances = {name: _balance(name, subtree=subtree) for name in names}
    history = (
        select(
            entries.c.kind,
            entries.c.position,
            entries.c.at,
            _of_next(entries.c.at).label("next_at"),
            *(balance.label(name) for name, balance in balances.items()),
            *(
                (balance - func.coalesce(_of_previous(balance), _ZERO)).label(f"by_{name}")
                for name, balance in balances.items()
            ),
        )
        .where(*_concerned(subtree=subtree), entries.c.at < _UNTIL)
        .subquery("history")
    )
    last = history.c.next_at.is_(None)
    opens = and_(history.c.at < _SINCE, or_(last, history.c.next_at >= _SINCE))
    moves = history.c.at >= _SINCE
    return (
        select(
            history.c.kind,
            func.count(distinct(history.c.position)).filter(moves),
            func.count().filter(moves),
            func.count().filter(last),
            func.min(history.c.at),
            func.max(history.c.at),
            *(func.sum(history.c[name]).filter(opens) for name in names),
            *(func.sum(history.c[f"by_{name}"]).filter(moves) for name in names),
            *(func.sum(history.c[name]).filter(last) for name in names),
        )
        .group_by(history.c.kind)
        .order_by(history.c.kind)
    )


def _disputed_still(*, subtree: bool) -> Executable:
    """What is disputed in those budgets of which nothing was decided since."""
    of_account = in_subtree() if subtree else budgets.c.budget_id == BUDGET
    return select(func.sum(budgets.c.disputed)).where(
        *in_tree(budgets),
        of_account,
        budgets.c.last_at < _UNTIL,
    )


def _changed_since(*, subtree: bool) -> Executable:
    """Of the other budgets, the last effect before the period's end."""
    later = select(budgets.c.budget_id).where(*in_tree(budgets), budgets.c.last_at >= _UNTIL)
    history = (
        select(
            entries.c.budget_id,
            entries.c.effect,
            _of_next(entries.c.seq).label("next_seq"),
        )
        .where(
            *_concerned(subtree=subtree),
            entries.c.at < _UNTIL,
            entries.c.budget_id.in_(later),
        )
        .subquery("history")
    )
    return select(history.c.budget_id, history.c.effect).where(history.c.next_seq.is_(None))


def _bookings(*, subtree: bool) -> Select[Any]:
    kinds: list[ColumnElement[int]] = [literal_column(str(int(kind))) for kind in BOOKING_KINDS]
    return select(*(entries.c[name] for name in Booking._fields)).where(
        *_concerned(subtree=subtree),
        entries.c.at >= _SINCE,
        entries.c.at < _UNTIL,
        entries.c.part == _ZERO,
        entries.c.kind.in_(kinds),
    )


def _lines() -> Executable:
    """Of each budget its levels, from itself up to the root."""
    level = budgets.alias("level")
    line = func.array_append(budgets.c.ancestors, budgets.c.budget_id)
    return (
        select(budgets.c.budget_id, level.c.name, level.c.labels)
        .select_from(budgets)
        .join(
            level,
            and_(
                *in_tree(level),
                level.c.budget_id == any_(line),
            ),
        )
        .where(*in_tree(budgets), budgets.c.budget_id == any_(_IDS))
        .order_by(budgets.c.budget_id, func.cardinality(level.c.ancestors).desc())
    )


_KIND: Final = {int(kind): kind for kind in Kind}


def _to_booking(row: Sequence[Any]) -> Booking:
    budget_id, kind, *rest = row
    return Booking(budget_id, _KIND[kind], *rest)


_OF_ACCOUNT: Final[dict[str, tuple[Callable[..., Executable], Callable[[Sequence[Any]], Any]]]] = {
    "totals": (_totals, tuple),
    "disputed_still": (_disputed_still, tuple),
    "changed_since": (_changed_since, tuple),
    "bookings": (_bookings, _to_booking),
}
_REACHES: Final = {False: "budget", True: "subtree"}
RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    f"{name}_of_{reach}": (build(subtree=subtree), row)
    for name, (build, row) in _OF_ACCOUNT.items()
    for subtree, reach in _REACHES.items()
} | {"lines": (_lines(), tuple)}

STATEMENTS: dict[str, Statement] = {
    name: compiled(name, executable, row) for name, (executable, row) in RECIPES.items()
}


# -- Reading ------------------------------------------------------------------------------------------


class Accounts:
    """All accounts at one instant, however long they are read."""

    def __init__(self, connection: Connection, now: int, position: int, lanes: int) -> None:
        self.now = now
        """The database's clock when the snapshot was taken. Microseconds since the Unix epoch."""
        self.position = position
        """Operations committed by then in the lane that was asked for."""
        self._connection = connection
        self._lanes = lanes

    async def totals(self, account: Account, period: Period) -> Totals:
        """Sum an account up."""
        rows = await self._all("totals", account, period)
        movements = tuple(
            Movement(_known_kind(kind), operations, entries_, _balances(sums[8:16]))
            for kind, operations, entries_, _, _, _, *sums in rows
            if entries_
        )
        return Totals(
            opening=_added(_balances(row[6:14]) for row in rows),
            movements=movements,
            closing=_added(_balances(row[22:30]) for row in rows),
            disputed=await self._disputed(account, period),
            budgets=sum(row[3] for row in rows),
            first=min((row[4] for row in rows), default=None),
            last=max((row[5] for row in rows), default=None),
        )

    async def bookings(self, account: Account, period: Period) -> AsyncGenerator[list[Booking]]:
        """What was booked in an account, in portions and in no order.

        In between others may be asked; this goes on afterwards.
        """
        async for portion in self._portions("bookings", account, period):
            yield portion

    async def lines(
        self, root_id: bytes, budget_ids: Iterable[bytes]
    ) -> dict[bytes, tuple[Level, ...]]:
        """Of some budgets of a tree the levels above them, from each itself up to the root."""
        key = {"lane": self._lane(root_id), "root_id": root_id, "budget_ids": list(budget_ids)}
        rows = await self._connection.fetch(Step(STATEMENTS["lines"], key))
        return {
            budget_id: tuple(Level(name, labels) for _, name, labels in levels)
            for budget_id, levels in groupby(rows, key=lambda row: row[0])
        }

    async def _disputed(self, account: Account, period: Period) -> int:
        ((still,),) = await self._all("disputed_still", account, period)
        disputed = int(still or 0)
        if period.until is None:
            return disputed
        async for portion in self._portions("changed_since", account, period):
            for budget_id, effect in portion:
                disputed += to_effect(budget_id, effect).disputed
        return disputed

    async def _all(self, name: str, account: Account, period: Period) -> list[Any]:
        """All rows of a statement that may take its time."""
        statement, values = self._asked(name, account, period)
        # Not as a flight, which has to be answered within seconds.
        cursor = AsyncRawCursor(self._connection)
        await cursor.execute(statement.sql, values, binary=True)
        return await cursor.fetchall()

    async def _portions(
        self, name: str, account: Account, period: Period
    ) -> AsyncGenerator[list[Any]]:
        statement, values = self._asked(name, account, period)
        async with AsyncRawServerCursor(self._connection, name) as cursor:
            await cursor.execute(statement.sql, values, binary=True)
            while rows := await cursor.fetchmany(_PORTION_ROWS):
                yield [statement.row(row) for row in rows]

    def _asked(
        self, name: str, account: Account, period: Period
    ) -> tuple[Statement, tuple[Any, ...]]:
        values: Mapping[str, Any] = {
            "lane": self._lane(account.root_id),
            "root_id": UUID(bytes=account.root_id),
            "budget_id": UUID(bytes=account.budget_id),
            "since": FIRST if period.since is None else moment(period.since),
            "until": LAST if period.until is None else moment(period.until),
        }
        statement = STATEMENTS[f"{name}_of_{_REACHES[account.subtree]}"]
        return statement, tuple(values[parameter] for parameter, _ in statement.parameters)

    def _lane(self, root_id: bytes) -> int:
        return lane_of(root_id, self._lanes)


def _known_kind(number: int) -> Kind:
    try:
        return _KIND[number]
    except KeyError:
        raise LedgerCorrupt(f"an entry is of the unknown kind {number}") from None


def _balances(sums: Sequence[Any]) -> Balances:
    """Sums as the database has them, which may be of nothing."""
    return Balances(*(int(value or 0) for value in sums))


def _added(each: Iterable[Balances]) -> Balances:
    return Balances(*map(sum, zip(Balances(), *each, strict=True)))
