"""Alerters on a real database, rules for them, and what they have found."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Self

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from peculium_server.alerter import Alerter, Round
from peculium_server.core.alerts import Alert, AlertKind, Numbered, Rule, Webhook
from peculium_server.core.operations import (
    ByHolder,
    ByRole,
    Child,
    Delegate,
    Freeze,
    Resolve,
    Spend,
    TopUp,
    Unfreeze,
)
from peculium_server.store.store import Store
from tests.sweeper.fleet import AGENT, Fleet, new_id, points

URL = "https://receiver.example/hook"


@dataclass
class Watched:
    """One server's alerter, whose rules are made without a call; it looks whenever it is told to."""

    store: Store
    fleet: Fleet
    alerter: Alerter
    provider: MeterProvider
    reader: InMemoryMetricReader

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, database: str, fleet: Fleet, seconds: float = 0) -> AsyncIterator[Self]:
        store = await Store.open(database)
        reader = InMemoryMetricReader()
        provider = MeterProvider([reader])
        try:
            yield cls(store, fleet, Alerter(store, seconds, provider), provider, reader)
        finally:
            await store.close()
            provider.shutdown()

    # -- What is watched for ----------------------------------------------------------------------

    async def rule(
        self,
        root_id: bytes,
        budget_id: bytes | None = None,
        kind: AlertKind = AlertKind.USED,
        **said: Any,
    ) -> Rule:
        made = await self.store.alerting.add_rule(
            await self.wanted(root_id, budget_id, kind, **said)
        )
        assert isinstance(made, tuple)
        rule, replayed = made
        assert not replayed
        assert isinstance(rule, Rule)
        return rule

    async def wanted(
        self,
        root_id: bytes,
        budget_id: bytes | None = None,
        kind: AlertKind = AlertKind.USED,
        **said: Any,
    ) -> Rule:
        line = await self.store.budget(root_id, budget_id or root_id)
        lane = self.store.lane_of(root_id)
        standing = await self.store.standing(lane)
        rule = Rule(
            rule_id=new_id(),
            lane=lane,
            root_id=root_id,
            budget_id=line[0].budget_id,
            line=tuple(budget.budget_id for budget in line),
            path="/".join(budget.name for budget in reversed(line)),
            unit=line[0].unit,
            kind=kind,
            basis_points=0,
            amount=0,
            since=standing.position,
            created_at=standing.now,
            created_by="admin",
            due=kind is AlertKind.USED,
        )
        return rule._replace(**said)

    async def webhook(
        self, root_id: bytes | None = None, budget_id: bytes | None = None, url: str = URL
    ) -> Webhook:
        wanted = Webhook(
            new_id(), url, root_id, (budget_id and budget_id) or root_id, "", 0, "admin"
        )
        made = await self.store.alerting.add_webhook(wanted)
        assert isinstance(made, tuple)
        webhook, replayed = made
        assert not replayed
        assert isinstance(webhook, Webhook)
        return webhook

    # -- What happens -----------------------------------------------------------------------------

    async def spend(self, root_id: bytes, amount: int, budget_id: bytes | None = None) -> None:
        await self.fleet.ask(
            Spend(
                operation_id=new_id(),
                root_id=root_id,
                budget_id=budget_id or root_id,
                authority=ByHolder(),
                amount=amount,
            )
        )

    async def top_up(self, root_id: bytes, amount: int) -> None:
        await self.fleet.ask(
            TopUp(
                operation_id=new_id(),
                root_id=root_id,
                budget_id=root_id,
                authority=ByRole(),
                amount=amount,
            )
        )

    async def freeze(self, root_id: bytes, budget_id: bytes | None = None) -> bytes:
        freeze = Freeze(
            operation_id=new_id(),
            root_id=root_id,
            budget_id=budget_id or root_id,
            authority=ByRole(),
            reason="a person's words",
        )
        await self.fleet.ask(freeze)
        return freeze.operation_id

    async def unfreeze(self, root_id: bytes, budget_id: bytes | None = None) -> None:
        await self.fleet.ask(
            Unfreeze(
                operation_id=new_id(),
                root_id=root_id,
                budget_id=budget_id or root_id,
                authority=ByRole(),
            )
        )

    async def child(
        self, root_id: bytes, amount: int, parent_id: bytes | None = None, name: str = "child"
    ) -> bytes:
        child = Child(
            budget_id=new_id(), name=name, amount=amount, holder=AGENT.principal, overrun_factor=1
        )
        await self.fleet.ask(
            Delegate(
                operation_id=new_id(),
                root_id=root_id,
                budget_id=parent_id or root_id,
                authority=ByHolder(),
                children=(child,),
            )
        )
        return child.budget_id

    async def settled(
        self, root_id: bytes, amount: int, actual: int, budget_id: bytes | None = None
    ) -> bytes:
        """A hold that was settled: its id."""
        at = budget_id or root_id
        hold_id = await self.fleet.hold(root_id, amount, budget_id=at, ttl_us=600_000_000)
        await self.fleet.settle(root_id, hold_id, actual, budget_id=at)
        return hold_id

    async def resolve(self, root_id: bytes, hold_id: bytes, actual: int) -> None:
        await self.fleet.ask(
            Resolve(
                operation_id=new_id(),
                root_id=root_id,
                budget_id=(await self._of_hold(root_id, hold_id)),
                authority=ByRole(),
                hold_id=hold_id,
                actual=actual,
                reason="the bill says so",
            )
        )

    async def _of_hold(self, root_id: bytes, hold_id: bytes) -> bytes:
        async with self.store.snapshot() as snapshot:
            async for hold in snapshot.holds_of(root_id):
                if hold.hold_id == hold_id:
                    return hold.budget_id
        raise AssertionError("there is no such hold")

    # -- What was found ---------------------------------------------------------------------------

    async def look(self) -> list[Alert]:
        """Look until everything was looked at; what was found by that."""
        before = await self.store.alerting.recorded()
        while await self.alerter.round() in (Round.MORE, Round.OVERTAKEN):
            pass
        return [each.alert for each in await self.numbered(after=before)]

    def counted(self, metric: str) -> dict[tuple[str, ...], float]:
        """What was counted so far, by the values of its labels, where that is anything."""
        found = {tuple(labels.values()): value for labels, value in points(self.reader, metric)}
        return {labels: value for labels, value in found.items() if value}

    async def numbered(self, after: int = 0) -> list[Numbered]:
        return await self.store.alerting.list_alerts(None, after=after, limit=100_000)
