"""One event in the log for each call, if the log wants to know."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from peculium_server.core.throttle import Bucket
from peculium_server.rpc.calls import Call
from peculium_server.telemetry.instruments import label_of
from peculium_server.telemetry.logs import FACTS
from peculium_server.telemetry.spans import context_of

TURNED_AWAY: Final = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"})
"""How calls end that nothing was done for, and of which anybody can make as many as the network carries."""
TURNED_AWAY_RATE: Final = 10
"""Of these so many a second are events of their own; the next one that is says how many were not."""
TURNED_AWAY_BURST: Final = 100

_logger: Final = logging.getLogger("peculium_server.calls")


def calls_are_logged() -> bool:
    """Say whether the log wants to know of each call."""
    return _logger.isEnabledFor(logging.INFO)


class _Few:
    """Lets a few events through, and counts the others."""

    def __init__(self) -> None:
        self._bucket = Bucket(TURNED_AWAY_RATE, TURNED_AWAY_BURST)
        self._kept_back = 0

    def pass_on(self, now: int) -> int | None:
        """Say how many were kept back since the last one that was not; None: this one is, too."""
        if self._bucket.wait_us(now):
            self._kept_back += 1
            return None
        self._bucket.put(now)
        kept_back, self._kept_back = self._kept_back, 0
        return kept_back


_few: Final = _Few()


def log_call(name: str, status: str, seconds: float, call: Call) -> None:
    """Log a call that has ended: who called what, and what became of it; never what was said."""
    if not calls_are_logged():
        return
    kept_back: int | None = 0
    if status in TURNED_AWAY:
        kept_back = _few.pass_on(time.monotonic_ns() // 1_000)
        if kept_back is None:
            return
    facts: dict[str, Any] = {
        "event": "call",
        "method": name,
        "status": status,
        "duration_ms": round(seconds * 1_000, 3),
        "request_id": call.request_id,
    }
    if call.actor is not None:
        facts["principal"] = call.actor.principal
        facts["role"] = call.actor.role.name.lower()
    if call.operations:
        facts["operations"] = call.operations
    if call.refused:
        facts["refused"] = {label_of(reason): number for reason, number in call.refused.items()}
    if kept_back:
        facts["not_logged"] = kept_back
    context = context_of(call.traceparent)
    if context is not None:
        # Of the caller's trace, whether this server exports spans or not.
        facts["trace_id"] = f"{context.trace_id:032x}"
    _logger.info("%s %s", name, status, extra={FACTS: facts})
