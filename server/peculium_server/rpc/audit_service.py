"""The auditors' service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from peculium.v1 import audit_service_pb2_grpc
from peculium.v1.audit_service_pb2 import (
    ExportRequest,
    ExportResponse,
    GetBudgetRequest,
    GetBudgetResponse,
    GetLineageRequest,
    GetLineageResponse,
    GetStatementRequest,
    GetStatementResponse,
    GetUsageRequest,
    GetUsageResponse,
    ListAlertsRequest,
    ListAlertsResponse,
    ListBudgetsRequest,
    ListBudgetsResponse,
    ListCheckpointsRequest,
    ListCheckpointsResponse,
    ListEntriesRequest,
    ListEntriesResponse,
    ListRefusalsRequest,
    ListRefusalsResponse,
    ListSecurityEventsRequest,
    ListSecurityEventsResponse,
    ProveEntryRequest,
    ProveEntryResponse,
    VerifyRequest,
    VerifyResponse,
    WatchEntriesRequest,
    WatchEntriesResponse,
)
from peculium_server.rpc.accounting import Accounting
from peculium_server.rpc.alerting import Alerts
from peculium_server.rpc.exporting import Exporting
from peculium_server.rpc.listing import Listing
from peculium_server.rpc.past import Past
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.refusing import Refusing
from peculium_server.rpc.responses import write_finding
from peculium_server.rpc.sealing import Sealing
from peculium_server.rpc.security import SecurityReading
from peculium_server.rpc.verifying import Verification
from peculium_server.rpc.watching import Watching
from peculium_server.store.store import Store

VERIFICATIONS_MAX: Final = 2
"""At a time; each has a connection to the database for as long as it lasts. Others wait."""


class AuditService(audit_service_pb2_grpc.AuditServiceServicer):
    """What an auditor may ask."""

    def __init__(self, reader: Reader, store: Store, alerts: Alerts) -> None:
        self._reader = reader
        self._store = store
        self._alerts = alerts
        self._accounting = Accounting(reader, store)
        self._exporting = Exporting(reader, store)
        self._sealing = Sealing(reader, store)
        self._watching = Watching(reader, store)
        self._listing = Listing(reader, store)
        self._past = Past(reader, store)
        self._refusing = Refusing(reader, store)
        self._security = SecurityReading(reader, store)
        self._verifying = asyncio.Semaphore(VERIFICATIONS_MAX)

    def close(self) -> None:
        """Tell those who follow the ledger to go on at another server."""
        self._watching.close()

    async def GetBudget(self, request: GetBudgetRequest, context: Any) -> GetBudgetResponse:
        """Read any budget."""
        return await self._past.budget(request)

    async def ListBudgets(self, request: ListBudgetsRequest, context: Any) -> ListBudgetsResponse:
        """List the roots, or a budget and everything below it."""
        return await self._listing.budgets(request)

    async def ListEntries(self, request: ListEntriesRequest, context: Any) -> ListEntriesResponse:
        """List the entries of a budget, a subtree or a tree."""
        return await self._listing.entries(request)

    async def GetLineage(self, request: GetLineageRequest, context: Any) -> GetLineageResponse:
        """Tell where a budget comes from."""
        return await self._past.lineage(request)

    async def Verify(self, request: VerifyRequest, context: Any) -> AsyncIterator[VerifyResponse]:
        """Re-run every decision of a tree, or of all trees, and compare."""
        read = await self._reader.for_auditor_or_all(
            request.tree if request.HasField("tree") else None
        )
        tree = None if read is None else read[0].budget.root_id
        async with self._verifying, self._store.snapshot() as snapshot:
            verification = Verification(snapshot, self._store.lanes)
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

    async def ListCheckpoints(
        self, request: ListCheckpointsRequest, context: Any
    ) -> ListCheckpointsResponse:
        """List the sealed checkpoints."""
        return await self._sealing.checkpoints(request)

    async def ProveEntry(self, request: ProveEntryRequest, context: Any) -> ProveEntryResponse:
        """Prove that an entry is under a sealed checkpoint."""
        return await self._sealing.proof(request)

    async def ListRefusals(
        self, request: ListRefusalsRequest, context: Any
    ) -> ListRefusalsResponse:
        """List how often budgets were refused what, by minute."""
        return await self._refusing.refusals(request)

    async def ListSecurityEvents(
        self, request: ListSecurityEventsRequest, context: Any
    ) -> ListSecurityEventsResponse:
        """List secrets that were shown by another principal than whose they were."""
        return await self._security.events(request)

    def WatchEntries(
        self, request: WatchEntriesRequest, context: Any
    ) -> AsyncIterator[WatchEntriesResponse]:
        """Follow the entries as they are recorded."""
        return self._watching.watch(request)

    async def Export(self, request: ExportRequest, context: Any) -> AsyncIterator[ExportResponse]:
        """Stream a tree or the whole ledger as it is at one instant."""
        async with aclosing(self._exporting.export(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def ListAlerts(self, request: ListAlertsRequest, context: Any) -> ListAlertsResponse:
        """List what alert rules have found."""
        return await self._alerts.list_alerts(request)
