"""The open ledger: its lanes' writers, and everything that is read outside of them.

Reads are short transactions of their own; each sees whole operations only. Lists are paged by key:
`after` is the `next` of the page before.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar

import psycopg

from peculium_server.core.lanes import lane_of
from peculium_server.core.limits import DEPTH_MAX
from peculium_server.core.state import Budget, Hold
from peculium_server.store import incarnations, migrate, tail
from peculium_server.store.accounts import Accounts
from peculium_server.store.alerting import Alerting
from peculium_server.store.alerts import STATEMENTS as ALERTS
from peculium_server.store.audit_reads import BY_INDEX
from peculium_server.store.connect import Readers, connect_reader, is_postgres
from peculium_server.store.errors import (
    LedgerCorrupt,
    SettingsUnsafe,
    StoreUnavailable,
    translate,
)
from peculium_server.store.incarnations import Memory
from peculium_server.store.keys import Keys
from peculium_server.store.lane import LanesWriter, LaneWriter
from peculium_server.store.reading import fetch_together, reading
from peculium_server.store.reads import STATEMENTS
from peculium_server.store.refusals import Refusals
from peculium_server.store.seals import Seals
from peculium_server.store.security import Security
from peculium_server.store.snapshot import Snapshot
from peculium_server.store.statements import LEDGER, Ledger
from peculium_server.store.tail import Tail, Within
from peculium_server.store.wire import Connection, Statement, Step
from peculium_server.telemetry.meters import Meters

Row = TypeVar("Row")
Key = TypeVar("Key")

_NIL = bytes(16)
"""Less than every id."""

KEY_READERS = 2
"""Connections of their own for keys, one while nobody makes or ends any: who may call is learnt however many
read the ledger."""

_STARVED_SECONDS = 10.0
"""For so long after the database lacked the means to save something it is not one to rely upon."""


class Found(NamedTuple):
    """Which budget."""

    root_id: bytes
    budget_id: bytes


class Standing(NamedTuple):
    """Where a lane stands, and when that was."""

    now: int
    """The database's clock. Microseconds since the Unix epoch."""
    position: int
    """Operations committed in the lane."""


class Due(NamedTuple):
    """What the ledger itself has to do in a lane, the earliest of each. Microseconds since the epoch."""

    now: int
    """The database's clock."""
    hold: int | None
    """When the time of a live hold is over, perhaps in the future."""
    lease: int | None
    """When the lease of an open budget ends, perhaps in the future."""
    collection: int | None
    """When a budget was closed below which something is still to be collected."""
    collections: int
    """How many such budgets there are."""


class DueHold(NamedTuple):
    """A live hold whose time is over."""

    root_id: bytes
    budget_id: bytes
    hold_id: bytes


class Page(NamedTuple, Generic[Row, Key]):
    """Some rows of a list, and the key to ask for more with; None at the end."""

    rows: tuple[Row, ...]
    next: Key | None


class Store:
    """An open ledger."""

    def __init__(
        self,
        dsn: str,
        readers: Readers,
        key_readers: Readers,
        memory: Memory,
        ledger: Ledger,
        meters: Meters | None = None,
    ) -> None:
        self.incarnation = memory.incarnation
        """16 bytes: another ledger has others, and so has this one once it was restored."""
        self.origin = ledger.incarnation
        """The incarnation that the ledger was made with: it stays, whatever becomes of the ledger."""
        self.lanes = lanes = ledger.lanes
        self.seals = Seals(readers, lanes)
        """Its checkpoints."""
        self.keys = Keys(key_readers)
        """Its API keys."""
        self.refusals = Refusals(readers, self.lane_of)
        """How often budgets were refused what."""
        self.security = Security(readers, self.lane_of)
        """Secrets that were shown by another than whose they were."""
        self.alerting = Alerting(readers, lanes)
        """Its alerts, their rules, and whom they are sent to."""
        self._readers = readers
        self._key_readers = key_readers
        self._memory = memory
        self._writers = [LaneWriter(dsn, memory, lane, meters) for lane in range(lanes)]
        self._lanes_writer = LanesWriter(dsn, memory, meters)
        self._probed = 0
        """The lane that was probed last."""
        self._probed_at: Sequence[int] = ()
        """The positions of all lanes then; empty before the first time."""
        if meters is not None:
            meters.watch_readers(readers.use)

    @classmethod
    async def open(
        cls,
        dsn: str,
        *,
        readers: int = 4,
        unsafe_settings_allowed: bool = False,
        meters: Meters | None = None,
    ) -> Self:
        """Connect to a ledger, and make sure that it can be relied upon.

        Args:
            dsn: Where it is.
            readers: How many connections reads share.
            unsafe_settings_allowed: A database that may forget what it has recorded is accepted.
            meters: Counts what happens, if anybody wants to know.

        Raises:
            StoreUnavailable: No connection to a primary.
            SchemaOutdated: It is at an older schema than this version's.
            ServerOutdated: It is at a schema that this version is too old for.
            SettingsUnsafe: It could lose what it has committed.
        """
        await asyncio.to_thread(migrate.check, dsn)
        try:
            async with await connect_reader(dsn, None) as connection:
                if not unsafe_settings_allowed:
                    await _check_settings(connection)
                (ledger,) = await connection.fetch(Step(LEDGER))
                state = await incarnations.enter(connection, postgres=is_postgres(connection))
        except psycopg.Error as error:
            raise translate(error) from error
        memory = Memory(state.incarnation, ledger.lanes, frozen=state.frozen)
        for lane, position in enumerate(state.positions):
            memory.saw(lane, position)
        return cls(
            dsn,
            Readers(dsn, memory, readers),
            Readers(dsn, memory, KEY_READERS),
            memory,
            ledger,
            meters,
        )

    @property
    def frozen(self) -> bool:
        """Say whether the ledger was restored, and an operator has to say first that it may go on."""
        return self._memory.frozen

    @property
    def restored(self) -> str | None:
        """Why this is of no use any more, and has to be opened again: there is another incarnation."""
        return self._memory.restored

    async def close(self) -> None:
        """Close all connections, those of the writers too."""
        for writer in self._writers:
            await writer.close()
        await self._lanes_writer.close()
        await self._readers.close()
        await self._key_readers.close()

    def lane_of(self, root_id: bytes) -> int:
        """The lane that a root's operations are committed in."""
        return lane_of(root_id, self.lanes)

    def writer(self, lane: int) -> LaneWriter:
        """The writer of a lane; the same one each time."""
        return self._writers[lane]

    def lanes_writer(self) -> LanesWriter:
        """The writer of what concerns several lanes at once; the same one each time."""
        return self._lanes_writer

    async def probe(self) -> None:
        """Read, and commit, as operations do; nothing is changed by it.

        Raises:
            StoreError: Callers would not be served either.
        """
        async with reading(self._readers) as connection:
            state = await incarnations.check(
                connection, self._memory, postgres=is_postgres(connection)
            )
        await self._writers[self._resting(state.positions)].probe()
        # A commit that changes a row in its place finds room where one that adds rows may not.
        since = asyncio.get_running_loop().time() - _STARVED_SECONDS
        starved_at = [writer.starved_at for writer in self._writers]
        if max(*starved_at, self._lanes_writer.starved_at) > since:
            raise StoreUnavailable("the database lacks the means to save what is accepted")

    def _resting(self, positions: Sequence[int]) -> int:
        """A lane to probe: one that nobody commits to, whose operations a probe would be in the way of."""
        still = [lane for lane, seen in enumerate(self._probed_at) if seen == positions[lane]]
        if self._probed not in still:
            # By chance: servers that probe the same lane meet there.
            self._probed = secrets.choice(still or range(self.lanes))
        self._probed_at = positions
        return self._probed

    async def standing(self, lane: int) -> Standing:
        """The clock, and the position that the lane has by now."""
        found = await self._fetch("standing", lane=lane)
        if not found:
            raise LedgerCorrupt(f"lane {lane} has no position")
        return Standing(*found[0])

    async def find(self, path: str) -> Found | None:
        """The budget that a path of names, separated by slashes, leads to."""
        top, *names = path.split("/")
        if len(names) >= DEPTH_MAX:
            return None
        async with reading(self._readers) as connection:
            found = await connection.fetch(Step(STATEMENTS["root_named"], {"name": top}))
            if not found:
                return None
            root_id = budget_id = found[0]
            for name in names:
                key = {
                    "lane": self.lane_of(root_id),
                    "root_id": root_id,
                    "budget_id": budget_id,
                    "name": name,
                }
                found = await connection.fetch(Step(STATEMENTS["child_named"], key))
                if not found:
                    return None
                budget_id = found[0]
        return Found(root_id, budget_id)

    async def budget(self, root_id: bytes, budget_id: bytes) -> tuple[Budget, ...]:
        """A budget and its ancestors, upwards; empty if there is none."""
        return tuple(await self._fetch("ancestry", **self.key(root_id, budget_id)))

    async def budgets(self, root_id: bytes, ids: Sequence[bytes]) -> list[Budget]:
        """Some budgets of a tree, in no order."""
        return await self._fetch("budgets", lane=self.lane_of(root_id), root_id=root_id, ids=ids)

    async def list_holds(
        self,
        root_id: bytes,
        budget_id: bytes,
        *,
        ended: bool = False,
        limit: int,
        after: bytes | None = None,
    ) -> Page[Hold, bytes]:
        """A budget's holds by id: those that can still be settled, or with `ended` all."""
        name = "list_all_holds" if ended else "list_open_holds"
        key = self.key(root_id, budget_id)
        found = await self._fetch(name, **key, after=after or _NIL, limit=limit + 1)
        return _page(found, limit, lambda hold: hold.hold_id)

    async def last_use(self, root_id: bytes, budget_id: bytes) -> int | None:
        """When a token of the budget or of one of its holds was last consumed; None: never."""
        found = await self._fetch("last_use", **self.key(root_id, budget_id))
        return found[0] if found else None

    # -- What was recorded last ------------------------------------------------------------------

    async def positions(self) -> tuple[int, ...]:
        """Where all lanes stand at one instant: so many operations are committed in each, by lane."""
        async with reading(self._readers) as connection:
            found = await connection.fetch(Step(tail.STATEMENTS["positions"]))
        return tail.to_positions(found, self.lanes)

    async def watched(self) -> tuple[int, ...]:
        """Where all lanes stand, and behind these how many alerts there are, of a moment before."""
        async with reading(self._readers) as connection:
            progress, found = await fetch_together(
                connection, Step(ALERTS["progress"]), Step(tail.STATEMENTS["positions"])
            )
        if not progress:
            raise LedgerCorrupt("the row that says how far alerts have come is missing")
        return (*tail.to_positions(found, self.lanes), progress[0].alerts)

    async def tail(self, lane: int, within: Within | None, *, after: int, until: int) -> Tail:
        """The operations of a lane between two positions, the first ones if those are too many.

        Args:
            lane: Which lane.
            within: Whose entries are wanted; None: all.
            after: Behind this position.
            until: Up to this one, which is committed.
        """
        statement, values = tail.tail_of(within)
        values |= {"lane": lane, "after": after, "until": until}
        async with reading(self._readers) as connection:
            found = await connection.fetch(Step(statement, values))
        return await tail.to_tail(found, until)

    async def open_holds(self) -> tuple[int, int]:
        """How many holds are live, and how many have lapsed; of each lane a bounded number is counted."""
        statement = STATEMENTS["open_holds"]
        async with reading(self._readers) as connection:
            steps = [Step(statement, {"lane": lane}) for lane in range(self.lanes)]
            found = await fetch_together(connection, *steps)
        live = sum(row[0] for (row,) in found)
        return live, max(0, sum(row[1] for (row,) in found) - live)

    # -- What the ledger itself has to do ---------------------------------------------------------

    async def due(self) -> list[Due]:
        """What is due, or will be, in each lane."""
        statement = STATEMENTS["earliest_due"]
        async with reading(self._readers) as connection:
            steps = [Step(statement, {"lane": lane}) for lane in range(self.lanes)]
            found = await fetch_together(connection, *steps)
        return [Due(*row) for (row,) in found]

    async def due_holds(self, lane: int, *, limit: int) -> list[DueHold]:
        """Live holds of a lane whose time is over, the earliest first."""
        return [DueHold(*row) for row in await self._fetch("due_holds", lane=lane, limit=limit)]

    async def due_leases(self, lane: int, *, limit: int) -> list[Found]:
        """Open budgets of a lane whose own lease is over, the earliest first."""
        return [Found(*row) for row in await self._fetch("due_leases", lane=lane, limit=limit)]

    async def collections(self, lane: int, *, limit: int) -> list[Found]:
        """Closed budgets of a lane below which something may have to be collected, the earliest first."""
        return [Found(*row) for row in await self._fetch("collections", lane=lane, limit=limit)]

    async def to_collect(self, top: Found, *, limit: int) -> list[bytes]:
        """The ids of some budgets below another one that have something available."""
        return await self._fetch("to_collect", **self.key(*top), limit=limit)

    async def end_collection(self, top: Found) -> None:
        """Take a closed budget off the list. Below it nothing is available, nor ever will be again."""
        await self._fetch("end_collection", **self.key(*top))

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        """The ledger at one instant, for verification."""
        # It takes as long as whoever asked takes to read it.
        async with self._at_one_instant(0, timeout_ms=0) as (connection, standing):
            yield Snapshot(connection, standing.now, self.lanes)

    @contextlib.asynccontextmanager
    async def accounts(self, root_id: bytes, *, seconds_max: float) -> AsyncIterator[Accounts]:
        """All accounts of a tree at one instant, for so long at most."""
        # What is summed up may be much; its caller waits no longer than this.
        timeout_ms = max(1, round(seconds_max * 1000))
        lane = self.lane_of(root_id)
        async with self._at_one_instant(lane, timeout_ms=timeout_ms) as (connection, standing):
            yield Accounts(connection, *standing, self.lanes)

    @contextlib.asynccontextmanager
    async def _at_one_instant(
        self, lane: int, *, timeout_ms: int
    ) -> AsyncIterator[tuple[Connection, Standing]]:
        """A connection that sees the ledger as it is now, and where a lane stands."""
        async with reading(self._readers) as connection:
            await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            await connection.execute(f"SET LOCAL statement_timeout = {timeout_ms:d}")
            found = await connection.fetch(Step(STATEMENTS["standing"], {"lane": lane}))
            if not found:
                raise LedgerCorrupt(f"lane {lane} has no position")
            yield connection, Standing(*found[0])
            await connection.execute("COMMIT")

    def key(self, root_id: bytes, budget_id: bytes) -> dict[str, Any]:
        """The parameters that name a budget."""
        return {"lane": self.lane_of(root_id), "root_id": root_id, "budget_id": budget_id}

    async def fetch(self, statement: Statement, **values: Any) -> list[Any]:
        """The rows of one statement that looks keys up, a transaction of its own."""
        async with reading(self._readers) as connection:
            steps = [Step(statement, values)]
            if is_postgres(connection):
                steps.insert(0, Step(BY_INDEX))
            return (await fetch_together(connection, *steps))[-1]

    async def _fetch(self, name: str, **values: Any) -> list[Any]:
        async with reading(self._readers) as connection:
            return await connection.fetch(Step(STATEMENTS[name], values))


def _page(found: list[Row], limit: int, key: Callable[[Row], Key]) -> Page[Row, Key]:
    """A page of what was asked for with one row more, which tells whether there is another page."""
    rows = tuple(found[:limit])
    return Page(rows, key(rows[-1]) if len(found) > limit else None)


async def _check_settings(connection: Connection) -> None:
    """Refuse settings with which a crash could lose or tear what was committed."""
    if not is_postgres(connection):
        return
    cursor = await connection.execute(
        "SELECT name, setting FROM pg_settings WHERE setting = 'off'"
        " AND name IN ('fsync', 'full_page_writes', 'synchronous_commit')"
    )
    unsafe: dict[str, str] = dict(await cursor.fetchall())
    if unsafe:
        raise SettingsUnsafe(unsafe)
