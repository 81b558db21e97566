"""Times of a bill, in UTC: days, ISO 8601, or seconds since the Unix epoch."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple

from peculium_server.core.limits import SECOND_US

DAY_US: Final = 86_400 * SECOND_US
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_MILLISECONDS_FROM: Final = 100_000_000_000
"""Seconds since the epoch have fewer digits for three thousand years: from here on it is milliseconds."""
_MILLISECONDS_MAX: Final = (datetime(9999, 12, 31, tzinfo=UTC) - _EPOCH) // timedelta(
    milliseconds=1
)
_FIRST_US: Final = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LAST_US: Final = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_NUMBER: Final = re.compile(r"[0-9]{9,16}(\.[0-9]{1,9})?")
_DAY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


class Moment(NamedTuple):
    """When something happened, as far as the bill says."""

    at: int
    """Microseconds since the Unix epoch; of a day its beginning."""
    whole_day: bool

    @property
    def end(self) -> int:
        """The first microsecond that is surely later."""
        return self.at + (DAY_US if self.whole_day else 1)


class Period(NamedTuple):
    """From a time, until before another; None: without an end on that side."""

    start: int | None = None
    end: int | None = None

    def whole_days(self) -> Period:
        """The same, begun with a day and ended with one."""
        start = None if self.start is None else self.start // DAY_US * DAY_US
        end = None if self.end is None else -(-self.end // DAY_US) * DAY_US
        return Period(start, end)

    def has(self, at: int) -> bool:
        """The time is within."""
        return (self.start is None or at >= self.start) and (self.end is None or at < self.end)


def parse_moment(value: Any) -> Moment:
    """Read a time.

    Args:
        value: A day (2026-11-26), ISO 8601 (UTC where it says no zone), or seconds or milliseconds
            since the Unix epoch, as a number or text.

    Raises:
        ValueError: It is nothing of that.
    """
    if isinstance(value, str):
        text = value.strip()
        if _DAY.fullmatch(text):
            return Moment(_microseconds(datetime.fromisoformat(text)), whole_day=True)
        if not _NUMBER.fullmatch(text):
            return Moment(_microseconds(_iso(text)), whole_day=False)
        value = Decimal(text)
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError(f"{str(value)[:40]!r} is no time")  # noqa: TRY004 - of a file
    if not 0 <= value <= _MILLISECONDS_MAX:
        raise ValueError(f"{str(value)[:40]} is no time")
    factor = 1000 if value >= _MILLISECONDS_FROM else SECOND_US
    return Moment(int(value * factor), whole_day=False)


def _iso(text: str) -> datetime:
    # Some exports write the zone as " UTC", some more digits than microseconds have.
    plain = text.removesuffix(" UTC")
    try:
        return datetime.fromisoformat(plain)
    except ValueError:
        raise ValueError(
            f"{text[:40]!r} is no time: write 2026-11-26, ISO 8601, or seconds since 1970"
        ) from None


def _microseconds(moment: datetime) -> int:
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    at = microseconds(aware)
    # In UTC it may be in a year that no date has.
    if not _FIRST_US <= at <= _LAST_US:
        raise ValueError(f"{moment} is no time of a bill")
    return at


def microseconds(moment: datetime) -> int:
    """A time that has a zone, as the ledger counts it."""
    return (moment - _EPOCH) // _MICROSECOND


def day_text(at: int) -> str:
    """The day of a time in UTC, as 2026-11-26."""
    return (_EPOCH + timedelta(days=at // DAY_US)).strftime("%Y-%m-%d")


def time_text(at: int) -> str:
    """A time in UTC, ISO 8601. What is after the last year, as its end, is told as the last moment of it."""
    return (_EPOCH + timedelta(microseconds=min(at, _LAST_US))).isoformat().replace("+00:00", "Z")
