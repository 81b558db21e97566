"""The one way to change the ledger: a transaction on one lane, or several, that loads, decides and saves.

A transaction is two flights. The first asks for the lanes' advisory locks, begins, loads the rows
that the footprints name, and last reads the lanes' positions and the clock; the second saves, commits
and unlocks. What the second needs to be true of the rows it checks itself, since the commit travels
with it. Several lanes are always taken in ascending order, locks and rows alike.

The advisory lock only keeps writers of one lane from aborting each other. It is had in turn, for a
transaction each, so that several servers share a lane fairly; one that does not get it in time goes
without. Serializable isolation is what keeps the ledger right.

A writer that has been alone on a lane for a while does without the lock, and guesses: a batch whose
rows it remembers is decided without asking, and is a single flight, which the next one may follow
before it lands. The position, which every transaction raises, says whether the memory was right; the lock
whether somebody else has a turn; the unique indexes whether the new is new; the database's clock whether the
time was right. What fails, and whatever would not simply be accepted, is done again in two flights, with
everything loaded.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import psycopg
from opentelemetry.trace import Span
from psycopg.pq import ConnStatus, TransactionStatus

from peculium_server.core.footprint import Footprint
from peculium_server.core.state import Accepted, Tree
from peculium_server.store.connect import Connecting, connect_writer, is_postgres, named
from peculium_server.store.errors import (
    StoreContended,
    StoreUnavailable,
    is_contention,
    is_lost,
    is_starved,
    translate,
)
from peculium_server.store.guess import Guess, GuessedClock
from peculium_server.store.incarnations import Memory
from peculium_server.store.known import Known
from peculium_server.store.load import Loading
from peculium_server.store.save import changes
from peculium_server.store.statements import LOCK_KEYS, of_lane
from peculium_server.store.wire import Connection, Flown, Result, Statement, Step, encode_int8
from peculium_server.telemetry import spans
from peculium_server.telemetry.meters import Meters

ATTEMPTS_MAX = 12
"""Of one transaction, before it is given up as contended."""

IN_DOUBT_SECONDS_MAX = 10.0
"""How long a writer tries to find out what became of a commit, where no deadline says it."""

_BACKOFF_SECONDS_FIRST = 0.002
_BACKOFF_SECONDS_MAX = 0.25

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


def _nobody() -> None:
    """Wants to know."""


@dataclass
class _Run:
    """A batch on its way into the ledger."""

    footprints: Mapping[int, Mapping[bytes, Footprint]]
    """By lane and root id, lanes ascending."""
    decide: Callable[[LoadedLanes], Sequence[Accepted]]
    sent: Callable[[], None] = _nobody
    in_doubt: bool = False
    """A commit was sent, and its answer is missing."""
    tries: bool = False
    """The lanes' rows are written, whatever was decided: it is about whether they can be."""
    attempts: int = 0
    """How often it was tried, those that others have seen counted only."""

    @property
    def operations(self) -> int:
        """How many it has."""
        return sum(
            len(footprint.operations)
            for roots in self.footprints.values()
            for footprint in roots.values()
        )


class _Launched(NamedTuple):
    """A transaction that was sent as a whole, and has not landed yet."""

    connection: Connection
    landing: Coroutine[Any, Any, list[Flown]]
    name: str
    positions: Mapping[int, int]
    """Of the lanes, if it lands well."""
    span: Span | None


class LaneWriter:
    """Commits to one lane, batch by batch; a second `run` waits until the first has sent its commit."""

    def __init__(self, dsn: str, memory: Memory, lane: int, meters: Meters | None = None) -> None:
        self._writer = LanesWriter(dsn, memory, meters)
        self._lane = lane

    async def run(
        self,
        footprints: Mapping[bytes, Footprint],
        decide: Callable[[Loaded], Sequence[Accepted]],
        deadline: float | None,
        sent: Callable[[], None] = _nobody,
    ) -> int:
        """Load what the footprints name, decide, and save what was accepted, as one transaction.

        Args:
            footprints: By root id; all roots belong to this lane.
            decide: As of `LanesWriter.run`.
            deadline: As of `LanesWriter.run`.
            sent: As of `LanesWriter.run`.

        Returns:
            The lane's position afterwards.

        Raises:
            StoreError: As of `LanesWriter.run`.
        """
        lane = self._lane

        def decide_here(loaded: LoadedLanes) -> Sequence[Accepted]:
            return decide(Loaded(loaded.trees, loaded.now, loaded.positions[lane]))

        positions = await self._writer.run({lane: footprints}, decide_here, deadline, sent)
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
    """Commits to any lanes over a connection of its own; as of `LaneWriter`."""

    def __init__(self, dsn: str, memory: Memory, meters: Meters | None = None) -> None:
        self._meters = meters
        self._tracer = spans.tracer()
        self._dsn = dsn
        self._memory = memory
        self._known: defaultdict[int, Known] = defaultdict(Known)
        self._turn = asyncio.Lock()
        self._connecting = Connecting(lambda: connect_writer(self._dsn, memory))
        self._connection: Connection | None = None
        self.starved_at = float("-inf")
        """When the database last lacked the means to save something, on the event loop's clock."""
        self._postgres = False
        self._database = spans.Database("postgresql", named(dsn))
        self._locked: list[int] = []
        """The lanes whose advisory lock was had, ascending."""
        self._committed = 0
        self._replan_at: int | None = None
        self._clock = GuessedClock()
        self._flights = itertools.count(1)
        self._last_flight = ""
        """The name of the flight that was launched last, if it is still in the air."""

    async def run(
        self,
        footprints: Mapping[int, Mapping[bytes, Footprint]],
        decide: Callable[[LoadedLanes], Sequence[Accepted]],
        deadline: float | None,
        sent: Callable[[], None] = _nobody,
    ) -> Mapping[int, int]:
        """Load what the footprints name, decide, and save what was accepted, as one transaction.

        Args:
            footprints: By lane and root id.
            decide: Pure. Called again, with everything loaded anew, if the transaction has to be
                repeated; operations of a run whose commit was in doubt are then found as recorded.
            deadline: On the event loop's clock; None: no other bound than the number of retries.
            sent: Called if and when another run may decide already, though this one is not committed.

        Returns:
            The positions of the lanes afterwards.

        Raises:
            StoreUnavailable: The database could not be reached, or not in time, or was restored; says
                whether something may have been saved.
            StoreContended: Aborted in favour of other writers too often; nothing was saved.
            LedgerCorrupt: Rows contradict each other; nothing was saved.
        """
        run = _Run(dict(sorted(footprints.items())), decide, sent)
        positions = await self._run(run, deadline)
        for lane, position in positions.items():
            self._memory.saw(lane, position)
        return positions

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
            async with asyncio.timeout_at(deadline):
                async with self._turn:
                    launched = self._launch(run)
                    if launched is None:
                        return await self._persist(run)
                run.sent()
                if await self._landed(run, launched):
                    return launched.positions
                async with self._turn:
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
                return await self._attempt(run)
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

    async def _attempt(self, run: _Run) -> Mapping[int, int]:
        """The transaction, once, before the eyes of those who want to know. Raises as `_transact`."""
        span = self._begun(run, guessed=False)
        try:
            return await self._transact(run)
        except psycopg.Error as error:
            self._failed(span, error)
            raise
        finally:
            if span is not None:
                span.end()

    def _begun(self, run: _Run, *, guessed: bool) -> Span | None:
        """The span of an attempt, if somebody will see it."""
        if self._tracer is None or spans.recording() is None:
            return None
        run.attempts += 1
        return spans.transaction(
            self._tracer, self._database, attempt=run.attempts, guessed=guessed
        )

    def _failed(self, span: Span | None, error: psycopg.Error) -> None:
        if self._meters is not None:
            self._meters.retried(error.sqlstate)
        if span is not None:
            spans.fail_transaction(span, error.sqlstate)

    async def _transact(self, run: _Run) -> Mapping[int, int]:
        """The transaction, once.

        Raises:
            psycopg.Error: It failed. `run.in_doubt` says whether it may be committed all the same.
        """
        connection = await self._connected()
        try:
            loadings = await self._load(connection, run)
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
                    statements, before = of_lane(lane), loading.position
                    more, after = changes(statements, by_lane[lane], loading.holds, before)
                    place = {"before": before, "after": after}
                    steps += (Step(statements.save_position, place), *more)
                    positions[lane] = after
            doubted, run.in_doubt = run.in_doubt, bool(steps)
            try:
                await self._end(connection, [*steps, _COMMIT])
            except psycopg.Error as error:
                run.in_doubt = doubted or (bool(steps) and is_lost(error))
                raise
        except BaseException:
            self._forget()
            await self._abandon(connection)
            raise
        run.in_doubt = False
        for lane, loading in loadings.items():
            loading.learn(positions[lane], by_lane[lane])
        return positions

    # -- Guessing -----------------------------------------------------------------------------------

    def _launch(self, run: _Run) -> _Launched | None:
        """Decide by what is remembered, and send the transaction; None if it has to be done with care.

        Nothing is waited for, so that whoever has the turn decides on what those before have left.
        """
        now = self._clock.now()
        guessable = self._postgres and len(run.footprints) == 1
        if self._connection is None or now is None or not guessable or self._plans_are_old:
            return None
        # What is remembered does not say what is refused for a while.
        if self._memory.frozen:
            return None
        ((lane, footprints),) = run.footprints.items()
        known = self._known[lane]
        before = known.position
        if before is None or not known.alone or (guess := Guess.of(footprints, known)) is None:
            return None
        accepted = run.decide(LoadedLanes(guess.trees, now, {lane: before}))
        if len(accepted) < run.operations:
            known.guessed_in_vain()
            return None
        statements = of_lane(lane)
        steps, after = changes(statements, accepted, guess.holds, before)
        own = str(next(self._flights))
        place = {"before": before, "after": after, "previous": self._last_flight, "own": own}
        times = {"at": now, "latest": now + GuessedClock.BEHIND_US_MAX}
        checks = [Step(statements.advance_position, place | times)]
        if guess.unseen:
            root_ids, budget_ids, tokens = zip(*sorted(guess.unseen), strict=True)
            keys = {"root_id": root_ids, "budget_id": budget_ids, "token": tokens}
            checks.append(Step(statements.refuse_seen, keys))
        run.in_doubt = True
        try:
            landing = self._connection.launch([_BEGIN, *checks, *steps, _COMMIT])
        except psycopg.Error:
            self._forget()
            return None
        # As if it had landed: if it does not, nothing that follows it does.
        known.learn(after, (), (), accepted)
        self._committed, self._last_flight = after, own
        span = self._begun(run, guessed=True)
        return _Launched(self._connection, landing, own, {lane: after}, span)

    async def _landed(self, run: _Run, launched: _Launched) -> bool:
        """Wait for what was sent; say whether it is committed. If not, it has to be done with care."""
        connection = launched.connection
        try:
            (flown,) = await launched.landing
            _, [(now, *_)], *_ = _results(flown)
            _check_replicated(connection)
        except psycopg.Error as error:
            run.in_doubt = is_lost(error)
            self._failed(launched.span, error)
            self._forget()
            return False
        except BaseException:
            self._forget()
            raise
        finally:
            if self._last_flight == launched.name:
                self._last_flight = ""
            if launched.span is not None:
                launched.span.end()
        run.in_doubt = False
        self._clock.read(now)
        return True

    def _forget(self) -> None:
        """Remember nothing: it may not be so, or the next connection may be to another machine.

        Of all lanes: a database that takes over may have lost what was committed last.
        """
        for known in self._known.values():
            known.disturbed()
        self._clock.forget()

    # -- With care ----------------------------------------------------------------------------------

    async def _load(self, connection: Connection, run: _Run) -> Mapping[int, Loading]:
        """Take the lanes if they can be had, begin, and load everything."""
        await self._plan_again(connection)
        loadings = {
            lane: Loading(footprints, of_lane(lane), self._known[lane], frozen=self._memory.frozen)
            for lane, footprints in run.footprints.items()
        }
        shared = [lane for lane in loadings if not self._known[lane].alone]
        lanes = shared if self._postgres else []
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
        more = [loading.second() for loading in loadings.values()]
        if any(more):
            (flown,) = await connection.fly(list(chain.from_iterable(more)))
            _take(loadings.values(), more, _results(flown))
        for loading in loadings.values():
            loading.finish()
        self._committed = sum(loading.position for loading in loadings.values())
        self._clock.read(max(loading.now for loading in loadings.values()))
        return loadings

    async def _end(self, connection: Connection, steps: Sequence[Step]) -> None:
        """Send the last statements of the transaction, and give the lanes to the next."""
        flown, *unlocked = await connection.fly(steps, *self._unlocking())
        self._locked = [
            lane
            for lane, unlock in zip(self._locked, unlocked, strict=True)
            if isinstance(unlock, psycopg.Error)
        ]
        _results(flown)
        _check_replicated(connection)

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
        return [[Step(_UNLOCK, {"key": LOCK_KEYS + lane})] for lane in self._locked]

    async def _connected(self) -> Connection:
        """A connection with nothing in the air."""
        if self._connection is not None:
            await self._connection.landed()
            if self._connection.pgconn.transaction_status != TransactionStatus.IDLE:
                await self._abandon(self._connection)
        if self._connection is None:
            self._connection = await self._connecting.connection()
            self._postgres = is_postgres(self._connection)
            system = "postgresql" if self._postgres else "cockroachdb"
            self._database = spans.Database(system, self._connection.info.dbname)
            self._replan_at = None
        return self._connection

    @property
    def _plans_are_old(self) -> bool:
        return self._postgres and (self._replan_at or 0) <= self._committed

    async def _plan_again(self, connection: Connection) -> None:
        if not self._plans_are_old:
            return
        if self._replan_at is not None:
            _results((await connection.fly([_REPLAN]))[0])
        self._replan_at = 2 * self._committed + _REPLAN_FIRST


def _check_replicated(connection: Connection) -> None:
    if connection.unreplicated:
        # Somebody has cancelled the wait: with a new session it is found out again, and waited for.
        connection.pgconn.finish()
        raise psycopg.OperationalError("committed, but maybe not on the synchronous standby")


def _lock(lane: int) -> Step:
    return Step(_LOCK, {"key": LOCK_KEYS + lane})


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
