"""Ed25519 keys: made, read from files, and used to sign checkpoints and to check their signatures.

A private key lies in a file of its own, as PEM (PKCS #8), which nobody but the server's user may read. It
is never told to anybody: not to a log, not in an error, not to the database.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from peculium_server.core.checkpoint import key_id_of, signed_message
from peculium_server.files import PrivateFileUnusable, make_private, read_private

_PEM_BYTES_MAX: Final = 16 * 1024


class SigningKeyInvalid(Exception):
    """A key file cannot be used; the message says why, and nothing of what is in it."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class SigningKey:
    """A private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()
        """32 bytes."""
        self.key_id = key_id_of(self.public_key)
        """By which checkpoints name it."""

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a private key.

        Raises:
            SigningKeyInvalid: There is none, or too many may read it.
        """
        try:
            pem = read_private(path)
        except PrivateFileUnusable as error:
            raise SigningKeyInvalid(path, str(error)) from error
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            # Not what is wrong with it: a part of it may be the key.
            raise SigningKeyInvalid(
                path, "is not a private key as PEM without a password"
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise SigningKeyInvalid(path, "is not an Ed25519 key")
        return cls(key)

    @classmethod
    def make(cls, path: Path) -> SigningKey:
        """Make a private key, in a new file that is for its owner only.

        Raises:
            SigningKeyInvalid: The file exists, or cannot be made.
        """
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        try:
            make_private(path, pem)
        except PrivateFileUnusable as error:
            raise SigningKeyInvalid(path, str(error)) from error
        return cls(key)

    def sign(self, checkpoint_hash: bytes) -> bytes:
        """The signature of a checkpoint, by its hash: 64 bytes."""
        return self._key.sign(signed_message(checkpoint_hash))

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id.hex()})"


def is_signed(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Say whether a public key, of 32 bytes, has made a signature over a message."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def public_pem(public_key: bytes) -> str:
    """A public key as it is published: PEM."""
    key = Ed25519PublicKey.from_public_bytes(public_key)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form).decode()


def load_public_key(path: Path) -> bytes:
    """The public key of a file: PEM, or its 64 hexadecimal digits.

    Raises:
        SigningKeyInvalid: There is none.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_PEM_BYTES_MAX)
    except OSError as error:
        raise SigningKeyInvalid(path, f"cannot be read: {error.strerror}") from error
    try:
        return _parse_public_key(content)
    except ValueError:
        raise SigningKeyInvalid(
            path, "is not an Ed25519 public key, as PEM or 64 hexadecimal digits"
        ) from None


def _parse_public_key(text: bytes) -> bytes:
    """The public key of a text: PEM, or its 64 hexadecimal digits.

    Raises:
        ValueError: It is none.
    """
    if b"-----BEGIN" not in text:
        raw = bytes.fromhex(text.decode().strip())
        return Ed25519PublicKey.from_public_bytes(raw).public_bytes_raw()
    try:
        key = serialization.load_pem_public_key(text)
    except UnsupportedAlgorithm as error:
        raise ValueError("not a key that can be used") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("not an Ed25519 key")  # noqa: TRY004 - of the text
    return key.public_bytes_raw()
