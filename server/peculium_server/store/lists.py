"""Lists for auditors: filtered, paged by key, and of bounded work for each page.

A list is read in windows of its keys that grow while little is found in them. When a page has looked at
enough without being full, it ends early, and the next one goes on behind what was looked at: so a
filter that selects nothing gives empty pages, each after a moment, and not one page after minutes.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import IntEnum
from itertools import groupby
from typing import Any, Final, NamedTuple

from peculium_server.core import cbor
from peculium_server.core.encoding import REQUEST_KEYS
from peculium_server.core.limits import DEPTH_MAX
from peculium_server.core.operations import Labels
from peculium_server.core.selection import Period, Selection
from peculium_server.core.state import Budget, Entry
from peculium_server.store.audit_reads import STATEMENTS
from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.store import Page, Store

KEYS_MAX: Final = 65_536
"""Keys (positions, seqs, budgets) that one page looks at."""
ENTRIES_MAX: Final = 4_096
"""Entries that one page decodes: some ten milliseconds each thousand."""
_WINDOW_MAX: Final = 16_384
_ENTRIES_AT_ONCE: Final = 1_200
"""More than one operation can have: 257 parts that delegate or rotate, about 1,000 that a closing moves."""

NIL: Final = bytes(16)
"""Less than every id."""
_LAST_ID: Final = b"\xff" * 16
_LAST_NAME: Final = "\U0010ffff"
_TIME_MIN: Final = -62_135_596_800_000_000
"""The beginning of the year 1, in microseconds of the Unix epoch; 9999 ends before the other one."""
_TIME_MAX: Final = 253_402_300_800_000_000


class Reach(IntEnum):
    """How far around a budget a list goes. Numbers are those of the wire."""

    BUDGET = 1
    SUBTREE = 2
    TREE = 3


class BudgetSelection(NamedTuple):
    """Which budgets: those for which everything holds that is said."""

    holder: str | None = None
    labels: Labels = ()
    created_from: int | None = None
    created_until: int | None = None
    """Excluded, as is every end."""
    depth: int | None = None
    """At most so many levels below the top."""
    name_prefix: str = ""


class _Range(NamedTuple):
    """Keys above one and up to another."""

    low: int
    high: int


async def list_roots(
    store: Store,
    selection: BudgetSelection,
    *,
    limit: int,
    after: str | None = None,
    among: Collection[bytes] | None = None,
) -> Page[Budget, str]:
    """Roots by name, as far as they are selected; a page may be short, or empty, and not the last.

    `among`: only these are there, for all that the list tells: then it ends a page early behind none of the
    others, whose name would be the key to go on with.
    """
    found: list[Budget] = []
    start, looked, width = after or "", 0, limit + 1
    values = _values_of_budgets(selection, depth=0) | {"among": sorted(among or ())}
    while True:
        ends = await store.fetch(STATEMENTS["window_of_roots"], after=start, skipped=width - 1)
        until = ends[0] if ends else _LAST_NAME
        found += await store.fetch(
            STATEMENTS["roots"], **values, after=start, until=until, limit=limit + 1 - len(found)
        )
        if len(found) > limit:
            return Page(tuple(found[:limit]), found[limit - 1].name)
        looked += width
        if not ends or (looked >= KEYS_MAX and among is None):
            return Page(tuple(found), until if ends else None)
        start, width = until, min(4 * width, _WINDOW_MAX)


async def list_budgets(
    store: Store,
    top: Budget,
    selection: BudgetSelection,
    *,
    limit: int,
    after: bytes | None = None,
) -> Page[Budget, bytes]:
    """A budget, then everything below it, at any depth, by id; closed budgets included.

    The first page has the budget itself, whose key is empty. A page may be short, or empty, and not
    the last. Without a selection, what is in one page of a whole tree was true at one instant.
    """
    found: list[Budget] = []
    key = store.key(top.root_id, top.budget_id)
    top_id = top.budget_id if after is None else NIL
    start, looked, width = after or NIL, 0, limit + 2
    values = _values_of_budgets(selection, depth=len(top.ancestors))
    while True:
        until, last = await window_of_budgets(store, top.root_id, start, width)
        found += await store.fetch(
            STATEMENTS["budgets"],
            **key,
            **values,
            top_id=top_id,
            after=start,
            until=until,
            limit=limit + 1 - len(found),
        )
        if len(found) > limit:
            edge = found[limit - 1].budget_id
            return Page(tuple(found[:limit]), b"" if edge == top.budget_id else edge)
        looked += width
        if last or looked >= KEYS_MAX:
            return Page(tuple(found), None if last else until)
        start, top_id, width = until, NIL, min(4 * width, _WINDOW_MAX)


async def window_of_budgets(
    store: Store, root_id: bytes, after: bytes, width: int
) -> tuple[bytes, bool]:
    """The id that ends a window of so many budgets of a tree, and whether there are none behind it."""
    ends = await store.fetch(
        STATEMENTS["window_of_budgets"],
        lane=store.lane_of(root_id),
        root_id=root_id,
        after=after,
        skipped=width - 1,
    )
    return (ends[0], False) if ends else (_LAST_ID, True)


def _values_of_budgets(selection: BudgetSelection, *, depth: int) -> dict[str, Any]:
    below = DEPTH_MAX if selection.depth is None else selection.depth
    return {
        "holders": [] if selection.holder is None else [selection.holder],
        "labels": json.dumps(dict(selection.labels), ensure_ascii=False),
        "since": _TIME_MIN if selection.created_from is None else selection.created_from,
        "before": _TIME_MAX if selection.created_until is None else selection.created_until,
        "depth": depth + below,
        "prefix": selection.name_prefix,
    }


async def list_entries(
    store: Store,
    budget: Budget,
    reach: Reach,
    selection: Selection,
    period: Period,
    *,
    limit: int,
    after: int | None = None,
    descending: bool = False,
) -> Page[Entry, int]:
    """The entries of a budget by seq; or of a subtree or tree by position, whole operations each.

    A page has at most `limit` entries of a budget, or operations of a subtree or tree. It may be
    short, or empty, and not the last. `after` is a seq or a position.
    """
    scan = _Scan(store, budget, reach, selection, period, descending=descending)
    keys = await scan.range()
    if keys is None:
        return Page((), None)
    low, high = keys
    if after is not None:
        low, high = (low, min(high, after - 1)) if descending else (max(low, after), high)
    operations: list[list[Entry]] = []
    width, looked = limit + 1, 0
    while low < high and len(operations) <= limit:
        if looked >= KEYS_MAX or scan.decoded >= ENTRIES_MAX:
            break
        window = (
            _Range(max(low, high - width), high)
            if descending
            else _Range(low, min(high, low + width))
        )
        found, seen = await scan.window(window)
        operations += [list(parts) for _, parts in groupby(found, key=scan.key)]
        looked += seen.high - seen.low
        low, high = (low, seen.low) if descending else (seen.high, high)
        if seen == window and len(found) < _ENTRIES_AT_ONCE // 4:
            width = min(4 * width, _WINDOW_MAX)
    page = tuple(entry for parts in operations[:limit] for entry in parts)
    if len(operations) > limit:
        return Page(page, scan.key(page[-1]))
    if low < high:
        return Page(page, high + 1 if descending else low)
    return Page(page, None)


class _Scan:
    """Reads windows of a list of entries."""

    def __init__(
        self,
        store: Store,
        budget: Budget,
        reach: Reach,
        selection: Selection,
        period: Period,
        *,
        descending: bool,
    ) -> None:
        self.decoded = 0
        """Entries so far."""
        self._store = store
        self._budget = budget
        self._reach = reach
        self._selection = selection
        self._period = period
        self._descending = descending
        self._among: list[bytes] = []
        self._statement = STATEMENTS[
            f"{reach.name.lower()}_entries" + ("_descending" if descending else "")
        ]
        self._key = store.key(budget.root_id, budget.budget_id)
        if reach is Reach.TREE:
            del self._key["budget_id"]

    def key(self, entry: Entry) -> int:
        """The place of an entry in the list."""
        return entry.seq if self._reach is Reach.BUDGET else entry.position

    async def range(self) -> _Range | None:
        """The keys between which everything is that is selected; None: there is nothing."""
        selection = self._selection
        operation = await self._parts_of_operation()
        if operation is not None and not operation:
            return None
        since, among = self._period.since, self._budget.budget_id
        if selection.hold_id is not None:
            held = await self._store.fetch(
                STATEMENTS["hold"],
                lane=self._key["lane"],
                root_id=self._budget.root_id,
                hold_id=selection.hold_id,
            )
            if not held:
                return None
            [hold] = held
            if self._reach is Reach.BUDGET and hold.budget_id != self._budget.budget_id:
                return None
            self._among = [hold.budget_id]
            among, since = hold.budget_id, max(hold.created_at, since or hold.created_at)
        if operation:
            keys = [self.key(entry) for entry in operation]
            return _Range(min(keys) - 1, max(keys))
        if self._reach is Reach.BUDGET:
            return await self._seqs(since, self._period.until)
        lane = self._key["lane"]
        end = (await self._store.standing(lane)).position
        # Of a hold there is nothing before its budget was made, nor of a subtree before its top.
        top = self._budget.root_id if self._reach is Reach.TREE else among
        made = await self._store.fetch(
            STATEMENTS["first_entries"], lane=lane, root_id=self._budget.root_id, ids=[top]
        )
        return _Range(made[0].position - 1 if made else 0, end)

    async def _seqs(self, since: int | None, until: int | None) -> _Range:
        """A budget's seqs in a period: within a budget, the time never decreases with the seq."""
        low, high = 0, self._budget.seq
        if since is not None:
            low = await self._seq_at(since - 1)
        if until is not None:
            high = min(high, await self._seq_at(until - 1))
        return _Range(low, high)

    async def _seq_at(self, at: int) -> int:
        found = await self._store.fetch(STATEMENTS["seq_at"], **self._key, at=_in_calendar(at))
        return found[0] if found else 0

    async def _parts_of_operation(self) -> list[Entry] | None:
        """The parts of the operation that is asked for, or None if none is."""
        if self._selection.operation_id is None:
            return None
        parts: list[Entry] = await self._store.fetch(
            STATEMENTS["parts"],
            lane=self._key["lane"],
            root_id=self._budget.root_id,
            ids=[self._selection.operation_id],
        )
        if self._reach is Reach.BUDGET:
            return [part for part in parts if part.budget_id == self._budget.budget_id]
        return parts

    async def window(self, keys: _Range) -> tuple[list[Entry], _Range]:
        """What is selected in a window, and how much of the window was looked at."""
        found: list[Entry] = await self._store.fetch(
            self._statement,
            **self._key,
            **self._values(),
            after=keys.low,
            until=keys.high,
            limit=_ENTRIES_AT_ONCE,
        )
        self.decoded += len(found)
        if len(found) == _ENTRIES_AT_ONCE:
            # Of the last operation parts may be missing: it is left for the next window.
            edge = self.key(found[-1])
            found = [entry for entry in found if self.key(entry) != edge]
            keys = _Range(edge, keys.high) if self._descending else _Range(keys.low, edge - 1)
        return await self._matching(found), keys

    def _values(self) -> dict[str, Any]:
        selection, (since, until) = self._selection, self._period
        return {
            "kinds": sorted(selection.kinds),
            "principals": sorted(selection.principals),
            "traces": [] if selection.trace_id is None else [selection.trace_id],
            "among": self._among,
            "since": _TIME_MIN if since is None else _in_calendar(since),
            "before": _TIME_MAX if until is None else _in_calendar(until),
            "effect_bytes": "" if selection.hold_id is None else selection.hold_id.hex(),
            "request_bytes": _told(selection).hex(),
        }

    async def _matching(self, found: list[Entry]) -> list[Entry]:
        """Those of a window that are selected, after all that their bytes say."""
        selection = self._selection
        requests: dict[bytes, bytes | None] = {}
        if selection.labels or selection.reference:
            requests = {entry.operation_id: entry.request for entry in found if entry.part == 0}
            missing = {entry.operation_id for entry in found} - requests.keys()
            if missing:
                firsts: list[Entry] = await self._store.fetch(
                    STATEMENTS["first_parts"],
                    lane=self._key["lane"],
                    root_id=self._budget.root_id,
                    ids=sorted(missing),
                )
                requests |= {first.operation_id: first.request for first in firsts}
        try:
            return [
                entry
                for entry in found
                if selection.selects(entry, requests.get(entry.operation_id))
            ]
        except ValueError as error:
            raise LedgerCorrupt("the request of an operation is unreadable") from error


def _told(selection: Selection) -> bytes:
    """The longest stretch of bytes that a request has if it is selected.

    In the encoding a label's value follows its key, and the reference its field's.
    """
    stretches = [cbor.text(key) + cbor.text(value) for key, value in selection.labels]
    if selection.reference:
        stretches.append(cbor.integer(REQUEST_KEYS["reference"]) + cbor.text(selection.reference))
    return max(stretches, key=len, default=b"")


def _in_calendar(at: int) -> int:
    return min(max(at, _TIME_MIN), _TIME_MAX)
