"""Alerts for operators and auditors: rules, what they have found, webhooks and deliveries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import RFC_4122, UUID

from peculium.v1 import alerts_pb2
from peculium.v1.admin_service_pb2 import (
    CreateAlertRuleRequest,
    CreateAlertRuleResponse,
    CreateWebhookRequest,
    CreateWebhookResponse,
    DeleteAlertRuleRequest,
    DeleteAlertRuleResponse,
    DeleteWebhookRequest,
    DeleteWebhookResponse,
    ListAlertRulesRequest,
    ListAlertRulesResponse,
    ListDeliveriesRequest,
    ListDeliveriesResponse,
    ListWebhooksResponse,
    ReplayDeliveriesRequest,
    ReplayDeliveriesResponse,
    TestWebhookRequest,
    TestWebhookResponse,
)
from peculium.v1.audit_service_pb2 import ListAlertsRequest, ListAlertsResponse
from peculium_server.core.alerts import (
    BASIS_POINTS_MAX,
    WEBHOOK_DELETED,
    AlertKind,
    DeliveryState,
    Rule,
    Webhook,
    trial,
)
from peculium_server.core.limits import AMOUNT_MAX, ID_BYTES
from peculium_server.core.refusals import Refusal, Refused, id_text
from peculium_server.rpc import scope
from peculium_server.rpc.calls import CallRefused, actor
from peculium_server.rpc.pages import fitting, page_token, read_page
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.responses import (
    alert_bytes,
    write_alert,
    write_delivery,
    write_rule,
    write_webhook,
)
from peculium_server.store.alerting import TooMany
from peculium_server.store.store import Store
from peculium_server.store.tail import Within
from peculium_server.webhooks.addresses import NotAllowed, parse
from peculium_server.webhooks.sending import Sender

REPLAYED_MAX: Final = 1_000
_ID_VERSION: Final = 7
_NUMBER_BYTES: Final = 8


class Alerts:
    """Answers about alerts."""

    def __init__(self, reader: Reader, store: Store, sender: Sender | None) -> None:
        """Begin.

        Args:
            reader: Finds budgets.
            store: The ledger's.
            sender: Makes webhooks' secrets, and sends tests; None if the server has no key.
        """
        self._reader = reader
        self._store = store
        self._sender = sender

    # -- Rules ------------------------------------------------------------------------------------

    async def create_rule(self, request: CreateAlertRuleRequest) -> CreateAlertRuleResponse:
        """Have something watched for.

        Raises:
            CallRefused: MALFORMED; BUDGET_UNKNOWN; ID_TAKEN: with other content; TOO_MANY.
        """
        _check_new_id("rule_id", request.rule_id)
        kind = _read_kind(request)
        line, position = await self._reader.for_auditor(request.budget)
        budget = line.budget
        wanted = Rule(
            rule_id=request.rule_id,
            lane=position.lane,
            root_id=budget.root_id,
            budget_id=budget.budget_id,
            line=(budget.budget_id, *budget.ancestors),
            path="/".join(line.path),
            unit=budget.unit,
            kind=kind,
            basis_points=request.basis_points,
            amount=request.amount,
            since=position.number,
            created_at=line.at,
            created_by=actor().principal,
            due=kind is AlertKind.USED,
        )
        added = await self._store.alerting.add_rule(wanted)
        if isinstance(added, TooMany):
            raise _too_many(added)
        rule, replayed = added
        for field in ("root_id", "budget_id", "kind", "basis_points", "amount"):
            if getattr(rule, field) != getattr(wanted, field):
                raise _taken("rule_id", request.rule_id, field)
        response = CreateAlertRuleResponse(replayed=replayed)
        write_rule(rule, response.rule)
        return response

    async def list_rules(self, request: ListAlertRulesRequest) -> ListAlertRulesResponse:
        """List what is watched for.

        Raises:
            CallRefused: MALFORMED; BUDGET_UNKNOWN.
        """
        within = await self._within(request)
        listed = b"alert rules" + _named(within)
        asked = read_page(listed, request.page_size, request.page_token)
        if asked.after is not None and len(asked.after) != ID_BYTES:
            raise CallRefused.malformed("page_token", "is not one that this list has given")
        found = await self._store.alerting.list_rules(
            within, limit=asked.size + 1, after=asked.after
        )
        page = found[: asked.size]
        last = page[-1].rule_id if len(found) > asked.size else None
        response = ListAlertRulesResponse(next_page_token=page_token(listed, last))
        for rule in page:
            write_rule(rule, response.rules.add())
        return response

    async def delete_rule(self, request: DeleteAlertRuleRequest) -> DeleteAlertRuleResponse:
        """End a rule.

        Raises:
            CallRefused: MALFORMED; ALERT_UNKNOWN; PERMISSION_DENIED: the caller is limited to other trees.
        """
        _check_id("rule_id", request.rule_id)
        there = await self._store.alerting.rule(request.rule_id)
        scope.check_root(None if there is None else there.root_id, id_text(request.rule_id))
        rule = await self._store.alerting.end_rule(request.rule_id, actor().principal)
        if rule is None:
            raise _no_alert("rule_id", request.rule_id)
        response = DeleteAlertRuleResponse()
        write_rule(rule, response.rule)
        return response

    # -- Alerts -----------------------------------------------------------------------------------

    async def list_alerts(self, request: ListAlertsRequest) -> ListAlertsResponse:
        """List what was found.

        Raises:
            CallRefused: MALFORMED; BUDGET_UNKNOWN.
        """
        within = await self._within(request)
        listed = b"alerts" + bytes((request.descending,)) + _named(within)
        asked = read_page(listed, request.page_size, request.page_token)
        found = await self._store.alerting.list_alerts(
            within,
            limit=asked.size + 1,
            after=asked.after_number,
            descending=request.descending,
        )
        page = fitting(found[: asked.size], alert_bytes)
        last = page[-1].number if len(found) > len(page) else None
        response = ListAlertsResponse(next_page_token=page_token(listed, last))
        for numbered in page:
            write_alert(numbered, response.alerts.add())
        return response

    # -- Webhooks ---------------------------------------------------------------------------------

    async def create_webhook(self, request: CreateWebhookRequest) -> CreateWebhookResponse:
        """Have alerts sent to an address.

        Raises:
            CallRefused: MALFORMED: also an address that must not be reached; BUDGET_UNKNOWN; ID_TAKEN: with
                other content; TOO_MANY; WEBHOOKS_OFF.
        """
        _check_new_id("webhook_id", request.webhook_id)
        sender = self._sending()
        try:
            parse(request.url, sender.allowed)
        except NotAllowed as error:
            raise CallRefused.malformed("url", str(error)) from None
        wanted = Webhook(request.webhook_id, request.url, None, None, "", 0, actor().principal)
        if request.HasField("budget"):
            line, _ = await self._reader.for_auditor(request.budget)
            wanted = wanted._replace(
                root_id=line.budget.root_id,
                budget_id=line.budget.budget_id,
                path="/".join(line.path),
            )
        added = await self._store.alerting.add_webhook(wanted)
        if isinstance(added, TooMany):
            raise _too_many(added)
        webhook, replayed = added
        for field in ("url", "root_id", "budget_id"):
            if getattr(webhook, field) != getattr(wanted, field):
                raise _taken("webhook_id", request.webhook_id, field)
        secret = sender.keys.secret(self._store.origin, webhook.webhook_id)
        response = CreateWebhookResponse(secret=secret, replayed=replayed)
        write_webhook(webhook, response.webhook)
        return response

    async def list_webhooks(self) -> ListWebhooksResponse:
        """List where alerts are sent to."""
        response = ListWebhooksResponse()
        for webhook in await self._store.alerting.webhooks():
            write_webhook(webhook, response.webhooks.add())
        return response

    async def delete_webhook(self, request: DeleteWebhookRequest) -> DeleteWebhookResponse:
        """End a webhook.

        Raises:
            CallRefused: MALFORMED; WEBHOOK_UNKNOWN.
        """
        _check_id("webhook_id", request.webhook_id)
        webhook = await self._store.alerting.end_webhook(
            request.webhook_id, actor().principal, WEBHOOK_DELETED
        )
        if webhook is None:
            raise _no_webhook(request.webhook_id)
        response = DeleteWebhookResponse()
        write_webhook(webhook, response.webhook)
        return response

    async def test_webhook(self, request: TestWebhookRequest) -> TestWebhookResponse:
        """Send a test, and say what became of it.

        Raises:
            CallRefused: MALFORMED; WEBHOOK_UNKNOWN; WEBHOOKS_OFF.
        """
        webhook = await self._webhook(request.webhook_id)
        sender = self._sending()
        now = await self._store.alerting.now()
        sent = await sender.send(
            webhook.url,
            incarnation=self._store.origin,
            webhook_id=webhook.webhook_id,
            message_id=f"test-{now}",
            at=now,
            document=trial(webhook.webhook_id, now),
        )
        return TestWebhookResponse(status=sent.status, problem=sent.problem)

    # -- Deliveries -------------------------------------------------------------------------------

    async def list_deliveries(self, request: ListDeliveriesRequest) -> ListDeliveriesResponse:
        """List what became of alerts at webhooks.

        Raises:
            CallRefused: MALFORMED; WEBHOOK_UNKNOWN.
        """
        webhook_ids = []
        if request.webhook_id:
            _check_id("webhook_id", request.webhook_id)
            if await self._store.alerting.webhook(request.webhook_id) is None:
                raise _no_webhook(request.webhook_id)
            webhook_ids.append(request.webhook_id)
        states = _read_states(request.states)
        listed = b"deliveries" + request.webhook_id + bytes(states)
        asked = read_page(listed, request.page_size, request.page_token)
        after = None
        if asked.after is not None:
            number, webhook_id = asked.after[:_NUMBER_BYTES], asked.after[_NUMBER_BYTES:]
            after = int.from_bytes(number), webhook_id
        found = await self._store.alerting.list_deliveries(
            webhook_ids, states, limit=asked.size + 1, after=after
        )
        page = found[: asked.size]
        last = None
        if len(found) > asked.size:
            delivery, _ = page[-1]
            last = delivery.number.to_bytes(_NUMBER_BYTES) + delivery.webhook_id
        response = ListDeliveriesResponse(next_page_token=page_token(listed, last))
        for delivery, alert_id in page:
            write_delivery(delivery, alert_id, response.deliveries.add())
        return response

    async def replay(self, request: ReplayDeliveriesRequest) -> ReplayDeliveriesResponse:
        """Have deliveries tried again.

        Raises:
            CallRefused: MALFORMED; TOO_LARGE; WEBHOOK_UNKNOWN; ALERT_UNKNOWN: the webhook was never to be
                told one of them, or it is kept no longer. Nothing is tried again then.
        """
        webhook = await self._webhook(request.webhook_id)
        if len(request.alert_ids) > REPLAYED_MAX:
            facts = {
                "field": "alert_ids",
                "limit": str(REPLAYED_MAX),
                "size": str(len(request.alert_ids)),
            }
            raise CallRefused(Refused(Refusal.TOO_LARGE, facts))
        alert_ids = sorted(set(request.alert_ids))
        for alert_id in alert_ids:
            _check_id("alert_ids", alert_id)
        replayed = await self._store.alerting.replay(webhook.webhook_id, alert_ids or None)
        if isinstance(replayed, bytes):
            raise _no_alert("alert_ids", replayed)
        return ReplayDeliveriesResponse(deliveries=replayed)

    # -- What is asked ----------------------------------------------------------------------------

    def _sending(self) -> Sender:
        if self._sender is None:
            raise CallRefused(Refused(Refusal.WEBHOOKS_OFF, {"setting": "webhook_key_file"}))
        return self._sender

    async def _webhook(self, webhook_id: bytes) -> Webhook:
        """A webhook that was not deleted."""
        _check_id("webhook_id", webhook_id)
        webhook = await self._store.alerting.webhook(webhook_id)
        if webhook is None or webhook.deleted_at is not None:
            raise _no_webhook(webhook_id)
        return webhook

    async def _within(self, request: ListAlertRulesRequest | ListAlertsRequest) -> Within | None:
        """The budget that is named, with what is below it; None: all."""
        found = await self._reader.for_auditor_or_all(
            request.budget if request.HasField("budget") else None
        )
        if found is None:
            return None
        budget = found[0].budget
        return Within(budget.root_id, budget.budget_id, subtree=True)


def _named(within: Within | None) -> bytes:
    return b"" if within is None else within.root_id + (within.budget_id or b"")


def _check_id(field: str, given: bytes) -> None:
    if len(given) != ID_BYTES:
        raise CallRefused.malformed(field, f"must be {ID_BYTES} bytes")


def _check_new_id(field: str, given: bytes) -> None:
    _check_id(field, given)
    made = UUID(bytes=given)
    if made.variant != RFC_4122 or made.version != _ID_VERSION:
        raise CallRefused.malformed(field, "must be a UUIDv7")


def _read_kind(request: CreateAlertRuleRequest) -> AlertKind:
    """What is to be watched for; its threshold is as it has to be."""
    try:
        kind = AlertKind(request.kind)
    except ValueError:
        raise CallRefused.malformed("kind", "must be one that this server knows") from None
    if not 0 <= request.basis_points <= BASIS_POINTS_MAX:
        raise CallRefused.malformed("basis_points", f"must be 1 to {BASIS_POINTS_MAX}")
    if not 0 <= request.amount <= AMOUNT_MAX:
        raise CallRefused.malformed("amount", f"must be 1 to {AMOUNT_MAX}")
    if kind is not AlertKind.USED:
        for field in ("basis_points", "amount"):
            if getattr(request, field):
                raise CallRefused.malformed(field, "is for what is used only")
    elif bool(request.basis_points) is bool(request.amount):
        raise CallRefused.malformed("basis_points", "or an amount must be said, and not both")
    return kind


def _read_states(
    states: Sequence[alerts_pb2.DeliveryState.ValueType],
) -> list[DeliveryState]:
    read = set()
    for state in states:
        try:
            read.add(DeliveryState(state))
        except ValueError:
            raise CallRefused.malformed("states", f"there is no state {state}") from None
    return sorted(read)


def _too_many(found: TooMany) -> CallRefused:
    facts = {"what": found.what, "limit": str(found.limit)}
    return CallRefused(Refused(Refusal.TOO_MANY, facts))


def _taken(field: str, given: bytes, differs: str) -> CallRefused:
    facts = {"field": field, "id": id_text(given), "differs": differs}
    return CallRefused(Refused(Refusal.ID_TAKEN, facts))


def _no_alert(field: str, given: bytes) -> CallRefused:
    return CallRefused(Refused(Refusal.ALERT_UNKNOWN, {"field": field, "id": id_text(given)}))


def _no_webhook(webhook_id: bytes) -> CallRefused:
    return CallRefused(Refused(Refusal.WEBHOOK_UNKNOWN, {"webhook": id_text(webhook_id)}))
