"""The outbox: every alert is sent to every webhook that it concerns until it is taken, or dead."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from peculium_server.core.alerts import ATTEMPTS_MAX, AlertKind, DeliveryState, document
from peculium_server.core.limits import SECOND_US
from peculium_server.core.refusals import id_text
from peculium_server.deliverer import Deliverer
from peculium_server.store.alerts import Delivery
from peculium_server.webhooks.addresses import Allowed
from peculium_server.webhooks.keys import WebhookKeys
from peculium_server.webhooks.sending import Sender
from tests.alerts.documented import verified
from tests.alerts.receiver import Receiver, receiving
from tests.alerts.watched import Watched

PENDING, DELIVERED, DEAD = DeliveryState


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture
def keys(tmp_path: Path) -> WebhookKeys:
    return WebhookKeys.make(tmp_path / "key")


@pytest.fixture
def deliverer(watched: Watched, keys: WebhookKeys) -> Deliverer:
    sender = Sender(keys, Allowed(loopback=True), seconds_max=5)
    return Deliverer(watched.store, sender)


@pytest.fixture
async def root(watched: Watched) -> bytes:
    """A tree whose freezes are watched for."""
    made = await watched.fleet.root(100)
    await watched.rule(made, kind=AlertKind.FREEZE)
    return made


async def deliver(deliverer: Deliverer) -> None:
    await deliverer.start()
    await deliverer.finish()


async def deliveries(watched: Watched) -> list[Delivery]:
    found = await watched.store.alerting.list_deliveries([], [], limit=100, after=None)
    return [delivery for delivery, _ in found]


def pass_time(database: str) -> None:
    """Let the time come at which what is pending is tried next."""
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE webhook_deliveries SET next_at = clock_timestamp()")


async def test_an_alert_is_sent_signed_and_once(
    watched: Watched, deliverer: Deliverer, receiver: Receiver, keys: WebhookKeys, root: bytes
) -> None:
    webhook = await watched.webhook(url=receiver.url("status/200"))
    await watched.freeze(root)
    await watched.look()
    await deliver(deliverer)
    [numbered] = await watched.numbered()
    told = receiver.next()
    assert told["headers"]["webhook-id"] == id_text(numbered.alert.alert_id)
    secret = keys.secret(watched.store.origin, webhook.webhook_id)
    now = await watched.store.alerting.now() / SECOND_US
    assert verified(secret, told["headers"], told["body"].encode(), now)
    assert json.loads(told["body"]) == document(numbered)
    [delivery] = await deliveries(watched)
    assert (delivery.state, delivery.attempts, delivery.last_status) == (DELIVERED, 1, 200)
    await deliver(deliverer)
    assert not receiver.has_more()


async def test_what_is_not_taken_is_sent_again_under_the_same_id_until_it_is_dead_and_replayed(
    watched: Watched, deliverer: Deliverer, receiver: Receiver, root: bytes, database: str
) -> None:
    webhook = await watched.webhook(url=receiver.url("status/503"))
    await watched.freeze(root)
    await watched.look()
    ids = set()
    [delivery] = await deliveries(watched)
    for attempts in range(1, ATTEMPTS_MAX + 1):
        before = await watched.store.alerting.now()
        await deliver(deliverer)
        ids.add(receiver.next()["headers"]["webhook-id"])
        [delivery] = await deliveries(watched)
        assert (delivery.attempts, delivery.last_status) == (attempts, 503)
        if delivery.state is PENDING:
            # Not before its time, and that is farther away each time.
            assert delivery.next_at - before > 2 * SECOND_US * 4 ** min(attempts - 1, 6)
            await deliver(deliverer)
            assert not receiver.has_more()
        pass_time(database)
    assert delivery.state is DEAD
    assert delivery.last_problem == "answered 503"
    await deliver(deliverer)
    assert not receiver.has_more()
    replay = watched.store.alerting.replay
    assert await replay(webhook.webhook_id, None) == 1
    await deliver(deliverer)
    ids.add(receiver.next()["headers"]["webhook-id"])
    assert len(ids) == 1
    [delivery] = await deliveries(watched)
    assert (delivery.state, delivery.attempts) == (PENDING, 1)


async def test_one_that_was_delivered_is_replayed_by_its_id_and_unknown_ones_replay_nothing(
    watched: Watched, deliverer: Deliverer, receiver: Receiver, root: bytes
) -> None:
    webhook = await watched.webhook(url=receiver.url("status/200"))
    await watched.freeze(root)
    await watched.look()
    await deliver(deliverer)
    first = receiver.next()
    [numbered] = await watched.numbered()
    replay = watched.store.alerting.replay
    unknown = bytes(16)
    known = numbered.alert.alert_id
    assert await replay(webhook.webhook_id, [known, unknown]) == unknown
    assert await replay(webhook.webhook_id, None) == 0
    await deliver(deliverer)
    assert not receiver.has_more()
    assert await replay(webhook.webhook_id, [known]) == 1
    await deliver(deliverer)
    assert receiver.next()["body"] == first["body"]


async def test_what_one_server_has_claimed_no_other_sends_until_its_time_is_over(
    watched: Watched, deliverer: Deliverer, receiver: Receiver, root: bytes, database: str
) -> None:
    """A server that ends between claiming and marking leaves it to be sent again."""
    webhook = await watched.webhook(url=receiver.url("status/503"))
    await watched.freeze(root)
    await watched.look()
    alerting = watched.store.alerting
    now = await alerting.now()
    [claimed] = await alerting.claim(webhook.webhook_id, now=now, limit=4, lease_us=SECOND_US * 60)
    assert await alerting.claim(webhook.webhook_id, now=now, limit=4, lease_us=1) == []
    await deliver(deliverer)
    assert not receiver.has_more()
    pass_time(database)
    await deliver(deliverer)
    receiver.next()
    # What the first one has to say comes too late.
    await alerting.finish(claimed, DEAD, delay_us=0, status=0, problem="too late")
    [delivery] = await deliveries(watched)
    assert (delivery.state, delivery.attempts, delivery.last_status) == (PENDING, 2, 503)


async def test_two_servers_send_each_alert_once(
    watched: Watched,
    other: Watched,
    deliverer: Deliverer,
    keys: WebhookKeys,
    receiver: Receiver,
    root: bytes,
) -> None:
    await watched.webhook(url=receiver.url("status/200"))
    for _ in range(12):
        await watched.freeze(root)
    await watched.look()
    second = Deliverer(other.store, Sender(keys, Allowed(loopback=True)))
    for each in (deliverer, second):
        await each.start()
    for each in (deliverer, second):
        await each.finish()
    # One that met the other's claim leaves the rest to it, or to the next round.
    await deliver(deliverer)
    assert {delivery.state for delivery in await deliveries(watched)} == {DELIVERED}
    ids = [receiver.next()["headers"]["webhook-id"] for _ in range(12)]
    assert len(set(ids)) == 12
    assert not receiver.has_more()


async def test_a_webhook_that_does_not_answer_keeps_no_other_waiting(
    watched: Watched, deliverer: Deliverer, receiver: Receiver, root: bytes
) -> None:
    await watched.webhook(url=receiver.url("slow"))
    quick = await watched.webhook(url=receiver.url("status/200"))
    for _ in range(6):
        await watched.freeze(root)
    await watched.look()
    await deliverer.start()
    taken = 0
    while taken < 6:
        taken += (await asyncio.to_thread(receiver.next))["path"] == "/status/200"
    serving = deliverer._working.pop(quick.webhook_id, None)
    if serving is not None:
        deliverer._working[quick.webhook_id] = serving
        await serving
    # The other one is still being waited for.
    assert len(deliverer._working) == 1
    for task in deliverer._working.values():
        task.cancel()


async def test_what_is_pending_for_a_deleted_webhook_is_not_sent(
    watched: Watched, deliverer: Deliverer, receiver: Receiver, root: bytes
) -> None:
    webhook = await watched.webhook(url=receiver.url("status/200"))
    await watched.freeze(root)
    await watched.look()
    for _ in range(2):
        ended = await watched.store.alerting.end_webhook(webhook.webhook_id, "admin", "deleted")
        assert ended is not None
    await deliver(deliverer)
    assert not receiver.has_more()
    [delivery] = await deliveries(watched)
    assert (delivery.state, delivery.last_problem) == (DEAD, "deleted")


async def test_deliveries_are_listed_in_pages_by_webhook_and_state(
    watched: Watched, deliverer: Deliverer, receiver: Receiver, root: bytes
) -> None:
    good, bad = [
        await watched.webhook(url=receiver.url(f"status/{status}")) for status in (200, 500)
    ]
    for _ in range(3):
        await watched.freeze(root)
    await watched.look()
    await deliver(deliverer)
    for _ in range(6):
        receiver.next()
    seen: list[tuple[int, bytes]] = []
    after = None
    while page := await watched.store.alerting.list_deliveries([], [], limit=2, after=after):
        seen += [(delivery.number, delivery.webhook_id) for delivery, _ in page]
        after = seen[-1]
    webhooks = sorted((good.webhook_id, bad.webhook_id))
    assert seen == [(number, webhook) for number in (3, 2, 1) for webhook in webhooks]
    only = await watched.store.alerting.list_deliveries(
        [good.webhook_id, bad.webhook_id], [PENDING], limit=10, after=None
    )
    assert [delivery.webhook_id for delivery, _ in only] == [bad.webhook_id] * 3
