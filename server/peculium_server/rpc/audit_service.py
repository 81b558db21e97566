"""The auditors' service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import grpc

from peculium.v1 import audit_service_pb2, audit_service_pb2_grpc
from peculium.v1.audit_service_pb2 import (
    GetBudgetRequest,
    GetBudgetResponse,
    GetStatementRequest,
    GetStatementResponse,
    GetUsageRequest,
    GetUsageResponse,
    ListBudgetsRequest,
    ListBudgetsResponse,
    ListEntriesRequest,
    ListEntriesResponse,
    VerifyRequest,
    VerifyResponse,
    WatchEntriesRequest,
    WatchEntriesResponse,
)
from peculium_server.core.state import Budget, Entry
from peculium_server.rpc.accounting import Accounting
from peculium_server.rpc.pages import fitting, page_token, read_page
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.responses import (
    entry_bytes,
    write_budget,
    write_entry,
    write_finding,
    write_position,
)
from peculium_server.rpc.verifying import Verification
from peculium_server.rpc.watching import Watching
from peculium_server.store.store import Store

_KEY_BYTES: Final = 8
_ROW_BYTES: Final = 512
"""What a row takes beside its texts."""
VERIFICATIONS_MAX: Final = 2
"""At a time; each has a connection to the database for as long as it lasts. Others wait."""


class AuditService(audit_service_pb2_grpc.AuditServiceServicer):
    """What an auditor may ask."""

    def __init__(self, reader: Reader, store: Store) -> None:
        self._reader = reader
        self._store = store
        self._accounting = Accounting(reader, store)
        self._watching = Watching(reader, store)
        self._verifying = asyncio.Semaphore(VERIFICATIONS_MAX)

    def close(self) -> None:
        """Tell those who follow the ledger to go on at another server."""
        self._watching.close()

    async def GetBudget(self, request: GetBudgetRequest, context: Any) -> GetBudgetResponse:
        """Read any budget."""
        line, position = await self._reader.for_auditor(request.budget)
        response = GetBudgetResponse()
        write_budget(line.budget, line.path, line.state, response.budget)
        write_position(position, response.ledger)
        return response

    async def ListBudgets(self, request: ListBudgetsRequest, context: Any) -> ListBudgetsResponse:
        """List the roots, or a budget and everything below it."""
        response = ListBudgetsResponse()
        if request.HasField("below"):
            rows, response.next_page_token = await self._subtree(request)
        else:
            rows, response.next_page_token = await self._roots(request)
        for line in await self._reader.lines(rows):
            write_budget(line.budget, line.path, line.state, response.budgets.add())
        return response

    async def _roots(self, request: ListBudgetsRequest) -> tuple[Sequence[Budget], str]:
        scope = b"roots"
        asked = read_page(scope, request.page_size, request.page_token)
        after = None if asked.after is None else asked.after.decode()
        page = await self._store.list_roots(limit=asked.size, after=after)
        rows = fitting(page.rows, _budget_bytes)
        cut = len(rows) < len(page.rows)
        last = rows[-1].name if cut else page.next
        return rows, page_token(scope, None if last is None else last.encode())

    async def _subtree(self, request: ListBudgetsRequest) -> tuple[Sequence[Budget], str]:
        top, _ = await self._reader.for_auditor(request.below)
        root_id, budget_id = top.budget.root_id, top.budget.budget_id
        scope = b"subtree" + root_id + budget_id
        asked = read_page(scope, request.page_size, request.page_token)
        page = await self._store.list_subtree(
            root_id, budget_id, limit=asked.size, after=asked.after
        )
        rows = fitting(page.rows, _budget_bytes)
        if len(rows) == len(page.rows):
            return rows, page_token(scope, page.next)
        last = rows[-1].budget_id
        return rows, page_token(scope, b"" if last == budget_id else last)

    async def ListEntries(self, request: ListEntriesRequest, context: Any) -> ListEntriesResponse:
        """List the entries of a budget, or of the whole tree that it belongs to."""
        line, _ = await self._reader.for_auditor(request.budget)
        root_id, budget_id = line.budget.root_id, line.budget.budget_id
        tree = request.reach == audit_service_pb2.REACH_TREE
        scope = b"entries" + bytes((tree, request.descending)) + root_id
        if not tree:
            scope += budget_id
        asked = read_page(scope, request.page_size, request.page_token)
        after = None if asked.after is None else int.from_bytes(asked.after)
        if tree:
            page = await self._store.list_tree_entries(
                root_id, limit=asked.size, after=after, descending=request.descending
            )
        else:
            page = await self._store.list_entries(
                root_id, budget_id, limit=asked.size, after=after, descending=request.descending
            )
        rows = fitting(page.rows, entry_bytes)
        last = page.next
        if len(rows) < len(page.rows):
            rows, last = _cut(page.rows, len(rows), tree=tree)
        key = None if last is None else last.to_bytes(_KEY_BYTES)
        response = ListEntriesResponse(next_page_token=page_token(scope, key))
        lane = self._store.lane_of(root_id)
        for entry in rows:
            write_entry(entry, lane, response.entries.add())
        return response

    async def Verify(self, request: VerifyRequest, context: Any) -> AsyncIterator[VerifyResponse]:
        """Re-run every decision of a tree, or of all trees, and compare."""
        tree: bytes | None = None
        if request.HasField("tree"):
            line, _ = await self._reader.for_auditor(request.tree)
            tree = line.budget.root_id
        async with self._verifying, self._store.snapshot() as snapshot:
            verification = Verification(snapshot, self._store.incarnation, self._store.lanes)
            async for entries in verification.run(tree):
                yield VerifyResponse(entries=entries, trees=verification.trees)
        verdict = VerifyResponse(entries=verification.entries, trees=verification.trees)
        verdict.verdict.verified = not verification.findings
        for finding in verification.findings:
            write_finding(finding, verdict.verdict.findings.add())
        yield verdict

    async def GetStatement(
        self, request: GetStatementRequest, context: Any
    ) -> GetStatementResponse:
        """Sum up what moved in a period."""
        return await self._accounting.statement(request)

    async def GetUsage(self, request: GetUsageRequest, context: Any) -> GetUsageResponse:
        """Attribute what was spent in a period."""
        return await self._accounting.usage(request)

    async def GetLineage(self, request: Any, context: Any) -> Any:
        """Refuse: not there yet."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not there yet")

    async def ListCheckpoints(self, request: Any, context: Any) -> Any:
        """Refuse: not there yet."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not there yet")

    async def ProveEntry(self, request: Any, context: Any) -> Any:
        """Refuse: not there yet."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not there yet")

    def WatchEntries(
        self, request: WatchEntriesRequest, context: Any
    ) -> AsyncIterator[WatchEntriesResponse]:
        """Follow the entries as they are recorded."""
        return self._watching.watch(request)

    async def Export(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Refuse: not there yet."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not there yet")
        yield


def _cut(rows: Sequence[Entry], fit: int, *, tree: bool) -> tuple[Sequence[Entry], int]:
    """End a page that does not fit into a message, and say after which key the next one begins.

    In a tree's list the parts of an operation stay together, for its key is the operation's.
    """
    if not tree:
        return rows[:fit], rows[fit - 1].seq
    broken = rows[fit].position
    whole = [entry for entry in rows[:fit] if entry.position != broken]
    # One operation that is larger than a page comes whole all the same.
    whole = whole or [entry for entry in rows if entry.position == broken]
    return whole, whole[-1].position


def _budget_bytes(budget: Budget) -> int:
    return _ROW_BYTES + sum(len(key) + len(value) for key, value in budget.labels)
