"""Times as the wire has them, checked, as microseconds since the Unix epoch."""

from __future__ import annotations

from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from peculium_server.core.limits import SECOND_US
from peculium_server.core.refusals import time_text
from peculium_server.rpc.calls import CallRefused

_SECONDS_MIN: Final = -62_135_596_800
_SECONDS_MAX: Final = 253_402_300_799
"""The years 1 to 9999, as a Timestamp may be."""
_NANOS_PER_US: Final = 1_000
_NANOS_PER_SECOND: Final = 1_000_000_000


def read_time(field: str, message: Timestamp) -> int:
    """A time to compare the ledger's times with: the first microsecond that is not before it.

    Raises:
        CallRefused: It is no time.
    """
    if not (
        _SECONDS_MIN <= message.seconds <= _SECONDS_MAX and 0 <= message.nanos < _NANOS_PER_SECOND
    ):
        raise CallRefused.malformed(field, "must be a time from the year 1 to the year 9999")
    return message.seconds * SECOND_US - -message.nanos // _NANOS_PER_US


def read_past(field: str, message: Timestamp, now: int) -> int:
    """A time that is over: the last microsecond that is not after it.

    Raises:
        CallRefused: It is no time, or in the future.
    """
    at = read_time(field, message)
    if message.nanos % _NANOS_PER_US:
        at -= 1
    if at > now:
        raise CallRefused.malformed(field, f"must not be in the future: it is {time_text(now)}")
    return at
