"""Peculium, as an application has it: the SDK's transport for httpx under the provider's client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx

from peculium import BudgetRef, Child, Usage, aio
from peculium.aio import Budget, Client
from peculium.errors import PeculiumError
from peculium.httpx import AsyncTransport
from peculium.metering import Call as MeteredCall
from peculium_server.core.state import HoldState
from tests.bench.ledgers import HOLDER, Ledger, Postgres
from tests.faults.proxy import Proxy
from tests.replay.agents import CallFailed, Gate, Llm, Result, Seat, patience
from tests.replay.contestants import Contestant, proxied
from tests.replay.counters import restart
from tests.replay.plays import CHILD, PARENT, PARENTS_PARTS, PROCESSES, Custody, Scenario
from tests.replay.provider import Script
from tests.server import RunningServer, StartServer

_ASK_SECONDS_MAX = 20.0
"""How long the campaign itself waits for an answer."""


class ScriptPrices:
    """A token costs one unit, and a call at most what its agent expects."""

    def estimate(self, call: MeteredCall) -> int | None:
        """What the agent expects."""
        return Script.parsed(call.body["messages"][0]["content"]).estimate

    def cost(self, call: MeteredCall, usage: Usage, reported: Mapping[str, Any]) -> int:
        """What the provider tells."""
        del call, reported
        return usage.input_tokens + usage.output_tokens


_IN_TREE = (
    "FROM budgets r JOIN budgets b ON b.lane = r.lane AND b.root_id = r.root_id"
    " WHERE r.budget_id = r.root_id AND r.name = %s"
)


class Peculium(Contestant):
    """The ledger, through the SDK's transport for httpx."""

    name = "Peculium"
    title = "Peculium, through its transport for httpx"

    def __init__(self, postgres: Postgres, start: StartServer) -> None:
        super().__init__()
        self._postgres = postgres
        self._start_server = start
        self.ledger: Ledger | None = None
        self.servers: list[RunningServer] = []
        self._client: Client | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start two servers on one database; the second is for replicas only."""
        self.ledger = await asyncio.to_thread(Ledger.made, self._postgres, "replay")
        try:
            await self._serve()
            async with Proxy(self.servers[0].address, Random(0)) as self.proxy:
                yield
        finally:
            await self._stop()

    async def seats(self, trial: str, scenario: Scenario) -> Sequence[Seat]:
        """Grant a root that the agents' principal holds; below it a share for each process, if so."""
        client = await self.client()
        amount = scenario.cap * (PARENTS_PARTS if scenario.custody is Custody.COPIED else 1)
        await client.admin.grant(trial, unit="tokens", amount=amount, holder=HOLDER)
        addresses = [self.servers[0].address] * PROCESSES
        if proxied(scenario):
            assert self.proxy is not None
            addresses = [self.proxy.address] * PROCESSES
        elif scenario.custody is Custody.REPLICAS:
            addresses = [self.servers[process % 2].address for process in range(PROCESSES)]
        capabilities = await self._capabilities(await client.open(trial), scenario)
        return [
            PeculiumSeat(address, trial, capability, scenario.hold_seconds)
            for address, capability in zip(addresses, capabilities, strict=True)
        ]

    async def _capabilities(self, root: Budget, scenario: Scenario) -> Sequence[str | None]:
        """What each process is handed; None: it spends from the root, which its principal holds."""
        if scenario.custody is Custody.COPIED:
            return await self._copied(root, scenario.cap)
        shares = {Custody.SHARES: PROCESSES, Custody.GIVEN: PARENT, Custody.TWICE: 1}.get(
            scenario.custody, 0
        )
        if not shares:
            return [None] * PROCESSES
        made = await root.delegate(
            [
                Child(f"p{number}", scenario.cap // shares, lease=scenario.lease_seconds)
                for number in range(shares)
            ]
        )
        texts = [_revealed(child) for child in made]
        given = [texts[process % shares] for process in range(PROCESSES)]
        return [*given[:PARENT], None] if scenario.custody is Custody.GIVEN else given

    async def _copied(self, root: Budget, cap: int) -> Sequence[str | None]:
        """A parent accepts what it is handed, and delegates a share; others have what it was handed."""
        [handed] = await root.delegate([Child("parent", cap * PARENTS_PARTS)])
        copy = _revealed(handed)
        parent = await (await self.client()).accept(copy)
        [share] = await parent.delegate([Child("child", cap)])
        return [_revealed(share) if process == CHILD else copy for process in range(PROCESSES)]

    async def left(self, trial: str) -> int | None:
        """What is available in the root: shares that are not given back are not."""
        root = await (await self.client()).open(trial)
        return (await root.balances()).available

    async def held(self, trial: str) -> int:
        """What is in live holds, anywhere in the tree."""
        assert self.ledger is not None
        query = "SELECT coalesce(sum(b.held), 0) " + _IN_TREE
        rows = await asyncio.to_thread(self.ledger.fetch, query, (trial,))
        return int(rows[0][0])

    async def kill(self) -> None:
        """Kill the agents' server and PostgreSQL, and start them again where they were."""
        killed, *others = self.servers
        killed.kill()
        await asyncio.to_thread(restart, self._postgres)
        self.servers = []
        await self._serve([killed.address])
        self.servers += others

    async def revoke(self, trial: str) -> None:
        """Freeze it: calls in flight end as usual."""
        await (await self.client()).admin.freeze(trial, "cancelled")

    async def reconcile(self, trial: str, billed: int) -> None:
        """Say of holds that have lapsed what the bill says of all of them together."""
        assert self.ledger is not None
        spent = "SELECT coalesce(sum(b.spent), 0) " + _IN_TREE
        lapsed = (
            f"SELECT h.root_id, h.budget_id, h.hold_id, h.amount {_IN_TREE}"
            f" AND h.state = {HoldState.LAPSED:d} ORDER BY h.hold_id"
        ).replace(
            "WHERE", "JOIN holds h ON h.root_id = b.root_id AND h.budget_id = b.budget_id WHERE"
        )
        found = await asyncio.to_thread(self.ledger.fetch, lapsed, (trial,))
        if not found:
            return
        [[booked]] = await asyncio.to_thread(self.ledger.fetch, spent, (trial,))
        unexplained = max(0, billed - int(booked))
        admin = (await self.client()).admin
        for root, budget, hold, amount in found:
            actual = min(amount, unexplained)
            unexplained -= actual
            ref = BudgetRef("", root.bytes, budget.bytes)
            await admin.resolve(ref, hold.bytes, actual, "by the provider's bill")

    async def client(self) -> Client:
        """The campaign's own connection."""
        if self._client is None:
            self._client = aio.connect(self.servers[0].address, timeout=_ASK_SECONDS_MAX)
            await self._client.__aenter__()
        return self._client

    async def _serve(self, addresses: Sequence[str] = ("127.0.0.1:0", "127.0.0.1:0")) -> None:
        assert self.ledger is not None
        for address in addresses:
            server = await asyncio.to_thread(
                self._start_server,
                *("--database-url", self.ledger.dsn),
                listen=address,
            )
            self.servers.append(server)

    async def _stop(self) -> None:
        if self._client is not None:
            await self._client.close()
        for server in self.servers:
            await asyncio.to_thread(server.end)


def _revealed(child: Any) -> str:
    text: str = child.capability.reveal()
    return text


@dataclass(frozen=True)
class PeculiumSeat:
    """Where the ledger is, and which budget."""

    address: str
    path: str
    capability: str | None
    hold_seconds: float

    @asynccontextmanager
    async def sit(self, process: int) -> AsyncIterator[Gate]:
        """Open the budget by its name; or accept the share, and give back what is left of it."""
        del process
        client = await _connected(self.address)
        if self.capability is None:
            yield PeculiumGate(await client.open(self.path), self.hold_seconds)
            return
        try:
            share = await client.accept(self.capability)
        except PeculiumError:
            # Somebody else owns it: there is nothing to spend from.
            yield NothingGate()
            return
        yield PeculiumGate(share, self.hold_seconds)
        await share.give_back(cascade=True)


_clients: dict[str, Client] = {}


async def _connected(address: str) -> Client:
    if address not in _clients:
        client = _clients[address] = aio.connect(address, timeout=_ASK_SECONDS_MAX)
        await client.__aenter__()
    return _clients[address]


class PeculiumGate(Gate):
    """The transport reserves for each attempt, and settles."""

    def __init__(self, budget: Budget, hold_seconds: float) -> None:
        self._budget = budget
        self._hold_seconds = hold_seconds

    def transport(self, wire: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
        """Reserve before what is sent."""
        return AsyncTransport(
            ScriptPrices(),
            budget=self._budget,
            inner=wire,
            ttl=self._hold_seconds,
            timeout=patience.get(),
        )

    async def call(self, llm: Llm, script: Script, attempts: int, agent: str) -> Result:
        """Make a call, in as many attempts as the ledger permits."""
        del agent
        try:
            await llm.complete(script, attempts)
        except PeculiumError:
            return Result.REFUSED
        except CallFailed:
            return Result.FAILED
        return Result.DONE


class NothingGate(Gate):
    """Permits nothing."""

    async def call(self, llm: Llm, script: Script, attempts: int, agent: str) -> Result:
        """Refuse."""
        del llm, script, attempts, agent
        return Result.REFUSED
