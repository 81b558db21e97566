"""A ledger that is kept twice, in memory and in a store, and has to be the same in both.

Whatever a store loads for a transaction is compared with what the whole tree in memory has under the
same keys, so that every column of every row makes the journey out and back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from typing import Any

from peculium_server.core.batch import Request, decide_group
from peculium_server.core.footprint import Footprint
from peculium_server.core.operations import Operation
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refused
from peculium_server.core.state import Accepted, Recorded, Tree
from peculium_server.core.verify import Finding, Verifier
from peculium_server.store.lane import Loaded
from peculium_server.store.store import Store
from tests.core.ledger import Answer, Ledger, Node


class StoredLedger(Ledger):
    """One tree, of which every transaction is done twice."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.now = time.time_ns() // 1000

    async def root(self, amount: int = 1_000_000, **changes: Any) -> Node:
        """Make the tree's root."""
        grant = self.ask_grant(amount, **changes)
        await self.accept(grant)
        return Node(self, grant.root_id, grant.root_id)

    async def below(self, node: Node, amount: int = 1_000, **changes: Any) -> Node:
        """Delegate to one child."""
        child = node.spec(amount, **changes)
        await self.accept(node.delegate(child))
        return Node(self, node.root_id, child.budget_id)

    async def accept(self, *operations: Operation) -> list[Outcome]:
        """Ask for operations as one request, all of which have to be accepted."""
        outcomes = []
        for answer in await self.request(*operations):
            assert isinstance(answer, Outcome), answer.message
            outcomes.append(answer)
        return outcomes

    async def refused(self, operation: Operation) -> Refused:
        """Ask for an operation that has to be refused."""
        [answer] = await self.request(operation)
        assert isinstance(answer, Refused)
        return answer

    async def request(self, *operations: Operation) -> list[Answer]:
        """Ask for operations as one request, in a transaction of their own."""
        answers: list[Answer] = []
        accepted: list[Accepted] = []
        # A guess may be decided on before; the last decision is the one that counts.
        told: dict[bytes, dict[str, Any]] = {}
        expected: dict[bytes, dict[str, Any]] = {}

        def decide(loaded: Loaded) -> Sequence[Accepted]:
            assert loaded.position == self.position
            self.now = loaded.now
            told.update({root: comparable(tree) for root, tree in loaded.trees.items()})
            known = self.load(operations)
            expected.update({root: comparable(tree) for root, tree in known.items()})
            group = [
                Request(operation, self.actor(operation), index)
                for index, operation in enumerate(operations)
            ]
            answers[:], accepted[:] = decide_group(loaded.trees, group, loaded.now, loaded.position)
            return accepted

        footprints: dict[bytes, Footprint] = {}
        for operation in operations:
            footprints.setdefault(operation.root_id, Footprint()).add(operation)
        lane = self.store.lane_of(operations[0].root_id)
        position = await self.store.writer(lane).run(footprints, decide, None)
        assert told == expected
        for each in accepted:
            self.commit(each)
        assert position == self.position
        return answers

    async def verified(self, root_id: bytes) -> Finding | None:
        """What an auditor finds in the store."""
        verifier = Verifier(root_id)
        async with self.store.snapshot() as snapshot:
            async for entry in snapshot.entries_in_order(root_id):
                verifier.entry(entry)
            async for budget in snapshot.budgets_of(root_id):
                verifier.budget(budget)
            async for hold in snapshot.holds_of(root_id):
                verifier.hold(hold)
        assert verifier.entries == sum(entry.root_id == root_id for entry in self.journal)
        return verifier.finish()


def comparable(tree: Tree) -> dict[str, Any]:
    """All that a tree tells, without what a store leaves out or may choose."""
    told = {name: copy(known) for name, known in vars(tree).items()}
    told["recorded"] = {
        key: recorded and _without_chain(recorded) for key, recorded in tree.recorded.items()
    }
    # Any open child that is not known will do.
    told["open_child"] = {top: child is not None for top, child in tree.open_child.items()}
    return told


def _without_chain(recorded: Recorded) -> Recorded:
    entries = tuple(entry._replace(previous_hash=b"") for entry in recorded.entries)
    return recorded._replace(entries=entries)
