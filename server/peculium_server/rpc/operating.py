"""The path of an operation through the wire's side of the server: decode, execute, encode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from peculium.v1 import ledger_service_pb2, types_pb2
from peculium_server.core.batch import Request, refuse_batch
from peculium_server.core.operations import Actor, AtomicBatch, Operation
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refused
from peculium_server.core.reuse import Reuse
from peculium_server.lanes.answers import Answer
from peculium_server.rpc import scope
from peculium_server.rpc.calls import (
    CALL,
    Call,
    CallRefused,
    CallUnanswered,
    actor,
    deadline,
    weigh,
)
from peculium_server.rpc.refusing import Counting
from peculium_server.rpc.requests import decode, decode_batched, trace_id, traceparent_of
from peculium_server.rpc.responses import write_outcome
from peculium_server.telemetry import spans


class Executing(Protocol):
    """What the services need of the ledger."""

    async def execute(self, requests: Sequence[Request], deadline: float | None) -> list[Answer]:
        """Answer the operations of one request; see `peculium_server.lanes.ledger.Ledger`."""
        ...

    async def execute_atomic(
        self, batch: Sequence[Request], deadline: float | None
    ) -> list[Answer]:
        """Answer an atomic batch; see `peculium_server.lanes.ledger.Ledger`."""
        ...


class Noticing(Protocol):
    """What the services need of whoever records security events."""

    def notice(self, request: Request, reuse: Reuse, /) -> bool:
        """A refusal is the sign of a reuse; see `peculium_server.security.SecurityEvents`."""
        ...

    async def recorded(self) -> None:
        """Wait a little until what was noticed is recorded."""
        ...


class Telling(Protocol):
    """A response that tells an outcome."""

    @property
    def outcome(self) -> types_pb2.Outcome:
        """What happened."""
        ...


Response = TypeVar("Response", bound=Telling)


class Operator:
    """Has operations decided in the name of the caller."""

    def __init__(
        self,
        ledger: Executing,
        refusals: Counting | None = None,
        security: Noticing | None = None,
    ) -> None:
        """Ask a ledger.

        Args:
            ledger: Decides.
            refusals: Counts what was refused, if anybody wants to know.
            security: Records what refusals are a sign of, likewise.
        """
        self._ledger = ledger
        self._refusals = refusals
        self._security = security

    async def one(self, request: Message, response: Response) -> Response:
        """Have a call's one operation decided, and write its outcome into the response.

        Raises:
            CallRefused: It was refused.
            CallUnanswered: The ledger gave no answer.
        """
        call = CALL.get()
        call.operations = 1
        operation = _permitted(decode(request))
        if isinstance(operation, Refused):
            raise CallRefused(operation)
        weigh((operation,))
        tracing = _Tracing(call)
        asked = tracing.adopted([tracing.request(operation, actor(), 0, request)])
        [answer] = answers = await self._ledger.execute(asked, deadline())
        await self._note(asked, answers)
        result = answer.result
        if isinstance(result, Outcome):
            write_outcome(result, answer.position, response.outcome)
            return response
        if isinstance(result, Refused):
            raise CallRefused(result)
        raise CallUnanswered(result)

    async def many(self, operations: Sequence[ledger_service_pb2.Operation]) -> list[Answer]:
        """Have the operations of a batch decided, each on its own."""
        caller, tracing = actor(), _Tracing(CALL.get())
        refused: dict[int, Refused] = {}
        requests: list[Request] = []
        for index, message in enumerate(operations):
            operation = _permitted(decode_batched(message))
            if isinstance(operation, Refused):
                refused[index] = operation
            else:
                requests.append(tracing.request(operation, caller, index, message))
        weigh((each.operation for each in requests), len(refused))
        requests = tracing.adopted(requests)
        answers = await self._ledger.execute(requests, deadline()) if requests else []
        await self._note(requests, answers)
        if refused:
            answered = iter(answers)
            answers = [
                Answer(refused[index], None) if index in refused else next(answered)
                for index in range(len(operations))
            ]
        return _noted(answers)

    async def all_or_none(
        self, operations: Sequence[ledger_service_pb2.Operation], batch_id: bytes
    ) -> list[Answer]:
        """Have the operations of an atomic batch decided together."""
        caller, batch = actor(), AtomicBatch(batch_id, len(operations))
        tracing = _Tracing(CALL.get())
        requests: list[Request] = []
        for index, message in enumerate(operations):
            operation = _permitted(decode_batched(message))
            if isinstance(operation, Refused):
                refused = refuse_batch(index, operation, size=len(operations))
                return _noted([Answer(each, None) for each in refused])
            in_batch = replace(operation, batch=batch)
            requests.append(tracing.request(in_batch, caller, index, message))
        weigh(each.operation for each in requests)
        requests = tracing.adopted(requests)
        answers = await self._ledger.execute_atomic(requests, deadline())
        await self._note(requests, answers)
        return _noted(answers)

    async def _note(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        """Have refusals counted by the budgets that were asked of, and what they are a sign of recorded."""
        new = False
        for request, answer in zip(requests, answers, strict=True):
            result = answer.result
            if not isinstance(result, Refused):
                continue
            operation = request.operation
            if self._refusals is not None:
                self._refusals.count(operation.root_id, operation.budget_id, result.reason)
            if self._security is not None and result.reuse is not None:
                new |= self._security.notice(request, result.reuse)
        if self._security is not None and new:
            await self._security.recorded()


class _Tracing:
    """What the operations of a call have to do with the trace that the call belongs to."""

    def __init__(self, call: Call) -> None:
        self._seen = spans.recording()
        self._trace_id = trace_id(call.traceparent) if call.traceparent else None
        if self._trace_id is None and self._seen is not None:
            # Nobody's but the server's own: the entry leads to it all the same.
            self._trace_id = self._seen.get_span_context().trace_id.to_bytes(16)

    def request(self, operation: Operation, caller: Actor, index: int, message: Message) -> Request:
        """An operation as it is to be decided.

        Args:
            operation: As it was decoded.
            caller: Who asks.
            index: Its place among those of the call.
            message: As it came.
        """
        traceparent = "" if self._seen is None else traceparent_of(message)
        return Request(operation, caller, index, traceparent)

    def adopted(self, requests: list[Request]) -> list[Request]:
        """The operations of a call, which belong to the call's trace if none of them says otherwise.

        If one does, the call carries what several have asked for, and its own trace is one's of them.
        """
        own = self._trace_id
        if own is None or any(request.operation.trace_id for request in requests):
            return requests
        return [
            Request(replace(each.operation, trace_id=own), each.actor, each.index, each.traceparent)
            for each in requests
        ]


def _noted(answers: list[Answer]) -> list[Answer]:
    """The answers, which the call takes note of."""
    call = CALL.get()
    call.operations = len(answers)
    for answer in answers:
        result = answer.result
        if isinstance(result, Refused):
            call.refuse(result.reason)
    return answers


def _permitted(operation: Operation | Refused) -> Operation | Refused:
    """The same, unless the caller is limited to other trees."""
    if isinstance(operation, Refused):
        return operation
    return scope.outside(operation.root_id) or operation
