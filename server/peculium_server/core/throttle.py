"""How much one caller may ask of a server: by the second, at once, and in streams.

Times are handed in, in microseconds on a clock that never goes back. Everything is an integer: what was
allowed once is not forbidden by rounding. A caller is allowed one thing more as long as the limit is not
reached, and then whatever that weighs, which may be known later; what is above is waited for by whoever comes
next. So a large request is not kept waiting by small ones, and none is too large ever to be allowed.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from peculium_server.core.limits import SECOND_US

CALLERS_MAX: Final = 10_000
"""Callers that are told apart. Those beyond share what one may ask for: a rule for certificates may let in
as many names as somebody signs."""

SWEEP_US: Final = SECOND_US
"""Between two looks for callers of whom there is nothing left to know."""

_ENDLESS: Final = 2**63


class Limit(Enum):
    """What a caller has reached."""

    RATE = "rate"
    AT_ONCE = "at_once"
    STREAMS = "streams"


class Limits(NamedTuple):
    """What each caller may ask of one server. 0: as much as they like."""

    rate: int = 0
    """Operations a second."""
    burst: int = 1
    """Operations at once, after a pause."""
    at_once: int = 0
    """Operations in progress."""
    streams: int = 0
    """Streams that are open."""


class Exceeded(NamedTuple):
    """A caller has to wait."""

    limit: Limit
    wait_us: int
    """Until the rate allows one more; 0 where that depends on when others end."""


class Bucket:
    """So many a second, and so many at once after a pause."""

    __slots__ = ("_empty_at", "_rate", "_slack")

    def __init__(self, rate: int, burst: int) -> None:
        """Begin with nothing in it.

        Args:
            rate: How many run out in a second.
            burst: How many it holds.
        """
        self._rate = rate
        # In parts of a microsecond, of which it has as many as run out in a second.
        self._slack = (burst - 1) * SECOND_US
        self._empty_at = 0

    def wait_us(self, now: int) -> int:
        """How long until there is room for one more; 0: there is."""
        over = self._empty_at - self._slack - now * self._rate
        return -(-over // self._rate) if over > 0 else 0

    def put(self, now: int, weight: int = 1) -> None:
        """Put something in, whether there is room for all of it or not."""
        self._empty_at = max(self._empty_at, now * self._rate) + weight * SECOND_US

    def add(self, more: int) -> None:
        """Put more in with what was put in just now."""
        self._empty_at += more * SECOND_US

    def empty(self, now: int) -> bool:
        """Say whether nothing is in it."""
        return self._empty_at <= now * self._rate


class _Caller:
    """What a caller does at the moment."""

    __slots__ = ("at_once", "bucket", "streams")

    def __init__(self, limits: Limits) -> None:
        self.bucket = Bucket(limits.rate, limits.burst) if limits.rate else None
        self.at_once = 0
        self.streams = 0

    def idle(self, now: int) -> bool:
        """Say whether this is as if it had never called."""
        return not (
            self.at_once or self.streams or (self.bucket is not None and not self.bucket.empty(now))
        )


class Entry:
    """A call that was let in."""

    __slots__ = ("_caller", "_weight")

    def __init__(self, caller: _Caller, weight: int) -> None:
        self._caller = caller
        self._weight = weight
        """How much of what is in progress it is; of a stream none."""

    def add(self, more: int) -> None:
        """It weighs more than was known when it came."""
        caller = self._caller
        caller.at_once += more
        self._weight += more
        if caller.bucket is not None:
            caller.bucket.add(more)

    def leave(self) -> None:
        """It has ended."""
        if self._weight:
            self._caller.at_once -= self._weight
        else:
            self._caller.streams -= 1


class Throttle:
    """All callers of a server, each held to the same limits."""

    def __init__(self, limits: Limits, *, callers_max: int = CALLERS_MAX) -> None:
        """Begin with nobody calling.

        Args:
            limits: Of each caller.
            callers_max: How many are told apart.
        """
        self._limits = limits
        self._at_once = limits.at_once or _ENDLESS
        self._streams = limits.streams or _ENDLESS
        self._callers_max = callers_max
        self._callers: dict[str, _Caller] = {}
        self._others = _Caller(limits)
        self._swept_at = 0

    @property
    def known(self) -> int:
        """How many callers are told apart by now."""
        return len(self._callers)

    def enter(self, name: str, weight: int, now: int, *, stream: bool = False) -> Entry | Exceeded:
        """Let a call in, or say what it has to wait for.

        Args:
            name: Who calls.
            weight: In operations, at least 1, as far as it is known.
            now: When.
            stream: It is one of those that are counted apart.
        """
        caller = self._callers.get(name)
        if caller is None:
            caller = self._met(name, now)
        if stream:
            if caller.streams >= self._streams:
                return Exceeded(Limit.STREAMS, 0)
        elif caller.at_once >= self._at_once:
            return Exceeded(Limit.AT_ONCE, 0)
        bucket = caller.bucket
        if bucket is not None:
            wait = bucket.wait_us(now)
            if wait:
                return Exceeded(Limit.RATE, wait)
            bucket.put(now, weight)
        if stream:
            caller.streams += 1
            return Entry(caller, 0)
        caller.at_once += weight
        return Entry(caller, weight)

    def _met(self, name: str, now: int) -> _Caller:
        """A caller who is not known yet, or is known no longer."""
        callers = self._callers
        if len(callers) >= self._callers_max and now >= self._swept_at + SWEEP_US:
            self._swept_at = now
            for each in [each for each, caller in callers.items() if caller.idle(now)]:
                del callers[each]
        if len(callers) >= self._callers_max:
            return self._others
        caller = callers[name] = _Caller(self._limits)
        return caller
