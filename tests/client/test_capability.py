from __future__ import annotations

import base64
import copy
import pickle
import string

import pytest
from hypothesis import given, strategies as st

from peculium import BudgetRef, Capability, CapabilityMoved, NotCopyable, Receiver
from peculium._ids import token_id
from peculium.errors import Malformed

IDS = st.binary(min_size=16, max_size=16)
SECRETS = st.binary(min_size=32, max_size=32)
ALPHABET = string.ascii_letters + string.digits + "-_"


def capability(secret: bytes = bytes(range(32))) -> Capability:
    return Capability(root_id=bytes([1]) * 16, budget_id=bytes([2]) * 16, secret=secret)


@given(root_id=IDS, budget_id=IDS, secret=SECRETS)
def test_what_is_revealed_is_parsed_again(root_id: bytes, budget_id: bytes, secret: bytes) -> None:
    text = Capability(root_id=root_id, budget_id=budget_id, secret=secret).reveal()
    parsed = Capability.parse(f"  {text}\n")
    assert (parsed.root_id, parsed.budget_id) == (root_id, budget_id)
    assert parsed.take("here") == secret


@given(secret=SECRETS, position=st.integers(4, 95), other=st.sampled_from(ALPHABET))
def test_a_mistyped_character_is_noticed(secret: bytes, position: int, other: str) -> None:
    text = capability(secret).reveal()
    position = min(position, len(text) - 1)
    if text[position] == other:
        return
    with pytest.raises(Malformed, match="checksum"):
        Capability.parse(text[:position] + other + text[position + 1 :])


@given(secret=SECRETS, bit=st.integers(0, 69 * 8 - 1))
def test_a_flipped_bit_is_noticed(secret: bytes, bit: int) -> None:
    data = bytearray(base64.urlsafe_b64decode(capability(secret).reveal().removeprefix("pec_")))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Malformed):
        Capability.parse("pec_" + base64.urlsafe_b64encode(bytes(data)).decode())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", 'begins with "pec_"'),
        ("sk-12345", 'begins with "pec_"'),
        ("pec_", 'has 92 characters after "pec_", this one 0'),
        (capability().reveal() + "A", "this one 93"),
        (capability().reveal()[:-1], "this one 91"),
        (capability().reveal()[:-1] + "!", 'letters, digits, "-" and "_"'),
        (capability().reveal()[:-1] + "é", 'letters, digits, "-" and "_"'),
        (capability().reveal()[:-2] + "==", 'letters, digits, "-" and "_"'),
        (capability().reveal()[:-1] + "+", 'letters, digits, "-" and "_"'),
    ],
)
def test_a_text_that_is_no_capability_is_refused_with_what_is_wrong(
    text: str, problem: str
) -> None:
    with pytest.raises(Malformed) as caught:
        Capability.parse(text)
    assert problem in caught.value.problem


def test_a_capability_of_another_version_asks_for_a_newer_client() -> None:
    import zlib

    body = bytes([2]) + bytes(64)
    text = base64.urlsafe_b64encode(body + zlib.crc32(body).to_bytes(4)).decode()
    with pytest.raises(Malformed, match="version 2 needs a newer peculium"):
        Capability.parse(f"pec_{text}")


def test_something_else_than_text_is_refused() -> None:
    with pytest.raises(Malformed, match="is text, not bytes"):
        Capability.parse(b"pec_")  # type: ignore[arg-type]


def test_the_secret_is_shown_by_reveal_alone() -> None:
    secret = bytes(range(32, 64))
    made = capability(secret)
    shown = f"{made} {made!r} {made.ref!r}"
    for form in (secret.hex(), base64.urlsafe_b64encode(secret).decode()[:20], str(secret)):
        assert form not in shown
    assert "02020202-0202-0202-0202-020202020202" in shown
    assert made.reveal() not in shown


def test_an_error_about_a_capability_does_not_repeat_it() -> None:
    text = capability().reveal()
    with pytest.raises(Malformed) as caught:
        Capability.parse(text[:-1])
    assert text[4:40] not in str(caught.value)


@pytest.mark.parametrize("made", [capability(), Receiver()], ids=["capability", "receiver"])
def test_authority_is_not_copied_or_pickled(made: object) -> None:
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(NotCopyable, match="BudgetRef") as caught:
            attempt(made)
        assert isinstance(caught.value, TypeError)


def test_a_reference_is_copied_and_pickled_and_has_no_authority() -> None:
    ref = BudgetRef("acme/run", bytes(16), bytes([7]) * 16)
    assert pickle.loads(pickle.dumps(ref)) == copy.deepcopy(ref) == ref  # noqa: S301 - our own
    assert str(ref) == "acme/run"
    assert str(BudgetRef("", bytes(16), bytes([7]) * 16)) == "07070707-0707-0707-0707-070707070707"


def test_a_capability_is_taken_once() -> None:
    made = capability()
    made.take("agent.py:12")
    for attempt in (lambda: made.take("agent.py:13"), made.reveal):
        with pytest.raises(CapabilityMoved, match=r"agent\.py:12"):
            attempt()
    made.put_back()
    assert made.take("agent.py:14")


def test_a_receiver_shows_the_id_of_a_secret_that_only_it_knows() -> None:
    receiver = Receiver()
    ref = BudgetRef("acme/run", bytes(16), bytes(16))
    made = receiver.capability(ref)
    assert token_id(made.take("here")) == receiver.token_id
    assert made.ref == ref
    with pytest.raises(CapabilityMoved):
        receiver.capability(ref)
    assert Receiver().token_id != receiver.token_id
