"""Cursors: how far somebody has followed the ledger, as bytes that nobody but a server has to understand.

A position for each lane. Within a lane positions have no gaps, and an operation is committed after all
those before it: whoever has seen a position has seen everything up to it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Final

from peculium_server.rpc.calls import CallRefused

_VERSION: Final = b"\x01"
_DOMAIN: Final = b"peculium.cursor.v1\x00"
_CHECKSUM_BYTES: Final = 8
_INCARNATION_BYTES: Final = 16
_HEAD_BYTES: Final = _CHECKSUM_BYTES + len(_VERSION)


def write_cursor(incarnation: bytes, positions: Sequence[int]) -> bytes:
    """The cursor of whoever has seen everything up to these positions, by lane."""
    said = _VERSION + incarnation + struct.pack(f">{len(positions)}Q", *positions)
    return _checksum(said) + said


def read_cursor(cursor: bytes, incarnation: bytes, lanes: int) -> list[int]:
    """The positions of a cursor, by lane.

    Raises:
        CallRefused: It is damaged, or none at all, or one of another ledger.
    """
    checksum, said = cursor[:_CHECKSUM_BYTES], cursor[_CHECKSUM_BYTES:]
    body = cursor[_HEAD_BYTES:]
    if checksum != _checksum(said) or said[: len(_VERSION)] != _VERSION:
        raise CallRefused.malformed("cursor", "is not one that a server has given, or was damaged")
    of, packed = body[:_INCARNATION_BYTES], body[_INCARNATION_BYTES:]
    form = struct.Struct(f">{lanes}Q")
    if of != incarnation or len(packed) != form.size:
        raise CallRefused.malformed("cursor", "is one of another ledger")
    return list(form.unpack(packed))


def _checksum(said: bytes) -> bytes:
    return hashlib.sha256(_DOMAIN + said).digest()[:_CHECKSUM_BYTES]
