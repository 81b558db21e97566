"""Times of a bill, in UTC: days, ISO 8601, or seconds since the Unix epoch."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

from peculium_server.core.limits import SECOND_US
from peculium_server.core.times import FIRST_US, LAST_US, microseconds, moment

DAY_US: Final = 86_400 * SECOND_US
_MILLISECONDS_FROM: Final = 100_000_000_000
"""Seconds since the epoch have fewer digits for three thousand years: from here on it is milliseconds."""
_MILLISECONDS_MAX: Final = microseconds(datetime(9999, 12, 31, tzinfo=UTC)) // 1000
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


def _microseconds(said: datetime) -> int:
    aware = said.replace(tzinfo=UTC) if said.tzinfo is None else said
    at = microseconds(aware)
    # In UTC it may be in a year that no date has.
    if not FIRST_US <= at <= LAST_US:
        raise ValueError(f"{said} is no time of a bill")
    return at


def day_text(at: int) -> str:
    """The day of a time in UTC, as 2026-11-26."""
    return moment(at).strftime("%Y-%m-%d")


def time_text(at: int) -> str:
    """A time in UTC, ISO 8601. What is after the last year, as its end, is told as the last moment of it."""
    return moment(at).isoformat().replace("+00:00", "Z")
