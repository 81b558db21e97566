"""What is known of the call that is being served, from the interceptors to the services."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from peculium_server.core.operations import Actor, Operation
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.lanes.answers import Unanswered
from peculium_server.lanes.weight import rows


@dataclass(slots=True)
class Call:
    """One call; each interceptor adds what it finds out."""

    method: str
    request_id: str
    """Names the call in the log."""
    actor: Actor | None = None
    key_id: bytes | None = None
    """The key of the database that the caller has presented, if it is one."""
    roots: frozenset[bytes] | None = None
    """The trees that the caller is limited to; None: all. Asked for by `scope` alone."""
    check: Callable[[], None] | None = None
    """Raises when the caller may not call any more: a call may last longer than a key."""
    weigh: Callable[[int], None] | None = None
    """Is told how much more than one operation the call asks for, where callers are limited."""
    deadline: float | None = None
    """On the event loop's clock."""
    traceparent: str = ""
    """The W3C trace context that it came with, as it came."""
    operations: int = 0
    """How many it asks for."""
    refused: dict[Refusal, int] = field(default_factory=dict)
    """What it was told no for, how often."""

    def refuse(self, reason: Refusal) -> None:
        """The caller is told no, for the whole call or for one of its operations."""
        self.refused[reason] = self.refused.get(reason, 0) + 1


CALL: Final[ContextVar[Call]] = ContextVar("call")


def actor() -> Actor:
    """The authenticated caller of the call that is being served."""
    found = CALL.get().actor
    # A service that is reached past the identity interceptor is a bug; it must not serve anybody.
    if found is None:
        raise RuntimeError("the caller was not identified")
    return found


def deadline() -> float | None:
    """When the call that is being served is over, on the event loop's clock."""
    return CALL.get().deadline


def weigh(operations: Iterable[Operation], malformed: int = 0) -> None:
    """Count the call that is being served as what it asks for, where callers are limited.

    Args:
        operations: As its lanes weigh them.
        malformed: How many beside them are none.
    """
    told = CALL.get().weigh
    if told is not None and (more := rows(operations) + malformed - 1) > 0:
        told(more)


class CallRefused(Exception):
    """The whole call is refused."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.refused = refused

    @classmethod
    def malformed(cls, field: str, problem: str) -> CallRefused:
        """A field of the request is not as it has to be."""
        return cls(Refused(Refusal.MALFORMED, {"field": field, "problem": problem}))


class CallUnanswered(Exception):
    """The whole call gets no answer."""

    def __init__(self, unanswered: Unanswered) -> None:
        super().__init__(unanswered.message)
        self.unanswered = unanswered
