"""API keys: made here, so that the ledger never sees one before it is used, and known to it by a digest."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
import zlib
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Self

from peculium._ids import id_text, new_id
from peculium._limits import ID_BYTES
from peculium.errors import Malformed

KEY_PREFIX = "pek_"
"""How every key begins, so that secret scanners find it."""

_VERSION = 1
_DOMAIN = b"peculium.key.v1\x00"
_SECRET_BYTES = 33
"""A byte more than enough: the text then has no padding and no unused bits."""
_BODY_BYTES = 1 + ID_BYTES + _SECRET_BYTES
_CHECKSUM_BYTES = 4
_TEXT_CHARACTERS = (_BODY_BYTES + _CHECKSUM_BYTES) * 4 // 3
_TEXT = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


class Role(IntEnum):
    """What a caller may be."""

    AGENT = 1
    """May operate on budgets."""
    ADMIN = 2
    """May do everything."""
    AUDITOR = 3
    """May read everything."""


class KeyState(IntEnum):
    """What an API key is good for, by the ledger's clock."""

    ACTIVE = 1
    EXPIRED = 2
    REVOKED = 3


class ApiKey:
    """The text with which a principal calls.

    `str()` and `repr()` show which key, never the text; `reveal()` does.
    """

    __slots__ = ("_text", "key_id")

    def __init__(self, key_id: bytes, text: str) -> None:
        self.key_id = key_id
        """Which key; of a key that was rotated, all its texts have the same."""
        self._text = text

    @classmethod
    def new(cls, key_id: bytes | None = None) -> Self:
        """Make a text for a new key, or a new one for a key that there is."""
        key_id = key_id or new_id()
        body = bytes((_VERSION,)) + key_id + secrets.token_bytes(_SECRET_BYTES)
        return cls(key_id, KEY_PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `reveal()` wrote.

        Raises:
            Malformed: It has another beginning, length, alphabet, version or checksum. The message
                does not repeat the text.
        """
        if not text.startswith(KEY_PREFIX):
            raise _malformed(f'begins with "{KEY_PREFIX}"')
        encoded = text.removeprefix(KEY_PREFIX)
        if len(encoded) != _TEXT_CHARACTERS:
            raise _malformed(
                f'has {_TEXT_CHARACTERS} characters after "{KEY_PREFIX}", this one {len(encoded)}'
            )
        # The decoder would also take "+", "/" and "=": then one key had several texts.
        if not _TEXT.fullmatch(encoded):
            raise _malformed("has no characters but A-Z, a-z, 0-9, - and _")
        try:
            decoded = base64.urlsafe_b64decode(encoded)
        except (binascii.Error, ValueError):
            raise _malformed("is base64url") from None
        body, checksum = decoded[:_BODY_BYTES], decoded[_BODY_BYTES:]
        if checksum != _checksum(body):
            raise _malformed("has a checksum that fits; a part of this one was changed or lost")
        if body[0] != _VERSION:
            raise _malformed(f"has version {_VERSION}, this one {body[0]}")
        return cls(body[1 : 1 + ID_BYTES], text)

    @property
    def digest(self) -> bytes:
        """What the ledger knows it by: SHA-256 with a domain prefix, 32 bytes."""
        return hashlib.sha256(_DOMAIN + self._text.encode()).digest()

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __str__(self) -> str:
        return f"API key {id_text(self.key_id)}"

    def __repr__(self) -> str:
        return f"<ApiKey {id_text(self.key_id)}>"


@dataclass(frozen=True, slots=True)
class KeyAct:
    """What was done to an API key.

    Attributes:
        kind: "CREATE", "ROTATE" or "REVOKE".
        at: When, by the ledger's clock.
        by: Who: a principal, or "database:" and a user of the ledger's database.
        by_key: The id of the API key with which that was; None: none of the ledger's.
        operation_id: The request that asked for it.
        reason: Why, of a revocation.
    """

    kind: str
    at: datetime
    by: str
    by_key: str | None
    operation_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """An API key, without anything that one could call with.

    Attributes:
        key_id: Its id, as text.
        principal: Who calls with it.
        roles: As what.
        roots: The ids of the roots that it is limited to; None: all, also those to come.
        label: What it is for.
        state: What it is good for.
        expires_at: When it expires; None: never.
        overlap_until: Until when a text from before the last rotation is valid, too; None: none is.
        acts: Everything that was done to it, in order.
    """

    key_id: str
    principal: str
    roles: tuple[Role, ...]
    roots: tuple[bytes, ...] | None
    label: str
    state: KeyState
    expires_at: datetime | None
    overlap_until: datetime | None
    acts: tuple[KeyAct, ...]


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that got a text, and the text: nobody can tell it again.

    Attributes:
        info: The key.
        key: Its text.
    """

    info: KeyInfo
    key: ApiKey


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(_CHECKSUM_BYTES)


def _malformed(problem: str) -> Malformed:
    return Malformed(f"an API key {problem}", facts={"field": "api_key", "problem": problem})
