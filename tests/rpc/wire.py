"""A server on a real socket before a ledger in memory, and what a client sees of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from peculium_server.identity import Identities
from peculium_server.lanes.ledger import Ledger
from peculium_server.rpc.server import Server
from peculium_server.store.store import Store
from tests.lanes.memory import MemoryStore

MESSAGE_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True)
class Wire:
    """One running server and a connection to it."""

    store: MemoryStore
    server: Server
    channel: grpc.aio.Channel

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
) -> AsyncIterator[Wire]:
    """Serve a ledger in memory, or the one given, on a port of this machine."""
    store = MemoryStore()
    server = Server(
        ledger or Ledger(store, queue_rows_max=1_000),
        cast("Store", store),
        identities or Identities.dev(),
        message_bytes_max=MESSAGE_BYTES_MAX,
        call_seconds_max=call_seconds_max,
    )
    port = await server.start(address)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            yield Wire(store, server, channel)
        finally:
            await server.stop(0)


@dataclass(frozen=True)
class Stored:
    """One running server on a real database, and a connection to it."""

    store: Store
    channel: grpc.aio.Channel


@contextlib.asynccontextmanager
async def storing(database: str, identities: Identities | None = None) -> AsyncIterator[Stored]:
    """Serve the ledger of a database on a port of this machine."""
    store = await Store.open(database)
    ledger = Ledger(store, queue_rows_max=10_000)
    server = Server(
        ledger,
        store,
        identities or Identities.dev(),
        message_bytes_max=MESSAGE_BYTES_MAX,
        call_seconds_max=30,
    )
    try:
        port = await server.start("127.0.0.1:0")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Stored(store, channel)
    finally:
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
