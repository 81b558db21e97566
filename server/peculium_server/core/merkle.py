"""Merkle trees as of RFC 6962: one hash over many leaves, and a short proof that one of them is among them.

A leaf is hashed with another prefix than a node, so that neither can be passed off as the other, and no
leaf is ever doubled: n leaves are split at the largest power of two below n.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

LEAF_DOMAIN = b"peculium.leaf.v1\x00"
NODE_DOMAIN = b"peculium.node.v1\x00"

HASH_BYTES = 32


class Step(NamedTuple):
    """One level of the way from a leaf to the root."""

    sibling: bytes
    left: bool
    """The sibling is the left one."""


def leaf_hash(leaf: bytes) -> bytes:
    """The hash of a leaf's bytes."""
    return hashlib.sha256(LEAF_DOMAIN + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of two subtrees' hashes."""
    return hashlib.sha256(NODE_DOMAIN + left + right).digest()


class Growing:
    """The root over leaves that come one after another, in memory for their logarithm."""

    def __init__(self) -> None:
        self.leaves = 0
        self._subtrees: list[bytes] = []
        """Of full subtrees, the largest first: one for each bit of the number of leaves."""

    def add(self, hashed: bytes) -> None:
        """Take the next leaf, by its hash."""
        self.leaves += 1
        # As a counter carries: two subtrees of one size make the next larger one.
        carries = self.leaves
        while not carries & 1:
            hashed = node_hash(self._subtrees.pop(), hashed)
            carries >>= 1
        self._subtrees.append(hashed)

    def root(self) -> bytes:
        """The root over the leaves so far.

        Raises:
            ValueError: There are none.
        """
        if not self._subtrees:
            raise ValueError("a tree without leaves has no root")
        *left, right = self._subtrees
        for subtree in reversed(left):
            right = node_hash(subtree, right)
        return right


def path_of(hashes: Sequence[bytes], index: int) -> tuple[Step, ...]:
    """The way from one leaf up to the root, given the hashes of all leaves.

    Raises:
        IndexError: There is no such leaf.
    """
    if not 0 <= index < len(hashes):
        raise IndexError(f"there is no leaf {index} of {len(hashes)}")
    steps: list[Step] = []
    level = list(hashes)
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            steps.append(Step(level[sibling], left=sibling < index))
        # The last of an odd number has no sibling yet: it goes up as it is.
        odd = level[-1:] if len(level) % 2 else []
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [*(node_hash(left, right) for left, right in pairs), *odd]
        index >>= 1
    return tuple(steps)
