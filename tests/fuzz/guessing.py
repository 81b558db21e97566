"""Messages that are nearly right, about budgets that exist in the ledger."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from peculium._ids import new_id, token_id
from peculium.v1 import (
    admin_service_pb2,
    audit_service_pb2,
    ledger_service_pb2,
    types_pb2,
)
from tests.fuzz.twisting import EDGES

HOLDER = "dev"

_METHODS: dict[str, Any] = {
    f"/{service.full_name}/{method.name}": method
    for module in (admin_service_pb2, audit_service_pb2, ledger_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
KINDS: dict[str, type[Message]] = {
    name: GetMessageClass(method.input_type) for name, method in _METHODS.items()
}
"""What each method is asked with."""
ANSWERS: dict[str, type[Message]] = {
    name: GetMessageClass(method.output_type) for name, method in _METHODS.items()
}
"""What it answers with."""
_SELDOM = {
    *("dry_run", "traceparent", "keep_open", "atomic", "page_token", "usage", "estimated"),
    *("filter", "next_token_id", "next_hold_token_id", "labels", "lease", "lease_latest", "ttl"),
    *("webhook_id", "rule_id", "cursor"),
}
"""Fields that make a request wrong, or nothing of, when they are always there."""


class Root(NamedTuple):
    """A root that guesses are about; its holder is `dev`."""

    root_id: bytes
    name: str


class Guesser:
    """Fills messages by what their fields are called."""

    def __init__(self, chance: random.Random) -> None:
        self._random = chance
        self._roots: list[Root] = []
        self._root = Root(b"", "")
        self._left_out: set[str] = set()
        self._holds = [new_id()]
        self._reserved: list[tuple[bytes, bytes]] = []
        """Holds that were asked for, with their roots."""
        self._operations = [new_id()]

    def look_at(self, roots: Sequence[Root]) -> None:
        """Guess about these from now on, and no others."""
        self._roots = list(roots)
        del self._holds[:-1], self._operations[:-1], self._reserved[:]

    def request(self, kind: type[Message]) -> Message:
        """A request about one of the roots, with something wrong every now and then."""
        self._root = self._random.choice(self._roots)
        by_role = kind.DESCRIPTOR.file is admin_service_pb2.DESCRIPTOR
        self._left_out = {"authority"} if by_role else set()
        return self._message(kind)

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
        if self._chance(0.9):
            self._mend(message)
        return message

    def _mend(self, message: Any) -> None:
        """Make right what no single field can be: whose token it is, and what a new budget is called."""
        match message:
            case types_pb2.ChildSpec():
                message.budget_id = new_id()
            case admin_service_pb2.CreateKeyRequest():
                message.roles[:] = [admin_service_pb2.ROLE_AGENT]
                message.all_roots = True
                message.ClearField("root_ids")
                message.ClearField("lifetime")
            case admin_service_pb2.GrantRequest():
                message.header.root_id = message.header.budget_id = new_id()
            case ledger_service_pb2.ReserveRequest():
                message.hold_token_id = token_id(_secret_of(message.hold_id))
                self._reserved.append((message.hold_id, message.header.root_id))
            case (
                ledger_service_pb2.SettleRequest()
                | ledger_service_pb2.ReleaseRequest()
                | ledger_service_pb2.ExtendRequest()
            ) if self._reserved:
                message.hold_id, root_id = self._random.choice(self._reserved)
                message.header.root_id = message.header.budget_id = root_id
                message.header.authority.secret = _secret_of(message.hold_id)

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
            case "webhook_id" | "rule_id" | "key_id":
                return new_id()
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
                return HOLDER
            case "url":
                return "http://127.0.0.1:9/nobody"
            case _:
                return "calls"

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability


def _secret_of(hold_id: bytes) -> bytes:
    """What ends a hold: to be found again by whoever guesses its id."""
    return hashlib.sha256(b"hold" + hold_id).digest()
