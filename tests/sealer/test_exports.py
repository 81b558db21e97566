"""Checkpoints in an export: each of them once, and under it all that it has sealed."""

from __future__ import annotations

from typing import Any

import pytest

from peculium import Checkpoint
from peculium._export_codec import pieces
from peculium.exports import ExportedLeaf, ExportTrailer
from peculium.v1 import audit_service_pb2 as audit
from peculium_server.core.checkpoint import Leaf
from peculium_server.rpc import exporting
from tests.sealer.sealing import Sealing
from tests.sweeper.fleet import Fleet


@pytest.mark.parametrize(("rows", "page"), [(256, 500), (1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("after", [0, 2])
async def test_each_checkpoint_is_exported_once_with_all_its_leaves_whatever_is_sent_at_once(
    fleet: Fleet,
    sealing: Sealing,
    auditor: Any,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    page: int,
    after: int,
) -> None:
    monkeypatch.setattr(exporting, "_PIECE_ROWS", rows)
    monkeypatch.setattr(exporting, "_PAGE", page)
    roots = [await fleet.root() for _ in range(5)]
    for some in (roots, roots[:1], roots[1:], roots):
        for root in some:
            await fleet.ask(fleet.spend(root))
        await sealing.seal_all()
    sealed = [each.checkpoint.number for each in await sealing.checkpoints()]
    assert len(sealed) >= 4
    exported: list[tuple[int, list[Leaf]]] = []
    trailer: ExportTrailer | None = None
    async for message in auditor.Export(audit.ExportRequest(after_checkpoint=after)):
        for piece in pieces(message):
            match piece:
                case Checkpoint(number=number):
                    exported.append((number, []))
                case ExportedLeaf():
                    number, leaves = exported[-1]
                    assert piece.checkpoint == number
                    leaves.append(Leaf(piece.root_id, piece.budget_id, piece.seq, piece.head))
                case ExportTrailer():
                    trailer = piece
                case _:
                    pass
    assert exported == list(zip(sealed, await sealing.leaves(), strict=True))[after:]
    assert trailer is not None
    assert trailer.checkpoints == len(exported)
