"""Checkpoints over journals in memory: what a sealer does, without a database. Signed with a real key.

Run this module to write the vectors of docs/reference/checkpoint-vectors.json again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peculium_server.core.checkpoint import (
    Chain,
    Checkpoint,
    Leaf,
    Sealed,
    SealedHeads,
    key_id_of,
    signed_message,
)
from peculium_server.core.merkle import path_of
from peculium_server.core.state import GENESIS, Entry
from peculium_server.core.verify import Finding
from peculium_server.signing import is_signed
from tests.core.merkle import root_of

FILE = Path(__file__).parents[2] / "docs" / "reference" / "checkpoint-vectors.json"

INCARNATION = bytes(range(16))
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


class Record(NamedTuple):
    """A checkpoint with its leaves."""

    sealed: Sealed
    leaves: tuple[Leaf, ...]


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def signed(checkpoint: Checkpoint, key: Ed25519PrivateKey = KEY) -> Sealed:
    hash_ = checkpoint.hash()
    return Sealed(checkpoint, hash_, key_id_of(public(key)), key.sign(signed_message(hash_)))


def sealed(
    journal: Sequence[Entry],
    positions: Sequence[int],
    keys: Sequence[Ed25519PrivateKey] = (KEY,),
    incarnations: Sequence[bytes] = (INCARNATION,),
) -> list[Record]:
    """Seal a journal of one lane up to one position after another; the last key and incarnation go on."""
    records: list[Record] = []
    before = 0
    for index, position in enumerate(positions):
        heads: dict[tuple[bytes, bytes], Leaf] = {}
        for entry in journal:
            if before < entry.position <= position:
                key = entry.root_id, entry.budget_id
                heads[key] = Leaf(*key, entry.seq, entry.hash)
        leaves = tuple(sorted(heads.values()))
        checkpoint = Checkpoint(
            number=index + 1,
            sealed_at=1_795_000_000_000_000 + index * 60_000_000,
            incarnation=incarnations[min(index, len(incarnations) - 1)],
            positions=(position,),
            merkle_root=root_of(leaf.hash() for leaf in leaves),
            leaves=len(leaves),
            previous_hash=records[-1].sealed.hash if records else GENESIS,
        )
        records.append(Record(signed(checkpoint, keys[min(index, len(keys) - 1)]), leaves))
        before = position
    return records


def verified(
    records: Iterable[Record],
    journal: Iterable[Entry],
    keys: Iterable[Ed25519PrivateKey] = (KEY,),
    earlier: Sequence[bytes] = (),
) -> Finding | None:
    """What is found in checkpoints, or else in the entries that they have sealed."""
    known = {key_id_of(public(key)): public(key) for key in keys}
    chain = Chain(INCARNATION, 1, known, is_signed, earlier=earlier)
    numbered: list[tuple[int, Leaf]] = []
    for record in records:
        chain.checkpoint(record.sealed)
        for leaf in record.leaves:
            chain.leaf(leaf)
            numbered.append((record.sealed.checkpoint.number, leaf))
    finding = chain.finish()
    if finding is not None:
        return finding
    heads = SealedHeads(chain.positions[0], numbered)
    for entry in journal:
        heads.entry(entry)
    return heads.finish()


# -- The vectors ----------------------------------------------------------------------------------------


def made() -> dict[str, Any]:
    """Checkpoints of a few leaves each, with the proof of each leaf."""
    return {
        "private_key": KEY.private_bytes_raw().hex(),
        "public_key": public(KEY).hex(),
        "key_id": key_id_of(public(KEY)).hex(),
        "checkpoints": [_vector(record) for record in _some_records()],
    }


def _some_records() -> Iterator[Record]:
    previous, position = GENESIS, 0
    for number, size in enumerate((1, 2, 3, 7), start=1):
        leaves = tuple(
            Leaf(bytes([number] * 16), bytes([index] * 16), index + number, bytes([size] * 32))
            for index in range(size)
        )
        position += size
        checkpoint = Checkpoint(
            number=number,
            sealed_at=1_795_000_000_000_000 + number,
            incarnation=INCARNATION,
            positions=(position, 300 * position, 0),
            merkle_root=root_of(leaf.hash() for leaf in leaves),
            leaves=size,
            previous_hash=previous,
        )
        record = Record(signed(checkpoint), leaves)
        previous = record.sealed.hash
        yield record


def _vector(record: Record) -> dict[str, Any]:
    checkpoint = record.sealed.checkpoint
    hashes = [leaf.hash() for leaf in record.leaves]
    return {
        "number": checkpoint.number,
        "sealed_at": checkpoint.sealed_at,
        "incarnation": checkpoint.incarnation.hex(),
        "positions": list(checkpoint.positions),
        "merkle_root": checkpoint.merkle_root.hex(),
        "previous_hash": checkpoint.previous_hash.hex(),
        "encoded": checkpoint.encoded().hex(),
        "hash": record.sealed.hash.hex(),
        "signature": record.sealed.signature.hex(),
        "leaves": [
            {
                "root_id": leaf.root_id.hex(),
                "budget_id": leaf.budget_id.hex(),
                "seq": leaf.seq,
                "head": leaf.head.hex(),
                "hash": hashed.hex(),
                "path": [
                    {"sibling": step.sibling.hex(), "left": step.left}
                    for step in path_of(hashes, index)
                ],
            }
            for index, (leaf, hashed) in enumerate(zip(record.leaves, hashes, strict=True))
        ],
    }


def text() -> str:
    """The contents of the file."""
    return json.dumps(made(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
