"""How the demonstration's processes speak to each other: typed messages as lines of JSON.

A process gets its end of a socket pair as its standard input, so that the end of one side, however
it comes about, is the end of input for the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from dataclasses import asdict
from typing import Final, Self

from peculium_server.demo.messages import BY_NAME, Message

LINE_BYTES_MAX: Final = 4 * 1024 * 1024
_STANDARD_INPUT: Final = 0


class PeerEnded(ConnectionError):
    """The process at the other side has ended."""

    def __init__(self, peer: str) -> None:
        super().__init__(f"{peer} ended before its work was done")
        self.peer = peer


def first_error(error: BaseException) -> BaseException:
    """What the first of several tasks failed with, if the error is that of a group of tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Channel:
    """One end."""

    def __init__(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.peer = peer
        """Who is at the other side."""
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, end: socket.socket, peer: str) -> Self:
        """The end that is a connected socket."""
        return cls(peer, *await asyncio.open_connection(sock=end, limit=LINE_BYTES_MAX))

    @classmethod
    async def to_coordinator(cls) -> Self:
        """The end that this process was started with."""
        return await cls.over(socket.socket(fileno=_STANDARD_INPUT), "the coordinator")

    async def send(self, message: Message) -> None:
        """Send a message; wait while the other side does not keep up.

        Raises:
            PeerEnded: Nobody will read it.
        """
        line = json.dumps({"type": type(message).__name__, **asdict(message)})
        try:
            self._writer.write(line.encode() + b"\n")
            await self._writer.drain()
        except ConnectionError as error:
            raise PeerEnded(self.peer) from error

    async def receive(self) -> Message:
        """The next message.

        Raises:
            PeerEnded: There is none any more.
        """
        try:
            line = await self._reader.readuntil(b"\n")
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise PeerEnded(self.peer) from error
        fields = json.loads(line)
        return BY_NAME[fields.pop("type")](**fields)

    async def close(self) -> None:
        """End: the other side notices."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
