"""The one way to change the ledger: a transaction on one lane, or several, that loads, decides and saves.

A transaction is two flights. The first asks for the lanes' advisory locks, begins, loads the rows
that the footprints name, and last reads the lanes' positions and the clock; the second saves, commits
and unlocks. What the second needs to be true of the rows it checks itself, since the commit travels
with it. Several lanes are always taken in ascending order, locks and rows alike.

The advisory lock only keeps writers of one lane from aborting each other. It is had in turn, for a
transaction each, so that several servers share a lane fairly; one that does not get it in time goes
without. Serializable isolation is what keeps the ledger right.

A writer that has been alone on a lane for a while does without the lock, and guesses: rows that it
remembers are not loaded, and what is to be made is taken for new. The position, which every
transaction raises, says whether the memory was right; the unique indexes say whether the new is new.
Whatever would not simply be accepted is decided again with everything loaded.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import psycopg
from psycopg.pq import ConnStatus, TransactionStatus

from peculium_server.core.footprint import Footprint
from peculium_server.core.state import Accepted, Tree
from peculium_server.store.connect import Connecting, connect_writer, is_postgres
from peculium_server.store.errors import (
    StoreContended,
    StoreUnavailable,
    is_contention,
    is_lost,
    is_starved,
    translate,
)
from peculium_server.store.known import Known
from peculium_server.store.load import Loading
from peculium_server.store.save import changes
from peculium_server.store.statements import of_lane
from peculium_server.store.wire import Connection, Flown, Result, Statement, Step, encode_int8

ATTEMPTS_MAX = 12
"""Of one transaction, before it is given up as contended."""

IN_DOUBT_SECONDS_MAX = 10.0
"""How long a writer tries to find out what became of a commit, where no deadline says it."""

_BACKOFF_SECONDS_FIRST = 0.002
_BACKOFF_SECONDS_MAX = 0.25

_LOCK_KEYS = 0x7065636C << 32
"""Tells the lanes' advisory locks from those of others in the same database."""

_LOCK = Statement(b"lock", b"SELECT pg_advisory_lock($1)", (("key", encode_int8),))
_UNLOCK = Statement(b"unlock", b"SELECT pg_advisory_unlock($1)", (("key", encode_int8),))
_BEGIN = Step(Statement(b"begin", b"BEGIN ISOLATION LEVEL SERIALIZABLE"))
_COMMIT = Step(Statement(b"commit", b"COMMIT"))
_ROLLBACK = Step(Statement(b"rollback", b"ROLLBACK"))
_REPLAN = Step(Statement(b"replan", b"DISCARD PLANS"))

_REPLAN_FIRST = 64
"""Plans are made once, and made again when the lane has grown by this, and to twice its size: for a
nearly empty table the planner takes any index for as good as the right one."""


class Loaded(NamedTuple):
    """What the ledger knows of the rows that were named, at one instant."""

    trees: dict[bytes, Tree]
    """By root id: one for each footprint."""
    now: int
    """The database's clock, read after everything else. Microseconds since the Unix epoch."""
    position: int
    """Operations committed in the lane so far."""


class LoadedLanes(NamedTuple):
    """As `Loaded`, of several lanes."""

    trees: dict[bytes, Tree]
    """By root id: one for each footprint."""
    now: int
    """The database's clock, read after everything else. Microseconds since the Unix epoch."""
    positions: Mapping[int, int]
    """Operations committed so far, by lane."""


@dataclass
class _Run:
    """A batch on its way into the ledger."""

    footprints: Mapping[int, Mapping[bytes, Footprint]]
    """By lane and root id, lanes ascending."""
    decide: Callable[[LoadedLanes], Sequence[Accepted]]
    in_doubt: bool = False
    """A commit was sent, and its answer is missing."""
    tries: bool = False
    """The lanes' rows are written, whatever was decided: it is about whether they can be."""

    @property
    def operations(self) -> int:
        """How many it has."""
        return sum(
            len(footprint.operations)
            for roots in self.footprints.values()
            for footprint in roots.values()
        )


class LaneWriter:
    """Commits to one lane, a batch at a time; a second `run` waits for the first."""

    def __init__(self, dsn: str, incarnation: bytes, lane: int) -> None:
        self._writer = LanesWriter(dsn, incarnation)
        self._lane = lane

    async def run(
        self,
        footprints: Mapping[bytes, Footprint],
        decide: Callable[[Loaded], Sequence[Accepted]],
        deadline: float | None,
    ) -> int:
        """Load what the footprints name, decide, and save what was accepted, as one transaction.

        Args:
            footprints: By root id; all roots belong to this lane.
            decide: As of `LanesWriter.run`.
            deadline: As of `LanesWriter.run`.

        Returns:
            The lane's position afterwards.

        Raises:
            StoreError: As of `LanesWriter.run`.
        """
        lane = self._lane

        def decide_here(loaded: LoadedLanes) -> Sequence[Accepted]:
            return decide(Loaded(loaded.trees, loaded.now, loaded.positions[lane]))

        positions = await self._writer.run({lane: footprints}, decide_here, deadline)
        return positions[lane]

    @property
    def starved_at(self) -> float:
        """When the database last lacked the means to save something, on the event loop's clock."""
        return self._writer.starved_at

    async def probe(self) -> None:
        """Commit without changing anything, to find out whether that is possible.

        Raises:
            StoreError: As of `LanesWriter.probe`.
        """
        await self._writer.probe(self._lane)

    async def close(self) -> None:
        """Close the connection, after the run that uses it."""
        await self._writer.close()


class LanesWriter:
    """Commits to any lanes over a connection of its own; a second `run` waits for the first."""

    def __init__(self, dsn: str, incarnation: bytes) -> None:
        self._dsn = dsn
        self._incarnation = incarnation
        self._known: defaultdict[int, Known] = defaultdict(Known)
        self._turn = asyncio.Lock()
        self._connecting = Connecting(lambda: connect_writer(self._dsn, self._incarnation))
        self._connection: Connection | None = None
        self.starved_at = float("-inf")
        """When the database last lacked the means to save something, on the event loop's clock."""
        self._postgres = False
        self._locked: list[int] = []
        """The lanes whose advisory lock was had, ascending."""
        self._committed = 0
        self._replan_at: int | None = None

    async def run(
        self,
        footprints: Mapping[int, Mapping[bytes, Footprint]],
        decide: Callable[[LoadedLanes], Sequence[Accepted]],
        deadline: float | None,
    ) -> Mapping[int, int]:
        """Load what the footprints name, decide, and save what was accepted, as one transaction.

        Args:
            footprints: By lane and root id.
            decide: Pure. Called again, with everything loaded anew, if the transaction has to be
                repeated; operations of a run whose commit was in doubt are then found as recorded.
            deadline: On the event loop's clock; None: no other bound than the number of retries.

        Returns:
            The positions of the lanes afterwards.

        Raises:
            StoreUnavailable: The database could not be reached, or not in time; says whether
                something may have been saved.
            StoreContended: Aborted in favour of other writers too often; nothing was saved.
            LedgerCorrupt: Rows contradict each other; nothing was saved.
        """
        return await self._run(_Run(dict(sorted(footprints.items())), decide), deadline)

    async def probe(self, lane: int) -> None:
        """Commit to a lane without changing anything, to find out whether that is possible.

        Raises:
            StoreUnavailable: It is not.
            StoreContended: As of `run`.
            LedgerCorrupt: As of `run`.
        """
        await self._run(_Run({lane: {}}, lambda _: (), tries=True), None)

    async def close(self) -> None:
        """Close the connection, after the run that uses it."""
        async with self._turn:
            await self._connecting.close()
            if self._connection is not None:
                await self._connection.close()
                self._connection = None

    async def _run(self, run: _Run, deadline: float | None) -> Mapping[int, int]:
        try:
            async with asyncio.timeout_at(deadline), self._turn:
                return await self._persist(run)
        except TimeoutError:
            raise StoreUnavailable(
                "the database did not answer in time", outcome_unknown=run.in_doubt
            ) from None

    async def _persist(self, run: _Run) -> Mapping[int, int]:
        """Repeat the transaction as often as that can help."""
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + IN_DOUBT_SECONDS_MAX
        contended = lost = 0
        while True:
            fresh = self._connection is None
            try:
                return await self._transact(run)
            except psycopg.Error as error:
                if is_contention(error):
                    contended += 1
                    if contended == ATTEMPTS_MAX and not run.in_doubt:
                        raise StoreContended(contended) from error
                elif is_lost(error):
                    lost += 1
                    # A connection may have been dead for long, so another one is tried. A commit in
                    # doubt is worth more patience.
                    if not run.in_doubt and (fresh or lost > 1):
                        raise translate(error) from error
                else:
                    if is_starved(error):
                        self.starved_at = clock()
                    # Whatever it is, a new session may be without it: prepared statements that a
                    # change of the schema has spoilt, or a database that became read-only.
                    self._drop()
                    raise translate(error, outcome_unknown=run.in_doubt) from error
                if run.in_doubt and clock() > give_up_at:
                    raise translate(error, outcome_unknown=True) from error
            if contended or run.in_doubt:
                await asyncio.sleep(_backoff(contended + lost))

    async def _transact(self, run: _Run) -> Mapping[int, int]:
        """The transaction, once.

        Raises:
            psycopg.Error: It failed. `run.in_doubt` says whether it may be committed all the same.
        """
        connection = await self._connected()
        try:
            loadings = await self._load(connection, run)
            accepted = run.decide(_together(loadings))
            if len(accepted) < run.operations and any(each.guessed for each in loadings.values()):
                for lane in loadings:
                    self._known[lane].guessed_in_vain()
                loadings = await self._load_all(connection, run)
                accepted = run.decide(_together(loadings))
            by_lane = _by_lane(run.footprints, accepted)
            positions = {lane: loading.position for lane, loading in loadings.items()}
            steps: list[Step] = []
            # The positions are written even if nothing else is. In doubt: an earlier commit that is
            # still on its way is then either waited for or defeated, and never overtaken. For what is
            # told to be recorded: a primary that has crashed shows commits that its synchronous
            # standby may not have; it has them when it has this one.
            if accepted or run.in_doubt or run.tries or _recorded(loadings):
                for lane, loading in loadings.items():
                    more, positions[lane] = changes(
                        of_lane(lane), by_lane[lane], loading.holds, loading.position
                    )
                    steps += more
            doubted, run.in_doubt = run.in_doubt, bool(steps)
            try:
                await self._end(connection, [*steps, _COMMIT])
            except psycopg.Error as error:
                run.in_doubt = doubted or (bool(steps) and is_lost(error))
                raise
        except BaseException:
            # Of all lanes: the next connection may be to a database that has lost what was committed last.
            for known in self._known.values():
                known.disturbed()
            await self._abandon(connection)
            raise
        run.in_doubt = False
        for lane, loading in loadings.items():
            loading.learn(positions[lane], by_lane[lane])
        return positions

    async def _load(self, connection: Connection, run: _Run) -> Mapping[int, Loading]:
        """Take the lanes if they can be had, begin, and load everything that is not guessed."""
        await self._plan_again(connection)
        alone = {lane: self._known[lane].alone for lane in run.footprints}
        loadings = self._loadings(run, alone)
        lanes = [lane for lane in loadings if not alone[lane]] if self._postgres else []
        first = [loading.first() for loading in loadings.values()]
        *locks, flown = await connection.fly(
            *([_lock(lane)] for lane in lanes), [_BEGIN, *chain.from_iterable(first)]
        )
        for lane, lock in zip(lanes, locks, strict=True):
            if not isinstance(lock, psycopg.Error):
                self._locked.append(lane)
            elif not is_contention(lock):
                raise lock
        _, *results = _results(flown)
        _take(loadings.values(), first, results)
        if any(loading.wrong for loading in loadings.values()):
            return await self._load_all(connection, run)
        return await self._load_more(connection, loadings)

    async def _load_all(self, connection: Connection, run: _Run) -> Mapping[int, Loading]:
        """Load everything, in the transaction that has begun."""
        loadings = self._loadings(run, dict.fromkeys(run.footprints, False))
        first = [loading.first() for loading in loadings.values()]
        (flown,) = await connection.fly(list(chain.from_iterable(first)))
        _take(loadings.values(), first, _results(flown))
        return await self._load_more(connection, loadings)

    async def _load_more(
        self, connection: Connection, loadings: Mapping[int, Loading]
    ) -> Mapping[int, Loading]:
        """Load what turned out to be needed, too."""
        more = [loading.second() for loading in loadings.values()]
        if any(more):
            (flown,) = await connection.fly(list(chain.from_iterable(more)))
            _take(loadings.values(), more, _results(flown))
        for loading in loadings.values():
            loading.finish()
        self._committed = sum(loading.position for loading in loadings.values())
        return loadings

    def _loadings(self, run: _Run, guessing: Mapping[int, bool]) -> dict[int, Loading]:
        return {
            lane: Loading(footprints, of_lane(lane), self._known[lane], guessing=guessing[lane])
            for lane, footprints in run.footprints.items()
        }

    async def _end(self, connection: Connection, steps: Sequence[Step]) -> None:
        """Send the last statements of the transaction, and give the lanes to the next."""
        flown, *unlocked = await connection.fly(steps, *self._unlocking())
        self._locked = [
            lane
            for lane, unlock in zip(self._locked, unlocked, strict=True)
            if isinstance(unlock, psycopg.Error)
        ]
        _results(flown)
        if connection.unreplicated:
            # Somebody has cancelled the wait: with a new session it is found out again, and waited for.
            connection.pgconn.finish()
            raise psycopg.OperationalError("committed, but maybe not on the synchronous standby")

    async def _abandon(self, connection: Connection) -> None:
        """Leave a transaction that failed, or the connection if it cannot be left."""
        if connection.pgconn.status == ConnStatus.OK:
            idle = connection.pgconn.transaction_status == TransactionStatus.IDLE
            try:
                await connection.fly([] if idle else [_ROLLBACK], *self._unlocking())
            except psycopg.Error:
                connection.pgconn.finish()
        self._locked = []
        if connection.pgconn.status != ConnStatus.OK:
            self._connection = None

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.pgconn.finish()
            self._connection = None

    def _unlocking(self) -> list[list[Step]]:
        return [[Step(_UNLOCK, {"key": _LOCK_KEYS | lane})] for lane in self._locked]

    async def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = await self._connecting.connection()
            self._postgres = is_postgres(self._connection)
            self._replan_at = None
        return self._connection

    async def _plan_again(self, connection: Connection) -> None:
        if not self._postgres or (self._replan_at or 0) > self._committed:
            return
        if self._replan_at is not None:
            _results((await connection.fly([_REPLAN]))[0])
        self._replan_at = 2 * self._committed + _REPLAN_FIRST


def _lock(lane: int) -> Step:
    return Step(_LOCK, {"key": _LOCK_KEYS | lane})


def _together(loadings: Mapping[int, Loading]) -> LoadedLanes:
    """What was loaded of all lanes."""
    trees: dict[bytes, Tree] = {}
    for loading in loadings.values():
        trees |= loading.trees
    now = max(loading.now for loading in loadings.values())
    return LoadedLanes(trees, now, {lane: each.position for lane, each in loadings.items()})


def _recorded(loadings: Mapping[int, Loading]) -> bool:
    """Say whether an operation that is asked for is in the ledger already."""
    return any(
        any(tree.recorded.values())
        for loading in loadings.values()
        for tree in loading.trees.values()
    )


def _by_lane(
    footprints: Mapping[int, Mapping[bytes, Footprint]], accepted: Sequence[Accepted]
) -> dict[int, Sequence[Accepted]]:
    """What was accepted in each lane, in order."""
    if len(footprints) == 1:
        return dict.fromkeys(footprints, accepted)
    lane_of = {root_id: lane for lane, roots in footprints.items() for root_id in roots}
    by_lane: dict[int, list[Accepted]] = {lane: [] for lane in footprints}
    for one in accepted:
        by_lane[lane_of[one.operation.root_id]].append(one)
    return dict(by_lane)


def _take(
    loadings: Iterable[Loading], asked: Sequence[Sequence[Step]], results: Sequence[Result]
) -> None:
    """Give each lane's loading the results of what it has asked."""
    left = iter(results)
    for loading, steps in zip(loadings, asked, strict=True):
        loading.take(list(islice(left, len(steps))))


def _results(flown: Flown) -> list[Result]:
    if isinstance(flown, psycopg.Error):
        raise flown
    return flown


def _backoff(attempt: int) -> float:
    """Seconds to wait before another attempt: longer each time, and never two writers' the same."""
    longest = min(_BACKOFF_SECONDS_MAX, _BACKOFF_SECONDS_FIRST * (1 << attempt))
    return longest * (0.5 + secrets.randbelow(1024) / 2048)
