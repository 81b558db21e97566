"""The operators' service."""

from __future__ import annotations

from typing import Any

from peculium.v1 import admin_service_pb2_grpc
from peculium.v1.admin_service_pb2 import (
    AdminServiceRecoverRequest,
    AdminServiceRecoverResponse,
    AdminServiceResolveRequest,
    AdminServiceResolveResponse,
    FreezeRequest,
    FreezeResponse,
    GrantRequest,
    GrantResponse,
    TopUpRequest,
    TopUpResponse,
    UnfreezeRequest,
    UnfreezeResponse,
    WithdrawRequest,
    WithdrawResponse,
)
from peculium_server.rpc.operating import Operator


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """What an admin may do."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    async def Grant(self, request: GrantRequest, context: Any) -> GrantResponse:
        """Make a root."""
        return await self._operator.one(request, GrantResponse())

    async def TopUp(self, request: TopUpRequest, context: Any) -> TopUpResponse:
        """Put more into a root."""
        return await self._operator.one(request, TopUpResponse())

    async def Withdraw(self, request: WithdrawRequest, context: Any) -> WithdrawResponse:
        """Take out of a root what is available."""
        return await self._operator.one(request, WithdrawResponse())

    async def Freeze(self, request: FreezeRequest, context: Any) -> FreezeResponse:
        """Block new spending in a subtree."""
        return await self._operator.one(request, FreezeResponse())

    async def Unfreeze(self, request: UnfreezeRequest, context: Any) -> UnfreezeResponse:
        """Clear the flag that Freeze set."""
        return await self._operator.one(request, UnfreezeResponse())

    async def Recover(
        self, request: AdminServiceRecoverRequest, context: Any
    ) -> AdminServiceRecoverResponse:
        """Give any budget a new token, holder or custody."""
        return await self._operator.one(request, AdminServiceRecoverResponse())

    async def Resolve(
        self, request: AdminServiceResolveRequest, context: Any
    ) -> AdminServiceResolveResponse:
        """Say what any hold has cost."""
        return await self._operator.one(request, AdminServiceResolveResponse())
