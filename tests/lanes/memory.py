"""A store in memory, whose transactions a test can hold up, fail and repeat."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from peculium_server.core.batch import Request
from peculium_server.core.encoding import token_id
from peculium_server.core.footprint import Footprint
from peculium_server.core.operations import (
    Actor,
    After,
    Authority,
    ByHolder,
    ByRole,
    Grant,
    Operation,
    Reserve,
    Role,
    Spend,
)
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refused
from peculium_server.core.state import Accepted, Tree
from peculium_server.lanes.answers import Answer, Unanswered
from peculium_server.lanes.ledger import Ledger
from peculium_server.store.lane import Loaded, LoadedLanes

_K = TypeVar("_K")
_V = TypeVar("_V")

NOW = 1_800_000_000_000_000
ADMIN = Actor("admin", Role.ADMIN)
AGENT = Actor("agent", Role.AGENT)


class Whole(dict[_K, _V | None]):
    """What is absent does not exist."""

    def __missing__(self, key: _K) -> None:
        return None


class MemoryWriter:
    """Commits to one lane of a ledger in memory."""

    def __init__(self) -> None:
        self.trees: dict[bytes, Tree] = {}
        self.position = 0
        self.transactions: list[int] = []
        """How many operations each transaction has committed."""
        self.attempts = 0
        self.deadlines: list[float | None] = []
        self.gate = asyncio.Event()
        """Cleared: transactions wait before they decide."""
        self.gate.set()
        self.landing = asyncio.Event()
        """Cleared: transactions have decided, and are not answered yet."""
        self.landing.set()
        self.begun = asyncio.Event()
        """Set when a transaction has begun."""
        self.failures: list[Exception | None] = []
        """What the next attempts fail with, after they have decided."""
        self.conflicts = 0
        """How many of the next attempts are aborted and repeated."""

    async def run(
        self,
        footprints: Mapping[bytes, Footprint],
        decide: Callable[[Loaded], Sequence[Accepted]],
        deadline: float | None,
        sent: Callable[[], None],
    ) -> int:
        self.deadlines.append(deadline)
        self.begun.set()
        await self.gate.wait()
        while True:
            self.attempts += 1
            trees = {root: self.copy_of(root) for root in footprints}
            loaded = Loaded(trees, NOW, self.position)
            saved = decide(loaded)
            if self.conflicts:
                self.conflicts -= 1
                continue
            if self.failures and (failure := self.failures.pop(0)) is not None:
                raise failure
            self.save(trees, saved)
            self.transactions.append(len(saved))
            position = self.position
            sent()
            await self.landing.wait()
            return position

    def save(self, trees: Mapping[bytes, Tree], saved: Sequence[Accepted]) -> None:
        self.trees |= trees
        self.position += len(saved)

    def copy_of(self, root_id: bytes) -> Tree:
        """A copy, for an attempt that is not committed must leave no trace."""
        tree = Tree(root_id)
        known = self.trees.get(root_id)
        for name in ("budgets", "holds", "consumed", "hold_tokens", "recorded", "names"):
            content: dict[Any, Any] = Whole()
            if known is not None:
                content.update(getattr(known, name))
            setattr(tree, name, content)
        return tree


class MemoryLanesWriter:
    """Commits to all lanes of a ledger in memory at once."""

    def __init__(self, writers: Sequence[MemoryWriter]) -> None:
        self._writers = writers
        self.transactions: list[int] = []
        """How many operations each transaction has committed."""
        self.conflicts = 0
        """How many of the next attempts are aborted and repeated."""
        self.deadlines: list[float | None] = []
        self.gate = asyncio.Event()
        """Cleared: transactions wait before they decide."""
        self.gate.set()

    async def run(
        self,
        footprints: Mapping[int, Mapping[bytes, Footprint]],
        decide: Callable[[LoadedLanes], Sequence[Accepted]],
        deadline: float | None,
    ) -> Mapping[int, int]:
        self.deadlines.append(deadline)
        await self.gate.wait()
        while True:
            trees = {
                root: self._writers[lane].copy_of(root)
                for lane, roots in footprints.items()
                for root in roots
            }
            positions = {lane: self._writers[lane].position for lane in footprints}
            saved = decide(LoadedLanes(trees, NOW, positions))
            if not self.conflicts:
                break
            self.conflicts -= 1
        self.transactions.append(len(saved))
        for lane, roots in footprints.items():
            here = [one for one in saved if one.operation.root_id in roots]
            self._writers[lane].save({root: trees[root] for root in roots}, here)
        return {lane: self._writers[lane].position for lane in footprints}


class MemoryStore:
    """A ledger of two lanes in memory; the last bit of the root id says which."""

    incarnation = bytes(range(16))
    lanes = 2

    def __init__(self) -> None:
        self.writers = [MemoryWriter() for _ in range(self.lanes)]
        self.wide = MemoryLanesWriter(self.writers)

    def lane_of(self, root_id: bytes) -> int:
        return root_id[-1] & 1

    def writer(self, lane: int) -> MemoryWriter:
        return self.writers[lane]

    def lanes_writer(self) -> MemoryLanesWriter:
        return self.wide


def new_id(lane: int = 0) -> bytes:
    """A UUIDv7 of the store's present, for a root of that lane."""
    at = (NOW // 1000).to_bytes(6)
    rest = bytearray(secrets.token_bytes(10))
    rest[0] = 0x70 | rest[0] & 0x0F
    rest[2] = 0x80 | rest[2] & 0x3F
    rest[9] = rest[9] & 0xFE | lane
    return at + bytes(rest)


def new_token() -> bytes:
    return token_id(secrets.token_bytes(32))


def request(operation: Operation, index: int = 0, actor: Actor = AGENT) -> Request:
    return Request(operation, actor, index)


def grant(amount: int = 100, *, lane: int = 0, holder: str | None = AGENT.principal) -> Grant:
    """A root that is held by its principal."""
    root_id = new_id(lane)
    return Grant(
        operation_id=new_id(),
        root_id=root_id,
        budget_id=root_id,
        authority=ByRole(),
        name=f"root-{root_id.hex()}",
        unit="calls",
        amount=amount,
        holder=holder,
    )


def spend(root: Grant, amount: int = 1, authority: Authority | None = None) -> Spend:
    authority = authority or ByHolder()
    return Spend(
        operation_id=new_id(),
        root_id=root.root_id,
        budget_id=root.budget_id,
        authority=authority,
        amount=amount,
        next_token_id=None if isinstance(authority, ByHolder) else new_token(),
    )


def reserve(root: Grant, amount: int, authority: Authority) -> Reserve:
    return Reserve(
        operation_id=new_id(),
        root_id=root.root_id,
        budget_id=root.budget_id,
        authority=authority,
        amount=amount,
        ttl_us=60_000_000,
        next_token_id=None if isinstance(authority, ByHolder) else new_token(),
        hold_id=new_id(),
        hold_token_id=new_token(),
    )


async def granted(ledger: Ledger, amount: int = 100, lane: int = 0) -> Grant:
    """Make a root through a ledger."""
    root = grant(amount, lane=lane)
    [answer] = await ledger.execute([request(root, actor=ADMIN)], None)
    assert isinstance(answer.result, Outcome)
    return root


def reasons(answers: Sequence[Answer]) -> list[str]:
    """Why operations were refused or got no answer, and "ok" for the others."""
    return [
        answer.result.reason.name if isinstance(answer.result, Refused | Unanswered) else "ok"
        for answer in answers
    ]


def chain(operations: Sequence[Operation]) -> list[Request]:
    return [request(operation, index) for index, operation in enumerate(operations)]


__all__ = [
    "ADMIN",
    "AGENT",
    "NOW",
    "After",
    "MemoryStore",
    "MemoryWriter",
    "chain",
    "grant",
    "granted",
    "new_id",
    "new_token",
    "reasons",
    "request",
    "reserve",
    "spend",
]
