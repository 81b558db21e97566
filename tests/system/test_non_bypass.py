"""What a compiler refuses within one program, the ledger refuses across processes and hosts."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

import pytest

import peculium
from peculium import Balances, Child, Client, TokenConsumed
from peculium.v1 import ledger_service_pb2 as ledger
from tests.server import RunningServer
from tests.system.racers import racing
from tests.system.wire import (
    Held,
    Told,
    Wire,
    delegated,
    granted,
    id_text,
    new_secret,
    reserve_of,
    spend_of,
    token_id,
)

pytestmark = pytest.mark.timeout(240)

TRIALS = 20
FAN_OUT = 4
DEPTH = 4
"""Levels of the tree, the root included."""
SPEND = "/peculium.v1.LedgerService/Spend"
RESERVE = "/peculium.v1.LedgerService/Reserve"


@pytest.fixture
def client(running_server: RunningServer) -> Iterator[Client]:
    with peculium.connect(running_server.address) as connected:
        yield connected


def _refused(answer: bytes | Told) -> Told:
    assert isinstance(answer, Told)
    return answer


def test_a_parent_cannot_spend_what_it_has_delegated(client: Client) -> None:
    made = client.admin.grant("acme", unit="calls", amount=100)
    parent = client.accept(made.capability)
    [child] = parent.delegate([Child("run", 70)])
    with pytest.raises(peculium.BudgetExhausted) as refused:
        parent.spend(31)
    assert (refused.value.available, refused.value.held) == (30, 0)
    assert refused.value.remedy == "top_up"
    client.accept(child.capability).spend(70)
    parent.spend(30)
    assert client.audit.budget("acme").balances.available == 0


def host(connection: Connection, barrier: Barrier, address: str) -> None:
    """Another host, which got the same capability: who accepted it, or who was first."""
    with peculium.connect(address) as client:
        while (text := connection.recv()) is not None:
            barrier.wait()
            try:
                budget = client.accept(text)
            except TokenConsumed as lost:
                connection.send(("lost", lost.consumed_by))
            else:
                budget.spend(1)
                entries = client.audit.entries(budget.ref, descending=True)
                accepted = next(entry for entry in entries if entry.kind == "ACCEPT")
                connection.send(("won", accepted.operation_id))


def test_of_two_hosts_with_one_capability_exactly_one_gets_the_budget(
    client: Client, running_server: RunningServer
) -> None:
    made = client.admin.grant("acme", unit="calls", amount=TRIALS)
    root = client.accept(made.capability)
    children = root.delegate([Child(f"run-{number}", 1) for number in range(TRIALS)])
    with racing(host, 2, running_server.address) as race:
        for child in children:
            (lost, winner), (won, accepted) = sorted(race.start(child.capability.reveal()))
            assert (lost, won) == ("lost", "won")
            assert winner == accepted
    spent = [budget.balances.spent for budget in client.audit.budgets("acme")]
    assert sum(spent) == TRIALS


def test_a_token_that_was_copied_into_another_message_is_refused_the_second_time(
    wire: Wire,
) -> None:
    root = granted(wire, "acme", 100)
    first, copied = reserve_of(root, 10), reserve_of(root, 10)
    wire.ledger.Reserve(first)
    for request, method in ((copied, RESERVE), (spend_of(root, 10), SPEND)):
        refused = _refused(wire.send(method, request))
        assert refused.reason == "TOKEN_CONSUMED"
        assert refused.facts["consumed_by"] == id_text(first.header.operation_id)
    # The very same message is not a second use: it is told what it did.
    again = wire.ledger.Reserve(first)
    assert again.outcome.replayed
    budget = wire.budgets()["acme"]
    assert (budget.balances.held, budget.balances.available) == (10, 90)


def test_a_child_that_presents_its_parents_token_is_refused(wire: Wire) -> None:
    parent = granted(wire, "acme", 100)
    consumed = Held(parent.root_id, parent.budget_id, parent.secret)
    child = delegated(wire, parent, "run", 10)
    # Knowing the parent's secret of before the delegation.
    assert _refused(wire.send(SPEND, spend_of(consumed, 1))).reason == "TOKEN_CONSUMED"
    # Presenting any of the parent's secrets for itself, and its own for the parent.
    for budget_id, secret in (
        (child.budget_id, consumed.secret),
        (child.budget_id, parent.secret),
        (parent.budget_id, child.secret),
    ):
        request = spend_of(Held(parent.root_id, budget_id, secret), 1)
        assert _refused(wire.send(SPEND, request)).reason == "CAPABILITY_UNKNOWN"
    assert {budget.balances.spent for budget in wire.budgets().values()} == {0}


def test_a_holds_token_settles_its_own_hold_only(wire: Wire) -> None:
    root = granted(wire, "acme", 100)
    secrets = [new_secret(), new_secret()]
    holds = []
    for secret in secrets:
        following = new_secret()
        request = reserve_of(root, 10)
        request.next_token_id = token_id(following)
        request.hold_token_id = token_id(secret)
        wire.ledger.Reserve(request)
        root.secret = following
        holds.append(request.hold_id)
    crossed = ledger.SettleRequest(
        header=Held(root.root_id, root.budget_id, secrets[1]).header(), hold_id=holds[0], actual=0
    )
    settle = "/peculium.v1.LedgerService/Settle"
    assert _refused(wire.send(settle, crossed)).reason == "CAPABILITY_UNKNOWN"
    by_budget = ledger.SettleRequest(header=root.header(), hold_id=holds[0], actual=0)
    assert _refused(wire.send(settle, by_budget)).reason == "CAPABILITY_UNKNOWN"
    assert wire.budgets()["acme"].balances.held == 20


def test_a_parent_that_revokes_ends_all_new_calls_and_lets_those_in_flight_be_paid(
    client: Client,
) -> None:
    made = client.admin.grant("acme", unit="calls", amount=1_000)
    parent = client.accept(made.capability)
    made_children = parent.delegate([Child(f"run-{number}", 100) for number in range(8)])
    children = [client.accept(child.capability) for child in made_children]
    holds = [child.reserve(30) for child in children]
    for child in made_children:
        receipt = parent.revoke(child.ref)
        assert (receipt.returned, receipt.pending) == (70, 0)
    for revoked, hold in zip(children, holds, strict=True):
        with pytest.raises(peculium.BudgetClosed):
            revoked.reserve(1)
        hold.settle(10)
    balances = client.audit.budget("acme").balances
    assert (balances.available, balances.delegated) == (920, 80)
    spent = [budget.balances.spent for budget in client.audit.budgets("acme")]
    assert sum(spent) == 80
    *_, last = client.audit.verify()
    assert last.verified


def test_money_is_conserved_at_each_level_of_a_deep_tree_from_delegation_to_return(
    client: Client,
) -> None:
    amount = 1_000
    made = client.admin.grant("acme", unit="calls", amount=amount * FAN_OUT ** (DEPTH - 1))
    levels = [[client.accept(made.capability)]]
    for depth in range(1, DEPTH):
        share = amount * FAN_OUT ** (DEPTH - 1 - depth)
        levels.append([])
        for budget in levels[-2]:
            children = budget.delegate([Child(f"{n}", share) for n in range(FAN_OUT)])
            levels[-1] += [client.accept(child.capability) for child in children]
        _check_conserved(client)
    leaves = levels[-1]
    assert len(leaves) == FAN_OUT ** (DEPTH - 1)
    costs = [17 * number % 900 + 1 for number in range(len(leaves))]
    for leaf, cost in zip(leaves, costs, strict=True):
        with leaf.reserve(cost + 50) as hold:
            hold.settle(cost)
    _check_conserved(client)
    while len(levels) > 1:
        for budget in levels.pop():
            budget.give_back()
        _check_conserved(client)
    root = client.audit.budget("acme").balances
    assert root.available == root.granted - sum(costs)
    used = [budget.balances.spent for budget in client.audit.budgets("acme")]
    assert sum(used) == sum(costs)
    *_, last = client.audit.verify()
    assert last.verified


def _check_conserved(client: Client) -> None:
    budgets = {budget.ref.budget_id: budget for budget in client.audit.budgets("acme")}
    children: dict[bytes, list[Balances]] = {budget_id: [] for budget_id in budgets}
    for budget in budgets.values():
        if budget.parent_id is not None:
            children[budget.parent_id].append(budget.balances)
    for budget_id, budget in budgets.items():
        money = budget.balances
        assert money.delegated == sum(child.granted for child in children[budget_id])
        assert money.granted == (
            money.available + money.held + money.delegated + money.spent + money.forfeited
        )
    [root] = [budget.balances for budget in budgets.values() if budget.parent_id is None]
    assert root.granted == sum(
        budget.balances.available + budget.balances.held + budget.balances.spent
        for budget in budgets.values()
    )
