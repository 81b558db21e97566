from __future__ import annotations

import asyncio
import copy
import pickle

import pytest

import peculium
from peculium import (
    BudgetExhausted,
    BudgetRef,
    CapabilityMoved,
    CapabilityUnknown,
    Child,
    Custody,
    Invalid,
    NotCopyable,
    TokenConsumed,
)
from peculium.aio import Budget, Client, Hold
from peculium.errors import (
    BudgetClosed,
    DescendantUnknown,
    LiveHolds,
    Malformed,
    NameTaken,
    NotForRoots,
    NotTokenHeld,
    OpenChildren,
)
from tests.client.ledger import Ledger, Serving


async def test_a_principal_opens_its_budget_by_its_path(client: Client, root: Budget) -> None:
    info = await root.info()
    assert (info.path, info.unit, info.custody) == ("acme", "calls", Custody.PRINCIPAL)
    assert info.balances.available == 1000
    assert str(root) == "<Budget acme>"


async def test_what_is_not_there_or_anothers_is_unknown(client: Client, root: Budget) -> None:
    with pytest.raises(CapabilityUnknown) as caught:
        await client.open("acme/nothing")
    assert caught.value.budget == "acme/nothing"


async def test_a_budget_that_is_held_by_token_is_not_opened(client: Client, run: Budget) -> None:
    with pytest.raises(Invalid, match="accept its capability, or recover it"):
        await client.open("acme/run")


async def test_fifty_concurrent_reserves_travel_in_a_handful_of_requests(
    ledger: Ledger, run: Budget
) -> None:
    before = len(ledger.batches)
    asked = await asyncio.gather(
        *(run.reserve(1 + index % 7) for index in range(50)), return_exceptions=True
    )
    assert len(ledger.batches) - before <= 2
    held = [each for each in asked if isinstance(each, Hold)]
    refused = [each for each in asked if isinstance(each, BudgetExhausted)]
    assert len(held) + len(refused) == 50
    assert refused, "some do not fit"
    assert sum(hold.amount for hold in held) <= 100
    assert all(each.available < each.requested for each in refused)
    assert ledger.budget("acme/run").money.held == sum(hold.amount for hold in held)


async def test_fifty_concurrent_settles_of_different_holds_travel_together(
    ledger: Ledger, run: Budget
) -> None:
    holds = await asyncio.gather(*(run.reserve(2) for _ in range(50)))
    before = len(ledger.batches)
    await asyncio.gather(*(hold.settle(1) for hold in holds))
    assert len(ledger.batches) - before <= 2
    assert (await run.balances()).spent == 50


async def test_one_reserve_is_one_request_with_one_operation(ledger: Ledger, root: Budget) -> None:
    before = len(ledger.batches)
    await root.reserve(5)
    assert [len(batch.operations) for batch in ledger.batches[before:]] == [1]


async def test_a_refusal_says_what_there_is_and_what_would_help(root: Budget) -> None:
    await root.reserve(900)
    with pytest.raises(BudgetExhausted) as caught:
        await root.reserve(200)
    error = caught.value
    assert (error.available, error.held, error.requested) == (100, 900, 200)
    assert error.remedy == "wait_for_holds"
    assert error.budget == "acme"
    assert error.operation_id is not None
    assert error.operation_id in str(error)


async def test_money_is_spent_at_once(root: Budget) -> None:
    receipt = await root.spend(30, reference="invoice 7", labels={"team": "research"})
    assert (receipt.balances.available, receipt.balances.spent) == (970, 30)
    with pytest.raises(BudgetExhausted):
        await root.spend(971)


async def test_a_dry_run_decides_and_does_nothing(ledger: Ledger, run: Budget) -> None:
    hold = await run.reserve(60, dry_run=True)
    assert hold.receipt.dry_run
    with pytest.raises(CapabilityMoved, match="dry run"):
        await hold.settle(1)
    async with run.reserve(60, dry_run=True):
        pass
    with pytest.raises(BudgetExhausted):
        await run.reserve(101, dry_run=True)
    assert (await run.spend(1, dry_run=True)).dry_run
    assert (await run.balances()).available == 100


# --- delegating ---


async def test_children_are_made_together_and_handed_over(client: Client, root: Budget) -> None:
    made = await root.delegate(
        [Child("a", 10, labels={"kind": "agent"}), Child("b", 20, holder="dev")]
    )
    assert [each.name for each in made] == ["a", "b"]
    assert [each.granted for each in made] == [10, 20]
    assert made[0].ref.path == "acme/a"
    child = await client.accept(made[0].capability.reveal())
    info = await child.info()
    assert (info.path, dict(info.labels), info.holder) == ("acme/a", {"kind": "agent"}, "dev")
    with pytest.raises(Invalid, match="not made here"):
        _ = made[1].capability
    assert (await (await client.open("acme/b")).balances()).available == 20
    assert (await root.balances()).delegated == 30


async def test_children_are_made_all_or_none(root: Budget) -> None:
    await root.delegate([Child("a", 10)])
    with pytest.raises(NameTaken) as caught:
        await root.delegate([Child("b", 10), Child("a", 10)])
    assert caught.value.name == "a"
    with pytest.raises(BudgetExhausted):
        await root.delegate([Child("c", 500), Child("d", 500)])
    assert (await root.balances()).delegated == 10


async def test_a_child_may_be_made_for_a_receiver_whose_secret_the_sender_never_knows(
    client: Client, root: Budget
) -> None:
    receiver = client.receiver()
    [made] = await root.delegate([Child("theirs", 10, receiver=receiver.token_id)])
    with pytest.raises(Invalid):
        _ = made.capability
    child = await client.accept(receiver.capability(made.ref))
    assert (await child.balances()).available == 10


async def test_only_the_named_principal_may_accept(
    ledger: Ledger, client: Client, root: Budget
) -> None:
    [made] = await root.delegate([Child("theirs", 10, holder="somebody", token=True)])
    capability = made.capability
    with pytest.raises(CapabilityUnknown):
        await client.accept(capability)
    ledger.principal = "somebody"
    assert (await (await client.accept(capability)).balances()).available == 10


async def test_a_dry_run_of_a_delegation_gives_no_capability(root: Budget) -> None:
    [made] = await root.delegate([Child("a", 10)], dry_run=True)
    assert made.receipt.dry_run
    with pytest.raises(Invalid):
        _ = made.capability


async def test_a_capability_is_accepted_once(client: Client, root: Budget) -> None:
    [made] = await root.delegate([Child("a", 10)])
    text = made.capability.reveal()
    await client.accept(made.capability)
    with pytest.raises(CapabilityMoved, match=r"accepted at .*test_budget\.py:\d+"):
        await client.accept(made.capability)
    with pytest.raises(TokenConsumed) as caught:
        await client.accept(text)
    assert caught.value.consumed_at is not None


async def test_a_capability_that_was_refused_is_still_there(
    ledger: Ledger, client: Client, root: Budget
) -> None:
    [made] = await root.delegate([Child("a", 10)])
    capability = made.capability
    await root.revoke(made.ref)
    with pytest.raises(BudgetClosed):
        await client.accept(capability)
    assert capability.reveal()


async def test_a_block_has_a_child_of_its_own_and_gives_back_what_is_left(root: Budget) -> None:
    async with root.delegate_here(100, name="step") as step:
        await step.spend(30)
        assert str(step.ref) == "acme/step"
        assert (await root.balances()).delegated == 100
    balances = await root.balances()
    assert (balances.available, balances.delegated) == (970, 30)
    with pytest.raises(CapabilityMoved, match="given back"):
        await step.spend(1)


async def test_an_exception_in_the_block_is_what_is_raised(root: Budget) -> None:
    with pytest.raises(KeyError):
        async with root.delegate_here(100):
            raise KeyError
    assert (await root.balances()).available == 1000


async def test_a_block_gives_back_although_its_own_holds_are_live(root: Budget) -> None:
    async with root.delegate_here(100) as step:
        hold = await step.reserve(40)
    assert (await root.balances()).available == 960
    await hold.settle(10)
    assert (await root.balances()).available == 990


async def test_a_child_that_left_its_block_is_not_given_back(client: Client, root: Budget) -> None:
    async with root.delegate_here(100, name="step") as step:
        capability = await step.hand_over()
    assert (await root.balances()).delegated == 100
    assert (await (await client.accept(capability)).balances()).available == 100


async def test_a_cancelled_block_gives_back_in_the_background(
    served: Serving, client: Client, root: Budget
) -> None:
    entered = asyncio.Event()

    async def block() -> None:
        async with root.delegate_here(100):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await client.close()
    assert served.ledger.budget("acme").money.available == 1000


async def test_more_money_is_moved_to_a_budget_below(client: Client, root: Budget) -> None:
    [made] = await root.delegate([Child("a", 10)])
    await root.fund(made.ref, 5)
    child = await client.accept(made.capability)
    assert (await child.balances()).available == 15
    with pytest.raises(DescendantUnknown):
        await root.fund(BudgetRef("", made.ref.root_id, bytes(16)), 5)


async def test_money_is_given_back_in_part_and_whole(root: Budget, run: Budget) -> None:
    receipt = await run.give_back(40)
    assert (receipt.balances.available, receipt.returned) == (60, 40)
    hold = await run.reserve(5)
    with pytest.raises(LiveHolds) as caught:
        await run.give_back()
    assert (caught.value.holds_live, caught.value.held) == (1, 5)
    await hold.release()
    assert (await run.give_back()).returned == 60
    with pytest.raises(CapabilityMoved, match=r"given back at .*test_budget\.py:\d+"):
        await run.reserve(1)
    assert (await root.balances()).available == 1000


async def test_giving_back_with_children_open_needs_cascade(root: Budget, run: Budget) -> None:
    await run.delegate([Child("below", 10)])
    with pytest.raises(OpenChildren) as caught:
        await run.give_back()
    assert caught.value.child
    await run.give_back(cascade=True)
    assert (await root.balances()).available == 1000


async def test_a_root_is_not_given_back(root: Budget) -> None:
    with pytest.raises(NotForRoots):
        await root.give_back()
    assert not root.moved
    await root.spend(1)


async def test_a_closed_budget_says_so(client: Client, root: Budget, run: Budget) -> None:
    await root.revoke(run.ref)
    with pytest.raises(BudgetClosed):
        await run.reserve(1)


# --- where the authority is ---


async def test_authority_is_handed_over_and_the_handle_is_dead(
    ledger: Ledger, client: Client, run: Budget
) -> None:
    capability = await run.hand_over()
    before = len(ledger.batches)
    for use in (
        lambda: run.reserve(1),
        lambda: run.spend(1),
        lambda: run.delegate([Child("x", 1)]),
        run.info,
        run.holds,
        run.give_back,
        run.hand_over,
        lambda: run.revoke(run.ref),
        run.recover,
    ):
        with pytest.raises(CapabilityMoved, match=r"handed over at .*test_budget\.py:\d+") as moved:
            await use()
        assert moved.value.budget == "acme/run"
    assert len(ledger.batches) == before, "nothing was sent"
    assert run._line.secret is None, "the secret has left with the capability"
    again = await client.accept(capability)
    assert (await again.balances()).available == 100


async def test_authority_is_handed_over_after_what_is_on_its_way(
    client: Client, run: Budget
) -> None:
    reserving = asyncio.gather(*(run.reserve(1) for _ in range(5)))
    await asyncio.sleep(0)
    capability = await run.hand_over()
    assert len(await reserving) == 5
    again = await client.accept(capability)
    assert (await again.balances()).held == 5


async def test_a_principals_budget_is_not_handed_over(root: Budget) -> None:
    with pytest.raises(NotTokenHeld):
        await root.hand_over()
    await root.spend(1)


async def test_handles_are_not_copied_or_pickled(root: Budget) -> None:
    hold = await root.reserve(1)
    for handle in (root, hold):
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(NotCopyable, match="BudgetRef"):
                attempt(handle)
    assert pickle.loads(pickle.dumps(root.ref)) == root.ref  # noqa: S301 - our own


async def test_a_lost_budget_is_recovered_and_the_older_handle_is_fenced(
    client: Client, run: Budget
) -> None:
    hold = await run.reserve(10)
    again = await client.recover("acme/run")
    with pytest.raises(TokenConsumed) as caught:
        await run.reserve(1)
    assert caught.value.fenced_by == "dev"
    [found] = await again.holds()
    assert found.hold_id == hold.hold_id
    receipt = await again.resolve(found.hold_id, 4, "the process died")
    assert receipt.balances.spent == 4
    by_ref = await client.recover(again.ref)
    assert (await by_ref.balances()).available == 96
    await run.recover()
    assert (await run.balances()).available == 96
    with pytest.raises(TokenConsumed):
        await by_ref.spend(1)


async def test_a_principals_budget_is_not_recovered(client: Client, root: Budget) -> None:
    with pytest.raises(NotTokenHeld):
        await client.recover("acme")


async def test_all_pages_of_holds_are_listed_in_order(root: Budget, run: Budget) -> None:
    for budget in (root, run):
        made = [await budget.reserve(1) for _ in range(5)]
        found = await budget.holds()
        assert [hold.hold_id for hold in found] == [hold.hold_id for hold in made]
        assert all(hold.amount == hold.remaining == 1 for hold in found)


# --- mistakes cost no call ---


@pytest.mark.parametrize("amount", [0, -1, 2**62, 1.5, True, "1", None], ids=repr)
async def test_an_amount_that_is_none_is_refused_before_anything_is_sent(
    ledger: Ledger, root: Budget, amount: int
) -> None:
    before = len(ledger.batches)
    with pytest.raises(Malformed) as caught:
        await root.reserve(amount)
    assert caught.value.field == "amount"
    with pytest.raises(Malformed):
        await root.spend(amount)
    assert len(ledger.batches) == before


async def test_a_budget_travels_through_code_that_does_not_know_it(root: Budget) -> None:
    async def deep_inside() -> None:
        await peculium.current().spend(1)

    with pytest.raises(peculium.errors.NoCurrentBudget):
        peculium.current()
    with peculium.use(root) as used:
        assert used is root
        await asyncio.gather(deep_inside(), deep_inside())
        async with root.delegate_here(10) as inner:
            with peculium.use(inner):
                await deep_inside()
            assert peculium.current() is root
    with pytest.raises(LookupError):
        peculium.current()
    assert (await root.balances()).spent == 2


async def test_a_closed_client_says_so(client: Client, root: Budget) -> None:
    await client.close()
    await client.close()
    with pytest.raises(Invalid, match="closed"):
        await root.spend(1)


async def test_a_client_stays_on_its_event_loop(client: Client, root: Budget) -> None:
    def elsewhere() -> None:
        asyncio.run(root.spend(1))

    with pytest.raises(Invalid, match="another event loop"):
        await asyncio.to_thread(elsewhere)
    await root.spend(1)
