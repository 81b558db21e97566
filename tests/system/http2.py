"""HTTP/2 by hand, for clients that a library would not let be so slow."""

from __future__ import annotations

import asyncio
import struct
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CLIENT_HELLO = bytes.fromhex("16030100f4010000f00303") + bytes(32)
"""How a client begins with TLS: a part of what it has to say first."""
DATA, HEADERS, SETTINGS, WINDOW_UPDATE = 0, 1, 4, 8
END_STREAM, END_HEADERS = 0x1, 0x4
ACK = 0x1
_INITIAL_WINDOW_SIZE = 4
_HEADER = struct.Struct("!BHBBL")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return _HEADER.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def settings(*, window: int | None = None) -> bytes:
    """What a client begins with; `window` is how many bytes of each stream it takes unasked."""
    payload = b"" if window is None else struct.pack("!HL", _INITIAL_WINDOW_SIZE, window)
    return frame(SETTINGS, 0, 0, payload)


def headers(method: str, **metadata: str) -> bytes:
    """A block of plain literals."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "ledger",
        "te": "trailers",
        "content-type": "application/grpc",
        **metadata,
    }
    block = b""
    for name, value in fields.items():
        block += b"\x00" + _text(name) + _text(value)
    return block


def _text(value: str) -> bytes:
    # Lengths of 127 and more would take a second byte.
    assert len(value) < 127
    return bytes([len(value)]) + value.encode()


def message(body: bytes) -> bytes:
    """As gRPC has it: not compressed, with its length."""
    return b"\x00" + struct.pack("!L", len(body)) + body


class Peer:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, address: str, *, window: int | None = None) -> Self:
        """Connect, and wait until the server has said its part."""
        host, _, port = address.rpartition(":")
        peer = cls(*await asyncio.open_connection(host, int(port)))
        try:
            await peer.send(PREFACE + settings(window=window))
            await peer.until(SETTINGS)
        except BaseException:
            peer.close()
            raise
        return peer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def begin(self, stream: int, method: str) -> None:
        """Call a method, without saying yet what is asked."""
        await self.send(frame(HEADERS, END_HEADERS, stream, headers(method)))

    async def ask(self, stream: int, body: bytes) -> None:
        """Say all that is asked."""
        await self.send(frame(DATA, END_STREAM, stream, message(body)))

    async def until(self, wanted: int) -> bytes:
        """Read frames up to one of a kind, and return what it carries."""
        while True:
            high, low, kind, flags, _ = _HEADER.unpack(await self._reader.readexactly(9))
            payload = await self._reader.readexactly(high << 16 | low)
            if kind == SETTINGS and not flags & ACK:
                await self.send(frame(SETTINGS, ACK, 0))
            if kind == wanted:
                return payload

    def close(self) -> None:
        self._writer.transport.abort()
