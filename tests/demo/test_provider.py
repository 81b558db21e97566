"""The provider bills what it was sent, by prices of its own reckoning, and nothing else."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from fractions import Fraction
from typing import NoReturn

import pytest

from peculium_server.demo.channel import Channel, PeerEnded
from peculium_server.demo.messages import Bill, BillPlease, Listening
from peculium_server.demo.prices import MODEL, PRICES, actual
from peculium_server.demo.provider import HOST, ProviderClient, ProviderGone, ProviderRefused
from peculium_server.demo.trace import TOKENS_MAX


@asynccontextmanager
async def provider() -> AsyncIterator[tuple[Channel, int]]:
    """The provider as a process: its channel, and its port."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "peculium_server.demo.provider", stdin=theirs.fileno()
        )
    channel = await Channel.over(ours, "the provider")
    listening = await channel.receive()
    assert isinstance(listening, Listening)
    try:
        yield channel, listening.port
    finally:
        await channel.close()
        assert await process.wait() == 0


async def bill_of(channel: Channel) -> Bill:
    await channel.send(BillPlease())
    bill = await channel.receive()
    assert isinstance(bill, Bill)
    return bill


async def test_every_call_is_answered_with_its_usage_and_billed() -> None:
    async with provider() as (channel, port):
        client = await ProviderClient.connect(port)
        first = await client.complete(MODEL, prompt_tokens=4808, max_tokens=16, would_write=10)
        second = await client.complete(MODEL, prompt_tokens=1, max_tokens=64, would_write=1000)
        client.close()
        bill = await bill_of(channel)
    assert (first.prompt_tokens, first.completion_tokens) == (4808, 10)
    assert (second.prompt_tokens, second.completion_tokens) == (1, 64)
    assert first.call_id != second.call_id
    price = PRICES[MODEL]
    per_token = Fraction(price.input_per_million, 10**6), Fraction(price.output_per_million, 10**6)
    expected = 4809 * per_token[0] + 74 * per_token[1]
    assert bill == Bill(calls=2, input_tokens=4809, output_tokens=74, amount=int(expected))
    assert bill.amount == actual(4808, 10)[0] + actual(1, 64)[0]


async def test_a_call_whose_answer_nobody_reads_is_billed() -> None:
    async with provider() as (channel, port):
        request = {"model": MODEL, "prompt_tokens": 7, "max_tokens": 3, "would_write": 3}
        reader, writer = await asyncio.open_connection(HOST, port)
        # Half-closed: the provider has seen the end of input before it answers, or after.
        writer.write(json.dumps(request).encode() + b"\n")
        writer.write_eof()
        await reader.read()
        writer.close()
        assert (await bill_of(channel)).calls == 1


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"model": MODEL, "prompt_tokens": 1, "max_tokens": 1},
        {"model": "unheard-of", "prompt_tokens": 1, "max_tokens": 1, "would_write": 1},
        {"model": MODEL, "prompt_tokens": -1, "max_tokens": 1, "would_write": 1},
        {"model": MODEL, "prompt_tokens": 1.5, "max_tokens": 1, "would_write": 1},
        {"model": MODEL, "prompt_tokens": True, "max_tokens": 1, "would_write": 1},
        {"model": MODEL, "prompt_tokens": 1, "max_tokens": TOKENS_MAX + 1, "would_write": 1},
        {"model": [], "prompt_tokens": 1, "max_tokens": 1, "would_write": 1},
        [],
        "x",
    ],
)
async def test_what_is_not_a_request_is_refused_and_not_billed(request_: object) -> None:
    async with provider() as (channel, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(json.dumps(request_).encode() + b"\nnot even JSON\n")
        assert set(json.loads(await reader.readline())) == {"error"}
        assert set(json.loads(await reader.readline())) == {"error"}
        writer.close()
        assert (await bill_of(channel)).calls == 0


async def test_a_refused_call_is_an_error_of_its_own() -> None:
    async with provider() as (_, port):
        client = await ProviderClient.connect(port)
        with pytest.raises(ProviderRefused, match="unheard-of"):
            await client.complete("unheard-of", prompt_tokens=1, max_tokens=1, would_write=1)
        await client.complete(MODEL, prompt_tokens=1, max_tokens=1, would_write=1)
        client.close()


async def test_the_provider_ends_with_whoever_started_it() -> None:
    async with provider() as (channel, port):
        client = await ProviderClient.connect(port)
        await channel.close()
        with pytest.raises(ProviderGone):
            await _call_for_ever(client)
        client.close()
        with pytest.raises(PeerEnded):
            await channel.receive()


async def _call_for_ever(client: ProviderClient) -> NoReturn:
    while True:
        await client.complete(MODEL, prompt_tokens=1, max_tokens=1, would_write=1)
