"""Clients without the SDK: each copy of a request is sent when and where the campaign wants it.

Whoever sends knows what was answered to each copy, and the whole campaign knows how far each lane was
seen, so that an answer that goes back in time is found.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from peculium.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    audit_service_pb2,
    audit_service_pb2_grpc,
    ledger_service_pb2,
    ledger_service_pb2_grpc,
    types_pb2,
)
from peculium_server.core.lanes import lane_of
from peculium_server.core.operations import Actor, Role
from peculium_server.store.schema import LANES
from tests.faults.checks import Refusal
from tests.system.wire import reason_of, told

PRINCIPAL = "dev"
AGENT = Actor(PRINCIPAL, Role.AGENT)
ADMIN = Actor(PRINCIPAL, Role.ADMIN)

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
_REFUSALS = {
    name.removeprefix("REFUSAL_REASON_")
    for name in types_pb2.RefusalReason.keys()  # noqa: SIM118
}
_UNKNOWN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
}
"""Also INTERNAL, which the transport says of a stream that was cut; the server's own is noted."""

Answer = types_pb2.Outcome | Refusal | None
"""None: nobody knows."""


def now() -> int:
    """Microseconds since the Unix epoch, by the clock that the database reads too."""
    return time.time_ns() // 1000


@dataclass
class Seen:
    """How far each lane was seen by anybody, and what servers said of themselves."""

    positions: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    failures: list[str] = field(default_factory=list)
    """Answers that a server must never give."""

    def floor(self, root_id: bytes) -> int:
        """The position that a lane has passed for sure."""
        return self.positions[lane_of(root_id, LANES)]

    def note(self, outcome: types_pb2.Outcome) -> None:
        """Somebody was told this."""
        at = outcome.ledger
        self.positions[at.lane] = max(self.positions[at.lane], at.position)


class Line:
    """One client's connection to one server."""

    def __init__(self, address: str, seen: Seen) -> None:
        self._seen = seen
        self._channel = grpc.aio.insecure_channel(address, options=list(_OPTIONS))
        self._ledger: Any = ledger_service_pb2_grpc.LedgerServiceStub(self._channel)
        self._admin: Any = admin_service_pb2_grpc.AdminServiceStub(self._channel)
        self._audit: Any = audit_service_pb2_grpc.AuditServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._channel.close()

    async def ask(self, request: Message, seconds: float) -> Answer:
        """Ask for one operation: what became of it, as far as was told."""
        try:
            response = await self._method(request)(request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            return self._failed(error)
        outcome: types_pb2.Outcome = response.outcome
        if not outcome.dry_run:
            self._seen.note(outcome)
        return outcome

    async def ask_many(
        self, batch: ledger_service_pb2.BatchRequest, seconds: float
    ) -> list[Answer]:
        """Ask for the operations of a batch: what became of each."""
        try:
            response = await self._ledger.Batch(batch, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            return [self._failed(error)] * len(batch.operations)
        answers: list[Answer] = []
        for result in response.results:
            match result.WhichOneof("result"):
                case "outcome":
                    if not result.outcome.dry_run:
                        self._seen.note(result.outcome)
                    answers.append(result.outcome)
                case "refused":
                    refused = result.refused
                    answers.append(Refusal(reason_of(refused), dict(refused.metadata)))
                case _:
                    answers.append(None)
        return answers

    async def verdict(self, seconds: float) -> audit_service_pb2.Verdict | None:
        """What the server's own verification of the whole ledger finds; None without an answer."""
        told_last: audit_service_pb2.VerifyResponse | None = None
        try:
            async for response in self._audit.Verify(
                audit_service_pb2.VerifyRequest(), timeout=seconds, wait_for_ready=True
            ):
                told_last = response
        except grpc.aio.AioRpcError:
            return None
        return None if told_last is None else told_last.verdict

    async def budgets(self, root_id: bytes, seconds: float) -> list[types_pb2.Budget] | None:
        """A tree as the audit service tells it, from one snapshot.

        None without an answer, or if the tree is larger than a page.
        """
        request = audit_service_pb2.ListBudgetsRequest(
            below=types_pb2.BudgetRef(root_id=root_id, budget_id=root_id), page_size=1000
        )
        try:
            page = await self._audit.ListBudgets(request, timeout=seconds)
        except grpc.aio.AioRpcError:
            return None
        return None if page.next_page_token else list(page.budgets)

    def _failed(self, error: grpc.aio.AioRpcError) -> Answer:
        failure = told(error)
        if failure.reason in _REFUSALS:
            return Refusal(failure.reason, failure.facts)
        if failure.reason == "INTERNAL" or error.code() not in _UNKNOWN:
            self._seen.failures.append(f"a server answered {error.code().name}: {error.details()}")
        return None

    def _method(self, request: Message) -> Any:
        name = type(request).__name__.removesuffix("Request").removeprefix("AdminService")
        is_admin = request.DESCRIPTOR.file is admin_service_pb2.DESCRIPTOR
        return getattr(self._admin if is_admin else self._ledger, name)


def actor_of(request: Message) -> Actor:
    """In which role the one principal asks this."""
    return ADMIN if request.DESCRIPTOR.file is admin_service_pb2.DESCRIPTOR else AGENT


def batched(request: Message) -> ledger_service_pb2.Operation:
    """An element of a batch."""
    name = type(request).__name__.removesuffix("Request").lower()
    operation = ledger_service_pb2.Operation()
    getattr(operation, name).CopyFrom(request)
    return operation
