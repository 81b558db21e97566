"""Cursors: how far somebody has followed the ledger, as bytes that nobody but a server has to understand.

A position for each lane, and the number of the last alert. Neither positions within a lane nor alerts have
gaps, and what has one is committed after all those before it: whoever has seen one has seen everything up
to it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from peculium_server.rpc.calls import CallRefused
from peculium_server.rpc.pages import with_checksum, without_checksum

_SCOPE: Final = b"cursor.v1"
_INCARNATION_BYTES: Final = 16


def write_cursor(incarnation: bytes, positions: Sequence[int]) -> bytes:
    """The cursor of whoever has seen everything up to these positions: by lane, and of the alerts."""
    return with_checksum(_SCOPE, incarnation + struct.pack(f">{len(positions)}Q", *positions))


def read_cursor(cursor: bytes, incarnation: bytes, positions: int) -> list[int]:
    """The positions of a cursor, which has so many.

    Raises:
        CallRefused: It is damaged, or none at all, or one of another ledger.
    """
    said = without_checksum(_SCOPE, cursor)
    if said is None:
        raise CallRefused.malformed("cursor", "is not one that a server has given, or was damaged")
    of, packed = said[:_INCARNATION_BYTES], said[_INCARNATION_BYTES:]
    form = struct.Struct(f">{positions}Q")
    if of != incarnation or len(packed) != form.size:
        raise CallRefused.malformed("cursor", "is one of another ledger")
    return list(form.unpack(packed))
