"""Which incarnation of the ledger this is, and whether its database still has what servers were told.

A database that was restored has forgotten operations that were acknowledged: tokens that were consumed
are live again, money that was spent is there again. No row can tell, since all of them are as they were.
So the ledger records the *place* that it is in, which a restore changes, and each server remembers how
far it has seen the ledger get, which a restore takes back:

- the system identifier: another one is another PostgreSQL
- the timeline: PostgreSQL begins another one at the end of each recovery that is no crash's, so when it
  was restored to a point in time, and when a standby was promoted
- the database's oid: another one is a copy within the same PostgreSQL
- the transaction that has written the row: another one has copied it, as a dump's restore does

Whoever finds something else adds a row: the ledger has another incarnation from then on, and is frozen
until an operator has said that it may go on. There is one exception. A standby that is promoted is in
another place and has lost nothing, if commits wait for it; a server that was there before, and finds no
lane behind where it last saw it, records the new place, and goes on.

docs/decisions tells what this finds and what it does not.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import psycopg
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Executable,
    SmallInteger,
    Text,
    bindparam,
    cast,
    func,
    insert,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by

from peculium_server.store.clauses import first
from peculium_server.store.errors import LedgerCorrupt, LedgerRestored, is_contention
from peculium_server.store.schema import incarnations, lanes
from peculium_server.store.statements import compiled
from peculium_server.store.wire import Connection, Statement, Step

MADE: Final = "made"
"""The ledger is new, or a copy in which nothing was recorded."""
MOVED: Final = "moved"
"""A standby has taken over, and has everything that a server had seen."""
NOTICED: Final = "noticed"
"""The database was restored or copied, or is behind what a server had seen."""
CONFIRMED: Final = "confirmed"
"""An operator has said that the ledger may go on."""

FRESH_SECONDS_MAX: Final = 300.0
"""A server that the database has not answered for longer does not vouch for a standby that took over: others
may have seen more. Within this time standbys are promoted."""

_TRIES_MAX: Final = 5

_PLACE: Final = ("system_identifier", "timeline", "database_oid")
_HERE: Final = (
    "(SELECT system_identifier FROM pg_control_system())",
    "('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint",
    "(SELECT oid::bigint FROM pg_database WHERE datname = current_database())",
)
_NOWHERE: Final = ("0", "0", "0")
_WRITTEN_HERE: Final = "incarnations.xmin::text::bigint = incarnations.xid % 4294967296"
"""What is shown of a row's transaction has 32 bits, and stays when the row is frozen."""


def _positions() -> ColumnElement[Any]:
    ordered = func.array_agg(aggregate_order_by(lanes.c.position, lanes.c.lane))
    return select(ordered).scalar_subquery()


def _state(recorded: Sequence[ColumnElement[Any]], found: Sequence[str]) -> Executable:
    """The last row, what it says of the place, and the place that it is in."""
    last = incarnations.c
    told = (last.number, last.event, last.incarnation, last.frozen, last.at, last.reason)
    return (
        select(*told, last.principal, _positions(), *recorded, *map(_literal, (*found, "true")))
        .order_by(last.number.desc())
        .limit(literal_column("1"))
    )


def _add(here: Mapping[str, str]) -> Executable:
    frozen = cast(bindparam("frozen", type_=SmallInteger), SmallInteger)
    values: dict[str, Any] = {
        name: bindparam(name, type_=incarnations.c[name].type)
        for name in ("number", "event", "incarnation")
    }
    values |= {
        name: func.nullif(bindparam(name, type_=Text), literal_column("''"))
        for name in ("reason", "principal")
    }
    values |= {name: _literal(sql) for name, sql in here.items()}
    values |= {"frozen": frozen == literal_column("1"), "positions": _positions()}
    return insert(incarnations).values(values)


def _in_order() -> Executable:
    """The incarnation that the ledger had when it was last in order."""
    row = incarnations.c
    last = row.number.desc()
    return select(row.incarnation).where(~row.frozen).order_by(last).limit(literal_column("1"))


def _literal(sql: str) -> ColumnElement[Any]:
    return literal_column(sql, BigInteger)


def _to_state(row: Sequence[Any]) -> State:
    *told, positions, a, b, c, original, d, e, f, true = row
    recorded, found = Place(a, b, c, original), Place(d, e, f, true)
    return State._make((*told, tuple(positions), recorded, found))


RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "ledger_state": (
        _state(
            [*(incarnations.c[name] for name in _PLACE), _literal(_WRITTEN_HERE)],
            _HERE,
        ),
        _to_state,
    ),
    "ledger_state_anywhere": (_state([*map(_literal, (*_NOWHERE, "true"))], _NOWHERE), _to_state),
    "add_incarnation": (
        _add(
            {**dict(zip(_PLACE, _HERE, strict=True)), "xid": "pg_current_xact_id()::text::bigint"}
        ),
        tuple,
    ),
    "add_incarnation_anywhere": (_add({}), tuple),
    "incarnation_in_order": (_in_order(), first),
}
"""What only PostgreSQL can tell, and the same without."""

STATEMENTS: dict[str, Statement] = {
    name: compiled(name, executable, row) for name, (executable, row) in RECIPES.items()
}


class Place(NamedTuple):
    """Where a ledger is."""

    system_identifier: int
    timeline: int
    database_oid: int
    original: bool
    """The row that says so was written here, and not copied from elsewhere."""

    def differences(self, found: Place) -> list[str]:
        """What is not as it was, for people."""
        said = []
        if found.system_identifier != self.system_identifier:
            said.append(
                f"it is in PostgreSQL {found.system_identifier}, and was in {self.system_identifier}"
            )
        if found.timeline != self.timeline:
            said.append(f"it is on timeline {found.timeline}, and was on {self.timeline}")
        if found.database_oid != self.database_oid:
            said.append(f"its database has oid {found.database_oid}, and had {self.database_oid}")
        if not self.original and found.system_identifier == self.system_identifier:
            said.append("its rows were written anew, as a dump's are")
        return said


class State(NamedTuple):
    """What the database says of the ledger."""

    number: int
    """Of the row that was added last."""
    event: str
    """What that row was added for."""
    incarnation: bytes
    frozen: bool
    """Nothing new may be spent."""
    at: int
    """When the row was added. Microseconds since the Unix epoch."""
    reason: str | None
    principal: str | None
    """Who has confirmed it."""
    positions: tuple[int, ...]
    """Where the lanes stand, which is committed."""
    recorded: Place
    found: Place


class Memory:
    """What one server remembers of its ledger, shared by all of its connections."""

    def __init__(self, incarnation: bytes, lanes: int, *, frozen: bool) -> None:
        self.incarnation = incarnation
        """Of the ledger that was opened: this never changes."""
        self.frozen = frozen
        """Nothing new may be spent, until an operator has said that the ledger may go on."""
        self.restored: str | None = None
        """Why this server is of no use any more: the ledger has another incarnation."""
        self._positions = [0] * lanes
        self._seen_at = time.monotonic()

    @property
    def is_fresh(self) -> bool:
        """Say whether little can have happened since that this server has not seen."""
        return time.monotonic() - self._seen_at < FRESH_SECONDS_MAX

    def positions(self) -> tuple[int, ...]:
        """How far each lane was seen to be."""
        return tuple(self._positions)

    def saw(self, lane: int, position: int) -> None:
        """Remember that so many operations of a lane are committed, as the database has just said."""
        self._seen_at = time.monotonic()
        self._positions[lane] = max(self._positions[lane], position)


async def read_state(connection: Connection, *, postgres: bool) -> State:
    """What the database says of the ledger.

    Raises:
        psycopg.Error: It says nothing.
        LedgerCorrupt: There is no ledger in it.
    """
    name = "ledger_state" if postgres else "ledger_state_anywhere"
    found: list[State] = await connection.fetch(Step(STATEMENTS[name]))
    if not found:
        raise LedgerCorrupt("the ledger has no incarnation")
    return found[0]


async def enter(connection: Connection, *, postgres: bool) -> State:
    """The state of the ledger for a server that opens it and remembers nothing.

    If the ledger is somewhere else than it has recorded, it has another incarnation from now on, and is
    frozen unless nothing was ever recorded in it.

    Raises:
        psycopg.Error: The database does not say, or does not take it.
        LedgerCorrupt: There is no ledger in it.
    """
    for _ in range(_TRIES_MAX):
        state = await read_state(connection, postgres=postgres)
        differences = state.recorded.differences(state.found)
        if not differences:
            return state
        used = any(state.positions)
        await _note(
            connection,
            state,
            NOTICED if used else MADE,
            secrets.token_bytes(16),
            frozen=used,
            reason="; ".join(differences),
            postgres=postgres,
        )
    raise LedgerCorrupt("the ledger's place changes each time that it is looked at")


async def check(connection: Connection, memory: Memory, *, postgres: bool) -> State:
    """Make sure that the database has the ledger that was opened, with all that was seen of it.

    Raises:
        psycopg.Error: It does not say.
        LedgerRestored: It has not. The ledger has another incarnation now, and is frozen.
        LedgerCorrupt: There is no ledger in it.
    """
    for _ in range(_TRIES_MAX):
        # Before it is asked: what is seen meanwhile need not be in the answer.
        seen = memory.positions()
        state = await read_state(connection, postgres=postgres)
        if state.incarnation != memory.incarnation:
            _give_up(memory, state.reason or state.event)
        behind = _behind(seen, state.positions)
        differences = state.recorded.differences(state.found)
        if not differences and not behind:
            for lane, position in enumerate(state.positions):
                memory.saw(lane, position)
            memory.frozen = state.frozen
            return state
        moved = not behind and memory.is_fresh and _is_promotion(state)
        await _note(
            connection,
            state,
            MOVED if moved else NOTICED,
            memory.incarnation if moved else secrets.token_bytes(16),
            frozen=state.frozen if moved else True,
            reason="; ".join([*differences, *behind]),
            postgres=postgres,
        )
    raise LedgerCorrupt("the ledger's place changes each time that it is looked at")


async def confirm(
    connection: Connection,
    *,
    principal: str,
    reason: str,
    nothing_lost: bool,
    postgres: bool,
) -> State:
    """Let a ledger that was restored go on, in the name of an operator.

    Args:
        connection: As the owner of the tables.
        principal: Who says so.
        reason: What happened, and what was done about it.
        nothing_lost: Everything that was ever acknowledged is there: the ledger keeps the incarnation that
            it had before it was noticed to be somewhere else.
        postgres: That the connection is to one.

    Returns:
        The ledger as it is then.

    Raises:
        psycopg.Error: The database does not say, or does not take it.
        LedgerCorrupt: There is no ledger in it.
    """
    for _ in range(_TRIES_MAX):
        state = await read_state(connection, postgres=postgres)
        if nothing_lost:
            incarnation = await _before_noticed(connection, state)
        elif state.frozen and not state.recorded.differences(state.found):
            # It has the incarnation of this restore already.
            incarnation = state.incarnation
        else:
            incarnation = secrets.token_bytes(16)
        if await _note(
            connection,
            state,
            CONFIRMED,
            incarnation,
            frozen=False,
            reason=reason,
            principal=principal,
            postgres=postgres,
        ):
            return await read_state(connection, postgres=postgres)
    raise LedgerCorrupt("the ledger's place changes each time that it is looked at")


def _behind(seen: Sequence[int], positions: Sequence[int]) -> list[str]:
    """Which lanes lack what was seen of them, for people."""
    if len(seen) != len(positions):
        return [f"it has {len(positions)} lanes, and had {len(seen)}"]
    return [
        f"lane {lane} stands at {now}, and stood at {then}"
        for lane, (then, now) in enumerate(zip(seen, positions, strict=True))
        if now < then
    ]


def _is_promotion(state: State) -> bool:
    """Say whether the timeline is all that has changed."""
    return state.found == state.recorded._replace(timeline=state.found.timeline)


def _give_up(memory: Memory, reason: str) -> None:
    memory.restored = reason
    raise LedgerRestored(reason)


async def _before_noticed(connection: Connection, state: State) -> bytes:
    found: list[bytes] = await connection.fetch(Step(STATEMENTS["incarnation_in_order"]))
    return found[0] if found else state.incarnation


async def _note(
    connection: Connection,
    state: State,
    event: str,
    incarnation: bytes,
    *,
    frozen: bool,
    reason: str,
    principal: str = "",
    postgres: bool,
) -> bool:
    """Add a row behind the one that was read; say whether another server was not faster."""
    name = "add_incarnation" if postgres else "add_incarnation_anywhere"
    values = {
        "number": state.number + 1,
        "event": event,
        "incarnation": incarnation,
        "frozen": int(frozen),
        "reason": reason,
        "principal": principal,
    }
    try:
        await connection.fetch(Step(STATEMENTS[name], values))
    except psycopg.Error as error:
        if is_contention(error):
            return False
        raise
    return True
