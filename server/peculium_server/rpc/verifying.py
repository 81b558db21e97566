"""The online verification: checkpoints, then tree after tree, then the lanes, at one instant."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Self, TypeVar

from peculium_server.core.checkpoint import RULE, Chain, SealedHeads, key_id_of
from peculium_server.core.encoding import ENCODING_VERSION
from peculium_server.core.lanes import lane_of
from peculium_server.core.placement import Lying, Named, Placement, Positions, nameless
from peculium_server.core.verify import Finding, Verifier
from peculium_server.signing import is_signed
from peculium_server.store.checkpoints import Kept
from peculium_server.store.seals import NUMBER_MAX
from peculium_server.store.snapshot import Snapshot
from peculium_server.store.statements import Ledger

_AT_A_TIME: Final = 32
"""Entries or signatures that are verified before other calls get their turn: some milliseconds."""
_PROGRESS_ENTRIES: Final = 1_000
_PAGE: Final = 500
"""Checkpoints that are asked for at once."""
_LEAVES_AT_ONCE: Final = 65_536
"""Leaves of several checkpoints that are asked for, and sorted, by one statement."""


class Verification:
    """Checks a snapshot of the ledger, and counts what was checked.

    Checkpoints are always verified all, with all their leaves: of a tree alone, that it was sealed, says
    nothing about leaves that somebody took out with it.
    """

    def __init__(self, snapshot: Snapshot, lanes: int) -> None:
        self.entries = 0
        self.trees = 0
        self.findings: list[Finding] = []
        """The first finding in the checkpoints, the first of each tree, and the first of each lane."""
        self._snapshot = snapshot
        self._lanes = lanes

    async def run(self, tree: bytes | None) -> AsyncIterator[int]:
        """Verify everything, or one tree; tells how many entries were checked, now and then.

        Raises:
            StoreError: The database does not say.
        """
        self._take(await self._wrong_ledger())
        chain = await self._chain()
        self._take(chain.finish())
        positions = None
        if tree is None:
            positions = Positions(await self._snapshot.standing(), self._lanes)
        index = await _Index.read(self._snapshot, tree)
        # Of a tree of which nothing is left, what was sealed tells.
        roots = [tree] if tree is not None else list(index.lying)
        for root_id in roots:
            verifier = Verifier(root_id)
            heads = await self._heads(chain, root_id)
            placement = index.placement(root_id, lane_of(root_id, self._lanes))
            async for checked in self._tree(verifier, heads, placement, positions):
                yield self.entries + checked
            self.entries += verifier.entries
            self.trees += 1
            # What an entry breaks by itself tells more than that a later head differs.
            self._take(verifier.finish() or heads.finish() or placement.finish())
        if positions is not None:
            every = [each for of_root in index.names.values() for each in of_root]
            self.findings += nameless(every, index.lying.keys())
            self.findings += positions.finish()

    def _take(self, finding: Finding | None) -> None:
        if finding is not None:
            self.findings.append(finding)

    async def _wrong_ledger(self) -> Finding | None:
        """What the ledger says of itself has to be what it was made as, and opened as."""
        first, *_ = await self._snapshot.incarnations()
        opened = Ledger(first, self._lanes, ENCODING_VERSION)
        told = await self._snapshot.ledger()
        if len(told) != 1:
            return Finding(b"", b"", 0, "ledger", f"it has {len(told)} rows, not one")
        pairs = zip(Ledger._fields, opened, told[0], strict=True)
        differing = ", ".join(name for name, was, now in pairs if was != now)
        if not differing:
            return None
        return Finding(
            b"", b"", 0, "ledger", f"it is another in {differing} than when it was opened"
        )

    async def _chain(self) -> Chain:
        """Verify the checkpoints, some at a time."""
        seals = self._snapshot.seals
        keys: dict[bytes, bytes] = {}
        async for key_id, key in seals.public_keys():
            keys[key_id_of(key)] = key
            if key_id != key_id_of(key):
                detail = f"the key {key_id_of(key).hex()} is found by another id, {key_id.hex()}"
                self._take(Finding(b"", b"", 0, RULE, detail))
        *earlier, incarnation = await self._snapshot.incarnations()
        chain = Chain(incarnation, self._lanes, keys, is_signed, earlier=earlier)
        after = 0
        while page := [kept async for kept in seals.checkpoints(after=after, limit=_PAGE)]:
            for some in _portions(page):
                await self._links(chain, some)
            after = page[-1].sealed.checkpoint.number
        return chain

    async def _links(self, chain: Chain, some: Sequence[Kept]) -> None:
        """Feed checkpoints with their leaves."""
        waiting = deque(kept.sealed for kept in some)
        first, last = waiting[0].checkpoint.number, waiting[-1].checkpoint.number
        current = 0
        async for number, leaf in self._snapshot.seals.leaves(after=first - 1, until=last):
            while waiting and waiting[0].checkpoint.number <= number:
                current = waiting[0].checkpoint.number
                chain.checkpoint(waiting.popleft())
            # That of a checkpoint which is missing is left to whoever misses that.
            if number == current:
                chain.leaf(leaf)
        for sealed in waiting:
            chain.checkpoint(sealed)

    async def _heads(self, chain: Chain, root_id: bytes) -> SealedHeads:
        """What was sealed of a tree, as far as the checkpoints hold."""
        lane = lane_of(root_id, self._lanes)
        leaves = self._snapshot.seals.leaves_of(lane, root_id)
        verified = 0 if chain.last is None else chain.last.number
        until = verified if chain.finding else NUMBER_MAX
        sealed = [leaf async for leaf in leaves if leaf[0] <= until]
        return SealedHeads(chain.positions[lane], sealed)

    async def _tree(
        self,
        verifier: Verifier,
        heads: SealedHeads,
        placement: Placement,
        positions: Positions | None,
    ) -> AsyncIterator[int]:
        """Feed a tree to who verifies it; tells how many entries were checked, now and then."""
        lane = lane_of(verifier.root_id, self._lanes)
        async for entry in self._snapshot.entries_in_order(verifier.root_id):
            verifier.entry(entry)
            heads.entry(entry)
            if positions is not None:
                positions.entry(lane, entry)
            if verifier.entries % _AT_A_TIME == 0:
                await asyncio.sleep(0)
            if verifier.entries % _PROGRESS_ENTRIES == 0:
                yield verifier.entries
        async for budget in self._snapshot.budgets_of(verifier.root_id):
            verifier.budget(budget)
            placement.budget(budget)
        async for hold in self._snapshot.holds_of(verifier.root_id):
            verifier.hold(hold)


class _Index(NamedTuple):
    """What is not in the entries, and makes them quick to find, by the roots that it is of."""

    names: Mapping[bytes, Sequence[Named]]
    lying: Mapping[bytes, Sequence[Lying]]
    misplaced: Mapping[bytes, Sequence[bytes]]
    collected: Mapping[bytes, Sequence[bytes]]

    @classmethod
    async def read(cls, snapshot: Snapshot, tree: bytes | None) -> Self:
        """Read that of one tree, or of all."""
        return cls(
            _by_root([(each.root_id, each) async for each in snapshot.names(tree)]),
            _by_root([(each.root_id, each) async for each in snapshot.lying(tree)]),
            _by_root(await snapshot.misplaced(tree)),
            _by_root(await snapshot.collected(tree)),
        )

    def placement(self, root_id: bytes, lane: int) -> Placement:
        """Who checks that of a tree."""
        return Placement(
            root_id,
            lane,
            names=self.names.get(root_id, ()),
            lying=self.lying.get(root_id, ()),
            misplaced=self.misplaced.get(root_id, ()),
            collected=frozenset(self.collected.get(root_id, ())),
        )


_Value = TypeVar("_Value")


def _by_root(found: Iterable[tuple[bytes, _Value]]) -> Mapping[bytes, Sequence[_Value]]:
    """What was found, by the roots that it is of."""
    by_root: dict[bytes, list[_Value]] = {}
    for root_id, each in found:
        by_root.setdefault(root_id, []).append(each)
    return by_root


def _portions(page: Sequence[Kept]) -> Iterator[Sequence[Kept]]:
    """Cut checkpoints into portions of which the leaves are not too many at once."""
    portion: list[Kept] = []
    leaves = 0
    for kept in page:
        leaves += kept.sealed.checkpoint.leaves
        if portion and leaves > _LEAVES_AT_ONCE:
            yield portion
            portion, leaves = [], kept.sealed.checkpoint.leaves
        portion.append(kept)
    yield portion
