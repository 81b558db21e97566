"""Calls with secrets where they belong, and where they do not; and everything that comes back."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.system.world import ADMIN, AUDIT

ENDLESS = AUDIT + "WatchEntries"
STREAMS = {ENDLESS, AUDIT + "Export", AUDIT + "Verify"}
TELLS_A_SECRET = ADMIN + "CreateWebhook"
"""The one answer that has one: what the receiver of a webhook has to know."""
METADATA_BYTES = 60_000
"""More than a server takes."""
MESSAGE_BYTES = 5 * 1024 * 1024
"""Likewise."""

Metadata = tuple[tuple[str, str | bytes], ...]


def bearer(key: str) -> Metadata:
    """How a key is presented."""
    return (("authorization", f"Bearer {key}"),)


def changed(text: str) -> str:
    """A text with its last character changed: all the rest is there for who may see it."""
    return text[:-1] + ("A" if text[-1] != "A" else "B")


@dataclass
class Caller:
    """Calls methods by their names, with whatever bytes."""

    channel: grpc.Channel
    key: str = field(repr=False)
    driven: set[str] = field(default_factory=set)
    """The methods that were called."""
    statuses: set[str] = field(default_factory=set)
    errors: list[bytes] = field(default_factory=list, repr=False)
    """All that is known of each call that has failed."""
    answers: list[bytes] = field(default_factory=list, repr=False)

    def call(
        self,
        method: str,
        request: bytes | Message,
        *,
        metadata: Metadata | None = None,
        timeout: float = 20,
    ) -> None:
        """Call a method, by default with the key."""
        self.driven.add(method)
        data = request.SerializeToString() if isinstance(request, Message) else request
        make: Any = self.channel.unary_stream if method in STREAMS else self.channel.unary_unary
        try:
            answer = make(method)(
                data, timeout=timeout, metadata=bearer(self.key) if metadata is None else metadata
            )
            answers = [answer] if method not in STREAMS else _streamed(method, answer)
        except grpc.RpcError as error:
            self.statuses.add(_code(error).name)
            self.errors.append(everything_of(error))
            return
        if method != TELLS_A_SECRET:
            self.answers += answers


def _streamed(method: str, answers: Any) -> list[bytes]:
    if method != ENDLESS:
        return list(answers)
    first = next(answers)
    answers.cancel()
    return [first]


def _code(error: Any) -> grpc.StatusCode:
    code: grpc.StatusCode = error.code()
    return code


def everything_of(error: Any) -> bytes:
    """All that a failed call says to who caught it: its texts, its traceback, its metadata as they came."""
    texts = [repr(error), str(error), *traceback.format_exception(error)]
    texts += [error.details() or "", error.debug_error_string() or ""]
    parts = [text.encode(errors="surrogateescape") for text in texts]
    for key, value in (*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())):
        parts += [key.encode(), value if isinstance(value, bytes) else value.encode()]
    return b"\n".join(parts)


def wrong_credentials(key: str, capability: str) -> Iterator[Metadata]:
    """Ways to present a key, or what is taken for one, that nobody is let in by."""
    yield ()
    yield (("authorization", key),)
    yield (("authorization", f"Basic {key}"),)
    yield bearer(changed(key))
    yield bearer(key + "x")
    yield bearer(capability)
    yield (*bearer(key), *bearer(key))
    yield (("x-api-key", key), ("peculium-key-bin", key.encode()))
    yield (*bearer(key), ("x-padding", key * (METADATA_BYTES // len(key))))


def wrong_requests(request: Message, texts: Sequence[str], secret: bytes) -> Iterator[bytes]:
    """A request with one of some texts in each of its own, with a secret for each of its ids, and cut.

    Token ids and digests are left: a secret is as long as what it is known by, and nobody can tell.
    """
    data = request.SerializeToString()
    yield data[:-1]
    yield data[: len(data) // 2]
    yield data + secret
    for place in range(len(list(_places(request)))):
        copy = type(request)()
        copy.CopyFrom(request)
        if _put(*list(_places(copy))[place], texts[place % len(texts)], secret):
            yield copy.SerializeToString()


def _places(message: Any) -> Iterator[tuple[Any, Any]]:
    """Every field of a message, and of those that are in it."""
    for each in message.DESCRIPTOR.fields:
        yield message, each
        if each.message_type is None or each.message_type.GetOptions().map_entry:
            continue
        value = getattr(message, each.name)
        if each.is_repeated:
            for first in value[:1]:
                yield from _places(first)
        elif message.HasField(each.name):
            yield from _places(value)


def _put(message: Any, place: FieldDescriptor, text: str, secret: bytes) -> bool:
    """Put a text or a secret into a field; say whether it can take one."""
    if place.message_type is not None:
        if not place.message_type.GetOptions().map_entry:
            return False
        getattr(message, place.name).update({"team": text})
        return True
    if place.cpp_type != FieldDescriptor.CPPTYPE_STRING:
        return False
    value: str | bytes = text
    if place.type == FieldDescriptor.TYPE_BYTES:
        value = secret
        if place.name.endswith(("token_id", "digest")):
            return False
    if place.is_repeated:
        getattr(message, place.name).append(value)
    else:
        setattr(message, place.name, value)
    return True
