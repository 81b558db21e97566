"""A fleet that dies, is cut off, repeats itself and comes late: the cap holds, and nothing is stranded.

Sixteen agents in four processes spend from one budget. The provider's bill is kept beside the ledger,
and everything is compared with that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random

import pytest

from peculium import (
    Balances,
    BudgetClosed,
    BudgetExhausted,
    Child,
    HoldState,
    TokenConsumed,
    Unavailable,
    aio,
)
from peculium.aio import Budget, Client
from peculium.v1 import ledger_service_pb2 as ledger
from tests.faults.proxy import Faults, Proxy
from tests.server import RunningServer
from tests.system.fleet import ACTUAL, AGENTS, ESTIMATE, Fleet, fleet
from tests.system.wire import Told, Wire, delegated, granted, header
from tests.system.world import LEDGER

pytestmark = pytest.mark.timeout(180)

CAP = 700
"""More than all holds at once, less than two rounds of them."""
LET_THROUGH_BYTES = 400
"""Of the answers of a connection, before it is cut."""
WAIT_SECONDS_MAX = 60
SHORT = 1.0
"""The least that a hold or a lease lives, in seconds."""
LONG = 600.0


@pytest.fixture
async def client(running_server: RunningServer) -> AsyncIterator[Client]:
    async with aio.connect(running_server.address, timeout=30) as connected:
        yield connected
        verdicts = [progress async for progress in connected.audit.verify()]
        assert verdicts[-1].verified


@pytest.fixture
async def root(client: Client) -> Budget:
    await client.admin.grant("cap", unit="calls", amount=CAP, holder="dev")
    return await client.open("cap")


@pytest.fixture
def agents(running_server: RunningServer, root: Budget) -> Iterator[Fleet]:
    with fleet(running_server.address, "cap") as running:
        yield running


def chance() -> Random:
    return Random(7)  # noqa: S311 - repeatable, and guards nothing


async def until(budget: Budget, reached: Callable[[Balances], bool]) -> Balances:
    """Wait until the ledger has done by itself what it has to do."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while True:
            balances = await budget.balances()
            if reached(balances):
                return balances
            await asyncio.sleep(0.05)


async def spend_all(budget: Budget) -> int:
    """Make calls, one after the other, until the next one is refused; how many."""
    admitted = 0
    with contextlib.suppress(BudgetExhausted):
        while True:
            hold = await budget.reserve(ESTIMATE)
            await hold.settle(ACTUAL)
            admitted += 1
    return admitted


# --- agents that die ---


async def test_what_agents_held_that_died_before_their_calls_is_given_back_by_who_knows_it(
    root: Budget, agents: Fleet
) -> None:
    assert await agents.all("reserve", SHORT) == AGENTS
    agents.die()
    balances = await until(root, lambda money: money.held == 0)
    # The ledger cannot know that nothing was billed, so it gives nothing back by itself.
    assert (balances.forfeited, balances.available) == (AGENTS * ESTIMATE, CAP - AGENTS * ESTIMATE)
    assert agents.billed == 0
    for hold in await root.holds():
        assert hold.state is HoldState.LAPSED
        await root.resolve(hold.hold_id, 0, "the provider's log has no such call")
    balances = await root.balances()
    assert (balances.available, balances.forfeited, balances.spent) == (CAP, 0, 0)
    assert await root.holds() == []


async def test_what_agents_have_called_that_died_before_they_settled_is_never_spent_again(
    root: Budget, agents: Fleet
) -> None:
    await agents.all("reserve", SHORT)
    await agents.all("call")
    agents.die()
    balances = await until(root, lambda money: money.held == 0)
    assert balances.forfeited == AGENTS * ESTIMATE
    # What is left is all that anybody can spend: with what was billed, it stays below the cap.
    admitted = await spend_all(root)
    assert agents.billed + admitted * ACTUAL <= CAP
    # Whoever reads the bill knows better than the ledger, and the rest comes back.
    for hold in await root.holds():
        await root.resolve(hold.hold_id, ACTUAL, "by the provider's bill")
    balances = await root.balances()
    assert balances.spent == agents.billed + admitted * ACTUAL
    assert (balances.held, balances.forfeited) == (0, 0)
    assert balances.available == CAP - balances.spent


async def test_a_parent_that_dies_leaves_its_children_and_its_money_to_its_lease(
    client: Client, root: Budget
) -> None:
    """The parent is a bearer's token that dies with its process; nobody can ask for it again."""
    [lead] = await root.delegate([Child("lead", 600, lease=3.0)])
    parent = await client.accept(lead.capability)
    team = [
        await client.accept(made.capability)
        for made in await parent.delegate([Child(f"child-{number}", 100) for number in range(4)])
    ]
    holds = [await child.reserve(ESTIMATE) for child in team]
    # From here on nobody speaks for the parent. Its children finish what they have begun.
    balances = await until(root, lambda money: money.available == CAP - 4 * ESTIMATE)
    assert balances.delegated == 4 * ESTIMATE
    with pytest.raises(BudgetClosed):
        await team[0].reserve(1)
    for hold in holds:
        await hold.settle(ACTUAL)
    balances = await root.balances()
    assert (balances.available, balances.delegated) == (CAP - 4 * ACTUAL, 4 * ACTUAL)
    assert [(await child.balances()).spent for child in team] == [ACTUAL] * 4


async def test_children_that_were_never_given_back_make_room_when_their_leases_end(
    root: Budget,
) -> None:
    slot, slots = CAP // 10, 10
    await root.delegate([Child(f"lost-{number}", slot, lease=SHORT) for number in range(slots)])
    with pytest.raises(BudgetExhausted):
        await root.delegate([Child("one-more", slot, lease=LONG)])
    await until(root, lambda money: money.available == CAP)
    await root.delegate([Child(f"next-{number}", slot, lease=LONG) for number in range(slots)])


# --- links that are cut ---


async def test_answers_that_get_lost_lead_to_no_second_effect(
    running_server: RunningServer, client: Client, root: Budget
) -> None:
    async with (
        Proxy(running_server.address, chance()) as link,
        aio.connect(link.address, timeout=60) as cut_off,
    ):
        budget = await cut_off.open("cap")
        spending = asyncio.gather(*(spend_all(budget) for _ in range(AGENTS)))
        await lose_answers(link, spending)
        calls = sum(await spending)
    assert link.cuts > 0
    billed = calls * ACTUAL
    balances = await root.balances()
    assert (balances.spent, balances.held) == (billed, 0)
    assert balances.available < ESTIMATE
    kinds = [entry.kind async for entry in client.audit.entries("cap")]
    assert kinds.count("SETTLE") == calls
    assert kinds.count("RESERVE") == kinds.count("SETTLE") + kinds.count("RELEASE")


async def lose_answers(link: Proxy, spending: asyncio.Future[list[int]]) -> None:
    """Let requests through and cut their answers off in the middle, for as long as anybody spends."""
    cut = 0
    while not spending.done():
        link.trouble(down=Faults(cut_after_bytes=LET_THROUGH_BYTES))
        while link.cuts == cut and not spending.done():
            await asyncio.wait((spending,), timeout=0.02)
        cut = link.cuts
        await link.heal()
        # Where answers are longer than what is let through, somebody has to get one all the same.
        enough = link.carried["down"] + 4 * LET_THROUGH_BYTES
        while link.carried["down"] < enough and not spending.done():
            await asyncio.wait((spending,), timeout=0.02)


async def test_an_agent_that_is_cut_off_has_no_permission_to_spend(
    running_server: RunningServer, root: Budget
) -> None:
    async with (
        Proxy(running_server.address, chance()) as link,
        aio.connect(link.address, timeout=60) as cut_off,
    ):
        budget = await cut_off.open("cap")
        link.trouble(up=Faults(held=True), down=Faults(held=True))
        for _ in range(3):
            with pytest.raises(Unavailable):
                await budget.reserve(ESTIMATE, timeout=0.3)
        await link.heal()
        # What the ledger got to know of these afterwards is undone, not lost.
        hold = await budget.reserve(ESTIMATE)
        await hold.settle(ACTUAL)
        await until(root, lambda money: money.held == 0)
    balances = await root.balances()
    assert (balances.spent, balances.available) == (ACTUAL, CAP - ACTUAL)


# --- what comes late, or to the wrong place ---


async def test_a_settle_that_comes_late_takes_nothing_that_was_lent_on(root: Budget) -> None:
    hold = await root.reserve(ESTIMATE, ttl=SHORT)
    await until(root, lambda money: money.forfeited == ESTIMATE)
    [heir] = await root.delegate([Child("heir", CAP - ESTIMATE)])
    receipt = await hold.settle(ESTIMATE + 10)
    # More than it held, and its budget has nothing left: the tree owes it, the heir keeps its own.
    assert (receipt.balances.spent, receipt.balances.overrun) == (ESTIMATE + 10, 10)
    assert receipt.balances.forfeited == 0
    assert heir.granted == CAP - ESTIMATE
    assert receipt.balances.delegated == CAP - ESTIMATE


async def test_a_settle_after_its_budget_and_the_parent_were_closed_pays_the_nearest_open_one(
    client: Client, root: Budget
) -> None:
    [lead] = await root.delegate([Child("lead", 300)])
    parent = await client.accept(lead.capability)
    [run] = await parent.delegate([Child("run", 200)])
    child = await client.accept(run.capability)
    lapsed, live = await child.reserve(60, ttl=SHORT), await child.reserve(60)
    await until(child, lambda money: money.forfeited == 60)
    await root.revoke(parent.ref)
    await until(root, lambda money: money.available == CAP - 120)
    await lapsed.settle(10)
    await live.settle(20)
    balances = await root.balances()
    assert (balances.available, balances.delegated) == (CAP - 30, 30)
    for closed in (parent, child):
        money = (await client.audit.budget(closed.ref)).balances
        assert (money.available, money.held, money.forfeited, money.granted) == (0, 0, 0, 30)


async def test_of_a_capability_that_reaches_many_hosts_one_copy_works_and_a_fence_ends_it(
    running_server: RunningServer, root: Budget
) -> None:
    [made] = await root.delegate([Child("job", 100, holder="dev", token=True)])
    assert made.capability is not None
    copied = made.capability.reveal()
    clients = [aio.connect(running_server.address, timeout=30) for _ in range(8)]
    answers = await asyncio.gather(
        *(client.accept(copied) for client in clients), return_exceptions=True
    )
    winners = [answer for answer in answers if isinstance(answer, Budget)]
    assert len(winners) == 1
    assert sum(isinstance(answer, TokenConsumed) for answer in answers) == len(clients) - 1
    # Another host takes over on the principal's word: the first one's next call is its last.
    successor = await clients[0].recover(made.ref)
    with pytest.raises(TokenConsumed) as fenced:
        await winners[0].reserve(ESTIMATE)
    assert fenced.value.fenced_by == "dev"
    await (await successor.reserve(ESTIMATE)).settle(ACTUAL)
    await asyncio.gather(*(client.close() for client in clients))


def test_two_budgets_that_are_returned_into_each_others_tree_stay_where_they_are(
    wire: Wire,
) -> None:
    trees = [granted(wire, name, CAP) for name in ("here", "there")]
    runs = [delegated(wire, tree, "run", 100) for tree in trees]
    for run, other in zip(runs, reversed(trees), strict=True):
        swapped = ledger.ReturnRequest(
            header=header(other.root_id, run.budget_id, run.proof), all=True, cascade=True
        )
        told = wire.send(LEDGER + "Return", swapped)
        assert isinstance(told, Told)
        assert told.reason == "CAPABILITY_UNKNOWN"
    for run in runs:
        wire.ledger.Return(ledger.ReturnRequest(header=run.header(), all=True))
    budgets = wire.budgets()
    assert [budgets[name].balances.available for name in ("here", "there")] == [CAP, CAP]
    assert wire.verified()
