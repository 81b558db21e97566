"""Whatever bytes a caller sends, it is told what is wrong with them: never that the server failed."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from peculium.v1 import (
    admin_service_pb2,
    audit_service_pb2,
    ledger_service_pb2,
    types_pb2,
)
from peculium.v1.admin_service_pb2_grpc import AdminServiceStub
from peculium_server.rpc.permissions import PERMISSIONS
from tests.rpc.messages import message_of
from tests.rpc.test_reads import granted, new_id
from tests.rpc.wire import Stored, storing

ROUNDS = 25
NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}
REQUESTS: dict[str, type[Message]] = {
    f"/{service.full_name}/{method.name}": GetMessageClass(method.input_type)
    for module in (admin_service_pb2, audit_service_pb2, ledger_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
EDGES = (0, 1, -1, 2**31, 2**62 - 1, 2**62, 2**63 - 1, -(2**63))


class Guesser:
    """Fills messages with what is nearly right, from things that exist in the ledger."""

    def __init__(self, seed: int, known: list[bytes], names: list[str]) -> None:
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._known = known
        self._names = names

    def message(self, kind: type[Message], depth: int = 0) -> Message:
        message = kind()
        descriptor: Any = message.DESCRIPTOR
        chosen_of: dict[str, str] = {
            oneof.name: self._random.choice(oneof.fields).name for oneof in descriptor.oneofs
        }
        for field in descriptor.fields:
            oneof = field.containing_oneof
            if oneof is not None and chosen_of[oneof.name] != field.name:
                continue
            if self._random.random() < 0.85:
                self._fill(message, field, depth)
        return message

    def _fill(self, message: Any, field: FieldDescriptor, depth: int) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update({self._text(): self._text()})
        elif field.is_repeated:
            for _ in range(self._random.randint(0, 3)):
                if field.message_type is not None:
                    element = self.message(GetMessageClass(field.message_type), depth + 1)
                    getattr(message, field.name).add().CopyFrom(element)
        elif field.message_type is not None:
            filled = self.message(GetMessageClass(field.message_type), depth + 1)
            getattr(message, field.name).CopyFrom(filled)
        else:
            setattr(message, field.name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        kinds: dict[int, Callable[[], Any]] = {
            FieldDescriptor.CPPTYPE_BOOL: lambda: self._random.random() < 0.5,
            FieldDescriptor.CPPTYPE_INT64: lambda: self._random.choice(EDGES),
            FieldDescriptor.CPPTYPE_INT32: lambda: self._random.choice((0, 1, -1, 2**31 - 1)),
            FieldDescriptor.CPPTYPE_UINT32: lambda: self._random.choice((0, 1, 255, 2**32 - 1)),
            FieldDescriptor.CPPTYPE_ENUM: lambda: self._random.randint(0, 99),
        }
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            return self._bytes() if field.type == FieldDescriptor.TYPE_BYTES else self._text()
        return kinds[field.cpp_type]()

    def _bytes(self) -> bytes:
        if self._random.random() < 0.7:
            return self._random.choice(self._known)
        return self._random.choice((b"", b"x", bytes(16), bytes(32), new_id(), bytes(1_000)))

    def _text(self) -> str:
        return self._random.choice((*self._names, "", "a/b", "\x00", "é", "x" * 600, "%s'\"; --"))

    def mutated(self, data: bytes) -> bytes:
        """The same with some bytes changed, doubled or cut off."""
        mutable = bytearray(data or b"\x00")
        for _ in range(self._random.randint(1, 4)):
            place = self._random.randrange(len(mutable))
            match self._random.randint(0, 3):
                case 0:
                    mutable[place] = self._random.randrange(256)
                case 1:
                    mutable[place:place] = self._random.randbytes(3)
                case 2:
                    del mutable[place:]
                case _:
                    mutable += mutable[place:]
            mutable = mutable or bytearray(b"\x00")
        return bytes(mutable)


async def _code(stored: Stored, method: str, request: bytes) -> grpc.StatusCode:
    try:
        if method.endswith("/Verify"):
            stream: Any = stored.channel.unary_stream(method)
            async for _ in stream(request, timeout=20):
                pass
        else:
            call: Any = stored.channel.unary_unary(method)
            await call(request, timeout=20)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_the_fuzzer_knows_every_method() -> None:
    assert set(REQUESTS) == set(PERMISSIONS)


@pytest.mark.parametrize("seed", range(2))
async def test_no_bytes_make_the_server_fail(database: str, seed: int) -> None:
    async with storing(database) as stored:
        roots = [granted(f"root-{number}") for number in range(3)]
        for root in roots:
            await AdminServiceStub(stored.channel).Grant(message_of(root, None))
        known = [each for root in roots for each in (root.root_id, root.operation_id)]
        guesser = Guesser(seed, [*known, *known, secrets.token_bytes(32)], ["root-0", "root-1"])
        seen: dict[tuple[str, str], int] = {}
        for method, kind in REQUESTS.items():
            for _ in range(ROUNDS):
                likely = guesser.message(kind).SerializeToString()
                for request in (likely, guesser.mutated(likely), secrets.token_bytes(40)):
                    code = await _code(stored, method, request)
                    assert code not in NEVER, (method, request.hex())
                    key = method.rpartition("/")[2], code.name
                    seen[key] = seen.get(key, 0) + 1
        read = await stored.channel.unary_unary(
            "/peculium.v1.AuditService/GetBudget",
            request_serializer=audit_service_pb2.GetBudgetRequest.SerializeToString,
            response_deserializer=audit_service_pb2.GetBudgetResponse.FromString,
        )(audit_service_pb2.GetBudgetRequest(budget=types_pb2.BudgetRef(path="root-2")))
        assert read.budget.name == "root-2"
        assert ("Grant", "INVALID_ARGUMENT") in seen
        assert ("GetBudget", "OK") in seen
