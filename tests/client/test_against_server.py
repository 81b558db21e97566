"""Both clients against a server of its own process, with a real database behind it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from itertools import islice
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

import peculium
from peculium import Balances, BudgetExhausted, BudgetState, Child, HoldState, Reach, Usage
from peculium.aio import Hold
from peculium.errors import PermissionDenied, Unauthenticated
from tests.server import RunningServer, StartServer

pytestmark = pytest.mark.timeout(180)


async def test_a_budget_is_granted_delegated_spent_and_verified(
    running_server: RunningServer,
) -> None:
    async with peculium.aio.connect(running_server.address) as client:
        await client.admin.grant("acme", unit="usd_nanos", amount=peculium.usd("10"), holder="dev")
        acme = await client.open("acme")
        [made] = await acme.delegate([Child("run", peculium.usd("5"), labels={"team": "x"})])
        run = await client.accept(made.capability.reveal())
        async with run.reserve(peculium.usd("0.5"), labels={"model": "m"}) as hold:
            await hold.settle(
                peculium.usd("0.2"),
                reference="call-1",
                usage=Usage(input_tokens=10, output_tokens=5, model="m"),
            )
        assert (await run.balances()).spent == peculium.usd("0.2")
        await run.give_back()
        info = await client.audit.budget("acme/run")
        assert (info.state, info.labels) == (BudgetState.CLOSED, {"team": "x"})
        assert [budget.path async for budget in client.audit.budgets("acme")] == [
            "acme",
            "acme/run",
        ]
        entries = [
            entry
            async for entry in client.audit.entries("acme", reach=peculium.Reach.TREE, page_size=3)
        ]
        assert [entry.kind for entry in entries if entry.part == 0] == [
            "GRANT",
            "DELEGATE",
            "ACCEPT",
            "RESERVE",
            "SETTLE",
            "RETURN",
        ]
        latest_first = [e async for e in client.audit.entries("acme/run", descending=True)]
        last = latest_first[0]
        assert (last.kind, last.actor) == ("RETURN", "dev")
        *_, verdict = [progress async for progress in client.audit.verify()]
        assert verdict.verified
        assert verdict.entries == len(entries)


async def test_concurrent_reserves_at_the_end_of_a_budget_get_their_true_answers(
    running_server: RunningServer,
) -> None:
    async with peculium.aio.connect(running_server.address) as client:
        made = await client.admin.grant("acme", unit="calls", amount=1000)
        acme = await client.accept(made.capability)
        await acme.spend(900)
        asked = await asyncio.gather(
            *(acme.reserve(1 + index % 9) for index in range(50)), return_exceptions=True
        )
        held = [each for each in asked if isinstance(each, Hold)]
        refused = [each for each in asked if isinstance(each, BudgetExhausted)]
        assert len(held) + len(refused) == 50
        assert sum(hold.amount for hold in held) == (await acme.balances()).held <= 100
        await asyncio.gather(*(hold.settle(1) for hold in held))
        assert await acme.holds() == []


async def test_leases_increments_and_more_time(running_server: RunningServer) -> None:
    async with peculium.aio.connect(running_server.address) as client:
        await client.admin.grant("acme", unit="calls", amount=1000, holder="dev")
        acme = await client.open("acme")
        async with acme.delegate_here(100, lease=3600, name="step") as step:
            async with step.reserve(50, ttl=60) as hold:
                await hold.extend(600)
                for _ in range(3):
                    receipt = await hold.settle(10, keep_open=True)
                    assert receipt.hold is not None
                    assert receipt.hold.state is HoldState.LIVE
                await hold.settle(5)
            await acme.fund(step.ref, 10)
            assert (await step.balances()).available == 75
        assert (await acme.balances()).available == 965


async def test_two_processes_worth_of_clients_share_a_principals_budget(
    running_server: RunningServer,
) -> None:
    async with peculium.aio.connect(running_server.address) as client:
        await client.admin.grant("acme", unit="calls", amount=100, holder="dev")

    def spend() -> None:
        with peculium.connect(running_server.address) as connection:
            acme = connection.open("acme")
            for _ in range(10):
                with acme.reserve(2) as hold:
                    hold.settle(1)

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    async with peculium.aio.connect(running_server.address) as client:
        assert (await (await client.open("acme")).balances()).spent == 40


async def test_an_operation_carries_its_callers_trace(running_server: RunningServer) -> None:
    context = SpanContext(
        0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B71, is_remote=False, trace_flags=TraceFlags(1)
    )
    async with peculium.aio.connect(running_server.address) as client:
        await client.admin.grant("acme", unit="calls", amount=100, holder="dev")
        acme = await client.open("acme")
        with trace.use_span(NonRecordingSpan(context)):
            await acme.spend(1)
        await acme.spend(2)
        traces = [entry.trace_id async for entry in client.audit.entries("acme")]
        assert traces == [None, "0af7651916cd43dd8448eb211c80319c", None]


async def test_roles_are_known_by_their_keys(
    start_server: StartServer, database: str, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    roles = {"ops": "admin", "svc": "agent", "eve": "agent"}
    keys.write_text(
        "".join(
            f'[[keys]]\nprincipal = "{name}"\nrole = "{role}"\n'
            f'sha256 = "{hashlib.sha256(f"key-of-{name}".encode()).hexdigest()}"\n'
            for name, role in roles.items()
        )
    )
    keys.chmod(0o600)
    server = start_server("--database-url", database, "--keys-file", str(keys))

    def connect(name: str | None) -> peculium.aio.Client:
        return peculium.aio.connect(server.address, api_key=name and f"key-of-{name}")

    async with connect("ops") as ops, connect("svc") as svc, connect("eve") as eve:
        await ops.admin.grant("acme", unit="calls", amount=100, holder="svc")
        acme = await svc.open("acme")
        with pytest.raises(peculium.CapabilityUnknown):
            await eve.open("acme")
        with pytest.raises(PermissionDenied):
            await svc.admin.top_up(acme.ref, 1)
        [made] = await acme.delegate([Child("run", 10, holder="svc", token=True)])
        text = made.capability.reveal()
        with pytest.raises(peculium.CapabilityUnknown):
            await eve.accept(text)
        run = await svc.accept(text)
        await run.spend(1)
        # The same thief, who has the live token's secret by whatever means.
        stolen = peculium.Capability(
            root_id=run.ref.root_id, budget_id=run.ref.budget_id, secret=run._line.secret or b""
        )
        with pytest.raises(peculium.CapabilityUnknown):
            await eve.accept(stolen)
        await run.spend(1)
    async with connect("nobody") as nobody:
        with pytest.raises(Unauthenticated):
            await nobody.open("acme")
    async with connect(None) as nobody:
        with pytest.raises(Unauthenticated):
            await nobody.accept(text)


async def test_agents_go_on_when_the_server_is_killed_and_started_again(
    start_server: StartServer, database: str
) -> None:
    server = start_server("--database-url", database)
    address, agents, calls = server.address, 8, 40
    half = asyncio.Event()
    done = 0

    async def agent(budget: peculium.aio.Budget) -> None:
        nonlocal done
        for _ in range(calls):
            async with budget.reserve(2) as hold:
                await hold.settle(1)
            done += 1
            if done >= agents * calls // 2:
                half.set()

    async with peculium.aio.connect(address, timeout=60) as client:
        await client.admin.grant("acme", unit="calls", amount=100_000, holder="dev")
        acme = await client.open("acme")
        made = await acme.delegate([Child(f"agent-{index}", 1000) for index in range(agents)])
        budgets = [await client.accept(each.capability) for each in made]
        working = asyncio.gather(*(agent(budget) for budget in budgets))
        await half.wait()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(start_server, "--database-url", database, listen=address)
        await working
        for budget in budgets:
            balances = await budget.balances()
            assert (balances.spent, balances.held) == (calls, 0)
        *_, verdict = [progress async for progress in client.audit.verify()]
        assert verdict.verified


def test_the_environment_says_where_the_ledger_is(
    running_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "PECULIUM_TARGET", running_server.address)
    with peculium.connect() as client:
        client.admin.grant("acme", unit="calls", amount=100, holder="dev")
        assert client.open("acme").balances().available == 100


async def test_what_was_spent_is_summed_up_attributed_and_followed(
    running_server: RunningServer,
) -> None:
    async with peculium.aio.connect(running_server.address) as client:
        watching = client.audit.watch("acme", from_beginning=True, timeout=30)
        await client.admin.grant("acme", unit="calls", amount=100, holder="dev")
        acme = await client.open("acme")
        [made] = await acme.delegate([Child("run", 50, labels={"team": "x"})])
        run = await client.accept(made.capability)
        async with run.reserve(10, labels={"run": "7"}) as hold:
            await hold.settle(4, usage=Usage(model="m", provider="p", input_tokens=3))
        await acme.spend(1)
        statement = await client.audit.statement("acme")
        assert statement.closing == Balances(100, 95, 0, 0, 5, 0, 0, 0)
        assert statement.unit == "calls"
        assert statement.until > statement.since
        assert [movement.kind for movement in statement.movements] == [
            "GRANT",
            "RESERVE",
            "SETTLE",
            "SPEND",
            "DELEGATE",
            "ACCEPT",
        ]
        later = await client.audit.statement("acme", since=statement.until)
        assert (later.opening, later.movements) == (statement.closing, ())
        alone = await client.audit.statement("acme", reach=Reach.BUDGET)
        assert alone.closing == Balances(100, 49, 0, 50, 1, 0, 0, 0)
        usage = await client.audit.usage("acme", ["label:team", "label:run", "model", "budget"])
        assert [(group.keys, group.spent) for group in usage.groups] == [
            (("", "", "", "acme"), 1),
            (("x", "7", "m", "acme/run"), 4),
        ]
        assert (usage.total.spent, usage.total.input_tokens) == (5, 3)
        followed: list[str] = []
        async for watched in watching:
            followed += [entry.kind for entry in watched.entries if entry.part == 0]
            if followed[-1:] == ["SPEND"]:
                break
        assert followed == ["GRANT", "DELEGATE", "ACCEPT", "RESERVE", "SETTLE", "SPEND"]


def test_both_clients_ask_alike(running_server: RunningServer) -> None:
    with peculium.connect(running_server.address) as client:
        client.admin.grant("acme", unit="calls", amount=100, holder="dev")
        client.open("acme").spend(3)
        assert client.audit.statement("acme").used_closing == 3
        assert client.audit.usage("acme", ["principal"]).groups[0].keys == ("dev",)
        watching = client.audit.watch(from_beginning=True, timeout=30)
        kinds = [entry.kind for watched in islice(watching, 2) for entry in watched.entries]
        assert kinds == ["GRANT", "SPEND"]
