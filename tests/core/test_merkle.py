"""Merkle trees: every leaf proves that it is in the tree, and nothing else does."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, strategies as st

from peculium_server.core.merkle import (
    LEAF_DOMAIN,
    NODE_DOMAIN,
    Growing,
    Step,
    leaf_hash,
    node_hash,
    path_of,
)
from tests.core.merkle import root_by, root_of

LEAVES = st.lists(st.binary(max_size=80), min_size=1, max_size=70)


def defined(leaves: list[bytes]) -> bytes:
    """The root by the recursive definition of RFC 6962, section 2.1."""
    if len(leaves) == 1:
        return hashlib.sha256(LEAF_DOMAIN + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    left, right = defined(leaves[:split]), defined(leaves[split:])
    return hashlib.sha256(NODE_DOMAIN + left + right).digest()


def hashed(leaves: list[bytes]) -> list[bytes]:
    return [leaf_hash(leaf) for leaf in leaves]


@pytest.mark.parametrize("size", range(1, 70))
def test_the_root_is_that_of_the_rfc_for_every_number_of_leaves(size: int) -> None:
    leaves = [bytes([index]) for index in range(size)]
    assert root_of(hashed(leaves)) == defined(leaves)


@pytest.mark.parametrize("size", range(1, 40))
def test_every_leaf_proves(size: int) -> None:
    hashes = hashed([bytes([index]) for index in range(size)])
    for index, leaf in enumerate(hashes):
        path = path_of(hashes, index)
        assert root_by(leaf, path) == root_of(hashes)
        assert len(path) <= (size - 1).bit_length()


@given(leaves=LEAVES, data=st.data())
def test_any_changed_bit_does_not_prove(leaves: list[bytes], data: st.DataObject) -> None:
    hashes = hashed(leaves)
    index = data.draw(st.integers(0, len(leaves) - 1))
    path, leaf = list(path_of(hashes, index)), hashes[index]
    at = data.draw(st.integers(-1, len(path) - 1), label="what is changed")
    bit = data.draw(st.integers(0, 256), label="which bit")
    if at < 0:
        leaf = flipped(leaf, bit % 256)
    elif bit == 256:
        # Of two equal siblings it does not matter which is the left one.
        below = root_by(leaf, path[:at])
        path[at] = Step(path[at].sibling, not path[at].left)
        if below == path[at].sibling:
            return
    else:
        path[at] = path[at]._replace(sibling=flipped(path[at].sibling, bit))
    assert root_by(leaf, path) != root_of(hashes)


def flipped(hash_: bytes, bit: int) -> bytes:
    return (int.from_bytes(hash_) ^ 1 << bit).to_bytes(32)


@given(leaves=LEAVES)
def test_a_path_that_is_cut_or_lengthened_does_not_prove(leaves: list[bytes]) -> None:
    hashes = hashed(leaves)
    path, root = path_of(hashes, 0), root_of(hashes)
    assert root_by(hashes[0], (*path, Step(root, left=True))) != root
    if path:
        assert root_by(hashes[0], path[:-1]) != root


def test_a_node_is_no_leaf() -> None:
    left, right = hashed([b"a", b"b"])
    assert leaf_hash(left + right) != node_hash(left, right)


def test_a_last_leaf_that_is_doubled_makes_another_tree() -> None:
    assert root_of(hashed([b"a", b"b", b"c"])) != root_of(hashed([b"a", b"b", b"c", b"c"]))


@given(leaves=LEAVES)
def test_a_tree_that_grows_keeps_a_hash_for_each_bit_of_its_size(leaves: list[bytes]) -> None:
    growing = Growing()
    for size, leaf in enumerate(leaves, start=1):
        growing.add(leaf_hash(leaf))
        assert growing.root() == defined(leaves[:size])
        assert len(growing._subtrees) == size.bit_count()


def test_there_is_no_root_over_nothing() -> None:
    with pytest.raises(ValueError, match="no root"):
        root_of([])


@pytest.mark.parametrize("index", [-1, 2])
def test_there_is_no_path_from_a_leaf_that_is_not_there(index: int) -> None:
    with pytest.raises(IndexError):
        path_of(hashed([b"a", b"b"]), index)
