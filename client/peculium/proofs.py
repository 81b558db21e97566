"""Checkpoints, and proofs that an entry is under one: checked here with SHA-256 and nothing else.

What is left for the caller is the signature: Ed25519, by a public key that the ledger's operator has
published. `docs/reference/checkpoints.md` says byte by byte what is checked.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime
from typing import Final

from peculium._times import microseconds
from peculium.v1 import types_pb2
from peculium.values import EntryInfo

_OPERATION_DOMAIN: Final = b"peculium.operation.v1\x00"
_ENTRY_DOMAIN: Final = b"peculium.entry.v1\x00"
_LEAF_DOMAIN: Final = b"peculium.leaf.v1\x00"
_NODE_DOMAIN: Final = b"peculium.node.v1\x00"
_CHECKPOINT_DOMAIN: Final = b"peculium.checkpoint.v1\x00"
_SIGNATURE_DOMAIN: Final = b"peculium.checkpoint-signature.v1\x00"

_KEY_ID_BYTES: Final = 8
_ARGUMENT_SIZES: Final = (
    (24, 1, 0x100),
    (25, 2, 0x1_0000),
    (26, 4, 0x1_0000_0000),
    (27, 8, 1 << 64),
)
"""Of CBOR: how the head of an item says what does not fit into it."""

_Item = int | bytes | str | None | Sequence["_Item"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A sealed checkpoint.

    Attributes:
        number: 1, 2, 3, …
        sealed_at: When it was sealed, by the ledger's clock.
        incarnation: Of the ledger: 16 bytes.
        positions: Each lane's position up to which everything is sealed.
        merkle_root: Over the heads of the budgets that moved since the checkpoint before.
        leaves: How many those are.
        previous_hash: Of the checkpoint before; 32 zero bytes for the first one.
        hash: Of this checkpoint, as the ledger says.
        key_id: The first 8 bytes of SHA-256 of the public key.
        signature: Ed25519 over `signed_message`.
        public_key: As the ledger has it, which proves nothing: compare it with what was published.
    """

    number: int
    sealed_at: datetime
    incarnation: bytes
    positions: tuple[int, ...]
    merkle_root: bytes
    leaves: int
    previous_hash: bytes
    hash: bytes
    key_id: bytes
    signature: bytes
    public_key: bytes

    @property
    def signed_message(self) -> bytes:
        """What the signature is made over."""
        return _SIGNATURE_DOMAIN + self.hash

    def flaw(self) -> str | None:
        """What does not hold, for people; None if the hash is that of what the checkpoint says."""
        encoded = _cbor(
            [
                self.number,
                microseconds(self.sealed_at),
                self.incarnation,
                self.positions,
                self.merkle_root,
                self.leaves,
                self.previous_hash,
            ]
        )
        if _sha256(_CHECKPOINT_DOMAIN, encoded) != self.hash:
            return "the checkpoint's hash is not that of what it says"
        if _sha256(self.public_key)[:_KEY_ID_BYTES] != self.key_id:
            return "the checkpoint's public key is not the one that it names"
        return None


@dataclass(frozen=True, slots=True)
class Link:
    """An entry of a budget's chain, as far as its hash is made of it.

    Attributes:
        digest: The operation's.
        part: Which part of the operation.
    """

    digest: bytes
    part: int


@dataclass(frozen=True, slots=True)
class MerkleStep:
    """One level of the way from a leaf to a Merkle root.

    Attributes:
        sibling: The other hash.
        left: It is the left one.
    """

    sibling: bytes
    left: bool


@dataclass(frozen=True, slots=True)
class Proof:
    """The proof that an entry is under a checkpoint.

    Attributes:
        entry: The entry.
        others: The other parts of its operation, in order.
        links: The budget's entries after it, up to the sealed one.
        sealed_seq: The seq of the sealed one.
        path: From the sealed head to the Merkle root.
        checkpoint: The first checkpoint that seals the entry.
    """

    entry: EntryInfo
    others: tuple[EntryInfo, ...]
    links: tuple[Link, ...]
    sealed_seq: int
    path: tuple[MerkleStep, ...]
    checkpoint: Checkpoint

    def flaw(self) -> str | None:
        """What does not hold, for people; None if all hashes lead from the entry to the checkpoint's.

        Whether the checkpoint is signed is not looked at, nor `changes`, which `effect` says too.
        """
        entry = self.entry
        parts = sorted((entry, *self.others), key=lambda part: part.part)
        if [part.part for part in parts] != list(range(entry.parts)):
            return "the operation's parts are not all there"
        if _digest(parts) != entry.digest:
            return "the digest is not that of the operation's parts"
        head = _link(entry.previous_hash, entry.digest, entry.part)
        if head != entry.hash:
            return "the entry's hash is not that of its digest and the entry before"
        if entry.seq + len(self.links) != self.sealed_seq:
            return "the links do not lead from the entry to the sealed one"
        for link in self.links:
            head = _link(head, link.digest, link.part)
        ids = entry.root_id + entry.budget_id
        node = _sha256(_LEAF_DOMAIN, ids, self.sealed_seq.to_bytes(8), head)
        for step in self.path:
            pair = (step.sibling, node) if step.left else (node, step.sibling)
            node = _sha256(_NODE_DOMAIN, *pair)
        if node != self.checkpoint.merkle_root:
            return "the sealed head is not under the checkpoint's Merkle root"
        return self.checkpoint.flaw()


def _digest(parts: Sequence[EntryInfo]) -> bytes:
    first = parts[0]
    operation: list[_Item] = [
        types_pb2.OperationKind.Value(f"OPERATION_KIND_{first.kind}"),
        first.root_id,
        uuid.UUID(first.operation_id).bytes,
        first.position,
        microseconds(first.at),
        first.actor,
        bytes.fromhex(first.trace_id) if first.trace_id else None,
        first.amount,
        first.request,
        [
            [part.budget_id, part.seq, part.consumed, astuple(part.balances), part.effect]
            for part in parts
        ],
    ]
    return _sha256(_OPERATION_DOMAIN, _cbor(operation))


def _link(previous: bytes, digest: bytes, part: int) -> bytes:
    return _sha256(_ENTRY_DOMAIN, previous, digest, part.to_bytes(2))


def _sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def _cbor(item: _Item) -> bytes:
    """Deterministic CBOR, as far as digests and checkpoints need it."""
    match item:
        case None:
            return b"\xf6"
        case int():
            return _head(0, item) if item >= 0 else _head(1, -1 - item)
        case bytes():
            return _head(2, len(item)) + item
        case str():
            text = item.encode()
            return _head(3, len(text)) + text
        case _:
            return _head(4, len(item)) + b"".join(_each(item))


def _each(items: Iterable[_Item]) -> Iterable[bytes]:
    return (_cbor(item) for item in items)


def _head(major: int, argument: int) -> bytes:
    if argument < _ARGUMENT_SIZES[0][0]:
        return bytes([major << 5 | argument])
    info, size = next((info, size) for info, size, end in _ARGUMENT_SIZES if argument < end)
    return bytes([major << 5 | info]) + argument.to_bytes(size)
