"""Three children check the same budget at the same instant, each in a process of its own.

The figures are those of the race in arXiv 2606.04056, in which a shared counter that is checked and
then added to lets 69 be spent of 60, each time.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple

import pytest

import peculium
from peculium import BudgetExhausted
from tests.server import RunningServer
from tests.system.racers import racing

pytestmark = pytest.mark.timeout(240)

CHILDREN = 3
ESTIMATE = 31
ACTUAL = 23
TRIALS = 30


class Trial(NamedTuple):
    """What became of one race."""

    admitted: int
    """Reservations that were granted at once."""
    calls: int
    """Calls that were made, those after another try included."""
    billed: int
    """By the provider's own count."""
    spent: int
    """By the ledger's."""


def child(connection: Connection, barrier: Barrier, address: str, meter: Any) -> None:
    """Reserve when all others do; call and settle when all have an answer; refused, try once more."""
    with peculium.connect(address) as client:
        while (path := connection.recv()) is not None:
            budget = client.open(path)
            barrier.wait()
            admitted = _call(budget, barrier.wait, meter)
            barrier.wait()
            called = admitted or _call(budget, lambda: 0, meter)
            connection.send((admitted, called))


def _call(budget: peculium.Budget, wait: Callable[[], int], meter: Any) -> bool:
    try:
        hold = budget.reserve(ESTIMATE)
    except BudgetExhausted:
        wait()
        return False
    wait()
    with hold:
        with meter.get_lock():
            meter.value += ACTUAL
        hold.settle(ACTUAL)
    return True


Run = Callable[[int, str], Trial]


@pytest.fixture
def run_trial(running_server: RunningServer) -> Iterator[Run]:
    """Runs one race for a cap, on a root of its own."""
    meter = multiprocessing.get_context("spawn").Value("q", 0)
    with (
        peculium.connect(running_server.address) as client,
        racing(child, CHILDREN, running_server.address, meter) as race,
    ):

        def run(cap: int, name: str) -> Trial:
            client.admin.grant(name, unit="calls", amount=cap, holder="dev")
            before = meter.value
            answers = race.start(name)
            balances = client.audit.budget(name).balances
            assert balances.held == 0
            return Trial(
                admitted=sum(admitted for admitted, _ in answers),
                calls=sum(called for _, called in answers),
                billed=meter.value - before,
                spent=balances.spent,
            )

        yield run
        *_, last = client.audit.verify()
        assert last.verified


def test_the_race_of_three_processes_never_spends_more_than_the_cap(
    run_trial: Run, record_property: Callable[[str, object], None]
) -> None:
    lines = ["  cap  trials  overshot  admitted at once  useful calls  billed"]
    for cap, admitted, calls in ((50, 1, 1), (60, 1, 2), (69, 2, 2), (100, 3, 3)):
        trials = [run_trial(cap, f"cap-{cap}-{number}") for number in range(TRIALS)]
        overshot = sum(trial.billed > cap for trial in trials)
        record_property(f"cap_{cap}_overshoot", overshot)
        record_property(f"cap_{cap}_useful_calls", sum(trial.calls for trial in trials))
        lines.append(
            f"{cap:5}{TRIALS:8}{overshot:10}{sum(t.admitted for t in trials):18}"
            f"{sum(t.calls for t in trials):14}{sum(t.billed for t in trials):8}"
        )
        assert overshot == 0
        # Not by refusing everything: whatever fits is admitted, and what comes back is used.
        assert set(trials) == {Trial(admitted, calls, calls * ACTUAL, calls * ACTUAL)}
    sys.stdout.write("\n" + "\n".join(lines) + "\n")
