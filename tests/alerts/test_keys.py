"""Webhooks' secrets and signatures: as Standard Webhooks has them, and each webhook its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from peculium_server.webhooks.keys import WebhookKeys, WebhookKeysInvalid
from tests.alerts.documented import verified

LEDGER, WEBHOOK = bytes(16), bytes(range(16))


def headers(signature: str, message_id: str = "m", timestamp: int = 1_000) -> dict[str, str]:
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature,
    }


def test_the_verification_of_the_page_is_that_of_the_specification() -> None:
    """By the test vector of the specification's libraries."""
    told = headers(
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
    )
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    assert verified(secret, told, body, 1614265330)
    assert not verified(secret, told, body + b" ", 1614265330)
    assert not verified(secret, told, body, 1614265330 + 301)


def test_what_is_signed_is_verified_with_the_secret_and_with_no_other(tmp_path: Path) -> None:
    keys = WebhookKeys.make(tmp_path / "key")
    told = headers(keys.sign(LEDGER, WEBHOOK, "m", 1_000, b"{}"))
    assert verified(keys.secret(LEDGER, WEBHOOK), told, b"{}", 1_000)
    others = [
        keys.secret(bytes(15) + b"x", WEBHOOK),
        keys.secret(LEDGER, bytes(16)),
        WebhookKeys.make(tmp_path / "other").secret(LEDGER, WEBHOOK),
    ]
    assert not any(verified(other, told, b"{}", 1_000) for other in others)
    assert len({*others, keys.secret(LEDGER, WEBHOOK)}) == 4


def test_every_server_with_the_file_has_the_same_secrets(tmp_path: Path) -> None:
    made = WebhookKeys.make(tmp_path / "key")
    assert WebhookKeys.load(tmp_path / "key").secret(LEDGER, WEBHOOK) == made.secret(
        LEDGER, WEBHOOK
    )
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(WebhookKeysInvalid, match="cannot be made"):
        WebhookKeys.make(tmp_path / "key")


def test_while_there_are_two_keys_receivers_with_the_old_secret_and_the_new_one_verify(
    tmp_path: Path,
) -> None:
    old = WebhookKeys.make(tmp_path / "key")
    new = WebhookKeys.make(tmp_path / "new")
    both = "# the newest first\n" + (tmp_path / "new").read_text() + (tmp_path / "key").read_text()
    (tmp_path / "key").write_text(both)
    keys = WebhookKeys.load(tmp_path / "key")
    assert keys.secret(LEDGER, WEBHOOK) == new.secret(LEDGER, WEBHOOK)
    told = headers(keys.sign(LEDGER, WEBHOOK, "m", 1_000, b"{}"))
    for each in (old, new):
        assert verified(each.secret(LEDGER, WEBHOOK), told, b"{}", 1_000)


@pytest.mark.parametrize("text", ["", "# nothing\n", "ab" * 31, "g" * 64, f"{'ab' * 32}\n" * 5])
def test_a_file_without_keys_is_refused_without_a_word_of_what_is_in_it(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(WebhookKeysInvalid) as caught:
        WebhookKeys.load(path)
    assert "ab" * 8 not in str(caught.value)


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    WebhookKeys.make(tmp_path / "key")
    (tmp_path / "key").chmod(0o604)
    with pytest.raises(WebhookKeysInvalid, match="others may use it"):
        WebhookKeys.load(tmp_path / "key")


def test_keys_do_not_show_themselves(tmp_path: Path) -> None:
    keys = WebhookKeys.make(tmp_path / "key")
    assert (tmp_path / "key").read_text().strip() not in repr(keys)
