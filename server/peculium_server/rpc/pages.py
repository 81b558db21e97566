"""Page tokens: where a list goes on, as text that nobody but this server has to understand.

A token belongs to one list; the token of another list, or a damaged one, is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

from peculium_server.rpc.calls import CallRefused

PAGE_SIZE_DEFAULT: Final = 100
PAGE_SIZE_MAX: Final = 1_000
PAGE_BYTES_MAX: Final = 2 * 1024 * 1024
"""Half of what a client accepts as one message by default: rows differ in size."""

_NUMBER_BYTES: Final = 8
_CHECKSUM_BYTES: Final = 8
_DOMAIN: Final = b"peculium.page.v1\x00"

Row = TypeVar("Row")


class Asked(NamedTuple):
    """Which page of a list is asked for."""

    size: int
    after: bytes | None
    """The key of the last row of the page before."""

    @property
    def after_number(self) -> int | None:
        """The same key, of a list of which the keys are numbers."""
        return None if self.after is None else int.from_bytes(self.after)


def read_page(scope: bytes, page_size: int, page_token: str) -> Asked:
    """Read which page of a list is asked for.

    Args:
        scope: Names the list with all that selects its rows.
        page_size: As requested; 0 for the default.
        page_token: As requested; empty for the first page.

    Raises:
        CallRefused: There is no such page size, or the token is not one of this list.
    """
    if not 0 <= page_size <= PAGE_SIZE_MAX:
        raise CallRefused.malformed("page_size", f"must be 1 to {PAGE_SIZE_MAX}")
    size = page_size or PAGE_SIZE_DEFAULT
    if not page_token:
        return Asked(size, None)
    try:
        token = base64.b64decode(
            page_token + "=" * (-len(page_token) % 4), altchars=b"-_", validate=True
        )
    except (binascii.Error, ValueError):
        token = b""
    key = without_checksum(scope, token)
    if key is None:
        raise CallRefused.malformed("page_token", "is not one that this list has given")
    return Asked(size, key)


def page_token(scope: bytes, key: bytes | int | None) -> str:
    """The token to ask with for the rows after a key; empty if there are none."""
    if key is None:
        return ""
    if isinstance(key, int):
        key = key.to_bytes(_NUMBER_BYTES)
    return base64.urlsafe_b64encode(with_checksum(scope, key)).rstrip(b"=").decode()


def with_checksum(scope: bytes, said: bytes) -> bytes:
    """What is given away to be brought back: it is seen then whether it is whole, and of this scope."""
    return _checksum(scope, said) + said


def without_checksum(scope: bytes, token: bytes) -> bytes | None:
    """What was given away for a scope; None if that was something else."""
    checksum, said = token[:_CHECKSUM_BYTES], token[_CHECKSUM_BYTES:]
    return said if checksum == _checksum(scope, said) else None


def fitting(rows: Sequence[Row], size_of: Callable[[Row], int]) -> Sequence[Row]:
    """As many rows from the first one as one message holds, and at least one."""
    total = 0
    for index, row in enumerate(rows):
        total += size_of(row)
        if total > PAGE_BYTES_MAX and index:
            return rows[:index]
    return rows


def _checksum(scope: bytes, key: bytes) -> bytes:
    length = len(scope).to_bytes(4)
    return hashlib.sha256(_DOMAIN + length + scope + key).digest()[:_CHECKSUM_BYTES]
