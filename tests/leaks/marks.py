"""Secrets that are looked for afterwards, in whatever form they may have been written down."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Final

WINDOW: Final = 16
"""So many bytes of a secret in a row are a leak."""
_WORD: Final = 8
"""Every run of sixteen bytes has one of eight in it that begins at a multiple of eight."""
_BASE64_WINDOW: Final = 20
"""Characters of base64 that tell fifteen bytes."""
_TOLD: Final = 1_000
"""So much of a line is enough to know who has written it."""
_ESCAPED: Final = {9: "\\t", 10: "\\n", 13: "\\r", 34: '\\"', 39: "\\'", 92: "\\\\"}
_PRINTABLE: Final = range(32, 127)

Write = Callable[[bytes], str]


def _python(part: bytes) -> str:
    """As `repr` has it between single quotes."""
    return repr(b'"' + part)[3:-1]


def _python_in_double_quotes(part: bytes) -> str:
    return _python(part).replace("\\'", "'")


def _octal(part: bytes) -> str:
    """As texts of protobuf have it."""
    return "".join(
        _ESCAPED.get(byte) or (chr(byte) if byte in _PRINTABLE else f"\\{byte:03o}")
        for byte in part
    )


def escaped(part: bytes) -> str:
    """As PostgreSQL has it with `bytea_output = escape`."""
    return "".join(
        "\\\\" if byte == 92 else chr(byte) if byte in _PRINTABLE else f"\\{byte:03o}"
        for byte in part
    )


def _within_json(write: Write) -> Write:
    return lambda part: json.dumps(write(part))[1:-1]


_BY_BYTE: Final[Sequence[Write]] = (
    lambda part: part.decode("latin-1"),
    lambda part: part.hex(),
    lambda part: part.hex().upper(),
    _python,
    _python_in_double_quotes,
    _octal,
    escaped,
    _within_json(_python),
    _within_json(_python_in_double_quotes),
    _within_json(_octal),
    lambda part: ", ".join(map(str, part)),
)


def _in_base64(secret: bytes) -> Iterator[bytes]:
    for shift in range(3):
        # What the bytes before and behind it have a part in is not the secret's own.
        first, last = -(-8 * shift // 6), 8 * (shift + len(secret)) // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(shift) + secret)[first:last]


def _whole(secret: bytes) -> Iterator[bytes]:
    """A secret in every form."""
    yield secret
    yield from (write(secret).encode() for write in _BY_BYTE)
    yield from _in_base64(secret)


def _needles(secret: bytes) -> Iterator[bytes]:
    """Everything that is a leak of it."""
    for start in range(len(secret) - WINDOW + 1):
        part = secret[start : start + WINDOW]
        yield part
        yield from (write(part).encode() for write in _BY_BYTE)
    for form in _in_base64(secret):
        for start in range(len(form) - _BASE64_WINDOW + 1):
            yield form[start : start + _BASE64_WINDOW]


class Marks:
    """Secrets by name."""

    def __init__(self) -> None:
        self._secrets: dict[str, bytes] = {}
        self._words: dict[int, tuple[str, ...]] = {}

    def add(self, name: str, secret: bytes) -> None:
        """Remember a secret, of sixteen bytes at least."""
        assert len(secret) >= WINDOW
        self._secrets[name] = secret
        for form in set(_whole(secret)):
            for start in range(len(form) - _WORD + 1):
                word = int.from_bytes(form[start : start + _WORD], sys.byteorder)
                known = self._words.get(word, ())
                if not known or known[-1] != name:
                    self._words[word] = (*known, name)

    def found_in(self, data: bytes) -> set[str]:
        """The names of those of which something is written there."""
        words = memoryview(data)[: len(data) // _WORD * _WORD].cast("Q")
        suspected: set[str] = set()
        for word in set(filter(self._words.__contains__, words)):
            suspected.update(self._words[word])
        return {
            name
            for name in suspected
            if any(needle in data for needle in set(_needles(self._secrets[name])))
        }

    def told_by(self, data: bytes, name: str) -> str:
        """Who tells a secret that is found there: the beginning of its line, as far as the secret itself."""
        places = (data.find(needle) for needle in set(_needles(self._secrets[name])))
        at = min(place for place in places if place >= 0)
        return repr(data[data.rfind(b"\n", 0, at) + 1 : at][:_TOLD])

    def __len__(self) -> int:
        return len(self._secrets)
