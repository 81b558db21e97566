"""The ledger's times are microseconds since the Unix epoch, Python's are datetimes: from one to the other."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

FIRST: Final = datetime.min.replace(tzinfo=UTC)
LAST: Final = datetime.max.replace(tzinfo=UTC)


def microseconds(moment: datetime) -> int:
    """A time that has a zone, as the ledger counts it."""
    return (moment - _EPOCH) // _MICROSECOND


def moment(at: int) -> datetime:
    """A time of the ledger, in UTC; one that is after the last year, as its end, is the last of it."""
    return _EPOCH + timedelta(microseconds=min(at, LAST_US))


FIRST_US: Final = microseconds(FIRST)
LAST_US: Final = microseconds(LAST)
