"""Lists of budgets and of entries, filtered and in pages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from google.protobuf.message import Message

from peculium.v1.audit_service_pb2 import (
    ListBudgetsRequest,
    ListBudgetsResponse,
    ListEntriesRequest,
    ListEntriesResponse,
)
from peculium_server.core.state import Budget, BudgetState, Entry
from peculium_server.rpc import scope
from peculium_server.rpc.pages import PAGE_BYTES_MAX, Asked, fitting, page_token, read_page
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.responses import entry_bytes, write_budget, write_entry
from peculium_server.rpc.selecting import read_budget_filter, read_entry_filter, read_reach
from peculium_server.store.lists import (
    BudgetSelection,
    Reach,
    list_budgets,
    list_entries,
    list_roots,
)
from peculium_server.store.store import Page, Store

_PORTION_ROWS: Final = 500
_PORTIONS_MAX: Final = 8
"""So many budgets, so many times, are looked at for one page where the state decides."""


class Listing:
    """Lists budgets and entries."""

    def __init__(self, reader: Reader, store: Store) -> None:
        self._reader = reader
        self._store = store

    async def budgets(self, request: ListBudgetsRequest) -> ListBudgetsResponse:
        """The roots, or a budget and everything below it, as far as they are selected.

        Raises:
            CallRefused: BUDGET_UNKNOWN, MALFORMED, TOO_LARGE.
        """
        selection, states = read_budget_filter(request.filter)
        top: Budget | None = None
        if request.HasField("below"):
            top = (await self._reader.for_auditor(request.below))[0].budget
        scope = b"roots" if top is None else b"subtree" + top.root_id + top.budget_id
        scope += _named(request.filter)
        asked = read_page(scope, request.page_size, request.page_token)
        response = ListBudgetsResponse()
        after = await self._fill(response, top, selection, states, asked)
        response.next_page_token = page_token(scope, after)
        return response

    async def _fill(
        self,
        response: ListBudgetsResponse,
        top: Budget | None,
        selection: BudgetSelection,
        states: frozenset[BudgetState],
        asked: Asked,
    ) -> bytes | None:
        """Write the budgets of a page, and tell the key to go on after; None at the end.

        States depend on the ancestors: which budgets have them is seen when those were read.
        """
        size, after = 0, asked.after
        for _ in range(_PORTIONS_MAX if states else 1):
            limit = max(asked.size, _PORTION_ROWS) if states else asked.size
            page = await self._portion(top, selection, Asked(limit, after))
            for line in await self._reader.lines(page.rows):
                if not states or line.state in states:
                    if len(response.budgets) == asked.size:
                        return after
                    message = response.budgets.add()
                    write_budget(line.budget, line.path, line.state, message)
                    size += message.ByteSize()
                    if size > PAGE_BYTES_MAX and len(response.budgets) > 1:
                        del response.budgets[-1]
                        return after
                after = _key_of(line.budget, top)
            after = page.next
            if after is None or not page.rows:
                break
        return after

    async def _portion(
        self, top: Budget | None, selection: BudgetSelection, asked: Asked
    ) -> Page[Budget, bytes]:
        if top is not None:
            return await list_budgets(
                self._store, top, selection, limit=asked.size, after=asked.after
            )
        after = None if asked.after is None else asked.after.decode()
        page = await list_roots(
            self._store, selection, limit=asked.size, after=after, among=scope.roots()
        )
        return Page(page.rows, None if page.next is None else page.next.encode())

    async def entries(self, request: ListEntriesRequest) -> ListEntriesResponse:
        """The entries of a budget, a subtree or a tree, as far as they are selected.

        Raises:
            CallRefused: BUDGET_UNKNOWN, MALFORMED, TOO_LARGE.
        """
        reach, (selection, period) = read_reach(request.reach), read_entry_filter(request.filter)
        budget = (await self._reader.for_auditor(request.budget))[0].budget
        scope = b"entries" + bytes((reach, request.descending)) + budget.root_id
        if reach is not Reach.TREE:
            scope += budget.budget_id
        scope += _named(request.filter)
        asked = read_page(scope, request.page_size, request.page_token)
        page = await list_entries(
            self._store,
            budget,
            reach,
            selection,
            period,
            limit=asked.size,
            after=asked.after_number,
            descending=request.descending,
        )
        rows = fitting(page.rows, entry_bytes)
        if reach is not Reach.BUDGET and len(rows) < len(page.rows):
            rows = _whole(page.rows, len(rows))
        last = page.next
        if len(rows) < len(page.rows):
            last = rows[-1].seq if reach is Reach.BUDGET else rows[-1].position
        response = ListEntriesResponse(next_page_token=page_token(scope, last))
        lane = self._store.lane_of(budget.root_id)
        for entry in rows:
            write_entry(entry, lane, response.entries.add())
        return response


def _named(selection: Message) -> bytes:
    """The filter, so that a page token is of no other: digested, or nothing if there is none."""
    said = selection.SerializeToString(deterministic=True)
    return hashlib.sha256(said).digest() if said else b""


def _key_of(budget: Budget, top: Budget | None) -> bytes:
    if top is None:
        return budget.name.encode()
    return b"" if budget.budget_id == top.budget_id else budget.budget_id


def _whole(rows: Sequence[Entry], fit: int) -> Sequence[Entry]:
    """The operations of which all parts fit into a message; the first one comes whole all the same.

    In the list of a subtree or tree the parts of an operation stay together, for its key is the
    operation's.
    """
    broken = rows[fit].position
    fitting_rows = [entry for entry in rows[:fit] if entry.position != broken]
    return fitting_rows or [entry for entry in rows if entry.position == broken]
