"""Write the export of a large ledger that never was: `python -m tests.archive.generate FILE --entries 1000000`.

The rules of the core decide every operation, so that it verifies: trees of teams and runs that reserve,
settle, spend and lapse.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peculium_server.archive import lines
from peculium_server.core.encoding import token_id
from peculium_server.core.lanes import lane_of
from peculium_server.core.offline.records import Counts, Header, Recorded
from peculium_server.core.operations import (
    SYSTEM,
    Actor,
    ByRole,
    ByToken,
    Child,
    Delegate,
    Grant,
    Operation,
    Reserve,
    Role,
    Settle,
    Spend,
    Usage,
)
from peculium_server.core.rules import decide
from peculium_server.core.state import Accepted, Entry
from peculium_server.core.sweeping import lapse
from tests.core.ledger import WholeTree
from tests.core.offline.exported import budget_row, hold_row

LANES = 16
RUNS = 20
START = 1_800_000_000_000_000
AGENT = Actor("agent-7", Role.AGENT)
ADMIN = Actor("admin", Role.ADMIN)
LABELS = (("model", "gpt-5"), ("run", "run-0042"), ("team", "research"))


class Made:
    """The ledger while it is made."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - for tests
        self.now = START
        self.positions = [0] * LANES
        self.trees: dict[bytes, WholeTree] = {}
        self.lanes: list[list[Entry]] = [[] for _ in range(LANES)]
        self.entries = 0
        self._made = 0

    def id(self) -> bytes:
        self._made += 1
        low = self._made.to_bytes(9)
        return (self.now // 1000).to_bytes(6) + bytes((0x70, low[0], 0x80)) + low[2:]

    def token(self) -> bytes:
        self._made += 1
        return token_id(self._made.to_bytes(32))

    def do(self, operation: Operation, actor: Actor = AGENT) -> None:
        tree = self.trees.setdefault(operation.root_id, WholeTree(operation.root_id))
        lane = lane_of(operation.root_id, LANES)
        self.now += 1_000
        self.positions[lane] += 1
        accepted = decide(tree, operation, actor, self.now, self.positions[lane])
        assert isinstance(accepted, Accepted), accepted
        tree.apply(accepted)
        tree.recorded.clear()
        self.lanes[lane] += accepted.entries
        self.entries += len(accepted.entries)

    def tree(self) -> tuple[bytes, list[bytes]]:
        """A root with runs below it."""
        root_id = self.id()
        self.do(
            Grant(
                operation_id=self.id(),
                root_id=root_id,
                budget_id=root_id,
                authority=ByRole(),
                name=f"root-{len(self.trees)}",
                unit="usd_nanos",
                amount=10**15,
                token_id=self.token(),
            ),
            ADMIN,
        )
        parent, children = root_id, tuple[Child, ...]()
        for depth in range(2):
            children = tuple(
                Child(
                    budget_id=self.id(),
                    name=f"run-{number}",
                    amount=10 ** (13 - 2 * depth),
                    token_id=self.token(),
                    lease_us=30 * 86_400 * 10**6,
                    labels=LABELS[:1],
                )
                for number in range(RUNS)
            )
            self.do(
                Delegate(
                    **self._header(root_id, parent), next_token_id=self.token(), children=children
                )
            )
            parent = children[0].budget_id
        return root_id, [child.budget_id for child in children]

    def _header(self, root_id: bytes, budget_id: bytes) -> dict[str, Any]:
        token = self.trees[root_id].budget(budget_id).token
        assert token is not None
        return {
            "operation_id": self.id(),
            "root_id": root_id,
            "budget_id": budget_id,
            "authority": ByToken(token),
        }

    def call(self, root_id: bytes, budget_id: bytes) -> None:
        """What an agent does for one call of a model."""
        dice = self.random.random()
        if dice < 0.1:
            self.do(
                Spend(
                    **self._header(root_id, budget_id),
                    amount=1_000,
                    next_token_id=self.token(),
                    reference=f"call-{self._made}",
                )
            )
            return
        hold_id, hold_token = self.id(), self.token()
        trace_id = self.random.randbytes(16)
        self.do(
            Reserve(
                **self._header(root_id, budget_id),
                labels=LABELS,
                trace_id=trace_id,
                amount=2_000_000,
                ttl_us=600 * 10**6,
                next_token_id=self.token(),
                hold_id=hold_id,
                hold_token_id=hold_token,
            )
        )
        if dice < 0.15:
            return
        self.do(
            Settle(
                operation_id=self.id(),
                root_id=root_id,
                budget_id=budget_id,
                authority=ByToken(hold_token),
                labels=LABELS,
                trace_id=trace_id,
                hold_id=hold_id,
                actual=self.random.randrange(2_100_000),
                reference=f"chatcmpl-{self._made}",
                usage=Usage("openai", "gpt-5", 1_200, 300, 100),
            )
        )

    def lapse_all(self) -> None:
        """The time of all holds that are left is over."""
        self.now += 700 * 10**6
        for root_id, tree in self.trees.items():
            for hold in [each for each in tree.known_holds() if each.remaining]:
                self.do(lapse(root_id, hold.budget_id, hold.hold_id), SYSTEM)

    def records(self) -> Iterator[str]:
        """The export."""
        yield lines.write(Header(1, bytes(16), self.now, tuple(self.positions), None))
        for lane, entries in enumerate(self.lanes):
            for entry in entries:
                yield lines.write(Recorded(lane, entry))
        budgets = [budget for tree in self.trees.values() for budget in tree.known_budgets()]
        for budget in budgets:
            yield lines.write(budget_row(budget))
        holds = [
            (root_id, hold) for root_id, tree in self.trees.items() for hold in tree.known_holds()
        ]
        for root_id, hold in holds:
            yield lines.write(hold_row(root_id, hold))
        yield lines.write(Counts(self.entries, len(budgets), len(holds), 0))


def made(entries: int, seed: int = 0, trees: int = 50) -> Made:
    """A ledger of so many entries or a few more."""
    ledger = Made(seed)
    runs = [
        (root_id, run) for root_id, below in (ledger.tree() for _ in range(trees)) for run in below
    ]
    while ledger.entries < entries:
        ledger.call(*ledger.random.choice(runs))
    ledger.lapse_all()
    return ledger


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with asked.file.open("w") as file:
        for line in made(asked.entries, asked.seed).records():
            file.write(line + "\n")


if __name__ == "__main__":
    main()
