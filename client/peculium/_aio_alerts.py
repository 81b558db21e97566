"""Alerts and webhooks, for asyncio. `_sync_alerts` is generated from this module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from peculium import _alerts_codec as codec
from peculium._aio_sender import Sender
from peculium._ids import id_text
from peculium._limits import PAGE_SIZE_MAX
from peculium._requests import budget_ref
from peculium.alerts import (
    Alert,
    AlertKind,
    AlertRule,
    Delivery,
    DeliveryState,
    TestSent,
    Webhook,
)
from peculium.capability import BudgetRef
from peculium.v1 import admin_service_pb2, audit_service_pb2


class Alerts:
    """What is watched for, and what was found. Rules are an admin's to make."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    async def create(
        self,
        budget: str | BudgetRef,
        kind: AlertKind = AlertKind.USED,
        *,
        percent: float | None = None,
        amount: int | None = None,
        rule_id: bytes | None = None,
        timeout: float | None = None,
    ) -> AlertRule:
        """Have something watched for in the subtree of a budget.

        A rule of kind USED fires once when the subtree is found to have used as much as its threshold,
        or more, and is armed again when it is found below. If it has by now, it fires at once.

        Args:
            budget: The top of the subtree: its path, or its reference.
            kind: What to watch for.
            percent: Of USED, this or `amount`: above 0, up to 1000, of what the top was granted.
            amount: Of USED, this or `percent`: in the tree's unit.
            rule_id: A UUIDv7 of one's own: asking again with it makes no second rule.
            timeout: In seconds.

        Raises:
            BudgetUnknown: There is no such budget.
            IdTaken: A rule with other content has the id.
            TooMany: The tree, or the ledger, has as many as it may have.
            PermissionDenied: The caller is no admin.
        """
        request = codec.create_rule(budget, kind, percent, amount, rule_id)
        response = await self._sender.unary(
            self._sender.admin.CreateAlertRule,
            request,
            timeout,
            budget=str(budget),
            operation_id=id_text(request.rule_id),
        )
        return codec.rule(response.rule)

    async def rules(
        self,
        budget: str | BudgetRef | None = None,
        *,
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> AsyncIterator[AlertRule]:
        """List what is watched for.

        Args:
            budget: Only rules on it or below it; absent: all.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.

        Raises:
            BudgetUnknown: There is no such budget.
        """
        request = admin_service_pb2.ListAlertRulesRequest(
            budget=None if budget is None else budget_ref(budget), page_size=page_size
        )
        while True:
            page = await self._sender.unary(self._sender.admin.ListAlertRules, request, timeout)
            for rule in page.rules:
                yield codec.rule(rule)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def delete(self, rule_id: bytes, *, timeout: float | None = None) -> AlertRule:
        """End a rule; to end one twice is to end it once.

        Args:
            rule_id: Which one.
            timeout: In seconds.

        Raises:
            AlertUnknown: There is none.
        """
        request = admin_service_pb2.DeleteAlertRuleRequest(rule_id=rule_id)
        response = await self._sender.unary(self._sender.admin.DeleteAlertRule, request, timeout)
        return codec.rule(response.rule)

    async def found(
        self,
        budget: str | BudgetRef | None = None,
        *,
        descending: bool = False,
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> AsyncIterator[Alert]:
        """List what was found, by number. Auditors may ask, too.

        Args:
            budget: Only of rules on it or below it; absent: all.
            descending: The latest first.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.

        Raises:
            BudgetUnknown: There is no such budget.
        """
        request = audit_service_pb2.ListAlertsRequest(
            budget=None if budget is None else budget_ref(budget),
            page_size=page_size,
            descending=descending,
        )
        while True:
            page = await self._sender.unary(self._sender.audit.ListAlerts, request, timeout)
            for alert in page.alerts:
                yield codec.alert(alert)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


class Webhooks:
    """Whom alerts are sent to. All of it is an admin's."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    async def create(
        self,
        url: str,
        *,
        budget: str | BudgetRef | None = None,
        webhook_id: bytes | None = None,
        timeout: float | None = None,
    ) -> Webhook:
        """Have alerts sent to an address, from now on. What is returned has the `secret`.

        Args:
            url: https; admins see it, so it is no place for a secret.
            budget: Only alerts of rules on it or below it; absent: all alerts of the ledger.
            webhook_id: A UUIDv7 of one's own: asking again with it makes no second webhook, and tells the
                secret once more.
            timeout: In seconds.

        Raises:
            Malformed: The address is none, or one that must not be reached.
            BudgetUnknown: There is no such budget.
            IdTaken: A webhook with other content has the id.
            TooMany: The ledger has as many as it may have.
            WebhooksOff: The server has no key to make secrets of.
            PermissionDenied: The caller is no admin.
        """
        request = codec.create_webhook(url, budget, webhook_id)
        response = await self._sender.unary(
            self._sender.admin.CreateWebhook,
            request,
            timeout,
            operation_id=id_text(request.webhook_id),
        )
        return codec.webhook(response.webhook, response.secret)

    async def list(self, *, timeout: float | None = None) -> Sequence[Webhook]:
        """List whom alerts are sent to.

        Args:
            timeout: In seconds.
        """
        request = admin_service_pb2.ListWebhooksRequest()
        response = await self._sender.unary(self._sender.admin.ListWebhooks, request, timeout)
        return tuple(map(codec.webhook, response.webhooks))

    async def delete(self, webhook_id: bytes, *, timeout: float | None = None) -> Webhook:
        """End a webhook, and with it what is pending for it; to end one twice is to end it once.

        Args:
            webhook_id: Which one.
            timeout: In seconds.

        Raises:
            WebhookUnknown: There is none.
        """
        request = admin_service_pb2.DeleteWebhookRequest(webhook_id=webhook_id)
        response = await self._sender.unary(self._sender.admin.DeleteWebhook, request, timeout)
        return codec.webhook(response.webhook)

    async def test(self, webhook_id: bytes, *, timeout: float | None = None) -> TestSent:
        """Send a message of the type `webhook.test` at once, and tell what the receiver answers.

        Args:
            webhook_id: To which one.
            timeout: In seconds; the server itself waits ten.

        Raises:
            WebhookUnknown: There is none, or it was deleted.
            WebhooksOff: The server has no key to sign with.
        """
        request = admin_service_pb2.TestWebhookRequest(webhook_id=webhook_id)
        response = await self._sender.unary(
            self._sender.admin.TestWebhook, request, timeout, patient=True
        )
        return codec.test_sent(response)

    async def deliveries(
        self,
        webhook_id: bytes | None = None,
        *,
        states: Sequence[DeliveryState] = (),
        page_size: int = PAGE_SIZE_MAX,
        timeout: float | None = None,
    ) -> AsyncIterator[Delivery]:
        """List what became of alerts, the latest first.

        Args:
            webhook_id: At which webhook, deleted or not; absent: at all.
            states: In any of these; none: in any.
            page_size: How many are fetched at once, 1 to 1000.
            timeout: For each page, in seconds.

        Raises:
            WebhookUnknown: There is none.
        """
        request = codec.list_deliveries(webhook_id, states, page_size)
        while True:
            page = await self._sender.unary(self._sender.admin.ListDeliveries, request, timeout)
            for delivery in page.deliveries:
                yield codec.delivery(delivery)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def replay(
        self,
        webhook_id: bytes,
        alert_ids: Sequence[bytes] = (),
        *,
        timeout: float | None = None,
    ) -> int:
        """Have deliveries tried as if for the first time, whatever became of them; how many.

        The receiver is told the same `webhook-id` as before.

        Args:
            webhook_id: At which webhook.
            alert_ids: Of these alerts, at most 1000; none: all that are dead.
            timeout: In seconds.

        Raises:
            WebhookUnknown: There is none, or it was deleted.
            AlertUnknown: The webhook was never to be told one of them. Nothing is tried again.
        """
        request = admin_service_pb2.ReplayDeliveriesRequest(
            webhook_id=webhook_id, alert_ids=alert_ids
        )
        response = await self._sender.unary(self._sender.admin.ReplayDeliveries, request, timeout)
        return response.deliveries
