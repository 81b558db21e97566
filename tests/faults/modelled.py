"""Model replay: random operations of every kind under faults, and every answer checked.

At least sixteen clients share some trees and have others to themselves. Each copy of a request goes to
a server of its own, with a deadline; an unknown outcome is asked for again by the same id, some requests
are sent twice at once, some again much later. Meanwhile connections on both sides of the servers suffer
whatever `storms` has, and processes are killed now and then. `checks` says what has to be true then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from random import Random

from google.protobuf.message import Message

from peculium._ids import new_id, token_id
from peculium.v1 import ledger_service_pb2 as ledger, types_pb2
from peculium_server.core.lanes import lane_of
from peculium_server.core.operations import After, AtomicBatch, Extend, Operation, Release, Settle
from peculium_server.core.refusals import Refused
from peculium_server.core.state import Hold
from peculium_server.rpc.requests import decode
from tests.faults.checks import (
    Asked,
    Attempt,
    Journal,
    Problem,
    Refusal,
    check,
    leaked,
    overshoot,
    read_journal,
    resolved,
    tallied,
    unswept,
)
from tests.faults.cluster import SERVER, WAIT_SECONDS_MAX, Cluster
from tests.faults.history import History, told
from tests.faults.progress import say
from tests.faults.sending import Answer, Line, Seen, actor_of, batched, now
from tests.faults.storms import storm
from tests.faults.tally import Setting, Tally
from tests.faults.wishes import ALL_KINDS, Purse, Wish, Wisher

CLIENTS = 16
HOT_ROOTS = 3
DEADLINES_SECONDS = (0.5, 2.0, 5.0)
ATTEMPTS_MAX = 12
VERIFY_SECONDS = 600.0
MORE_SECONDS_MAX = 60.0


class Campaign:
    """Clients at work on a cluster, and everything that they were told."""

    def __init__(
        self,
        cluster: Cluster,
        history: History,
        chance: Random,
        *,
        kinds: Mapping[str, int] = ALL_KINDS,
        dry_runs: bool = True,
    ) -> None:
        self.cluster = cluster
        self.history = history
        self.seen = Seen()
        self.asked: list[Asked] = []
        self.shared: list[Purse] = []
        self.copies_chance = 0.05
        """How often a request is sent twice at once."""
        self.shared_chance = 0.4
        """How often a client uses what all share, not what is its own."""
        self.leaked: list[Hold] = []
        """Holds that had to lapse, and did not; known in the end."""
        self.sweep_seconds = SWEEP_SECONDS_MAX
        """How long holds and leases whose time is over may take to end."""
        self._chance = chance
        self._kinds = kinds
        self._dry_runs = dry_runs
        self._stopping = False
        self._late: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lines(self) -> AsyncIterator[list[Line]]:
        """A connection of one's own to each server."""
        async with AsyncExitStack() as open_:
            yield [
                await open_.enter_async_context(Line(node.address, self.seen))
                for node in self.cluster.nodes
            ]

    async def prepare(self, same_lane: bool = False) -> None:
        """Make the trees that all share, before anything goes wrong."""
        wisher = Wisher(self._chance, self.shared, self._kinds)
        async with self.lines() as lines:
            while len(self.shared) < HOT_ROOTS:
                wish = wisher._grant()
                if same_lane and lane_of(wish.purse.root_id, 16) != 3:
                    continue
                wish.request.amount = 10**9  # type: ignore[attr-defined]
                if len(self.shared) < HOT_ROOTS - 1:
                    # Without a token, so that many can use it at once.
                    wish.request.token_id = b""  # type: ignore[attr-defined]
                    wish.request.holder = "dev"  # type: ignore[attr-defined]
                    wish.purse.by_token = False
                    wish.purse.secrets.clear()
                    wish.following = None
                await self._perform(-1, lines, wish)
                self.shared.append(wish.purse)
            for root in list(self.shared):
                made = wisher._delegate(root)
                if made is not None:
                    for child in made.request.children:  # type: ignore[attr-defined]
                        child.amount = 10**6
                        child.ClearField("lease")
                        child.ClearField("lease_latest")
                    await self._perform(-1, lines, made)
                    self.shared += made.made

    async def work(
        self, seconds: float, clients: int = CLIENTS, *, until_cut: bool = False
    ) -> None:
        """Let clients work for a time, and finish what they are at.

        Args:
            seconds: The time.
            clients: How many.
            until_cut: If no connection was cut by then, they go on for up to a minute more.
        """
        async with asyncio.TaskGroup() as working:
            for process in range(clients):
                working.create_task(self._client(process))
            await asyncio.sleep(seconds)
            end = time.monotonic() + MORE_SECONDS_MAX
            while until_cut and not self.cluster.cuts and time.monotonic() < end:
                await asyncio.sleep(0.2)
            self._stopping = True
        # The faults end only after this: also what was sent late may be lost.

    async def finish(self) -> None:
        """Wait for the copies that were sent late."""
        if self._late:
            await asyncio.wait(self._late, timeout=WAIT_SECONDS_MAX)

    async def _client(self, process: int) -> None:
        chance = Random(f"{self._chance.random()} {process}")
        wisher = Wisher(chance, self.shared, self._kinds, dry_runs=self._dry_runs)
        wisher.shared_chance = self.shared_chance
        async with self.lines() as lines:
            while not self._stopping:
                if chance.random() < 0.08:
                    await self._perform_batch(process, lines, wisher, chance)
                else:
                    await self._perform(process, lines, wisher.wish(), chance)

    # -- One operation --------------------------------------------------------------------------------

    async def _perform(
        self, process: int, lines: Sequence[Line], wish: Wish, chance: Random | None = None
    ) -> None:
        chance = chance or self._chance
        operation = _decoded(wish.request)
        asked = Asked(process, operation, actor_of(wish.request))
        self.asked.append(asked)
        self.history.invoke(process, operation.kind.name, told(operation))
        answer = await self._until_known(asked, lines, wish, chance)
        if chance.random() < 0.04:
            self._again_later(asked, wish, chance)
        self._note(process, operation, answer)

    async def _until_known(
        self, asked: Asked, lines: Sequence[Line], wish: Wish, chance: Random
    ) -> Answer:
        """Send the same request again until it is answered, or given up."""
        answer: Answer = None
        for number in range(ATTEMPTS_MAX):
            copies = 2 if chance.random() < self.copies_chance else 1
            # To different servers, so that nobody but the database can know of both.
            sent = [
                self._send(asked, line, wish, chance) for line in chance.sample(list(lines), copies)
            ]
            answers = await asyncio.gather(*sent)
            # Of two copies one may be refused by the other's success, which is the outcome then.
            answer = max(answers, key=_weight)
            if answer is not None or chance.random() < 0.05:
                break
            await asyncio.sleep(chance.uniform(0, 0.1 * (number + 1)))
        wish.answered(answer)
        return answer

    async def _send(self, asked: Asked, line: Line, wish: Wish, chance: Random) -> Answer:
        root_id = asked.operation.root_id
        attempt = Attempt(asked.operation, now(), self.seen.floor(root_id))
        asked.attempts.append(attempt)
        answer = await line.ask(wish.request, chance.choice(DEADLINES_SECONDS))
        attempt.answered_at, attempt.answer = now(), answer
        return answer

    def _again_later(self, asked: Asked, wish: Wish, chance: Random) -> None:
        """Send one more copy, long after its sender forgot about it."""

        async def later() -> None:
            await asyncio.sleep(chance.uniform(0, 3))
            async with Line(chance.choice(self.cluster.nodes).address, self.seen) as line:
                answer = await self._send(asked, line, wish, chance)
            # A refused operation may have won now: its token is live.
            wish.answered(answer)
            self._note(f"late {asked.process}", asked.operation, answer)

        task = asyncio.create_task(later())
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    # -- A batch --------------------------------------------------------------------------------------

    async def _perform_batch(
        self, process: int, lines: Sequence[Line], wisher: Wisher, chance: Random
    ) -> None:
        atomic = chance.random() < 0.4
        wishes = wisher.chain(chance.randint(2, 8))
        if atomic:
            # On another tree, perhaps in another lane.
            wishes += wisher.chain(chance.randint(1, 3), first=len(wishes))
        if not wishes:
            return
        batch = ledger.BatchRequest(operations=[batched(wish.request) for wish in wishes])
        operations = [_decoded(wish.request) for wish in wishes]
        if atomic:
            batch.atomic, batch.operation_id = True, new_id()
            together = AtomicBatch(batch.operation_id, len(wishes))
            operations = [replace(each, batch=together) for each in operations]
        asked = [
            Asked(process, operation, actor_of(wish.request))
            for operation, wish in zip(operations, wishes, strict=True)
        ]
        self.asked += asked
        for each in asked:
            self.history.invoke(process, each.operation.kind.name, told(each.operation))
        answers: list[Answer] = []
        for number in range(ATTEMPTS_MAX):
            answers = await self._send_batch(asked, chance.choice(lines), wishes, batch, chance)
            if None not in answers or chance.random() < 0.05:
                break
            await asyncio.sleep(chance.uniform(0, 0.1 * (number + 1)))
        for each, wish, answer in zip(asked, wishes, answers, strict=True):
            wish.answered(answer)
            self._note(process, each.operation, answer)

    async def _send_batch(
        self,
        asked: Sequence[Asked],
        line: Line,
        wishes: Sequence[Wish],
        batch: ledger.BatchRequest,
        chance: Random,
    ) -> list[Answer]:
        sent_at = now()
        attempts = [
            Attempt(each.operation, sent_at, self.seen.floor(each.operation.root_id))
            for each in asked
        ]
        for each, attempt in zip(asked, attempts, strict=True):
            each.attempts.append(attempt)
        answers = await line.ask_many(batch, chance.choice(DEADLINES_SECONDS))
        answered_at = now()
        if batch.atomic:
            self.seen.failures += _torn(answers)
            for attempt in attempts[1:]:
                attempt.judged = False
            attempts[0].judged = not (
                isinstance(answers[0], Refusal) and answers[0].reason == "BATCH_REFUSED"
            )
        left = _Left()
        for attempt, wish, answer in zip(attempts, wishes, answers, strict=True):
            attempt.operation = left.resolve(attempt.operation)
            attempt.answered_at, attempt.answer = answered_at, answer
            left.note(attempt.operation, wish, answer)
        return answers

    def _note(self, process: int | str, operation: Operation, answer: Answer) -> None:
        f, id_ = operation.kind.name, operation.operation_id.hex()
        match answer:
            case types_pb2.Outcome():
                value = {
                    "seq": answer.seq,
                    "at": answer.ledger.position,
                    "new": not answer.replayed,
                }
                self.history.ok(process, f, {"operation_id": id_, **value})
            case Refusal():
                why = {"reason": answer.reason, "facts": dict(answer.facts)}
                self.history.fail(process, f, {"operation_id": id_, **why})
            case _:
                self.history.info(process, f, {"operation_id": id_})

    # -- The end --------------------------------------------------------------------------------------

    async def examined(self, *, others: bool = False) -> tuple[Journal, list[Problem]]:
        """Heal everything, let the ledger come to rest, and check it: all that is wrong.

        Args:
            others: Whether somebody else has used the ledger too, on trees of their own.
        """
        say(f"  {len(self.asked)} operations asked, {self.cluster.cuts} cuts; healing")
        await self.cluster.heal()
        await self.finish()
        say("  healed; what is due has to be swept")
        found = [Problem("failure", failure) for failure in self.seen.failures]
        swept_at = await self._swept()
        say("  swept; the ledger verifies itself")
        found += await self._verified()
        # Whatever is still under way in a server is finished, or never will be.
        for node in self.cluster.nodes:
            await node.stop()
        await self.cluster.no_backends()
        journal = await read_journal(self.cluster.dsn)
        say(f"  {len(journal.entries)} entries are replayed")
        known = {each.operation.root_id for each in self.asked} if others else None
        found += await asyncio.to_thread(check, journal, self.asked, of=known)
        say("  replayed")
        self.leaked = leaked(journal, swept_at)
        found += [Problem("leaked", f"hold {hold.hold_id.hex()}") for hold in self.leaked]
        found += unswept(journal, swept_at)
        return journal, found

    async def _swept(self) -> int:
        """Wait until nothing is due any more: the time, by the database, until which all had to be done."""
        deadline = time.monotonic() + self.sweep_seconds
        ((due, first),) = await self.cluster.fetch(_DUE)
        now_us = int(first)
        while due and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            ((due, now_us),) = await self.cluster.fetch(_DUE)
        return int(first) if due else int(now_us)

    async def _verified(self) -> list[Problem]:
        async with self.lines() as lines:
            for node, line in [*zip(self.cluster.nodes, lines, strict=True)] * 5:
                # A server with a fault may have noticed that something is wrong, and stopped.
                if not node.running:
                    continue
                verdict = await line.verdict(VERIFY_SECONDS)
                if verdict is not None:
                    return [
                        Problem("verify", f"{each.rule}: {each.detail}")
                        for each in verdict.findings
                    ]
        return [Problem("verify", "the ledger did not verify itself in time")]


SWEEP_SECONDS_MAX = 180.0
"""A sweeper that was refused something looks at it again after a minute."""
_DUE = """
    SELECT (SELECT count(*) FROM holds WHERE state = 1 AND expires_at <= clock.now)
         + (SELECT count(*) FROM budgets WHERE lease_until <= clock.now AND NOT closed)
         + (SELECT count(*) FROM collections),
           (extract(epoch FROM clock.now) * 1000000)::bigint
    FROM (SELECT clock_timestamp() AS now OFFSET 0) AS clock
"""
"""How much is due, and the time."""


class _Left:
    """The tokens that the operations of a batch have left, as their answers say."""

    def __init__(self) -> None:
        self._tokens: list[tuple[bytes | None, dict[bytes, bytes]]] = []

    def resolve(self, operation: Operation) -> Operation:
        """The operation with the token that it presents; chained still if there is none."""
        if not isinstance(operation.authority, After):
            return operation
        of_budget, of_holds = self._tokens[operation.authority.index]
        if isinstance(operation, Settle | Release | Extend):
            return resolved(operation, of_holds.get(operation.hold_id))
        return resolved(operation, of_budget)

    def note(self, operation: Operation, wish: Wish, answer: Answer) -> None:
        """An operation and its answer, in order."""
        done = isinstance(answer, types_pb2.Outcome) and not answer.dry_run
        presented = getattr(operation.authority, "token_id", None)
        of_budget = None if wish.hold is not None else presented
        holds: dict[bytes, bytes] = {}
        if done and wish.following is not None:
            of_budget = token_id(wish.following)
        if done and wish.held is not None:
            holds[wish.held.id] = token_id(wish.held.secrets[0])
        self._tokens.append((of_budget, holds))


def _torn(answers: Sequence[Answer]) -> list[str]:
    """What is wrong with the answers to an atomic batch: all done, or one refused and so the others."""
    refusals = {
        index: answer for index, answer in enumerate(answers) if isinstance(answer, Refusal)
    }
    if not refusals:
        torn = None in answers and any(answer is not None for answer in answers)
        return ["an atomic batch was answered in part"] if torn else []
    own = [index for index, each in refusals.items() if each.reason != "BATCH_REFUSED"]
    if len(refusals) != len(answers) or len(own) != 1:
        return ["an atomic batch was refused in part, or for several reasons"]
    facts = {"index": str(own[0]), "reason": refusals[own[0]].reason}
    others = [each for index, each in refusals.items() if index != own[0]]
    return [] if all(each.facts == facts for each in others) else ["a batch names another refusal"]


def _decoded(request: Message) -> Operation:
    """What the server understands of a request: without any secret."""
    operation = decode(request)
    assert not isinstance(operation, Refused), operation.message
    return operation


def _weight(answer: Answer) -> int:
    return 2 if isinstance(answer, types_pb2.Outcome) else 1 if isinstance(answer, Refusal) else 0


async def run(setting: Setting) -> Tally:
    """Random operations of every kind, under every fault."""
    return await campaign(setting, "modelled", kill_chance=0.08)


async def campaign(
    setting: Setting,
    name: str,
    *,
    kill_chance: float,
    command: Sequence[str] = SERVER,
    stormy: bool = True,
) -> Tally:
    """The campaign on servers that `command` starts; its history is `name`.jsonl."""
    chance = setting.random(name)
    tally = Tally()
    path = setting.folder / f"{name}.jsonl"
    async with Cluster.running(setting.folder / name, chance, command=command) as cluster:
        with History(path, name, setting.seed) as history:
            work = Campaign(cluster, history, chance)
            await work.prepare()
            nemesis = asyncio.create_task(
                storm(cluster, history, setting.random("storm"), kill_chance=kill_chance)
                if stormy
                else asyncio.sleep(0)
            )
            try:
                # Of what befalls the cluster, not everything cuts connections.
                await work.work(setting.seconds, until_cut=stormy)
            finally:
                nemesis.cancel()
                await asyncio.gather(nemesis, return_exceptions=True)
            journal, found = await work.examined()
            if stormy and not cluster.cuts:
                found.append(Problem("calm", "nothing was cut, and nothing proven"))
            tally.add(tallied(found))
            tally.rounds = 1
            tally.operations = len(work.asked)
            tally.kills, tally.cuts = cluster.kills, cluster.cuts
            tally.overshoot = overshoot(journal)
            tally.leaked_holds = len(work.leaked)
    return tally
