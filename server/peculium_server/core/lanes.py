"""Which lane a tree belongs to."""

from __future__ import annotations

import hashlib

_DOMAIN = b"peculium.lane.v1\x00"


def lane_of(root_id: bytes, lanes: int) -> int:
    """The lane of a root: SHA-256 over a domain and the id, its first 8 bytes modulo the lanes."""
    return int.from_bytes(hashlib.sha256(_DOMAIN + root_id).digest()[:8]) % lanes
