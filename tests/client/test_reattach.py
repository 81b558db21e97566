"""Holds whose handles are lost get new ones; whoever has the older ones is fenced."""

from __future__ import annotations

import asyncio
import secrets

import pytest

import peculium
from peculium import FENCE, Child, HoldState, TokenConsumed
from peculium._limits import ROTATIONS_MAX
from peculium.aio import Budget, Client, Hold
from peculium.errors import CapabilityMoved, CapabilityUnknown, HoldUnknown, NotTokenHeld
from tests.client.ledger import PRINCIPAL, Ledger


@pytest.fixture
async def lost(run: Budget) -> list[Hold]:
    """Holds of a process that is gone."""
    return [await run.reserve(10 + number) for number in range(3)]


async def test_every_hold_gets_a_handle_that_settles_or_releases_it(
    ledger: Ledger, client: Client, run: Budget, lost: list[Hold]
) -> None:
    again = await client.recover("acme/run")
    first, second, third = await again.reattach()
    assert [hold.hold_id for hold in (first, second, third)] == [hold.hold_id for hold in lost]
    assert [hold.amount for hold in (first, second, third)] == [10, 11, 12]
    await first.settle(4)
    await second.release()
    async with third:
        pass
    assert ledger.live_holds("acme/run") == []
    balances = await again.balances()
    assert (balances.spent, balances.held, balances.available) == (16, 0, 84)
    assert await again.reattach() == []


async def test_who_had_the_older_handle_is_fenced(
    client: Client, run: Budget, lost: list[Hold]
) -> None:
    again = await client.claim("acme/run", if_held=FENCE)
    await again.reattach()
    with pytest.raises(TokenConsumed) as caught:
        await lost[0].settle(1)
    assert caught.value.fenced_by == PRINCIPAL


async def test_the_budget_itself_goes_on(client: Client, run: Budget, lost: list[Hold]) -> None:
    """Its own token is renewed with those of the holds, in order with what else it does."""
    again = await client.recover("acme/run")
    one, held, other = await asyncio.gather(again.spend(1), again.reattach(), again.spend(2))
    assert len(held) == 3
    assert {one.balances.spent, other.balances.spent} == {1, 3}
    await again.spend(3)


async def test_only_those_that_are_named_get_handles(
    client: Client, run: Budget, lost: list[Hold]
) -> None:
    again = await client.recover("acme/run")
    listed = await again.holds()
    [hold] = await again.reattach([listed[1]])
    assert hold.hold_id == lost[1].hold_id
    await lost[0].settle(1)
    await hold.settle(1)


async def test_one_that_its_older_handle_ends_meanwhile_is_left_out(
    ledger: Ledger, client: Client, run: Budget, lost: list[Hold]
) -> None:
    again = await client.recover("acme/run")
    listed = await again.holds()
    await lost[1].settle(1)
    handles = await again.reattach(listed)
    assert [hold.hold_id for hold in handles] == [lost[0].hold_id, lost[2].hold_id]
    for hold in handles:
        await hold.release()
    assert ledger.live_holds("acme/run") == []


async def test_a_hold_that_has_lapsed_can_be_settled_late(
    ledger: Ledger, client: Client, run: Budget, lost: list[Hold]
) -> None:
    ledger.ahead_us = 3_600_000_000
    ledger.lapse(lost[0].hold_id)
    again = await client.recover("acme/run")
    first, *_ = await again.reattach()
    assert first.info.state is HoldState.LAPSED
    await first.settle(3)
    balances = await again.balances()
    assert (balances.forfeited, balances.spent) == (0, 3)


async def test_more_than_one_recovery_can_rotate_are_rotated_by_several(
    ledger: Ledger, client: Client, root: Budget
) -> None:
    count = ROTATIONS_MAX + 3
    [made] = await root.delegate([Child("wide", count)])
    wide = await client.accept(made.capability)
    await asyncio.gather(*(wide.reserve(1) for _ in range(count)))
    again = await client.recover(made.ref)
    handles = await again.reattach()
    assert len({hold.hold_id for hold in handles}) == count
    await asyncio.gather(*(hold.settle() for hold in handles))
    assert (await again.balances()).spent == count


async def test_an_answer_that_is_lost_is_found_out(
    ledger: Ledger, client: Client, run: Budget, lost: list[Hold]
) -> None:
    again = await client.recover("acme/run")
    ledger.lose_answers(2)
    handles = await again.reattach()
    await asyncio.gather(*(hold.settle(1) for hold in handles), again.spend(1))
    assert (await again.balances()).spent == 4


async def test_a_hold_that_there_is_not_is_unknown(
    client: Client, run: Budget, lost: list[Hold]
) -> None:
    info = lost[0].info
    nobodys = peculium.HoldInfo(
        secrets.token_bytes(16),
        info.budget_id,
        info.state,
        1,
        1,
        0,
        0,
        info.created_at,
        info.expires_at,
    )
    with pytest.raises(HoldUnknown):
        await run.reattach([nobodys])
    await run.spend(1)


async def test_holds_of_a_principals_budget_are_resolved_instead(
    ledger: Ledger, client: Client, root: Budget
) -> None:
    await root.reserve(10)
    await root.reserve(20)
    with pytest.raises(NotTokenHeld):
        await root.reattach()
    successor = await client.open("acme")
    for hold in await successor.holds():
        await successor.resolve(hold.hold_id, 7, "the bill says so")
    assert ledger.live_holds("acme") == []
    assert (await successor.balances()).spent == 14


async def test_who_is_not_the_holder_reattaches_nothing(
    ledger: Ledger, run: Budget, lost: list[Hold]
) -> None:
    ledger.principal = "somebody-else"
    with pytest.raises(CapabilityUnknown):
        await run.reattach([lost[0].info])


async def test_a_dead_handle_reattaches_nothing(run: Budget, lost: list[Hold]) -> None:
    await run.hand_over()
    with pytest.raises(CapabilityMoved):
        await run.reattach()


def test_threads_reattach_as_tasks_do(
    ledger: Ledger, blocking: peculium.Client, blocking_run: peculium.Budget
) -> None:
    blocking_run.reserve(10)
    again = blocking.recover("acme/run")
    [hold] = again.reattach(unbilled=(ValueError,))
    with pytest.raises(ValueError, match="refused"), hold:
        raise ValueError("refused")
    assert again.balances().available == 100
