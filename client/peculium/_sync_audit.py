"""What auditors may ask, blocking. Generated from `_aio_audit.py`; do not edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from peculium import (
    _audit_codec as told,
    _audit_requests as asking,
    _codec as codec,
    _requests as requests,
)
from peculium._limits import PAGE_SIZE_MAX
from peculium._sync_sender import Sender
from peculium.audit import EntryFilter, Reach, Statement, UsageReport, Watched
from peculium.capability import BudgetRef
from peculium.v1 import audit_service_pb2
from peculium.values import BudgetInfo, EntryInfo, Verification


class Audit:
    """What auditors may ask: everything is read, nothing is changed."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def budget(self, budget: str | BudgetRef, *, timeout: float | None = None) -> BudgetInfo:
        """Read any budget.

        Args:
            budget: Its path, or its reference.
            timeout: In seconds.

        Raises:
            BudgetUnknown: There is none.
            PermissionDenied: The caller is no auditor.
        """
        request = audit_service_pb2.GetBudgetRequest(budget=requests.budget_ref(budget))
        response = self._sender.unary(
            self._sender.audit.GetBudget, request, timeout, budget=str(budget)
        )
        return codec.budget_info(response.budget, response.ledger)

    def budgets(
        self,
        below: str | BudgetRef | None = None,
        *,
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> Iterator[BudgetInfo]:
        """List a budget and everything below it, or all roots.

        Args:
            below: The top; absent: all roots.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.

        Raises:
            BudgetUnknown: There is no such top.
        """
        request = audit_service_pb2.ListBudgetsRequest(
            below=None if below is None else requests.budget_ref(below), page_size=page_size
        )
        while True:
            page = self._sender.unary(self._sender.audit.ListBudgets, request, timeout)
            for budget in page.budgets:
                yield codec.budget_info(budget)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def entries(
        self,
        budget: str | BudgetRef,
        *,
        tree: bool = False,
        descending: bool = False,
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> Iterator[EntryInfo]:
        """List the entries of a budget, or of its whole tree.

        Args:
            budget: Its path, or its reference.
            tree: All budgets of the tree that it belongs to.
            descending: The latest first.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.

        Raises:
            BudgetUnknown: There is none.
        """
        request = audit_service_pb2.ListEntriesRequest(
            budget=requests.budget_ref(budget),
            reach=audit_service_pb2.REACH_TREE if tree else audit_service_pb2.REACH_BUDGET,
            page_size=page_size,
            descending=descending,
        )
        while True:
            page = self._sender.unary(self._sender.audit.ListEntries, request, timeout)
            for entry in page.entries:
                yield codec.entry_info(entry)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def verify(
        self, tree: str | BudgetRef | None = None, *, timeout: float | None = None
    ) -> Iterator[Verification]:
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
        for progress in self._sender.stream(self._sender.audit.Verify, request, timeout):
            yield codec.verification(progress)

    def statement(
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
        response = self._sender.unary(
            self._sender.audit.GetStatement, request, timeout, budget=str(budget), patient=True
        )
        return told.statement(response)

    def usage(
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
        response = self._sender.unary(
            self._sender.audit.GetUsage, request, timeout, budget=str(budget), patient=True
        )
        return told.usage(response)

    def watch(
        self,
        budget: str | BudgetRef | None = None,
        *,
        reach: Reach = Reach.SUBTREE,
        selected: EntryFilter | None = None,
        cursor: bytes | None = None,
        from_beginning: bool = False,
        timeout: float | None = None,
    ) -> Iterator[Watched]:
        """Follow what is recorded, for ever, each entry once; go on by itself when a server is lost.

        What comes first is a heartbeat, without entries: from its cursor on nothing is missed.

        Args:
            budget: Whose entries; absent: those of the whole ledger.
            reach: With all below it unless said otherwise.
            selected: Only those that are selected, but not by time; absent: all.
            cursor: Go on behind what came with it; absent: from now on.
            from_beginning: Without a cursor: everything that was recorded.
            timeout: How many seconds the ledger may be away at a time; absent: it is waited for.

        Raises:
            BudgetUnknown: There is none.
            Malformed: A filter cannot be, or a cursor is another ledger's, or from its future.
            LedgerUnavailable: It was away for longer than `timeout`.
        """
        request = asking.watch(budget, reach, selected, cursor, from_beginning=from_beginning)
        for message in self._sender.follow(self._sender.audit.WatchEntries, request, timeout):
            yield told.watched(message)
