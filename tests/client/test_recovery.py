"""Each row of the recovery profile is shown by a test: those of a network and of processes are here.

A real server with a real database behind it, and a proxy in between that does what networks do.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from peculium import (
    FENCE,
    BudgetClosed,
    BudgetExpired,
    Child,
    LedgerUnavailable,
    OutcomeUnknown,
    TokenConsumed,
)
from peculium.aio import Budget, Client, connect
from tests.client.ledger import Fault, Ledger
from tests.faults.proxy import Faults, Proxy
from tests.server import RunningServer

pytestmark = pytest.mark.timeout(180)

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "recovery.md"
SECONDS_MAX = 60
"""No test waits so long for something that happens."""

DYING = """
import sys
import peculium

target, path, how = sys.argv[1:]
client = peculium.connect(target, timeout=60)
budget = client.claim(path, if_held=peculium.FENCE) if how == "token" else client.open(path)
holds = [budget.reserve(10) for _ in range(3)]
holds[0].settle(4)
print("in flight", flush=True)
sys.stdin.readline()
budget.reserve(7)
print("answered", flush=True)
sys.stdin.readline()
"""


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something is so."""
    over = time.monotonic() + SECONDS_MAX
    while not await condition():
        assert time.monotonic() < over, "it never came to be so"
        await asyncio.sleep(0.01)


@pytest.fixture
async def proxy(running_server: RunningServer) -> AsyncIterator[Proxy]:
    async with Proxy(running_server.address, Random(1)) as running:  # noqa: S311 - faults by seed
        yield running


@pytest.fixture
async def observer(running_server: RunningServer) -> AsyncIterator[Client]:
    """A client whose own way to the ledger is in order."""
    async with connect(running_server.address, timeout=SECONDS_MAX) as connected:
        await connected.admin.grant("acme", unit="calls", amount=1000, holder="dev")
        yield connected


@pytest.fixture(params=["token", "principal"])
async def how(request: pytest.FixtureRequest, observer: Client) -> str:
    """How the budget acme/run of a hundred calls is held, by which the rest goes by."""
    acme = await observer.open("acme")
    by_token = request.param == "token"
    await acme.delegate([Child("run", 100, holder="dev", token=by_token)])
    return str(request.param)


@pytest.fixture
async def far(proxy: Proxy) -> AsyncIterator[Client]:
    """A client behind the proxy."""
    async with connect(proxy.address, timeout=SECONDS_MAX) as connected:
        yield connected


@pytest.fixture
async def far_run(far: Client, how: str) -> Budget:
    return await taken(far, how)


async def taken(client: Client, how: str) -> Budget:
    if how == "token":
        return await client.claim("acme/run", if_held=FENCE)
    return await client.open("acme/run")


async def kinds(observer: Client) -> list[str]:
    """What was done to the budget, in order, but for taking it over."""
    return [
        entry.kind
        async for entry in observer.audit.entries("acme/run")
        if entry.part == 0 and entry.kind not in {"DELEGATE", "RECOVER"}
    ]


async def verified(observer: Client) -> bool:
    *_, verdict = [progress async for progress in observer.audit.verify()]
    return bool(verdict.verified)


# --- the network ---


async def test_a_request_that_the_network_loses_is_sent_again(
    proxy: Proxy, observer: Client, far_run: Budget
) -> None:
    proxy.trouble(up=Faults(swallow=True))
    spending = asyncio.create_task(far_run.spend(10))

    async def lost() -> bool:
        return proxy.cuts > 0

    await until(lost)
    assert await kinds(observer) == []
    await proxy.heal()
    receipt = await spending
    assert not receipt.replayed
    assert await kinds(observer) == ["SPEND"]


async def test_an_answer_that_the_network_loses_is_asked_for_again(
    proxy: Proxy, observer: Client, far_run: Budget
) -> None:
    proxy.trouble(down=Faults(swallow=True))
    spending = asyncio.create_task(far_run.spend(10))

    async def done() -> bool:
        return await kinds(observer) == ["SPEND"]

    await until(done)
    assert not spending.done()
    await proxy.heal()
    receipt = await spending
    assert receipt.replayed
    assert receipt.balances.spent == 10
    assert await kinds(observer) == ["SPEND"]


async def test_a_reserve_that_nobody_waits_for_any_more_is_released_once_it_is_found(
    proxy: Proxy, observer: Client, far_run: Budget
) -> None:
    proxy.trouble(down=Faults(swallow=True))
    with pytest.raises(OutcomeUnknown):
        await far_run.reserve(90, timeout=1)

    async def held() -> bool:
        return (await observer.audit.budget("acme/run")).holds_live == 1

    await until(held)
    await proxy.heal()
    # The next verb finds out first; what it found is given back behind it.
    assert (await far_run.spend(5)).balances.spent == 5

    async def released() -> bool:
        return (await observer.audit.budget("acme/run")).balances.available == 95

    await until(released)
    assert sorted(await kinds(observer)) == ["RELEASE", "RESERVE", "SPEND"]


async def test_a_settle_that_nobody_waits_for_any_more_happens_once(
    proxy: Proxy, observer: Client, far_run: Budget
) -> None:
    hold = await far_run.reserve(50)
    proxy.trouble(up=Faults(swallow=True))
    with pytest.raises(OutcomeUnknown):
        await hold.settle(30, timeout=1)
    await proxy.heal()

    async def settled() -> bool:
        return (await observer.audit.budget("acme/run")).balances.spent == 30

    await until(settled)
    # Asked again, it finds out; there is nothing left to book.
    assert (await hold.settle(30)).balances.spent == 30
    assert await kinds(observer) == ["RESERVE", "SETTLE"]


async def test_a_ledger_that_cannot_be_reached_permits_nothing_and_is_found_again(
    proxy: Proxy, observer: Client, far_run: Budget
) -> None:
    await proxy.refuse()
    proxy.reset()

    async def unreachable() -> bool:
        try:
            await far_run.reserve(10, timeout=0.5)
        except LedgerUnavailable:
            return True
        except OutcomeUnknown:
            # Sent before the connection was seen to be gone.
            return False
        return False

    await until(unreachable)
    await proxy.heal()
    hold = await far_run.reserve(10)
    await hold.settle(10)
    assert (await observer.audit.budget("acme/run")).balances.spent == 10

    async def quiet() -> bool:
        return (await observer.audit.budget("acme/run")).balances.available == 90

    await until(quiet)


async def test_a_request_that_the_network_delivers_in_pieces_and_late_is_one_request(
    proxy: Proxy, observer: Client, far_run: Budget
) -> None:
    proxy.trouble(up=Faults(slice_bytes=7, latency_seconds=0.01), down=Faults(slice_bytes=3))
    holds = await asyncio.gather(*(far_run.reserve(5) for _ in range(5)))
    await asyncio.gather(*(hold.settle(1) for hold in holds))
    balances = (await observer.audit.budget("acme/run")).balances
    assert (balances.spent, balances.held) == (5, 0)


# --- processes ---


@contextlib.contextmanager
def dying(target: str, how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds acme/run, has settled one hold, and has two in flight."""
    process = subprocess.Popen(
        [sys.executable, "-c", DYING, target, "acme/run", how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


async def test_what_a_process_left_that_died_before_it_sent_is_settled_by_its_successor(
    running_server: RunningServer, observer: Client, how: str
) -> None:
    with dying(running_server.address, how) as process:
        assert await asyncio.to_thread(said, process) == "in flight"
        process.kill()
        process.wait()
    await succeed(observer, how, [10, 10])
    assert await verified(observer)


async def test_what_a_process_left_that_died_before_the_answer_came_is_settled_by_its_successor(
    proxy: Proxy, observer: Client, how: str
) -> None:
    with dying(proxy.address, how) as process:
        assert await asyncio.to_thread(said, process) == "in flight"
        proxy.trouble(down=Faults(swallow=True))
        go_on(process)

        async def committed() -> bool:
            return (await observer.audit.budget("acme/run")).holds_live == 3

        await until(committed)
        process.kill()
        process.wait()
        assert said(process) == ""
    await succeed(observer, how, [10, 10, 7])
    assert await verified(observer)


async def succeed(client: Client, how: str, left: list[int]) -> None:
    """End what the process left: the first was billed, the second was not, of others nobody knows."""
    run = await taken(client, how)
    found = await run.holds()
    assert [hold.amount for hold in found] == left
    if how == "token":
        billed, unbilled, *_ = await run.reattach()
        await billed.settle(6)
        await unbilled.release()
    else:
        await run.resolve(found[0].hold_id, 6, "the bill says so")
        await run.resolve(found[1].hold_id, 0, "it was never sent")
    rest = sum(left[2:])
    balances = await run.balances()
    assert (balances.spent, balances.held, balances.available) == (10, rest, 90 - rest)
    # What is known of nobody is left to lapse: it can still be settled, and nothing else is held.
    assert [hold.amount for hold in await run.holds()] == left[2:]


async def test_a_process_that_was_only_thought_dead_is_fenced(
    running_server: RunningServer, observer: Client
) -> None:
    acme = await observer.open("acme")
    [made] = await acme.delegate([Child("job", 100, holder="dev", token=True)])
    async with connect(running_server.address) as slow:
        zombie = await slow.claim(made.ref, if_held=FENCE)
        hold, other = await zombie.reserve(10), await zombie.reserve(10)
        successor = await observer.claim(made.ref, if_held=FENCE)
        [info] = [each for each in await successor.holds() if each.hold_id == hold.hold_id]
        [taken_over] = await successor.reattach([info])
        with pytest.raises(TokenConsumed) as caught:
            await zombie.reserve(1)
        assert caught.value.fenced_by == "dev"
        with pytest.raises(TokenConsumed):
            await hold.settle(5)
        # What nobody took over is the zombie's own to settle: its call may have been billed.
        await other.settle(5)
        await taken_over.settle(5)
        assert (await successor.balances()).spent == 10


# --- what happens meanwhile ---


async def test_an_operation_that_is_delivered_once_more_happens_once(
    ledger: Ledger, root: Budget, run: Budget
) -> None:
    for budget in (root, run):
        hold = await budget.reserve(10)
        await hold.settle(4)
        await budget.spend(1)
    recorded = ledger.recorded()
    before = [ledger.budget(path).money for path in ("acme", "acme/run")]
    for request in list(ledger.batches):
        for result in ledger.answer(request).results:
            assert result.outcome.replayed
    assert ledger.recorded() == recorded
    assert [ledger.budget(path).money for path in ("acme", "acme/run")] == before
    await run.spend(1)


async def test_a_hold_that_lapsed_while_its_settle_was_unknown_is_settled_late(
    ledger: Ledger, root: Budget, run: Budget
) -> None:
    for budget in (root, run):
        hold = await budget.reserve(10, ttl=60)
        gate = ledger.hold_up(done=False)
        with pytest.raises(OutcomeUnknown):
            await hold.settle(4, timeout=0.2)
        ledger.ahead_us += 61_000_000
        ledger.lapse(hold.hold_id)
        assert gate.until is not None
        gate.until.set()
        assert (await hold.settle(4)).balances.forfeited == 0
        assert (await budget.balances()).spent == 4


async def test_a_budget_that_was_revoked_while_a_reserve_was_unknown_still_settles(
    ledger: Ledger, root: Budget, run: Budget
) -> None:
    cut = Fault(done=True, until=threading.Event())
    ledger.faults.append(cut)
    reserving = asyncio.create_task(run.reserve(10))
    await asyncio.to_thread(cut.reached.wait, 10)
    await root.revoke(run.ref)
    assert cut.until is not None
    cut.until.set()
    hold = await reserving
    assert hold.receipt.replayed
    await hold.settle(4)
    assert ledger.budget("acme/run").money.spent == 4
    with pytest.raises(BudgetClosed):
        await run.reserve(1)
    assert (await root.balances()).available == 996


async def test_a_lease_that_ended_while_a_reserve_was_unknown_leaves_no_hold(
    ledger: Ledger, client: Client, root: Budget
) -> None:
    [made] = await root.delegate([Child("leased", 100, lease=60)])
    leased = await client.accept(made.capability)
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        await leased.reserve(10, timeout=0.2)
    ledger.ahead_us = 61_000_000
    assert gate.until is not None
    gate.until.set()
    with pytest.raises(BudgetExpired):
        await leased.reserve(1)
    await client.close()
    assert ledger.live_holds("acme/leased") == []


async def test_a_client_that_closes_finishes_what_is_on_its_way(
    ledger: Ledger, client: Client, root: Budget
) -> None:
    hold = await root.reserve(10)
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        await hold.settle(4, timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    await client.close()
    assert ledger.live_holds("acme") == []
    assert ledger.budget("acme").money.spent == 4


# --- the page ---


def rows() -> list[list[str]]:
    """The rows of the page's tables, by cell."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] != "what happens"]


def functions_of(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    }


def named(row: list[str]) -> list[str]:
    return re.findall(r"`(test_\w+)`", row[-1])


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_row_of_the_profile_is_shown_by_a_test(row: list[str]) -> None:
    assert named(row), "a row names the tests that show it"
    assert all(row)
    here, system = Path(__file__).parent, Path(__file__).parents[1] / "system"
    files = (*here.glob("test_*.py"), system / "test_restore.py")
    there = {name for path in files for name in functions_of(path)}
    assert set(named(row)) <= there


def test_every_test_of_this_file_is_named_by_a_row_of_the_profile() -> None:
    of_the_page = {
        test_every_row_of_the_profile_is_shown_by_a_test.__name__,
        test_every_test_of_this_file_is_named_by_a_row_of_the_profile.__name__,
    }
    told = {name for row in rows() for name in named(row)}
    assert functions_of(Path(__file__)) - told == of_the_page
