"""The path of an operation through the wire's side of the server: decode, execute, encode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from peculium.v1 import ledger_service_pb2, types_pb2
from peculium_server.core.batch import Request, refuse_batch
from peculium_server.core.operations import AtomicBatch
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refused
from peculium_server.lanes.answers import Answer
from peculium_server.rpc.calls import CallRefused, CallUnanswered, actor, deadline
from peculium_server.rpc.requests import decode, decode_batched
from peculium_server.rpc.responses import write_outcome


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


class Telling(Protocol):
    """A response that tells an outcome."""

    @property
    def outcome(self) -> types_pb2.Outcome:
        """What happened."""
        ...


Response = TypeVar("Response", bound=Telling)


class Operator:
    """Has operations decided in the name of the caller."""

    def __init__(self, ledger: Executing) -> None:
        self._ledger = ledger

    async def one(self, request: Message, response: Response) -> Response:
        """Have a call's one operation decided, and write its outcome into the response.

        Raises:
            CallRefused: It was refused.
            CallUnanswered: The ledger gave no answer.
        """
        operation = decode(request)
        if isinstance(operation, Refused):
            raise CallRefused(operation)
        [answer] = await self._ledger.execute([Request(operation, actor(), 0)], deadline())
        result = answer.result
        if isinstance(result, Outcome):
            write_outcome(result, answer.position, response.outcome)
            return response
        if isinstance(result, Refused):
            raise CallRefused(result)
        raise CallUnanswered(result)

    async def many(self, operations: Sequence[ledger_service_pb2.Operation]) -> list[Answer]:
        """Have the operations of a batch decided, each on its own."""
        caller = actor()
        refused: dict[int, Refused] = {}
        requests: list[Request] = []
        for index, message in enumerate(operations):
            operation = decode_batched(message)
            if isinstance(operation, Refused):
                refused[index] = operation
            else:
                requests.append(Request(operation, caller, index))
        answers = await self._ledger.execute(requests, deadline()) if requests else []
        if not refused:
            return answers
        answered = iter(answers)
        return [
            Answer(refused[index], None) if index in refused else next(answered)
            for index in range(len(operations))
        ]

    async def all_or_none(
        self, operations: Sequence[ledger_service_pb2.Operation], batch_id: bytes
    ) -> list[Answer]:
        """Have the operations of an atomic batch decided together."""
        caller, batch = actor(), AtomicBatch(batch_id, len(operations))
        requests: list[Request] = []
        for index, message in enumerate(operations):
            operation = decode_batched(message)
            if isinstance(operation, Refused):
                refused = refuse_batch(index, operation, size=len(operations))
                return [Answer(each, None) for each in refused]
            requests.append(Request(replace(operation, batch=batch), caller, index))
        return await self._ledger.execute_atomic(requests, deadline())
