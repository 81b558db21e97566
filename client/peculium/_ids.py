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
_DRAWN_BYTES = 10
_DRAWN_MASK = 0xFFF << 64 | (1 << 62) - 1
_MARKS = 7 << 76 | 2 << 62
"""Version and variant, between what is drawn."""
_STEP_BYTES = 4
_STEPS_MAX = 1 << 62
"""Below the variant."""
_BACK_MS_MAX = 60_000
"""A clock that goes back farther was far off before: ids that went on from there would be too far from
the ledger's time for as long as the process lives."""


class _Clock:
    """Makes UUIDv7 values that rise within the process, also within one millisecond.

    They rise although the clock goes back a little, and follow it when it goes back far.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._milliseconds = 0
        self._last = 0

    def next(self) -> bytes:
        milliseconds = time.time_ns() // 1_000_000
        with self._lock:
            if 0 <= self._milliseconds - milliseconds <= _BACK_MS_MAX:
                # A random step keeps the ids unguessable.
                value = self._last + 1 + int.from_bytes(secrets.token_bytes(_STEP_BYTES))
                if value ^ self._last < _STEPS_MAX:
                    self._last = value
                    return value.to_bytes(16)
                milliseconds = self._milliseconds + 1
            drawn = int.from_bytes(secrets.token_bytes(_DRAWN_BYTES)) & _DRAWN_MASK
            value = milliseconds << 80 | _MARKS | drawn
            self._milliseconds, self._last = milliseconds, value
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
