"""Two writers on a stage: no statement of theirs is sent before its turn.

In the manner of Postgres' isolation tester. A transaction is cut where another one's statements can
come in between: after its snapshot, after what else it loads, after each statement that writes. Where one
has to wait for the other's lock, the other one goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import product

from psycopg import errors

from peculium_server.store import connect, lane
from peculium_server.store.incarnations import Memory
from peculium_server.store.lane import LanesWriter
from peculium_server.store.wire import Connection, Flown, Result, Step

PATIENCE_SECONDS = 60
"""Longer than any statement of a healthy database takes, on a busy machine too."""

_STUCK_AFTER_SECONDS = 0.002
"""Then the database is asked whether a statement waits for a lock."""


class Actor:
    """One of the two writers: at a cut, at work, waiting for the other's lock, or done."""

    def __init__(self, name: str, stage: Stage) -> None:
        self.name = name
        self.pid = 0
        """Of the database's process that serves it."""
        self.cue: asyncio.Future[None] | None = None
        """Waited for before a statement is sent."""
        self.label = ""
        """What is sent next, or was sent last."""
        self.blocked = False
        self.over = False
        """The transaction has ended: with a commit, or aborted in favour of the other."""
        self.attempts = 0
        self._stage = stage

    async def attempt(self) -> None:
        """Begin a transaction. The first one is on the stage; those that repeat it come afterwards."""
        self.attempts += 1
        if self.attempts > 1:
            self.end()
            await self._stage.over()

    async def reach(self, label: str) -> None:
        """Wait for the cue to send what the label names."""
        if self.over:
            return
        self.blocked = False
        self.label = label
        self.cue = asyncio.get_running_loop().create_future()
        self._stage.moved.set()
        await self.cue

    def go(self) -> None:
        """Give the cue."""
        assert self.cue is not None
        self.cue.set_result(None)
        self.cue = None

    def end(self) -> None:
        """The first transaction has ended, whichever way."""
        self.over = True
        self._stage.moved.set()


class Stage:
    """Where two transactions meet, once."""

    def __init__(self, prompter: Connection) -> None:
        self.actors = (Actor("A", self), Actor("B", self))
        self.moved = asyncio.Event()
        self.played: list[str] = []
        """The statements in the order in which they were sent."""
        self._prompter = prompter
        self._over = asyncio.Event()

    async def over(self) -> None:
        """Wait until both first transactions have ended."""
        await self._over.wait()

    async def direct(self, choose: Callable[[int], int]) -> None:
        """Give the cues, until both transactions have ended.

        Args:
            choose: Which of so many actors goes next.

        Raises:
            TimeoutError: Nobody could go on for long.
        """
        while True:
            async with asyncio.timeout(PATIENCE_SECONDS):
                ready = await self._settled()
            if not ready:
                break
            actor = ready[choose(len(ready)) if len(ready) > 1 else 0]
            self.played.append(f"{actor.name} {actor.label}")
            actor.go()
        self._over.set()

    async def _settled(self) -> list[Actor]:
        """Wait until each actor is at a cut, done, or blocked by one that is at a cut: the first of these."""
        while True:
            self.moved.clear()
            on_stage = [actor for actor in self.actors if not actor.over]
            ready = [actor for actor in on_stage if actor.cue is not None]
            working = [actor for actor in on_stage if actor.cue is None]
            if not working or (ready and all(actor.blocked for actor in working)):
                return ready
            try:
                async with asyncio.timeout(_STUCK_AFTER_SECONDS):
                    await self.moved.wait()
            except TimeoutError:
                await self._look(working, ready)

    async def _look(self, working: Sequence[Actor], ready: Sequence[Actor]) -> None:
        """Ask the database whether who is at work waits for the other, who is at a cut."""
        for actor, other in product(working, ready):
            cursor = await self._prompter.execute("SELECT pg_blocking_pids(%s)", [actor.pid])
            [(pids,)] = await cursor.fetchall()
            # By now it may have gone on all the same.
            actor.blocked = other.pid in pids and actor.cue is None


class SteppedConnection(Connection):
    """A connection that sends nothing before it has its cue."""

    actor: Actor | None = None

    async def fly(self, *segments: Sequence[Step]) -> list[Flown]:
        """As `Connection.fly`, a cut at a time: what a segment's failed statement ends is not sent."""
        if self.actor is None:
            return await super().fly(*segments)
        return [await self._stepwise(self.actor, segment) for segment in segments]

    async def _stepwise(self, actor: Actor, segment: Sequence[Step]) -> Flown:
        results: list[Result] = []
        for label, steps in _cuts(segment):
            if label == "rollback":
                (flown,) = await super().fly(steps)
                return flown
            if label == "snapshot":
                await actor.attempt()
            await actor.reach(label)
            (flown,) = await super().fly(steps)
            if isinstance(flown, errors.Error):
                return flown
            results += flown
        return results


def _cuts(segment: Sequence[Step]) -> Iterator[tuple[str, Sequence[Step]]]:
    """What is sent at once. The first load takes the snapshot that all others see."""
    if not segment:
        # After a commit that was refused there is nothing to roll back.
        return
    if segment[0] is lane._BEGIN:
        yield "snapshot", segment
    elif segment[0].statement.name.startswith(b"load"):
        yield "load more", segment
    else:
        for step in segment:
            yield step.statement.name.decode().rstrip("0123456789_"), [step]


class SteppedWriter(LanesWriter):
    """A writer that takes no lane's advisory lock, on a stage."""

    def __init__(self, dsn: str, memory: Memory) -> None:
        super().__init__(dsn, memory)
        self.actor: Actor | None = None

    async def enter(self, actor: Actor) -> None:
        """Play the next run as this actor."""
        self.actor = actor
        await self._connected()

    async def _connected(self) -> Connection:
        if self._connection is None:
            connection = await SteppedConnection.connect(
                connect.conninfo(self._dsn), autocommit=True
            )
            settings = {**connect._WRITER_SETTINGS, **connect._WRITER_SETTINGS_POSTGRES}
            # It waits as long as the other one is kept waiting for its cue.
            for timeout in ("lock_timeout", "statement_timeout"):
                settings[timeout] = f"{PATIENCE_SECONDS}s"
            del settings["idle_in_transaction_session_timeout"]
            await connection.execute(connect._settings_as_sql(settings))
            self._connection = connection
        assert isinstance(self._connection, SteppedConnection)
        self._connection.actor = self.actor
        if self.actor is not None:
            self.actor.pid = self._connection.info.backend_pid
        return self._connection
