"""The text of an API key: made here, recognisable, whole, and shown to nobody who does not ask for it."""

from __future__ import annotations

import pytest

import peculium
from peculium import ApiKey
from peculium._config import configure
from peculium.errors import Malformed
from peculium_server.identity import digest_of


@pytest.fixture
def key() -> ApiKey:
    return ApiKey.new()


def test_a_key_is_read_as_it_was_revealed(key: ApiKey) -> None:
    text = key.reveal()
    assert text.startswith("pek_")
    assert len(text) == 76
    read = ApiKey.parse(text)
    assert (read.key_id, read.digest, read.reveal()) == (key.key_id, key.digest, text)


def test_each_text_is_another_also_of_one_key(key: ApiKey) -> None:
    other = ApiKey.new(key.key_id)
    assert other.key_id == key.key_id
    assert other.digest != key.digest
    assert ApiKey.new().key_id != key.key_id


def test_the_server_knows_it_by_the_same_digest(key: ApiKey) -> None:
    assert digest_of(key.reveal()) == key.digest


def test_nothing_that_prints_a_key_prints_its_text(key: ApiKey) -> None:
    secret = key.reveal()[-20:]
    assert secret not in f"{key} {key!r} {[key]}"


def test_every_character_of_a_text_is_checked(key: ApiKey) -> None:
    text = key.reveal()
    for place in range(len("pek_"), len(text)):
        changed = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
        with pytest.raises(Malformed):
            ApiKey.parse(changed)


@pytest.mark.parametrize("wrong", ["pec_x", "pek_x", "pek_" + "é" * 72, "pek_" + "+" * 72])
def test_what_is_no_key_is_refused_without_repeating_it(wrong: str) -> None:
    with pytest.raises(Malformed) as caught:
        ApiKey.parse(wrong)
    assert wrong not in str(caught.value)


@pytest.mark.parametrize("lost", [1, 40])
def test_a_client_notices_that_a_part_of_its_key_was_lost(key: ApiKey, lost: int) -> None:
    text = key.reveal()
    with pytest.raises(Malformed) as caught:
        configure("localhost:1", api_key=text[:-lost], timeout=1, tls=None, allow_insecure=False)
    assert text[:-lost] not in str(caught.value)
    assert peculium.connect("localhost:1", api_key=text) is not None
