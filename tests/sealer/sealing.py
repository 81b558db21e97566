"""Sealers on a real database, and what is verified of what they have sealed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from peculium_server.core.checkpoint import Leaf, Sealed
from peculium_server.core.verify import Finding
from peculium_server.rpc.verifying import Verification
from peculium_server.sealer import Round, Sealer
from peculium_server.signing import SigningKey
from peculium_server.store.store import Store


@dataclass
class Sealing:
    """One server's sealer; it seals when it is told to, however short ago that was."""

    store: Store
    key: SigningKey
    sealer: Sealer
    reader: InMemoryMetricReader = field(repr=False)

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(
        cls, database: str, key: SigningKey, seconds: float = 0
    ) -> AsyncIterator[Self]:
        store = await Store.open(database)
        reader = InMemoryMetricReader()
        provider = MeterProvider([reader])
        try:
            yield cls(store, key, Sealer(store, key, seconds, provider), reader)
        finally:
            provider.shutdown()
            await store.close()

    async def seal_all(self) -> int:
        """Seal until everything is; how many checkpoints that took."""
        made = 0
        while True:
            match await self.sealer.round():
                case Round.MORE | Round.SEALED:
                    made += 1
                case Round.NOTHING:
                    return made
                case Round.OVERTAKEN:
                    pass

    async def checkpoints(self) -> list[Sealed]:
        kept = await self.store.seals.page(limit=10_000, after=None, descending=False)
        return [each.sealed for each in kept]

    async def leaves(self) -> list[list[Leaf]]:
        return [
            await self.store.seals.leaves(sealed.checkpoint.number)
            for sealed in await self.checkpoints()
        ]

    def gauge(self, name: str) -> float:
        data = self.reader.get_metrics_data()
        [value] = [
            point.value  # type: ignore[union-attr]
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]
        return value


async def found(store: Store, tree: bytes | None = None) -> list[Finding]:
    """What the online verification finds."""
    async with store.snapshot() as snapshot:
        verification = Verification(snapshot, store.lanes)
        async for _ in verification.run(tree):
            pass
    return verification.findings


def new_key(folder: Path, name: str = "key.pem") -> SigningKey:
    return SigningKey.make(folder / name)
