"""One signed message to one receiver: a POST over a connection of its own, to an address that was checked.

Written on the event loop's own streams rather than over a client library: of HTTP it needs one request
and the head of its answer, and the connection has to be made to the address that was looked at, while
TLS and the request name the host. A redirect is an answer like others, and is not followed. No proxy of the
environment is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from peculium_server.core.limits import SECOND_US
from peculium_server.webhooks.addresses import (
    Allowed,
    IPAddress,
    NotAllowed,
    Resolve,
    Target,
    addresses_of,
    parse,
    resolve as resolve_by_system,
)
from peculium_server.webhooks.keys import WebhookKeys

SECONDS_MAX: Final = 10.0
"""For all of it: resolving, connecting, TLS, sending, and the head of the answer."""
HEAD_BYTES_MAX: Final = 16 * 1024
"""Of an answer no more is read than its head, and of that no more than this."""
_INFORMATIONAL_MAX: Final = 8
"""Answers that say that the answer is still to come."""

_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r\n")
_FINAL: Final = 200
_REFUSED: Final = 300
_END: Final = b"\r\n\r\n"


class Sent(NamedTuple):
    """What became of a message."""

    status: int
    """The HTTP status; 0 if there was no answer."""
    problem: str
    """What went wrong; empty if the receiver took it."""

    @property
    def taken(self) -> bool:
        """Say whether the receiver took it."""
        return not self.problem


class Sender:
    """Sends signed messages, to whom they may be sent."""

    def __init__(
        self,
        keys: WebhookKeys,
        allowed: Allowed,
        *,
        resolve: Resolve = resolve_by_system,
        tls: ssl.SSLContext | None = None,
        seconds_max: float = SECONDS_MAX,
    ) -> None:
        """Begin without connections.

        Args:
            keys: Sign the messages.
            allowed: What may be reached beyond what everybody can.
            resolve: Finds the addresses of a name.
            tls: Whose certificates are trusted; if not given, those that the system trusts.
            seconds_max: How long one message may take.
        """
        self.allowed = allowed
        self.keys = keys
        self._resolve = resolve
        self._tls = tls or ssl.create_default_context()
        self._seconds_max = seconds_max

    async def send(
        self,
        url: str,
        *,
        incarnation: bytes,
        webhook_id: bytes,
        message_id: str,
        at: int,
        document: Mapping[str, Any],
    ) -> Sent:
        """Send a message, and say what became of it. Nothing that can happen to it is raised.

        Args:
            url: To where.
            incarnation: Of the ledger.
            webhook_id: By whose secret it is signed.
            message_id: The same each time that it is sent.
            at: The ledger's time, now: receivers take no message that is old. Microseconds.
            document: What it says.
        """
        timestamp = at // SECOND_US
        body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        signature = self.keys.sign(incarnation, webhook_id, message_id, timestamp, body)
        headers = {
            "content-type": "application/json",
            "user-agent": "peculium",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature,
        }
        try:
            async with asyncio.timeout(self._seconds_max):
                target = parse(url, self.allowed)
                found = await addresses_of(target, self._resolve, self.allowed)
                status = await self._post(target, found, headers, body)
        except TimeoutError:
            return Sent(0, f"no answer in {self._seconds_max:g} s")
        except NotAllowed as error:
            return Sent(0, f"not allowed: {error}")
        except ssl.SSLError as error:
            return Sent(0, f"TLS failed: {error.reason or 'the connection was cut'}")
        except OSError as error:
            return Sent(0, f"no connection: {error.strerror or 'it was cut'}")
        except _NoHttp as error:
            return Sent(0, str(error))
        return Sent(status, "" if _FINAL <= status < _REFUSED else f"answered {status}")

    async def _post(
        self,
        target: Target,
        addresses: Sequence[IPAddress],
        headers: Mapping[str, str],
        body: bytes,
    ) -> int:
        reader, writer = await self._connect(target, addresses)
        try:
            writer.write(_request(target, headers, body))
            await writer.drain()
            return await _status(reader)
        finally:
            # Whatever more the receiver says is not listened to.
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _connect(
        self, target: Target, addresses: Sequence[IPAddress]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the first of the addresses that can be: these, and what the name leads to no more."""
        *others, last = addresses
        for address in others:
            with contextlib.suppress(OSError):
                return await self._connect_to(target, address)
        return await self._connect_to(target, last)

    async def _connect_to(
        self, target: Target, address: IPAddress
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(
            str(address),
            target.port,
            limit=HEAD_BYTES_MAX,
            ssl=self._tls if target.secure else None,
            server_hostname=target.host if target.secure else None,
        )


class _NoHttp(Exception):
    """The receiver does not speak HTTP, or says too much."""


def _request(target: Target, headers: Mapping[str, str], body: bytes) -> bytes:
    # Nothing of these can have a line's end in it: the target was checked, the rest is our own.
    lines = [
        f"POST {target.path} HTTP/1.1",
        f"host: {target.authority}",
        *(f"{name}: {value}" for name, value in headers.items()),
        f"content-length: {len(body)}",
        "connection: close",
    ]
    return "\r\n".join(lines).encode("ascii") + _END + body


async def _status(reader: asyncio.StreamReader) -> int:
    """The status of the answer, those aside that say that it is still to come."""
    for _ in range(_INFORMATIONAL_MAX):
        try:
            head = await reader.readuntil(_END)
        except asyncio.IncompleteReadError as error:
            said = "cut its answer" if error.partial else "ended the connection without an answer"
            raise _NoHttp(f"the receiver {said}") from None
        except asyncio.LimitOverrunError:
            raise _NoHttp("the head of the answer is too long") from None
        found = _STATUS.match(head)
        if found is None:
            raise _NoHttp("the answer is not HTTP/1.1")
        status = int(found[1])
        if status >= _FINAL or status == _SWITCHING:
            return status
    raise _NoHttp("the receiver does not come to its answer")


_SWITCHING: Final = 101
