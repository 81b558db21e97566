"""What webhooks' messages are signed with.

Each webhook has a secret of its own, derived from a master key that lies in a file of the server's and
nowhere else: HKDF-Expand of RFC 5869 with SHA-256, where the info names the ledger and the webhook. So the
database never has a secret, every server that has the file has them all, and nothing is to be kept when a
webhook is made.

A file may have several master keys, one on each line, the newest first: messages are signed with all of
them, so that receivers can go over to the new secret one after another.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from peculium_server.files import PrivateFileUnusable, make_private, read_private

KEY_BYTES: Final = 32
KEYS_MAX: Final = 4
_FORM: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DOMAIN: Final = b"peculium.webhook.v1\x00"
_PREFIX: Final = "whsec_"
_VERSION: Final = "v1"


class WebhookKeysInvalid(Exception):
    """A file of master keys cannot be used; the message says why, and nothing of what is in it."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


class WebhookKeys:
    """Master keys, the newest first."""

    def __init__(self, masters: Sequence[bytes]) -> None:
        self._masters = tuple(masters)

    @classmethod
    def load(cls, path: Path) -> WebhookKeys:
        """Read master keys.

        Raises:
            WebhookKeysInvalid: There are none, or others than the file's owner may read them.
        """
        try:
            text = read_private(path)
        except PrivateFileUnusable as error:
            raise WebhookKeysInvalid(path, str(error)) from error
        lines = [line.strip() for line in text.decode(errors="replace").splitlines()]
        said = [line for line in lines if line and not line.startswith("#")]
        if not 1 <= len(said) <= KEYS_MAX or not all(map(_FORM.fullmatch, said)):
            raise WebhookKeysInvalid(
                path, f"must have 1 to {KEYS_MAX} lines of {2 * KEY_BYTES} hexadecimal digits"
            )
        return cls([bytes.fromhex(line) for line in said])

    @classmethod
    def make(cls, path: Path) -> WebhookKeys:
        """Make a master key, in a new file that is for its owner only.

        Raises:
            WebhookKeysInvalid: The file exists, or cannot be made.
        """
        master = secrets.token_bytes(KEY_BYTES)
        try:
            make_private(path, f"{master.hex()}\n".encode())
        except PrivateFileUnusable as error:
            raise WebhookKeysInvalid(path, str(error)) from error
        return cls([master])

    def secret(self, incarnation: bytes, webhook_id: bytes) -> str:
        """A webhook's secret, as its receiver is told it: by the newest key."""
        derived = _derived(self._masters[0], incarnation, webhook_id)
        return _PREFIX + base64.b64encode(derived).decode()

    def sign(
        self, incarnation: bytes, webhook_id: bytes, message_id: str, timestamp: int, body: bytes
    ) -> str:
        """The signatures of a message to a webhook, as the header `webhook-signature` has them."""
        signed = b".".join((message_id.encode(), str(timestamp).encode(), body))
        signatures = []
        for master in self._masters:
            key = _derived(master, incarnation, webhook_id)
            digest = hmac.digest(key, signed, hashlib.sha256)
            signatures.append(f"{_VERSION},{base64.b64encode(digest).decode()}")
        return " ".join(signatures)

    def __repr__(self) -> str:
        return f"WebhookKeys({len(self._masters)})"


def _derived(master: bytes, incarnation: bytes, webhook_id: bytes) -> bytes:
    """HKDF-Expand to the length of one SHA-256; the master key is uniformly random by itself."""
    return hmac.digest(master, _DOMAIN + incarnation + webhook_id + b"\x01", hashlib.sha256)
