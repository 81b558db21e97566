from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, strategies as st

from peculium import Price, PriceList, Usage
from peculium.errors import Malformed, PriceUnknown
from peculium.estimators import AdaptiveEstimator
from peculium.metering import Answer, AnswerReader, Call, ListPrices

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"
UNIT = 1_000_000
PRICES = PriceList({"m": Price(input_per_million=UNIT, output_per_million=4 * UNIT)})


def call(path: str = CHAT, host: str = "api.openai.com", **body: Any) -> Call:
    return Call("POST", host, path, json.dumps({"model": "m", **body}).encode())


def read_whole(content: Mapping[str, Any], path: str = CHAT) -> Answer:
    reader = AnswerReader(call(path), JSON)
    reader.feed(json.dumps(content).encode())
    return reader.answer(whole=True)


def stream(events: Sequence[object]) -> bytes:
    told = (event if isinstance(event, str) else json.dumps(event) for event in events)
    return b"".join(f"event: x\r\ndata: {text}\r\n\r\n".encode() for text in told)


def read_stream(content: bytes, path: str = CHAT, *, whole: bool = True, size: int = 7) -> Answer:
    reader = AnswerReader(call(path), EVENTS)
    for first in range(0, len(content), size):
        reader.feed(content[first : first + size])
    return reader.answer(whole=whole)


def said(text: str = "words", **usage: Any) -> dict[str, Any]:
    choices = [{"message": {"role": "assistant", "content": text}}]
    return {"id": "chatcmpl-1", "choices": choices, "usage": usage}


WRITTEN = {"choices": [{"index": 0, "delta": {"content": "words"}}], "usage": None}
TOLD = {"id": "c", "choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}


# --- usage in answers ---


def test_usage_is_read_from_a_chat_completion() -> None:
    details = {"cached_tokens": 8}
    answer = read_whole(said(prompt_tokens=12, completion_tokens=3, prompt_tokens_details=details))
    assert answer.reference == "chatcmpl-1"
    assert answer.usage == Usage(
        provider="openai", model="m", input_tokens=12, output_tokens=3, cached_tokens=8
    )


def test_usage_is_read_from_a_response() -> None:
    usage = {"input_tokens": 12, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 2}}
    output = [{"type": "message", "content": [{"type": "output_text", "text": "words"}]}]
    answer = read_whole({"id": "resp_1", "output": output, "usage": usage}, RESPONSES)
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (12, 3)
    assert answer.usage.cached_tokens == 2


def test_usage_of_a_message_counts_what_was_read_from_and_written_to_the_cache() -> None:
    usage = {"input_tokens": 5, "output_tokens": 3}
    usage |= {"cache_read_input_tokens": 100, "cache_creation_input_tokens": 20}
    content = [{"type": "text", "text": "words"}]
    answer = read_whole({"id": "msg_1", "content": content, "usage": usage}, MESSAGES)
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.cached_tokens) == (125, 100)


def test_an_embedding_writes_nothing_and_is_paid_by_what_it_read() -> None:
    content = {"data": [{"embedding": [0.1]}], "usage": {"prompt_tokens": 9, "total_tokens": 9}}
    answer = read_whole(content, "/v1/embeddings")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (9, 0)


@pytest.mark.parametrize(
    "content",
    [
        {"id": "c", "choices": [{"message": {"content": "words"}}]},
        said() | {"usage": None},
        said() | {"usage": {}},
        said() | {"usage": "many"},
        said(prompt_tokens=0, completion_tokens=0),
        said(prompt_tokens=12, completion_tokens=0),
        said(prompt_tokens=12),
        said(prompt_tokens=-1, completion_tokens=3),
        said(prompt_tokens="12", completion_tokens=3),
        said(prompt_tokens=12, completion_tokens=3.5),
        said(prompt_tokens=12, completion_tokens=2**60),
        said(prompt_tokens=True, completion_tokens=3),
    ],
)
def test_usage_that_is_missing_or_cannot_be_true_is_none(content: dict[str, Any]) -> None:
    answer = read_whole(content)
    assert answer.usage is None
    assert answer.reference in {"c", "chatcmpl-1"}


def test_a_call_of_a_tool_is_something_written() -> None:
    message = {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    usage = {"prompt_tokens": 12, "completion_tokens": 0}
    assert read_whole({"choices": [{"message": message}], "usage": usage}).usage is None


def test_an_answer_that_says_nothing_may_have_written_nothing() -> None:
    answer = read_whole(said("", prompt_tokens=12, completion_tokens=0))
    assert answer.usage is not None
    assert answer.usage.output_tokens == 0


@given(st.binary(max_size=200))
def test_bytes_that_are_no_answer_are_no_usage(content: bytes) -> None:
    for kind in (JSON, EVENTS):
        reader = AnswerReader(call(), kind)
        reader.feed(content)
        assert reader.answer(whole=True).usage is None


@pytest.mark.parametrize("content", [b"", b"[]", b'"usage"', b'{"usage": []}', b"\xff\xfe"])
def test_json_that_is_no_answer_is_no_usage(content: bytes) -> None:
    reader = AnswerReader(call(), JSON, "req_1")
    reader.feed(content)
    assert reader.answer(whole=True) == Answer("req_1", None, {})


# --- usage in streams ---


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_usage_is_read_from_the_last_chunk_however_the_stream_is_cut_up(size: int) -> None:
    answer = read_stream(stream([WRITTEN, WRITTEN, TOLD, "[DONE]"]), size=size)
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (12, 3)
    assert answer.reference == "c"


def test_usage_that_every_chunk_repeats_is_not_added_up() -> None:
    chunks = [{**TOLD, "usage": {"prompt_tokens": 12, "completion_tokens": n}} for n in (1, 2, 3)]
    answer = read_stream(stream([*chunks, "[DONE]"]))
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (12, 3)


def test_a_stream_that_tells_no_usage_has_none() -> None:
    assert read_stream(stream([WRITTEN, "[DONE]"])).usage is None


def test_who_leaves_after_the_last_word_has_heard_the_usage() -> None:
    assert read_stream(stream([WRITTEN, TOLD, "[DONE]"]), whole=False).usage is not None
    assert read_stream(stream([WRITTEN, TOLD]), whole=False).usage is None
    assert read_stream(stream([WRITTEN, TOLD]), whole=True).usage is not None


def message_events(output: int) -> list[dict[str, Any]]:
    begun = {"id": "msg_1", "content": [], "usage": {"input_tokens": 20, "output_tokens": 1}}
    delta = {"type": "text_delta", "text": "words"}
    return [
        {"type": "message_start", "message": begun},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": output}},
        {"type": "message_stop"},
    ]


def test_usage_of_a_message_is_what_its_last_event_says() -> None:
    answer = read_stream(stream(message_events(17)), MESSAGES)
    assert answer.reference == "msg_1"
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (20, 17)


@pytest.mark.parametrize("whole", [True, False])
def test_a_message_that_was_only_begun_has_told_no_usage(whole: bool) -> None:
    assert read_stream(stream(message_events(17)[:2]), MESSAGES, whole=whole).usage is None


def test_usage_of_a_response_is_in_its_last_event() -> None:
    done = {"id": "resp_1", "output": [], "usage": {"input_tokens": 12, "output_tokens": 3}}
    events = [
        {"type": "response.created", "response": {"id": "resp_1", "usage": None}},
        {"type": "response.output_text.delta", "delta": "words"},
        {"type": "response.completed", "response": done},
    ]
    answer = read_stream(stream(events), RESPONSES, whole=False)
    assert answer.reference == "resp_1"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 3


# --- calls ---


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_a_limit_is_known_by_each_of_its_names(name: str) -> None:
    limits: dict[str, Any] = {name: 77}
    assert call(**limits).max_output_tokens == 77


def test_each_of_several_answers_may_be_as_long_as_one() -> None:
    assert call(max_tokens=77, n=3).max_output_tokens == 231


def test_a_call_without_a_limit_has_none() -> None:
    assert call().max_output_tokens is None
    assert Call("POST", "h", CHAT, b"no json").max_output_tokens is None
    assert Call("POST", "h", CHAT, b"[1]").model == ""


@pytest.mark.parametrize(
    ("host", "provider"),
    [
        ("api.openai.com", "openai"),
        ("api.anthropic.com", "anthropic"),
        ("localhost", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_a_provider_is_called_by_its_domain(host: str, provider: str) -> None:
    assert call(host=host).provider == provider


# --- prices ---


def test_all_that_a_call_may_cost_is_estimated() -> None:
    asked = call(max_tokens=100)
    assert ListPrices(PRICES).estimate(asked) == len(asked.content) + 400


def test_a_prompt_that_is_written_to_a_cache_may_cost_twice() -> None:
    asked = call(max_tokens=100, system=[{"text": "t", "cache_control": {"type": "ephemeral"}}])
    assert ListPrices(PRICES).estimate(asked) == 2 * len(asked.content) + 400


def test_fewer_tokens_than_bytes_may_be_counted() -> None:
    asked = call(max_tokens=0, messages=["x" * 1_000])
    tokens = -(-len(asked.content) // 4)
    assert ListPrices(PRICES, bytes_per_token=4).estimate(asked) == tokens
    with pytest.raises(Malformed):
        ListPrices(PRICES, bytes_per_token=0)


def test_what_is_no_call_of_a_model_costs_nothing() -> None:
    assert ListPrices(PRICES).estimate(Call("GET", "h", "/v1/models", b"")) is None
    assert ListPrices(PRICES).estimate(Call("POST", "h", "/v1/files", b"{}")) is None


def test_a_model_without_a_price_is_an_error() -> None:
    with pytest.raises(PriceUnknown):
        ListPrices(PRICES).estimate(call(model="another"))


def test_a_request_without_a_limit_needs_one() -> None:
    with pytest.raises(Malformed) as refused:
        ListPrices(PRICES).estimate(call())
    assert refused.value.field == "max_tokens"
    asked = call()
    assert ListPrices(PRICES, output_limit=10).estimate(asked) == len(asked.content) + 40


def test_an_embedding_needs_no_limit() -> None:
    asked = call("/v1/embeddings")
    assert ListPrices(PRICES).estimate(asked) == len(asked.content)


def test_what_writing_to_a_cache_costs_beyond_reading_is_counted_and_rounded_up() -> None:
    prices = ListPrices(PRICES)
    usage = Usage(input_tokens=110, output_tokens=2)
    split = {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 0}
    hour = {"cache_creation_input_tokens": 10}
    assert prices.cost(call(), usage, {}) == 118
    # Who does not say for how long may have meant an hour.
    assert prices.cost(call(), usage, hour) == 128
    assert prices.cost(call(), usage, {**hour, "cache_creation": split}) == 121


def test_with_an_estimator_less_is_estimated_as_soon_as_enough_is_known() -> None:
    estimator = AdaptiveEstimator(coverage=0.9)
    prices = ListPrices(PRICES, estimator=estimator)
    first = prices.estimate(call(max_tokens=1_000))
    for _ in range(30):
        asked = call(max_tokens=1_000)
        prices.estimate(asked)
        prices.cost(asked, Usage(input_tokens=20, output_tokens=5), {})
    assert first is not None
    assert first > 4_000
    assert prices.estimate(call(max_tokens=1_000)) == 40
    assert estimator.calibration("m").calls == 30


def test_calls_of_unknown_cost_are_not_learned_from() -> None:
    estimator = AdaptiveEstimator(coverage=0.9)
    ListPrices(PRICES, estimator=estimator).estimate(call(max_tokens=10))
    assert estimator.calibration("m").calls == 0
