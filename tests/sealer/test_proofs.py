"""Proofs: every entry of a history proves, by an implementation that the server does not share."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import cbor2
import grpc
import pytest

from peculium import Proof, proofs
from peculium._audit_codec import checkpoint as to_checkpoint, proof as to_proof
from peculium.v1 import audit_service_pb2 as audit, types_pb2
from peculium_server import sealer as sealer_module
from peculium_server.signing import is_signed
from tests.rpc.wire import info_of
from tests.sealer.sealing import Sealing
from tests.sweeper.fleet import Fleet

FLIPPED = bytes([1]) + bytes(31)


async def proven(auditor: Any, root: bytes, budget: bytes, seq: int) -> Proof:
    ref = types_pb2.BudgetRef(root_id=root, budget_id=budget)
    return to_proof(await auditor.ProveEntry(audit.ProveEntryRequest(budget=ref, seq=seq)))


async def lived(fleet: Fleet, sealing: Sealing, seed: int) -> dict[tuple[bytes, bytes], int]:
    """A random history that is sealed now and then; how many entries each budget has at its end."""
    chance = random.Random(seed)
    roots = [await fleet.root() for _ in range(3)]
    budgets = [(root, root) for root in roots]
    for _ in range(25):
        root, budget = chance.choice(budgets)
        match chance.randrange(5):
            case 0:
                made = await fleet.children(root, budget, chance.randrange(1, 4), 0)
                budgets += [(root, each) for each in made]
            case 1:
                held = await fleet.hold(root)
                await fleet.settle(root, held, chance.randrange(3))
            case 2:
                below = [each for each in budgets if each[0] == root != each[1]]
                if below:
                    gone = chance.choice(below)
                    await fleet.revoke(*gone)
                    budgets = [each for each in budgets if each == (root, root) or each[0] != root]
            case 3:
                await sealing.sealer.round()
            case _:
                await fleet.ask(*[fleet.spend(root) for _ in range(chance.randrange(1, 6))])
    await sealing.seal_all()
    found = {}
    for root in roots:
        async with fleet.store.snapshot() as snapshot:
            async for each in snapshot.budgets_of(root):
                found[root, each.budget_id] = each.seq
    return found


@pytest.mark.parametrize("seed", range(3))
async def test_every_entry_of_a_history_proves(
    fleet: Fleet,
    sealing: Sealing,
    auditor: Any,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sealer_module, "OPERATIONS_MAX", 16)
    entries = await lived(fleet, sealing, seed)
    numbers = set()
    for (root, budget), count in entries.items():
        for seq in range(1, count + 1):
            proof = await proven(auditor, root, budget, seq)
            assert (proof.entry.budget_id, proof.entry.seq) == (budget, seq)
            assert proof.flaw() is None
            numbers.add(proof.checkpoint.number)
            assert is_signed(
                sealing.key.public_key,
                proof.checkpoint.signature,
                proof.checkpoint.signed_message,
            )
    assert len(numbers) > 1


TAMPERINGS: dict[str, Any] = {
    "amount": lambda p: {"entry": replace(p.entry, amount=p.entry.amount + 1)},
    "balances": lambda p: {
        "entry": replace(p.entry, balances=replace(p.entry.balances, spent=1_000_000))
    },
    "actor": lambda p: {"entry": replace(p.entry, actor="somebody")},
    "effect": lambda p: {"entry": replace(p.entry, effect=p.entry.effect + b"\x00")},
    "digest": lambda p: {"entry": replace(p.entry, digest=FLIPPED)},
    "hash": lambda p: {"entry": replace(p.entry, hash=FLIPPED)},
    "previous hash": lambda p: {"entry": replace(p.entry, previous_hash=FLIPPED)},
    "seq": lambda p: {
        "entry": replace(p.entry, seq=p.entry.seq + 1),
        "sealed_seq": p.sealed_seq + 1,
    },
    "another part": lambda p: {"others": (replace(p.others[0], seq=9), *p.others[1:])},
    # How many there are is not in the digest: they have to be all there.
    "how many parts": lambda p: {"entry": replace(p.entry, parts=p.entry.parts + 1)},
    "a part less": lambda p: {"others": p.others[1:]},
    "a link less": lambda p: {"links": p.links[1:]},
    "a link altered": lambda p: {"links": (replace(p.links[0], digest=FLIPPED), *p.links[1:])},
    "sealed seq": lambda p: {"sealed_seq": p.sealed_seq + 1},
    "a step less": lambda p: {"path": p.path[1:]},
    "a step altered": lambda p: {"path": (replace(p.path[0], sibling=FLIPPED), *p.path[1:])},
    "a step turned": lambda p: {"path": (replace(p.path[0], left=not p.path[0].left), *p.path[1:])},
    "number": lambda p: {"checkpoint": replace(p.checkpoint, number=2)},
    "positions": lambda p: {"checkpoint": replace(p.checkpoint, positions=(1,) * 16)},
    "leaves": lambda p: {"checkpoint": replace(p.checkpoint, leaves=9)},
    "merkle root": lambda p: {"checkpoint": replace(p.checkpoint, merkle_root=FLIPPED)},
    "checkpoint hash": lambda p: {"checkpoint": replace(p.checkpoint, hash=FLIPPED)},
    "public key": lambda p: {"checkpoint": replace(p.checkpoint, public_key=FLIPPED)},
}


async def test_a_proof_of_which_anything_is_altered_does_not_hold(
    fleet: Fleet, sealing: Sealing, auditor: Any
) -> None:
    root = await fleet.root()
    await fleet.children(root, root, 3)
    await fleet.ask(fleet.spend(root), fleet.spend(root))
    await sealing.seal_all()
    proof = await proven(auditor, root, root, 2)
    assert proof.flaw() is None
    assert len(proof.others) == 3
    assert len(proof.links) == 2
    for what, tamper in TAMPERINGS.items():
        assert replace(proof, **tamper(proof)).flaw() is not None, what


async def test_a_proof_whose_entry_and_sealed_head_are_not_as_far_apart_as_it_says_does_not_hold(
    fleet: Fleet, sealing: Sealing, auditor: Any
) -> None:
    root = await fleet.root()
    await sealing.seal_all()
    proof = await proven(auditor, root, root, 1)
    # All hashes are made anew, as who writes a ledger of his own can.
    entry = replace(proof.entry, seq=7)
    digest = proofs._digest([entry])
    entry = replace(
        entry, digest=digest, hash=proofs._link(entry.previous_hash, digest, entry.part)
    )
    root_of_one = proofs._sha256(
        proofs._LEAF_DOMAIN, root, root, proof.sealed_seq.to_bytes(8), entry.hash
    )
    checkpoint = replace(proof.checkpoint, merkle_root=root_of_one)
    forged = replace(proof, entry=entry, path=(), checkpoint=checkpoint)
    assert forged.flaw() == "the links do not lead from the entry to the sealed one"


async def refused(auditor: Any, request: audit.ProveEntryRequest) -> tuple[str, Any]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await auditor.ProveEntry(request)
    info = info_of(caught.value)
    return info.reason, dict(info.metadata)


async def test_what_is_not_sealed_yet_is_refused_and_how_far_it_is_sealed_is_told(
    fleet: Fleet, sealing: Sealing, auditor: Any
) -> None:
    root = await fleet.root()
    ref = types_pb2.BudgetRef(root_id=root, budget_id=root)
    reason, facts = await refused(auditor, audit.ProveEntryRequest(budget=ref, seq=1))
    assert (reason, facts["sealed_seq"]) == ("NOT_SEALED", "0")
    await fleet.ask(fleet.spend(root))
    await sealing.seal_all()
    await fleet.ask(fleet.spend(root))
    reason, facts = await refused(auditor, audit.ProveEntryRequest(budget=ref, seq=3))
    assert (reason, facts["seq"], facts["sealed_seq"]) == ("NOT_SEALED", "3", "2")


@pytest.mark.parametrize("seq", [0, -1, 2, 2**63 - 1])
async def test_an_entry_that_is_not_there_is_refused(
    fleet: Fleet, sealing: Sealing, auditor: Any, seq: int
) -> None:
    root = await fleet.root()
    await sealing.seal_all()
    ref = types_pb2.BudgetRef(root_id=root, budget_id=root)
    reason, facts = await refused(auditor, audit.ProveEntryRequest(budget=ref, seq=seq))
    assert (reason, facts["field"]) == ("MALFORMED", "seq")


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5, 6])
async def test_checkpoints_are_listed_in_pages(
    fleet: Fleet, sealing: Sealing, auditor: Any, size: int, *, descending: bool
) -> None:
    root = await fleet.root()
    for _ in range(5):
        await fleet.ask(fleet.spend(root))
        await sealing.seal_all()
    request = audit.ListCheckpointsRequest(page_size=size, descending=descending)
    listed = []
    while True:
        page = await auditor.ListCheckpoints(request)
        assert len(page.checkpoints) <= size
        listed += [to_checkpoint(each) for each in page.checkpoints]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    numbers = [1, 2, 3, 4, 5]
    assert [each.number for each in listed] == (numbers[::-1] if descending else numbers)
    assert all(each.flaw() is None for each in listed)
    assert {each.public_key for each in listed} == {sealing.key.public_key}


async def test_the_page_token_of_another_order_is_refused(
    fleet: Fleet, sealing: Sealing, auditor: Any
) -> None:
    root = await fleet.root()
    for _ in range(2):
        await fleet.ask(fleet.spend(root))
        await sealing.seal_all()
    page = await auditor.ListCheckpoints(audit.ListCheckpointsRequest(page_size=1))
    for token in (page.next_page_token, "forged"):
        request = audit.ListCheckpointsRequest(
            page_size=1, page_token=token, descending=token != "forged"
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await auditor.ListCheckpoints(request)
        assert info_of(caught.value).metadata["field"] == "page_token"


@pytest.mark.parametrize(
    "number",
    [0, 23, 24, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**63 - 1, -1, -24, -25, -256, -257],
)
def test_numbers_and_lengths_are_encoded_as_everybody_does(number: int) -> None:
    assert proofs._cbor(number) == cbor2.dumps(number)
    if 0 <= number < 70_000:
        assert proofs._cbor(bytes(number)) == cbor2.dumps(bytes(number))
        assert proofs._cbor("x" * number) == cbor2.dumps("x" * number)
        assert proofs._cbor([None] * number) == cbor2.dumps([None] * number)
