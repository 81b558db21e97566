"""A server on a real socket before a ledger in memory, and what a client sees of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from peculium_server.core.throttle import Limits
from peculium_server.identity import Identities
from peculium_server.keyfile import KeyFile
from peculium_server.lanes.ledger import Ledger
from peculium_server.refusals import RefusalCounts
from peculium_server.rpc.server import CONNECTIONS_MAX, Server
from peculium_server.store.store import Store
from tests.lanes.memory import MemoryStore

MESSAGE_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True)
class Wire:
    """One running server and a connection to it."""

    store: MemoryStore
    server: Server
    channel: grpc.aio.Channel
    port: int

    async def send(
        self,
        method: str,
        request: bytes,
        *,
        metadata: tuple[tuple[str, str], ...] = (),
        timeout: float | None = 10,
    ) -> bytes:
        """Call a method with whatever bytes, as no generated stub would."""
        call: Any = self.channel.unary_unary(method)
        return cast("bytes", await call(request, metadata=metadata, timeout=timeout))

    async def status_of(self, method: str, request: bytes, **options: Any) -> grpc.StatusCode:
        """The code that a call ends with."""
        try:
            await self.send(method, request, **options)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


@contextlib.asynccontextmanager
async def serving(
    identities: Identities | None = None,
    *,
    ledger: Any = None,
    call_seconds_max: float = 30,
    address: str = "127.0.0.1:0",
    trace_one_in: int = 1,
    limits: Limits | None = None,
    connections_max: int = CONNECTIONS_MAX,
) -> AsyncIterator[Wire]:
    """Serve a ledger in memory, or the one given, on a port of this machine."""
    store = MemoryStore()
    server = Server(
        ledger or Ledger(store, queue_rows_max=1_000),
        cast("Store", store),
        identities or Identities.dev(),
        message_bytes_max=MESSAGE_BYTES_MAX,
        call_seconds_max=call_seconds_max,
        trace_one_in=trace_one_in,
        limits=limits,
        connections_max=connections_max,
    )
    port = await server.start(address)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            yield Wire(store, server, channel, port)
        finally:
            await server.stop(0)


@dataclass(frozen=True)
class Stored:
    """One running server on a real database, and a connection to it."""

    store: Store
    channel: grpc.aio.Channel
    refusals: RefusalCounts | None
    """Counts what is refused, if it was asked to; adds up when it is told to."""


class _Everybody(Identities):
    """Whoever calls is `dev`, also when somebody has made a key."""

    @property
    def dev_mode(self) -> bool:
        return True


@contextlib.asynccontextmanager
async def storing(
    database: str, file: KeyFile | None = None, *, counting: bool = False
) -> AsyncIterator[Stored]:
    """Serve the ledger of a database on a port of this machine: to whom a key file names, or to everybody."""
    store = await Store.open(database)
    ledger = Ledger(store, queue_rows_max=10_000)
    make = _Everybody if file is None else Identities
    identities = make(file, store.keys, development=file is None)
    await identities.refresh()
    refusals = None
    if counting:
        refusals = RefusalCounts(store, 7)
        await refusals.learn_time()
    server = Server(
        ledger,
        store,
        identities,
        message_bytes_max=MESSAGE_BYTES_MAX,
        call_seconds_max=30,
        refusals=refusals,
    )
    keeping_up = asyncio.create_task(identities.run())
    try:
        port = await server.start("127.0.0.1:0")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Stored(store, channel, refusals)
    finally:
        keeping_up.cancel()
        await server.stop(0)
        await ledger.drain()
        await store.close()


def info_of(error: grpc.aio.AioRpcError) -> ErrorInfo:
    """The ErrorInfo that a failed call carries."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            for detail in Status.FromString(value).details:
                info = ErrorInfo()
                if detail.Unpack(info):
                    return info
    raise AssertionError(f"a {error.code()} without ErrorInfo")
