"""Keys for checkpoints: their files are for one user only, and nothing of them is ever told."""

from __future__ import annotations

import base64
import errno
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from peculium_server.core.checkpoint import signed_message
from peculium_server.signing import (
    SigningKey,
    SigningKeyInvalid,
    is_signed,
    load_public_key,
    public_pem,
)

HASH = bytes(range(32))


UNKNOWN_ALGORITHM = bytes.fromhex("300506032a0304")
"""As DER: a sequence of the object identifier 1.2.3.4, which no kind of key has."""


def pem(label: str, der: bytes) -> bytes:
    body = base64.b64encode(der).decode()
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n".encode()


def pem_of(
    key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey, password: str = ""
) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password.encode())
        if password
        else serialization.NoEncryption(),
    )


def test_a_key_that_was_made_is_read_again(tmp_path: Path) -> None:
    made = SigningKey.make(tmp_path / "key.pem")
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["key.pem"]
    loaded = SigningKey.load(tmp_path / "key.pem")
    assert (loaded.public_key, loaded.key_id) == (made.public_key, made.key_id)
    assert is_signed(loaded.public_key, made.sign(HASH), signed_message(HASH))


def test_a_key_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))

    def link(_: Path, path: Path) -> None:
        assert synced
        assert not path.exists()
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(SigningKeyInvalid, match="the disk is gone"):
        SigningKey.make(tmp_path / "key.pem")
    assert synced[0] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_never_made_over_another(tmp_path: Path) -> None:
    made = SigningKey.make(tmp_path / "key.pem")
    with pytest.raises(SigningKeyInvalid, match="cannot be made: File exists"):
        SigningKey.make(tmp_path / "key.pem")
    assert SigningKey.load(tmp_path / "key.pem").key_id == made.key_id
    assert len(list(tmp_path.iterdir())) == 1


def test_a_key_cannot_be_made_where_there_is_no_place(tmp_path: Path) -> None:
    with pytest.raises(SigningKeyInvalid, match="cannot be made: No such file"):
        SigningKey.make(tmp_path / "none" / "key.pem")


@pytest.mark.parametrize("mode", [0o604, 0o660, 0o644, 0o620, 0o602, 0o610, 0o601])
def test_a_key_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key.pem"
    SigningKey.make(path)
    path.chmod(mode)
    with pytest.raises(SigningKeyInvalid, match=f"others may use it .mode {mode:03o}."):
        SigningKey.load(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not a private key"),
        (b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n", "is not a private"),
        (pem_of(ed25519.Ed25519PrivateKey.generate(), "password"), "without a password"),
        (pem_of(ec.generate_private_key(ec.SECP256R1())), "is not an Ed25519 key"),
        (
            pem("PRIVATE KEY", b"\x30\x0e\x02\x01\x00" + UNKNOWN_ALGORITHM + b"\x04\x02\x04\x00"),
            "is not a private key",
        ),
    ],
)
def test_what_is_no_key_is_refused_without_telling_it(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "key.pem"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(SigningKeyInvalid, match=problem) as refused:
        SigningKey.load(path)
    assert refused.value.__cause__ is None
    for line in content.decode().splitlines()[1:-1]:
        assert line not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SigningKeyInvalid, match="cannot be read: No such file"):
        SigningKey.load(tmp_path / "none")
    with pytest.raises(SigningKeyInvalid, match="cannot be read: No such file"):
        load_public_key(tmp_path / "none")


def test_a_key_tells_nothing_of_itself(tmp_path: Path) -> None:
    key = SigningKey.make(tmp_path / "key.pem")
    assert repr(key) == f"SigningKey({key.key_id.hex()})"


def test_a_signature_is_good_for_one_message_and_one_key(tmp_path: Path) -> None:
    key, other = SigningKey.make(tmp_path / "a"), SigningKey.make(tmp_path / "b")
    signature = key.sign(HASH)
    assert not is_signed(other.public_key, signature, signed_message(HASH))
    assert not is_signed(key.public_key, signature, signed_message(bytes(32)))
    # The domain is a part of what is signed.
    assert not is_signed(key.public_key, signature, HASH)
    assert not is_signed(key.public_key, signature[:-1], signed_message(HASH))
    assert not is_signed(b"short", signature, signed_message(HASH))


@pytest.mark.parametrize("form", ["pem", "hex"])
def test_a_public_key_is_read_as_it_is_published(tmp_path: Path, form: str) -> None:
    key = SigningKey.make(tmp_path / "key.pem")
    published = public_pem(key.public_key) if form == "pem" else f"{key.public_key.hex()}\n"
    (tmp_path / "public").write_text(published)
    assert load_public_key(tmp_path / "public") == key.public_key


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"00",
        b"\xff\xff",
        b"zz" * 32,
        b"-----BEGIN PUBLIC KEY-----\nnone\n-----END PUBLIC KEY-----\n",
        pem("PUBLIC KEY", b"\x30\x0b" + UNKNOWN_ALGORITHM + b"\x03\x02\x00\x01"),
        pem_of(ed25519.Ed25519PrivateKey.generate()),
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    ],
)
def test_what_is_no_public_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "public").write_bytes(content)
    with pytest.raises(SigningKeyInvalid, match="is not an Ed25519 public key"):
        load_public_key(tmp_path / "public")


def test_no_more_is_read_than_a_key_can_have() -> None:
    """What never ends is refused as anything else that is no key."""
    with pytest.raises(SigningKeyInvalid, match="is not an Ed25519 public key"):
        load_public_key(Path("/dev/zero"))
