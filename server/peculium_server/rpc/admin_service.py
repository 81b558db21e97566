"""The operators' service."""

from __future__ import annotations

from typing import Any

from peculium.v1 import admin_service_pb2_grpc
from peculium.v1.admin_service_pb2 import (
    AdminServiceRecoverRequest,
    AdminServiceRecoverResponse,
    AdminServiceResolveRequest,
    AdminServiceResolveResponse,
    CreateAlertRuleRequest,
    CreateAlertRuleResponse,
    CreateKeyRequest,
    CreateKeyResponse,
    CreateWebhookRequest,
    CreateWebhookResponse,
    DeleteAlertRuleRequest,
    DeleteAlertRuleResponse,
    DeleteWebhookRequest,
    DeleteWebhookResponse,
    FreezeRequest,
    FreezeResponse,
    GrantRequest,
    GrantResponse,
    ListAlertRulesRequest,
    ListAlertRulesResponse,
    ListDeliveriesRequest,
    ListDeliveriesResponse,
    ListKeysRequest,
    ListKeysResponse,
    ListWebhooksRequest,
    ListWebhooksResponse,
    ReplayDeliveriesRequest,
    ReplayDeliveriesResponse,
    RevokeKeyRequest,
    RevokeKeyResponse,
    RotateKeyRequest,
    RotateKeyResponse,
    TestWebhookRequest,
    TestWebhookResponse,
    TopUpRequest,
    TopUpResponse,
    UnfreezeRequest,
    UnfreezeResponse,
    WithdrawRequest,
    WithdrawResponse,
)
from peculium_server.rpc.alerting import Alerts
from peculium_server.rpc.keys import Keyring
from peculium_server.rpc.operating import Operator


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """What an admin may do."""

    def __init__(self, operator: Operator, keyring: Keyring, alerts: Alerts) -> None:
        self._operator = operator
        self._keyring = keyring
        self._alerts = alerts

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

    async def CreateKey(self, request: CreateKeyRequest, context: Any) -> CreateKeyResponse:
        """Make an API key."""
        return await self._keyring.create(request)

    async def ListKeys(self, request: ListKeysRequest, context: Any) -> ListKeysResponse:
        """List the API keys."""
        return await self._keyring.listed(request)

    async def RotateKey(self, request: RotateKeyRequest, context: Any) -> RotateKeyResponse:
        """Give an API key a new text."""
        return await self._keyring.rotate(request)

    async def RevokeKey(self, request: RevokeKeyRequest, context: Any) -> RevokeKeyResponse:
        """End an API key."""
        return await self._keyring.revoke(request)

    async def CreateAlertRule(
        self, request: CreateAlertRuleRequest, context: Any
    ) -> CreateAlertRuleResponse:
        """Have something watched for in a subtree."""
        return await self._alerts.create_rule(request)

    async def ListAlertRules(
        self, request: ListAlertRulesRequest, context: Any
    ) -> ListAlertRulesResponse:
        """List what is watched for."""
        return await self._alerts.list_rules(request)

    async def DeleteAlertRule(
        self, request: DeleteAlertRuleRequest, context: Any
    ) -> DeleteAlertRuleResponse:
        """End a rule."""
        return await self._alerts.delete_rule(request)

    async def CreateWebhook(
        self, request: CreateWebhookRequest, context: Any
    ) -> CreateWebhookResponse:
        """Have alerts sent to an address."""
        return await self._alerts.create_webhook(request)

    async def ListWebhooks(
        self, request: ListWebhooksRequest, context: Any
    ) -> ListWebhooksResponse:
        """List where alerts are sent to."""
        return await self._alerts.list_webhooks()

    async def DeleteWebhook(
        self, request: DeleteWebhookRequest, context: Any
    ) -> DeleteWebhookResponse:
        """End a webhook."""
        return await self._alerts.delete_webhook(request)

    async def TestWebhook(self, request: TestWebhookRequest, context: Any) -> TestWebhookResponse:
        """Send a test to a webhook at once."""
        return await self._alerts.test_webhook(request)

    async def ListDeliveries(
        self, request: ListDeliveriesRequest, context: Any
    ) -> ListDeliveriesResponse:
        """List what became of alerts at webhooks."""
        return await self._alerts.list_deliveries(request)

    async def ReplayDeliveries(
        self, request: ReplayDeliveriesRequest, context: Any
    ) -> ReplayDeliveriesResponse:
        """Have deliveries tried again."""
        return await self._alerts.replay(request)
