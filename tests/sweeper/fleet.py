"""Agents who reserve and delegate on a real database, and leave the rest to the sweeper."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from peculium_server.core.batch import Request
from peculium_server.core.limits import CHILDREN_MAX, OPERATIONS_MAX, SECOND_US
from peculium_server.core.operations import (
    Actor,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Delegate,
    Grant,
    Kind,
    Operation,
    Reserve,
    Revoke,
    Role,
    Settle,
    Spend,
)
from peculium_server.core.outcome import Outcome
from peculium_server.core.state import Budget, Hold
from peculium_server.core.verify import Verifier
from peculium_server.lanes.ledger import Ledger
from peculium_server.store.store import Store
from peculium_server.sweeper import Sweeper
from tests.lanes.memory import new_token

AGENT = Actor("agent", Role.AGENT)
ADMIN = Actor("admin", Role.ADMIN)
SWEPT_SECONDS_MAX = 120


def new_id() -> bytes:
    """A UUIDv7 of now."""
    rest = bytearray(secrets.token_bytes(10))
    rest[0] = 0x70 | rest[0] & 0x0F
    rest[2] = 0x80 | rest[2] & 0x3F
    return (time.time_ns() // 1_000_000).to_bytes(6) + bytes(rest)


@dataclass
class Fleet:
    """One server's store, lanes and sweeper, and makers of what is to be swept.

    Every budget is held by `agent`, by name.
    """

    store: Store
    ledger: Ledger
    sweeper: Sweeper
    reader: InMemoryMetricReader
    tokens: dict[bytes, bytes] = field(default_factory=dict, repr=False)
    """Of holds, by id."""

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, database: str) -> AsyncIterator[Self]:
        store = await Store.open(database)
        ledger = Ledger(store, queue_rows_max=10_000)
        reader = InMemoryMetricReader()
        provider = MeterProvider([reader])
        try:
            yield cls(store, ledger, Sweeper(ledger, store, provider), reader)
            await ledger.drain()
        finally:
            provider.shutdown()
            await store.close()

    # -- Asking ---------------------------------------------------------------------------------

    async def ask(self, *operations: Operation) -> list[Outcome]:
        """Ask for operations as one request, all of which have to be accepted."""
        requests = [
            Request(each, ADMIN if isinstance(each.authority, ByRole) else AGENT, index)
            for index, each in enumerate(operations)
        ]
        outcomes = []
        for answer in await self.ledger.execute(requests, None):
            assert isinstance(answer.result, Outcome), answer.result
            outcomes.append(answer.result)
        return outcomes

    async def root(self, amount: int = 1_000_000, *, lane: int | None = None) -> bytes:
        root_id = new_id()
        while lane is not None and self.store.lane_of(root_id) != lane:
            root_id = new_id()
        await self.ask(
            Grant(
                operation_id=new_id(),
                root_id=root_id,
                budget_id=root_id,
                authority=ByRole(),
                name=f"root-{root_id.hex()}",
                unit="calls",
                amount=amount,
                holder=AGENT.principal,
            )
        )
        return root_id

    async def hold(self, root_id: bytes, amount: int = 1, **changes: Any) -> bytes:
        reserve = self.reserve(root_id, amount, **changes)
        await self.ask(reserve)
        return reserve.hold_id

    async def holds(self, root_id: bytes, count: int, **changes: Any) -> list[bytes]:
        """So many holds, of one second each if nothing else is said."""
        reserves = [self.reserve(root_id, **changes) for _ in range(count)]
        for first in range(0, count, OPERATIONS_MAX):
            await self.ask(*reserves[first : first + OPERATIONS_MAX])
        return [reserve.hold_id for reserve in reserves]

    def reserve(self, root_id: bytes, amount: int = 1, **changes: Any) -> Reserve:
        token = new_token()
        reserve = Reserve(
            operation_id=new_id(),
            root_id=root_id,
            budget_id=root_id,
            authority=ByHolder(),
            amount=amount,
            ttl_us=SECOND_US,
            hold_id=new_id(),
            hold_token_id=token,
        )
        self.tokens[reserve.hold_id] = token
        return replace(reserve, **changes)

    async def settle(self, root_id: bytes, hold_id: bytes, actual: int, **changes: Any) -> Outcome:
        settle = Settle(
            operation_id=new_id(),
            root_id=root_id,
            budget_id=root_id,
            authority=ByToken(self.tokens[hold_id]),
            hold_id=hold_id,
            actual=actual,
        )
        [outcome] = await self.ask(replace(settle, **changes))
        return outcome

    def spend(self, root_id: bytes, amount: int = 1) -> Spend:
        return Spend(
            operation_id=new_id(),
            root_id=root_id,
            budget_id=root_id,
            authority=ByHolder(),
            amount=amount,
        )

    async def children(
        self, root_id: bytes, parent_id: bytes, count: int, amount: int = 1, **changes: Any
    ) -> list[bytes]:
        children = [
            replace(
                Child(
                    budget_id=(budget_id := new_id()),
                    name=budget_id.hex(),
                    amount=amount,
                    holder=AGENT.principal,
                ),
                **changes,
            )
            for _ in range(count)
        ]
        for first in range(0, count, CHILDREN_MAX):
            await self.ask(
                Delegate(
                    operation_id=new_id(),
                    root_id=root_id,
                    budget_id=parent_id,
                    authority=ByHolder(),
                    children=tuple(children[first : first + CHILDREN_MAX]),
                )
            )
        return [child.budget_id for child in children]

    async def revoke(self, root_id: bytes, budget_id: bytes) -> Outcome:
        [outcome] = await self.ask(
            Revoke(
                operation_id=new_id(),
                root_id=root_id,
                budget_id=root_id,
                authority=ByHolder(),
                descendant_id=budget_id,
            )
        )
        return outcome

    # -- Looking ----------------------------------------------------------------------------------

    async def budget(self, root_id: bytes, budget_id: bytes | None = None) -> Budget:
        found, *_ = await self.store.budget(root_id, budget_id or root_id)
        return found

    async def holds_of(self, root_id: bytes, budget_id: bytes | None = None) -> dict[bytes, Hold]:
        page = await self.store.list_holds(root_id, budget_id or root_id, ended=True, limit=10_000)
        return {hold.hold_id: hold for hold in page.rows}

    async def verified(self, root_id: bytes) -> Counter[Kind]:
        """Verify a tree, and count its operations by kind."""
        verifier = Verifier(root_id)
        kinds: Counter[Kind] = Counter()
        async with self.store.snapshot() as snapshot:
            async for entry in snapshot.entries_in_order(root_id):
                verifier.entry(entry)
                kinds[entry.kind] += entry.part == 0
            async for budget in snapshot.budgets_of(root_id):
                verifier.budget(budget)
            async for hold in snapshot.holds_of(root_id):
                verifier.hold(hold)
        assert verifier.finish() is None
        return kinds

    # -- Sweeping ---------------------------------------------------------------------------------

    async def sweep_until(self, reached: Callable[[], Awaitable[bool]]) -> int:
        """Sweep, a round after the other, until something is so; how many rounds that took."""
        rounds = 0
        async with asyncio.timeout(SWEPT_SECONDS_MAX):
            while not await reached():
                swept = await self.sweeper.round()
                rounds += 1
                await asyncio.sleep(swept.wait_seconds if swept.more else 0.05)
        return rounds

    async def overdue(self) -> int:
        """How many holds and leases are over, and closed budgets are to be looked below."""
        total = 0
        for lane, due in enumerate(await self.store.due()):
            if due.hold is not None and due.hold <= due.now:
                total += len(await self.store.due_holds(lane, limit=100_000))
            if due.lease is not None and due.lease <= due.now:
                total += len(await self.store.due_leases(lane, limit=100_000))
            total += due.collections
        return total

    async def nothing_due(self) -> bool:
        return await self.overdue() == 0

    async def wait_until_due(self, count: int) -> None:
        """Let the database's clock pass the time of so many."""

        async def over() -> bool:
            return await self.overdue() >= count

        await until(over)

    def counted(self, kind: str, outcome: str) -> int:
        """Operations of the sweeper, as the metric tells them."""
        attributes = {"kind": kind, "outcome": outcome}
        return int(sum(self._points("peculium.sweeper.operations", attributes)))

    def lag(self, kind: str) -> float:
        [lag] = self._points("peculium.sweeper.lag", {"kind": kind})
        return lag

    def pending(self) -> int:
        [pending] = self._points("peculium.sweeper.pending", {})
        return int(pending)

    def _points(self, name: str, attributes: dict[str, str]) -> Sequence[float]:
        return [value for labels, value in points(self.reader, name) if labels == attributes]


def points(reader: InMemoryMetricReader, name: str) -> list[tuple[dict[str, Any], float]]:
    """The values of a metric, each with its labels."""
    data = reader.get_metrics_data()
    return [
        (dict(point.attributes or {}), point.value)  # type: ignore[union-attr]
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    ]


async def until(reached: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something is so, asking again and again."""
    async with asyncio.timeout(SWEPT_SECONDS_MAX):
        while not await reached():  # noqa: ASYNC110 - the database tells no event
            await asyncio.sleep(0.05)
