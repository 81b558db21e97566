"""A child that reports nonsense harms nobody but itself, and nothing that it reported is lost."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import pytest

import peculium
from peculium import BudgetFrozen, BudgetState, Child, Client, HoldState
from peculium_server.core.encoding import decode_request
from peculium_server.core.operations import Kind, Settle
from tests.server import RunningServer

pytestmark = pytest.mark.timeout(240)

NONSENSE = 10**18


@pytest.fixture
def client(running_server: RunningServer) -> Iterator[Client]:
    with peculium.connect(running_server.address) as connected:
        yield connected


def test_a_settle_far_beyond_its_hold_is_recorded_disputed_and_frozen_and_the_rest_goes_on(
    client: Client,
) -> None:
    client.admin.grant("acme", unit="usd_nanos", amount=1_000, holder="dev")
    root = client.open("acme")
    wild, calm = (
        client.accept(made.capability)
        for made in root.delegate([Child("wild", 300), Child("calm", 300)])
    )
    other = wild.reserve(50)
    hold = wild.reserve(100)

    receipt = hold.settle(NONSENSE, reference="req-1")

    # Booked is the hold, and as much again as the overrun factor of 1 allows; all of it is disputed.
    assert receipt.hold is not None
    assert receipt.hold.state is HoldState.DISPUTED
    assert (receipt.hold.booked, receipt.hold.disputed) == (200, NONSENSE - 200)
    info = client.audit.budget("acme/wild")
    assert info.state is BudgetState.FROZEN
    assert (info.disputed, info.balances.spent) == (NONSENSE - 200, 200)
    assert (info.balances.available, info.balances.held) == (50, 50)
    with pytest.raises(BudgetFrozen) as frozen:
        wild.reserve(1)
    assert frozen.value.by == "dispute"
    assert _reported(client) == NONSENSE

    # Its own calls in flight end, its siblings and the root go on.
    other.settle(30)
    with calm.reserve(300) as calls:
        calls.settle(299)
    with root.reserve(400) as calls:
        calls.settle(400)
    assert client.audit.budget("acme").balances.overrun == 0

    client.admin.resolve("acme/wild", hold.hold_id, 110, "the bill says 110")
    wild.reserve(1).release()
    info = client.audit.budget("acme/wild")
    assert info.state is BudgetState.OPEN
    assert (info.disputed, info.balances.spent, info.balances.available) == (0, 140, 160)
    *_, last = client.audit.verify()
    assert last.verified


def test_what_an_admin_resolves_above_what_the_tree_has_becomes_the_roots_overrun(
    client: Client,
) -> None:
    client.admin.grant("acme", unit="usd_nanos", amount=1_000, holder="dev")
    root = client.open("acme")
    [made] = root.delegate([Child("wild", 300)])
    wild = client.accept(made.capability)
    hold = wild.reserve(100)
    hold.settle(NONSENSE)

    client.admin.resolve("acme/wild", hold.hold_id, 1_500, "the bill really says 1500")

    balances = client.audit.budget("acme").balances
    assert (balances.overrun, balances.available) == (500, 0)
    with pytest.raises(peculium.TreeOverrun) as overrun:
        wild.reserve(1)
    assert overrun.value.overrun == 500
    client.admin.top_up("acme", 600)
    balances = client.audit.budget("acme").balances
    assert (balances.overrun, balances.available, balances.granted) == (0, 100, 1_600)
    *_, last = client.audit.verify()
    assert last.verified


def _reported(client: Client) -> int | None:
    """What the last settle of the wild child has said, as the ledger recorded it."""
    entry = next(
        entry
        for entry in client.audit.entries("acme/wild", descending=True)
        if entry.kind == "SETTLE" and entry.part == 0
    )
    operation = decode_request(
        kind=Kind.SETTLE,
        root_id=entry.root_id,
        budget_id=entry.budget_id,
        operation_id=UUID(entry.operation_id).bytes,
        trace_id=None,
        consumed=entry.consumed,
        request=entry.request,
    )
    assert isinstance(operation, Settle)
    return operation.actual
