"""What a client has been told of the ledger's history, so that a ledger that went back is noticed.

Every answer says which incarnation of the ledger gave it, and how many operations were committed in its
lane. An answer that knows of fewer than one that was there before the question was asked comes from a
ledger that has forgotten what it acknowledged: it was restored to its past, or it lags behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from peculium.errors import LedgerWentBack
from peculium.v1 import ledger_service_pb2 as ledger, types_pb2

LANES_MAX = 256
"""More lanes than a ledger has: what is remembered stays bounded, whatever is told."""


class Known(NamedTuple):
    """What was known when a request was sent."""

    positions: Mapping[int, int]
    """By lane: the highest position in any answer so far."""


class History:
    """The furthest that each lane was told to be, and by which incarnation.

    Shared by threads without a lock: at worst, of two answers at the same instant the lower position is
    remembered, which is true as well.
    """

    def __init__(self) -> None:
        self._incarnation: bytes | None = None
        self._positions: dict[int, int] = {}
        self.went_back: LedgerWentBack | None = None
        """Why nothing more may be asked: this stays."""

    def known(self) -> Known:
        """What every answer to a request that is sent now has to know, too."""
        return Known(dict(self._positions))

    def check(self) -> None:
        """Refuse to go on with a ledger that went back.

        Raises:
            LedgerWentBack: It did.
        """
        if self.went_back is not None:
            raise self.went_back.concerning(None, None)

    def observe(self, known: Known, response: Any) -> None:
        """Take note of where an answer stands.

        Raises:
            LedgerWentBack: It stands before what was known when it was asked for.
        """
        told = _position(response)
        if told is not None:
            self._observe(known, told)

    def observe_batch(self, known: Known, results: Iterable[ledger.OperationResult]) -> None:
        """Take note of where the answers to a batch stand.

        Raises:
            LedgerWentBack: One of them stands before what was known when it was asked for.
        """
        for result in results:
            answer = result.refused if result.HasField("refused") else result.outcome
            if answer.HasField("ledger"):
                self._observe(known, answer.ledger)

    def _observe(self, known: Known, told: types_pb2.LedgerPosition) -> None:
        lane, position, told_incarnation = told.lane, told.position, told.incarnation
        incarnation = self._incarnation
        seen = known.positions.get(lane, 0)
        if position < seen or incarnation not in (None, told_incarnation):
            self.went_back = _went_back(incarnation or told_incarnation, seen, told)
            raise self.went_back.concerning(None, None)
        self._incarnation = told_incarnation
        positions = self._positions
        furthest = positions.get(lane)
        if furthest is None and len(positions) >= LANES_MAX:
            return
        if furthest is None or position > furthest:
            positions[lane] = position


def _position(response: Any) -> types_pb2.LedgerPosition | None:
    """Where an answer stands, if it says so: a read by itself, an operation in its outcome."""
    fields = response.DESCRIPTOR.fields_by_name
    if "outcome" in fields:
        return _position(response.outcome)
    if "ledger" in fields and response.HasField("ledger"):
        told: types_pb2.LedgerPosition = response.ledger
        return told
    return None


def _went_back(incarnation: bytes, seen: int, told: types_pb2.LedgerPosition) -> LedgerWentBack:
    facts = {
        "lane": str(told.lane),
        "seen": str(seen),
        "told": str(told.position),
        "incarnation_seen": incarnation.hex(),
        "incarnation_told": told.incarnation.hex(),
    }
    if told.incarnation == incarnation:
        said = f"lane {told.lane} stands at {told.position}, and stood at {seen} before"
    else:
        said = f"incarnation {told.incarnation.hex()} answers, and {incarnation.hex()} did before"
    return LedgerWentBack(
        f"the ledger went back in time: {said}; what it acknowledged may be lost", facts=facts
    )
