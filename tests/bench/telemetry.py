"""What telemetry costs a server: its own processor time for each operation, with and without.

    python -m tests.bench.telemetry [--seconds N] [--rounds N]

Servers take turns on one database, so that whatever else the machine does befalls all alike; it is the
processor time of the server's process that is compared, not how fast the whole machine is. A collector in
a process of its own takes what is exported, and somebody asks for the page. The last line of standard output is the figures as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.protobuf.duration_pb2 import Duration

from peculium import aio
from peculium._ids import new_id, new_secret, token_id
from peculium.v1 import ledger_service_pb2 as ledger, types_pb2
from peculium.v1.ledger_service_pb2_grpc import LedgerServiceStub
from tests.bench.ledgers import HOLDER, Ledger, Postgres
from tests.server import RunningServer
from tests.telemetry.page import ask, page_of
from tests.telemetry.receiver import receiving

AGENTS = 200
CALLERS = 50
ROOTS = 8
WARM_UP_SECONDS = 1.0
_PAGE = ("--metrics-listen", "127.0.0.1:0")
ASK_SECONDS = 5.0
"""Between two times that the page is asked for: three times as often as Prometheus usually does."""
KINDS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "off": ((), False),
    "page": (_PAGE, False),
    "metrics and traces": ((), True),
    "log": (("--log-format", "json", "--log-level", "info"), False),
    "all": (("--log-format", "json", "--log-level", "info"), True),
}
"""The flags of a server, and whether it exports."""


def _collect(ready: Connection) -> None:
    with receiving() as receiver:
        ready.send(receiver.address)
        ready.recv()


@contextmanager
def collector() -> Iterator[str]:
    """The address of a collector in a process of its own."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_collect, args=(there,))
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join()


@contextmanager
def asking(server: RunningServer) -> Iterator[None]:
    """Somebody comes for the server's page now and then, as Prometheus does."""
    page, over = page_of(server), threading.Event()

    def ask_often() -> None:
        while not over.wait(ASK_SECONDS):
            ask(page)

    thread = threading.Thread(target=ask_often)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


async def coalesced(address: str, seconds: float) -> int:
    """Agents that share one client, as the SDK has it; how many operations they did."""
    async with aio.connect(address) as client:
        budgets = [await client.open(await _root(client)) for _ in range(ROOTS)]
        done = 0
        end = asyncio.get_running_loop().time() + seconds

        async def agent(number: int) -> None:
            nonlocal done
            while asyncio.get_running_loop().time() < end:
                async with budgets[number % ROOTS].reserve(2) as hold:
                    await hold.settle(1)
                done += 2

        await asyncio.gather(*map(agent, range(AGENTS)))
        return done


async def unary(address: str, seconds: float) -> int:
    """Many callers that send each operation in a call of its own; how many they did."""
    return await _unary(address, seconds, CALLERS)


async def alone(address: str, seconds: float) -> int:
    """As `unary`, of one caller: each operation is a call and a transaction of its own."""
    return await _unary(address, seconds, 1)


async def _unary(address: str, seconds: float, callers: int) -> int:
    async with aio.connect(address) as client:
        refs = [(await client.open(await _root(client))).ref for _ in range(ROOTS)]
    done = 0
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = LedgerServiceStub(channel)
        end = asyncio.get_running_loop().time() + seconds

        async def caller(number: int) -> None:
            nonlocal done
            ref = refs[number % ROOTS]
            while asyncio.get_running_loop().time() < end:
                header = types_pb2.OperationHeader(
                    operation_id=new_id(),
                    root_id=ref.root_id,
                    budget_id=ref.budget_id,
                    authority=types_pb2.Authority(holder=types_pb2.Holder()),
                )
                secret = new_secret()
                await stub.Reserve(
                    ledger.ReserveRequest(
                        header=header,
                        amount=1,
                        ttl=Duration(seconds=600),
                        hold_id=new_id(),
                        hold_token_id=token_id(secret),
                    )
                )
                done += 1

        await asyncio.gather(*map(caller, range(callers)))
    return done


async def _root(client: aio.Client) -> str:
    name = f"root-{new_id().hex()}"
    await client.admin.grant(name, unit="calls", amount=10**12, holder=HOLDER)
    return name


LOADS = {"coalesced": coalesced, "unary": unary, "alone": alone}


def microseconds(server: RunningServer, load: str, seconds: float) -> float:
    """Processor time of the server for one operation, in microseconds."""
    run = LOADS[load]
    asyncio.run(run(server.address, WARM_UP_SECONDS))
    process = psutil.Process(server.process.pid)
    before = process.cpu_times()
    done = asyncio.run(run(server.address, seconds))
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / done * 1e6


@contextmanager
def folder_of_all() -> Iterator[Path]:
    """A new folder that the user whom PostgreSQL runs as can enter, whoever that is."""
    with tempfile.TemporaryDirectory(prefix="peculium-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {
        load: {kind: [] for kind in KINDS} for load in LOADS
    }
    with (
        collector() as address,
        folder_of_all() as folder,
        Postgres.running(folder) as postgres,
    ):
        made = Ledger.made(postgres, "bench")
        for number in range(options.rounds):
            for kind, (flags, exports) in KINDS.items():
                variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}"} if exports else {}
                server = postgres.start_server("--database-url", made.dsn, *flags, **variables)
                with asking(server) if flags == _PAGE else nullcontext():
                    for load, by_kind in found.items():
                        by_kind[kind].append(microseconds(server, load, options.seconds))
                        sys.stderr.write(f"{number} {load} {kind}: {by_kind[kind][-1]:.0f} us\n")
                server.stop()
    figures: dict[str, dict[str, float]] = {}
    for load, measured in found.items():
        medians = {kind: statistics.median(each) for kind, each in measured.items()}
        more = {f"{kind}, %": 100 * (each / medians["off"] - 1) for kind, each in medians.items()}
        figures[load] = {name: round(each, 1) for name, each in (medians | more).items()}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
