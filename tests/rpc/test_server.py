from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from peculium.v1 import admin_service_pb2 as admin, ledger_service_pb2 as ledger, types_pb2
from peculium.v1.admin_service_pb2_grpc import AdminServiceStub
from peculium.v1.ledger_service_pb2_grpc import LedgerServiceStub
from peculium_server.config import CannotListen
from peculium_server.core.batch import Request
from peculium_server.core.operations import ByHolder, Grant, Role
from peculium_server.identity import Identities
from peculium_server.lanes.answers import Answer, Unanswered, Unavailability
from peculium_server.lanes.lane import DeadlinePassed
from peculium_server.rpc.calls import CALL, Call
from peculium_server.rpc.interceptors import DeadlineInterceptor, DecodingInterceptor
from peculium_server.rpc.permissions import PERMISSIONS, SERVICES
from peculium_server.store.errors import StoreUnavailable
from peculium_server.store.keys import KeysSince
from tests.lanes.memory import grant, reserve, spend
from tests.rpc.messages import message_of
from tests.rpc.wire import MESSAGE_BYTES_MAX, Wire, info_of, serving

HOLDER = types_pb2.Authority(holder=types_pb2.Holder())
KEYS = {Role.AGENT: "agent-key", Role.ADMIN: "admin-key", Role.AUDITOR: "auditor-key"}
UNARY = [method for method in PERMISSIONS if not method.endswith("/Verify")]


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with serving() as running:
        yield running


@pytest.fixture
def keys(tmp_path: Path) -> Identities:
    file = tmp_path / "keys.toml"
    file.write_text(
        "".join(
            f'[[keys]]\nprincipal = "{role.name.lower()}-1"\nrole = "{role.name.lower()}"\n'
            f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
            for role, key in KEYS.items()
        )
    )
    return Identities.load(file)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def granted(wire: Wire, amount: int = 100, **options: Any) -> Grant:
    root = grant(amount, holder=options.pop("holder", "dev"))
    await AdminServiceStub(wire.channel).Grant(message_of(root, None), **options)
    return root


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


class Failing:
    """A ledger that does what a test wants."""

    def __init__(
        self,
        error: Exception | None = None,
        *,
        hang: bool = False,
        answer: Answer | None = None,
    ) -> None:
        self.error = error
        self.answer = answer
        self.hang = hang
        self.cancelled = asyncio.Event()
        self.requests: list[Sequence[Request]] = []
        self.deadlines: list[float | None] = []

    async def execute(self, requests: Sequence[Request], deadline: float | None) -> list[Answer]:
        self.requests.append(requests)
        self.deadlines.append(deadline)
        if self.error is not None:
            raise self.error
        if self.hang:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        return [] if self.answer is None else [self.answer] * len(requests)


async def test_an_operation_goes_through_and_its_outcome_comes_back(wire: Wire) -> None:
    root = await granted(wire)
    request = message_of(spend(root, 30), HOLDER)
    response = await LedgerServiceStub(wire.channel).Spend(request)
    assert response.outcome.balances == types_pb2.Balances(granted=100, available=70, spent=30)
    assert response.outcome.ledger.incarnation == wire.store.incarnation
    assert response.outcome.ledger.position == 2


async def test_a_refusal_is_a_status_with_the_facts(wire: Wire) -> None:
    root = await granted(wire)
    request = message_of(spend(root, 101), HOLDER)
    error = await refused(LedgerServiceStub(wire.channel).Spend(request))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    info = info_of(error)
    assert (info.reason, info.domain) == ("BUDGET_EXHAUSTED", "peculium")
    assert info.metadata["available"] == "100"
    assert info.metadata["requested"] == "101"


async def test_a_batch_answers_each_operation_by_itself(wire: Wire) -> None:
    root = await granted(wire)
    operations = [
        ledger.Operation(spend=message_of(spend(root, 60), HOLDER)),
        ledger.Operation(spend=message_of(spend(root, 60), HOLDER)),
        ledger.Operation(),
        ledger.Operation(spend=message_of(spend(root, 0), HOLDER)),
        ledger.Operation(reserve=message_of(reserve(root, 40, ByHolder()), HOLDER)),
    ]
    response = await LedgerServiceStub(wire.channel).Batch(
        ledger.BatchRequest(operations=operations)
    )
    told = [
        types_pb2.RefusalReason.Name(result.refused.reason)
        if result.HasField("refused")
        else result.WhichOneof("result")
        for result in response.results
    ]
    malformed = "REFUSAL_REASON_MALFORMED"
    exhausted = "REFUSAL_REASON_BUDGET_EXHAUSTED"
    assert told == ["outcome", exhausted, malformed, malformed, "outcome"]


@pytest.mark.parametrize(
    ("batch", "code", "reason"),
    [
        (ledger.BatchRequest(), grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED"),
        (
            ledger.BatchRequest(operations=[ledger.Operation()] * 257),
            grpc.StatusCode.INVALID_ARGUMENT,
            "TOO_LARGE",
        ),
        (
            ledger.BatchRequest(operations=[ledger.Operation()], operation_id=b"i" * 16),
            grpc.StatusCode.INVALID_ARGUMENT,
            "MALFORMED",
        ),
    ],
    ids=["empty", "too large", "an id without atomic"],
)
async def test_a_batch_that_is_none_is_refused_as_a_whole(
    wire: Wire, batch: ledger.BatchRequest, code: grpc.StatusCode, reason: str
) -> None:
    error = await refused(LedgerServiceStub(wire.channel).Batch(batch))
    assert error.code() is code
    assert info_of(error).reason == reason


async def test_an_operation_without_an_answer_is_unavailable_in_a_batch_and_alone() -> None:
    unanswered = Unanswered(Unavailability.QUEUE_FULL, {"lane": "0", "queued": "9"}, 100)

    async with serving(ledger=Failing(answer=Answer(unanswered, None))) as wire:
        stub = LedgerServiceStub(wire.channel)
        request = message_of(spend(grant()), HOLDER)
        error = await refused(stub.Spend(request))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert info_of(error).metadata == {"lane": "0", "queued": "9"}
        response = await stub.Batch(
            ledger.BatchRequest(operations=[ledger.Operation(spend=request)])
        )
        [result] = response.results
        assert result.unavailable.reason == types_pb2.UNAVAILABLE_REASON_QUEUE_FULL


@pytest.mark.parametrize("method", PERMISSIONS)
@pytest.mark.parametrize("role", KEYS)
async def test_every_method_asks_for_its_roles(keys: Identities, method: str, role: Role) -> None:
    async with serving(keys) as wire:
        error = await refused(wire.send(method, b"", metadata=bearer(KEYS[role])))
        permitted = role in PERMISSIONS[method]
        if method.endswith("/Verify") and permitted:
            # A ledger in memory has no snapshot to verify: the caller was let that far.
            assert error.code() is grpc.StatusCode.INTERNAL
            return
        if not permitted:
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert info_of(error).metadata["principal"] == f"{role.name.lower()}-1"
        else:
            assert error.code() is not grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("method", PERMISSIONS)
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearer("nobody's"),
        (("authorization", "agent-key"),),
        (("authorization", "Basic YWdlbnQta2V5"),),
        bearer("agent-key") + bearer("admin-key"),
        (("authorization", ""),),
    ],
    ids=["none", "unknown", "no scheme", "another scheme", "two", "empty"],
)
async def test_nobody_gets_in_without_a_known_key(
    keys: Identities, method: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    async with serving(keys) as wire:
        error = await refused(wire.send(method, b"", metadata=metadata))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert info_of(error).reason == "UNAUTHENTICATED"


class Gone:
    """Keys that cannot be read."""

    async def since(self, _number: int, /) -> KeysSince:
        raise StoreUnavailable("it is gone")


@pytest.mark.parametrize("method", PERMISSIONS)
async def test_a_server_that_cannot_read_the_keys_lets_nobody_in_whom_they_may_name(
    method: str,
) -> None:
    for identities in (Identities(None, Gone()), Identities(None, Gone(), development=True)):
        async with serving(identities) as wire:
            error = await refused(wire.send(method, b"", metadata=bearer("pek_some")))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        info = info_of(error)
        assert (info.reason, dict(info.metadata)) == ("KEYS_OUTDATED", {"limit_seconds": "10"})


async def test_an_operation_is_recorded_under_its_callers_principal(keys: Identities) -> None:
    async with serving(keys) as wire:
        root = await granted(wire, holder="agent-1", metadata=bearer("admin-key"))
        request = message_of(spend(root), HOLDER)
        stub = LedgerServiceStub(wire.channel)
        await stub.Spend(request, metadata=bearer("agent-key"))
        error = await refused(stub.Spend(request, metadata=bearer("admin-key")))
        assert info_of(error).reason == "CAPABILITY_UNKNOWN"
        [tree] = wire.store.writers[0].trees.values()
        recorded = {each.principal for each in tree.recorded.values() if each is not None}
        assert recorded == {"admin-1", "agent-1"}


async def test_an_admins_authority_is_the_role_and_no_header(wire: Wire) -> None:
    root = await granted(wire)
    request = admin.TopUpRequest(
        header=types_pb2.OperationHeader(
            operation_id=root.operation_id,
            root_id=root.root_id,
            budget_id=root.budget_id,
            authority=HOLDER,
        ),
        amount=1,
    )
    error = await refused(AdminServiceStub(wire.channel).TopUp(request))
    assert info_of(error).metadata["field"] == "authority"


@pytest.mark.parametrize("method", UNARY)
async def test_bytes_that_are_no_message_are_malformed(wire: Wire, method: str) -> None:
    error = await refused(wire.send(method, b"\xff\xff\xff\xff"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert info_of(error).metadata["field"] == "request"


async def test_a_message_that_is_too_large_is_not_read(wire: Wire) -> None:
    code = await wire.status_of(UNARY[0], bytes(MESSAGE_BYTES_MAX + 1))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_bug_is_told_to_the_log_and_not_to_the_caller(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(ledger=Failing(ZeroDivisionError("the private reason"))) as wire:
        request = message_of(spend(grant()), HOLDER)
        error = await refused(LedgerServiceStub(wire.channel).Spend(request))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "private" not in f"{error.details()}{error.trailing_metadata()}"
    request_id = info_of(error).metadata["request"]
    [record] = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert request_id in record.getMessage()
    assert record.exc_info is not None
    assert "the private reason" in str(record.exc_info[1])


async def test_a_call_ends_when_the_server_says_so_even_if_its_caller_would_wait() -> None:
    hanging = Failing(hang=True)
    async with serving(ledger=hanging, call_seconds_max=0.05) as wire:
        request = message_of(spend(grant()), HOLDER)
        error = await refused(LedgerServiceStub(wire.channel).Spend(request))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert info_of(error).reason == "DEADLINE_EXCEEDED"
        assert hanging.cancelled.is_set()


async def test_an_end_that_comes_with_its_callers_going_is_told_to_nobody() -> None:
    async def leave(_request: object, _context: object) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)
        await asyncio.Event().wait()

    class Late:
        def time_remaining(self) -> float:
            return 0

    CALL.set(Call("a method", "ab12"))
    make: Any = grpc.stream_unary_rpc_method_handler
    handler = DeadlineInterceptor(30).wrap("a method", make(leave))
    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(handler.stream_unary(None, Late()))


async def test_a_caller_who_goes_takes_the_call_along() -> None:
    hanging = Failing(hang=True)
    async with serving(ledger=hanging) as wire:
        request = message_of(spend(grant()), HOLDER)
        await refused(LedgerServiceStub(wire.channel).Spend(request, timeout=0.1))
        await hanging.cancelled.wait()


async def test_the_ledger_is_told_the_callers_deadline_and_never_a_later_one_than_the_servers() -> (
    None
):
    noting = Failing(ZeroDivisionError())
    async with serving(ledger=noting, call_seconds_max=30) as wire:
        request = message_of(spend(grant()), HOLDER)
        now = asyncio.get_running_loop().time()
        for timeout in (5, 3_600, None):
            await refused(LedgerServiceStub(wire.channel).Spend(request, timeout=timeout))
    soon, late, none = (deadline - now for deadline in noting.deadlines if deadline is not None)
    assert soon <= 6
    assert 29 < late <= 32
    assert 29 < none <= 32


async def test_an_address_that_is_taken_is_not_shared() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen):
            async with serving(address=f"127.0.0.1:{port}"):
                pass


async def test_health_tells_what_it_is_told(wire: Wire) -> None:
    stub = health_pb2_grpc.HealthStub(wire.channel)
    for serving_, status in ((False, "NOT_SERVING"), (True, "SERVING"), (False, "NOT_SERVING")):
        await wire.server.tell_serving(serving=serving_)
        for service in ("", *SERVICES):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == status


async def test_a_server_is_not_healthy_before_it_is_told_so() -> None:
    async with serving() as wire:
        answer = await health_pb2_grpc.HealthStub(wire.channel).Check(
            health_pb2.HealthCheckRequest()
        )
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_anybody_may_ask_for_health_and_for_the_services(keys: Identities) -> None:
    async with serving(keys) as wire:
        await health_pb2_grpc.HealthStub(wire.channel).Check(health_pb2.HealthCheckRequest())
        stub = reflection_pb2_grpc.ServerReflectionStub(wire.channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await call.done_writing()
        answer = await call.read()
        listed = {each.name for each in answer.list_services_response.service}
        assert set(SERVICES) <= listed


class Deaf:
    """A caller who takes no answer."""

    async def read(self) -> bytes:
        return b""

    async def write(self, _answer: object) -> None:
        await asyncio.Event().wait()


async def test_a_stream_ends_when_its_caller_takes_no_answer() -> None:
    ended: list[str] = []

    async def answers(request: object, context: object) -> AsyncIterator[str]:
        try:
            yield "an answer"
        finally:
            ended.append("here")

    CALL.set(Call("a method", "ab12"))
    make: Any = grpc.unary_stream_rpc_method_handler
    handler = make(answers, request_deserializer=bytes)
    deaf: Any = Deaf()
    with pytest.raises(DeadlinePassed):
        await DecodingInterceptor(0.05).wrap("a method", handler).stream_stream(None, deaf)
    assert ended == ["here"]
