"""What an operation has needed is gone once it was accepted: nothing of it waits for the collector of cycles.

In a process with many agents the collector would have much to do, and the process stands still meanwhile.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import peculium
from peculium.aio import Budget

ROUNDS = 40
"""More operations than those whose deadlines are still remembered."""


@contextmanager
def collector_idle() -> Iterator[Callable[[], list[object]]]:
    """Nothing is collected in the block; what is yielded tells what of the SDK would have been."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)

    def left() -> list[object]:
        gc.collect()
        return [each for each in gc.garbage if type(each).__module__.startswith("peculium._")]

    try:
        yield left
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def test_operations_of_a_task_leave_no_cycles(run: Budget) -> None:
    with collector_idle() as left:
        for _ in range(ROUNDS):
            hold = await run.reserve(2)
            await hold.settle(1)
            await run.spend(1)
        assert left() == []


def test_operations_of_a_thread_leave_no_cycles(blocking_run: peculium.Budget) -> None:
    with collector_idle() as left:
        for _ in range(ROUNDS):
            blocking_run.reserve(2).settle(1)
            blocking_run.spend(1)
        assert left() == []
