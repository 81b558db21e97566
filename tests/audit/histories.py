"""Random histories of one tree, made by the rules in memory."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

from peculium_server.core.operations import Operation
from peculium_server.core.outcome import Outcome
from tests.audit.world import USAGES
from tests.core.ledger import DAY, HOUR, MINUTE, START, HoldRef, Ledger, Node

_numbers = itertools.count(1)

LABELS = ((), (), (("run", "7"),), (("model", "m-2"), ("run", "8")), (("team", ""),))
STEPS_US = (0, 0, 1, MINUTE, 11 * MINUTE, 7 * HOUR, DAY)


class History:
    """A tree that grows by random operations, some of which are refused."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)  # noqa: S311 - histories, not secrets
        self.ledger = Ledger(eager=random.choice((0, 1, 100)), checked=False)
        # Ids have the time in them: no two histories share one.
        self.ledger.now = START + next(_numbers) * 100 * DAY
        root = self.ledger.grant(random.choice((100, 1_000)), labels=random.choice(LABELS))
        self.nodes = [root]
        self.holds: list[HoldRef] = []

    @property
    def root_id(self) -> bytes:
        return self.nodes[0].root_id

    def grow(self, steps: int) -> None:
        """Try so many operations."""
        for _ in range(steps):
            self.ledger.pass_time(self.random.choice(STEPS_US))
            self._step()

    def times(self) -> list[int]:
        """Times at which, and directly before and after which, something was decided."""
        at = sorted({entry.at for entry in self.ledger.journal})
        return [moment + aside for moment in at for aside in (-1, 0, 1)]

    def _step(self) -> None:
        some, random = self.random.choice, self.random
        node, amount, labels = some(self.nodes), some((1, 5, 30, 200)), some(LABELS)
        said = {"labels": labels, "usage": some(USAGES)}
        roll = random.randrange(20)
        if roll < 4:
            reserve = node.reserve(amount, ttl_us=some((MINUTE, 10 * MINUTE)), labels=labels)
            if self._ask(reserve):
                self.holds.append(HoldRef(node, reserve.hold_id))
        elif roll < 6:
            self._ask(node.spend(amount, **said))
        elif roll < 9:
            specs = [
                node.spec(
                    some((0, 10, 50)),
                    labels=some(LABELS),
                    lease_us=some((None, HOUR)),
                    overrun_factor=some((0, 1, 3)),
                )
                for _ in range(some((1, 1, 3)))
            ]
            if self._ask(node.delegate(*specs)):
                self.nodes += [Node(self.ledger, node.root_id, spec.budget_id) for spec in specs]
        elif roll < 16 and self.holds:
            live = [hold for hold in self.holds if hold.hold.settleable]
            self._end(some(live or self.holds), amount, said)
        else:
            self._ask(self._other(node, some(self.nodes), amount))

    def _end(self, hold: HoldRef, amount: int, said: dict[str, Any]) -> None:
        some, labels = self.random.choice, said["labels"]
        makers = (
            lambda: hold.settle(some((None, 0, amount)), estimated=some((False, True)), **said),
            lambda: hold.settle(amount, keep_open=True, **said),
            lambda: hold.release(labels=labels),
            lambda: hold.node.admin_resolve(hold, amount, labels=labels),
            lambda: hold.node.resolve(hold, amount),
        )
        if not self._ask(hold.lapse()) or some((True, False)):
            self._ask(some(makers)())

    def _other(self, node: Node, other: Node, amount: int) -> Operation:
        makers = (
            lambda: self.nodes[0].top_up(amount),
            lambda: self.nodes[0].withdraw(amount),
            lambda: node.fund(other, amount),
            lambda: node.give_back(amount),
            lambda: node.return_all(cascade=True),
            lambda: node.revoke(other),
            node.expire,
            node.collect,
            node.freeze,
            node.unfreeze,
            node.accept,
        )
        return self.random.choice(makers)()

    def _ask(self, operation: Operation) -> bool:
        return isinstance(self.ledger.ask(operation), Outcome)
