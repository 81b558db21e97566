"""What a server tells those who collect spans, and that it tells nothing to nobody."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from peculium.v1 import types_pb2
from peculium.v1.admin_service_pb2_grpc import AdminServiceStub
from peculium.v1.ledger_service_pb2_grpc import LedgerServiceStub
from peculium_server.lanes.answers import Answer
from tests.lanes.memory import grant, spend
from tests.rpc.messages import message_of
from tests.rpc.wire import info_of, serving

HOLDER = types_pb2.Authority(holder=types_pb2.Holder())
TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID = 0xB7AD6B7169203331
CONTEXT = (("traceparent", f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"),)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is collected; a process can be given a provider only once, so it is lent one."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


def of_calls(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    """The spans of calls alone."""
    return [span for span in spans.get_finished_spans() if span.kind is trace.SpanKind.SERVER]


async def test_a_call_is_a_span_below_its_callers(spans: InMemorySpanExporter) -> None:
    async with serving() as wire:
        await AdminServiceStub(wire.channel).Grant(message_of(grant(), None), metadata=CONTEXT)
    [span] = of_calls(spans)
    assert span.name == "peculium.v1.AdminService/Grant"
    assert span.kind is trace.SpanKind.SERVER
    assert span.parent is not None
    assert (span.parent.trace_id, span.parent.span_id) == (TRACE_ID, SPAN_ID)
    assert span.attributes is not None
    assert span.attributes["rpc.system.name"] == "grpc"
    assert span.attributes["rpc.method"] == span.name
    assert span.attributes["rpc.response.status_code"] == "OK"


async def test_a_refused_call_is_a_span_with_its_status_and_no_error(
    spans: InMemorySpanExporter,
) -> None:
    async with serving() as wire:
        with pytest.raises(grpc.aio.AioRpcError):
            await LedgerServiceStub(wire.channel).Spend(message_of(spend(grant()), HOLDER))
    [span] = of_calls(spans)
    assert span.parent is None
    assert span.attributes is not None
    assert span.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert span.attributes["peculium.refusals"] == ("capability_unknown",)
    assert span.status.is_unset
    assert not span.events


class Broken:
    """A ledger with a bug, which looks at the span that it is called in."""

    def __init__(self) -> None:
        self.seen: list[trace.Span] = []

    async def execute(self, *_: object) -> list[Answer]:
        self.seen.append(trace.get_current_span())
        raise ZeroDivisionError


async def test_a_span_and_the_log_name_a_call_alike(
    spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    async with serving(ledger=broken) as wire:
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError):
                await LedgerServiceStub(wire.channel).Spend(message_of(spend(grant()), HOLDER))
    names = [str((span.attributes or {})["peculium.request_id"]) for span in of_calls(spans)]
    logged = [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]
    assert len({*names}) == len(names) == 2
    assert all(name in said for name, said in zip(names, logged, strict=True))
    assert [each.get_span_context() for each in broken.seen] == [
        span.context for span in of_calls(spans)
    ]
    assert all(span.status.status_code is trace.StatusCode.ERROR for span in of_calls(spans))
    assert {(span.attributes or {})["error.type"] for span in of_calls(spans)} == {"INTERNAL"}


async def test_without_somebody_who_collects_spans_there_are_none() -> None:
    broken = Broken()
    async with serving(ledger=broken) as wire:
        stub = LedgerServiceStub(wire.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Spend(message_of(spend(grant()), HOLDER), metadata=CONTEXT)
    assert info_of(caught.value).metadata["request"]
    assert broken.seen == [trace.INVALID_SPAN]


async def test_of_calls_without_a_context_some_are_traced_and_of_others_all(
    spans: InMemorySpanExporter,
) -> None:
    async with serving(trace_one_in=10) as wire:
        stub = AdminServiceStub(wire.channel)
        for _ in range(20):
            await stub.Grant(message_of(grant(), None))
        assert len(of_calls(spans)) == 2
        for _ in range(20):
            await stub.Grant(message_of(grant(), None), metadata=CONTEXT)
    assert len(of_calls(spans)) == 22
