"""What a server exports, written to a file, verifies without it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from peculium._export_codec import pieces
from peculium._ids import new_id
from peculium.v1 import audit_service_pb2 as audit, types_pb2
from peculium.v1.admin_service_pb2 import GrantRequest, TopUpRequest
from peculium.v1.admin_service_pb2_grpc import AdminServiceStub
from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
from peculium_server.archive.files import ExportCut, ExportUnreadable, begun
from peculium_server.archive.verifying import Verified, verify_file
from peculium_server.archive.writing import JsonlSink
from peculium_server.cli.export_records import record_of
from peculium_server.core.offline.records import Counts, Header, Recorded
from peculium_server.signing import is_signed
from tests.audit.world import World
from tests.rpc.wire import Stored, info_of, storing


@pytest.fixture
async def stored(database: str) -> AsyncIterator[Stored]:
    async with storing(database) as running:
        yield running


@pytest.fixture
async def world(stored: Stored) -> World:
    made = World(stored.store, seed=7)
    await made.begin()
    return made


async def export(
    stored: Stored,
    path: Path,
    *,
    tree: bytes | None = None,
    resume: bool = False,
    records_max: int | None = None,
) -> None:
    """Export into a file, as the command line does; or only so many records of it."""
    with JsonlSink(path, resume=resume) as sink:
        request = audit.ExportRequest(after=sink.begun.after)
        if tree is not None:
            request.tree.CopyFrom(types_pb2.BudgetRef(root_id=tree, budget_id=tree))
        taken = 0
        async for message in AuditServiceStub(stored.channel).Export(request):
            for piece in pieces(message):
                if taken == records_max:
                    return
                sink.take(record_of(piece))
                taken += 1


async def another_tree(stored: Stored) -> bytes:
    """The root of a tree of two entries."""
    admin = AdminServiceStub(stored.channel)
    root_id = new_id()
    header: dict[str, Any] = {"operation_id": new_id(), "root_id": root_id, "budget_id": root_id}
    await admin.Grant(
        GrantRequest(
            header=types_pb2.OperationHeader(**header),
            name="other",
            unit="calls",
            amount=10,
            holder="dev",
        )
    )
    header["operation_id"] = new_id()
    await admin.TopUp(TopUpRequest(header=types_pb2.OperationHeader(**header), amount=5))
    return root_id


def verified(path: Path, *, decide: bool = False) -> Verified:
    return verify_file(path, public_keys=None, is_signed=is_signed, decide=decide)


def entries_of(world: World) -> int:
    return len(world.ledger.journal)


async def test_a_ledger_in_which_everything_has_happened_verifies(
    stored: Stored, world: World, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    await export(stored, path)
    found = verified(path, decide=True)
    assert found.findings == ()
    assert found.counts.entries == entries_of(world)
    tree = world.ledger.trees[world.nodes[0].root_id]
    assert found.counts == Counts(
        entries_of(world), len(tree.known_budgets()), len(tree.known_holds()), 0
    )


async def test_a_compressed_one_does_too(stored: Stored, world: World, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl.gz"
    await export(stored, path)
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    found = verified(path)
    assert (found.findings, found.counts.entries) == ((), entries_of(world))


async def test_what_is_recorded_meanwhile_is_in_it_whole_or_not_at_all(
    stored: Stored, world: World, tmp_path: Path
) -> None:
    before = entries_of(world)
    async with world.going_on():
        for number in range(5):
            path = tmp_path / f"{number}.jsonl"
            await export(stored, path)
            found = verified(path)
            assert found.findings == ()
            assert found.counts.entries >= before
    assert entries_of(world) > before


async def test_a_request_where_none_belongs_is_exported_too(
    database: str, stored: Stored, world: World, tmp_path: Path
) -> None:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as owner:
        await owner.execute("ALTER TABLE entries DROP CONSTRAINT ck_entries_parts")
        forged = await owner.execute(
            "UPDATE entries SET request = %s WHERE (operation_id, part) ="
            " (SELECT operation_id, part FROM entries WHERE part > 0 ORDER BY position LIMIT 1)"
            " RETURNING budget_id, seq",
            [bytes(32)],
        )
        [(budget_id, seq)] = await forged.fetchall()
    path = tmp_path / "ledger.jsonl"
    await export(stored, path)
    [finding] = verified(path).findings
    assert (finding.budget_id, finding.seq) == (budget_id.bytes, seq)
    assert (finding.rule, finding.detail) == ("request", "only part 0 says what was asked")


async def test_one_tree_is_exported_without_the_others(
    stored: Stored, world: World, tmp_path: Path
) -> None:
    root_id = await another_tree(stored)
    path = tmp_path / "tree.jsonl"
    await export(stored, path, tree=root_id)
    found = verified(path)
    assert (found.findings, found.trees) == ((), 1)
    assert found.counts.entries == 2
    whole = tmp_path / "ledger.jsonl"
    await export(stored, whole)
    assert verified(whole).trees == 2


async def test_a_cut_export_is_gone_on_with_although_more_was_recorded(
    stored: Stored, world: World, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    await export(stored, path, records_max=150)
    with pytest.raises(ExportCut, match="--resume"):
        verified(path)
    for _ in range(30):
        await world.step()
    await export(stored, path, resume=True)
    found = verified(path, decide=True)
    assert (found.findings, found.counts.entries) == ((), entries_of(world))


async def test_a_whole_export_is_brought_up_to_date(
    stored: Stored, world: World, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    await export(stored, path)
    for _ in range(30):
        await world.step()
    await export(stored, path, resume=True)
    found = verified(path)
    assert (found.findings, found.counts.entries) == ((), entries_of(world))


async def test_the_export_of_another_tree_is_not_gone_on_with(
    stored: Stored, world: World, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    await export(stored, path)
    with pytest.raises(ExportUnreadable, match="another ledger or tree"):
        await export(stored, path, tree=world.nodes[0].root_id, resume=True)
    with path.open("rb") as file:
        assert begun(file).entries == entries_of(world)


async def test_an_existing_file_is_not_overwritten(
    stored: Stored, world: World, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text("precious")
    with pytest.raises(ExportUnreadable, match="exists already"):
        await export(stored, path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("after", "field", "problem"),
    [
        ([0], "after", "name all 16 lanes"),
        ([0] * 15 + [-1], "after[15]", "must be 0 to"),
        ([2**62] + [0] * 15, "after[0]", "where the lane stands"),
    ],
)
async def test_a_place_to_go_on_that_is_none_is_refused(
    stored: Stored, after: Sequence[int], field: str, problem: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in AuditServiceStub(stored.channel).Export(audit.ExportRequest(after=after)):
            pass
    info = info_of(refused.value)
    assert (info.reason, info.metadata["field"]) == ("MALFORMED", field)
    assert problem in info.metadata["problem"]


async def test_an_unknown_tree_is_refused(stored: Stored) -> None:
    request = audit.ExportRequest(tree=types_pb2.BudgetRef(path="nobody"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in AuditServiceStub(stored.channel).Export(request):
            pass
    assert info_of(refused.value).reason == "BUDGET_UNKNOWN"


async def test_entries_come_by_lane_position_and_part(stored: Stored, world: World) -> None:
    await another_tree(stored)
    places = []
    headers = 0
    async for message in AuditServiceStub(stored.channel).Export(audit.ExportRequest()):
        for piece in pieces(message):
            match record_of(piece):
                case Recorded(lane, entry):
                    places.append((lane, entry.position, entry.part))
                case Header():
                    headers += 1
                case _:
                    pass
    assert places == sorted(places)
    assert headers == 1
