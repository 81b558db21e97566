"""Following the entries as they are recorded: from any point on, without a gap, and each once.

All who follow share one poll of where the lanes stand, and how many alerts there are. Each then reads
what is new for itself, a portion at a time, and no more until that is taken: whoever is slow costs no
memory. An alert is recorded after the entries that it is of, and so it is told after them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Final

from peculium.v1.audit_service_pb2 import WatchEntriesRequest, WatchEntriesResponse
from peculium_server.core.alerts import Alert
from peculium_server.core.selection import Selection
from peculium_server.core.state import Entry
from peculium_server.lanes.answers import Unanswered, Unavailability
from peculium_server.lanes.ledger import DRAINING
from peculium_server.rpc.calls import CallRefused, CallUnanswered
from peculium_server.rpc.cursors import read_cursor, write_cursor
from peculium_server.rpc.pages import PAGE_BYTES_MAX
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.responses import alert_bytes, entry_bytes, write_alert, write_entry
from peculium_server.rpc.selecting import read_reach, read_selection
from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.lists import Reach
from peculium_server.store.store import Store
from peculium_server.store.tail import Recorded, Within

WATCHES_MAX: Final = 32
"""At a time; each reads for itself."""
WATCHES_RETRY_MS: Final = 5_000

POLL_SECONDS: Final = 0.2
"""How often the lanes are looked at, if anybody follows them."""
HEARTBEAT_SECONDS: Final = 5.0

_WIDTH_FIRST: Final = 512
_WIDTH_MAX: Final = 65_536
"""Positions that are looked at in one read: more where little is wanted."""
_ALERTS_AT_ONCE: Final = 500
_SPARSE_ENTRIES: Final = 64
"""A read that finds fewer makes the next one wider."""


class Watching:
    """Everybody who follows the ledger at this server."""

    def __init__(self, reader: Reader, store: Store) -> None:
        self._reader = reader
        self._store = store
        self._poll = _Poll(store)
        self._watches = 0

    async def watch(self, request: WatchEntriesRequest) -> AsyncGenerator[WatchEntriesResponse]:
        """What is recorded from a cursor, from the beginning, or from now on, and then for ever.

        Raises:
            CallRefused: BUDGET_UNKNOWN; MALFORMED: a filter or cursor that cannot be meant.
            CallUnanswered: Too many follow already, or the server is about to stop.
        """
        selection = read_selection(request.filter)
        within = await self._within(request)
        if request.cursor and request.from_beginning:
            raise CallRefused.malformed("from_beginning", "must not be said with a cursor")
        with self._counted(), self._poll.wanted():
            positions = await self._poll.now()
            if request.cursor:
                seen = read_cursor(request.cursor, self._store.incarnation, len(positions))
            else:
                seen = [0] * len(positions) if request.from_beginning else list(positions)
            watch = _Watch(self._store, within, selection, seen, alerts=request.alerts)
            watch.check(positions)
            # Whoever is cut off before anything happens has to know where that was.
            yield watch.heartbeat()
            async with contextlib.aclosing(self._follow(watch, positions)) as messages:
                async for message in messages:
                    yield message

    def close(self) -> None:
        """Tell everybody to go on at another server, and take nobody any more."""
        self._poll.close()

    async def _follow(
        self, watch: _Watch, positions: Sequence[int]
    ) -> AsyncGenerator[WatchEntriesResponse]:
        time = asyncio.get_running_loop().time
        told_at = time()
        while True:
            async for portion in watch.catch_up(positions):
                for message in portion:
                    yield message
                    told_at = time()
                self._poll.check()
                if time() - told_at >= HEARTBEAT_SECONDS:
                    yield watch.heartbeat()
                    told_at = time()
            left = told_at + HEARTBEAT_SECONDS - time()
            positions = await self._poll.beyond(positions, seconds=max(0.0, left))
            watch.check(positions)

    async def _within(self, request: WatchEntriesRequest) -> Within | None:
        """Whose entries are followed; None: everybody's."""
        reach = read_reach(request.reach)
        if not request.HasField("budget") and request.reach:
            raise CallRefused.malformed("reach", "needs a budget")
        read = await self._reader.for_auditor_or_all(
            request.budget if request.HasField("budget") else None
        )
        if read is None:
            return None
        line, _ = read
        root_id, budget_id = line.budget.root_id, line.budget.budget_id
        if reach is Reach.TREE:
            return Within(root_id)
        return Within(root_id, budget_id, subtree=reach is Reach.SUBTREE)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        if self._watches >= WATCHES_MAX:
            facts = {"limit": str(WATCHES_MAX)}
            raise CallUnanswered(
                Unanswered(Unavailability.TOO_MANY_WATCHES, facts, WATCHES_RETRY_MS)
            )
        self._watches += 1
        try:
            yield
        finally:
            self._watches -= 1


class _Poll:
    """Knows where the lanes stand, and behind these the alerts, as long as anybody wants to."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._looking = asyncio.Lock()
        """One look after the other: none is overtaken by an older one."""
        self._wanted = 0
        self._task: asyncio.Task[None] | None = None
        self._positions: tuple[int, ...] = ()
        self._error: Exception | None = None
        self._closed = False
        self._turned = asyncio.Event()
        """Set, and made anew, whenever any of the above has changed."""

    @contextlib.contextmanager
    def wanted(self) -> Iterator[None]:
        """Look at the lanes for the time of the block."""
        self.check()
        self._wanted += 1
        if self._task is None:
            self._task = asyncio.create_task(self._look(), name="watch")
        try:
            yield
        finally:
            self._wanted -= 1
            if not self._wanted and self._task is not None:
                self._task.cancel()
                self._task = None

    async def now(self) -> Sequence[int]:
        """Where the lanes stand just now.

        Raises:
            StoreError: They cannot be looked at.
        """
        async with self._looking:
            positions = await self._store.watched()
            if positions != self._positions or self._error is not None:
                self._positions, self._error = positions, None
                self._turn()
        return positions

    async def beyond(self, positions: Sequence[int], *, seconds: float) -> Sequence[int]:
        """Where the lanes stand once that is elsewhere, or after so many seconds.

        Raises:
            CallUnanswered: The server is about to stop.
            StoreError: They cannot be looked at.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._positions == positions and self._error is None:
                    self.check()
                    await self._turned.wait()
        self.check()
        if self._error is not None:
            raise self._error
        return self._positions

    def check(self) -> None:
        """Go on only as long as the server does.

        Raises:
            CallUnanswered: It is about to stop.
        """
        if self._closed:
            raise CallUnanswered(DRAINING)

    def close(self) -> None:
        """End the waits of all."""
        self._closed = True
        self._turn()

    def _turn(self) -> None:
        self._turned.set()
        self._turned = asyncio.Event()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.now()
            except Exception as error:  # noqa: BLE001 - whatever it is, those who wait have to hear of it
                self._error = error
                self._turn()


class _Watch:
    """How far one of them has come."""

    def __init__(
        self,
        store: Store,
        within: Within | None,
        selection: Selection,
        seen: list[int],
        *,
        alerts: bool,
    ) -> None:
        self._alerts = alerts
        """They are wanted."""
        self._store = store
        self._within = within
        self._selection = selection
        self._seen = seen
        """By lane, and behind these of the alerts: up to this position everything was told, or is not
        wanted."""
        self._lanes = range(store.lanes) if within is None else [store.lane_of(within.root_id)]
        self._widths = dict.fromkeys(self._lanes, _WIDTH_FIRST)

    def check(self, positions: Sequence[int]) -> None:
        """Make sure that the ledger has what was seen of it.

        Raises:
            CallRefused: It was restored to its past, or the cursor is made up.
        """
        for seen, position in zip(self._seen, positions, strict=True):
            if seen > position:
                problem = "is ahead of the ledger, which was restored to its past"
                raise CallRefused.malformed("cursor", problem)

    def heartbeat(self) -> WatchEntriesResponse:
        """A message without entries."""
        return WatchEntriesResponse(cursor=self._cursor())

    async def catch_up(
        self, positions: Sequence[int]
    ) -> AsyncGenerator[list[WatchEntriesResponse]]:
        """What was recorded up to these positions, a portion of each lane in turn, as messages."""
        wanted = {*self._lanes, self._of_alerts} if self._alerts else {*self._lanes}
        for lane in set(range(len(positions))).difference(wanted):
            self._seen[lane] = positions[lane]
        while behind := [lane for lane in self._lanes if self._seen[lane] < positions[lane]]:
            for lane in behind:
                yield await self._portion(lane, positions[lane])
        while self._seen[self._of_alerts] < positions[self._of_alerts]:
            yield await self._portion_of_alerts(positions[self._of_alerts])

    @property
    def _of_alerts(self) -> int:
        """Where alerts are among the positions."""
        return self._store.lanes

    async def _portion_of_alerts(self, last: int) -> list[WatchEntriesResponse]:
        seen = self._seen[self._of_alerts]
        found = await self._store.alerting.list_alerts(None, after=seen, limit=_ALERTS_AT_ONCE)
        until = found[-1].number if len(found) == _ALERTS_AT_ONCE else last
        found = [numbered for numbered in found if numbered.number <= last]
        # There are no gaps but at the beginning, where they are kept no longer.
        forgotten = (found[0].number - 1 if found else last) - seen
        messages: list[WatchEntriesResponse] = []
        if forgotten:
            self._seen[self._of_alerts] = seen + forgotten
            messages.append(WatchEntriesResponse(cursor=self._cursor(), alerts_forgotten=forgotten))
        size = PAGE_BYTES_MAX
        for numbered in found:
            if not self._concerns(numbered.alert):
                continue
            size += alert_bytes(numbered)
            if size > PAGE_BYTES_MAX:
                messages.append(WatchEntriesResponse())
                size = alert_bytes(numbered)
            write_alert(numbered, messages[-1].alerts.add())
            self._seen[self._of_alerts] = numbered.number
            messages[-1].cursor = self._cursor()
        self._seen[self._of_alerts] = min(until, last)
        if messages:
            messages[-1].cursor = self._cursor()
        return messages

    def _concerns(self, alert: Alert) -> bool:
        """Say whether an alert is of a rule on the budget that is followed, or within its reach."""
        if self._within is None:
            return True
        root_id, budget_id, subtree = self._within
        if alert.root_id != root_id:
            return False
        if budget_id is None:
            return True
        return budget_id in alert.line if subtree else budget_id == alert.budget_id

    async def _portion(self, lane: int, position: int) -> list[WatchEntriesResponse]:
        seen, width = self._seen[lane], self._widths[lane]
        until = min(position, seen + width)
        tail = await self._store.tail(lane, self._within, after=seen, until=until)
        if self._within is None:
            _check_complete(tail.operations, lane, seen, tail.until)
        found = 0
        messages: list[WatchEntriesResponse] = []
        size = 0
        for operation in tail.operations:
            selected = self._selected(operation)
            if not selected:
                continue
            found += len(selected)
            size += sum(map(entry_bytes, selected))
            if not messages or size > PAGE_BYTES_MAX:
                messages.append(WatchEntriesResponse())
                size = sum(map(entry_bytes, selected))
            for entry in selected:
                write_entry(entry, lane, messages[-1].entries.add())
            self._seen[lane] = operation.position
            messages[-1].cursor = self._cursor()
        self._seen[lane] = tail.until
        if messages:
            messages[-1].cursor = self._cursor()
        if tail.until < until:
            self._widths[lane] = _WIDTH_FIRST
        elif found < _SPARSE_ENTRIES and until < position:
            self._widths[lane] = min(4 * width, _WIDTH_MAX)
        return messages

    def _selected(self, operation: Recorded) -> list[Entry]:
        try:
            return [
                entry
                for entry in operation.entries
                if self._selection.selects(entry, operation.request)
            ]
        except ValueError as error:
            raise LedgerCorrupt(
                f"the operation at position {operation.position}: {error}"
            ) from error

    def _cursor(self) -> bytes:
        return write_cursor(self._store.incarnation, self._seen)


def _check_complete(operations: Sequence[Recorded], lane: int, after: int, until: int) -> None:
    """Make sure that nothing is passed over: a lane has an operation at every position."""
    found = [operation.position for operation in operations]
    wanted = range(after + 1, until + 1)
    if len(found) != len(wanted) or any(map(int.__ne__, found, wanted)):
        missing = next((each for each in wanted if each not in set(found)), until)
        raise LedgerCorrupt(f"lane {lane} has no operation at position {missing}")
