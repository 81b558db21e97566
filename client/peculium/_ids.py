"""Ids, secrets and token ids: everything that the client makes and the ledger only ever compares."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
import uuid

from peculium._limits import SECRET_BYTES

_TOKEN_DOMAIN = b"peculium.token.v1\x00"
_RANDOM_BITS = 74
_STEP_BITS = 32
_BACK_MS_MAX = 60_000
"""A clock that goes back farther was far off before: ids that went on from there would be too far from
the ledger's time for as long as the process lives."""


class _Clock:
    """Makes UUIDv7 values that rise within the process, also within one millisecond.

    They rise although the clock goes back a little, and follow it when it goes back far.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> bytes:
        milliseconds = time.time_ns() // 1_000_000
        with self._lock:
            ordered = milliseconds << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
            ahead = (self._last >> _RANDOM_BITS) - milliseconds
            if ordered <= self._last and ahead <= _BACK_MS_MAX:
                # A random step keeps the ids unguessable; a carry borrows from the next millisecond.
                ordered = self._last + 1 + secrets.randbits(_STEP_BITS)
            self._last = ordered
        milliseconds, tail = divmod(ordered, 1 << _RANDOM_BITS)
        high, low = divmod(tail, 1 << 62)
        value = milliseconds << 80 | 7 << 76 | high << 64 | 2 << 62 | low
        return value.to_bytes(16)


_clock = _Clock()


def _forget() -> None:
    # A forked child that went on from its parent's state would share the parent's lock and ids.
    global _clock  # noqa: PLW0603 - one source of ids per process
    _clock = _Clock()


os.register_at_fork(after_in_child=_forget)


def new_id() -> bytes:
    """Make a UUIDv7 that is greater than those that this process made before, by the same clock."""
    return _clock.next()


def new_secret() -> bytes:
    """Make a secret: 32 bytes from the operating system's generator."""
    return secrets.token_bytes(SECRET_BYTES)


def token_id(secret: bytes) -> bytes:
    """The id under which the ledger knows a secret."""
    return hashlib.sha256(_TOKEN_DOMAIN + secret).digest()


def id_text(value: bytes) -> str:
    """An id for people: a UUID, or hexadecimal digits if it is none."""
    return str(uuid.UUID(bytes=value)) if len(value) == 16 else value.hex()  # noqa: PLR2004 - a UUID


def id_bytes(text: str) -> bytes | None:
    """The id that a text shows, with or without hyphens; None if it shows none."""
    try:
        return uuid.UUID(text).bytes
    except ValueError:
        return None
