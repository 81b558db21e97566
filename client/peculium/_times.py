"""Times of the ledger, to the microsecond, from and to what the wire and hashes are made of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def microseconds(moment: datetime) -> int:
    """Since the Unix epoch, of a time that has a zone."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def moment(at: int) -> datetime:
    """The time so many microseconds after the Unix epoch, in UTC."""
    return _EPOCH + timedelta(microseconds=at)
