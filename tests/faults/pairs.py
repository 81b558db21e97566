"""A tree in which everything can be asked, and what is asked there: each with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from peculium_server.core.limits import EAGER_COLLECTIONS_MAX
from peculium_server.core.operations import AtomicBatch, Operation
from peculium_server.core.state import Accepted
from tests.core.ledger import AGENT, DAY, HOUR, MINUTE, Ledger, Node


class RecordingLedger(Ledger):
    """Keeps what it has accepted, so that a store can save the same."""

    def __init__(self) -> None:
        super().__init__(checked=False)
        self.accepted: list[Accepted] = []

    def commit(self, accepted: Accepted) -> None:
        """Save it, and keep it."""
        self.accepted.append(accepted)
        super().commit(accepted)


class Root(NamedTuple):
    """A root to be made, and where its lane stands."""

    id: bytes
    position: int


class World:
    """A tree with a past of two hours, in which holds and leases have come to every kind of end.

    root
    ├── team (leased)
    │   ├── run, with a hold that is live, one whose time is over, and one that has lapsed
    │   │   └── leaf
    │   └── old: its lease is over, and it has a hold
    ├── service (its principal's)
    └── gone: revoked
        └── under: still to be collected, and with a hold
    other: a tree of another lane
    """

    def __init__(
        self, made: int, now: int, root: Root, other: Root, root_ids: Iterator[bytes]
    ) -> None:
        self.name = f"name-{made}"
        """Of every root that is granted in the course of a play: names are disputed."""
        self.root_ids = root_ids
        self.ledger = RecordingLedger()
        self.ledger._made = made
        self.ledger.now = now - 2 * HOUR
        self.ledger.eager = 0
        self.other = self._grant(other, f"other-{made}")
        self.root = self._grant(root, f"root-{made}")
        self._live()
        self.past, self.ledger.accepted = self.ledger.accepted, []
        self.ledger.now = now
        self.ledger.eager = EAGER_COLLECTIONS_MAX

    def _grant(self, root: Root, name: str) -> Node:
        self.ledger.position = root.position
        return self.ledger.grant(
            10_000, holder=AGENT.principal, root_id=root.id, budget_id=root.id, name=name
        )

    def _live(self) -> None:
        """Let come about what the tree has behind it."""
        held = {"holder": AGENT.principal}
        self.team = self.root.child(4_000, lease_us=DAY, lease_latest_us=2 * DAY, **held)
        self.run = self.team.child(1_000, overrun_factor=50, **held)
        self.hold = self.run.hold(100, ttl_us=DAY)
        self.due = self.run.hold(50, ttl_us=10 * MINUTE)
        self.lapsed = self.run.hold(40, ttl_us=MINUTE)
        self.leaf = self.run.child(100)
        self.old = self.team.child(200, lease_us=HOUR, lease_latest_us=HOUR, **held)
        self.old_hold = self.old.hold(20, ttl_us=DAY)
        self.service = self.root.child(300, by_token=False, **held)
        gone = self.root.child(200)
        self.under = gone.child(100)
        self.under_hold = self.under.hold(30, ttl_us=DAY)
        self.ledger.do(self.root.revoke(gone))
        self.ledger.pass_time(2 * MINUTE)
        self.ledger.do(self.lapsed.lapse())


def _all(node: Node) -> int:
    return node.money.available


def _grant(world: World, root_id: bytes) -> Operation:
    return world.ledger.ask_grant(10, name=world.name, root_id=root_id, budget_id=root_id)


def _together(world: World, *operations: Operation) -> Asked:
    batch = AtomicBatch(world.ledger.id(), len(operations))
    return tuple(replace(operation, batch=batch) for operation in operations)


Asked = tuple[Operation, ...]
"""One operation, or all of an atomic batch."""

_Ask = Callable[[World], Operation | Asked]

ASKS: dict[str, _Ask] = {
    "grant": lambda world: _grant(world, next(world.root_ids)),
    "top the root up": lambda world: world.root.top_up(500),
    "withdraw all": lambda world: world.root.withdraw(_all(world.root)),
    "reserve all of the root": lambda world: world.root.reserve(_all(world.root)),
    "freeze the root": lambda world: world.root.freeze(),
    "freeze the team": lambda world: world.team.freeze(),
    "unfreeze the root": lambda world: world.root.unfreeze(),
    "revoke the team": lambda world: world.root.revoke(world.team),
    "fund the run from the root": lambda world: world.root.fund(world.run, _all(world.root)),
    "reserve all of the team": lambda world: world.team.reserve(_all(world.team)),
    "delegate all of the team": lambda world: world.team.delegate(
        world.team.spec(_all(world.team), name="child")
    ),
    "fund the run": lambda world: world.team.fund(world.run, _all(world.team), lease_us=HOUR),
    "fund the expired": lambda world: world.team.fund(world.old, 10),
    "renew the team": lambda world: world.team.renew(DAY),
    "revoke the run": lambda world: world.team.revoke(world.run),
    "return the team": lambda world: world.team.return_all(cascade=True),
    "reserve all of the run": lambda world: world.run.reserve(_all(world.run)),
    "spend all of the run": lambda world: world.run.spend(_all(world.run)),
    "delegate all of the run": lambda world: world.run.delegate(
        world.run.spec(_all(world.run), name="child")
    ),
    "accept the run": lambda world: world.run.accept(),
    "recover the run": lambda world: world.run.recover(),
    "claim the run": lambda world: world.run.recover(if_seq=world.run.budget.seq),
    "recover the run for another": lambda world: world.run.admin_recover(
        holder="other", holds=(world.hold.rotation(),)
    ),
    "return a part of the run": lambda world: world.run.give_back(100),
    "return the run": lambda world: world.run.return_all(cascade=True),
    "return the leaf": lambda world: world.leaf.return_all(),
    "settle": lambda world: world.hold.settle(60),
    "settle beyond": lambda world: world.hold.settle(100 + _all(world.run) + _all(world.team) // 2),
    "settle and keep open": lambda world: world.hold.settle(60, keep_open=True),
    "release": lambda world: world.hold.release(),
    "extend": lambda world: world.hold.extend(),
    "resolve": lambda world: world.run.resolve(world.hold, 70),
    "resolve as admin": lambda world: world.run.admin_resolve(world.hold, 170),
    "lapse": lambda world: world.due.lapse(),
    "settle what is due": lambda world: world.due.settle(20),
    "extend what is due": lambda world: world.due.extend(),
    "settle what has lapsed": lambda world: world.lapsed.settle(30),
    "expire": lambda world: world.old.expire(),
    "renew the expired": lambda world: world.old.renew(),
    "settle below the expired": lambda world: world.old_hold.settle(30),
    "collect": lambda world: world.under.collect(),
    "settle below the revoked": lambda world: world.under_hold.settle(40),
    "spend all of the service": lambda world: world.service.spend(_all(world.service)),
    "reserve all of the other": lambda world: world.other.reserve(_all(world.other)),
    "reserve in both": lambda world: _together(
        world, world.run.reserve(_all(world.run)), world.other.reserve(_all(world.other))
    ),
    "reserve in both, the other first": lambda world: _together(
        world, world.other.reserve(1), world.root.reserve(1)
    ),
}
"""Everything of design that can be asked; each takes as much as there is, so that one is enough."""


def asked(name: str, world: World) -> Asked:
    """What is asked under a name."""
    operations = ASKS[name](world)
    return operations if isinstance(operations, tuple) else (operations,)


class Pair(NamedTuple):
    """Two things that are asked at once."""

    first: str
    second: str
    twice: bool = False
    """It is one operation, asked twice."""

    def ask(self, world: World) -> tuple[Asked, Asked]:
        """Both, made from the same state."""
        first = asked(self.first, world)
        return first, (first if self.twice else asked(self.second, world))

    def __str__(self) -> str:
        return f"{self.first}, twice" if self.twice else f"{self.first} / {self.second}"


def pairs() -> Iterator[Pair]:
    """Each with itself, with a rival of its kind, and with all others."""
    names = list(ASKS)
    for number, name in enumerate(names):
        yield Pair(name, name, twice=True)
        for other in names[number:]:
            yield Pair(name, other)
