"""A provider that does as it is told, and keeps the true bill: a process that knows nothing of budgets.

It speaks HTTP/1.1 as OpenAI's chat completions and responses and Anthropic's messages do, whole or as a
stream. What a call costs and what befalls it is in the call's prompt, which is a `Script` as JSON: so it
passes through any client, gateway or proxy. A token costs one unit.

    python -m tests.replay.provider      # tells its port in one line, and serves until its input ends
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
METER = "/meter/"
_STATUS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 429: "Too Many Requests"}
_START_SECONDS_MAX = 30


class Fate(StrEnum):
    """What befalls an attempt."""

    ANSWERED = "answered"
    DROPPED = "dropped"
    """Billed, and the connection is closed before a byte of the answer."""
    HUNG = "hung"
    """Billed, and never answered."""
    FAILED = "failed"
    """Billed, and answered with 500."""
    LIMITED = "limited"
    """Not billed, and answered with 429."""
    DENIED = "denied"
    """Not billed, and answered with 401."""
    CUT = "cut"
    """Billed, and cut in the middle of its stream."""


class Stream(StrEnum):
    """Whether an answer is asked for as a stream."""

    NO = "no"
    WITH_USAGE = "with usage"
    """And is asked to tell its usage."""
    WITHOUT_USAGE = "without usage"


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a call is to come to."""

    trial: str
    """Whose bill it is on."""
    call: str
    """Tells attempts of one call apart from other calls."""
    estimate: int
    """The most that the agent expects it to cost: nothing to the provider."""
    cost: int
    reports: int | None
    """The usage that is told, in tokens; None: none."""
    fates: tuple[Fate, ...] = (Fate.ANSWERED,)
    """Of its attempts; the last of them also of all that follow."""
    seconds: float = 0.0
    """How long it works before it answers."""
    input_tokens: int = 1
    """Of the usage that is told, those that were read."""
    words: int = 1
    """How many are written, of a token each."""
    stream: Stream = Stream.NO
    """How the answer is asked for: nothing to the provider, which reads the request."""

    def prompt(self) -> str:
        """As it travels."""
        return json.dumps(asdict(self))

    @classmethod
    def parsed(cls, prompt: str) -> Script:
        """As it was sent; any other words are a call of which nothing is known."""
        try:
            found = json.loads(prompt)
        except ValueError:
            return cls(trial="", call=prompt, estimate=0, cost=15, reports=15, input_tokens=12)
        found["fates"] = tuple(Fate(fate) for fate in found["fates"])
        found["stream"] = Stream(found["stream"])
        return cls(**found)


@dataclass
class Meter:
    """The true bill of one trial."""

    billed: int = 0
    attempts: int = 0
    billed_attempts: int = 0
    answered: set[str] = field(default_factory=set)
    """Calls that were answered at least once, with what was asked for."""
    seen: Counter[str] = field(default_factory=Counter)
    """Attempts, by call."""
    high: int = 0
    """The most attempts that were worked on at once."""
    working: int = 0

    def told(self) -> dict[str, int]:
        """As it is asked for."""
        return {
            "billed": self.billed,
            "attempts": self.attempts,
            "billed_attempts": self.billed_attempts,
            "answered": len(self.answered),
            "high": self.high,
            "working": self.working,
        }


class Provider:
    """Serves connections."""

    def __init__(self) -> None:
        self._meters: dict[str, Meter] = {}
        self._connections: set[asyncio.Task[None]] = set()

    def meter(self, trial: str) -> Meter:
        """The bill of a trial."""
        return self._meters.setdefault(trial, Meter())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests, one after the other."""
        # It is cancelled when the process ends.
        gone = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*gone):
            try:
                while await self._request(reader, writer):
                    pass
            finally:
                writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether another may follow."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.splitlines()
        method, target, _ = first.split(" ", 2)
        headers = dict(line.lower().split(":", 1) for line in lines if ":" in line)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if method == "GET" and target.startswith(METER):
            _answer(writer, 200, self.meter(target.removeprefix(METER)).told())
        elif method == "GET":
            _answer(writer, 200, {"object": "list", "data": []})
        else:
            return await self._call(writer, target, json.loads(body))
        await writer.drain()
        return True

    async def _call(
        self, writer: asyncio.StreamWriter, target: str, body: Mapping[str, Any]
    ) -> bool:
        script = Script.parsed(_prompt(body))
        meter = self.meter(script.trial)
        fate = script.fates[min(meter.seen[script.call], len(script.fates) - 1)]
        meter.seen[script.call] += 1
        meter.attempts += 1
        meter.working += 1
        meter.high = max(meter.high, meter.working)
        try:
            # Whoever hangs up meanwhile is billed all the same: the model has worked.
            if fate not in {Fate.LIMITED, Fate.DENIED}:
                meter.billed += script.cost
                meter.billed_attempts += 1
            await asyncio.sleep(script.seconds)
            return await self._befall(fate, writer, target, body, script)
        finally:
            meter.working -= 1

    async def _befall(
        self,
        fate: Fate,
        writer: asyncio.StreamWriter,
        target: str,
        body: Mapping[str, Any],
        script: Script,
    ) -> bool:
        meter = self.meter(script.trial)
        if fate is Fate.DROPPED:
            return False
        if fate is Fate.HUNG:
            await asyncio.sleep(3_600)
            return False
        if fate in {Fate.LIMITED, Fate.DENIED, Fate.FAILED}:
            status = {Fate.LIMITED: 429, Fate.DENIED: 401, Fate.FAILED: 500}[fate]
            error = {"type": "error", "error": {"type": str(fate), "message": str(fate)}}
            _answer(writer, status, error, {"retry-after-ms": "1"})
        else:
            meter.answered.add(script.call)
            reference = f"call-{script.call}-{meter.seen[script.call]}"
            if body.get("stream"):
                events = list(_events(target, body, script, reference))
                if fate is Fate.CUT:
                    events = events[: len(events) // 2]
                _stream(writer, events, whole=fate is not Fate.CUT)
            else:
                _answer(writer, 200, _whole(target, script, reference))
        await writer.drain()
        return fate is not Fate.CUT


def _prompt(body: Mapping[str, Any]) -> str:
    """The first words of the request."""
    if "input" in body:
        given = body["input"]
        return given if isinstance(given, str) else str(given[0]["content"])
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else str(content[0]["text"])


# --- answers as each interface has them ---


def _text(script: Script) -> str:
    """What is written."""
    return " ".join(["words"] * script.words)


def _counts(script: Script) -> tuple[int, int] | None:
    """Tokens read and written, as they are told."""
    if script.reports is None:
        return None
    read = max(0, min(script.input_tokens, script.reports))
    return read, script.reports - read


def _usage(target: str, script: Script) -> dict[str, Any] | None:
    counts = _counts(script)
    if counts is None:
        return None
    read, written = counts
    if target.endswith("/chat/completions"):
        total = read + written
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": total}
    return {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}


def _whole(target: str, script: Script, reference: str) -> dict[str, Any]:
    usage = _usage(target, script)
    told = {} if usage is None else {"usage": usage}
    if target.endswith("/messages"):
        content = [{"type": "text", "text": _text(script)}]
        return {
            "id": reference,
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": content,
            "stop_reason": "end_turn",
            "stop_sequence": None,
            **told,
        }
    if target.endswith("/responses"):
        part = {"type": "output_text", "text": _text(script), "annotations": []}
        message = {"type": "message", "id": "o", "role": "assistant", "status": "completed"}
        return {
            "id": reference,
            "object": "response",
            "created_at": 0,
            "model": "m",
            "status": "completed",
            "output": [{**message, "content": [part]}],
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
            **told,
        }
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": _text(script)},
        "finish_reason": "stop",
    }
    return {
        "id": reference,
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        **told,
    }


def _events(
    target: str, body: Mapping[str, Any], script: Script, reference: str
) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """Events by name and data; a chat completion's have no names, and end with none."""
    if target.endswith("/messages"):
        yield from _message_events(script, reference)
    elif target.endswith("/responses"):
        response = _whole(target, script, reference)
        yield "response.created", {"response": {**response, "output": [], "usage": None}}
        yield "response.output_text.delta", {"delta": _text(script), "item_id": "o"}
        yield "response.completed", {"response": response}
    else:
        frame = {"id": reference, "object": "chat.completion.chunk", "created": 0, "model": "m"}
        text = _text(script)
        for part in (text[: len(text) // 2], text[len(text) // 2 :]):
            delta = {"index": 0, "delta": {"content": part}, "finish_reason": None}
            yield "", {**frame, "choices": [delta], "usage": None}
        if (body.get("stream_options") or {}).get("include_usage"):
            yield "", {**frame, "choices": [], "usage": _usage(target, script)}
        yield "", None


def _message_events(script: Script, reference: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    counts = _counts(script)
    begun = {} if counts is None else {"usage": {"input_tokens": counts[0], "output_tokens": 1}}
    message = {"id": reference, "type": "message", "role": "assistant", "model": "m"}
    empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
    yield "message_start", {"message": {**message, **empty, **begun}}
    yield "content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}
    delta = {"type": "text_delta", "text": _text(script)}
    yield "content_block_delta", {"index": 0, "delta": delta}
    yield "content_block_stop", {"index": 0}
    ended = {} if counts is None else {"usage": {"output_tokens": counts[1]}}
    yield (
        "message_delta",
        {"delta": {"stop_reason": "end_turn", "stop_sequence": None}, **ended},
    )
    yield "message_stop", {}


def _answer(
    writer: asyncio.StreamWriter,
    status: int,
    content: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> None:
    body = json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} {_STATUS.get(status, 'Error')}", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += [f"content-length: {len(body)}", "", ""]
    writer.write("\r\n".join(lines).encode() + body)


def _stream(
    writer: asyncio.StreamWriter,
    events: list[tuple[str, Mapping[str, Any] | None]],
    *,
    whole: bool,
) -> None:
    head = ["HTTP/1.1 200 OK", "content-type: text/event-stream", "transfer-encoding: chunked"]
    writer.write("\r\n".join([*head, "", ""]).encode())
    for name, data in events:
        named = f"event: {name}\n" if name else ""
        content = {"type": name, **data} if name and data is not None else data
        text = "[DONE]" if content is None else json.dumps(content)
        piece = f"{named}data: {text}\n\n".encode()
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    if whole:
        writer.write(b"0\r\n\r\n")


# --- the process ---


@dataclass(frozen=True)
class Running:
    """A provider's process, as others see it."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://{HOST}:{self.port}"

    def meter(self, trial: str) -> dict[str, int]:
        """The true bill of a trial."""
        with urllib.request.urlopen(f"{self.url}{METER}{trial}") as answer:  # noqa: S310 - it is ours
            told: dict[str, int] = json.load(answer)
        return told


@contextlib.contextmanager
def running() -> Iterator[Running]:
    """A provider of one's own, in a process."""
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Running(int(process.stdout.readline()), process.pid)
        finally:
            process.stdin.close()
            process.wait(_START_SECONDS_MAX)


async def _serve() -> None:
    provider = Provider()
    server = await asyncio.start_server(provider.serve, HOST, 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve())
