"""The agents' service."""

from __future__ import annotations

from typing import Any

from peculium.v1 import ledger_service_pb2_grpc
from peculium.v1.ledger_service_pb2 import (
    AcceptRequest,
    AcceptResponse,
    BatchRequest,
    BatchResponse,
    DelegateRequest,
    DelegateResponse,
    ExtendRequest,
    ExtendResponse,
    FundRequest,
    FundResponse,
    LedgerServiceGetBudgetRequest,
    LedgerServiceGetBudgetResponse,
    ListHoldsRequest,
    ListHoldsResponse,
    RecoverRequest,
    RecoverResponse,
    ReleaseRequest,
    ReleaseResponse,
    RenewRequest,
    RenewResponse,
    ReserveRequest,
    ReserveResponse,
    ResolveRequest,
    ResolveResponse,
    ReturnRequest,
    ReturnResponse,
    RevokeRequest,
    RevokeResponse,
    SettleRequest,
    SettleResponse,
    SpendRequest,
    SpendResponse,
)
from peculium_server.core.limits import OPERATIONS_MAX
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.rpc.calls import CallRefused
from peculium_server.rpc.operating import Operator
from peculium_server.rpc.pages import page_token, read_page
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.responses import (
    write_answer,
    write_budget,
    write_hold,
    write_position,
    write_use,
)
from peculium_server.store.store import Store


class LedgerService(ledger_service_pb2_grpc.LedgerServiceServicer):
    """What the holder of a capability may do."""

    def __init__(self, operator: Operator, reader: Reader, store: Store) -> None:
        self._operator = operator
        self._reader = reader
        self._store = store

    async def Reserve(self, request: ReserveRequest, context: Any) -> ReserveResponse:
        """Set money aside for one call."""
        return await self._operator.one(request, ReserveResponse())

    async def Settle(self, request: SettleRequest, context: Any) -> SettleResponse:
        """Book what a call has cost."""
        return await self._operator.one(request, SettleResponse())

    async def Release(self, request: ReleaseRequest, context: Any) -> ReleaseResponse:
        """End a hold whose call was not billed."""
        return await self._operator.one(request, ReleaseResponse())

    async def Extend(self, request: ExtendRequest, context: Any) -> ExtendResponse:
        """Give a hold more time."""
        return await self._operator.one(request, ExtendResponse())

    async def Spend(self, request: SpendRequest, context: Any) -> SpendResponse:
        """Book a cost that was known before."""
        return await self._operator.one(request, SpendResponse())

    async def Delegate(self, request: DelegateRequest, context: Any) -> DelegateResponse:
        """Make child budgets."""
        return await self._operator.one(request, DelegateResponse())

    async def Accept(self, request: AcceptRequest, context: Any) -> AcceptResponse:
        """Rotate a token that was handed over."""
        return await self._operator.one(request, AcceptResponse())

    async def Recover(self, request: RecoverRequest, context: Any) -> RecoverResponse:
        """Give a budget a new token on its holder's word."""
        return await self._operator.one(request, RecoverResponse())

    async def Fund(self, request: FundRequest, context: Any) -> FundResponse:
        """Move money to a descendant."""
        return await self._operator.one(request, FundResponse())

    async def Renew(self, request: RenewRequest, context: Any) -> RenewResponse:
        """Prolong a lease."""
        return await self._operator.one(request, RenewResponse())

    async def Return(self, request: ReturnRequest, context: Any) -> ReturnResponse:
        """Give money back to the parent."""
        return await self._operator.one(request, ReturnResponse())

    async def Revoke(self, request: RevokeRequest, context: Any) -> RevokeResponse:
        """Close a descendant."""
        return await self._operator.one(request, RevokeResponse())

    async def Resolve(self, request: ResolveRequest, context: Any) -> ResolveResponse:
        """Say what a hold has cost without its secret."""
        return await self._operator.one(request, ResolveResponse())

    async def Batch(self, request: BatchRequest, context: Any) -> BatchResponse:
        """Decide many operations, each with its own result; or, if atomic, all or none."""
        _check_batch(request)
        response = BatchResponse()
        if request.atomic:
            answers = await self._operator.all_or_none(request.operations, request.operation_id)
        else:
            answers = await self._operator.many(request.operations)
        for answer in answers:
            write_answer(answer, response.results.add())
        return response

    async def GetBudget(
        self, request: LedgerServiceGetBudgetRequest, context: Any
    ) -> LedgerServiceGetBudgetResponse:
        """Read a budget that the caller has authority over."""
        line, position = await self._reader.for_authority(request.budget, request.authority)
        response = LedgerServiceGetBudgetResponse()
        write_budget(line.budget, line.path, line.state, response.budget)
        write_position(position, response.ledger)
        write_use(await self._reader.last_use(line.budget), line.at, response)
        return response

    async def ListHolds(self, request: ListHoldsRequest, context: Any) -> ListHoldsResponse:
        """List the holds of a budget that the caller has authority over."""
        line, position = await self._reader.for_authority(request.budget, request.authority)
        root_id, budget_id = line.budget.root_id, line.budget.budget_id
        scope = b"holds" + root_id + budget_id
        asked = read_page(scope, request.page_size, request.page_token)
        page = await self._store.list_holds(root_id, budget_id, limit=asked.size, after=asked.after)
        response = ListHoldsResponse(next_page_token=page_token(scope, page.next))
        for hold in page.rows:
            write_hold(hold, response.holds.add())
        write_position(position, response.ledger)
        return response


def _check_batch(request: BatchRequest) -> None:
    size = len(request.operations)
    if size > OPERATIONS_MAX:
        facts = {"field": "operations", "limit": str(OPERATIONS_MAX), "size": str(size)}
        raise CallRefused(Refused(Refusal.TOO_LARGE, facts))
    if not size:
        raise CallRefused.malformed("operations", "must be at least 1")
    if not request.atomic and request.operation_id:
        raise CallRefused.malformed("operation_id", "only with atomic")
