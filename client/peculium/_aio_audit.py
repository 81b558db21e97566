"""What auditors may ask, for asyncio. `_sync_audit` is generated from this module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Protocol, TypeVar

from peculium import (
    _audit_codec as told,
    _audit_requests as asking,
    _codec as codec,
    _requests as requests,
)
from peculium._aio_sender import Sender
from peculium._export_codec import pieces
from peculium._limits import PAGE_SIZE_MAX
from peculium.audit import (
    BudgetFilter,
    Delegation,
    EntryFilter,
    Reach,
    RefusalCount,
    SecurityEvent,
    Statement,
    TokenStep,
    UsageReport,
    Watched,
)
from peculium.capability import BudgetRef
from peculium.exports import ExportPiece
from peculium.proofs import Checkpoint, Proof
from peculium.v1 import audit_service_pb2
from peculium.values import BudgetInfo, EntryInfo, Verification

if TYPE_CHECKING:
    from grpc.aio import UnaryUnaryMultiCallable


class _Paging(Protocol):
    """A request for a page of a list."""

    page_token: str


class _Page(Protocol):
    """A page of a list."""

    next_page_token: str


_Request = TypeVar("_Request", bound=_Paging)
_Response = TypeVar("_Response", bound=_Page)


class Audit:
    """What auditors may ask: everything is read, nothing is changed."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    async def budget(
        self,
        budget: str | BudgetRef,
        *,
        as_of: datetime | None = None,
        sum_subtree: bool = False,
        timeout: float | None = None,
    ) -> BudgetInfo:
        """Read any budget, as it is or as it was.

        Args:
            budget: Its path, or its reference.
            as_of: As it was then, by the ledger's clock, what was decided at this very time included.
            sum_subtree: Sum up what its subtree has used, too: takes time with the number of budgets.
            timeout: In seconds.

        Raises:
            BudgetUnknown: There is none, or there was none yet.
            PermissionDenied: The caller is no auditor.
            Malformed: The time is in the future, or says no time zone.
        """
        request = asking.budget(budget, as_of, sum_subtree=sum_subtree)
        response = await self._sender.unary(
            self._sender.audit.GetBudget, request, timeout, budget=str(budget)
        )
        return told.budget(response)

    async def budgets(
        self,
        below: str | BudgetRef | None = None,
        *,
        selected: BudgetFilter | None = None,
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> AsyncIterator[BudgetInfo]:
        """List a budget and everything below it, or all roots.

        The top comes first, the others by id, which is about in the order of making; roots by name.

        Args:
            below: The top; absent: all roots.
            selected: Which of them; absent: all.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.

        Raises:
            BudgetUnknown: There is no such top.
        """
        request = asking.budgets(below, selected, page_size)
        async for page in self._pages(self._sender.audit.ListBudgets, request, timeout):
            for budget in page.budgets:
                yield codec.budget_info(budget)

    async def entries(
        self,
        budget: str | BudgetRef,
        *,
        reach: Reach = Reach.BUDGET,
        selected: EntryFilter | None = None,
        descending: bool = False,
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> AsyncIterator[EntryInfo]:
        """List the entries of a budget, of a subtree or of a tree.

        Args:
            budget: Its path, or its reference.
            reach: How far around it.
            selected: Which of them; absent: all.
            descending: The latest first.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.

        Raises:
            BudgetUnknown: There is none.
        """
        request = asking.entries(budget, reach, selected, page_size, descending=descending)
        async for page in self._pages(self._sender.audit.ListEntries, request, timeout):
            for entry in page.entries:
                yield codec.entry_info(entry)

    async def lineage(
        self, budget: str | BudgetRef, *, timeout: float | None = None
    ) -> tuple[Delegation, ...]:
        """Tell by whose authority a budget exists: each level from the root down to it, and who made it.

        Args:
            budget: Its path, or its reference.
            timeout: In seconds.

        Raises:
            BudgetUnknown: There is none.
        """
        response = await self._sender.unary(
            self._sender.audit.GetLineage, asking.lineage(budget, 1), timeout, budget=str(budget)
        )
        return tuple(told.delegation(each) for each in response.delegations)

    async def token_steps(
        self,
        budget: str | BudgetRef,
        *,
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> AsyncIterator[TokenStep]:
        """Tell how a budget's token went from hand to hand, from the one that it was made with.

        Args:
            budget: Its path, or its reference.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.

        Raises:
            BudgetUnknown: There is none.
        """
        request = asking.lineage(budget, page_size)
        async for page in self._pages(self._sender.audit.GetLineage, request, timeout):
            for step in page.steps:
                yield told.token_step(step)

    async def verify(
        self, tree: str | BudgetRef | None = None, *, timeout: float | None = None
    ) -> AsyncIterator[Verification]:
        """Re-run every decision from the entries alone, and compare. The last item has the verdict.

        Args:
            tree: A root, or any budget in its tree; absent: the whole ledger.
            timeout: For all of it, in seconds; absent: as long as it takes.

        Raises:
            BudgetUnknown: There is none.
        """
        request = audit_service_pb2.VerifyRequest(
            tree=None if tree is None else requests.budget_ref(tree)
        )
        async for progress in self._sender.stream(self._sender.audit.Verify, request, timeout):
            yield codec.verification(progress)

    async def statement(
        self,
        budget: str | BudgetRef,
        *,
        reach: Reach = Reach.SUBTREE,
        since: datetime | None = None,
        until: datetime | None = None,
        timeout: float | None = None,
    ) -> Statement:
        """Sum up what moved in a period: opening, movements by kind of operation, closing.

        Args:
            budget: Its path, or its reference.
            reach: With all below it, as one account, unless said otherwise.
            since: From this time on; absent: from the beginning.
            until: Before this time; absent: until now.
            timeout: In seconds. A large tree takes its time.

        Raises:
            BudgetUnknown: There is none.
            Malformed: A time has no time zone, or the period ends before it begins.
            AmountOverflow: A sum is beyond what can be told: ask for less.
        """
        request = asking.statement(budget, reach, since, until)
        response = await self._sender.unary(
            self._sender.audit.GetStatement, request, timeout, budget=str(budget), patient=True
        )
        return told.statement(response)

    async def usage(
        self,
        budget: str | BudgetRef,
        by: Sequence[str] = (),
        *,
        reach: Reach = Reach.SUBTREE,
        since: datetime | None = None,
        until: datetime | None = None,
        timeout: float | None = None,
    ) -> UsageReport:
        """Attribute what was spent in a period.

        Args:
            budget: Its path, or its reference.
            by: What to group by, in this order: "day", "model", "principal", "budget", "provider",
                "label:NAME". A label is the operation's, or else the budget's or its nearest ancestor's.
            reach: With all below it unless said otherwise.
            since: From this time on; absent: from the beginning.
            until: Before this time; absent: until now.
            timeout: In seconds. A large tree takes its time.

        Raises:
            BudgetUnknown: There is none.
            Malformed: It cannot be grouped so, a time has no time zone, or the period is reversed.
            TooLarge: There would be more than 10,000 groups.
        """
        request = asking.usage(budget, by, reach, since, until)
        response = await self._sender.unary(
            self._sender.audit.GetUsage, request, timeout, budget=str(budget), patient=True
        )
        return told.usage(response)

    async def watch(
        self,
        budget: str | BudgetRef | None = None,
        *,
        reach: Reach = Reach.SUBTREE,
        selected: EntryFilter | None = None,
        cursor: bytes | None = None,
        from_beginning: bool = False,
        alerts: bool = False,
        timeout: float | None = None,
    ) -> AsyncIterator[Watched]:
        """Follow what is recorded, for ever, each entry once; go on by itself when a server is lost.

        What comes first is a heartbeat, without entries: from its cursor on nothing is missed.

        Args:
            budget: Whose entries; absent: those of the whole ledger.
            reach: With all below it unless said otherwise.
            selected: Only those that are selected, but not by time; absent: all.
            cursor: Go on behind what came with it; absent: from now on.
            from_beginning: Without a cursor: everything that was recorded.
            alerts: Alerts too, of rules on what is followed, whatever is selected.
            timeout: How many seconds the ledger may be away at a time; absent: it is waited for.

        Raises:
            BudgetUnknown: There is none.
            Malformed: A filter cannot be, or a cursor is another ledger's, or from its future.
            LedgerUnavailable: It was away for longer than `timeout`.
        """
        request = asking.watch(
            budget, reach, selected, cursor, from_beginning=from_beginning, alerts=alerts
        )
        async for message in self._sender.follow(self._sender.audit.WatchEntries, request, timeout):
            yield told.watched(message)

    async def export(
        self,
        tree: str | BudgetRef | None = None,
        *,
        after: Sequence[int] = (),
        after_checkpoint: int = 0,
        timeout: float | None = None,
    ) -> AsyncIterator[ExportPiece]:
        """Take everything away that an offline verification needs, as it is at one instant.

        What ends without an `ExportTrailer` is cut; it can be gone on with.

        Args:
            tree: A root, or any budget in its tree; absent: the whole ledger.
            after: To go on: of each lane, the last position that is there whole.
            after_checkpoint: To go on: the number of the last checkpoint that is there.
            timeout: For all of it, in seconds; absent: as long as it takes.

        Raises:
            BudgetUnknown: There is none.
        """
        request = audit_service_pb2.ExportRequest(
            tree=None if tree is None else requests.budget_ref(tree),
            after=after,
            after_checkpoint=after_checkpoint,
        )
        async for message in self._sender.stream(self._sender.audit.Export, request, timeout):
            for piece in pieces(message):
                yield piece

    async def refusals(
        self,
        budget: str | BudgetRef | None = None,
        *,
        reach: Reach = Reach.SUBTREE,
        reasons: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        descending: bool = False,
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> AsyncIterator[RefusalCount]:
        """List how often budgets were refused what, by minute.

        Servers add up what they have counted every few seconds, and forget it after some days.

        Args:
            budget: Its path, or its reference; absent: any of the ledger.
            reach: With all below it unless said otherwise.
            reasons: For any of these, for example "BUDGET_EXHAUSTED"; absent: for whatever reason.
            since: In this minute or later.
            until: In minutes that began before this time.
            descending: The latest first.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.

        Raises:
            BudgetUnknown: There is none.
            Malformed: A reason is none, or a time has no time zone.
        """
        request = asking.refusals(
            budget, reach, reasons, since, until, page_size, descending=descending
        )
        async for page in self._pages(self._sender.audit.ListRefusals, request, timeout):
            for counted in page.refusals:
                yield told.refusal_count(counted)

    async def security_events(
        self,
        budget: str | BudgetRef | None = None,
        *,
        reach: Reach = Reach.SUBTREE,
        kinds: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        descending: bool = False,
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> AsyncIterator[SecurityEvent]:
        """List secrets that were shown by another principal than whose they were, in order of time.

        Args:
            budget: Its path, or its reference; absent: any of the ledger.
            reach: With all below it unless said otherwise.
            kinds: Of any of these, for example "CONSUMED_TOKEN"; absent: of any.
            since: Noticed at this time or later.
            until: Noticed before this time.
            descending: The latest first.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.

        Raises:
            BudgetUnknown: There is none.
            Malformed: A kind is none, or a time has no time zone.
        """
        request = asking.security_events(
            budget, reach, kinds, since, until, page_size, descending=descending
        )
        async for page in self._pages(self._sender.audit.ListSecurityEvents, request, timeout):
            for event in page.events:
                yield told.security_event(event)

    async def checkpoints(
        self,
        *,
        descending: bool = False,
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> AsyncIterator[Checkpoint]:
        """List the sealed checkpoints by number.

        Args:
            descending: The latest first.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.
        """
        request = audit_service_pb2.ListCheckpointsRequest(
            page_size=page_size, descending=descending
        )
        async for page in self._pages(self._sender.audit.ListCheckpoints, request, timeout):
            for checkpoint in page.checkpoints:
                yield told.checkpoint(checkpoint)

    async def prove(
        self, budget: str | BudgetRef, seq: int, *, timeout: float | None = None
    ) -> Proof:
        """Get the proof that an entry is under a sealed checkpoint: ask its `flaw`, and check the signature.

        Args:
            budget: Its path, or its reference.
            seq: The entry: 1, 2, 3, … within the budget.
            timeout: In seconds.

        Raises:
            BudgetUnknown: There is none.
            NotSealed: No checkpoint seals the entry yet.
        """
        request = audit_service_pb2.ProveEntryRequest(budget=requests.budget_ref(budget), seq=seq)
        response = await self._sender.unary(
            self._sender.audit.ProveEntry, request, timeout, budget=str(budget)
        )
        return told.proof(response)

    async def _pages(
        self,
        method: UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None,
    ) -> AsyncIterator[_Response]:
        """Take the pages of a list, each when it is wanted."""
        while True:
            page = await self._sender.unary(method, request, timeout)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token
