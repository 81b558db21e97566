"""What one checkpoint seals: as much as may be at once, shared out fairly, as a Merkle root and a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peculium_server.core.checkpoint import Checkpoint, Sealed
from peculium_server.core.state import GENESIS


def shares(waiting: Sequence[int], total: int) -> list[int]:
    """How many of the operations that wait in each lane are sealed now, if so many may be in all.

    No lane waits for a busier one: what a quiet lane does not use is left to the others.
    """
    shared = [0] * len(waiting)
    left = total
    by_size = sorted(range(len(waiting)), key=waiting.__getitem__)
    for done, lane in enumerate(by_size):
        shared[lane] = min(waiting[lane], left // (len(waiting) - done))
        left -= shared[lane]
    return shared


def sealed_after(
    last: Sealed | None,
    *,
    now: int,
    incarnation: bytes,
    positions: Sequence[int],
    merkle_root: bytes,
    leaves: int,
    key_id: bytes,
    sign: Callable[[bytes], bytes],
) -> Sealed:
    """The checkpoint that follows another one.

    Args:
        last: The one before; None: this is the first.
        now: The database's clock, which may have been set back since. Microseconds since the epoch.
        incarnation: Of the ledger.
        positions: Up to where each lane is sealed.
        merkle_root: Over the heads that moved.
        leaves: How many those are.
        key_id: Of the key that signs.
        sign: Signs a checkpoint's hash.
    """
    checkpoint = Checkpoint(
        number=1 if last is None else last.checkpoint.number + 1,
        sealed_at=now if last is None else max(now, last.checkpoint.sealed_at),
        incarnation=incarnation,
        positions=tuple(positions),
        merkle_root=merkle_root,
        leaves=leaves,
        previous_hash=GENESIS if last is None else last.hash,
    )
    hashed = checkpoint.hash()
    return Sealed(checkpoint, hashed, key_id, sign(hashed))
