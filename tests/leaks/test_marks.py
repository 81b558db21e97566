"""What looks for secrets finds them, however they were written, and finds nothing else."""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Callable

import pytest

from peculium import ApiKey, Capability
from peculium.v1 import types_pb2
from tests.leaks.marks import WINDOW, Marks

FORMS: dict[str, Callable[[bytes], bytes]] = {
    "as it is": lambda secret: secret,
    "half of it": lambda secret: secret[3 : 3 + WINDOW],
    "hexadecimal": lambda secret: secret.hex().encode(),
    "in capitals": lambda secret: secret.hex().upper().encode(),
    "half of it, hexadecimal": lambda secret: secret[-WINDOW:].hex().encode(),
    "as PostgreSQL logs it": lambda secret: b"$1 = '\\x" + secret.hex().encode() + b"'",
    "base64": base64.b64encode,
    "base64 behind one byte": lambda secret: base64.b64encode(b"x" + secret + b"y"),
    "base64 behind two": lambda secret: base64.urlsafe_b64encode(b"xx" + secret + b"y"),
    "repr": lambda secret: repr(secret).encode(),
    "repr in JSON": lambda secret: json.dumps(repr(secret)).encode(),
    "a message's text": lambda secret: str(types_pb2.Authority(secret=secret)).encode(),
    "as PostgreSQL escapes it": lambda secret: re.sub(
        rb"[^ -~]", lambda found: b"\\%03o" % found[0][0], secret.replace(b"\\", rb"\\")
    ),
    "numbers": lambda secret: json.dumps(list(secret)).encode(),
    "text of one byte each": lambda secret: secret.decode("latin-1").encode(),
}

AWKWARD = b"\"'\\\t\r\n\x00\xff" * 4
"""Most of it is written in another way in each form."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("secret", [secrets.token_bytes(32), AWKWARD], ids=["random", "awkward"])
def test_a_secret_is_found_in_every_form_and_place(form: str, secret: bytes) -> None:
    marks = Marks()
    marks.add("it", secret)
    marks.add("another", secrets.token_bytes(32))
    for place in range(8):
        data = bytes(100 + place) + FORMS[form](secret) + b" and something behind it"
        assert marks.found_in(data) == {"it"}


def test_a_secret_is_found_in_a_capability_and_in_a_key() -> None:
    marks, secret = Marks(), secrets.token_bytes(32)
    capability = Capability(root_id=bytes(16), budget_id=bytes(16), secret=secret).reveal()
    key = ApiKey.new().reveal()
    marks.add("capability", secret)
    marks.add("key", base64.urlsafe_b64decode(key.removeprefix("pek_"))[17:50])
    assert marks.found_in(capability.encode()) == {"capability"}
    assert marks.found_in(b"Bearer " + key.encode()) == {"key"}


def test_who_tells_a_secret_is_said_without_it() -> None:
    marks, secret = Marks(), secrets.token_bytes(32)
    marks.add("it", secret)
    data = b"a line before\nSpend(reason=" + secret.hex().encode() + b")\na line behind"
    assert marks.told_by(data, "it") == repr(b"Spend(reason=")


def test_what_is_no_secret_is_not_found() -> None:
    marks = Marks()
    for number in range(100):
        marks.add(str(number), secrets.token_bytes(32))
    others = (form(secrets.token_bytes(32)) for form in FORMS.values() for _ in range(100))
    assert marks.found_in(b" ".join(others)) == set()
