"""Write the export of a large ledger that never was: `python -m tests.archive.generate FILE --entries 1000000`.

The rules of the core decide every operation, so that it verifies: trees of teams and runs that reserve,
settle, spend and lapse. They are sealed as a server seals, with a key and, from the middle on, with the one
that followed it; the public keys are written beside the file.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peculium_server.archive import lines
from peculium_server.core.checkpoint import Leaf, Sealed
from peculium_server.core.encoding import token_id
from peculium_server.core.lanes import lane_of
from peculium_server.core.merkle import Growing
from peculium_server.core.offline.records import (
    Counts,
    Header,
    LeafOf,
    Record,
    Recorded,
    SealedBy,
)
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
from peculium_server.core.sealing import sealed_after
from peculium_server.core.state import Accepted, Entry
from peculium_server.core.sweeping import lapse
from peculium_server.sealer import OPERATIONS_MAX
from peculium_server.signing import SigningKey, public_pem
from tests.core.checkpoints import INCARNATION, KEY, OTHER_KEY
from tests.core.ledger import MINUTE, SECOND, START, WholeTree
from tests.core.offline.exported import budget_row, hold_row

LANES = 16
RUNS = 20
OPERATION_US = SECOND // 100
"""A hundred operations a second: a million are recorded in less than three hours."""
SEALED_EVERY_US = MINUTE
"""As `seal_seconds` is if nobody sets it."""
KEYS = (SigningKey(KEY), SigningKey(OTHER_KEY))
AGENT = Actor("agent-7", Role.AGENT)
ADMIN = Actor("admin", Role.ADMIN)
LABELS = (("model", "gpt-5"), ("run", "run-0042"), ("team", "research"))


class Seals:
    """What is sealed of the ledger while it is made."""

    def __init__(self) -> None:
        self.key = KEYS[0]
        self.records: list[SealedBy | LeafOf] = []
        self.checkpoints = 0
        self._last: Sealed | None = None
        self._last_at = START
        self._moved: dict[tuple[bytes, bytes], Leaf] = {}
        self._operations = 0

    def take(self, entries: Sequence[Entry], now: int, positions: Sequence[int]) -> None:
        """Take the next operation's entries, and seal if it is time, or there are many."""
        for entry in entries:
            budget = entry.root_id, entry.budget_id
            self._moved[budget] = Leaf(*budget, entry.seq, entry.hash)
        self._operations += 1
        if now - self._last_at >= SEALED_EVERY_US or self._operations == OPERATIONS_MAX:
            self._seal(now, positions)

    def _seal(self, now: int, positions: Sequence[int]) -> None:
        leaves = sorted(self._moved.values())
        merkle = Growing()
        for leaf in leaves:
            merkle.add(leaf.hash())
        self._last = sealed_after(
            self._last,
            now=now,
            incarnation=INCARNATION,
            positions=positions,
            merkle_root=merkle.root(),
            leaves=len(leaves),
            key_id=self.key.key_id,
            sign=self.key.sign,
        )
        self.checkpoints += 1
        self.records.append(SealedBy(self._last, self.key.public_key))
        self.records += [LeafOf(self.checkpoints, leaf) for leaf in leaves]
        self._last_at, self._operations = now, 0
        self._moved.clear()


class Made:
    """The ledger while it is made."""

    def __init__(self, seed: int, operation_us: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - for tests
        self.now = START
        self.operation_us = operation_us
        self.positions = [0] * LANES
        self.trees: dict[bytes, WholeTree] = {}
        self.lanes: list[list[Entry]] = [[] for _ in range(LANES)]
        self.entries = 0
        self.seals = Seals()
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
        self.now += self.operation_us
        self.positions[lane] += 1
        accepted = decide(tree, operation, actor, self.now, self.positions[lane])
        assert isinstance(accepted, Accepted), accepted
        tree.apply(accepted)
        tree.recorded.clear()
        self.lanes[lane] += accepted.entries
        self.entries += len(accepted.entries)
        self.seals.take(accepted.entries, self.now, self.positions)

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
        self.now += 15 * MINUTE
        for root_id, tree in self.trees.items():
            for hold in [each for each in tree.known_holds() if each.remaining]:
                self.do(lapse(root_id, hold.budget_id, hold.hold_id), SYSTEM)

    def records(self) -> Iterator[Record]:
        """The export."""
        yield Header(1, INCARNATION, self.now, tuple(self.positions), None)
        for lane, entries in enumerate(self.lanes):
            for entry in entries:
                yield Recorded(lane, entry)
        budgets = [budget for tree in self.trees.values() for budget in tree.known_budgets()]
        yield from map(budget_row, budgets)
        holds = [
            (root_id, hold) for root_id, tree in self.trees.items() for hold in tree.known_holds()
        ]
        for root_id, hold in holds:
            yield hold_row(root_id, hold)
        yield from self.seals.records
        yield Counts(self.entries, len(budgets), len(holds), self.seals.checkpoints)


def made(entries: int, seed: int = 0, *, trees: int = 50, operation_us: int = OPERATION_US) -> Made:
    """A ledger of so many entries or a few more, an operation after the other at equal distances."""
    ledger = Made(seed, operation_us)
    runs = [
        (root_id, run) for root_id, below in (ledger.tree() for _ in range(trees)) for run in below
    ]
    while ledger.entries < entries:
        if ledger.entries > entries // 2:
            ledger.seals.key = KEYS[1]
        ledger.call(*ledger.random.choice(runs))
    ledger.lapse_all()
    return ledger


def write(ledger: Made, path: Path) -> list[Path]:
    """Write the export, and beside it the public keys that its checkpoints are signed with: their files."""
    with path.open("w") as file:
        for record in ledger.records():
            file.write(lines.write(record) + "\n")
    keys = [path.with_name(f"{path.name}.key-{number}.pem") for number in range(1, len(KEYS) + 1)]
    for key, its_path in zip(KEYS, keys, strict=True):
        its_path.write_text(public_pem(key.public_key))
    return keys


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    write(made(asked.entries, asked.seed), asked.file)


if __name__ == "__main__":
    main()
