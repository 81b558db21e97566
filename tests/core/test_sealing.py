"""What one checkpoint seals: shared out fairly, and behind the one before."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from peculium_server.core.checkpoint import key_id_of
from peculium_server.core.sealing import sealed_after, shares
from peculium_server.core.state import GENESIS
from tests.core.checkpoints import INCARNATION, KEY, public

WAITING = st.lists(st.integers(0, 1_000), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("waiting", "total", "shared"),
    [
        ([5, 0, 3], 100, [5, 0, 3]),
        ([100, 2, 100], 20, [9, 2, 9]),
        ([100, 100, 100], 31, [10, 10, 11]),
        ([7], 5, [5]),
        ([0, 0], 5, [0, 0]),
    ],
)
def test_what_a_quiet_lane_does_not_use_is_left_to_the_others(
    waiting: list[int], total: int, shared: list[int]
) -> None:
    assert shares(waiting, total) == shared


@given(waiting=WAITING, total=st.integers(20, 2_000))
def test_as_much_is_shared_out_as_there_is_and_nobody_has_less_than_an_even_part(
    waiting: list[int], total: int
) -> None:
    shared = shares(waiting, total)
    assert sum(shared) == min(sum(waiting), total)
    for wanted, given_ in zip(waiting, shared, strict=True):
        assert min(wanted, total // len(waiting)) <= given_ <= wanted


def test_a_clock_that_was_set_back_seals_no_earlier_than_the_checkpoint_before() -> None:
    last = None
    for now, sealed_at in ((1_000, 1_000), (400, 1_000), (1_001, 1_001)):
        sealed = sealed_after(
            last,
            now=now,
            incarnation=INCARNATION,
            positions=[now],
            merkle_root=bytes(32),
            leaves=1,
            key_id=key_id_of(public(KEY)),
            sign=KEY.sign,
        )
        assert sealed.checkpoint.sealed_at == sealed_at
        assert sealed.checkpoint.number == (1 if last is None else last.checkpoint.number + 1)
        assert sealed.checkpoint.previous_hash == (GENESIS if last is None else last.hash)
        assert sealed.hash == sealed.checkpoint.hash()
        last = sealed
