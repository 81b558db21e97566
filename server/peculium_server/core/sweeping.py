"""What the ledger does by itself, when time is over: Lapse, Expire and Collect.

Each befalls its subject at most once: a hold lapses once, a budget closes once, and below a closed
level nothing ever becomes available again. So the id of such an operation is derived from what it
acts on, and doing it twice, from whatever server, is a replay.
"""

from __future__ import annotations

import hashlib

from peculium_server.core.operations import ByRole, Collect, Expire, Kind, Lapse

_DOMAIN = b"peculium.system.v1\x00"
_TIME_BYTES = 6


def lapse(root_id: bytes, budget_id: bytes, hold_id: bytes) -> Lapse:
    """End a hold whose time is over."""
    return Lapse(
        operation_id=system_id(Kind.LAPSE, hold_id),
        root_id=root_id,
        budget_id=budget_id,
        authority=ByRole(),
        hold_id=hold_id,
    )


def expire(root_id: bytes, budget_id: bytes) -> Expire:
    """Close a budget whose lease is over."""
    return Expire(
        operation_id=system_id(Kind.EXPIRE, budget_id),
        root_id=root_id,
        budget_id=budget_id,
        authority=ByRole(),
    )


def collect(root_id: bytes, budget_id: bytes) -> Collect:
    """Empty a budget below a closed one."""
    return Collect(
        operation_id=system_id(Kind.COLLECT, budget_id),
        root_id=root_id,
        budget_id=budget_id,
        authority=ByRole(),
    )


def system_id(kind: Kind, subject: bytes) -> bytes:
    """The id of an operation of the ledger's own on a hold or budget, or after an operation: a UUIDv8.

    Its first 48 bits are its subject's, which are a time: so ids of one age lie together in the
    index of entries. The version is not the one of clients' ids, so that no client can take it first
    and keep a hold from lapsing or a lease from ending.
    """
    digest = hashlib.sha256(_DOMAIN + kind.to_bytes(1) + subject).digest()
    low = bytearray(digest[: len(subject) - _TIME_BYTES])
    low[0] = 0x80 | low[0] & 0x0F
    low[2] = 0x80 | low[2] & 0x3F
    return subject[:_TIME_BYTES] + bytes(low)
