"""Holds each caller to the server's limits, before anything of what it asks for is read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from peculium_server.core.throttle import Exceeded, Limit, Limits, Throttle
from peculium_server.lanes.answers import Unanswered, Unavailability
from peculium_server.rpc.calls import CALL, CallUnanswered, actor
from peculium_server.rpc.interceptors import Context, Handler, handler_like, serve_of
from peculium_server.rpc.permissions import ROWS, Names
from peculium_server.telemetry.meters import Meters

OTHER_WEIGHT: Final = 10
"""What a call weighs, in operations, that is not about operations on budgets, such as a read: it has one of
few connections for itself, while operations share transactions."""

RETRY_MS_MIN: Final = 100
"""So long at least: a caller with many processes would ask all the time."""
STREAMS_RETRY_MS: Final = 5_000
"""Streams last."""

_OPERATIONS: Final = (Names.OPERATION, Names.OPERATIONS)


class ThrottleInterceptor:
    """Lets nobody ask for more than one may."""

    def __init__(self, limits: Limits, meters: Meters | None = None) -> None:
        """Begin with nobody calling.

        Args:
            limits: Of each principal.
            meters: Counts who has to wait, if anybody wants to know.
        """
        self._throttle = Throttle(limits)
        self._meters = meters
        self._facts: Mapping[Limit, Mapping[str, str]] = {
            Limit.RATE: {"limit": str(limits.rate), "burst": str(limits.burst)},
            Limit.AT_ONCE: {"limit": str(limits.at_once)},
            Limit.STREAMS: {"limit": str(limits.streams)},
        }

    def wrap(self, method: str, handler: Handler, /) -> Handler:
        """Serve the calls of a method to who has not reached a limit."""
        serve, stream = serve_of(handler), handler.response_streaming
        weight = 1 if ROWS[method].names in _OPERATIONS else OTHER_WEIGHT
        enter, clock = self._throttle.enter, time.monotonic_ns

        async def held(request: Any, context: Context) -> Any:
            principal = actor().principal
            entered = enter(principal, weight, clock() // 1_000, stream=stream)
            if isinstance(entered, Exceeded):
                raise CallUnanswered(self._told(principal, entered))
            CALL.get().weigh = entered.add
            try:
                return await serve(request, context)
            finally:
                entered.leave()

        return handler_like(handler, held)

    def _told(self, principal: str, exceeded: Exceeded) -> Unanswered:
        limit = exceeded.limit
        if self._meters is not None:
            self._meters.limited(limit)
        facts = {"principal": principal, **self._facts[limit]}
        match limit:
            case Limit.RATE:
                wait = max(RETRY_MS_MIN, -(-exceeded.wait_us // 1_000))
                return Unanswered(Unavailability.RATE_LIMITED, facts, wait)
            case Limit.AT_ONCE:
                return Unanswered(Unavailability.TOO_MANY_AT_ONCE, facts, RETRY_MS_MIN)
            case Limit.STREAMS:
                return Unanswered(Unavailability.TOO_MANY_STREAMS, facts, STREAMS_RETRY_MS)
