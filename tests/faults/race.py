"""One-token storm: many clients race for the same token through connections that are cut.

Each has an operation of its own, and asks again with the same id until it knows. Exactly one of them
may have had an effect, and every other one is told by whom the token was consumed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from random import Random

from google.protobuf.message import Message

from peculium._ids import id_text, new_id, new_secret, token_id
from peculium.v1 import ledger_service_pb2 as ledger, types_pb2
from tests.faults.checks import Asked, Attempt, Problem, Refusal, check, read_journal, tallied
from tests.faults.cluster import WAIT_SECONDS_MAX, Cluster
from tests.faults.history import History, told
from tests.faults.modelled import _decoded
from tests.faults.sending import Answer, Line, Seen, actor_of, now
from tests.faults.storms import CUTS, _commit_cut, storm
from tests.faults.tally import Setting, Tally
from tests.system.wire import Held, grant_of

CLIENTS = 16
GRANTED = 1_000


class Storm:
    """Clients that race for one token after another, and what they were told."""

    def __init__(self, cluster: Cluster, history: History, chance: Random) -> None:
        self.asked: list[Asked] = []
        self.seen = Seen()
        self.problems: list[Problem] = []
        self._cluster = cluster
        self._history = history
        self._chance = chance

    async def rounds(self, seconds: float) -> int:
        """Race for one token after another: for how many."""
        done = 0
        deadline = time.monotonic() + seconds
        async with AsyncExitStack() as open_:
            lines = [
                [
                    await open_.enter_async_context(Line(node.address, self.seen))
                    for node in self._cluster.nodes
                ]
                for _ in range(CLIENTS)
            ]
            while done == 0 or time.monotonic() < deadline:
                await self._round(lines)
                done += 1
        return done

    async def examined(self) -> list[Problem]:
        """Heal everything, let the ledger come to rest, and check it: all that is wrong."""
        await self._cluster.heal()
        for node in self._cluster.nodes:
            await node.stop()
        await self._cluster.no_backends()
        journal = await read_journal(self._cluster.dsn)
        return [
            *self.problems,
            *(Problem("failure", failure) for failure in self.seen.failures),
            *await asyncio.to_thread(check, journal, self.asked),
        ]

    async def _round(self, lines: Sequence[Sequence[Line]]) -> None:
        held = Held(new_id(), b"")
        held.budget_id = held.root_id
        grant = grant_of(f"root-{held.root_id.hex()}", GRANTED, secret=held.secret)
        grant.header.root_id = grant.header.budget_id = held.root_id
        await self._until_known(0, lines[0], grant)
        answers = await asyncio.gather(
            *(
                self._until_known(process, own, self._taking(held))
                for process, own in enumerate(lines)
            )
        )
        winners = [answer for answer in answers if isinstance(answer, types_pb2.Outcome)]
        if len(winners) != 1:
            twice = "token twice" if winners else "lost"
            self.problems.append(
                Problem(
                    twice, f"{len(winners)} of {CLIENTS} took the token of {held.root_id.hex()}"
                )
            )
            return
        winner = id_text(winners[0].operation_id)
        for answer in answers:
            if isinstance(answer, Refusal) and (
                answer.reason != "TOKEN_CONSUMED" or answer.facts["consumed_by"] != winner
            ):
                self.problems.append(
                    Problem("refusal", f"{answer} was told, and {winner} took the token")
                )

    def _taking(self, held: Held) -> Message:
        """One of the operations that consume the token."""
        head, following = held.header(), token_id(new_secret())
        match self._chance.randrange(3):
            case 0:
                return ledger.SpendRequest(header=head, amount=1, next_token_id=following)
            case 1:
                return ledger.ReserveRequest(
                    header=head,
                    amount=1,
                    next_token_id=following,
                    hold_id=new_id(),
                    hold_token_id=token_id(new_secret()),
                )
            case _:
                child = types_pb2.ChildSpec(
                    budget_id=new_id(), name="child", amount=1, token_id=token_id(new_secret())
                )
                return ledger.DelegateRequest(
                    header=head, next_token_id=following, children=[child]
                )

    async def _until_known(self, process: int, lines: Sequence[Line], request: Message) -> Answer:
        operation = _decoded(request)
        asked = Asked(process, operation, actor_of(request))
        self.asked.append(asked)
        self._history.invoke(process, operation.kind.name, told(operation))
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        answer: Answer = None
        while answer is None and time.monotonic() < deadline:
            attempt = Attempt(operation, now(), self.seen.floor(operation.root_id))
            asked.attempts.append(attempt)
            line = self._chance.choice(lines)
            answer = await line.ask(request, self._chance.choice((1.0, 3.0)))
            attempt.answered_at, attempt.answer = now(), answer
            if answer is None:
                await asyncio.sleep(self._chance.uniform(0, 0.2))
        end = {"operation_id": operation.operation_id.hex()}
        if isinstance(answer, types_pb2.Outcome):
            self._history.ok(process, operation.kind.name, end)
        elif isinstance(answer, Refusal):
            self._history.fail(process, operation.kind.name, end | {"reason": answer.reason})
        else:
            self._history.info(process, operation.kind.name, end)
            self.problems.append(Problem("lost", f"{asked} never got an answer"))
        return answer


async def run(setting: Setting) -> Tally:
    """Exactly one of many takes a token, whatever is cut."""
    chance = setting.random("race")
    faults = (CUTS, (*CUTS, *[_commit_cut] * 6))
    async with Cluster.running(setting.folder / "race", chance) as cluster:
        with History(setting.folder / "race.jsonl", "race", setting.seed) as history:
            racing = Storm(cluster, history, chance)
            nemesis = asyncio.create_task(
                storm(
                    cluster,
                    history,
                    setting.random("storm"),
                    faults=faults,
                    calm_seconds=0.1,
                    bad_seconds=0.8,
                )
            )
            try:
                rounds = await racing.rounds(setting.seconds)
            finally:
                nemesis.cancel()
                await asyncio.gather(nemesis, return_exceptions=True)
            found = await racing.examined()
    tally = tallied(found)
    tally.rounds = rounds
    tally.operations = len(racing.asked)
    tally.kills, tally.cuts = cluster.kills, cluster.cuts
    return tally
