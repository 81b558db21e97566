"""Merkle roots as whoever verifies makes them: of all leaves, or of one and its path."""

from __future__ import annotations

from collections.abc import Iterable

from peculium_server.core.merkle import Growing, Step, node_hash


def root_of(hashes: Iterable[bytes]) -> bytes:
    """The root over leaves, given by their hashes.

    Raises:
        ValueError: There are none.
    """
    growing = Growing()
    for hashed in hashes:
        growing.add(hashed)
    return growing.root()


def root_by(hashed: bytes, path: Iterable[Step]) -> bytes:
    """The root that a leaf's hash and its path lead to: the leaf is in the tree that has this root."""
    for step in path:
        hashed = node_hash(step.sibling, hashed) if step.left else node_hash(hashed, step.sibling)
    return hashed
