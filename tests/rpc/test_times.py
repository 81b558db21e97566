"""Times of the wire: finer than the ledger's, and not all of them are times."""

from __future__ import annotations

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from peculium_server.core.refusals import Refusal
from peculium_server.rpc.calls import CallRefused
from peculium_server.rpc.times import read_past, read_time


@pytest.mark.parametrize(
    ("seconds", "nanos", "not_before", "not_after"),
    [
        (0, 0, 0, 0),
        (0, 1, 1, 0),
        (0, 999, 1, 0),
        (0, 1_000, 1, 1),
        (1, 1_001, 1_000_002, 1_000_001),
        (-1, 999_999_001, 0, -1),
        (-1, 0, -1_000_000, -1_000_000),
    ],
)
def test_what_is_finer_than_the_ledger_is_rounded_into_the_period(
    seconds: int, nanos: int, not_before: int, not_after: int
) -> None:
    message = Timestamp(seconds=seconds, nanos=nanos)
    assert read_time("from", message) == not_before
    assert read_past("as_of", message, now=2_000_000) == not_after


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [
        (-62_135_596_801, 0),
        (253_402_300_800, 0),
        (0, -1),
        (0, 1_000_000_000),
    ],
)
def test_what_no_timestamp_may_be_is_malformed(seconds: int, nanos: int) -> None:
    with pytest.raises(CallRefused) as caught:
        read_time("from", Timestamp(seconds=seconds, nanos=nanos))
    assert caught.value.refused.reason is Refusal.MALFORMED
    assert caught.value.refused.facts["field"] == "from"


def test_the_years_1_to_9999_are_times() -> None:
    assert read_time("from", Timestamp(seconds=-62_135_596_800)) == -62_135_596_800_000_000
    assert read_time("from", Timestamp(seconds=253_402_300_799)) == 253_402_300_799_000_000


def test_the_past_ends_now() -> None:
    assert read_past("as_of", Timestamp(nanos=7_000), now=7) == 7
    # Rounded down, it is over.
    assert read_past("as_of", Timestamp(nanos=7_999), now=7) == 7
    with pytest.raises(CallRefused) as caught:
        read_past("as_of", Timestamp(nanos=8_000), now=7)
    assert caught.value.refused.facts["field"] == "as_of"
