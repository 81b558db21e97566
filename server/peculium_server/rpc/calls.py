"""What is known of the call that is being served, from the interceptors to the services."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from peculium_server.core.operations import Actor
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.lanes.answers import Unanswered


@dataclass(slots=True)
class Call:
    """One call; each interceptor adds what it finds out."""

    method: str
    request_id: str
    """Names the call in the log."""
    actor: Actor | None = None
    deadline: float | None = None
    """On the event loop's clock."""


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
