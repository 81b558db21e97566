"""What auditors are told of checkpoints: lists of them, and proofs that an entry is under one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from peculium.v1.audit_service_pb2 import (
    ListCheckpointsRequest,
    ListCheckpointsResponse,
    ProveEntryRequest,
    ProveEntryResponse,
)
from peculium_server.core.checkpoint import Leaf
from peculium_server.core.merkle import Step, path_of
from peculium_server.core.refusals import Refusal, Refused, id_text
from peculium_server.core.state import Budget, Entry
from peculium_server.rpc.calls import CallRefused
from peculium_server.rpc.pages import page_token, read_page
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.responses import write_checkpoint, write_entry
from peculium_server.store.checkpoints import Kept
from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.store import Store

_ENTRIES_AT_A_TIME: Final = 128
"""Entries of a proof that are decoded before other calls get their turn."""
_HASHES_AT_A_TIME: Final = 512
_PROOFS_MAX: Final = 2
"""Made at a time: each reads all leaves of a checkpoint."""


class Sealing:
    """Answers about checkpoints."""

    def __init__(self, reader: Reader, store: Store) -> None:
        self._reader = reader
        self._store = store
        self._proving = asyncio.Semaphore(_PROOFS_MAX)

    async def checkpoints(self, request: ListCheckpointsRequest) -> ListCheckpointsResponse:
        """A page of the checkpoints.

        Raises:
            CallRefused: MALFORMED.
        """
        scope = b"checkpoints" + bytes((request.descending,))
        asked = read_page(scope, request.page_size, request.page_token)
        found = await self._store.seals.page(
            limit=asked.size + 1, after=asked.after_number, descending=request.descending
        )
        page = found[: asked.size]
        more = len(found) > asked.size
        last = page[-1].sealed.checkpoint.number if more else None
        response = ListCheckpointsResponse(next_page_token=page_token(scope, last))
        for kept in page:
            write_checkpoint(kept, response.checkpoints.add())
        return response

    async def proof(self, request: ProveEntryRequest) -> ProveEntryResponse:
        """The proof that an entry is under the first checkpoint that seals it.

        Raises:
            CallRefused: BUDGET_UNKNOWN; MALFORMED: there is no such entry; NOT_SEALED.
        """
        line, _ = await self._reader.for_auditor(request.budget)
        budget = line.budget
        if not 1 <= request.seq <= budget.seq:
            raise CallRefused.malformed("seq", f"must be 1 to {budget.seq}, as many as there are")
        lane = self._store.lane_of(budget.root_id)
        seals = self._store.seals
        async with self._proving:
            over = await seals.first_over(lane, budget.root_id, budget.budget_id, request.seq)
            if over is None:
                sealed_seq = await seals.sealed_seq(lane, budget.root_id, budget.budget_id)
                facts = {
                    "budget": id_text(budget.budget_id),
                    "path": "/".join(line.path),
                    "seq": str(request.seq),
                    "sealed_seq": str(sealed_seq),
                }
                raise CallRefused(Refused(Refusal.NOT_SEALED, facts))
            number, leaf = over
            response = ProveEntryResponse(sealed_seq=leaf.seq)
            write_checkpoint(await self._checkpoint(number), response.checkpoint)
            for step in await self._path(number, leaf):
                response.path.add(sibling=step.sibling, left=step.left)
            entry, *later = await self._chain(budget, request.seq, leaf.seq)
            write_entry(entry, lane, response.entry)
            for each in later:
                response.links.add(digest=each.digest, part=each.part)
            for part in await seals.operation(lane, entry.root_id, entry.operation_id):
                if part.part != entry.part:
                    write_entry(part, lane, response.others.add())
        return response

    async def _checkpoint(self, number: int) -> Kept:
        found = await self._store.seals.page(limit=1, after=number - 1, descending=False)
        if not found or found[0].sealed.checkpoint.number != number:
            raise LedgerCorrupt(f"checkpoint {number} has leaves and is missing")
        return found[0]

    async def _path(self, number: int, leaf: Leaf) -> Sequence[Step]:
        leaves = await self._store.seals.leaves(number)
        hashes: list[bytes] = []
        for each in leaves:
            hashes.append(each.hash())
            if len(hashes) % _HASHES_AT_A_TIME == 0:
                await asyncio.sleep(0)
        return path_of(hashes, leaves.index(leaf))

    async def _chain(self, budget: Budget, seq: int, sealed_seq: int) -> list[Entry]:
        """The budget's entries from one to another; none of them is missing."""
        entries: list[Entry] = []
        while len(entries) <= sealed_seq - seq:
            page = await self._store.seals.chain(
                self._store.lane_of(budget.root_id),
                budget.root_id,
                budget.budget_id,
                limit=min(_ENTRIES_AT_A_TIME, sealed_seq - seq + 1 - len(entries)),
                after=seq - 1 + len(entries),
            )
            if not page or page[0].seq != seq + len(entries):
                raise LedgerCorrupt(
                    f"entry {seq + len(entries)} of budget {id_text(budget.budget_id)} is sealed,"
                    " and missing"
                )
            entries += page
        return entries
