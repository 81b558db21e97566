"""One worker holds a job's budget at any time, however often a queue delivers the job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

import peculium
from peculium import FENCE, SKIP, BudgetClosed, BudgetHeld, Child, TokenConsumed
from peculium.aio import Budget, Client, connect
from peculium.capability import BudgetRef
from peculium.errors import (
    BudgetChanged,
    BudgetExpired,
    CapabilityUnknown,
    NotTokenHeld,
    OutcomeUnknown,
)
from tests.client.ledger import PRINCIPAL, Ledger, Serving
from tests.server import RunningServer


@pytest.fixture
async def other(served: Serving) -> AsyncIterator[Client]:
    """Another process of the same principal."""
    async with connect(served.target) as connected:
        yield connected


@pytest.fixture
async def job(root: Budget) -> BudgetRef:
    """A budget of a hundred calls that nobody has taken yet."""
    [made] = await root.delegate([Child("job", 100, holder=PRINCIPAL, token=True)])
    return made.ref


async def test_the_first_of_two_gets_what_nobody_holds(
    client: Client, other: Client, job: BudgetRef
) -> None:
    budget = await client.claim("acme/job", if_held=SKIP)
    await budget.spend(1)
    with pytest.raises(BudgetHeld) as caught:
        await other.claim(job, if_held=SKIP)
    assert caught.value.budget == "acme/job"
    assert caught.value.used_at is not None
    assert (await budget.spend(1)).balances.spent == 2


@pytest.mark.parametrize("how", ["accept", "recover"])
async def test_who_accepted_or_recovered_holds_it_without_having_spent(
    client: Client, other: Client, root: Budget, how: str
) -> None:
    [made] = await root.delegate([Child("job", 100, holder=PRINCIPAL, token=True)])
    await (client.accept(made.capability) if how == "accept" else client.recover(made.ref))
    with pytest.raises(BudgetHeld):
        await other.claim(made.ref, if_held=SKIP)


async def test_who_fences_takes_over_from_whoever_holds_it(
    client: Client, other: Client, job: BudgetRef
) -> None:
    older = await client.claim(job, if_held=FENCE)
    newer = await other.claim(job, if_held=FENCE)
    with pytest.raises(TokenConsumed) as caught:
        await older.spend(1)
    assert caught.value.fenced_by == PRINCIPAL
    assert (await newer.spend(1)).balances.spent == 1


async def test_what_its_owner_above_does_to_it_does_not_make_it_held(
    client: Client, root: Budget, job: BudgetRef
) -> None:
    await root.fund(job, 50)
    await client.admin.freeze(job)
    await client.admin.unfreeze(job)
    budget = await client.claim(job, if_held=SKIP)
    assert (await budget.balances()).available == 150


async def test_of_many_who_have_all_seen_it_free_one_gets_it(
    served: Serving, job: BudgetRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [connect(served.target, timeout=60) for _ in range(8)]
    everybody = asyncio.Barrier(len(clients))

    def looks_with_all(client: Client) -> None:
        look = client._look

        async def look_once_with_all(*args: Any) -> Any:
            found = await look(*args)
            monkeypatch.setattr(client, "_look", look)
            await everybody.wait()
            return found

        monkeypatch.setattr(client, "_look", look_once_with_all)

    for each in clients:
        looks_with_all(each)
    told = await asyncio.gather(
        *(each.claim(job, if_held=SKIP) for each in clients), return_exceptions=True
    )
    assert sum(isinstance(each, Budget) for each in told) == 1
    assert sum(isinstance(each, BudgetHeld) for each in told) == len(clients) - 1
    for each in clients:
        await each.close()


async def test_a_budget_that_its_owner_changes_between_look_and_claim_is_looked_at_again(
    ledger: Ledger, client: Client, root: Budget, job: BudgetRef
) -> None:
    before = len(ledger.batches)
    gate = ledger.hold_up(done=False)
    claim = asyncio.create_task(client.claim(job, if_held=SKIP))
    await asyncio.to_thread(ledger.wait_for_batches, before + 1)
    await root.fund(job, 50)
    assert gate.until is not None
    # The answer is one without results: the recovery is sent again, and is too late by then.
    gate.until.set()
    budget = await claim
    assert (await budget.balances()).available == 150


async def test_looking_again_is_bounded(
    ledger: Ledger, client: Client, job: BudgetRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner that funds it for ever does not keep its claimant for ever."""
    look = client._look

    async def look_before_a_change(*args: Any) -> Any:
        found = await look(*args)
        await client.admin.freeze(job)
        return found

    monkeypatch.setattr(client, "_look", look_before_a_change)
    with pytest.raises(BudgetChanged):
        await client.claim(job, if_held=SKIP)


async def test_what_was_not_used_for_long_counts_as_free_if_one_says_so(
    ledger: Ledger, client: Client, other: Client, job: BudgetRef
) -> None:
    budget = await client.claim(job, if_held=SKIP)
    hold = await budget.reserve(10)
    ledger.ahead_us = 120_000_000
    with pytest.raises(BudgetHeld) as caught:
        await other.claim(job, if_held=SKIP, idle=60)
    assert caught.value.holds_live == 1
    await hold.settle(1)
    with pytest.raises(BudgetHeld):
        await other.claim(job, if_held=SKIP, idle=60)
    ledger.ahead_us += 59_000_000
    with pytest.raises(BudgetHeld):
        await other.claim(job, if_held=SKIP, idle=timedelta(seconds=60))
    ledger.ahead_us += 1_000_000
    await other.claim(job, if_held=SKIP, idle=60)
    with pytest.raises(TokenConsumed):
        await budget.spend(1)


async def test_a_job_that_is_done_is_told_as_closed(
    client: Client, other: Client, root: Budget, job: BudgetRef
) -> None:
    budget = await client.claim(job, if_held=SKIP)
    await budget.give_back()
    for if_held in (FENCE, SKIP):
        with pytest.raises(BudgetClosed):
            await other.claim(job, if_held=if_held)


async def test_a_job_whose_lease_has_ended_is_told_as_expired(
    ledger: Ledger, client: Client, root: Budget
) -> None:
    child = Child("job", 100, holder=PRINCIPAL, token=True, lease=60)
    [made] = await root.delegate([child])
    ledger.ahead_us = 61_000_000
    with pytest.raises(BudgetExpired):
        await client.claim(made.ref, if_held=FENCE)


async def test_what_is_held_by_its_principal_is_not_claimed(client: Client, root: Budget) -> None:
    for if_held in (FENCE, SKIP):
        with pytest.raises(NotTokenHeld):
            await client.claim("acme", if_held=if_held)


async def test_what_is_anothers_is_not_claimed(client: Client, root: Budget) -> None:
    [made] = await root.delegate([Child("job", 100, holder="somebody-else", token=True)])
    for if_held in (FENCE, SKIP):
        with pytest.raises(CapabilityUnknown):
            await client.claim(made.ref, if_held=if_held)


async def test_an_unknown_claim_is_found_out_by_claiming_again(
    ledger: Ledger, client: Client, other: Client, job: BudgetRef
) -> None:
    gate = ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        await client.claim(job, if_held=SKIP, timeout=0.2)
    assert gate.until is not None
    gate.until.set()
    with pytest.raises(BudgetHeld):
        await other.claim(job, if_held=SKIP)
    budget = await client.claim(job, if_held=SKIP)
    assert (await budget.spend(1)).balances.spent == 1


async def test_an_unknown_claim_that_somebody_else_forestalled_is_told_as_held(
    ledger: Ledger, client: Client, other: Client, job: BudgetRef
) -> None:
    gate = ledger.hold_up(done=False)
    claiming = asyncio.create_task(client.claim(job, if_held=SKIP, timeout=2))
    # Once the claim's time is over it is pursued, and would be the first.
    assert await asyncio.to_thread(gate.reached.wait, 10)
    await other.claim(job, if_held=SKIP)
    with pytest.raises(OutcomeUnknown):
        await claiming
    assert gate.until is not None
    gate.until.set()
    with pytest.raises(BudgetHeld):
        await client.claim(job, if_held=SKIP)


def test_threads_claim_as_tasks_do(
    blocking: peculium.Client, blocking_root: peculium.Budget
) -> None:
    [made] = blocking_root.delegate([Child("job", 100, holder=PRINCIPAL, token=True)])
    budget = blocking.claim(made.ref, if_held=SKIP)
    budget.spend(1)
    with pytest.raises(BudgetHeld):
        blocking.claim(made.ref, if_held=SKIP)
    blocking.claim(made.ref, if_held=FENCE).spend(1)


@pytest.mark.timeout(120)
async def test_of_many_workers_at_a_real_ledger_one_gets_each_job(
    running_server: RunningServer,
) -> None:
    jobs, workers = 10, 8
    async with connect(running_server.address) as owner:
        await owner.admin.grant("acme", unit="calls", amount=1000, holder="dev")
        acme = await owner.open("acme")
        made = await acme.delegate(
            [Child(f"job-{number}", 10, holder="dev", token=True) for number in range(jobs)]
        )
        clients = [connect(running_server.address, timeout=60) for _ in range(workers)]
        told = await asyncio.gather(
            *(each.claim(job.ref, if_held=SKIP) for job in made for each in clients),
            return_exceptions=True,
        )
        for number in range(jobs):
            of_job = told[number * workers : (number + 1) * workers]
            got = [each for each in of_job if isinstance(each, Budget)]
            assert len(got) == 1
            assert sum(isinstance(each, BudgetHeld) for each in of_job) == workers - 1
            await got[0].spend(10)
        assert (await acme.balances()).delegated == jobs * 10
        for each in clients:
            await each.close()
