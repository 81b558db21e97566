"""A client whose clock may be off: `python -m tests.faults.skewed ADDRESS NAME`.

It spends from a budget that it holds by token, then from one that it holds by name; says in a line of
JSON what came of it; and tries the second again when it is sent a line.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from peculium import aio
from peculium.aio import Budget
from peculium.errors import OperationTooOld

_TIMEOUT_SECONDS = 60.0


async def main(address: str, name: str) -> None:
    """Spend, and tell."""
    async with aio.connect(address, timeout=_TIMEOUT_SECONDS) as client:
        granted = await client.admin.grant(f"{name}-token", unit="calls", amount=100)
        root = await client.accept(granted.capability)
        async with root.reserve(10) as hold:
            await hold.settle(7)
        async with root.delegate_here(20, name="run") as run:
            await run.spend(5)
        _tell(spent=(await root.balances()).spent)

        await client.admin.grant(f"{name}-service", unit="calls", amount=100, holder="dev")
        service = await client.open(f"{name}-service")
        _tell(**await _spend(service))
        await asyncio.to_thread(sys.stdin.readline)
        _tell(**await _spend(service))


async def _spend(service: Budget) -> dict[str, Any]:
    try:
        receipt = await service.spend(1)
    except OperationTooOld as error:
        return {
            "refused": error.reason,
            "age_seconds": error.age_seconds,
            "remedy": error.remedy,
            "told": str(error),
        }
    return {"spent": receipt.balances.spent}


def _tell(**said: Any) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
