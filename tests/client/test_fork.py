from __future__ import annotations

import os
from collections.abc import Callable

import pytest

import peculium
from peculium import Budget, Child, Client
from tests.client.ledger import Ledger


def in_a_child(use: Callable[[], object]) -> str:
    """What a use raises in a forked child, as text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing was raised"
        try:
            use()
        except BaseException as error:  # noqa: BLE001 - all of it is told to the parent
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as told:
        return told.read()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_a_fork_the_childs_handles_are_dead_and_say_so(
    ledger: Ledger, blocking: Client, blocking_root: Budget, blocking_run: Budget
) -> None:
    hold = blocking_root.reserve(10)
    before = len(ledger.batches)
    uses: list[Callable[[], object]] = [
        lambda: blocking_root.reserve(1),
        lambda: blocking_run.spend(1),
        lambda: blocking_run.delegate([Child("x", 1)]),
        blocking_run.info,
        blocking_run.give_back,
        blocking_run.hand_over,
        lambda: hold.settle(1),
        hold.release,
        lambda: blocking.open("acme"),
        lambda: blocking.recover("acme/run"),
        lambda: blocking.admin.top_up("acme", 1),
        lambda: list(blocking.audit.budgets()),
    ]
    for use in uses:
        said = in_a_child(use)
        assert said.startswith("CapabilityMoved: the "), said
        assert f"stayed in process {os.getpid()}" in said
        assert "forked" in said
    assert len(ledger.batches) == before
    assert blocking_run.spend(1).balances.spent == 1
    hold.settle(1)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_leaving_a_block_in_a_forked_child_leaves_the_hold_to_its_parent(
    blocking_root: Budget,
) -> None:
    hold = blocking_root.reserve(10)

    def leave() -> None:
        with hold:
            pass

    assert in_a_child(leave).startswith("CapabilityMoved")
    hold.settle(3)


async def test_an_asynchronous_handle_is_dead_in_a_forked_child(
    root: peculium.aio.Budget,
) -> None:
    def use() -> None:
        root.reserve(1).close()

    assert in_a_child(use).startswith("CapabilityMoved: the budget stayed")
