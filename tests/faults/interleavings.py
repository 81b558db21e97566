"""All interleavings of two transactions, for each pair of operations: as if one had come after the other.

Two writers without the advisory lock, which is an accelerator only. Every order of their statements is
played on real connections, and what came of it has to equal one of the two serial orders as the pure core
decides them: answers, budgets, holds and entries, to the last hash, since both are decided with the
times that the database told.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg

from peculium_server.core.batch import Request, decide_atomic, decide_group
from peculium_server.core.footprint import Footprint
from peculium_server.core.state import Accepted, Budget, Entry, Hold, Tree
from peculium_server.embedded import EmbeddedPostgres
from peculium_server.store import migrate
from peculium_server.store.lane import LanesWriter, LoadedLanes
from peculium_server.store.reads import STATEMENTS
from peculium_server.store.store import Store
from peculium_server.store.wire import Connection, Step
from tests.core.ledger import Answer, Ledger, WholeTree, verify
from tests.faults.pairs import Asked, Pair, Root, World, pairs
from tests.faults.stage import Actor, Stage, SteppedWriter
from tests.faults.tally import Setting, Tally

WORKERS = 3
"""Pairs that are played at once, each in lanes of its own."""

WALKS = 3
"""Orders of each pair that are played, drawn by lot, before any pair is gone through."""

PROBLEMS_MAX = 20
"""After so many there is nothing more to learn."""

_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "deadlock_timeout": "100ms"}
"""Nothing crashes here, and what is examined is the order of statements."""

_IDS_OF_A_WORLD = 10_000


class Rows(NamedTuple):
    """All that is known of a tree."""

    entries: list[Entry]
    budgets: list[Budget]
    holds: list[Hold]


class Found(NamedTuple):
    """What the ledger says after a play, or would say after a serial order."""

    answers: tuple[tuple[Answer, ...], ...]
    """Of each of the two, an answer to each operation."""
    trees: dict[bytes, Rows]
    """By root id."""


@dataclass
class _Role:
    """One of the two, and what became of what it asked."""

    asked: Asked
    answers: list[Answer] = field(default_factory=list)
    now: int = 0
    """The database's clock, as the last decision was told."""


class Orders:
    """The orders of a pair, one after another: at each choice, everything is chosen once."""

    def __init__(self) -> None:
        self._planned: list[int] = []
        self._choices: list[tuple[int, int]] = []

    def choose(self, among: int) -> int:
        """What was planned so far, and from there on the first."""
        number = len(self._choices)
        planned = self._planned[number] if number < len(self._planned) else 0
        chosen = min(planned, among - 1)
        self._choices.append((chosen, among))
        return chosen

    def next(self) -> bool:
        """Plan the next order; False after the last."""
        choices, self._choices = self._choices, []
        while choices and choices[-1][0] + 1 == choices[-1][1]:
            choices.pop()
        self._planned = [chosen for chosen, _ in choices]
        if choices:
            self._planned[-1] += 1
        return bool(choices)


class Theatre:
    """Two lanes of a store, in which plays are played one after another."""

    def __init__(
        self, store: Store, dsn: str, lanes: tuple[int, int], prompter: Connection
    ) -> None:
        self._store = store
        self._dsn = dsn
        self._lanes = lanes
        self._prompter = prompter
        self._builder = LanesWriter(dsn, store._memory)
        self._writers: dict[str, SteppedWriter] = {}
        self._made = itertools.count(secrets.randbelow(2**32) * _IDS_OF_A_WORLD, _IDS_OF_A_WORLD)

    async def close(self) -> None:
        """Close the writers' connections."""
        for writer in (self._builder, *self._writers.values()):
            await writer.close()

    async def play(
        self, pair: Pair, choose: Callable[[int], int], tally: Tally, *, audited: bool
    ) -> None:
        """Play a pair once, in an order that is chosen, and judge what came of it.

        To have it audited too is to hold the auditor to what the comparison says already.
        """
        world = await self._build()
        roles = [_Role(asked) for asked in pair.ask(world)]
        root_ids = sorted({each.root_id for role in roles for each in role.asked})
        positions = await self._positions()
        stage = Stage(self._prompter)
        try:
            await self._perform(stage, world.ledger, roles, choose)
            found = Found(tuple(tuple(role.answers) for role in roles), await self._trees(root_ids))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            tally.wrong_totals += 1
            tally.problems.append(_told(pair, stage, _failure(error)))
            return
        tally.rounds += 1
        tally.operations += len({each.operation_id for role in roles for each in role.asked})
        expected = []
        for order in (roles, roles[::-1]):
            expected.append(self._serial(world.ledger, order, roles, dict(positions), root_ids))
            if expected[-1] == found:
                break
        twice = _consumed_twice(found)
        if twice:
            tally.applied_twice += twice
            tally.problems.append(_told(pair, stage, "a token was consumed twice"))
        if found not in expected:
            tally.wrong_totals += 1
            tally.problems.append(_told(pair, stage, _difference(found, expected)))
            return
        for root_id, rows in found.trees.items() if audited else ():
            finding = verify(rows.entries, rows.budgets, rows.holds, root_id)
            if finding is not None:
                tally.wrong_totals += 1
                tally.problems.append(_told(pair, stage, str(finding)))

    async def _build(self) -> World:
        """New trees, in memory and in the store."""
        built: list[World] = []
        made = next(self._made)
        root_ids = self._root_ids(made + _IDS_OF_A_WORLD // 2)
        placed = [(lane, next(root_ids)) for lane in self._lanes]

        def decide(loaded: LoadedLanes) -> Sequence[Accepted]:
            root, other = (Root(root_id, loaded.positions[lane]) for lane, root_id in placed)
            built[:] = [World(made, loaded.now, root, other, root_ids)]
            return built[0].past

        footprints = {lane: {root_id: Footprint()} for lane, root_id in placed}
        await self._builder.run(footprints, decide, None)
        return built[0]

    def _root_ids(self, made: int) -> Iterator[bytes]:
        """Roots in the theatre's lanes in turn."""
        ids = Ledger()
        ids._made = made
        for lane in itertools.cycle(self._lanes):
            root_id = ids.id()
            while self._store.lane_of(root_id) != lane:
                root_id = ids.id()
            yield root_id

    async def _perform(
        self, stage: Stage, ledger: Ledger, roles: Sequence[_Role], choose: Callable[[int], int]
    ) -> None:
        async with asyncio.TaskGroup() as acting:
            for actor, role in zip(stage.actors, roles, strict=True):
                writer = self._writers.setdefault(
                    actor.name, SteppedWriter(self._dsn, self._store._memory)
                )
                await writer.enter(actor)
                acting.create_task(self._act(writer, actor, ledger, role))
            await stage.direct(choose)

    async def _act(self, writer: SteppedWriter, actor: Actor, ledger: Ledger, role: _Role) -> None:
        """Ask, with the store's own rule for what is repeated."""
        footprints: dict[int, dict[bytes, Footprint]] = {}
        for each in role.asked:
            of_lane = footprints.setdefault(self._store.lane_of(each.root_id), {})
            of_lane.setdefault(each.root_id, Footprint()).add(each)

        def decide(loaded: LoadedLanes) -> Sequence[Accepted]:
            role.now = loaded.now
            role.answers[:], accepted = self._decide(
                loaded.trees, ledger, role.asked, loaded.now, loaded.positions
            )
            return accepted

        try:
            await writer.run(footprints, decide, None)
        finally:
            actor.end()

    def _decide(
        self,
        trees: dict[bytes, Tree],
        ledger: Ledger,
        asked: Asked,
        now: int,
        positions: Mapping[int, int],
    ) -> tuple[list[Answer], list[Accepted]]:
        """As a lane does with a request; by whom it may be expected, the ledger knows."""
        requests = [
            Request(operation, ledger.actor(operation), index)
            for index, operation in enumerate(asked)
        ]
        if asked[0].batch is not None:
            return decide_atomic(trees, requests, now, self._store.lane_of, dict(positions))
        position = positions[self._store.lane_of(asked[0].root_id)]
        return decide_group(trees, requests, now, position)

    def _serial(
        self,
        before: Ledger,
        order: Sequence[_Role],
        roles: Sequence[_Role],
        positions: dict[int, int],
        root_ids: Iterable[bytes],
    ) -> Found:
        """What there would be, had each waited for the one before."""
        ledger = _copy(before)
        answers: dict[int, tuple[Answer, ...]] = {}
        for role in order:
            told, accepted = self._decide(
                ledger.load(role.asked), before, role.asked, role.now, positions
            )
            answers[id(role)] = tuple(told)
            for each in accepted:
                ledger.position = each.entries[0].position - 1
                ledger.commit(each)
                positions[self._store.lane_of(each.operation.root_id)] = ledger.position
        return Found(
            tuple(answers[id(role)] for role in roles),
            {root_id: _rows(ledger, root_id) for root_id in root_ids},
        )

    async def _trees(self, root_ids: Iterable[bytes]) -> dict[bytes, Rows]:
        return {root_id: await self._tree(root_id) for root_id in root_ids}

    async def _tree(self, root_id: bytes) -> Rows:
        key = {"lane": self._store.lane_of(root_id), "root_id": root_id}
        steps = [Step(STATEMENTS[f"all_{kind}"], key) for kind in Rows._fields]
        (flown,) = await self._prompter.fly(steps)
        if isinstance(flown, psycopg.Error):
            raise flown
        entries, budgets, holds = flown
        return Rows(entries, sorted(budgets), sorted(holds))

    async def _positions(self) -> dict[int, int]:
        return {
            lane: row[1]
            for lane in self._lanes
            for row in await self._prompter.fetch(Step(STATEMENTS["standing"], {"lane": lane}))
        }


def _copy(ledger: Ledger) -> Ledger:
    copy = Ledger(eager=ledger.eager, checked=False)
    copy.journal = list(ledger.journal)
    for root_id, tree in ledger.trees.items():
        whole = copy.trees[root_id] = WholeTree(root_id)
        for name, value in vars(tree).items():
            if isinstance(value, dict):
                getattr(whole, name).update(value)
    return copy


def _rows(ledger: Ledger, root_id: bytes) -> Rows:
    tree = ledger.trees.get(root_id) or WholeTree(root_id)
    entries = [
        entry._replace(previous_hash=b"") for entry in ledger.journal if entry.root_id == root_id
    ]
    return Rows(entries, sorted(tree.known_budgets()), sorted(tree.known_holds()))


def _consumed_twice(found: Found) -> int:
    consumed = [
        (root_id, entry.budget_id, entry.consumed)
        for root_id, rows in found.trees.items()
        for entry in rows.entries
        if entry.consumed is not None
    ]
    return len(consumed) - len(set(consumed))


def _difference(found: Found, expected: Sequence[Found]) -> str:
    """In what a play differs from each of the serial orders."""
    told = []
    for name, serial in zip(("A before B", "B before A"), expected, strict=True):
        differing = [
            f"answer to {'AB'[number]}: {answer}, not {other}"
            for number, (answer, other) in enumerate(
                zip(found.answers, serial.answers, strict=True)
            )
            if answer != other
        ]
        for root_id, rows in found.trees.items():
            differing += [
                f"{kind}: {_first_difference(getattr(rows, kind), getattr(others, kind))}"
                for others in (serial.trees[root_id],)
                for kind in Rows._fields
                if getattr(rows, kind) != getattr(others, kind)
            ]
        told.append(f"not as {name}: {'; '.join(differing)}")
    return ". ".join(told)


def _first_difference(rows: Sequence[Any], others: Sequence[Any]) -> str:
    for row, other in zip(rows, others, strict=False):
        if row != other:
            names = [name for name in row._fields if getattr(row, name) != getattr(other, name)]
            return f"a row differs in {', '.join(names)}"
    return f"{len(rows)} rows, not {len(others)}"


def _failure(error: Exception) -> str:
    if isinstance(error, ExceptionGroup):
        return "; ".join(map(_failure, error.exceptions))
    return f"{type(error).__name__}: {error}"


def _told(pair: Pair, stage: Stage, what: str) -> str:
    return f"{pair} [{', '.join(stage.played)}]: {what}"


# -- The campaign's part --------------------------------------------------------------------------------


async def run(setting: Setting) -> Tally:
    """Go through all orders of all pairs, as far as the time goes; of each pair some orders first."""
    data = setting.folder / "interleavings"
    with contextlib.ExitStack() as open_:
        open_.callback(shutil.rmtree, data, ignore_errors=True)
        postgres = await asyncio.to_thread(EmbeddedPostgres.start, data, settings=_NOT_DURABLE)
        open_.enter_context(postgres)
        await asyncio.to_thread(migrate.upgrade, postgres.dsn)
        return await explore(postgres.dsn, setting, list(pairs()))


async def explore(dsn: str, setting: Setting, chosen: Sequence[Pair]) -> Tally:
    """Go through the orders of these pairs on a migrated database of one's own."""
    tally = Tally()
    end = time.monotonic() + setting.seconds
    work = _work(setting, chosen)

    def goes_on() -> bool:
        return time.monotonic() < end and len(tally.problems) < PROBLEMS_MAX

    async with _opened(dsn) as theatres, asyncio.TaskGroup() as working:
        for theatre in theatres:
            working.create_task(_play_all(theatre, work, goes_on, tally))
    return tally


_Play = tuple[Pair, Callable[[int], int] | None]
"""A pair, and who chooses; nobody: all orders."""


def _work(setting: Setting, chosen: Sequence[Pair]) -> Iterator[_Play]:
    chance = setting.random("interleavings")
    in_turn = list(chosen)
    chance.shuffle(in_turn)
    for _ in range(WALKS):
        for pair in in_turn:
            yield pair, chance.randrange
    for pair in in_turn:
        yield pair, None


async def _play_all(
    theatre: Theatre, work: Iterator[_Play], goes_on: Callable[[], bool], tally: Tally
) -> None:
    for pair, choose in work:
        if choose is not None:
            await theatre.play(pair, choose, tally, audited=True)
        else:
            orders = Orders()
            more = True
            while more and goes_on():
                await theatre.play(pair, orders.choose, tally, audited=False)
                more = orders.next()
        if not goes_on():
            return


@contextlib.asynccontextmanager
async def _opened(dsn: str) -> AsyncIterator[list[Theatre]]:
    """A theatre for each worker."""
    async with contextlib.AsyncExitStack() as open_:
        store = await Store.open(dsn, unsafe_settings_allowed=True)
        open_.push_async_callback(store.close)
        theatres = []
        for number in range(WORKERS):
            prompter = await Connection.connect(dsn, autocommit=True)
            await open_.enter_async_context(prompter)
            theatre = Theatre(store, dsn, (number, number + WORKERS), prompter)
            open_.push_async_callback(theatre.close)
            theatres.append(theatre)
        yield theatres
