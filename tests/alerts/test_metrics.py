"""What is counted of alerts, and what is told of those that wait."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from peculium_server.core.alerts import ATTEMPTS_MAX, AlertKind
from peculium_server.core.limits import SECOND_US
from peculium_server.deliverer import Deliverer
from peculium_server.gauges import Gauges
from peculium_server.telemetry.instruments import ALERTER_ROUNDS, ALERTS, WEBHOOK_TRIES
from peculium_server.telemetry.meters import Meters
from peculium_server.webhooks.addresses import Allowed
from peculium_server.webhooks.keys import WebhookKeys
from peculium_server.webhooks.sending import Sender
from tests.alerts.receiver import Receiver, receiving
from tests.alerts.test_delivery import deliver, pass_time
from tests.alerts.watched import Watched
from tests.sweeper.fleet import points


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture
def deliverer(watched: Watched, tmp_path: Path) -> Deliverer:
    keys = WebhookKeys.make(tmp_path / "key")
    sender = Sender(keys, Allowed(loopback=True), seconds_max=5)
    return Deliverer(watched.store, sender, watched.provider)


async def test_alerts_are_counted_by_kind_and_rounds_by_outcome(watched: Watched) -> None:
    root = await watched.fleet.root(100)
    await watched.look()
    await watched.rule(root, amount=10)
    await watched.rule(root, amount=20)
    await watched.rule(root, kind=AlertKind.FREEZE)
    await watched.spend(root, 20)
    await watched.freeze(root)
    await watched.look()
    assert watched.counted(ALERTS.name) == {("used",): 2, ("freeze",): 1}
    assert watched.counted(ALERTER_ROUNDS.name) == {("nothing",): 1, ("looked",): 1}


async def test_every_counter_begins_with_nothing_so_that_the_first_of_its_kind_is_an_increase(
    watched: Watched, deliverer: Deliverer
) -> None:
    for instrument in (ALERTS, ALERTER_ROUNDS, WEBHOOK_TRIES):
        found = points(watched.reader, instrument.name)
        kinds = 1
        for label in instrument.labels:
            kinds *= len(label.values)
        assert [value for _, value in found] == [0] * kinds


async def test_tries_are_counted_by_outcome_and_answer(
    watched: Watched, deliverer: Deliverer, receiver: Receiver, database: str
) -> None:
    root = await watched.fleet.root(100)
    await watched.rule(root, kind=AlertKind.FREEZE)
    for path in ("status/200", "status/503", "redirect", "nothing"):
        await watched.webhook(url=receiver.url(path))
    await watched.freeze(root)
    await watched.look()
    await deliver(deliverer)
    assert watched.counted(WEBHOOK_TRIES.name) == {
        ("delivered", "2xx"): 1,
        ("failed", "5xx"): 1,
        ("failed", "3xx"): 1,
        ("failed", "none"): 1,
    }
    for _ in range(ATTEMPTS_MAX - 1):
        pass_time(database)
        await deliver(deliverer)
    found = watched.counted(WEBHOOK_TRIES.name)
    assert found["delivered", "2xx"] == 1
    assert found["failed", "5xx"] == ATTEMPTS_MAX - 1
    assert found["dead", "5xx"] == found["dead", "3xx"] == found["dead", "none"] == 1


async def test_what_waits_is_told_by_its_number_and_its_age(
    watched: Watched, deliverer: Deliverer, receiver: Receiver
) -> None:
    waiting = watched.store.alerting.waiting
    unwatched, root = [await watched.fleet.root(100) for _ in range(2)]
    await watched.freeze(unwatched)
    now, *nothing = await waiting()
    assert nothing == [None, 0, 0, None]
    await watched.rule(root, amount=10)
    await watched.webhook(url=receiver.url("status/200"))
    # The rule is new: what was recorded before it does not wait, and its subtree is to be summed up.
    told = await waiting()
    assert (told.since, told.due) == (None, 1)
    await watched.look()
    await watched.spend(root, 5)
    first = await waiting()
    await watched.spend(root, 5)
    told = await waiting()
    assert told.since == first.since
    assert told.since is not None
    assert now <= told.since <= told.now < now + 600 * SECOND_US
    await watched.look()
    told = await waiting()
    [alert] = await watched.numbered()
    assert (told.since, told.due) == (None, 0)
    assert (told.deliveries, told.oldest) == (1, alert.recorded_at)
    await deliver(deliverer)
    assert list(await waiting())[1:] == [None, 0, 0, None]


async def test_a_dead_delivery_and_one_of_a_deleted_webhook_wait_no_more(watched: Watched) -> None:
    root = await watched.fleet.root(100)
    await watched.rule(root, kind=AlertKind.FREEZE)
    webhooks = [await watched.webhook() for _ in range(3)]
    await watched.freeze(root)
    await watched.look()
    assert (await watched.store.alerting.waiting()).deliveries == 3
    await watched.store.alerting.end_webhook(webhooks[0].webhook_id, "admin", "deleted")
    assert (await watched.store.alerting.waiting()).deliveries == 2


async def test_any_server_tells_what_waits_whether_it_looks_for_alerts_or_not(
    watched: Watched,
) -> None:
    root = await watched.fleet.root(100)
    await watched.rule(root, kind=AlertKind.FREEZE)
    await watched.webhook()
    gauges = Gauges(watched.store, Meters(watched.provider))

    def told() -> dict[str, float]:
        names = ("alerter.lag", "alerter.due", "outbox.depth", "outbox.age")
        return {
            name: value for name in names for _, value in points(watched.reader, f"peculium.{name}")
        }

    assert told() == {}
    await gauges.look()
    assert set(told().values()) == {0}
    await watched.freeze(root)
    await gauges.look()
    assert told()["alerter.lag"] > 0
    await watched.look()
    await gauges.look()
    found = told()
    assert (found["alerter.lag"], found["outbox.depth"]) == (0, 1)
    assert found["outbox.age"] > 0
