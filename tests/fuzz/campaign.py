"""Asks a server whatever can be asked, and compares its answers with its books.

Calls are asked for in blocks, several at once. After each block every budget is compared with what it was, what
was answered and what is recorded: what was refused has changed nothing, and nothing else has either.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from uuid import UUID

import grpc
import psutil
import psycopg
from google.protobuf.message import Message

from peculium.v1 import (
    admin_service_pb2 as admin,
    audit_service_pb2 as audit,
    ledger_service_pb2 as ledger,
)
from tests.fuzz import books
from tests.fuzz.books import Answered, Books
from tests.fuzz.guessing import ANSWERS, HOLDER, KINDS, Guesser, Root
from tests.fuzz.twisting import Twister
from tests.system.wire import Wire, grant_of, new_id
from tests.system.world import accepted_requests, make_world

BLOCK: Final = 500
EPOCH: Final = 10_000
"""After so many cases there are new budgets to ask about: the sums of old ones would take ever longer."""
AT_ONCE: Final = 12
ROOTS: Final = 30
"""Some are soon frozen, or billed beyond what they have, and good for refusals only."""
GRANTED: Final = 10**6
CALL_SECONDS_MAX: Final = 60
MEMORY_MB_MAX: Final = 200
"""The server may grow by this much after its first epoch: what it remembers of budgets is bounded."""
PROBLEMS_MAX: Final = 50
_MB: Final = 1024 * 1024
_STREAMED_MAX: Final = 3
"""Answers of a stream that are waited for; the rest is for the verification in the end."""
STREAMS: Final = ("/WatchEntries", "/Verify", "/Export")
NEVER: Final = ("INTERNAL", "UNKNOWN", "UNAVAILABLE")
_EXTERNAL: Final[Mapping[str, int]] = {"Grant": 1, "TopUp": 1, "Withdraw": -1}

Metadata = tuple[tuple[str, str | bytes], ...]


class Keys(NamedTuple):
    """Of principals with one role each."""

    admin: str
    agent: str
    auditor: str


class Case(NamedTuple):
    """One call."""

    method: str
    request: bytes
    metadata: Metadata


@dataclass
class Verdict:
    """What the campaign comes to."""

    rpcs: int
    cases: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    balances_changed: int = 0
    reached: set[tuple[str, str]] = field(default_factory=set)
    """Methods with the statuses that they have ended with."""
    memory_mb: list[float] = field(default_factory=list)
    """Of the server, at the end of each epoch."""
    verified: bool = False
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return (
            self.verified
            and not self.balances_changed
            and not self.problems
            and not any(self.statuses[name] for name in NEVER)
        )

    def line(self) -> str:
        """The verdict as JSON, with exactly the keys that readers know."""
        return json.dumps(
            {
                "cases": self.cases,
                "rpcs": self.rpcs,
                "statuses": dict(sorted(self.statuses.items())),
                "internal": self.statuses["INTERNAL"],
                "unknown": self.statuses["UNKNOWN"],
                "balances_changed": self.balances_changed,
                "seconds": round(self.seconds, 1),
            }
        )


class Campaign:
    """Calls of one server, in its own order, by a seed."""

    def __init__(self, address: str, keys: Keys, database: str, pid: int, seed: int) -> None:
        """Ask nothing yet.

        Args:
            address: Of a server that does nothing by itself.
            keys: Of those whom it knows; the admin is `dev`.
            database: Its database, past all rights.
            pid: Its process.
            seed: Decides what is asked; ids and secrets are not the seed's.
        """
        self._address, self._keys = address, keys
        self._database = database
        self._server = psutil.Process(pid)
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._guesser, self._twister = Guesser(self._random), Twister(self._random)
        self._templates: Mapping[str, Message] = {}
        self._epochs = 0
        self.verdict = Verdict(rpcs=len(KINDS))

    async def run(self, cases: int, tell: Callable[[str], None]) -> Verdict:
        """Ask so many times."""
        verdict, begun = self.verdict, time.monotonic()
        order = self._order()
        async with AsyncExitStack() as stack:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(self._address))
            connection = stack.enter_context(psycopg.connect(self._database, autocommit=True))
            while verdict.cases < cases and len(verdict.problems) < PROBLEMS_MAX:
                if verdict.cases >= self._epochs * EPOCH:
                    self._begin_epoch()
                block = [self._case(next(order)) for _ in range(min(BLOCK, cases - verdict.cases))]
                await self._ask(channel, connection, block)
                tell(self._progress(cases, time.monotonic() - begun))
        self._end()
        verdict.seconds = time.monotonic() - begun
        return verdict

    def _order(self) -> Iterator[str]:
        """Every method as often as every other one, never in the same order."""
        methods = list(KINDS)
        while True:
            self._random.shuffle(methods)
            yield from methods

    # -- What is asked --------------------------------------------------------------------------------

    def _begin_epoch(self) -> None:
        self._remember_memory()
        self._epochs += 1
        with Wire(self._address, self._keys.admin) as wire:
            # There may be 32 in all.
            for each in wire.admin.ListWebhooks(admin.ListWebhooksRequest()).webhooks:
                wire.admin.DeleteWebhook(admin.DeleteWebhookRequest(webhook_id=each.webhook_id))
            world = make_world(wire, f"{self._epochs}-")
            roots = []
            for number in range(ROOTS):
                grant = grant_of(f"root-{self._epochs}-{number}", GRANTED, holder=HOLDER)
                wire.admin.Grant(grant)
                roots.append(Root(grant.header.root_id, grant.name))
            self._templates = accepted_requests(world)
        self._guesser.look_at(roots)
        self._twister.remember(
            [
                *(world.live, world.settled, world.service, world.acme.root_id),
                *(world.child.budget_id, world.revoked.budget_id, world.other.root_id),
                *(world.acme.secret, world.acme_before.secret, world.live_secret),
                *(world.acme.token_id, world.spent.header.operation_id, new_id()),
            ]
        )

    def _case(self, method: str) -> Case:
        """A call of a method: right, spoilt, or nothing of the kind."""
        template = self._templates.get(method)
        if template is None or self._random.random() < 0.6:
            request = self._guesser.request(KINDS[method])
        else:
            request = type(template)()
            request.CopyFrom(template)
            self._in_earnest(request)
        draw = self._random.random()
        if draw < 0.3:
            data = request.SerializeToString()
        elif draw < 0.65:
            data = self._twister.message(request)
        elif draw < 0.85:
            data = self._twister.wire(request.SerializeToString())
        else:
            data = self._twister.noise()
        return Case(method, data, self._metadata())

    def _in_earnest(self, request: Any) -> None:
        """What would be accepted, as a new operation and not only as a question."""
        if "header" in request.DESCRIPTOR.fields_by_name and self._random.random() < 0.3:
            request.header.dry_run = False
            request.header.operation_id = new_id()

    def _metadata(self) -> Metadata:
        """Mostly what lets everything be asked."""
        key = ("authorization", f"Bearer {self._keys.admin}")
        if self._random.random() < 0.85:
            return (key,)
        keys = self._keys
        return self._random.choice(
            (
                (),
                (("authorization", f"Bearer {keys.agent}"),),
                (("authorization", f"Bearer {keys.auditor}"),),
                (("authorization", f"Bearer {keys.admin[:-1]}"),),
                (("authorization", f"Basic {keys.admin}"),),
                (("authorization", ""),),
                (key, key),
                (key, ("traceparent", "00-" + "f" * 32 + "-" + "0" * 16 + "-zz")),
                (key, ("traceparent", "x" * 5_000), ("tracestate", "=,=,;" * 20)),
                (key, ("x-trace-bin", self._random.randbytes(40)), ("x-bin", b"\0\xff")),
                (key, ("x-many", "y" * 60_000)),
            )
        )

    # -- What comes of it -----------------------------------------------------------------------------

    async def _ask(
        self, channel: grpc.aio.Channel, connection: psycopg.Connection, block: Sequence[Case]
    ) -> None:
        before, answered = Books.read(connection), Answered()
        waiting = iter(block)

        async def ask() -> None:
            for case in waiting:
                await self._call(channel, case, answered)

        await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
        found = books.audit(connection, before, Books.read(connection), answered)
        self.verdict.cases += len(block)
        self.verdict.balances_changed += found.changed
        self.verdict.problems += found.problems

    async def _call(self, channel: grpc.aio.Channel, case: Case, answered: Answered) -> None:
        ended = "OK"
        try:
            if case.method.endswith(STREAMS):
                await _streamed(channel, case)
            else:
                unary: Any = channel.unary_unary(case.method)
                called: Awaitable[bytes] = unary(
                    case.request, metadata=case.metadata, timeout=CALL_SECONDS_MAX
                )
                _note(case, await called, answered)
        except grpc.aio.AioRpcError as error:
            ended = error.code().name
            if ended in NEVER:
                self.verdict.problems.append(
                    f"{case.method} ended as {ended} ({error.details()}): {case.request.hex()[:2_000]}"
                )
        self.verdict.statuses[ended] += 1
        self.verdict.reached.add((case.method.rpartition("/")[2], ended))

    def _end(self) -> None:
        """The server lives, has not grown, and everything that it has recorded holds."""
        self._remember_memory()
        verdict = self.verdict
        first, last = verdict.memory_mb[min(1, len(verdict.memory_mb) - 1)], verdict.memory_mb[-1]
        if last - first > MEMORY_MB_MAX:
            verdict.problems.append(f"the server has grown from {first:.0f} to {last:.0f} MB")
        if not self._server.is_running():
            verdict.problems.append("the server has ended")
            return
        with Wire(self._address, self._keys.admin) as wire:
            *_, last_answer = wire.audit.Verify(audit.VerifyRequest(), timeout=3_600)
        verdict.verified = last_answer.verdict.verified
        if not verdict.verified:
            verdict.problems.append(f"the ledger does not verify: {last_answer.verdict}")

    def _remember_memory(self) -> None:
        if self._server.is_running():
            self.verdict.memory_mb.append(self._server.memory_info().rss / _MB)

    def _progress(self, cases: int, seconds: float) -> str:
        verdict = self.verdict
        statuses = ", ".join(f"{name} {count}" for name, count in verdict.statuses.most_common())
        rate = verdict.cases / seconds
        return (
            f"{verdict.cases} of {cases}, {rate:.0f}/s, {verdict.memory_mb[-1]:.0f} MB: {statuses}"
        )


async def _streamed(channel: grpc.aio.Channel, case: Case) -> None:
    stream: Any = channel.unary_stream(case.method)
    call = stream(case.request, metadata=case.metadata, timeout=CALL_SECONDS_MAX)
    try:
        for _ in range(_STREAMED_MAX if not case.method.endswith("/WatchEntries") else 1):
            if await call.read() is grpc.aio.EOF:
                return
    finally:
        call.cancel()


def _note(case: Case, answer: bytes, answered: Answered) -> None:
    """Remember what an answer says that has happened."""
    response: Any = ANSWERS[case.method].FromString(answer)
    fields = response.DESCRIPTOR.fields_by_name
    if isinstance(response, ledger.BatchResponse):
        outcomes = [each.outcome for each in response.results if each.HasField("outcome")]
    elif "outcome" in fields:
        outcomes = [response.outcome]
    else:
        return
    for outcome in outcomes:
        if outcome.dry_run or outcome.replayed:
            continue
        answered.operations.add(UUID(bytes=outcome.operation_id))
        sign = _EXTERNAL.get(case.method.rpartition("/")[2])
        if sign is not None:
            request: Any = KINDS[case.method].FromString(case.request)
            answered.put_in[UUID(bytes=request.header.root_id)] += sign * request.amount
