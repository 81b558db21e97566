"""Whatever bytes a caller sends, it is told what is wrong with them: never that the server failed."""

from __future__ import annotations

import random
import secrets
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
from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
from peculium_server.core.operations import Grant
from peculium_server.rpc.permissions import PERMISSIONS
from tests.rpc.messages import message_of
from tests.rpc.test_reads import granted, new_id
from tests.rpc.wire import Stored, storing

ROUNDS = 60
NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}
REQUESTS: dict[str, type[Message]] = {
    f"/{service.full_name}/{method.name}": GetMessageClass(method.input_type)
    for module in (admin_service_pb2, audit_service_pb2, ledger_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
EDGES = (0, 1, -1, 2**31, 2**62 - 1, 2**62, 2**63 - 1, -(2**63))


class Guesser:
    """Fills messages with what is nearly right, about budgets that exist in the ledger."""

    def __init__(self, seed: int, roots: list[Grant]) -> None:
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._roots = roots
        self._root = roots[0]
        self._left_out: set[str] = set()
        self._holds = [new_id()]
        self._operations = [root.operation_id for root in roots]

    def request(self, kind: type[Message]) -> bytes:
        """A request about one of the roots, with something wrong every now and then."""
        self._root = self._random.choice(self._roots)
        by_role = kind.DESCRIPTOR.file is admin_service_pb2.DESCRIPTOR
        self._left_out = {"authority"} if by_role else set()
        return self._message(kind).SerializeToString()

    def mutated(self, data: bytes) -> bytes:
        """The same with some bytes changed, inserted, doubled or cut off."""
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

    def _message(self, kind: type[Message]) -> Message:
        message = kind()
        descriptor: Any = message.DESCRIPTOR
        chosen = {self._choice_of(oneof) for oneof in descriptor.oneofs}
        seldom = _SELDOM | self._left_out
        if kind is types_pb2.BudgetRef:
            seldom |= self._random.choice(({"path"}, {"root_id", "budget_id"}))
        if kind is ledger_service_pb2.BatchRequest:
            seldom |= {"operation_id"}
        for field in descriptor.fields:
            if field.containing_oneof is not None and field.name not in chosen:
                continue
            if field.name not in seldom or self._chance(0.05):
                self._fill(message, field)
        if kind is types_pb2.ChildSpec and self._chance(0.9):
            message.MergeFrom(types_pb2.ChildSpec(budget_id=new_id()))
        return message

    def _choice_of(self, oneof: Any) -> str:
        """Mostly the holder for a proof: it needs no secret."""
        if oneof.name == "proof" and self._chance(0.7):
            return "holder"
        chosen: str = self._random.choice(oneof.fields).name
        return chosen

    def _fill(self, message: Any, field: FieldDescriptor) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update({"team": self._text(field.name)})
        elif field.is_repeated:
            for _ in range(self._random.randint(1, 3)):
                if field.message_type is None:
                    getattr(message, field.name).append(self._scalar(field))
                    continue
                element = self._message(GetMessageClass(field.message_type))
                getattr(message, field.name).add().CopyFrom(element)
        elif field.message_type is not None:
            filled = self._message(GetMessageClass(field.message_type))
            getattr(message, field.name).CopyFrom(filled)
        else:
            setattr(message, field.name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self._bytes(field.name)
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            return self._text(field.name)
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return self._chance(0.3)
        if field.cpp_type == FieldDescriptor.CPPTYPE_INT64:
            return self._random.choice(EDGES) if self._chance(0.1) else self._random.randint(1, 90)
        return self._random.choice((0, 1, 1, 2, 3, 255))

    def _bytes(self, name: str) -> bytes:
        if self._chance(0.05):
            return self._random.choice((b"", b"x", bytes(16), bytes(32), bytes(1_000)))
        match name:
            case "root_id" | "budget_id" | "descendant_id":
                root = self._root if self._chance(0.95) else self._random.choice(self._roots)
                return root.root_id
            case "operation_id":
                return self._remembered(self._operations)
            case "hold_id":
                return self._remembered(self._holds)
            case _:
                return self._random.randbytes(32)

    def _remembered(self, ids: list[bytes]) -> bytes:
        """A new id, or one that was used before."""
        if self._chance(0.2):
            return self._random.choice(ids)
        ids.append(new_id())
        return ids[-1]

    def _text(self, name: str) -> str:
        if self._chance(0.05):
            return self._random.choice(("\x00", "x" * 600, "a/b", "é" * 100, "%s'\"; --"))
        match name:
            case "path":
                return self._root.name
            case "name":
                return f"name-{self._random.randrange(10**9)}"
            case "holder":
                return "dev"
            case _:
                return "calls"

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability


_SELDOM = {
    *("dry_run", "traceparent", "keep_open", "atomic", "page_token", "usage", "estimated"),
    *("next_token_id", "next_hold_token_id", "labels", "lease", "lease_latest", "ttl"),
}
"""Fields that make a request wrong, or nothing of, when they are always there."""


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


REACHED = {
    ("Reserve", "OK"),
    ("Spend", "OK"),
    ("Delegate", "OK"),
    ("TopUp", "OK"),
    ("GetBudget", "OK"),
    ("ListBudgets", "OK"),
    ("ListEntries", "OK"),
    ("Batch", "OK"),
    ("Verify", "OK"),
    ("Spend", "INVALID_ARGUMENT"),
    ("Settle", "NOT_FOUND"),
    ("Reserve", "ALREADY_EXISTS"),
}
"""How deep the guesses have to get for the test to say anything."""


@pytest.mark.parametrize("seed", range(2))
async def test_no_bytes_make_the_server_fail(database: str, seed: int) -> None:
    async with storing(database) as stored:
        roots = [granted(f"root-{number}", amount=10**6) for number in range(3)]
        for root in roots:
            await AdminServiceStub(stored.channel).Grant(message_of(root, None))
        guesser = Guesser(seed, roots)
        seen = set()
        for method, kind in REQUESTS.items():
            for _ in range(ROUNDS):
                likely = guesser.request(kind)
                for request in (likely, guesser.mutated(likely), secrets.token_bytes(40)):
                    code = await _code(stored, method, request)
                    assert code not in NEVER, (method, request.hex())
                    seen.add((method.rpartition("/")[2], code.name))
        assert seen >= REACHED
        verify: Any = AuditServiceStub(stored.channel).Verify(audit_service_pb2.VerifyRequest())
        told = [answer async for answer in verify]
        assert told[-1].verdict.verified
