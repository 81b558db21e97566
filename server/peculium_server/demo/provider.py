"""A provider that keeps a bill of its own: a process that knows prices, and nothing of budgets.

Agents call it over loopback TCP, a line of JSON for each request and for each answer:

    {"model": "example-large", "prompt_tokens": 4808, "max_tokens": 16, "would_write": 10}
    {"id": "call-1", "usage": {"prompt_tokens": 4808, "completion_tokens": 10}}

`would_write` stands for the prompt: how much the model would write if it had no limit. Whatever is
answered with usage is on the bill, also if nobody is there any more to read the answer. A request
that cannot be served is answered with an error, and is not on the bill.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, Final, NamedTuple, Self

from peculium import PriceList, PriceUnknown
from peculium_server.demo.channel import Channel, PeerEnded
from peculium_server.demo.messages import Bill, BillPlease, Listening
from peculium_server.demo.prices import PRICES
from peculium_server.demo.trace import TOKENS_MAX

HOST: Final = "127.0.0.1"
_COUNTS: Final = ("prompt_tokens", "max_tokens", "would_write")
_MILLION: Final = 1_000_000


class ProviderRefused(Exception):
    """The provider did not serve the call, and does not bill it."""


class ProviderGone(ConnectionError):
    """The provider went away in the middle of a call."""


class Completion(NamedTuple):
    """What the provider answered."""

    call_id: str
    prompt_tokens: int
    completion_tokens: int


class Provider:
    """The provider's side: serves calls, and writes them down."""

    def __init__(self, prices: PriceList) -> None:
        self._prices = prices
        self._calls = 0
        self._input_tokens = 0
        self._output_tokens = 0
        # In millionths, rounded once for the whole bill: not the sum that the agents compute.
        self._amount_millionths = 0

    @property
    def bill(self) -> Bill:
        """What was served so far, and what is asked for it."""
        return Bill(
            calls=self._calls,
            input_tokens=self._input_tokens,
            output_tokens=self._output_tokens,
            amount=-(-self._amount_millionths // _MILLION),
        )

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client's calls, one after the other, until it hangs up."""
        try:
            while line := await reader.readline():
                writer.write(json.dumps(self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):
            pass  # It hung up, or does not speak in lines.
        finally:
            writer.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            prompt, limit, wanted = (request[name] for name in _COUNTS)
            price = self._prices[request["model"]]
        except (ValueError, KeyError, TypeError, PriceUnknown) as error:
            return {"error": f"not a request: {error}"}
        if any(
            type(count) is not int or not 0 <= count <= TOKENS_MAX
            for count in (prompt, limit, wanted)
        ):
            return {"error": f"{', '.join(_COUNTS)} must be counts of tokens"}
        written = min(limit, wanted)
        self._calls += 1
        self._input_tokens += prompt
        self._output_tokens += written
        self._amount_millionths += (
            prompt * price.input_per_million + written * price.output_per_million
        )
        usage = {"prompt_tokens": prompt, "completion_tokens": written}
        return {"id": f"call-{self._calls}", "usage": usage}


class ProviderClient:
    """An agent's connection to the provider: one call at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, port: int) -> Self:
        """Connect to the provider on this machine.

        Raises:
            ConnectionError: Nobody is there.
        """
        return cls(*await asyncio.open_connection(HOST, port))

    async def complete(
        self, model: str, *, prompt_tokens: int, max_tokens: int, would_write: int
    ) -> Completion:
        """Make one call.

        Raises:
            ProviderRefused: It was not served, and is not billed.
            ProviderGone: Whether it served the call is not known.
        """
        request = {
            "model": model,
            "prompt_tokens": prompt_tokens,
            "max_tokens": max_tokens,
            "would_write": would_write,
        }
        try:
            self._writer.write(json.dumps(request).encode() + b"\n")
            await self._writer.drain()
            answer = json.loads(await self._reader.readuntil(b"\n"))
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise ProviderGone("the provider hung up") from error
        if "error" in answer:
            raise ProviderRefused(answer["error"])
        usage = answer["usage"]
        return Completion(answer["id"], usage["prompt_tokens"], usage["completion_tokens"])

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


async def main() -> None:
    """Serve until the coordinator ends, and tell it the bill whenever it asks."""
    provider = Provider(PRICES)
    server = await asyncio.start_server(provider.serve, HOST, 0)
    coordinator = await Channel.to_coordinator()
    await coordinator.send(Listening(port=server.sockets[0].getsockname()[1]))
    with contextlib.suppress(PeerEnded):
        while isinstance(await coordinator.receive(), BillPlease):
            await coordinator.send(provider.bill)


if __name__ == "__main__":
    asyncio.run(main())
