"""A ledger to tamper with, made as any ledger is: servers, clients, and whatever agents do.

Clients without the SDK ask for every kind of operation on small trees; agents with the SDK reserve and
settle at the bottom of trees that are as deep as may be, within their holds and far beyond. Holds lapse,
some of them are settled late, leases end, subtrees are revoked, disputes stay open. Checkpoints are sealed
meanwhile, the later ones with another key, and a little is recorded after the last one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from peculium import Child, aio
from peculium._ids import new_id
from peculium.aio import Budget, Client
from peculium.errors import BudgetExhausted
from peculium.v1 import ledger_service_pb2 as ledger_service
from peculium_server.core.encoding import request_fields
from peculium_server.core.limits import DEPTH_MAX, EAGER_COLLECTIONS_MAX
from peculium_server.core.operations import Kind
from peculium_server.core.state import HoldState
from peculium_server.signing import SigningKey
from tests.bench.jobs import TIMEOUT_SECONDS
from tests.bench.ledgers import HOLDER, Ledger
from tests.faults.sending import Line, Seen, batched
from tests.faults.wishes import ALL_KINDS, Wish, Wisher

GRANTED: Final = 10**15
SLICE: Final = 400
"""What an agent gets at a time, and uses up with some twenty calls."""
ESTIMATE: Final = 20
_BEYOND: Final = 0.05
"""How often a call costs more than was set aside for it."""
_WILD: Final = 8
"""Clients that do anything."""
_CALLS_BEFORE: Final = 10
_AGENTS: Final = 48
_SPAN: Final = NonRecordingSpan(
    SpanContext(
        int("5e" * 16, 16),
        int("a1" * 8, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
)
"""In which some operations are asked for."""
_ENTRIES_OF_DEEP_TREE: Final = 10_000
_POLL_SECONDS: Final = 0.1
WAIT_SECONDS_MAX: Final = 300.0
"""For anything that has to come about, on a busy machine."""


class MakingFailed(Exception):
    """The ledger did not become what it had to be; says what is missing."""


@dataclass
class Progress:
    """How far the ledger is."""

    ledger: Ledger
    wanted: int
    entries: int = 0
    kinds: set[int] = field(default_factory=set)

    @property
    def enough(self) -> bool:
        """Whether there are as many entries as are wanted."""
        return self.entries >= self.wanted

    async def follow(self) -> None:
        """Look again and again, until there are enough."""
        while not self.enough:
            await asyncio.sleep(_POLL_SECONDS)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Look once."""
        [(self.entries, kinds)] = self.ledger.fetch(
            "SELECT count(*), array_agg(DISTINCT kind) FROM entries"
        )
        self.kinds = set(kinds or ())


async def grow(address: str, ledger: Ledger, entries: int, chance: Random, name: str) -> None:
    """Let clients and agents work until the ledger has so many entries.

    Args:
        address: Of a server.
        ledger: Its ledger.
        entries: How many, at least.
        chance: For what is left to it.
        name: Of the trees that are made: none has it yet.
    """
    progress = Progress(ledger, entries)
    await asyncio.to_thread(progress.look)
    share = entries - progress.entries
    trees = max(1, share // _ENTRIES_OF_DEEP_TREE)
    async with asyncio.TaskGroup() as working:
        working.create_task(progress.follow())
        for _ in range(_WILD):
            working.create_task(_do_anything(address, progress, Random(chance.random())))
        for number in range(trees):
            working.create_task(
                _work_deep(address, progress, Random(chance.random()), f"{name}-{number}", trees)
            )


async def do_a_little(address: str, chance: Random, operations: int) -> None:
    """Let one client ask for some operations of any kind."""
    wisher = Wisher(chance, [], ALL_KINDS, dry_runs=False)
    async with Line(address, Seen()) as line:
        for _ in range(operations):
            await _ask(line, wisher.wish())


async def _do_anything(address: str, progress: Progress, chance: Random) -> None:
    """One client that asks for operations of every kind, alone, in chains, and all or none."""
    wisher = Wisher(chance, [], ALL_KINDS, dry_runs=False)
    async with Line(address, Seen()) as line:
        while not progress.enough:
            if chance.random() < 0.1:
                await _ask_together(line, wisher, chance)
            else:
                await _ask(line, wisher.wish())


async def _ask(line: Line, wish: Wish) -> None:
    wish.answered(await line.ask(wish.request, TIMEOUT_SECONDS))


async def _ask_together(line: Line, wisher: Wisher, chance: Random) -> None:
    wishes = wisher.chain(chance.randint(2, 6))
    atomic = chance.random() < 0.5
    if atomic:
        wishes += wisher.chain(chance.randint(1, 3), first=len(wishes))
    if not wishes:
        return
    batch = ledger_service.BatchRequest(operations=[batched(wish.request) for wish in wishes])
    if atomic:
        batch.atomic, batch.operation_id = True, new_id()
    answers = await line.ask_many(batch, TIMEOUT_SECONDS)
    for wish, answer in zip(wishes, answers, strict=True):
        wish.answered(answer)


# --- deep trees ---


async def _work_deep(
    address: str, progress: Progress, chance: Random, name: str, trees: int
) -> None:
    """Make a tree as deep as may be, and let agents work on its last level."""
    async with aio.connect(address, timeout=TIMEOUT_SECONDS) as client:
        root, above = await _line(client, name, poor=name.endswith(("0", "5")))
        agents = max(4, _AGENTS // trees)
        made = await above.delegate(
            [Child(f"agent-{number}", SLICE, token=True) for number in range(agents)]
        )
        async with asyncio.TaskGroup() as working:
            for each in made:
                budget = await client.accept(each.capability)
                working.create_task(
                    _spend(
                        budget, (root, above), progress, Random(f"{chance.random()} {each.name}")
                    )
                )


async def _line(client: Client, name: str, *, poor: bool) -> tuple[Budget, Budget]:
    """A root, and below it one budget under the other: the root and the last but one level.

    In a poor line nobody but the root has anything: what is lent or given comes all the way down.
    """
    await client.admin.grant(name, unit="calls", amount=GRANTED, holder=HOLDER)
    root = budget = await client.open(name)
    for level in range(2, DEPTH_MAX):
        amount = _AGENTS * SLICE if poor else GRANTED - level * 10**12
        [made] = await budget.delegate([Child(f"level-{level}", amount, holder=HOLDER)])
        budget = await client.open(str(made.ref.path))
    return root, budget


async def _spend(
    budget: Budget, above: tuple[Budget, Budget], progress: Progress, chance: Random
) -> None:
    """An agent: most calls cost no more than was estimated, some twice as much."""
    root, parent = above
    while not progress.enough:
        try:
            hold = await budget.reserve(ESTIMATE, labels={"run": str(chance.randrange(9))})
        except BudgetExhausted:
            try:
                await parent.fund(budget.ref, SLICE)
            except BudgetExhausted:
                await root.fund(budget.ref, SLICE)
            continue
        beyond = chance.random() < _BEYOND
        cost = chance.randint(ESTIMATE + 1, 2 * ESTIMATE) if beyond else ESTIMATE
        await hold.settle(cost, reference=f"call-{chance.getrandbits(64):x}")


# --- what has to be there, whatever chance has brought ---


async def make_specimens(address: str) -> None:
    """Make what an auditor has to meet at least once, and wait until the ledger itself has done its part."""
    async with aio.connect(address, timeout=TIMEOUT_SECONDS) as client:
        await client.admin.grant("specimens", unit="usd_nanos", amount=10**9, holder=HOLDER)
        root = await client.open("specimens")
        with trace.use_span(_SPAN):
            await _disputed(client, root)
        await _overrun(client)
        await (await (await _child(client, root, "lent")).reserve(1_000)).settle(1_200)
        await _revoked(client, root, "revoked")
        late = await root.reserve(100, ttl=1)
        await root.reserve(50, ttl=1)
        await root.delegate([Child("leased", 500, token=True, lease=1)])
        await client.admin.freeze((await _child(client, root, "frozen")).ref, reason="an audit")
        await _forfeited(root)
        # Lapsed, and settled all the same, for less than was held.
        await late.settle(60, reference="late")


async def _child(client: Client, parent: Budget, name: str, **how: Any) -> Budget:
    [made] = await parent.delegate([Child(name, 1_000, token=True, **how)])
    return await client.accept(made.capability)


async def _disputed(client: Client, root: Budget) -> None:
    """One dispute that stays open, one that an administrator has resolved."""
    for name, resolved in (("disputed", False), ("settled", True)):
        child = await _child(client, root, name, overrun_factor=1)
        hold = await child.reserve(10)
        await hold.settle(100)
        if resolved:
            await client.admin.resolve(child.ref, hold.hold_id, 25, reason="the bill says so")


async def _overrun(client: Client) -> None:
    """A root that was billed beyond all that it had, and one that has paid that back."""
    for name, paid in (("overrun", 0), ("repaid", 1_000)):
        await client.admin.grant(name, unit="calls", amount=100, holder=HOLDER)
        root = await client.open(name)
        # Before that it has a history, as others have.
        for _ in range(_CALLS_BEFORE):
            await (await root.reserve(1)).settle(1)
        await (await root.reserve(100 - _CALLS_BEFORE)).settle(180)
        if paid:
            await client.admin.top_up(name, paid)


async def _revoked(client: Client, root: Budget, name: str) -> None:
    """A budget with more below it than one transaction empties: the rest is collected."""
    [made] = await root.delegate([Child(name, 10_000, holder=HOLDER)])
    top = await client.open(f"{root.ref.path}/{name}")
    await top.delegate([Child(f"part-{number}", 5) for number in range(EAGER_COLLECTIONS_MAX + 20)])
    await root.revoke(made.ref)


async def _forfeited(root: Budget) -> None:
    """Wait until the time of both holds was over, and the ledger has noticed."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while (await root.balances()).forfeited < 150:
        if time.monotonic() > deadline:
            raise MakingFailed("no hold has lapsed")
        await asyncio.sleep(_POLL_SECONDS)


async def leave_something_to_collect(address: str) -> None:
    """Revoke a subtree where nobody sweeps."""
    async with aio.connect(address, timeout=TIMEOUT_SECONDS) as client:
        await _revoked(client, await client.open("specimens"), "left")


_DUE: Final = """
    SELECT (SELECT count(*) FROM holds WHERE state = 1 AND expires_at <= clock_timestamp())
         + (SELECT count(*) FROM budgets WHERE lease_until <= clock_timestamp() AND NOT closed)
         + (SELECT count(*) FROM collections)
"""
_SEALED: Final = """
    SELECT positions = (SELECT array_agg(position ORDER BY lane) FROM lanes)
    FROM checkpoints ORDER BY number DESC LIMIT 1
"""


def wait_until_sealed(ledger: Ledger) -> None:
    """Wait until nothing is due, and everything is sealed."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while ledger.fetch(_DUE) != [(0,)] or ledger.fetch(_SEALED) != [(True,)]:
        if time.monotonic() > deadline:
            raise MakingFailed("it is not swept and sealed in time")
        time.sleep(_POLL_SECONDS)


_MISSING: Final = {
    "a tree as deep as may be": f"SELECT FROM budgets WHERE cardinality(ancestors) = {DEPTH_MAX - 1}",
    "an operation on all levels": f"SELECT FROM entries WHERE parts >= {DEPTH_MAX}",
    "a late settle": (
        "SELECT FROM entries AS e JOIN entries AS l USING (lane, root_id, budget_id)"
        f" WHERE e.kind = {Kind.SETTLE:d} AND l.kind = {Kind.LAPSE:d} AND e.seq > l.seq"
    ),
    "a hold that lapsed": f"SELECT FROM holds WHERE state = {HoldState.LAPSED:d}",
    "an open dispute": f"SELECT FROM holds WHERE state = {HoldState.DISPUTED:d}",
    "an overrun": "SELECT FROM budgets WHERE overrun > 0",
    "an operation within a trace": "SELECT FROM entries WHERE trace_id IS NOT NULL",
    "money that was lent": "SELECT FROM budgets WHERE advanced > 0",
    "a frozen budget": "SELECT FROM budgets WHERE frozen",
    "a closed one": "SELECT FROM budgets WHERE closed",
    "one held by a principal": "SELECT FROM budgets WHERE custody = 2 AND parent_id IS NOT NULL",
    "something to collect": "SELECT FROM collections",
    "checkpoints by two keys": "SELECT FROM checkpoints AS a JOIN checkpoints AS b ON a.key_id < b.key_id",
}


def missing(ledger: Ledger, entries: int) -> list[str]:
    """What a ledger lacks that it has to have."""
    progress = Progress(ledger, entries)
    progress.look()
    lacking = [kind.name for kind in Kind if kind not in progress.kinds]
    lacking += [what for what, query in _MISSING.items() if not ledger.fetch(f"{query} LIMIT 1")]
    asked = ledger.fetch("SELECT kind, request FROM entries WHERE part = 0")
    if not any("batch" in request_fields(Kind(kind), request) for kind, request in asked):
        lacking.append("an atomic batch")
    if not progress.enough:
        lacking.append(f"{entries - progress.entries} entries")
    return lacking


@dataclass(frozen=True)
class Sealed:
    """What seals a ledger."""

    folder: Path
    keys: tuple[SigningKey, ...]

    @classmethod
    def with_new_keys(cls, folder: Path) -> Sealed:
        """Two keys: the first is followed by the second."""
        files = [folder / f"checkpoint-key-{number}.pem" for number in (1, 2)]
        return cls(folder, tuple(SigningKey.make(file) for file in files))

    def settings(self, number: int) -> dict[str, str]:
        """The settings of a server that seals with one of the keys, at once."""
        file = self.folder / f"checkpoint-key-{number + 1}.pem"
        return {"PECULIUM_SIGNING_KEY_FILE": str(file), "PECULIUM_SEAL_SECONDS": "2"}


QUIET: Final = {
    "PECULIUM_SEAL_SECONDS": "0",
    "PECULIUM_SWEEP_SECONDS": "0",
    "PECULIUM_ALERT_SECONDS": "0",
}
"""The settings of a server that does nothing by itself."""


def tell(ledger: Ledger) -> str:
    """What a ledger has, for people."""
    tables: Sequence[str] = ("entries", "budgets", "holds", "roots", "checkpoints")
    counts = [f"{ledger.fetch(f'SELECT count(*) FROM {name}')[0][0]:,} {name}" for name in tables]
    return ", ".join(counts)
