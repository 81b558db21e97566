"""A tree in a real store that random operations of every kind are done to, for as long as is wanted."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

from peculium_server.core.operations import Kind, Operation, Usage
from peculium_server.core.refusals import Refused
from peculium_server.core.state import BudgetState, Custody, HoldState
from peculium_server.store.store import Store
from tests.core.ledger import SECOND, HoldRef, Node
from tests.store.stored import StoredLedger

PRINCIPALS = ("agent", "alice", "bob")
LABELS = ((), (("team", "a"),), (("team", "b"),), (("model", "gpt"), ("team", "a")))
REFERENCES = ("", "call-1", "call-2")
USAGES = (
    None,
    Usage(provider="openai", model="m-1", input_tokens=30, output_tokens=7, cached_tokens=2),
    Usage(provider="anthropic", input_tokens=5),
)
TRACES = (None, bytes(range(16)), bytes(range(1, 17)))
DEPTH = 4
BUDGETS_MAX = 60
STEPS_MAX = 5_000


class World:
    """One tree of budgets of both custodies, with leases, debts, disputes and closed parts."""

    def __init__(self, store: Store, seed: int) -> None:
        self.ledger = StoredLedger(store)
        # That the core keeps its invariants others test, after each operation.
        self.ledger.checked = False
        self.nodes: list[Node] = []
        self.holds: list[HoldRef] = []
        self.refusals = 0
        self._random = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret

    async def begin(self) -> Node:
        """Make the root, and do operations until each kind of them was accepted."""
        root = await self.ledger.root(1_000_000, **self._held(), labels=self._labels())
        self.nodes.append(root)
        for _ in range(STEPS_MAX):
            await self.step()
            if {entry.kind for entry in self.ledger.journal} == set(Kind):
                return root
        missing = set(Kind) - {entry.kind for entry in self.ledger.journal}
        raise AssertionError(f"never accepted: {missing}")

    @contextlib.asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Operations are recorded for as long as the block lasts; afterwards none is under way."""
        over = asyncio.Event()

        async def go_on() -> None:
            while not over.is_set():
                await self.step()

        writing = asyncio.create_task(go_on())
        try:
            yield
        finally:
            over.set()
            await writing

    async def step(self) -> None:
        """Ask for one operation, which may be refused."""
        kinds, weights = zip(*_WEIGHTS.items(), strict=True)
        [kind] = self._random.choices(kinds, weights)
        node = self._node()
        open_holds = [hold for hold in self.holds if hold.hold.settleable and not _abandoned(hold)]
        hold = self._random.choice(open_holds) if open_holds else None
        operation: Operation | None = getattr(self, f"_{kind}")(node, hold)
        if operation is None:
            return
        [answer] = await self.ledger.request(operation)
        if isinstance(answer, Refused):
            self.refusals += 1
            return
        tree = self.ledger.trees[node.root_id]
        known = {each.id for each in self.nodes}
        self.nodes += [
            Node(self.ledger, node.root_id, budget.budget_id)
            for budget in tree.known_budgets()
            if budget.budget_id not in known
        ]
        held = {each.id for each in self.holds}
        self.holds += [
            HoldRef(Node(self.ledger, node.root_id, each.budget_id), each.hold_id)
            for each in tree.known_holds()
            if each.hold_id not in held
        ]

    # -- What is asked for ------------------------------------------------------------------------

    def _reserve(self, node: Node, _: HoldRef | None) -> Operation:
        # Some are due to lapse while operations still go on.
        ttl = self._random.choice((SECOND, 600 * SECOND))
        return node.reserve(self._amount(), ttl_us=ttl, **self._asked())

    def _settle(self, _: Node, hold: HoldRef | None) -> Operation | None:
        if hold is None:
            return None
        # Sometimes more than was held, sometimes beyond what may be booked at all.
        actual = hold.hold.remaining * self._random.choice((0, 1, 1, 1, 2, 5))
        estimated = self._random.random() < 0.3
        keep_open = self._random.random() < 0.3
        return hold.settle(actual, keep_open=keep_open, estimated=estimated, **self._booked())

    def _release(self, _: Node, hold: HoldRef | None) -> Operation | None:
        return None if hold is None else hold.release(**self._asked())

    def _extend(self, _: Node, hold: HoldRef | None) -> Operation | None:
        return None if hold is None else hold.extend(**self._asked())

    def _lapse(self, _: Node, __: HoldRef | None) -> Operation | None:
        due = [
            each
            for each in self.holds
            if each.hold.state is HoldState.LIVE and each.hold.expires_at <= self.ledger.now
        ]
        return self._random.choice(due).lapse() if due else None

    def _spend(self, node: Node, _: HoldRef | None) -> Operation:
        return node.spend(self._amount(), **self._booked())

    def _delegate(self, node: Node, _: HoldRef | None) -> Operation | None:
        if len(self.nodes) >= BUDGETS_MAX or len(node.budget.ancestors) >= DEPTH:
            return None
        leases: dict[str, Any] = self._random.choice(
            ({}, {"lease_us": SECOND}, {"lease_us": 3_600 * SECOND})
        )
        children = [
            node.spec(
                10 * self._amount(),
                labels=self._labels(),
                overrun_factor=self._random.choice((0, 1, 3)),
                **self._held(),
                **leases,
            )
            for _ in range(self._random.choice((1, 1, 2)))
        ]
        return node.delegate(*children, **self._asked())

    def _accept(self, node: Node, _: HoldRef | None) -> Operation | None:
        if node.budget.custody is Custody.PRINCIPAL:
            return None
        return node.accept(**self._asked())

    def _recover(self, node: Node, hold: HoldRef | None) -> Operation | None:
        if self._random.random() < 0.5:
            changes: dict[str, Any] = {"holder": self._random.choice(PRINCIPALS)}
            if self._random.random() < 0.5:
                changes["next_token_id"] = None
            return node.admin_recover(**changes, **self._asked())
        if hold is None or node.budget.custody is Custody.PRINCIPAL or node.budget.holder is None:
            return None
        return hold.node.recover(holds=(hold.rotation(),), **self._asked())

    def _fund(self, node: Node, _: HoldRef | None) -> Operation | None:
        above = node.budget.ancestors
        if not above:
            return None
        by = Node(self.ledger, node.root_id, self._random.choice(above))
        return by.fund(node, self._amount(), **self._asked())

    def _renew(self, node: Node, _: HoldRef | None) -> Operation:
        return node.renew(3_600 * SECOND, **self._asked())

    def _give_back(self, node: Node, _: HoldRef | None) -> Operation:
        return node.give_back(self._amount(), **self._asked())

    def _return_all(self, node: Node, _: HoldRef | None) -> Operation:
        return node.return_all(cascade=True, **self._asked())

    def _revoke(self, node: Node, _: HoldRef | None) -> Operation | None:
        above = node.budget.ancestors
        if not above:
            return None
        by = Node(self.ledger, node.root_id, self._random.choice(above))
        return by.revoke(node, **self._asked())

    def _top_up(self, node: Node, _: HoldRef | None) -> Operation:
        root = Node(self.ledger, node.root_id, node.root_id)
        return root.top_up(self._amount(), **self._asked())

    def _withdraw(self, node: Node, _: HoldRef | None) -> Operation:
        root = Node(self.ledger, node.root_id, node.root_id)
        return root.withdraw(self._amount(), **self._asked())

    def _freeze(self, node: Node, _: HoldRef | None) -> Operation | None:
        return node.freeze(**self._asked()) if node.budget.ancestors else None

    def _unfreeze(self, _: Node, __: HoldRef | None) -> Operation | None:
        frozen = [each for each in self.nodes if each.budget.frozen]
        return self._random.choice(frozen).unfreeze(**self._asked()) if frozen else None

    def _resolve(self, _: Node, hold: HoldRef | None) -> Operation | None:
        disputed = [each for each in self.holds if each.hold.state is HoldState.DISPUTED]
        if disputed:
            hold = self._random.choice(disputed)
            return hold.node.admin_resolve(hold, self._amount(), **self._asked())
        if hold is None:
            return None
        return hold.node.resolve(hold, self._amount(), **self._asked())

    def _expire(self, _: Node, __: HoldRef | None) -> Operation | None:
        now = self.ledger.now
        ended = [each for each in self.nodes if each.budget.state(now) is BudgetState.EXPIRED]
        return self._random.choice(ended).expire() if ended else None

    def _collect(self, node: Node, _: HoldRef | None) -> Operation:
        return node.collect()

    # -- Choices ----------------------------------------------------------------------------------

    def _node(self) -> Node:
        """Any budget, most often one that is open."""
        now = self.ledger.now
        usable = [each for each in self.nodes if each.budget.state(now) is BudgetState.OPEN]
        return self._random.choice(usable if usable and self._random.random() < 0.8 else self.nodes)

    def _amount(self) -> int:
        return self._random.randint(1, 500)

    def _labels(self) -> Any:
        return self._random.choice(LABELS)

    def _asked(self) -> dict[str, Any]:
        return {"labels": self._labels(), "trace_id": self._random.choice(TRACES)}

    def _booked(self) -> dict[str, Any]:
        """What is said of a call that cost something."""
        said = {"reference": self._random.choice(REFERENCES), "usage": self._random.choice(USAGES)}
        return self._asked() | said

    def _held(self) -> dict[str, Any]:
        """By a token of whoever has it, by one of a principal, or by a principal's name."""
        return self._random.choice(
            (
                {},
                {"holder": self._random.choice(PRINCIPALS)},
                {"holder": self._random.choice(PRINCIPALS), "by_token": False},
            )
        )


def _abandoned(ref: HoldRef) -> bool:
    """Say whether a hold is left alone until it has lapsed."""
    hold = ref.hold
    return hold.state is HoldState.LIVE and hold.expires_at - hold.created_at <= SECOND


_WEIGHTS = {
    "reserve": 12,
    "settle": 10,
    "release": 2,
    "extend": 2,
    "lapse": 4,
    "spend": 5,
    "delegate": 6,
    "accept": 3,
    "recover": 2,
    "fund": 3,
    "renew": 1,
    "give_back": 2,
    "return_all": 0.5,
    "revoke": 0.7,
    "top_up": 1,
    "withdraw": 1,
    "freeze": 0.7,
    "unfreeze": 1.5,
    "resolve": 2,
    "expire": 1,
    "collect": 1,
}
