"""What checkpoints have sealed, compared with the entries of an export, which were read before them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from peculium_server.core.checkpoint import RULE, Chain, Leaf, SignatureCheck, key_id_of
from peculium_server.core.offline.fold import Folded
from peculium_server.core.offline.records import Header, SealedBy
from peculium_server.core.offline.tree import TreeAudit
from peculium_server.core.verify import Finding


class SealAudit:
    """Checks the checkpoints of an export. Feed each with its leaves, in order; then ask `finish`."""

    def __init__(
        self,
        header: Header,
        trees: Mapping[bytes, TreeAudit],
        public_keys: Mapping[bytes, bytes] | None,
        is_signed: SignatureCheck,
    ) -> None:
        """Begin with no checkpoint.

        Args:
            header: The export's last one.
            trees: All that was read.
            public_keys: Those that are trusted, by their ids; None: those that the ledger names.
            is_signed: Checks signatures.
        """
        self._header = header
        self._trees = trees
        self._told_keys: dict[bytes, bytes] = {}
        keys = self._told_keys if public_keys is None else public_keys
        self._chain = Chain(
            header.incarnation,
            len(header.positions),
            keys,
            is_signed,
            earlier=header.earlier_incarnations,
        )
        self._finding: Finding | None = None
        self._number = 0
        self._before: Sequence[int] = [0] * len(header.positions)
        self._positions: Sequence[int] = self._before

    def checkpoint(self, record: SealedBy) -> None:
        """Take the next checkpoint."""
        if key_id_of(record.public_key) == record.sealed.key_id:
            self._told_keys[record.sealed.key_id] = record.public_key
        self._chain.checkpoint(record.sealed)
        if self._chain.finding is not None:
            return
        checkpoint = record.sealed.checkpoint
        self._number = checkpoint.number
        self._before, self._positions = self._positions, checkpoint.positions
        for lane, (sealed, there) in enumerate(
            zip(self._positions, self._header.positions, strict=True)
        ):
            if sealed > there:
                self._say(f"it seals lane {lane} up to {sealed}, which ends at {there}")

    def leaf(self, number: int, leaf: Leaf) -> None:
        """Take the next leaf of the checkpoint before."""
        if self._chain.finding is not None:
            return
        if number != self._number:
            self._say(f"a leaf of checkpoint {number} is among its leaves")
            return
        self._chain.leaf(leaf)
        if self._header.root_id not in (None, leaf.root_id) or self._chain.finding is not None:
            return
        tree = self._trees.get(leaf.root_id)
        budget = None if tree is None else tree.budgets.get(leaf.budget_id)
        if budget is None or tree is None:
            if tree is None or tree.finding is None:
                self._found(leaf, leaf.seq, f"was sealed by checkpoint {number}, and is missing")
            return
        if tree.finding is None:
            self._compare(budget, leaf, tree.lane)
            budget.sealed = leaf.seq

    def _compare(self, budget: Folded, leaf: Leaf, lane: int) -> None:
        number, positions, sealed = self._number, budget.positions, budget.sealed
        now = bisect_right(positions, self._positions[lane])
        if sealed < len(positions) and positions[sealed] <= self._before[lane]:
            missing = f"is not sealed by checkpoint {number - 1}"
            self._found(leaf, sealed + 1, missing)
        elif now < leaf.seq:
            self._found(leaf, now + 1, f"was sealed by checkpoint {number}, and is missing")
        elif now > leaf.seq:
            there = f"was not there when checkpoint {number} was sealed"
            self._found(leaf, leaf.seq + 1, there)
        elif budget.hash_at(leaf.seq) != leaf.head:
            other = f"has another hash than checkpoint {number} has sealed"
            if sealed + 1 < leaf.seq:
                other += f": it, or one from {sealed + 1} on, was altered"
            self._found(leaf, leaf.seq, other)

    def finish(self) -> tuple[Finding | None, int]:
        """The first finding, and how many entries nothing has sealed yet."""
        finding = self._chain.finish()
        if self._finding is not None and (finding is None or finding.root_id == b""):
            finding = self._finding
        unsealed = 0
        for root_id, tree in self._trees.items():
            sealed_to = self._positions[tree.lane]
            for budget in tree.budgets.values():
                sealed = bisect_right(budget.positions, sealed_to)
                unsealed += budget.seq - sealed
                if sealed > budget.sealed and finding is None and tree.finding is None:
                    leaf = Leaf(root_id, budget.budget_id, budget.sealed + 1, b"")
                    self._found(leaf, leaf.seq, f"is not sealed by checkpoint {self._number}")
                    finding = self._finding
        return finding, unsealed

    def _found(self, leaf: Leaf, seq: int, problem: str) -> None:
        if self._finding is None:
            detail = f"entry {seq} of the budget {problem}"
            self._finding = Finding(leaf.root_id, leaf.budget_id, seq, RULE, detail)

    def _say(self, problem: str) -> None:
        if self._finding is None:
            self._finding = Finding(b"", b"", 0, RULE, f"checkpoint {self._number}: {problem}")
