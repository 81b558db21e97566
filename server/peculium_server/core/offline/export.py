"""A whole export: its lanes, their trees, and that nothing of them is missing.

Beside the rules of `tree` it has these:

- "lane", "position", "parts": a tree is in its lane; in a lane positions ascend, in a whole ledger's
  export without a gap, and an operation's entries stand together
- "batch": of an atomic batch all operations were recorded
- "decision": decided again, an operation leaves the same entries (with `decide`)
- "checkpoint": see `seals`
- "header", "trailer": the export says of itself what is true
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from peculium_server.core.checkpoint import Published, SignatureCheck
from peculium_server.core.encoding import ENCODING_VERSION
from peculium_server.core.lanes import lane_of
from peculium_server.core.offline.records import Counts, Header, LeafOf, SealedBy
from peculium_server.core.offline.rules import Broken
from peculium_server.core.offline.seals import SealAudit
from peculium_server.core.offline.tree import TreeAudit
from peculium_server.core.operations import AtomicBatch
from peculium_server.core.refusals import id_text
from peculium_server.core.state import Budget, Entry, Hold
from peculium_server.core.verify import Finding, Verifier


class _Batch(NamedTuple):
    """An atomic batch of which something is still to come."""

    first: Entry
    missing: int


class ExportAudit:
    """Checks an export. Feed its records in their order, then ask `finish`.

    Memory grows with the budgets, holds and tokens, and by a hash for each entry.
    """

    def __init__(
        self,
        *,
        public_keys: Mapping[bytes, bytes] | None,
        is_signed: SignatureCheck,
        decide: bool = False,
        published: Mapping[int, bytes] | None = None,
    ) -> None:
        """Begin with the header.

        Args:
            public_keys: Those that are trusted, by their ids; None: those that the ledger names itself.
            is_signed: Checks signatures.
            decide: Make every decision again too.
            published: Hashes of checkpoints that are known from elsewhere, by their numbers.
        """
        self.entries = 0
        self.budgets = 0
        self.holds = 0
        self.checkpoints = 0
        self.unsealed: int | None = None
        """After `finish`: entries that nothing has sealed yet; None: there is no checkpoint."""
        self._public_keys = public_keys
        self._is_signed = is_signed
        self._published = Published(published or {})
        self._seals: SealAudit | None = None
        self.trees: dict[bytes, TreeAudit] = {}
        self._decide = decide
        self._verifiers: dict[bytes, Verifier] = {}
        self.exported: Header | None = None
        """The last header."""
        self._root_id: bytes | None = None
        """The only tree that is exported."""
        self._whole = False
        """Whether the whole ledger is exported."""
        self._positions: list[int] = []
        self._parts: list[list[Entry]] = []
        """By lane: the operation that is being read."""
        self._batches: dict[bytes, _Batch] = {}
        self._general: list[Finding] = []

    @property
    def counts(self) -> Counts:
        """What there was so far."""
        return Counts(self.entries, self.budgets, self.holds, self.checkpoints)

    @property
    def findings(self) -> list[Finding]:
        """What is wrong so far: the first finding of each tree, and what concerns no tree."""
        in_trees = [tree.finding for tree in self.trees.values() if tree.finding is not None]
        decided = [one.finding for one in self._verifiers.values() if one.finding is not None]
        found = {finding.root_id for finding in in_trees}
        return in_trees + [one for one in decided if one.root_id not in found] + self._general

    def header(self, header: Header) -> None:
        """Begin, or go on with what was exported later."""
        before = self.exported
        if before is None:
            self._positions = [0] * len(header.positions)
            self._parts = [[] for _ in header.positions]
        elif (
            header.incarnation != before.incarnation
            or header.root_id != before.root_id
            or len(header.positions) != len(before.positions)
            or any(now < then for now, then in zip(header.positions, before.positions, strict=True))
        ):
            self._say("header", "it goes on with the export of something else")
            return
        if header.encoding_version != ENCODING_VERSION:
            self._say("header", f"encoding {header.encoding_version} is not known")
        self.exported = header
        self._root_id = header.root_id
        self._whole = header.root_id is None

    def entry(self, entry: Entry, lane: int) -> None:
        """Check the next entry; of an operation of several parts, with the last of them."""
        self.entries += 1
        root_id = entry.root_id
        tree = self.trees.get(root_id) or self._tree(root_id)
        if lane != tree.lane:
            tree.broken(Broken("lane", f"the tree is not of lane {lane}"), entry)
        elif not self._whole and self._root_id != root_id:
            tree.broken(Broken("lane", "it is not the tree that is exported"), entry)
        if lane >= len(self._parts):
            return
        parts = self._parts[lane]
        if parts and (entry.operation_id != parts[0].operation_id or entry.part != len(parts)):
            self._incomplete(lane)
            parts = self._parts[lane]
        if not parts:
            if entry.part:
                tree.broken(Broken("parts", "the parts before it are missing"), entry)
                return
            self._next_position(tree, entry, lane)
        parts.append(entry)
        if len(parts) >= entry.parts:
            self._parts[lane] = []
            self._operation(tree, parts)

    def budget(self, row: Budget, token_digest: bytes | None) -> None:
        """Compare the row of a budget, whose token is left out, with the fold of its entries."""
        self.budgets += 1
        tree = self._entered(row.root_id)
        fold = tree.budgets.get(row.budget_id)
        tree.budget(row, token_digest)
        verifier = self._verifiers.get(row.root_id)
        if verifier is not None and fold is not None:
            verifier.budget(row._replace(token=fold.token))

    def hold(self, root_id: bytes, row: Hold, token_digest: bytes | None) -> None:
        """Compare the row of a hold, whose token is left out, with the fold of its entries."""
        self.holds += 1
        tree = self._entered(root_id)
        fold = tree.holds.get(row.hold_id)
        tree.hold(row, token_digest)
        verifier = self._verifiers.get(root_id)
        if verifier is not None and fold is not None:
            verifier.hold(row._replace(token=fold.token))

    def checkpoint(self, record: SealedBy) -> None:
        """Check the next checkpoint, with the leaves that follow it."""
        self.checkpoints += 1
        if self.exported is None:
            return
        if self._seals is None:
            self._seals = SealAudit(self.exported, self.trees, self._public_keys, self._is_signed)
        self._seals.checkpoint(record)
        self._published.checkpoint(record.sealed.checkpoint.number, record.sealed.hash)

    def leaf(self, record: LeafOf) -> None:
        """Check the next leaf of a checkpoint."""
        if self._seals is not None:
            self._seals.leaf(*record)

    def trailer(self, counts: Counts) -> None:
        """Compare what the export says that it has with what was there."""
        there = self.counts
        if counts != there:
            differing = [
                name for name, a, b in zip(counts._fields, counts, there, strict=True) if a != b
            ]
            self._say("trailer", f"it counts other {' and '.join(differing)} than there are")

    def finish(self) -> list[Finding]:
        """All findings, the first one of each tree; none: the export is verified."""
        for lane in range(len(self._parts)):
            self._incomplete(lane)
        header = self.exported
        if header is None:
            self._say("header", "there is none")
        elif header.root_id is None:
            for lane, (told, was) in enumerate(zip(header.positions, self._positions, strict=True)):
                if told != was:
                    self._say("position", f"lane {lane} ends at {was}, not at {told}")
        for batch_id, batch in self._batches.items():
            detail = f"{batch.missing} operations of batch {id_text(batch_id)} are missing"
            self.trees[batch.first.root_id].broken(Broken("batch", detail), batch.first)
        for tree in self.trees.values():
            tree.finish()
        if self._seals is not None:
            finding, self.unsealed = self._seals.finish()
            if finding is not None:
                self._general.append(finding)
        self._general += self._published.finish()
        for verifier in self._verifiers.values():
            verifier.finish()
        return self.findings

    def _tree(self, root_id: bytes) -> TreeAudit:
        tree = self.trees.get(root_id)
        if tree is None:
            lane = lane_of(root_id, max(1, len(self._parts)))
            tree = self.trees[root_id] = TreeAudit(root_id, lane)
        return tree

    def _entered(self, root_id: bytes) -> TreeAudit:
        """A tree whose rows are told: all its entries were."""
        tree = self._tree(root_id)
        if tree.lane < len(self._parts) and self._parts[tree.lane]:
            self._incomplete(tree.lane)
        return tree

    def _incomplete(self, lane: int) -> None:
        """The operation that was being read lacks a part."""
        parts, self._parts[lane] = self._parts[lane], []
        if parts:
            missing = parts[0].parts - len(parts)
            self.trees[parts[0].root_id].broken(
                Broken("parts", f"{missing} are missing"), parts[-1]
            )

    def _next_position(self, tree: TreeAudit, entry: Entry, lane: int) -> None:
        before, position = self._positions[lane], entry.position
        whole = self._whole
        if position <= before or (whole and position != before + 1):
            expected = f"{before + 1} was expected" if whole else f"{before} was before"
            tree.broken(Broken("position", f"position {position}: {expected}"), entry)
            position = max(before, position)
        self._positions[lane] = position

    def _operation(self, tree: TreeAudit, parts: list[Entry]) -> None:
        first = parts[0]
        if first.parts != len(parts):
            tree.broken(Broken("parts", f"{first.parts} were said, not {len(parts)}"), first)
        batch = tree.operation(parts)
        if tree.finding is not None:
            return
        if batch is not None and self._whole:
            self._in_batch(batch, first)
        if self._decide:
            verifier = self._verifiers.get(tree.root_id)
            if verifier is None:
                verifier = self._verifiers[tree.root_id] = Verifier(tree.root_id)
            for part in parts:
                verifier.entry(part)

    def _in_batch(self, batch: AtomicBatch, first: Entry) -> None:
        begun = self._batches.pop(batch.batch_id, None)
        if begun is None:
            begun = _Batch(first, batch.size)
        if begun.missing > 1:
            self._batches[batch.batch_id] = begun._replace(missing=begun.missing - 1)

    def _say(self, rule: str, detail: str) -> None:
        """Note what is wrong with no tree."""
        self._general.append(Finding(b"", b"", 0, rule, detail))
