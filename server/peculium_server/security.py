"""Records secrets that were shown by another than whose they were, and freezes what they lead to.

The first of each sort is recorded before its refusal is answered, as long as the database takes that at once:
nothing is decided without the database, so it has just been there. Those that follow within a minute are
counted, and recorded together when it is over: a storm of refusals adds a bounded number of rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from peculium_server.core.batch import Request
from peculium_server.core.limits import SECOND_US
from peculium_server.core.operations import Freeze
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refused, id_text
from peculium_server.core.reuse import GUARD, Reuse, ReuseKind, freeze, freezes
from peculium_server.lanes.answers import Answer
from peculium_server.lanes.lane import DeadlinePassed
from peculium_server.store.errors import StoreError
from peculium_server.store.refusals import NOBODY
from peculium_server.store.security import SecurityEvent
from peculium_server.telemetry.instruments import label_of
from peculium_server.telemetry.logs import FACTS
from peculium_server.telemetry.meters import Meters

WINDOW_SECONDS: Final = 60.0
"""What is alike within so long is counted as one."""
KEYS_MAX: Final = 256
"""Sorts that a server tells apart within a window; the others are told by kind only."""
KEYS_OF_ONE_MAX: Final = 16
"""Of them, those of one principal, so that nobody hides another; the others are told without their budget."""
WAITING_MAX: Final = 4_096
"""Events that are kept while the database takes none; those that come then are told by kind only."""
ANSWER_SECONDS_MAX: Final = 1.0
"""How long an answer waits for its event to be recorded."""
FREEZE_SECONDS_MAX: Final = 1.0
"""A Freeze that has no answer by then is tried again."""
RETRY_SECONDS: Final = 1.0
"""After the database has failed."""

_logger = logging.getLogger(__name__)


class Freezing(Protocol):
    """What has a Freeze decided."""

    async def execute(self, requests: Sequence[Request], deadline: float | None) -> list[Answer]:
        """Answer the operations of one request; see `peculium_server.lanes.ledger.Ledger`."""
        ...


class Adding(Protocol):
    """What keeps events; see `peculium_server.store.security.Security`."""

    async def add(self, events: Sequence[SecurityEvent]) -> None:
        """Add events, all of them or none."""
        ...


class _Key(NamedTuple):
    """What is alike: the same sort of secret of the same budget, shown by one principal, and another's."""

    kind: ReuseKind
    root_id: bytes
    budget_id: bytes
    principal: str
    consumed_by: str | None


class SecurityEvents:
    """What was noticed and is not recorded yet, and how it gets to the database."""

    def __init__(
        self,
        ledger: Freezing,
        table: Adding,
        freeze_seconds: int,
        meters: Meters | None = None,
    ) -> None:
        """Begin with nothing noticed.

        Args:
            ledger: Freezes.
            table: Where events are kept.
            freeze_seconds: How long after it was consumed a token freezes its budget, presented by another
                principal; 0: none does.
            meters: Counts what happens, if anybody wants to know.
        """
        self._ledger = ledger
        self._table = table
        self._window_us = freeze_seconds * SECOND_US
        self._meters = meters
        self._waiting: dict[_Key, SecurityEvent] = {}
        """To be recorded as soon as possible."""
        self._tried: list[SecurityEvent] = []
        """Likewise; but the database may have them already, so these are not added to."""
        self._counted: dict[_Key, SecurityEvent] = {}
        """To be recorded when the window is over."""
        self._freezes: dict[bytes, Freeze] = {}
        """To be made, by their ids."""
        self._frozen: dict[bytes, bytes] = {}
        """The Freeze of each budget that was frozen, or is to be, within the current window."""
        self._window_ends = 0.0
        self._told_apart: set[_Key] = set()
        """Within the current window."""
        self._of_one: Counter[str] = Counter()
        """How many of them each principal has."""
        self._noticed = 0
        self._recorded = 0
        """How many of those that were noticed before the last time that all was recorded."""
        self._wanted = asyncio.Event()
        self._progress = asyncio.Condition()

    # -- What happens -------------------------------------------------------------------------------

    def notice(self, request: Request, reuse: Reuse) -> bool:
        """A refusal is the sign of a reuse; say whether it is the first of its sort, to be waited for."""
        now = asyncio.get_running_loop().time()
        if now >= self._window_ends:
            self._begin_window(now)
        if self._meters is not None:
            self._meters.reused(reuse.kind)
        event = self._event(request, reuse)
        key = self._key_of(event)
        if key in self._told_apart:
            held = self._waiting if key in self._waiting else self._counted
            if not held:
                self._wanted.set()
            held[key] = _added(held.get(key), _told_by(key, event))
            return False
        self._told_apart.add(key)
        event = _told_by(key, event)
        self._waiting[key] = _added(self._waiting.get(key), event)
        self._noticed += 1
        self._wanted.set()
        _log(event)
        return True

    def _begin_window(self, now: float) -> None:
        self._window_ends = now + WINDOW_SECONDS
        self._told_apart.clear()
        self._of_one.clear()
        self._frozen.clear()
        for key, event in self._counted.items():
            self._waiting[key] = _added(self._waiting.get(key), event)
        self._counted.clear()

    def _event(self, request: Request, reuse: Reuse) -> SecurityEvent:
        operation, consumption = request.operation, reuse.consumption
        return SecurityEvent(
            at=reuse.at,
            event_id=uuid.uuid4().bytes,
            kind=reuse.kind,
            number=1,
            root_id=operation.root_id,
            budget_id=operation.budget_id,
            principal=request.actor.principal,
            operation_id=operation.operation_id,
            consumed_by=None if consumption is None else consumption.principal,
            consumed_operation_id=None if consumption is None else consumption.operation_id,
            consumed_kind=None if consumption is None else consumption.kind,
            consumed_at=None if consumption is None else consumption.at,
            holder=reuse.holder,
            freeze_id=self._freeze_soon(request, reuse),
        )

    def _freeze_soon(self, request: Request, reuse: Reuse) -> bytes | None:
        """Have the budget frozen, if that is what it leads to; by which operation."""
        operation, consumption = request.operation, reuse.consumption
        if not self._window_us or consumption is None or not freezes(reuse, self._window_us):
            return None
        made = freeze(operation.root_id, operation.budget_id, consumption)
        # Who has many old tokens of a budget freezes it no oftener in a window than who has one.
        if operation.budget_id not in self._frozen and len(self._frozen) < KEYS_MAX:
            self._frozen[operation.budget_id] = made.operation_id
            self._freezes[made.operation_id] = made
        return self._frozen.get(operation.budget_id)

    def _key_of(self, event: SecurityEvent) -> _Key:
        """What it is counted by: as much of it as there is room for."""
        principal = event.principal
        key = _Key(event.kind, event.root_id, event.budget_id, principal, event.consumed_by)
        if key in self._told_apart:
            return key
        if len(self._told_apart) >= KEYS_MAX or len(self._tried) >= WAITING_MAX:
            return _Key(event.kind, NOBODY, NOBODY, "", None)
        if self._of_one[principal] >= KEYS_OF_ONE_MAX:
            return _Key(event.kind, NOBODY, NOBODY, principal, None)
        self._of_one[principal] += 1
        return key

    async def recorded(self) -> None:
        """Wait until all that was noticed so far is recorded, but not for long."""
        noticed = self._noticed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS_MAX), self._progress:
                await self._progress.wait_for(lambda: self._recorded >= noticed)

    # -- What becomes of it -------------------------------------------------------------------------

    async def run(self) -> None:
        """Freeze and record until cancelled."""
        answers = True
        while True:
            await self._wait()
            done = False
            try:
                done = await self.record()
                answers = True
            except StoreError as error:
                if answers:
                    _logger.warning("security events are not recorded: %s", error)
                answers = False
            except Exception:
                _logger.exception("recording security events has failed")
            if not done:
                await asyncio.sleep(RETRY_SECONDS)
                self._wanted.set()

    async def _wait(self) -> None:
        """Wait for something to be recorded; what is only counted waits for the end of its window."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._window_ends if self._counted else None):
                await self._wanted.wait()
        self._wanted.clear()
        now = asyncio.get_running_loop().time()
        if self._counted and now >= self._window_ends:
            self._begin_window(now)

    async def end(self, seconds: float) -> None:
        """Record the last of it, if that is possible within so many seconds."""
        self._begin_window(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(seconds):
                await self._add()
        except StoreError as error:
            _logger.warning("the last security events were not recorded: %s", error)
        except TimeoutError:
            _logger.warning("the last security events were not recorded: no answer")
        for made in self._freezes.values():
            _logger.error("budget %s may not be frozen: the server ends", id_text(made.budget_id))

    async def record(self) -> bool:
        """Make the Freezes that are due, and record what waits; say whether nothing has to be tried again.

        Raises:
            StoreError: It was not recorded, or it is unknown whether it was: it will be tried again.
        """
        # First what keeps the money: the entry tells of the rest.
        due = list(self._freezes.values())
        done = await asyncio.gather(*map(self._freeze, due))
        for made, settled in zip(due, done, strict=True):
            if settled:
                del self._freezes[made.operation_id]
        await self._add()
        return all(done)

    async def _freeze(self, made: Freeze) -> bool:
        """Freeze a budget; say whether that is done, or will never be."""
        deadline = asyncio.get_running_loop().time() + FREEZE_SECONDS_MAX
        try:
            [answer] = await self._ledger.execute([Request(made, GUARD, 0)], deadline)
        except DeadlinePassed:
            return False
        except Exception:
            _logger.exception("budget %s cannot be frozen", id_text(made.budget_id))
            return True
        match answer.result:
            case Outcome(replayed=False):
                _logger.warning(
                    "budget %s is frozen",
                    id_text(made.budget_id),
                    extra={
                        FACTS: {"event": "freeze_on_reuse", "operation": id_text(made.operation_id)}
                    },
                )
            case Outcome():
                pass
            case Refused() as refused:
                _logger.warning(
                    "budget %s is not frozen: %s", id_text(made.budget_id), refused.message
                )
            case _:
                return False
        return True

    async def _add(self) -> None:
        noticed = self._noticed
        self._tried += self._waiting.values()
        self._waiting.clear()
        if self._tried:
            tried = len(self._tried)
            await self._table.add(self._tried)
            del self._tried[:tried]
        async with self._progress:
            self._recorded = noticed
            self._progress.notify_all()


def _added(before: SecurityEvent | None, event: SecurityEvent) -> SecurityEvent:
    """The first of them, with how often it was."""
    if before is None:
        return event
    return before._replace(
        number=before.number + event.number, freeze_id=before.freeze_id or event.freeze_id
    )


def _told_by(key: _Key, event: SecurityEvent) -> SecurityEvent:
    """The event as far as its key tells of it."""
    if key.root_id == event.root_id:
        return event
    return event._replace(
        root_id=NOBODY,
        budget_id=NOBODY,
        principal=key.principal,
        consumed_by=None,
        consumed_operation_id=None,
        consumed_kind=None,
        consumed_at=None,
        holder=None,
        freeze_id=None,
    )


def _log(event: SecurityEvent) -> None:
    facts = {
        "event": "security",
        "kind": label_of(event.kind),
        "budget": id_text(event.budget_id),
        "root": id_text(event.root_id),
        "principal": event.principal,
        "operation": id_text(event.operation_id),
    }
    if event.consumed_operation_id is not None:
        facts["consumed_by"] = event.consumed_by or ""
        facts["consumed_operation"] = id_text(event.consumed_operation_id)
    elif event.holder is not None:
        facts["holder"] = event.holder
    if event.freeze_id is not None:
        facts["freeze"] = id_text(event.freeze_id)
    _logger.warning("a secret was shown by another than whose it is", extra={FACTS: facts})
