"""The deliverer: sends alerts from the outbox to webhooks, on every server that can sign them.

Each delivery is claimed for a while, tried, and marked. A server that ends in between leaves it to be
tried again when that time is over: so a receiver is told at least once, under the same id each time.
Webhooks are served side by side: one that answers slowly, or not at all, keeps no other one waiting.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from functools import partial
from typing import Final

from opentelemetry import metrics

from peculium_server.core.alerts import (
    JITTER_STEPS,
    WEBHOOK_DELETED,
    DeliveryState,
    Numbered,
    Webhook,
    delay_after,
    document,
)
from peculium_server.core.limits import SECOND_US
from peculium_server.core.refusals import id_text
from peculium_server.store.alerts import Delivery
from peculium_server.store.errors import StoreError
from peculium_server.store.store import Store
from peculium_server.telemetry import instruments
from peculium_server.webhooks.sending import Sender, Sent

POLL_SECONDS: Final = 1.0
CLAIMED_MAX: Final = 4
"""Deliveries of one webhook that are tried at once."""
LEASE_US: Final = 60 * SECOND_US
"""For so long a server has a delivery for itself: several times as long as one try takes."""
UNAVAILABLE_SECONDS: Final = 5.0
_FORGOTTEN: Final = "the alert is kept no longer"
_OUTCOMES: Final = {
    DeliveryState.DELIVERED: "delivered",
    DeliveryState.PENDING: "failed",
    DeliveryState.DEAD: "dead",
}

_logger = logging.getLogger(__name__)


class Deliverer:
    """Delivers the alerts of an open ledger."""

    def __init__(
        self, store: Store, sender: Sender, meter_provider: metrics.MeterProvider | None = None
    ) -> None:
        self._store = store
        self._alerting = store.alerting
        self._sender = sender
        self._working: dict[bytes, asyncio.Task[None]] = {}
        """By webhook."""
        meter = metrics.get_meter(__name__, meter_provider=meter_provider)
        self._tries = instruments.WEBHOOK_TRIES.counter(meter)

    async def run(self) -> None:
        """Deliver until cancelled."""
        answers = True
        try:
            while True:
                wait = POLL_SECONDS
                try:
                    await self.start()
                    answers = True
                except StoreError as error:
                    wait = UNAVAILABLE_SECONDS
                    if answers:
                        _logger.warning("no alerts are delivered: %s", error)
                    answers = False
                except Exception:
                    wait = UNAVAILABLE_SECONDS
                    _logger.exception("a round of the deliverer has failed")
                # Never two servers' the same.
                await asyncio.sleep(wait * (0.75 + secrets.randbelow(1024) / 2048))
        finally:
            tasks = list(self._working.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def start(self) -> None:
        """Begin to serve the webhooks for which something is due, and are not being served.

        Raises:
            StoreError: The database does not say.
        """
        for webhook_id in await self._alerting.due_webhooks():
            if webhook_id not in self._working:
                task = asyncio.create_task(self._serve(webhook_id), name="deliver")
                self._working[webhook_id] = task
                task.add_done_callback(partial(self._ended, webhook_id))

    def _ended(self, webhook_id: bytes, _: asyncio.Task[None]) -> None:
        del self._working[webhook_id]

    async def finish(self) -> None:
        """Wait until what is due for each webhook was tried."""
        while self._working:
            await asyncio.wait(self._working.values())

    async def _serve(self, webhook_id: bytes) -> None:
        """Try what is due for a webhook, until nothing is."""
        try:
            while await self._try_some(webhook_id):
                pass
        except StoreError as error:
            # What was tried and not marked is tried again when the time is over that it was claimed for.
            _logger.warning("deliveries to %s are not marked: %s", id_text(webhook_id), error)
        except Exception:
            _logger.exception("deliveries to %s have failed", id_text(webhook_id))

    async def _try_some(self, webhook_id: bytes) -> bool:
        """Try some of what is due for a webhook; whether there was anything."""
        now = await self._alerting.now()
        claimed = await self._alerting.claim(
            webhook_id, now=now, limit=CLAIMED_MAX, lease_us=LEASE_US
        )
        if not claimed:
            return False
        webhook = await self._alerting.webhook(webhook_id)
        alerts = await self._alerting.numbered([delivery.number for delivery in claimed])
        await asyncio.gather(
            *(
                self._try(webhook, delivery, alerts.get(delivery.number), now)
                for delivery in claimed
            )
        )
        return True

    async def _try(
        self, webhook: Webhook | None, delivery: Delivery, numbered: Numbered | None, now: int
    ) -> None:
        if webhook is None or webhook.deleted_at is not None:
            sent, delay_us = Sent(0, WEBHOOK_DELETED), None
        elif numbered is None:
            sent, delay_us = Sent(0, _FORGOTTEN), None
        else:
            sent = await self._sender.send(
                webhook.url,
                incarnation=self._store.origin,
                webhook_id=webhook.webhook_id,
                message_id=id_text(numbered.alert.alert_id),
                at=now,
                document=document(numbered),
            )
            delay_us = delay_after(delivery.attempts, secrets.randbelow(JITTER_STEPS))
        if sent.taken:
            state = DeliveryState.DELIVERED
        else:
            state = DeliveryState.DEAD if delay_us is None else DeliveryState.PENDING
        if state is DeliveryState.DEAD:
            _logger.warning(
                "alert %d is not delivered to webhook %s: %s",
                delivery.number,
                id_text(delivery.webhook_id),
                sent.problem,
            )
        await self._alerting.finish(
            delivery,
            state,
            delay_us=delay_us or 0,
            status=sent.status,
            problem=sent.problem,
        )
        self._tries.add(1, {"outcome": _OUTCOMES[state], "answer": _answer(sent.status)})


def _answer(status: int) -> str:
    """How a receiver has answered, as `instruments.ANSWERS` names it."""
    if not status:
        return "none"
    answer = f"{status // 100}xx"
    return answer if answer in instruments.ANSWERS else "other"
