"""What auditors may ask, blocking. Generated from `_aio_audit.py`; do not edit."""

from __future__ import annotations

from collections.abc import Iterator

from peculium import _codec as codec, _requests as requests
from peculium._limits import PAGE_SIZE_MAX
from peculium._sync_sender import Sender
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
