"""An operation's trace, from the program that asks to the database, and from an entry to it and back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import grpc
import psycopg
import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

import peculium
from peculium import Child, EntryFilter, Reach, Usage
from peculium.errors import BudgetExhausted
from peculium.v1 import ledger_service_pb2 as ledger, types_pb2
from peculium.v1.ledger_service_pb2_grpc import LedgerServiceStub
from tests.forked import Forked
from tests.postgres import Server as PostgresServer
from tests.server import RunningServer, starting
from tests.system.world import dump
from tests.telemetry.receiver import Receiver, attributes, receiving

BATCH = "peculium.v1.LedgerService/Batch"
HOST = Path(__file__).with_name("host.py")


@dataclass(frozen=True)
class Traced:
    """A server and this program, both of which export to one collector."""

    receiver: Receiver
    server: RunningServer
    database: str
    tracer: trace.Tracer

    @contextmanager
    def run(self, name: str) -> Iterator[str]:
        """A span of this program's own; yields its trace."""
        with self.tracer.start_as_current_span(name) as span:
            yield f"{span.get_span_context().trace_id:032x}"

    def spans(self, trace_id: str) -> list[Span]:
        return [span for span in self.receiver.spans if span.trace_id.hex() == trace_id]

    def one(self, trace_id: str, name: str, kind: Span.SpanKind.ValueType | None = None) -> Span:
        """The span of that name (or beginning) in a trace, as soon as it has arrived."""

        def found() -> list[Span]:
            return [
                span
                for span in self.spans(trace_id)
                if span.name.startswith(name) and kind in (None, span.kind)
            ]

        [span] = self.receiver.wait(found)
        assert isinstance(span, Span)
        return span

    @asynccontextmanager
    async def in_the_way(self) -> AsyncIterator[None]:
        """Hold a lock that every lane's transaction needs."""
        async with await psycopg.AsyncConnection.connect(self.database) as connection:
            await connection.execute("UPDATE lanes SET position = position")
            yield
            await connection.rollback()

    def attempts(self, trace_id: str) -> list[Span]:
        """The attempts of a trace at transactions."""
        return [span for span in self.spans(trace_id) if span.name.startswith("TRANSACTION ")]

    def failed(self, trace_id: str) -> list[Span]:
        """Those that were in vain."""
        return [
            span for span in self.attempts(trace_id) if span.status.code == Status.STATUS_CODE_ERROR
        ]


@pytest.fixture(scope="module")
def _module(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Receiver, RunningServer, str]]:
    with (
        receiving() as receiver,
        postgres.fresh_database(postgres.migrated_template()) as database,
        starting(tmp_path_factory.mktemp("server"), Forked) as start,
    ):
        server = start("--database-url", database, **receiver.variables)
        yield receiver, server, database


@pytest.fixture
def traced(
    _module: tuple[Receiver, RunningServer, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Traced]:
    receiver, server, database = _module
    provider = TracerProvider()
    exporter = OTLPSpanExporter(endpoint=f"http://{receiver.address}", insecure=True)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # A process can be given a provider only once, so it is lent one.
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield Traced(receiver, server, database, provider.get_tracer("test"))
    provider.shutdown()


def linked(span: Span) -> set[bytes]:
    return {link.span_id for link in span.links}


def test_an_operation_is_one_trace_from_the_program_to_the_database(traced: Traced) -> None:
    with peculium.connect(traced.server.address) as client:
        client.admin.grant("acme", unit="calls", amount=100, holder="dev")
        acme = client.open("acme")
        with traced.run("agent") as trace_id:
            acme.spend(1)
    own = traced.one(trace_id, "agent")
    operation = traced.one(trace_id, "peculium.spend")
    request = traced.one(trace_id, BATCH, Span.SPAN_KIND_CLIENT)
    call = traced.one(trace_id, BATCH, Span.SPAN_KIND_SERVER)
    lane = traced.one(trace_id, "lane ")
    transaction = traced.one(trace_id, "TRANSACTION ")
    parents = [own, operation, request, call, lane, transaction]
    for above, below in pairwise(parents):
        assert below.parent_span_id == above.span_id, below.name
    assert operation.span_id in linked(lane)
    assert attributes(call.attributes) | {
        "rpc.system.name": "grpc",
        "rpc.method": BATCH,
        "rpc.response.status_code": "OK",
        "peculium.operations": "1",
    } == attributes(call.attributes)
    said = attributes(request.attributes)
    assert (said["rpc.system.name"], said["rpc.method"]) == ("grpc", BATCH)
    assert f"{said['server.address']}:{said['server.port']}" == traced.server.address
    assert attributes(transaction.attributes)["db.system.name"] == "postgresql"
    assert transaction.kind == Span.SPAN_KIND_CLIENT


def test_a_program_may_begin_to_collect_spans_after_it_has_connected(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    collecting = trace.get_tracer_provider
    monkeypatch.setattr(trace, "get_tracer_provider", trace.NoOpTracerProvider)
    with peculium.connect(traced.server.address) as client:
        client.admin.grant("late", unit="calls", amount=100, holder="dev")
        late = client.open("late")
        monkeypatch.setattr(trace, "get_tracer_provider", collecting)
        # With this request it is noticed, though the operation in it has no span yet.
        late.spend(1)
        with traced.run("agent") as trace_id:
            late.spend(1)
    operation = traced.one(trace_id, "peculium.spend")
    assert operation.parent_span_id == traced.one(trace_id, "agent").span_id


async def test_operations_that_travel_together_are_linked_with_what_carries_them(
    traced: Traced,
) -> None:
    async with peculium.aio.connect(traced.server.address) as client:
        await client.admin.grant("crew", unit="calls", amount=100, holder="dev")
        crew = await client.open("crew")

        async def agent(number: int) -> str:
            with traced.run(f"agent {number}") as trace_id:
                await crew.spend(1)
            return trace_id

        traces = await asyncio.gather(*map(agent, range(5)))
    operations = [traced.one(each, "peculium.spend") for each in traces]
    request = traced.one(traces[0], BATCH, Span.SPAN_KIND_CLIENT)
    assert request.parent_span_id == operations[0].span_id
    assert linked(request) == {each.span_id for each in operations[1:]}
    lane = traced.one(traces[0], "lane ")
    assert linked(lane) >= {each.span_id for each in operations}


async def test_calls_that_share_a_transaction_are_linked_with_it_and_it_with_them(
    traced: Traced,
) -> None:
    async with (
        peculium.aio.connect(traced.server.address) as first,
        peculium.aio.connect(traced.server.address) as second,
    ):
        await first.admin.grant("shared", unit="calls", amount=100, holder="dev")
        budgets = [await client.open("shared") for client in (first, second)]

        async def agent(budget: peculium.aio.Budget) -> str:
            with traced.run("agent") as trace_id:
                await budget.spend(1)
            return trace_id

        async with traced.in_the_way():
            with traced.run("agent") as trace_id:
                blocked = asyncio.create_task(budgets[0].spend(1))
            await asyncio.to_thread(traced.receiver.wait, lambda: traced.failed(trace_id))
            # The next transaction takes all that waits.
            waiting = [asyncio.create_task(agent(budget)) for budget in budgets]
            await asyncio.to_thread(
                traced.receiver.wait, lambda: traced.receiver.value("peculium.lane.depth") == 2
            )
        await blocked
        traces = [trace_id, *await asyncio.gather(*waiting)]

    def shared() -> tuple[Span, list[Span]] | None:
        """A transaction for several calls, and those of them that it did not begin with."""
        spans = [span for each in traces for span in traced.spans(each)]
        calls = [span for span in spans if (span.name, span.kind) == (BATCH, Span.SPAN_KIND_SERVER)]
        for lane in spans:
            if lane.name.startswith("lane "):
                others = [call for call in calls if lane.span_id in linked(call)]
                operations = int(attributes(lane.attributes)["peculium.batch.operations"])
                if operations == len(others) + 1 > 1:
                    return lane, others
        return None

    # Which they are is open: who is in the way for long is answered that it was, and waits again.
    lane, others = traced.receiver.wait(shared)
    assert linked(lane) >= {call.span_id for call in others}
    assert lane.trace_id not in {call.trace_id for call in others}


async def test_a_transaction_that_is_tried_again_says_of_each_attempt_why(traced: Traced) -> None:
    async with peculium.aio.connect(traced.server.address) as client:
        await client.admin.grant("again", unit="calls", amount=100, holder="dev")
        budget = await client.open("again")
        async with traced.in_the_way():
            with traced.run("agent") as trace_id:
                blocked = asyncio.create_task(budget.spend(1))
            await asyncio.to_thread(traced.receiver.wait, lambda: traced.failed(trace_id))
        await blocked
    traced.receiver.wait(lambda: len(traced.attempts(trace_id)) > len(traced.failed(trace_id)))
    for span in traced.failed(trace_id):
        said = attributes(span.attributes)
        assert said["db.response.status_code"] == said["error.type"] == "55P03"
    # Of a transaction that is given up the client asks again, and that is another one.
    numbers: dict[bytes, list[int]] = {}
    for span in traced.attempts(trace_id):
        number = int(attributes(span.attributes)["peculium.attempt"])
        numbers.setdefault(span.parent_span_id, []).append(number)
    for each in numbers.values():
        assert sorted(each) == list(range(1, len(each) + 1))


def test_an_auditor_goes_from_an_entry_to_its_trace_and_back(traced: Traced) -> None:
    with peculium.connect(traced.server.address) as client:
        client.admin.grant("audited", unit="calls", amount=100, holder="dev")
        audited = client.open("audited")
        with traced.run("agent") as trace_id, audited.reserve(5) as hold:
            hold.settle(3)
        audited.spend(1)
        found = list(client.audit.entries("audited", selected=EntryFilter(trace_id=trace_id)))
        last = list(client.audit.entries("audited"))[-1]
    assert [entry.kind for entry in found] == ["RESERVE", "SETTLE"]
    for entry in found:
        span = traced.one(trace_id, f"peculium.{entry.kind.lower()}")
        assert attributes(span.attributes)["peculium.operation_id"] == entry.operation_id
    # Outside of any span each operation is the beginning of a trace, and its entry says which.
    assert last.trace_id != trace_id
    traced.one(last.trace_id or "", "peculium.spend")


def test_what_a_call_to_a_model_has_used_is_on_the_operations_span(traced: Traced) -> None:
    with peculium.connect(traced.server.address) as client:
        client.admin.grant("models", unit="calls", amount=100, holder="dev")
        budget = client.open("models")
        with traced.run("agent") as trace_id:
            used = Usage(
                provider="anthropic",
                model="m-2026",
                input_tokens=12,
                output_tokens=7,
                cached_tokens=3,
            )
            with budget.reserve(5, labels={"model": "m", "team": "whales"}) as hold:
                hold.settle(3, usage=used)
    reserved = attributes(traced.one(trace_id, "peculium.reserve").attributes)
    settled = attributes(traced.one(trace_id, "peculium.settle").attributes)
    assert reserved["gen_ai.request.model"] == "m"
    assert {key: value for key, value in settled.items() if key.startswith("gen_ai.")} == {
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m-2026",
        "gen_ai.usage.input_tokens": "12",
        "gen_ai.usage.output_tokens": "7",
        "gen_ai.usage.cache_read.input_tokens": "3",
    }
    assert "whales" not in str(traced.spans(trace_id))


def test_a_refusal_fails_the_operations_span_and_not_the_servers(traced: Traced) -> None:
    with peculium.connect(traced.server.address) as client:
        client.admin.grant("poor", unit="calls", amount=1, holder="dev")
        poor = client.open("poor")
        with traced.run("agent") as trace_id, pytest.raises(BudgetExhausted):
            poor.spend(2)
    operation = traced.one(trace_id, "peculium.spend")
    call = traced.one(trace_id, BATCH, Span.SPAN_KIND_SERVER)
    assert operation.status.code == Status.STATUS_CODE_ERROR
    assert attributes(operation.attributes)["error.type"] == "BudgetExhausted"
    assert call.status.code == Status.STATUS_CODE_UNSET
    assert attributes(call.attributes)["peculium.refusals"] == "budget_exhausted"


def test_no_span_says_a_secret(traced: Traced) -> None:
    with peculium.connect(traced.server.address) as client:
        made = client.admin.grant("secret", unit="calls", amount=9)
        secret = made.capability.take("here")
        made.capability.put_back()
        with traced.run("agent") as trace_id:
            client.accept(made.capability).spend(1)
    traced.receiver.wait(
        lambda: sum(span.name.startswith("lane ") for span in traced.spans(trace_id)) == 2
    )
    said = b"".join(span.SerializeToString() for span in traced.receiver.spans)
    assert secret not in said
    assert secret.hex().encode() not in said


def test_what_tracers_say_to_each_other_goes_along_from_the_program_to_the_database(
    traced: Traced,
) -> None:
    state = TraceState([("vendor", "opaque"), ("other", "1")])
    above = SpanContext(0x0AF7651916CD43DD8448EB211C80319D, 0xB7, True, TraceFlags(1), state)  # noqa: FBT003
    with peculium.connect(traced.server.address) as client:
        client.admin.grant("stateful", unit="calls", amount=9, holder="dev")
        stateful = client.open("stateful")
        with trace.use_span(NonRecordingSpan(above)):
            stateful.spend(1)
            client.audit.budget("stateful")
    trace_id = f"{above.trace_id:032x}"
    for name, kind in (
        (BATCH, Span.SPAN_KIND_CLIENT),
        (BATCH, Span.SPAN_KIND_SERVER),
        ("lane ", None),
        ("TRANSACTION ", None),
        ("peculium.v1.AuditService/GetBudget", Span.SPAN_KIND_SERVER),
    ):
        assert traced.one(trace_id, name, kind).trace_state == "vendor=opaque,other=1", name


def test_baggage_is_neither_sent_nor_recorded_nor_handed_on(traced: Traced) -> None:
    carried = baggage.set_baggage("user", "ishmael")
    attached = context.attach(carried)
    try:
        with (
            peculium.connect(traced.server.address) as client,
            traced.run("agent") as trace_id,
        ):
            client.admin.grant("bags", unit="calls", amount=9, holder="dev")
            bags = client.open("bags")
            bags.spend(1)
            [made] = bags.delegate([Child("child", 5)])
    finally:
        context.detach(attached)
    assert set(made.carrier) == {"traceparent"}
    # Others send it all the same.
    other = "ab" * 16
    with grpc.insecure_channel(traced.server.address) as channel:
        LedgerServiceStub(channel).GetBudget(
            ledger.LedgerServiceGetBudgetRequest(
                budget=types_pb2.BudgetRef(path="bags"),
                authority=types_pb2.Authority(holder=types_pb2.Holder()),
            ),
            metadata=(
                *(
                    ("traceparent", f"00-{other}-00000000000000b7-01"),
                    ("baggage", "user=ishmael,token=s3cret"),
                ),
                *(("tracestate", "one=1"), ("tracestate", "two=2")),
            ),
        )
    read = traced.one(other, "peculium.v1.LedgerService/GetBudget", Span.SPAN_KIND_SERVER)
    assert read.trace_state == "one=1,two=2"
    traced.one(trace_id, "peculium.spend")
    with psycopg.connect(traced.database) as connection:
        rows = [row for rows in dump(connection).values() for row in rows]
    spans = [str(span) for span in traced.receiver.spans]
    said = "\n".join([*spans, *rows, *traced.server.said])
    assert "bags" in said
    for private in ("ishmael", "s3cret"):
        assert private not in said


# -- From host to host --------------------------------------------------------------------------------


def _on_a_host(server: RunningServer, job: dict[str, object], exporting: str) -> dict[str, str]:
    """Have another process do a part of a run, and hand the rest on."""
    done = subprocess.run(
        [sys.executable, str(HOST), server.address, exporting],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    handed: dict[str, str] = json.loads(done.stdout)
    return handed


def test_a_run_on_five_hosts_is_one_trace(traced: Traced) -> None:
    with peculium.connect(traced.server.address) as client:
        with traced.run("agent") as trace_id:
            client.admin.grant("run", unit="calls", amount=100, holder="dev")
            [made] = client.open("run").delegate([Child("host-1", 50)])
        job: dict[str, object] = {
            "capability": made.capability.reveal(),
            "carrier": dict(made.carrier),
        }
        # Every other one has set up nothing that makes spans, and passes on what it got.
        for host in range(1, 6):
            exporting = traced.receiver.address if host % 2 else ""
            job = dict(_on_a_host(traced.server, job, exporting))
        entries = list(client.audit.entries("run", reach=Reach.TREE))
    assert {entry.kind for entry in entries} >= {"ACCEPT", "RESERVE", "SETTLE", "DELEGATE"}
    assert len({entry.budget_id for entry in entries}) == 7
    assert {entry.trace_id for entry in entries} == {trace_id}
    hosts = traced.receiver.wait(
        lambda: (
            traced.spans(trace_id)
            if sum(span.name == "peculium.settle" for span in traced.spans(trace_id)) == 3
            else None
        )
    )
    # Three hosts tell of their operations themselves, the server of all five.
    assert sum(span.name == "peculium.accept" for span in hosts) == 3


def test_whoever_is_in_a_span_is_not_taken_out_of_it_by_what_came_along(traced: Traced) -> None:
    with peculium.connect(traced.server.address) as client:
        with traced.run("sender") as sent:
            client.admin.grant("own", unit="calls", amount=9, holder="dev")
            [made] = client.open("own").delegate([Child("child", 5)])
        with traced.run("receiver") as received:
            budget = client.accept(made.capability.reveal(), carrier=made.carrier)
        budget.spend(1)
        kinds = {entry.kind: entry.trace_id for entry in client.audit.entries("own/child")}
    assert kinds == {"DELEGATE": sent, "ACCEPT": received, "SPEND": sent}


@pytest.mark.parametrize("carrier", [{}, {"traceparent": "nonsense"}, {"baggage": "a=1"}])
def test_what_is_no_trace_context_is_ignored(
    carrier: dict[str, str], running_server: RunningServer
) -> None:
    with peculium.connect(running_server.address) as client:
        made = client.admin.grant("acme", unit="calls", amount=9)
        client.accept(made.capability, carrier=carrier).spend(1)
        assert {entry.trace_id for entry in client.audit.entries("acme")} == {None}
