"""What calls of a provider over HTTP may cost and have cost: what `peculium.httpx` asks before and after.

Prices are the caller's. `ListPrices` has them by model, for the requests and answers of OpenAI's chat
completions, responses and embeddings, of Anthropic's messages, and of those who speak as they do;
anything that has the two methods of `Prices` will do instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from peculium.errors import Malformed
from peculium.estimators import AdaptiveEstimator, Estimate
from peculium.money import PriceList, Usage

_METHOD = "POST"
_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_NO_OUTPUT = ("/embeddings", "/moderations", "/count_tokens")
_CACHE_WRITE = b'"cache_control"'
_CACHE_WRITE_HOUR = 2
"""What a token costs that is written into a cache for an hour, in tokens that are read."""
_CACHE_WRITE_MINUTES_PERCENT = 125
_PERCENT = 100
_WORDS = (
    *("content", "text", "tool_calls", "function_call", "reasoning_content", "thinking"),
    *("partial_json", "refusal", "arguments", "input"),
)
"""Where in an answer, or a piece of one, stands what a model has written."""
_LAST_DATA = b"[DONE]"
_FIRST_EVENT = "message_start"
_LAST_EVENTS = ("message_stop", "response.completed", "response.incomplete", "response.failed")


@dataclass(frozen=True, eq=False)
class Call:
    """One attempt to call a provider, as it is about to be sent.

    Attributes:
        method: For example "POST".
        host: Whom it goes to.
        path: Of the URL, without the query.
        content: The body.
    """

    method: str
    host: str
    path: str
    content: bytes

    @cached_property
    def body(self) -> Mapping[str, Any]:
        """The body's JSON object; empty if it is none."""
        try:
            body = json.loads(self.content)
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}

    @property
    def model(self) -> str:
        """The model that is asked; empty if none is named."""
        model = self.body.get("model")
        return model if isinstance(model, str) else ""

    @property
    def max_output_tokens(self) -> int | None:
        """The most tokens that may be written, by whatever name the request says it; None: it does not.

        Several answers to one request may each have so many.
        """
        limits = [self.body.get(name) for name in _LIMITS]
        found = [limit for limit in limits if type(limit) is int and limit >= 0]
        answers = self.body.get("n")
        each = max(found, default=None)
        return each if each is None or type(answers) is not int else each * max(answers, 1)

    @property
    def provider(self) -> str:
        """The provider, as the host names it."""
        labels = self.host.split(".")
        return labels[-2] if len(labels) > 1 and not labels[-1].isdecimal() else self.host


class Prices(Protocol):
    """What calls cost."""

    def estimate(self, call: Call) -> int | None:
        """The most that the call is expected to cost, at least 1, in the budget's unit.

        None: it costs nothing, such as a list of models; it is sent without a hold.
        """
        ...

    def cost(self, call: Call, usage: Usage, reported: Mapping[str, Any]) -> int:
        """What the call has cost, in the budget's unit.

        Args:
            call: The same object that was estimated.
            usage: What the provider has reported, in words that all have in common.
            reported: The same as the provider has said it.
        """
        ...


class ListPrices:
    """Costs by a price list, estimated at most or as learned.

    The tokens of a prompt are at most its bytes, so the request's bytes are an upper bound of them:
    text and images in the request included, but not what it only points to. `bytes_per_token` above 1
    counts fewer, and is an estimate. What is written is at most what the request allows; of a request
    without a limit, `output_limit`. An estimator learns from each call how much of that was needed,
    per model, and by the size of its prompt.

    Args:
        prices: By model. A model without a price is an error before anything is sent.
        output_limit: The most tokens that a model writes if the request sets no limit; absent: such
            requests are refused as malformed.
        bytes_per_token: How many bytes of the request make at least one token of the prompt.
        estimator: Absent: all that the call may cost is reserved.
    """

    def __init__(
        self,
        prices: PriceList,
        *,
        output_limit: int | None = None,
        bytes_per_token: int = 1,
        estimator: AdaptiveEstimator | None = None,
    ) -> None:
        if type(bytes_per_token) is not int or bytes_per_token < 1:
            problem = f"must be an int of at least 1, not {bytes_per_token!r}"
            raise _malformed("bytes_per_token", problem)
        self._prices = prices
        self._output_limit = output_limit
        self._bytes_per_token = bytes_per_token
        self._estimator = estimator
        self._estimates: WeakKeyDictionary[Call, Estimate] = WeakKeyDictionary()

    def estimate(self, call: Call) -> int | None:
        """What to reserve for a call.

        Raises:
            PriceUnknown: The model is not listed.
            Malformed: Neither the request nor this list limits what may be written.
        """
        if call.method != _METHOD or not call.model:
            return None
        prompt = -(-len(call.content) // self._bytes_per_token)
        if _CACHE_WRITE in call.content:
            prompt *= _CACHE_WRITE_HOUR
        limit = max(1, self._prices[call.model].upper(prompt, self._written_most(call)))
        if self._estimator is None:
            return limit
        estimate = self._estimator.estimate(call.model, limit=limit, size=prompt)
        self._estimates[call] = estimate
        return max(1, estimate.amount)

    def cost(self, call: Call, usage: Usage, reported: Mapping[str, Any]) -> int:
        """What a call has cost, by the list."""
        price = self._prices[call.model]
        written = _written_to_cache(reported)
        counted = Usage(
            input_tokens=usage.input_tokens + written,
            output_tokens=usage.output_tokens,
            cached_tokens=usage.cached_tokens,
        )
        cost = price.actual(counted)
        estimate = self._estimates.pop(call, None)
        if self._estimator is not None and estimate is not None:
            self._estimator.learn(estimate, cost)
        return cost

    def _written_most(self, call: Call) -> int:
        if call.path.endswith(_NO_OUTPUT):
            return 0
        limit = call.max_output_tokens
        if limit is None:
            limit = self._output_limit
        if limit is None:
            raise _malformed(
                "max_tokens",
                f"the request for {call.model!r} sets no limit to what may be written, and"
                " output_limit is not given",
            )
        return limit


def _written_to_cache(reported: Mapping[str, Any]) -> int:
    """What writing into a cache costs beyond reading, in tokens that are read; rounded up."""
    written = _count(reported, "cache_creation_input_tokens")
    split = reported.get("cache_creation")
    minutes = _count(split, "ephemeral_5m_input_tokens") if isinstance(split, Mapping) else 0
    minutes = min(minutes, written)
    more = minutes * (_CACHE_WRITE_MINUTES_PERCENT - _PERCENT)
    return (written - minutes) * (_CACHE_WRITE_HOUR - 1) - (-more // _PERCENT)


def _count(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return value if type(value) is int and value > 0 else 0


def _malformed(field: str, problem: str) -> Malformed:
    return Malformed(f"{field}: {problem}", facts={"field": field, "problem": problem})


# --- what answers say of their usage ---


@dataclass(frozen=True, slots=True)
class Answer:
    """What was read of an answer.

    Attributes:
        reference: The provider's id of the call; empty if it has none.
        usage: What it reported; None: nothing, or nothing that can be true.
        reported: The same as the provider has said it.
    """

    reference: str
    usage: Usage | None
    reported: Mapping[str, Any]


class AnswerReader:
    """Reads an answer as its bytes go by: a JSON object, or a stream of server-sent events.

    Usage counts if it is whole: numbers that are counts, and not zero where something was written.
    Of a stream that is what its last word says. It adds nothing up: a provider that repeats its usage
    in every chunk has not billed each of them.
    """

    def __init__(self, call: Call, content_type: str, reference: str = "") -> None:
        self._call = call
        self._streamed = content_type.partition(";")[0].strip().lower() == "text/event-stream"
        self._reference = reference
        self._id = ""
        self._left = bytearray()
        self._usage: dict[str, Any] = {}
        self._told = False
        """Usage was read that speaks of what was written, not of the prompt alone."""
        self._wrote = False
        self._ended = False

    def feed(self, content: bytes) -> None:
        """Read on."""
        self._left += content
        if not self._streamed:
            return
        *lines, rest = self._left.replace(b"\r\n", b"\n").split(b"\n")
        # A line end that was cut in two belongs to the next piece.
        self._left = bytearray(rest)
        for line in lines:
            if line.startswith(b"data:"):
                self._event(bytes(line[5:].strip()))

    def answer(self, *, whole: bool) -> Answer:
        """What was read.

        Args:
            whole: The answer was read to its end. If not, usage counts only if its last word was read.
        """
        if not self._streamed and whole:
            self._object(_parsed(bytes(self._left)))
        usage = self._counted() if self._told and (whole or self._ended) else None
        return Answer(self._id or self._reference, usage, self._usage)

    def _event(self, data: bytes) -> None:
        if data == _LAST_DATA:
            self._ended = True
            return
        event = _parsed(data)
        kind = event.get("type")
        inner = event.get("message") if kind == _FIRST_EVENT else event.get("response")
        self._object(inner if isinstance(inner, Mapping) else event, begun=kind == _FIRST_EVENT)
        self._ended = self._ended or kind in _LAST_EVENTS

    def _object(self, found: Mapping[str, Any], *, begun: bool = False) -> None:
        name = found.get("id")
        if isinstance(name, str) and not self._id:
            self._id = name
        usage = found.get("usage")
        if isinstance(usage, Mapping):
            self._usage.update({name: value for name, value in usage.items() if value is not None})
            self._told = self._told or not begun
        self._wrote = self._wrote or _has_output(found)

    def _counted(self) -> Usage | None:
        """The usage, if it can be true."""
        said = self._usage
        read = _first(said, "prompt_tokens", "input_tokens")
        written = _first(said, "completion_tokens", "output_tokens")
        if written is None and read is not None and self._call.path.endswith(_NO_OUTPUT):
            written = 0
        if read is None or written is None or (self._wrote and written == 0) or not read + written:
            return None
        details = said.get("prompt_tokens_details") or said.get("input_tokens_details")
        if isinstance(details, Mapping):
            cached = _count(details, "cached_tokens")
        else:
            # Anthropic counts these apart from the input tokens.
            cached = _count(said, "cache_read_input_tokens")
            read += cached + _count(said, "cache_creation_input_tokens")
        try:
            return Usage(
                provider=self._call.provider,
                model=self._call.model,
                input_tokens=read,
                output_tokens=written,
                cached_tokens=min(cached, read),
            )
        except Malformed:
            return None


def _first(said: Mapping[str, Any], *names: str) -> int | None:
    """The first of these that is said; None if none is, or if it is no count."""
    for name in names:
        if name in said:
            value = said[name]
            return value if type(value) is int and value >= 0 else None
    return None


def _has_output(found: Mapping[str, Any]) -> bool:
    """Whether an answer, or an event of it, has anything that a model has written."""
    texts: list[Any] = [found.get("content"), found.get("output"), found.get("delta")]
    choices = found.get("choices")
    for choice in choices if isinstance(choices, Sequence) else ():
        if isinstance(choice, Mapping):
            texts += [choice.get("text"), choice.get("message"), choice.get("delta")]
    return any(_says_something(text) for text in texts)


def _says_something(found: Any) -> bool:
    if isinstance(found, str):
        return bool(found)
    if isinstance(found, Mapping):
        return any(_says_something(found.get(name)) for name in _WORDS)
    if isinstance(found, Sequence):
        return any(isinstance(part, Mapping) or _says_something(part) for part in found)
    return False


def _parsed(data: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, Mapping) else {}
