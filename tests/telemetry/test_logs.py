"""The log: one event for each call, for people or machines, and nothing in it that is nobody's business."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

import peculium
from peculium.errors import BudgetExhausted
from peculium_server.telemetry import logs
from tests.server import RunningServer, StartServer

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
BATCH = "peculium.v1.LedgerService/Batch"


@contextlib.contextmanager
def in_trace() -> Iterator[None]:
    """In somebody else's span, which this process only hands on."""
    context = SpanContext(TRACE_ID, 0xB7AD6B7169203331, True, TraceFlags(1))  # noqa: FBT003
    with trace.use_span(NonRecordingSpan(context)):
        yield


def events(server: RunningServer) -> list[dict[str, Any]]:
    """What a server that has ended has logged, each line of it."""
    return [json.loads(line) for line in server.said]


def test_each_call_is_one_event_with_what_an_operator_asks_for(
    start_server: StartServer, served_database: str
) -> None:
    server = start_server(
        *("--database-url", served_database, "--log-format", "json", "--log-level", "info")
    )
    with peculium.connect(server.address) as client:
        made = client.admin.grant("acme", unit="calls", amount=10, labels={"team": "whales"})
        capability = made.capability.reveal()
        with in_trace():
            acme = client.accept(capability)
            with pytest.raises(BudgetExhausted):
                acme.spend(7_391_846, reference="bill-77")
            acme.info()
    assert server.stop() == 0
    said = events(server)
    calls = [each for each in said if each.get("event") == "call"]
    assert [each["method"].rpartition("/")[2] for each in calls] == [
        *("Grant", "Batch", "Batch", "GetBudget")
    ]
    grant, accept, spend, read = calls
    assert {each["status"] for each in calls} == {"OK"}
    assert {(each["principal"], each["role"]) for each in calls} == {("dev", "admin")} | {
        (each["principal"], each["role"]) for each in (accept, spend, read)
    }
    assert len({each["request_id"] for each in calls}) == 4
    assert all(each["duration_ms"] > 0 for each in calls)
    assert (accept["operations"], "refused" in accept) == (1, False)
    assert spend["refused"] == {"budget_exhausted": 1}
    assert "trace_id" not in grant
    assert read["trace_id"] == f"{TRACE_ID:032x}"
    text = "\n".join(server.said)
    for private in (capability, "whales", "bill-77", "7391846"):
        assert private not in text
    # What is told of starting and stopping is in the same form.
    messages = [each["message"] for each in said]
    assert any(message.startswith("listening on ") for message in messages)
    assert messages[-1] == "stopped"


def test_a_server_is_quiet_unless_it_is_told_to_speak(running_server: RunningServer) -> None:
    with peculium.connect(running_server.address) as client:
        client.admin.grant("acme", unit="calls", amount=10)
    assert running_server.stop() == 0
    assert not [line for line in running_server.said if "Grant" in line]


def test_lines_for_people_say_the_same() -> None:
    record = logging.makeLogRecord(
        {"name": "x", "msg": "done", logs.FACTS: {"event": "call", "status": "OK"}}
    )
    assert logs.TextFormatter().format(record).endswith("x: done event=call status=OK")


def test_a_failure_is_one_line_with_its_traceback() -> None:
    error = ZeroDivisionError("with\na line")
    record = logging.makeLogRecord({"name": "x", "levelname": "ERROR", "msg": "failed"})
    record.exc_info = (type(error), error, error.__traceback__)
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert (said["level"], said["message"]) == ("error", "failed")
    assert "ZeroDivisionError: with\na line" in said["exception"]


def test_what_nobody_reads_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LINES_MAX", 3)
    monkeypatch.setattr(logs._Writer, "_begin", lambda _: None)
    stream = io.StringIO()
    writer = logs._Writer(stream)
    writer.setFormatter(logging.Formatter("%(message)s"))
    for number in range(5):
        writer.handle(logging.makeLogRecord({"levelno": 20, "msg": f"line {number}"}))
    assert stream.getvalue() == ""
    writer.close()
    *lines, dropped = stream.getvalue().splitlines()
    assert lines == ["line 0", "line 1", "line 2"]
    assert dropped == "2 lines were not logged: nobody read the log fast enough"


def test_lines_are_written_by_themselves() -> None:
    written = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            arrived.set()
            return len(text)

    import threading

    arrived = threading.Event()
    writer = logs._Writer(Stream())
    writer.setFormatter(logging.Formatter("%(message)s"))
    writer.handle(logging.makeLogRecord({"levelno": 20, "msg": "once"}))
    assert arrived.wait(30)
    writer.close()
    assert "".join(written) == "once\n"
