"""The export: a tree or the whole ledger as it is at one instant, piece by piece."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Final, TypeVar

from peculium.v1.audit_service_pb2 import (
    ExportedBudget,
    ExportedBudgets,
    ExportedCheckpoints,
    ExportedEntries,
    ExportedHold,
    ExportedHolds,
    ExportHeader,
    ExportRequest,
    ExportResponse,
    ExportTrailer,
)
from peculium_server.core.encoding import ENCODING_VERSION
from peculium_server.core.lanes import lane_of
from peculium_server.core.offline.records import digest_of
from peculium_server.core.state import Budget, Hold
from peculium_server.rpc import scope
from peculium_server.rpc.calls import CallRefused
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.responses import (
    entry_bytes,
    write_budget,
    write_checkpoint,
    write_entry,
    write_hold,
    write_time,
)
from peculium_server.store.snapshot import Snapshot
from peculium_server.store.store import Store

Row = TypeVar("Row")

EXPORTS_MAX: Final = 2
"""At a time; each has a connection to the database for as long as it lasts. Others wait."""
_PIECE_BYTES: Final = 256 * 1024
_PIECE_ROWS: Final = 256
_PAGE: Final = 500
"""Checkpoints that are listed at once."""
_AT_A_TIME: Final = 32
"""Rows that are written before other calls get their turn: a millisecond or two."""


class Exporting:
    """Writes exports."""

    def __init__(self, reader: Reader, store: Store) -> None:
        self._reader = reader
        self._store = store
        self._running = asyncio.Semaphore(EXPORTS_MAX)

    async def export(self, request: ExportRequest) -> AsyncGenerator[ExportResponse]:
        """Everything that an offline verification needs, as of one instant.

        Raises:
            CallRefused: BUDGET_UNKNOWN, or MALFORMED.
        """
        read = await self._reader.for_auditor_or_all(
            request.tree if request.HasField("tree") else None
        )
        root_id = None if read is None else read[0].budget.root_id
        after = self._after(request)
        async with self._running, self._store.snapshot() as snapshot:
            positions = await snapshot.positions()
            for lane, (begin, end) in enumerate(zip(after, positions, strict=True)):
                if not 0 <= begin <= end:
                    raise CallRefused.malformed(
                        f"after[{lane}]", f"must be 0 to {end}, where the lane stands"
                    )
            *earlier, incarnation = await snapshot.incarnations()
            header = ExportHeader(
                encoding_version=ENCODING_VERSION,
                incarnation=incarnation,
                earlier_incarnations=earlier,
                positions=positions,
                root_id=root_id or b"",
            )
            write_time(snapshot.now, header.at)
            yield ExportResponse(header=header)
            trailer = ExportTrailer()
            async for piece in _pieces(snapshot, root_id, after, positions):
                trailer.entries += len(piece.entries.entries)
                trailer.budgets += len(piece.budgets.budgets)
                trailer.holds += len(piece.holds.holds)
                yield piece
            # Their leaves tell of all trees: how many entries each budget has, and when it got some.
            if scope.roots() is None:
                async for checkpoints in _checkpoints(snapshot, request.after_checkpoint):
                    begun = [each for each in checkpoints.checkpoints if not each.continued]
                    trailer.checkpoints += len(begun)
                    yield ExportResponse(checkpoints=checkpoints)
            yield ExportResponse(trailer=trailer)

    def _after(self, request: ExportRequest) -> Sequence[int]:
        lanes = self._store.lanes
        if len(request.after) not in (0, lanes):
            raise CallRefused.malformed("after", f"must be absent, or name all {lanes} lanes")
        if request.after_checkpoint < 0:
            raise CallRefused.malformed("after_checkpoint", "must not be negative")
        return request.after or [0] * lanes


async def _pieces(
    snapshot: Snapshot, root_id: bytes | None, after: Sequence[int], positions: Sequence[int]
) -> AsyncIterator[ExportResponse]:
    lanes = len(positions)
    wanted = range(lanes) if root_id is None else [lane_of(root_id, lanes)]
    for lane in wanted:
        async for entries in _entries(snapshot, lane, after[lane], positions[lane], root_id):
            yield ExportResponse(entries=entries)
    for lane in wanted:
        rows = snapshot.budgets_of_lane(lane) if root_id is None else snapshot.budgets_of(root_id)
        async for budgets in _in_pieces(rows):
            written = [_budget(row) for row in budgets]
            yield ExportResponse(budgets=ExportedBudgets(budgets=written))
    for lane in wanted:
        held = snapshot.holds_of_lane(lane) if root_id is None else _holds_of(snapshot, root_id)
        async for holds in _in_pieces(held):
            yield ExportResponse(holds=ExportedHolds(holds=[_hold(*row) for row in holds]))


async def _entries(
    snapshot: Snapshot, lane: int, after: int, until: int, root_id: bytes | None
) -> AsyncIterator[ExportedEntries]:
    piece, size = ExportedEntries(), 0
    rows = snapshot.entries_between(lane, after=after, until=until, root_id=root_id)
    async for entry in rows:
        write_entry(entry, lane, piece.entries.add())
        size += entry_bytes(entry)
        if len(piece.entries) % _AT_A_TIME == 0:
            await asyncio.sleep(0)
        if size >= _PIECE_BYTES:
            yield piece
            piece, size = ExportedEntries(), 0
    if size:
        yield piece


async def _checkpoints(snapshot: Snapshot, after: int) -> AsyncIterator[ExportedCheckpoints]:
    """All checkpoints with all their leaves, also those of other trees: a Merkle root is over all."""
    while True:
        page = [kept async for kept in snapshot.seals.checkpoints(after=after, limit=_PAGE)]
        if not page:
            return
        until = page[-1].sealed.checkpoint.number
        waiting = deque(page)
        piece, rows, current = ExportedCheckpoints(), 0, 0
        async for number, leaf in snapshot.seals.leaves(after=after, until=until):
            while waiting and waiting[0].sealed.checkpoint.number <= number:
                current = waiting[0].sealed.checkpoint.number
                write_checkpoint(waiting.popleft(), piece.checkpoints.add().checkpoint)
            # That of a checkpoint which is missing is left to whoever misses that.
            if number != current:
                continue
            if not piece.checkpoints:
                more = piece.checkpoints.add(continued=True)
                more.checkpoint.number = number
            piece.checkpoints[-1].leaves.add(
                root_id=leaf.root_id, budget_id=leaf.budget_id, seq=leaf.seq, head=leaf.head
            )
            rows += 1
            if rows % _PIECE_ROWS == 0:
                yield piece
                piece = ExportedCheckpoints()
        for kept in waiting:
            write_checkpoint(kept, piece.checkpoints.add().checkpoint)
        if piece.checkpoints:
            yield piece
        after = until


async def _in_pieces(rows: AsyncIterator[Row]) -> AsyncIterator[list[Row]]:
    piece: list[Row] = []
    async for row in rows:
        piece.append(row)
        if len(piece) == _PIECE_ROWS:
            yield piece
            piece = []
            await asyncio.sleep(0)
    if piece:
        yield piece


async def _holds_of(snapshot: Snapshot, root_id: bytes) -> AsyncIterator[tuple[bytes, Hold]]:
    async for hold in snapshot.holds_of(root_id):
        yield root_id, hold


def _budget(budget: Budget) -> ExportedBudget:
    message = ExportedBudget(
        frozen=budget.frozen,
        closed=budget.closed,
        disputes=budget.disputes,
        ancestors=budget.ancestors,
        token_digest=digest_of(budget.token) or b"",
    )
    write_budget(budget, (), None, message.budget)
    write_time(budget.last_at, message.last_at)
    return message


def _hold(root_id: bytes, hold: Hold) -> ExportedHold:
    message = ExportedHold(root_id=root_id, token_digest=digest_of(hold.token) or b"")
    write_hold(hold, message.hold)
    return message
