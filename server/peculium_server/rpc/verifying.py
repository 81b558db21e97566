"""The online verification: checkpoints, then tree after tree, at one instant."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

from peculium_server.core.checkpoint import Chain, SealedHeads, key_id_of
from peculium_server.core.lanes import lane_of
from peculium_server.core.verify import Finding, Verifier
from peculium_server.signing import is_signed
from peculium_server.store.checkpoints import Kept
from peculium_server.store.seals import NUMBER_MAX
from peculium_server.store.snapshot import Snapshot

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

    def __init__(self, snapshot: Snapshot, incarnation: bytes, lanes: int) -> None:
        self.entries = 0
        self.trees = 0
        self.findings: list[Finding] = []
        """The first finding in the checkpoints, and the first of each tree."""
        self._snapshot = snapshot
        self._incarnation = incarnation
        self._lanes = lanes

    async def run(self, tree: bytes | None) -> AsyncIterator[int]:
        """Verify everything, or one tree; tells how many entries were checked, now and then.

        Raises:
            StoreError: The database does not say.
        """
        chain = await self._chain()
        finding = chain.finish()
        if finding is not None:
            self.findings.append(finding)
        roots = [tree] if tree is not None else await self._roots()
        for root_id in roots:
            verifier = Verifier(root_id)
            heads = await self._heads(chain, root_id)
            async for checked in self._tree(verifier, heads):
                yield self.entries + checked
            self.entries += verifier.entries
            self.trees += 1
            # What an entry breaks by itself tells more than that a later head differs.
            finding = verifier.finish() or heads.finish()
            if finding is not None:
                self.findings.append(finding)

    async def _roots(self) -> list[bytes]:
        """The roots of all trees, those of which nothing is left but what was sealed included."""
        roots = [root_id async for root_id in self._snapshot.roots()]
        sealed = [root_id async for root_id in self._snapshot.seals.roots()]
        return list(dict.fromkeys((*roots, *sealed)))

    async def _chain(self) -> Chain:
        """Verify the checkpoints, some at a time."""
        seals = self._snapshot.seals
        keys = {key_id_of(key): key async for key in seals.public_keys()}
        chain = Chain(self._incarnation, self._lanes, keys, is_signed)
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

    async def _tree(self, verifier: Verifier, heads: SealedHeads) -> AsyncIterator[int]:
        """Feed a tree to who verifies it; tells how many entries were checked, now and then."""
        async for entry in self._snapshot.entries_in_order(verifier.root_id):
            verifier.entry(entry)
            heads.entry(entry)
            if verifier.entries % _AT_A_TIME == 0:
                await asyncio.sleep(0)
            if verifier.entries % _PROGRESS_ENTRIES == 0:
                yield verifier.entries
        async for budget in self._snapshot.budgets_of(verifier.root_id):
            verifier.budget(budget)
        async for hold in self._snapshot.holds_of(verifier.root_id):
            verifier.hold(hold)


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
