"""What a connection may cost, whoever has made it: the transport's own bounds, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from peculium_server.rpc import server
from tests.rpc.test_tls import encrypted
from tests.rpc.wire import Wire, serving
from tests.system.http2 import CLIENT_HELLO, PREFACE, SETTINGS, Peer, settings

SPEND = "/peculium.v1.LedgerService/Spend"
SOON_MS = 200
"""Long enough for what is done in time, on a busy machine; short enough to wait for."""
_MAX_CONCURRENT_STREAMS = 3


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ends(reader: asyncio.StreamReader) -> None:
    """Read until the server ends the connection."""
    async with asyncio.timeout(30):
        with contextlib.suppress(ConnectionResetError):
            while await reader.read(65_536):
                pass


async def works(wire: Wire) -> None:
    """Who behaves is served meanwhile; that there is no such budget is an answer."""
    assert await wire.status_of(SPEND, b"") is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "said",
    [b"", PREFACE[:10], PREFACE, PREFACE + settings()[:5]],
    ids=["nothing", "half a preface", "no settings", "half of the settings"],
)
async def test_who_does_not_begin_in_time_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_MS", SOON_MS)
    async with serving() as wire, connected(wire.port) as (reader, writer):
        writer.write(said)
        await works(wire)
        await ends(reader)
        await works(wire)


@pytest.mark.parametrize("said", [b"", CLIENT_HELLO], ids=["nothing", "half a handshake"])
async def test_who_does_not_end_its_tls_handshake_in_time_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_MS", SOON_MS)
    async with (
        encrypted(tmp_path, client_certificates=False) as running,
        connected(running.port) as (reader, writer),
    ):
        writer.write(said)
        await ends(reader)
        assert await running.called() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_connection_without_a_call_is_closed_after_a_while_and_made_again_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "IDLE_MS", SOON_MS)
    async with serving() as wire, connected(wire.port) as (reader, writer):
        await works(wire)
        writer.write(PREFACE + settings())
        await ends(reader)
        # The client's own was closed as well by now, or is about to be.
        await works(wire)


async def test_a_connection_is_told_how_many_calls_it_may_have_at_once() -> None:
    async with serving() as wire, connected(wire.port) as (reader, writer):
        writer.write(PREFACE + settings())
        header = await reader.readexactly(9)
        assert header[3] == SETTINGS
        payload = await reader.readexactly(int.from_bytes(header[:3]))
        told = dict(struct.iter_unpack("!HL", payload))
        assert told[_MAX_CONCURRENT_STREAMS] == server.STREAMS_MAX


async def test_who_comes_when_as_many_are_connected_as_may_be_is_turned_away() -> None:
    async with serving(connections_max=3) as wire, contextlib.AsyncExitStack() as stack:
        await works(wire)
        address = f"127.0.0.1:{wire.port}"
        first, second = [await Peer.connect(address) for _ in range(2)]
        stack.callback(second.close)
        for _ in range(5):
            async with connected(wire.port) as (reader, writer):
                writer.write(PREFACE + settings())
                await ends(reader)
        # Who is connected stays so, and when somebody goes there is room again.
        await works(wire)
        first.close()
        await until_connected(address)


async def until_connected(address: str) -> None:
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                (await Peer.connect(address)).close()
                return


@pytest.mark.parametrize("size", [20_000, 1_000_000])
async def test_metadata_beyond_what_a_call_may_carry_ends_the_call_and_not_the_server(
    size: int,
) -> None:
    async with serving() as wire:
        # Not one letter over and over, which a header's compression would make small.
        value = os.urandom(size // 2).hex()
        code = await wire.status_of(SPEND, b"", metadata=(("x-much", value),))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        fits = (("x-much", "x" * 8_000),)
        assert await wire.status_of(SPEND, b"", metadata=fits) is grpc.StatusCode.INVALID_ARGUMENT
