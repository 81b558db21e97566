"""Requests as no polite client would send them, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from peculium._ids import id_text, new_id, new_secret, token_id
from peculium.v1 import (
    admin_service_pb2 as admin,
    admin_service_pb2_grpc,
    audit_service_pb2 as audit,
    audit_service_pb2_grpc,
    ledger_service_pb2 as ledger,
    ledger_service_pb2_grpc,
    types_pb2,
)

HOLDER = types_pb2.Authority(holder=types_pb2.Holder())
_DETAILS_KEY = "grpc-status-details-bin"
_CONNECTION_OF_ITS_OWN = ("grpc.use_local_subchannel_pool", 1)
_ENDLESS = "/WatchEntries"
_STREAMS = ("/Export", "/Verify", _ENDLESS)
_NO_RETRIES = ("grpc.enable_retries", 0)


@dataclass
class Held:
    """A token-held budget, and the secret of its live token."""

    root_id: bytes
    budget_id: bytes
    secret: bytes = field(default_factory=new_secret, repr=False)

    @property
    def token_id(self) -> bytes:
        return token_id(self.secret)

    @property
    def proof(self) -> types_pb2.Authority:
        return types_pb2.Authority(secret=self.secret)

    def header(self, operation_id: bytes | None = None) -> types_pb2.OperationHeader:
        return header(self.root_id, self.budget_id, self.proof, operation_id)


@dataclass
class Told:
    """How a call has ended that was refused, or got no answer."""

    code: grpc.StatusCode
    reason: str
    """Empty where no ErrorInfo came along."""
    facts: dict[str, str]


def header(
    root_id: bytes,
    budget_id: bytes,
    proof: types_pb2.Authority | None = None,
    operation_id: bytes | None = None,
) -> types_pb2.OperationHeader:
    return types_pb2.OperationHeader(
        operation_id=new_id() if operation_id is None else operation_id,
        root_id=root_id,
        budget_id=budget_id,
        authority=proof,
    )


def grant_of(
    name: str, amount: int, *, secret: bytes | None = None, holder: str = ""
) -> admin.GrantRequest:
    """A root that is held by the token, or else by the principal."""
    root_id = new_id()
    return admin.GrantRequest(
        header=header(root_id, root_id),
        name=name,
        unit="calls",
        amount=amount,
        token_id=b"" if secret is None else token_id(secret),
        holder=holder,
    )


def granted(wire: Wire, name: str, amount: int) -> Held:
    """A new root that is held by token."""
    secret = new_secret()
    request = grant_of(name, amount, secret=secret)
    wire.admin.Grant(request)
    return Held(request.header.root_id, request.header.budget_id, secret)


def delegated(wire: Wire, parent: Held, name: str, amount: int, **fields: Any) -> Held:
    """A new child that is held by token; the parent's token is renewed."""
    child = Held(parent.root_id, new_id())
    following = new_secret()
    wire.ledger.Delegate(
        ledger.DelegateRequest(
            header=parent.header(),
            next_token_id=token_id(following),
            children=[
                types_pb2.ChildSpec(
                    budget_id=child.budget_id,
                    name=name,
                    amount=amount,
                    token_id=child.token_id,
                    **fields,
                )
            ],
        )
    )
    parent.secret = following
    return child


def reserve_of(
    budget: Held, amount: int, operation_id: bytes | None = None
) -> ledger.ReserveRequest:
    """A reservation whose next secrets nobody needs."""
    return ledger.ReserveRequest(
        header=budget.header(operation_id),
        amount=amount,
        next_token_id=token_id(new_secret()),
        hold_id=new_id(),
        hold_token_id=token_id(new_secret()),
    )


def spend_of(budget: Held, amount: int, operation_id: bytes | None = None) -> ledger.SpendRequest:
    """A spending whose next secret nobody needs."""
    return ledger.SpendRequest(
        header=budget.header(operation_id), amount=amount, next_token_id=token_id(new_secret())
    )


class _Presenting(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Presents a key with every call."""

    def __init__(self, key: str) -> None:
        self._metadata = (("authorization", f"Bearer {key}"),)

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(details._replace(metadata=self._metadata), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(details._replace(metadata=self._metadata), request)


class Wire:
    """One connection to a server, which sends whatever it is given."""

    def __init__(
        self,
        address: str,
        key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        options = [_CONNECTION_OF_ITS_OWN, _NO_RETRIES]
        plain = (
            grpc.insecure_channel(address, options=options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options=options)
        )
        self.channel = plain if key is None else grpc.intercept_channel(plain, _Presenting(key))
        self.ledger = ledger_service_pb2_grpc.LedgerServiceStub(self.channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self.channel)
        self.audit = audit_service_pb2_grpc.AuditServiceStub(self.channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.close()

    def send(self, method: str, request: bytes | Message, timeout: float = 20) -> bytes | Told:
        """Call a method with whatever bytes, as no generated stub would: its last answer, if it has one."""
        data = request.SerializeToString() if isinstance(request, Message) else request
        call: Any = (
            self.channel.unary_stream if method.endswith(_STREAMS) else self.channel.unary_unary
        )(method)
        try:
            answer = call(data, timeout=timeout)
            return answer if isinstance(answer, bytes) else _last(method, answer)
        except grpc.RpcError as error:
            return told(error)

    def verified(self) -> bool:
        """Say whether every decision of the ledger holds."""
        *_, last = self.audit.Verify(audit.VerifyRequest(), timeout=30)
        return last.verdict.verified

    def budgets(self) -> dict[str, types_pb2.Budget]:
        """Every budget of the ledger, by path."""
        found: dict[str, types_pb2.Budget] = {}
        for root in self._listed(None):
            below = types_pb2.BudgetRef(root_id=root.root_id, budget_id=root.budget_id)
            found |= {budget.path: budget for budget in self._listed(below)}
        return found

    def entries(self, root_id: bytes) -> list[audit.Entry]:
        """Every entry of a tree, in order."""
        request = audit.ListEntriesRequest(
            budget=types_pb2.BudgetRef(root_id=root_id, budget_id=root_id),
            reach=audit.REACH_TREE,
            page_size=1000,
        )
        found: list[audit.Entry] = []
        while True:
            page = self.audit.ListEntries(request, timeout=30)
            found += page.entries
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def _listed(self, below: types_pb2.BudgetRef | None) -> list[types_pb2.Budget]:
        request = audit.ListBudgetsRequest(below=below, page_size=1000)
        found: list[types_pb2.Budget] = []
        while True:
            page = self.audit.ListBudgets(request, timeout=30)
            found += page.budgets
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token


class AioWire:
    """One connection to a server for asyncio."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        options = [_CONNECTION_OF_ITS_OWN, _NO_RETRIES]
        self.channel = (
            grpc.aio.insecure_channel(address, options=options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=options)
        )
        self.ledger: ledger_service_pb2_grpc.LedgerServiceAsyncStub = (
            ledger_service_pb2_grpc.LedgerServiceStub(self.channel)
        )
        self.admin: admin_service_pb2_grpc.AdminServiceAsyncStub = (
            admin_service_pb2_grpc.AdminServiceStub(self.channel)
        )
        self.audit: audit_service_pb2_grpc.AuditServiceAsyncStub = (
            audit_service_pb2_grpc.AuditServiceStub(self.channel)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.channel.close()


def _last(method: str, stream: Any) -> bytes:
    """The last answer of a stream, or the first one of a stream that has no end."""
    if not method.endswith(_ENDLESS):
        answers: list[bytes] = list(stream)
        return answers[-1]
    first: bytes = next(stream)
    stream.cancel()
    return first


def told(error: grpc.RpcError) -> Told:
    """What a failed call says."""
    failed: Any = error
    info = ErrorInfo()
    if any(detail.Unpack(info) for detail in _details(failed)):
        return Told(failed.code(), info.reason, dict(info.metadata))
    return Told(failed.code(), "", {})


def retry_seconds(error: grpc.RpcError) -> float | None:
    """When a failed call asks to be tried again; None if it does not."""
    retry = RetryInfo()
    if any(detail.Unpack(retry) for detail in _details(error)):
        return retry.retry_delay.ToTimedelta().total_seconds()
    return None


def _details(error: Any) -> list[Any]:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            return list(Status.FromString(value).details)
    return []


def reason_of(refused: types_pb2.Refused) -> str:
    """The name of a refusal within a batch."""
    return types_pb2.RefusalReason.Name(refused.reason).removeprefix("REFUSAL_REASON_")


def balanced(money: types_pb2.Balances) -> bool:
    """Say whether a budget's balances keep the money equation."""
    parts = (money.available, money.held, money.delegated, money.spent, money.forfeited)
    return (
        money.granted == sum(parts) - money.overrun
        and 0 <= money.advanced <= money.granted
        and min(parts) >= 0 <= money.overrun
    )


__all__ = [
    "HOLDER",
    "AioWire",
    "Held",
    "Told",
    "Wire",
    "balanced",
    "delegated",
    "grant_of",
    "granted",
    "header",
    "id_text",
    "new_id",
    "new_secret",
    "reason_of",
    "reserve_of",
    "retry_seconds",
    "spend_of",
    "token_id",
    "told",
]
