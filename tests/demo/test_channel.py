"""A message arrives as it was sent, and the end of one side is noticed by the other."""

from __future__ import annotations

import socket
from typing import Any, NoReturn, get_args

import pytest

from peculium_server.demo.channel import Channel, PeerEnded, first_error
from peculium_server.demo.messages import (
    Answer,
    Ask,
    Begin,
    Bill,
    BillPlease,
    Done,
    Failed,
    Listening,
    Message,
    Ready,
    Returned,
    Start,
    Tally,
    Work,
)

ONE_OF_EACH: list[Message] = [
    Start(agents=8, target="h:1", provider_port=1, timeout_seconds=1.5),
    Work(requests=[[1, 2, 3]] * 1000),
    Begin(path="a/b", root_id="00", budget_id="ff", carrier={}),
    Answer(ask=1, funded=True, unspent_max=2**62),
    Ready(token_id="ab"),
    Tally(calls=1, refused=2, spent=2**62, held=4),
    Ask(ask=1, need=2),
    Returned(),
    Done(calls=[1], refused=[2]),
    Failed(problem="gone\nwild"),
    Listening(port=1),
    BillPlease(),
    Bill(calls=1, input_tokens=2, output_tokens=3, amount=2**70),
]


def test_the_table_above_has_every_message() -> None:
    kinds: list[Any] = [type(message) for message in ONE_OF_EACH]
    assert kinds == list(get_args(Message))


async def pair() -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    return await Channel.over(one, "one"), await Channel.over(other, "other")


async def test_every_message_arrives_as_it_was_sent_and_in_order() -> None:
    here, there = await pair()
    for message in ONE_OF_EACH:
        await here.send(message)
    assert [await there.receive() for _ in ONE_OF_EACH] == ONE_OF_EACH
    await here.close()
    await there.close()


async def test_what_was_sent_before_the_end_is_received_before_it() -> None:
    here, there = await pair()
    await here.send(Returned())
    await here.close()
    assert await there.receive() == Returned()
    with pytest.raises(PeerEnded, match="other ended") as caught:
        await there.receive()
    assert caught.value.peer == "other"
    with pytest.raises(PeerEnded):
        await _send_for_ever(there)
    await there.close()


async def _send_for_ever(channel: Channel) -> NoReturn:
    while True:
        await channel.send(Returned())


def test_the_first_error_of_a_group_is_found_at_any_depth() -> None:
    first = ValueError("first")
    inner = ExceptionGroup("inner", [first, KeyError()])
    assert first_error(ExceptionGroup("outer", [inner, OSError()])) is first
    assert first_error(first) is first
