"""Checkpoints: what is sealed of the ledger, its canonical encoding, and how a chain of them is verified.

`docs/reference/checkpoints.md` is the same in prose, with test vectors. A change of anything here is a
new version. Signatures are checked by whoever is handed in: the core has no cryptography but SHA-256.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from peculium_server.core import cbor
from peculium_server.core.limits import ID_BYTES
from peculium_server.core.merkle import HASH_BYTES, Growing, leaf_hash
from peculium_server.core.state import GENESIS, Entry
from peculium_server.core.verify import Finding

CHECKPOINT_DOMAIN = b"peculium.checkpoint.v1\x00"
SIGNATURE_DOMAIN = b"peculium.checkpoint-signature.v1\x00"

KEY_ID_BYTES = 8
SEQ_BYTES = 8

_LEAF_LENGTHS = (ID_BYTES, ID_BYTES, HASH_BYTES)

RULE = "checkpoint"
"""What findings here say is broken."""

SignatureCheck = Callable[[bytes, bytes, bytes], bool]
"""Says whether a public key has made a signature over a message: Ed25519."""


class Leaf(NamedTuple):
    """A budget's head as it was sealed. Leaves are in the order of their ids."""

    root_id: bytes
    budget_id: bytes
    seq: int
    """Of the budget's last entry up to the checkpoint."""
    head: bytes
    """The hash of that entry."""

    def hash(self) -> bytes:
        """The leaf in the Merkle tree."""
        root_id, budget_id, seq, head = self
        return leaf_hash(root_id + budget_id + seq.to_bytes(SEQ_BYTES) + head)


class Checkpoint(NamedTuple):
    """What a checkpoint says; its hash covers all of it."""

    number: int
    """1, 2, 3, …"""
    sealed_at: int
    """By the database's clock, never before the checkpoint before. Microseconds since the Unix epoch."""
    incarnation: bytes
    """Of the ledger, when this was sealed."""
    positions: tuple[int, ...]
    """Of each lane, up to where everything is sealed."""
    merkle_root: bytes
    """Over the heads of the budgets that moved since the checkpoint before."""
    leaves: int
    """How many these are; one at least."""
    previous_hash: bytes
    """Of the checkpoint before; 32 zero bytes for the first one."""

    def encoded(self) -> bytes:
        """The canonical encoding: an array of everything, in this order."""
        return cbor.encode(
            [
                self.number,
                self.sealed_at,
                self.incarnation,
                list(self.positions),
                self.merkle_root,
                self.leaves,
                self.previous_hash,
            ]
        )

    def hash(self) -> bytes:
        """What the next checkpoint and the signature refer to."""
        return hashlib.sha256(CHECKPOINT_DOMAIN + self.encoded()).digest()


class Sealed(NamedTuple):
    """A checkpoint as it is recorded, with its signature."""

    checkpoint: Checkpoint
    hash: bytes
    """As recorded; whoever verifies computes it."""
    key_id: bytes
    signature: bytes


def signed_message(checkpoint_hash: bytes) -> bytes:
    """What a checkpoint's signature is made over."""
    return SIGNATURE_DOMAIN + checkpoint_hash


def key_id_of(public_key: bytes) -> bytes:
    """The short name of a public key, which is 32 bytes."""
    return hashlib.sha256(public_key).digest()[:KEY_ID_BYTES]


def wrong_signature(
    checkpoint_hash: bytes,
    key_id: bytes,
    signature: bytes,
    public_keys: Mapping[bytes, bytes],
    is_signed: SignatureCheck,
) -> str | None:
    """What is wrong with the signature of a checkpoint; None: one of the keys has made it."""
    public_key = public_keys.get(key_id)
    if public_key is None or key_id_of(public_key) != key_id:
        return f"it is signed with the key {key_id.hex()}, which is not known"
    if not is_signed(public_key, signature, signed_message(checkpoint_hash)):
        return f"it is not signed with the key {key_id.hex()}"
    return None


class Chain:
    """Verifies checkpoints from the first one on, one after another.

    Feed `checkpoint`, then `leaf` with all its leaves in order, and so on; then ask `finish`. What comes
    after a finding is counted and not looked at.
    """

    def __init__(
        self,
        incarnation: bytes,
        lanes: int,
        public_keys: Mapping[bytes, bytes],
        is_signed: SignatureCheck,
        *,
        earlier: Sequence[bytes] = (),
    ) -> None:
        """Begin with nothing sealed.

        Args:
            incarnation: Of the ledger.
            earlier: The incarnations that the ledger had before it was restored, the first one first.
            lanes: How many the ledger has.
            public_keys: Those that are trusted, by their ids.
            is_signed: Checks signatures.
        """
        self.finding: Finding | None = None
        self.last: Checkpoint | None = None
        """The last checkpoint that holds, with all its leaves."""
        self.positions = tuple(array("q") for _ in range(lanes))
        """For each lane, its position by each checkpoint that holds: the first has index 0."""
        self._incarnations = [*earlier, incarnation]
        """What the next checkpoint may be of: none goes back to an incarnation before the last one's."""
        self._public_keys = public_keys
        self._is_signed = is_signed
        self._open: Checkpoint | None = None
        self._tree = Growing()
        self._leaf: tuple[bytes, bytes] = b"", b""

    def checkpoint(self, sealed: Sealed) -> None:
        """Take the next checkpoint; the leaves of the one before are complete."""
        self._close()
        if self.finding is None:
            problem = self._problem(sealed)
            if problem is not None:
                self._found(sealed.checkpoint.number, problem)
                return
            self._open = sealed.checkpoint
            del self._incarnations[: self._incarnations.index(sealed.checkpoint.incarnation)]
            self._tree = Growing()
            self._leaf = b"", b""

    def leaf(self, leaf: Leaf) -> None:
        """Take the next leaf of the checkpoint that was taken last."""
        if self.finding is not None:
            return
        if self._open is None:
            raise ValueError("a leaf without a checkpoint")
        root_id, budget_id, seq, head = leaf
        if seq < 1 or (len(root_id), len(budget_id), len(head)) != _LEAF_LENGTHS:
            self._found(self._open.number, "a leaf of it is none", leaf)
            return
        budget = root_id, budget_id
        if budget <= self._leaf:
            self._found(self._open.number, "its leaves are not in the order of their ids", leaf)
            return
        self._leaf = budget
        self._tree.add(leaf.hash())

    def finish(self) -> Finding | None:
        """The first finding, or None: the chain holds."""
        self._close()
        return self.finding

    def _close(self) -> None:
        checkpoint, self._open = self._open, None
        if checkpoint is None or self.finding is not None:
            return
        if self._tree.leaves != checkpoint.leaves:
            self._found(
                checkpoint.number, f"it has {self._tree.leaves} leaves and says {checkpoint.leaves}"
            )
        elif self._tree.root() != checkpoint.merkle_root:
            self._found(checkpoint.number, "its Merkle root is not that of its leaves")
        else:
            self.last = checkpoint
            for positions, position in zip(self.positions, checkpoint.positions, strict=True):
                positions.append(position)

    def _problem(self, sealed: Sealed) -> str | None:
        """What is wrong with a checkpoint, by itself and behind the one before."""
        checkpoint, last = sealed.checkpoint, self.last
        expected = 1 if last is None else last.number + 1
        before = [0] * len(self.positions) if last is None else last.positions
        if checkpoint.number != expected:
            return f"checkpoint {expected} was expected, and is missing"
        if checkpoint.incarnation not in self._incarnations:
            return "it is of another ledger"
        if checkpoint.previous_hash != (GENESIS if last is None else last.hash()):
            return "it does not follow the checkpoint before"
        if checkpoint.hash() != sealed.hash:
            return "its hash is not that of what it says"
        if last is not None and checkpoint.sealed_at < last.sealed_at:
            return "it was sealed before the checkpoint before"
        if len(checkpoint.positions) != len(before):
            return f"it has {len(checkpoint.positions)} lanes, not {len(before)}"
        moved = [now - then for now, then in zip(checkpoint.positions, before, strict=True)]
        if min(moved) < 0 or not any(moved) or checkpoint.leaves < 1:
            return "it takes back what was sealed, or seals nothing"
        return wrong_signature(
            sealed.hash, sealed.key_id, sealed.signature, self._public_keys, self._is_signed
        )

    def _found(self, number: int, problem: str, leaf: Leaf | None = None) -> None:
        root_id, budget_id, seq = (b"", b"", 0) if leaf is None else leaf[:3]
        self.finding = Finding(root_id, budget_id, seq, RULE, f"checkpoint {number}: {problem}")


class Published:
    """Compares checkpoints with those that were published: what nobody can make anew.

    Feed `checkpoint` with all there are, then ask `finish`. So it is found if the last ones were cut off
    together with all that they have sealed, or if the ledger was written anew with the right key.
    """

    def __init__(self, published: Mapping[int, bytes]) -> None:
        """Begin with what was published.

        Args:
            published: Hashes of checkpoints, by their numbers.
        """
        self._missing = dict(published)
        self._findings: list[Finding] = []

    def checkpoint(self, number: int, checkpoint_hash: bytes) -> None:
        """Take the next checkpoint."""
        published = self._missing.pop(number, checkpoint_hash)
        if published != checkpoint_hash:
            self._found(number, "it has another hash than the one that was published")

    def finish(self) -> list[Finding]:
        """A finding for each that differs or is missing."""
        for number in sorted(self._missing):
            self._found(number, "it was published, and is missing")
        return self._findings

    def _found(self, number: int, problem: str) -> None:
        self._findings.append(Finding(b"", b"", 0, RULE, f"checkpoint {number}: {problem}"))


class SealedHeads:
    """Compares the heads that entries have left by each checkpoint with those that it has sealed.

    Feed `entry` with the entries of a lane, or of one of its trees, in order of position and part. So it
    is found if one was altered, taken out or put in, before the last checkpoint, whatever hashes were
    made again.
    """

    def __init__(self, positions: Sequence[int], leaves: Iterable[tuple[int, Leaf]]) -> None:
        """Begin before the first entry.

        Args:
            positions: The lane's position by each checkpoint, the first one's first.
            leaves: Those of the same trees, with the number of their checkpoint, ordered by that.
        """
        self.finding: Finding | None = None
        self._positions = positions
        self._leaves: Iterator[tuple[int, Leaf]] = iter(leaves)
        self._next = next(self._leaves, None)
        self._moved: dict[tuple[bytes, bytes], _Moved] = {}
        self._number = 1
        """Of the checkpoint that covers the entries that come now; one more than there are: none does."""

    def entry(self, entry: Entry) -> None:
        """Take the next entry."""
        if self.finding is not None or self._number > len(self._positions):
            return
        if entry.position > self._positions[self._number - 1]:
            self._advance(bisect_left(self._positions, entry.position, lo=self._number) + 1)
            if self._number > len(self._positions):
                return
        key = entry.root_id, entry.budget_id
        moved = self._moved.get(key)
        first = entry.seq if moved is None else moved.first
        self._moved[key] = _Moved(first, entry.seq, entry.hash)

    def finish(self) -> Finding | None:
        """The first finding, or None: everything sealed is as it was."""
        self._advance(len(self._positions) + 1)
        if self.finding is None and self._next is not None:
            number, leaf = self._next
            self._found(leaf, leaf.seq, f"is sealed by checkpoint {number}, which is missing")
        return self.finding

    def _advance(self, number: int) -> None:
        """Go on to a later checkpoint; all before it have sealed what they will."""
        while self.finding is None and self._next is not None and self._next[0] < number:
            sealed_by, leaf = self._next
            moved = self._moved if sealed_by == self._number else {}
            self._compare(sealed_by, leaf, moved.pop((leaf.root_id, leaf.budget_id), None))
            self._next = next(self._leaves, None)
        if self.finding is None and self._moved:
            (root_id, budget_id), moved_since = next(iter(self._moved.items()))
            missing = Leaf(root_id, budget_id, moved_since.seq, moved_since.head)
            self._found(missing, moved_since.first, f"is not sealed by checkpoint {self._number}")
        self._moved = {}
        self._number = number

    def _compare(self, number: int, leaf: Leaf, moved: _Moved | None) -> None:
        if moved is None:
            self._found(leaf, leaf.seq, f"was sealed by checkpoint {number}, and is missing")
        elif moved.seq < leaf.seq:
            self._found(leaf, moved.seq + 1, f"was sealed by checkpoint {number}, and is missing")
        elif moved.seq > leaf.seq:
            self._found(leaf, leaf.seq + 1, f"was not there when checkpoint {number} was sealed")
        elif moved.head != leaf.head:
            self._found(leaf, leaf.seq, f"has another hash than checkpoint {number} has sealed")

    def _found(self, leaf: Leaf, seq: int, problem: str) -> None:
        if self.finding is None:
            self.finding = Finding(
                leaf.root_id, leaf.budget_id, seq, RULE, f"entry {seq} of the budget {problem}"
            )


class _Moved(NamedTuple):
    """What a budget's entries since the checkpoint before have come to."""

    first: int
    """The seq of the first of them."""
    seq: int
    head: bytes
