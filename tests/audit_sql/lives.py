"""Random ledgers in which much has happened, over weeks, in several trees."""

from __future__ import annotations

import random
from collections.abc import Callable

from peculium_server.core.operations import Labels, Operation, Usage
from tests.core.every_kind import lived
from tests.core.ledger import DAY, HOUR, MINUTE, HoldRef, Ledger, Node

STEPS = 400
LABELS: tuple[Labels, ...] = (
    (),
    (),
    (("run", "7"),),
    (("model", "labelled"), ("run", "8")),
    (("team", "größe"),),
)
USAGES = (
    None,
    Usage(),
    Usage(provider="p", model="m", input_tokens=3, output_tokens=2, cached_tokens=1),
    Usage(provider="q", input_tokens=2**53),
)


class Life:
    """Does random operations; those that are refused leave nothing behind."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.ledger, first = lived()
        self.nodes = [first]
        self.holds: list[HoldRef] = []
        self.ledger.eager = 1
        for _ in range(2):
            labels = self.random.choice(LABELS)
            self.nodes.append(self.ledger.grant(10**9, holder="treasurer", labels=labels))

    def live(self) -> Ledger:
        """Do all of it."""
        steps: list[tuple[int, Callable[[], Operation | None]]] = [
            (8, self._reserve),
            (6, self._settle),
            (5, self._spend),
            (4, self._delegate),
            (3, self._end),
            (2, self._move),
            (2, self._hand_over),
            (1, self._close),
            (3, self._system),
            (1, self._admin),
        ]
        weights, makers = zip(*steps, strict=True)
        for _ in range(STEPS):
            (make,) = self.random.choices(makers, weights)
            operation = make()
            if operation is not None:
                self.ledger.ask(operation)
            self.ledger.pass_time(self.random.choice([0, MINUTE, HOUR, 3 * HOUR]))
        return self.ledger

    def _node(self) -> Node:
        return self.random.choice(self.nodes)

    def _hold(self) -> HoldRef:
        open_ones = [hold for hold in self.holds if hold.hold.settleable]
        return self.random.choice(open_ones or self.holds)

    def _amount(self) -> int:
        return self.random.choice([1, 7, 50, 1_000])

    def _trace(self) -> bytes | None:
        return self.random.choice([None, bytes(15) + b"\x01", bytes(range(16))])

    def _labels(self) -> Labels:
        return self.random.choice(LABELS)

    def _reserve(self) -> None:
        node = self._node()
        reserve = node.reserve(self._amount(), labels=self._labels(), trace_id=self._trace())
        self.ledger.ask(reserve)
        if node.tree.holds[reserve.hold_id] is not None:
            self.holds.append(HoldRef(node, reserve.hold_id))

    def _settle(self) -> Operation | None:
        if not self.holds:
            return None
        return self._hold().settle(
            self.random.choice([None, 0, 3, 40, 500, 2_000]),
            labels=self._labels(),
            usage=self.random.choice(USAGES),
            estimated=self.random.random() < 0.3,
            reference=self.random.choice(["", "call-1", 'é"\\\u2028']),
            trace_id=self._trace(),
        )

    def _spend(self) -> Operation:
        return self._node().spend(
            self._amount(), labels=self._labels(), usage=self.random.choice(USAGES)
        )

    def _delegate(self) -> None:
        node = self._node()
        specs = [
            node.spec(
                self._amount() * 20,
                by_token=self.random.random() < 0.7,
                holder=self.random.choice(["agent", "other"]),
                labels=self._labels(),
                lease_us=self.random.choice([None, 6 * HOUR, 30 * DAY]),
                overrun_factor=self.random.choice([0, 1, 30]),
            )
            for _ in range(self.random.choice([1, 1, 2]))
        ]
        self.ledger.ask(node.delegate(*specs, trace_id=self._trace()))
        self.nodes += [
            Node(self.ledger, node.root_id, spec.budget_id)
            for spec in specs
            if node.tree.budgets[spec.budget_id] is not None
        ]

    def _end(self) -> Operation | None:
        if not self.holds:
            return None
        hold = self._hold()
        makers: list[Callable[[], Operation]] = [
            hold.release,
            hold.extend,
            hold.lapse,
            lambda: hold.node.resolve(hold, 60),
            lambda: hold.node.admin_resolve(hold, 90),
        ]
        return self.random.choice(makers)()

    def _move(self) -> Operation:
        node, other = self._node(), self._node()
        makers: list[Callable[[], Operation]] = [
            lambda: node.fund(other, self._amount()),
            lambda: node.give_back(self._amount()),
            lambda: node.top_up(self._amount()),
            lambda: node.withdraw(self._amount()),
            lambda: node.renew(9 * HOUR),
        ]
        return self.random.choice(makers)()

    def _hand_over(self) -> Operation:
        node = self._node()
        rotated = [hold for hold in self.holds if hold.node == node and hold.hold.settleable]
        rotations = tuple(hold.rotation() for hold in rotated[:2])
        makers: list[Callable[[], Operation]] = [
            node.accept,
            lambda: node.recover(holds=rotations),
            lambda: node.admin_recover(holder="agent"),
        ]
        return self.random.choice(makers)()

    def _close(self) -> Operation:
        node, other = self._node(), self._node()
        makers: list[Callable[[], Operation]] = [
            lambda: node.revoke(other),
            lambda: node.return_all(cascade=True),
        ]
        return self.random.choice(makers)()

    def _system(self) -> Operation:
        node = self._node()
        makers: list[Callable[[], Operation]] = [node.expire, node.collect]
        return self.random.choice(makers)()

    def _admin(self) -> Operation:
        node = self._node()
        if self.random.random() < 1 / 3:
            return node.freeze(reason="audit")
        return node.unfreeze(reason="audit")
