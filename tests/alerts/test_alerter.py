"""The alerter: everything that rules watch for is found, once, whoever looks and whatever happens."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import psycopg
import pytest

from peculium_server import alerter as module
from peculium_server.alerter import Round
from peculium_server.core.alerts import RULES_MAX, WEBHOOKS_MAX, AlertKind
from peculium_server.store import alerting
from peculium_server.store.alerting import TooMany
from peculium_server.store.errors import StoreUnavailable
from tests.alerts.watched import Watched
from tests.sweeper.fleet import new_id

USED, DISPUTE, OVERRUN, FREEZE = AlertKind


async def test_a_threshold_fires_once_when_it_is_crossed(watched: Watched) -> None:
    root = await watched.fleet.root(100)
    rule = await watched.rule(root, basis_points=8_000)
    await watched.spend(root, 79)
    assert await watched.look() == []
    await watched.spend(root, 1)
    [alert] = await watched.look()
    assert (alert.kind, alert.rule_id, alert.path) == (USED, rule.rule_id, rule.path)
    assert (alert.amount, alert.threshold, alert.granted) == (80, 80, 100)
    await watched.spend(root, 5)
    assert await watched.look() == []


async def test_what_is_used_below_counts_and_so_do_closed_budgets_and_lapsed_holds(
    watched: Watched,
) -> None:
    fleet = watched.fleet
    root = await fleet.root(1_000)
    child = await watched.child(root, 500)
    grandchild = await watched.child(root, 300, child)
    await watched.rule(root, child, amount=70)
    await watched.rule(root, amount=100)
    await watched.spend(root, 30)
    await watched.spend(root, 40, grandchild)
    await watched.spend(root, 20, child)
    await fleet.revoke(root, grandchild)
    assert await watched.look() == []
    lapsing = await fleet.hold(root, 10, budget_id=child)
    await fleet.wait_until_due(1)
    await fleet.sweep_until(fleet.nothing_due)
    assert (await fleet.holds_of(root, child))[lapsing].remaining == 10
    found = {alert.budget_id: alert.amount for alert in await watched.look()}
    assert found == {child: 70, root: 100}


async def test_a_rule_is_armed_again_when_less_is_used_or_more_granted(watched: Watched) -> None:
    root = await watched.fleet.root(100)
    await watched.rule(root, basis_points=5_000)
    hold = await watched.settled(root, 60, 60)
    assert len(await watched.look()) == 1
    await watched.resolve(root, hold, 10)
    assert await watched.look() == []
    await watched.spend(root, 45)
    assert len(await watched.look()) == 1
    await watched.top_up(root, 100)
    assert await watched.look() == []
    await watched.spend(root, 45)
    [alert] = await watched.look()
    assert (alert.amount, alert.granted) == (100, 200)


async def test_a_rule_that_is_made_when_its_threshold_was_crossed_fires_at_once(
    watched: Watched,
) -> None:
    root = await watched.fleet.root(100)
    await watched.spend(root, 60)
    await watched.rule(root, basis_points=5_000)
    await watched.rule(root, basis_points=7_000)
    assert [alert.threshold for alert in await watched.look()] == [50]


async def test_the_closing_of_a_budget_crosses_no_share(watched: Watched) -> None:
    root = await watched.fleet.root(1_000)
    child = await watched.child(root, 500)
    await watched.rule(root, child, basis_points=10_000)
    await watched.spend(root, 5, child)
    await watched.look()
    await watched.fleet.revoke(root, child)
    assert (await watched.fleet.budget(root, child)).money.granted == 5
    assert await watched.look() == []


async def test_every_dispute_overrun_and_freeze_is_an_alert_with_what_has_happened(
    watched: Watched,
) -> None:
    root = await watched.fleet.root(100)
    child = await watched.child(root, 20)
    for kind in (DISPUTE, OVERRUN, FREEZE):
        await watched.rule(root, child, kind)
    frozen = await watched.freeze(root, child)
    await watched.unfreeze(root, child)
    disputed = await watched.settled(root, 10, 35, child)
    await watched.resolve(root, disputed, 20)
    overrun = await watched.settled(root, 50, 200)
    found = {alert.kind: alert for alert in await watched.look()}
    assert len(found) == 3
    assert (found[FREEZE].operation_id, found[FREEZE].source_id) == (frozen, child)
    assert (found[FREEZE].principal, found[FREEZE].amount) == ("admin", 0)
    assert (found[DISPUTE].hold_id, found[DISPUTE].amount) == (disputed, 15)
    assert found[DISPUTE].source_path.endswith("/child")
    money = (await watched.fleet.budget(root)).money
    assert (found[OVERRUN].amount, found[OVERRUN].source_id) == (money.overrun, root)
    assert money.overrun > 0
    assert overrun in await watched.fleet.holds_of(root)


async def test_an_overrun_that_grows_is_one_and_after_it_was_repaid_the_next_one_is_another(
    watched: Watched,
) -> None:
    root = await watched.fleet.root(100)
    await watched.rule(root, kind=OVERRUN)
    holds = await watched.fleet.holds(root, 3, ttl_us=600_000_000)
    await watched.fleet.settle(root, holds[0], 150)
    await watched.fleet.settle(root, holds[1], 30)
    await watched.top_up(root, 1_000)
    await watched.fleet.settle(root, holds[2], 5_000)
    first, second = await watched.look()
    assert first.amount < 150
    assert second.amount > 3_000


async def test_what_happens_elsewhere_in_the_tree_does_not_concern_a_rule_but_what_blocks_it_does(
    watched: Watched,
) -> None:
    root = await watched.fleet.root(1_000)
    one, two = [await watched.child(root, 300, name=name) for name in ("one", "two")]
    below = await watched.child(root, 100, one, name="below")
    for kind in (DISPUTE, FREEZE):
        await watched.rule(root, one, kind)
    await watched.settled(root, 10, 99, two)
    await watched.freeze(root, two)
    assert await watched.look() == []
    await watched.settled(root, 10, 99, below)
    await watched.freeze(root, below)
    await watched.freeze(root)
    found = [(alert.kind, alert.source_id) for alert in await watched.look()]
    assert found == [(DISPUTE, below), (FREEZE, below), (FREEZE, root)]


async def test_events_from_before_a_rule_was_made_are_not_its(watched: Watched) -> None:
    root = await watched.fleet.root(100)
    await watched.rule(root, kind=OVERRUN)
    await watched.freeze(root)
    await watched.unfreeze(root)
    await watched.rule(root, kind=FREEZE)
    assert await watched.look() == []
    await watched.freeze(root)
    assert [alert.kind for alert in await watched.look()] == [FREEZE]


async def test_a_deleted_rule_finds_nothing_more(watched: Watched) -> None:
    root = await watched.fleet.root(100)
    rule = await watched.rule(root, kind=FREEZE)
    await watched.freeze(root)
    for _ in range(2):
        ended = await watched.store.alerting.end_rule(rule.rule_id, "admin")
        assert ended is not None
        assert ended.deleted_by == "admin"
    assert await watched.look() == []
    assert await watched.store.alerting.end_rule(new_id(), "admin") is None


@pytest.mark.parametrize("seed", range(2))
async def test_no_event_is_missed_or_told_twice_by_servers_that_look_at_once(
    watched: Watched, other: Watched, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """However little a server looks at in a round, and whenever rules are made and others look."""
    monkeypatch.setattr(module, "POSITIONS_MAX", 7)
    monkeypatch.setattr(module, "ALERTS_MAX", 3)
    monkeypatch.setattr(alerting, "EVENTS_MAX", 4)
    chance = random.Random(seed)
    roots = [await watched.fleet.root(10_000) for _ in range(4)]
    wanted: Counter[bytes] = Counter()
    for root in roots:
        await watched.rule(root, kind=FREEZE)
    for _ in range(12):
        root = chance.choice(roots)
        for _ in range(chance.randrange(1, 5)):
            await watched.fleet.ask(*[watched.fleet.spend(root) for _ in range(3)])
            await watched.freeze(root)
            await watched.unfreeze(root)
            wanted[root] += 1
        looking = [each.alerter.round() for each in (watched, other) for _ in range(2)]
        making = watched.rule(roots[0], kind=OVERRUN)
        assert StoreUnavailable not in map(type, await asyncio.gather(*looking, making))
    await watched.look()
    await other.look()
    found = await watched.numbered()
    assert Counter(each.alert.root_id for each in found) == wanted
    assert [each.number for each in found] == list(range(1, len(found) + 1))
    assert len({each.alert.operation_id for each in found}) == len(found)


async def test_what_was_recorded_before_a_look_began_is_told_when_it_has_ended(
    watched: Watched,
) -> None:
    """Whatever is recorded meanwhile: so nothing is told later than by the look that begins next."""
    roots = [await watched.fleet.root(100) for _ in range(12)]
    for root in roots:
        await watched.rule(root, amount=10)
        await watched.rule(root, kind=FREEZE)
    happened: list[tuple[AlertKind, bytes]] = []
    begun = asyncio.Event()

    async def happen() -> None:
        for root in roots:
            await watched.spend(root, 10)
            happened.append((USED, root))
            begun.set()
            await watched.freeze(root)
            happened.append((FREEZE, root))

    writing = asyncio.create_task(happen())
    await begun.wait()
    partly = False
    while not writing.done():
        before = set(happened)
        # One look: with what it leaves to the next round at once.
        while await watched.alerter.round() in (Round.MORE, Round.OVERTAKEN):
            pass
        told = {(each.alert.kind, each.alert.budget_id) for each in await watched.numbered()}
        assert before <= told
        partly |= bool(before)
    await writing
    assert partly
    await watched.look()
    assert Counter(
        (each.alert.kind, each.alert.budget_id) for each in await watched.numbered()
    ) == Counter(happened)


async def test_nothing_is_recorded_by_rules_or_positions_that_are_not_those_of_now(
    watched: Watched,
) -> None:
    alerting = watched.store.alerting
    root = await watched.fleet.root(100)
    rule = await watched.rule(root, kind=FREEZE)
    webhook = await watched.webhook()
    changes: list[Callable[[], Awaitable[object]]] = [
        lambda: watched.rule(root, amount=5),
        lambda: alerting.end_rule(rule.rule_id, "admin"),
        watched.webhook,
        lambda: alerting.end_webhook(webhook.webhook_id, "admin", "deleted"),
        watched.look,
    ]
    for change in changes:
        seen = (await alerting.standing()).progress
        await change()
        assert await alerting.record(seen, seen.positions, [], []) is None
    seen = (await alerting.standing()).progress
    assert await alerting.record(seen, seen.positions, [], []) is not None


async def test_what_another_server_has_looked_at_a_moment_ago_is_left_at_that(
    database: str, watched: Watched
) -> None:
    root = await watched.fleet.root(100)
    await watched.rule(root, kind=FREEZE)
    await watched.freeze(root)
    async with Watched.opened(database, watched.fleet, seconds=3_600) as patient:
        assert await patient.alerter.round() is Round.NOTHING
        assert await watched.alerter.round() is Round.LOOKED
        assert await patient.alerter.round() is Round.NOTHING


async def test_a_ledger_without_rules_is_not_looked_at(watched: Watched) -> None:
    root = await watched.fleet.root(100)
    await watched.freeze(root)
    assert await watched.alerter.round() is Round.NOTHING
    await watched.rule(await watched.fleet.root(100), amount=1)
    assert await watched.alerter.round() is Round.LOOKED
    await watched.freeze(root)
    lane = watched.store.lane_of(root)
    assert (await watched.store.alerting.standing()).progress.positions[lane] in (
        0,
        (await watched.store.positions())[lane],
    )


async def test_a_subtree_that_cannot_be_summed_up_is_looked_at_later_and_keeps_nothing_waiting(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await watched.fleet.root(100)
    await watched.rule(root, amount=10)
    await watched.look()
    await watched.rule(root, kind=FREEZE)
    await watched.spend(root, 10)
    await watched.freeze(root)
    with monkeypatch.context() as broken:

        async def give_up(*_: object) -> None:
            raise StoreUnavailable("a statement took too long")

        broken.setattr(module, "with_totals", give_up)
        assert [alert.kind for alert in await watched.look()] == [FREEZE]
    assert [alert.kind for alert in await watched.look()] == [USED]


async def test_alerts_and_their_deliveries_are_recorded_together_for_whom_they_concern(
    watched: Watched,
) -> None:
    root, elsewhere = [await watched.fleet.root(100) for _ in range(2)]
    child = await watched.child(root, 50)
    everything, of_root, of_child, of_other, ended = [
        await watched.webhook(*of) for of in ((), (root,), (root, child), (elsewhere,), ())
    ]
    await watched.store.alerting.end_webhook(ended.webhook_id, "admin", "deleted")
    await watched.rule(root, kind=FREEZE)
    await watched.rule(root, child, kind=FREEZE)
    await watched.freeze(root, child)
    await watched.look()
    numbers = {each.alert.budget_id: each.number for each in await watched.numbered()}
    deliveries = await watched.store.alerting.list_deliveries([], [], limit=100, after=None)
    to = {(delivery.webhook_id, delivery.number) for delivery, _ in deliveries}
    assert to == {
        (everything.webhook_id, numbers[root]),
        (everything.webhook_id, numbers[child]),
        (of_root.webhook_id, numbers[root]),
        (of_root.webhook_id, numbers[child]),
        (of_child.webhook_id, numbers[child]),
    }
    assert of_other.webhook_id not in {webhook_id for webhook_id, _ in to}


async def test_rules_and_webhooks_are_bounded_and_making_one_twice_is_making_it_once(
    watched: Watched,
) -> None:
    add = watched.store.alerting.add_rule
    root = await watched.fleet.root(100)
    rules = [await watched.wanted(root, amount=number) for number in range(1, RULES_MAX + 2)]
    for rule in rules[:RULES_MAX]:
        assert not isinstance(await add(rule), TooMany)
    assert await add(rules[RULES_MAX]) == TooMany("alert rules of a tree", RULES_MAX)
    again = await add(rules[0])
    assert not isinstance(again, TooMany)
    assert (again[0].amount, again[1]) == (1, True)
    await watched.store.alerting.end_rule(rules[0].rule_id, "admin")
    assert not isinstance(await add(rules[RULES_MAX]), TooMany)
    last = await watched.webhook()
    for _ in range(WEBHOOKS_MAX - 1):
        last = await watched.webhook()
    too_many = await watched.store.alerting.add_webhook(last._replace(webhook_id=new_id()))
    assert too_many == TooMany("webhooks", WEBHOOKS_MAX)


async def test_what_is_old_is_forgotten_from_the_beginning_and_with_its_deliveries(
    watched: Watched, database: str
) -> None:
    root = await watched.fleet.root(100)
    webhook = await watched.webhook()
    rule = await watched.rule(root, kind=FREEZE)
    for _ in range(3):
        await watched.freeze(root)
        await watched.look()
    await watched.store.alerting.end_rule(rule.rule_id, "admin")
    assert await watched.store.alerting.forget() == 0
    with psycopg.connect(database) as connection:
        connection.execute(
            "UPDATE alerts SET recorded_at = recorded_at - interval '91 days' WHERE number < 3"
        )
        connection.execute("UPDATE alert_rules SET deleted_at = deleted_at - interval '91 days'")
    assert await watched.store.alerting.forget() == 2
    assert [each.number for each in await watched.numbered()] == [3]
    deliveries = await watched.store.alerting.list_deliveries(
        [webhook.webhook_id], [], limit=10, after=None
    )
    assert [delivery.number for delivery, _ in deliveries] == [3]
    assert await watched.store.alerting.end_rule(rule.rule_id, "admin") is None
    assert await watched.store.alerting.recorded() == 3
