from __future__ import annotations

import pytest

from peculium import BudgetFrozen, CapabilityUnknown, Custody, LedgerUnavailable, TokenConsumed
from peculium.aio import Budget, Client
from peculium.errors import BudgetUnknown, Invalid, NameTaken, OnlyForRoots, PermissionDenied
from tests.client.ledger import Ledger


async def test_a_root_is_held_as_it_was_granted(client: Client) -> None:
    await client.admin.grant("held", unit="calls", amount=10, holder="dev")
    assert (await client.audit.budget("held")).custody is Custody.PRINCIPAL
    bearer = await client.admin.grant("bearer", unit="calls", amount=10, labels={"team": "x"})
    assert (await (await client.accept(bearer.capability)).balances()).available == 10
    receiver = client.receiver()
    theirs = await client.admin.grant("theirs", unit="calls", amount=10, receiver=receiver)
    with pytest.raises(Invalid):
        _ = theirs.capability
    assert (await (await client.accept(receiver.capability(theirs.ref))).balances()).available == 10


async def test_a_name_is_granted_once(client: Client, root: Budget) -> None:
    with pytest.raises(NameTaken) as caught:
        await client.admin.grant("acme", unit="calls", amount=10)
    assert caught.value.name == "acme"
    assert caught.value.budget == "acme"


async def test_money_enters_and_leaves_at_roots(client: Client, root: Budget, run: Budget) -> None:
    assert (await client.admin.top_up("acme", 50)).balances.available == 950
    assert (await client.admin.withdraw(root.ref, 50)).balances.available == 900
    with pytest.raises(OnlyForRoots):
        await client.admin.top_up("acme/run", 1)
    with pytest.raises(BudgetUnknown):
        await client.admin.top_up("nothing", 1)


async def test_a_frozen_budget_starts_nothing_new(
    client: Client, root: Budget, run: Budget
) -> None:
    hold = await run.reserve(10)
    await client.admin.freeze("acme", "looks odd")
    with pytest.raises(BudgetFrozen) as caught:
        await run.reserve(1)
    assert caught.value.by == "admin"
    await hold.settle(5)
    await client.admin.unfreeze("acme")
    await run.reserve(1)


async def test_an_admin_gives_any_budget_to_somebody_else(
    ledger: Ledger, client: Client, run: Budget
) -> None:
    made = await client.admin.recover("acme/run", token=True)
    assert made.granted == 100
    with pytest.raises(TokenConsumed):
        await run.spend(1)
    again = await client.accept(made.capability)
    await again.spend(1)
    await client.admin.recover(made.ref, holder="somebody")
    with pytest.raises(CapabilityUnknown):
        await client.open("acme/run")
    ledger.principal = "somebody"
    assert (await (await client.open("acme/run")).balances()).spent == 1


async def test_an_admin_resolves_what_was_settled(client: Client, root: Budget) -> None:
    hold = await root.reserve(10)
    await hold.settle(5)
    receipt = await client.admin.resolve("acme", hold.hold_id, 7, "the bill says so")
    assert receipt.balances.spent == 7


async def test_auditors_see_every_page(client: Client) -> None:
    for name in ("a", "b", "c"):
        await client.admin.grant(name, unit="calls", amount=10, holder="dev")
    assert [budget.name async for budget in client.audit.budgets()] == ["a", "b", "c"]


async def test_a_verification_tells_its_progress_and_then_its_verdict(
    client: Client, root: Budget
) -> None:
    told = [each async for each in client.audit.verify("acme")]
    assert [each.verified for each in told] == [None, True]
    assert told[-1].findings == ()
    with pytest.raises(BudgetUnknown):
        [each async for each in client.audit.verify("nothing")]


async def test_a_verification_takes_no_longer_than_it_may(
    client: Client, root: Budget, ledger: Ledger
) -> None:
    ledger.verdict.clear()
    with pytest.raises(LedgerUnavailable):
        [each async for each in client.audit.verify(timeout=0.2)]


def test_permission_is_the_callers_business_and_no_refusal_of_the_budget() -> None:
    assert issubclass(PermissionDenied, Invalid)
