"""What the ledger answers to a request, and what it says when it gives no answer."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refused
from peculium_server.store.errors import StoreContended, StoreUnavailable

CONTENDED_RETRY_MS: Final = 50
UNAVAILABLE_RETRY_MS: Final = 1_000
"""A database that restarts or fails over needs seconds."""


class Unavailability(IntEnum):
    """Why an operation got no answer. Numbers are those of the wire's `UnavailableReason`."""

    QUEUE_FULL = 1
    DRAINING = 2
    DATABASE_UNAVAILABLE = 3
    CONTENDED = 4
    TOO_MANY_WATCHES = 5
    KEYS_OUTDATED = 6
    RATE_LIMITED = 7
    TOO_MANY_AT_ONCE = 8
    TOO_MANY_STREAMS = 9


SENTENCES: dict[Unavailability, str] = {
    Unavailability.QUEUE_FULL: "Too many operations wait already; nothing was done.",
    Unavailability.DRAINING: "The server is about to stop; nothing was done.",
    Unavailability.DATABASE_UNAVAILABLE: (
        "The database did not answer; send the same operation again to learn what became of it."
    ),
    Unavailability.CONTENDED: "Conflicts with other sessions of the database did not end; nothing was done.",
    Unavailability.TOO_MANY_WATCHES: "As many follow the ledger at this server as it allows.",
    Unavailability.KEYS_OUTDATED: (
        "The server has not been able to read for too long who may call; nothing was done."
    ),
    Unavailability.RATE_LIMITED: (
        "The caller asks for more in a second than this server lets one ask for; nothing was done."
    ),
    Unavailability.TOO_MANY_AT_ONCE: (
        "The caller waits for as much already as this server lets one wait for; nothing was done."
    ),
    Unavailability.TOO_MANY_STREAMS: (
        "The caller has as many streams open as this server lets one have."
    ),
}
"""What happened and what to do, for people."""


class Unanswered(NamedTuple):
    """The ledger gave no answer; the same operation is to be sent again, unchanged."""

    reason: Unavailability
    facts: dict[str, str]
    retry_delay_ms: int
    """When to try again, from now."""

    @property
    def message(self) -> str:
        """The reason's sentence."""
        return SENTENCES[self.reason]


class Position(NamedTuple):
    """Where in the ledger's history an answer stands."""

    incarnation: bytes
    lane: int
    number: int
    """Operations committed in the lane."""


Result = Outcome | Refused | Unanswered


class Answer(NamedTuple):
    """What became of one operation."""

    result: Result
    position: Position | None
    """None where the ledger was not asked: a malformed operation, or no answer."""


def without_store(error: StoreUnavailable | StoreContended) -> Unanswered:
    """What to say when the store cannot do what it is asked just now."""
    if isinstance(error, StoreContended):
        facts = {"attempts": str(error.attempts)}
        return Unanswered(Unavailability.CONTENDED, facts, CONTENDED_RETRY_MS)
    return Unanswered(Unavailability.DATABASE_UNAVAILABLE, {}, UNAVAILABLE_RETRY_MS)
