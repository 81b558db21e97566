"""Builds every request, and checks it first, so that a mistake costs no call.

Pure but for the ids and secrets that it makes. An `Operation` is made once and sent as often as
needed: its id and its secrets stay the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial, wraps
from types import MappingProxyType
from typing import NamedTuple, ParamSpec

from google.protobuf.duration_pb2 import Duration

from peculium import _limits as limits
from peculium._ids import new_id, new_secret, token_id
from peculium.capability import BudgetRef, Receiver
from peculium.errors import Malformed, TooLarge
from peculium.money import Usage
from peculium.v1 import admin_service_pb2, ledger_service_pb2 as ledger, types_pb2
from peculium.values import Child, HoldInfo, Seconds

# The authority is set when an operation is sent: at most a field's frame and a secret.
_AUTHORITY_BYTES = 64
_TRACEPARENT_BYTES = 8
"""The frames of a trace context that it is given later, and of what is around it."""
_NAME = re.compile(r"[^/\x00-\x1f\x7f-\x9f]+")
_UNIT = re.compile(r"[a-z0-9_]+")
SECRET_TEXT = re.compile("pe[ck]_[A-Za-z0-9_-]{72}|whsec_[A-Za-z0-9+/]{43}")
"""What nobody but its owner may read, which no name, label or reason may show for ever."""
_NO_LABELS: Mapping[str, str] = MappingProxyType({})
_P = ParamSpec("_P")


class Target(NamedTuple):
    """A budget, and whether an operation on it consumes a token."""

    root_id: bytes
    budget_id: bytes
    by_token: bool


class HoldTarget(NamedTuple):
    """A hold, and the budget that it was reserved from."""

    root_id: bytes
    budget_id: bytes
    hold_id: bytes


class Asked(NamedTuple):
    """What every verb may say beside its own arguments."""

    labels: Mapping[str, str] = _NO_LABELS
    dry_run: bool = False
    traceparent: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class MadeChild:
    """A child as it was asked for, with the secret if it was made here."""

    budget_id: bytes
    name: str
    secret: bytes | None


class Rotated(NamedTuple):
    """A hold that gets a new token, and its secret."""

    info: HoldInfo
    secret: bytes

    def __repr__(self) -> str:
        return f"Rotated({self.info})"


@dataclass(slots=True, eq=False)
class Operation:
    """One operation, with everything that its acceptance will produce."""

    kind: str
    """The name of its field in the wire's `Operation`."""
    operation_id: bytes
    root_id: bytes
    budget_id: bytes
    message: ledger.Operation = field(repr=False)
    header: types_pb2.OperationHeader = field(repr=False)
    """The message's own header, for the authority of each attempt."""
    size: int
    """An upper bound of its bytes in a batch."""
    produced: bytes | None = field(default=None, repr=False)
    """The secret of the next token of the budget or hold that it is about."""
    closes: bool = False
    """Once accepted, the budget or hold has no token any more."""
    hold_id: bytes = b""
    """The hold that it makes, or is about."""
    hold_secret: bytes | None = field(default=None, repr=False)
    """The secret of the hold that it makes."""
    children: tuple[MadeChild, ...] = ()
    rotated: tuple[Rotated, ...] = field(default=(), repr=False)
    again: Callable[[], Operation] = field(init=False, repr=False)
    """Makes the same operation with a new id and new secrets, as a new attempt of the caller."""

    @property
    def dry_run(self) -> bool:
        """Nothing is recorded, whatever the answer."""
        return self.header.dry_run

    @property
    def by_holder(self) -> bool:
        """It presents no token."""
        return self.header.authority.HasField("holder")

    @property
    def must_finish(self) -> bool:
        """It ends a hold: it is not given up when the caller goes away."""
        return self.closes and self.kind in {"settle", "release"}

    def carry(self, traceparent: str) -> None:
        """Carry a W3C trace context from now on; before it is sent for the first time."""
        self.size += len(traceparent) - len(self.header.traceparent)
        self.header.traceparent = traceparent

    def probe(self) -> Operation:
        """The same as a dry run: it finds out whether the operation is recorded, and never does it."""
        return _copy(self, dry_run=True)

    def asks_the_same(self, other: Operation) -> bool:
        """Whether both would have the same effect, ids aside."""
        return _content(self) == _content(other)


def _content(operation: Operation) -> bytes:
    message = ledger.Operation()
    message.CopyFrom(operation.message)
    getattr(message, operation.kind).ClearField("header")
    return message.SerializeToString(deterministic=True)


def _copy(operation: Operation, **changes: bool | bytes) -> Operation:
    message = ledger.Operation()
    message.CopyFrom(operation.message)
    own_header: types_pb2.OperationHeader = getattr(message, operation.kind).header
    for name, value in changes.items():
        setattr(own_header, name, value)
    copied = replace(
        operation, message=message, header=own_header, operation_id=own_header.operation_id
    )
    copied.again = lambda: _copy(copied, operation_id=new_id())
    return copied


def restored(
    kind: str,
    message: bytes,
    *,
    produced: bytes | None,
    closes: bool,
    hold_id: bytes,
    hold_secret: bytes | None,
    children: tuple[MadeChild, ...],
    rotated: tuple[Rotated, ...],
) -> Operation:
    """An operation that was made before, from what was written down of it."""
    parsed = ledger.Operation.FromString(message)
    operation = _operation(
        kind,
        parsed,
        getattr(parsed, kind).header,
        produced=produced,
        closes=closes,
        hold_id=hold_id,
        hold_secret=hold_secret,
        children=children,
        rotated=rotated,
    )
    return _copy(operation)


def _repeatable(build: Callable[_P, Operation]) -> Callable[_P, Operation]:
    @wraps(build)
    def built(*args: _P.args, **kwargs: _P.kwargs) -> Operation:
        operation = build(*args, **kwargs)
        operation.again = partial(built, *args, **kwargs)
        return operation

    return built


# --- what an agent may ask ---
# What is asked most is filled in place: a message that another's constructor is given is copied.


@_repeatable
def reserve(target: Target, asked: Asked, *, amount: int, ttl: Seconds | None) -> Operation:
    """Set money aside for one call."""
    length = duration("ttl", ttl, limits.HOLD_TTL_US_MIN, limits.HOLD_TTL_US_MAX)
    produced, hold_id, hold_secret = _next(target), new_id(), new_secret()
    message = ledger.Operation()
    request = message.reserve
    request.amount = _amount("amount", amount, least=1)
    if length is not None:
        request.ttl.CopyFrom(length)
    request.next_token_id = _id_of(produced)
    request.hold_id = hold_id
    request.hold_token_id = token_id(hold_secret)
    own_header = _fill(request.header, target, asked)
    return _operation(
        "reserve",
        message,
        own_header,
        produced=produced,
        hold_id=hold_id,
        hold_secret=hold_secret,
    )


@_repeatable
def settle(
    target: HoldTarget,
    asked: Asked,
    *,
    actual: int | None,
    keep_open: bool,
    reference: str,
    usage: Usage | None,
    estimated: bool,
) -> Operation:
    """Book what a call has cost."""
    if keep_open and actual is None:
        raise malformed("actual", "an increment has to say how much (keep_open)")
    produced = new_secret() if keep_open else None
    message = ledger.Operation()
    request = message.settle
    request.hold_id = target.hold_id
    if actual is not None:
        request.actual = _amount("actual", actual, least=0)
    request.keep_open = keep_open
    request.next_hold_token_id = _id_of(produced)
    request.reference = text("reference", reference, limits.REFERENCE_BYTES_MAX)
    if usage is not None:
        request.usage.CopyFrom(_usage(usage))
    request.estimated = estimated
    own_header = _fill(request.header, target, asked)
    return _operation(
        "settle",
        message,
        own_header,
        produced=produced,
        closes=not keep_open,
        hold_id=target.hold_id,
    )


@_repeatable
def release(target: HoldTarget, asked: Asked) -> Operation:
    """End a hold whose call was not billed."""
    message = ledger.Operation()
    message.release.hold_id = target.hold_id
    own_header = _fill(message.release.header, target, asked)
    return _operation("release", message, own_header, closes=True, hold_id=target.hold_id)


@_repeatable
def extend(target: HoldTarget, asked: Asked, *, ttl: Seconds) -> Operation:
    """Give a hold more time."""
    produced = new_secret()
    request = ledger.ExtendRequest(
        header=header(target, asked),
        hold_id=target.hold_id,
        ttl=duration("ttl", ttl, limits.HOLD_TTL_US_MIN, limits.HOLD_TTL_US_MAX),
        next_hold_token_id=token_id(produced),
    )
    message = ledger.Operation(extend=request)
    return _operation(
        "extend", message, message.extend.header, produced=produced, hold_id=target.hold_id
    )


@_repeatable
def spend(
    target: Target, asked: Asked, *, amount: int, reference: str, usage: Usage | None
) -> Operation:
    """Book a cost that was known before."""
    produced = _next(target)
    message = ledger.Operation()
    request = message.spend
    request.amount = _amount("amount", amount, least=1)
    request.next_token_id = _id_of(produced)
    request.reference = text("reference", reference, limits.REFERENCE_BYTES_MAX)
    if usage is not None:
        request.usage.CopyFrom(_usage(usage))
    own_header = _fill(request.header, target, asked)
    return _operation("spend", message, own_header, produced=produced)


@_repeatable
def delegate(target: Target, asked: Asked, *, children: Sequence[Child]) -> Operation:
    """Make child budgets, all or none."""
    if not children:
        raise malformed("children", "at least one is needed")
    if len(children) > limits.CHILDREN_MAX:
        raise _too_large("children", len(children), limits.CHILDREN_MAX)
    produced = _next(target)
    pairs = [_child(child) for child in children]
    request = ledger.DelegateRequest(
        header=header(target, asked),
        next_token_id=_id_of(produced),
        children=[spec for spec, _ in pairs],
    )
    message = ledger.Operation(delegate=request)
    return _operation(
        "delegate",
        message,
        message.delegate.header,
        produced=produced,
        children=tuple(made for _, made in pairs),
    )


@_repeatable
def accept(target: Target, asked: Asked) -> Operation:
    """Rotate a token that was handed over, and bind it to the caller."""
    produced = new_secret()
    request = ledger.AcceptRequest(header=header(target, asked), next_token_id=token_id(produced))
    message = ledger.Operation(accept=request)
    return _operation("accept", message, message.accept.header, produced=produced)


@_repeatable
def recover(
    target: Target,
    asked: Asked,
    *,
    holds: Sequence[Rotated] = (),
    if_seq: int | None = None,
) -> Operation:
    """Give a budget and holds new tokens on its holder's word, perhaps only if it has so many entries."""
    produced = new_secret()
    request = ledger.RecoverRequest(
        header=header(target, asked),
        next_token_id=token_id(produced),
        holds=_rotations(holds),
        if_seq=if_seq,
    )
    message = ledger.Operation(recover=request)
    return _operation(
        "recover", message, message.recover.header, produced=produced, rotated=tuple(holds)
    )


@_repeatable
def fund(
    target: Target, asked: Asked, *, descendant_id: bytes, amount: int, lease: Seconds | None
) -> Operation:
    """Move money to a descendant, or renew its lease."""
    produced = _next(target)
    request = ledger.FundRequest(
        header=header(target, asked),
        next_token_id=_id_of(produced),
        descendant_id=descendant_id,
        amount=_amount("amount", amount, least=0),
        lease=_lease("lease", lease),
    )
    message = ledger.Operation(fund=request)
    return _operation("fund", message, message.fund.header, produced=produced)


@_repeatable
def renew(target: Target, asked: Asked, *, lease: Seconds) -> Operation:
    """Prolong a lease."""
    produced = _next(target)
    request = ledger.RenewRequest(
        header=header(target, asked),
        next_token_id=_id_of(produced),
        lease=_lease("lease", lease),
    )
    message = ledger.Operation(renew=request)
    return _operation("renew", message, message.renew.header, produced=produced)


@_repeatable
def give_back(target: Target, asked: Asked, *, amount: int | None, cascade: bool) -> Operation:
    """Give money back to the parent; without an amount all of it, and close."""
    if cascade and amount is not None:
        raise malformed("cascade", "goes with giving everything back, not with an amount")
    produced = None if amount is None else _next(target)
    request = getattr(ledger, "ReturnRequest")(  # noqa: B009 - as its field: `return`
        header=header(target, asked), next_token_id=_id_of(produced), cascade=cascade
    )
    if amount is None:
        request.all = True
    else:
        request.amount = _amount("amount", amount, least=1)
    message = ledger.Operation(**{"return": request})
    own: ledger.ReturnRequest = getattr(message, "return")
    return _operation("return", message, own.header, produced=produced, closes=amount is None)


@_repeatable
def revoke(target: Target, asked: Asked, *, descendant_id: bytes) -> Operation:
    """Close a descendant."""
    produced = _next(target)
    request = ledger.RevokeRequest(
        header=header(target, asked), next_token_id=_id_of(produced), descendant_id=descendant_id
    )
    message = ledger.Operation(revoke=request)
    return _operation("revoke", message, message.revoke.header, produced=produced)


@_repeatable
def resolve(target: Target, asked: Asked, *, hold_id: bytes, actual: int, reason: str) -> Operation:
    """Say what a hold has cost without its secret."""
    produced = _next(target)
    request = ledger.ResolveRequest(
        header=header(target, asked),
        next_token_id=_id_of(produced),
        hold_id=_id("hold_id", hold_id),
        actual=_amount("actual", actual, least=0),
        reason=text("reason", reason, limits.REASON_BYTES_MAX, least=1),
    )
    message = ledger.Operation(resolve=request)
    return _operation(
        "resolve", message, message.resolve.header, produced=produced, hold_id=hold_id
    )


# --- what an admin may ask ---


@dataclass(frozen=True, slots=True, repr=False)
class Grant:
    """A grant to be sent, and the secret if it was made here."""

    request: admin_service_pb2.GrantRequest
    secret: bytes | None


def grant(
    asked: Asked,
    *,
    name: str,
    unit: str,
    amount: int,
    holder: str | None,
    receiver: Receiver | bytes | None,
    token: bool,
) -> Grant:
    """Make a root."""
    root_id = new_id()
    token_of_root, secret = _custody(holder, receiver, token=token)
    request = admin_service_pb2.GrantRequest(
        header=header(Target(root_id, root_id, by_token=False), asked, by_role=True),
        name=_name("name", name),
        unit=_unit(unit),
        amount=_amount("amount", amount, least=0),
        token_id=token_of_root,
        holder=_holder(holder),
    )
    return Grant(request, secret)


def top_up(target: Target, asked: Asked, *, amount: int) -> admin_service_pb2.TopUpRequest:
    """Put more into a root."""
    return admin_service_pb2.TopUpRequest(
        header=header(target, asked, by_role=True), amount=_amount("amount", amount, least=1)
    )


def withdraw(target: Target, asked: Asked, *, amount: int) -> admin_service_pb2.WithdrawRequest:
    """Take out of a root."""
    return admin_service_pb2.WithdrawRequest(
        header=header(target, asked, by_role=True), amount=_amount("amount", amount, least=1)
    )


def freeze(target: Target, asked: Asked, *, reason: str) -> admin_service_pb2.FreezeRequest:
    """Block new spending in a subtree."""
    return admin_service_pb2.FreezeRequest(
        header=header(target, asked, by_role=True),
        reason=text("reason", reason, limits.REASON_BYTES_MAX),
    )


def unfreeze(target: Target, asked: Asked, *, reason: str) -> admin_service_pb2.UnfreezeRequest:
    """Clear the flag that Freeze set."""
    return admin_service_pb2.UnfreezeRequest(
        header=header(target, asked, by_role=True),
        reason=text("reason", reason, limits.REASON_BYTES_MAX),
    )


@dataclass(frozen=True, slots=True, repr=False)
class AdminRecover:
    """A recovery to be sent, and the secret if it was made here."""

    request: admin_service_pb2.AdminServiceRecoverRequest
    secret: bytes | None


def admin_recover(
    target: Target,
    asked: Asked,
    *,
    holder: str | None,
    receiver: Receiver | bytes | None,
    token: bool,
) -> AdminRecover:
    """Give any budget a new token, holder or custody."""
    next_token_id, secret = _custody(holder, receiver, token=token)
    request = admin_service_pb2.AdminServiceRecoverRequest(
        header=header(target, asked, by_role=True),
        next_token_id=next_token_id,
        holder=_holder(holder),
    )
    return AdminRecover(request, secret)


def admin_resolve(
    target: Target, asked: Asked, *, hold_id: bytes, actual: int, reason: str
) -> admin_service_pb2.AdminServiceResolveRequest:
    """Say what any hold has cost."""
    return admin_service_pb2.AdminServiceResolveRequest(
        header=header(target, asked, by_role=True),
        hold_id=_id("hold_id", hold_id),
        actual=_amount("actual", actual, least=0),
        reason=text("reason", reason, limits.REASON_BYTES_MAX, least=1),
    )


# --- the parts ---


def budget_ref(budget: str | BudgetRef) -> types_pb2.BudgetRef:
    """A budget as it is named: by its ids, or by its path."""
    if isinstance(budget, BudgetRef):
        return types_pb2.BudgetRef(root_id=budget.root_id, budget_id=budget.budget_id)
    if SECRET_TEXT.search(budget):
        # The message does not repeat it.
        raise malformed("budget", "is named by its path; a capability is accepted")
    return types_pb2.BudgetRef(path=budget)


def authority(secret: bytes | None) -> types_pb2.Authority:
    """The proof for a read: a token's secret, which is not consumed, or the caller's own identity."""
    if secret is not None:
        return types_pb2.Authority(secret=secret)
    return types_pb2.Authority(holder=types_pb2.Holder())


def header(
    target: Target | HoldTarget, asked: Asked, *, by_role: bool = False
) -> types_pb2.OperationHeader:
    """What every operation carries; a token's secret is added when it is sent."""
    return _fill(types_pb2.OperationHeader(), target, asked, by_role=by_role)


def _fill(
    empty: types_pb2.OperationHeader,
    target: Target | HoldTarget,
    asked: Asked,
    *,
    by_role: bool = False,
) -> types_pb2.OperationHeader:
    empty.operation_id = new_id()
    empty.root_id = target.root_id
    empty.budget_id = target.budget_id
    if asked.labels:
        empty.labels.update(_labels(asked.labels))
    empty.dry_run = asked.dry_run
    empty.traceparent = asked.traceparent
    if isinstance(target, Target) and not target.by_token and not by_role:
        empty.authority.holder.SetInParent()
    return empty


def _operation(
    kind: str,
    message: ledger.Operation,
    own_header: types_pb2.OperationHeader,
    *,
    produced: bytes | None = None,
    closes: bool = False,
    hold_id: bytes = b"",
    hold_secret: bytes | None = None,
    children: tuple[MadeChild, ...] = (),
    rotated: tuple[Rotated, ...] = (),
) -> Operation:
    size = message.ByteSize() + _AUTHORITY_BYTES + _TRACEPARENT_BYTES
    if size > limits.MESSAGE_BYTES_MAX:
        raise _too_large("request", size, limits.MESSAGE_BYTES_MAX)
    return Operation(
        kind=kind,
        operation_id=own_header.operation_id,
        root_id=own_header.root_id,
        budget_id=own_header.budget_id,
        message=message,
        header=own_header,
        size=size,
        produced=produced,
        closes=closes,
        hold_id=hold_id,
        hold_secret=hold_secret,
        children=children,
        rotated=rotated,
    )


def _next(target: Target) -> bytes | None:
    return new_secret() if target.by_token else None


def _id_of(secret: bytes | None) -> bytes:
    return b"" if secret is None else token_id(secret)


def _child(child: Child) -> tuple[types_pb2.ChildSpec, MadeChild]:
    token_of_child, secret = _custody(child.holder, child.receiver, token=child.token)
    factor = child.overrun_factor
    if factor is not None and (
        type(factor) is not int or not 0 <= factor <= limits.OVERRUN_FACTOR_MAX
    ):
        raise malformed(
            "overrun_factor",
            f"must be an int from 0 to {limits.OVERRUN_FACTOR_MAX}, not {factor!r}",
        )
    spec = types_pb2.ChildSpec(
        budget_id=new_id(),
        name=_name("name", child.name),
        amount=_amount("amount", child.amount, least=0),
        token_id=token_of_child,
        holder=_holder(child.holder),
        lease=_lease("lease", child.lease),
        lease_latest=_lease("lease_latest", child.lease_latest),
        labels=_labels(child.labels),
        overrun_factor=factor,
    )
    return spec, MadeChild(spec.budget_id, child.name, secret)


def _custody(
    holder: str | None, receiver: Receiver | bytes | None, *, token: bool
) -> tuple[bytes, bytes | None]:
    """The token id that is named, and its secret if it was made here."""
    if receiver is not None:
        shown = receiver.token_id if isinstance(receiver, Receiver) else receiver
        if len(shown) != limits.TOKEN_ID_BYTES:
            raise malformed("receiver", "must be a Receiver or the 32 bytes of its token id")
        return shown, None
    if holder is not None and not token:
        return b"", None
    secret = new_secret()
    return token_id(secret), secret


def _rotations(holds: Sequence[Rotated]) -> list[types_pb2.HoldRotation]:
    if len(holds) > limits.ROTATIONS_MAX:
        raise _too_large("holds", len(holds), limits.ROTATIONS_MAX)
    return [
        types_pb2.HoldRotation(hold_id=_id("holds", info.hold_id), next_token_id=token_id(secret))
        for info, secret in holds
    ]


def _amount(field_name: str, value: int, *, least: int) -> int:
    if type(value) is not int:
        kind = type(value).__name__
        raise malformed(field_name, f"must be an int of the tree's unit, not {kind}")
    if not least <= value <= limits.AMOUNT_MAX:
        raise malformed(field_name, f"must be from {least} to 2^62 - 1, not {value}")
    return value


def duration(field_name: str, value: Seconds | None, least: int, most: int) -> Duration | None:
    """A duration, if it has so many microseconds."""
    if value is None:
        return None
    microseconds = _microseconds(field_name, value)
    if not least <= microseconds <= most:
        raise malformed(
            field_name,
            f"must be from {least // limits.SECOND_US} to {most // limits.SECOND_US} seconds, "
            f"not {value}",
        )
    seconds, rest = divmod(microseconds, limits.SECOND_US)
    return Duration(seconds=seconds, nanos=rest * 1000)


def _microseconds(field_name: str, value: Seconds) -> int:
    if isinstance(value, timedelta):
        return value // timedelta(microseconds=1)
    try:
        return round(value * limits.SECOND_US)
    except (OverflowError, ValueError, TypeError):
        raise malformed(field_name, f"is seconds or a timedelta, not {value!r}") from None


def _lease(field_name: str, value: Seconds | None) -> Duration | None:
    return duration(field_name, value, limits.LEASE_US_MIN, limits.LEASE_US_MAX)


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    if len(labels) > limits.LABELS_MAX:
        raise _too_large("labels", len(labels), limits.LABELS_MAX)
    return {
        text("labels", key, limits.LABEL_KEY_BYTES_MAX, least=1): text(
            "labels", value, limits.LABEL_VALUE_BYTES_MAX
        )
        for key, value in labels.items()
    }


def _usage(usage: Usage) -> types_pb2.Usage:
    return types_pb2.Usage(
        provider=text("usage.provider", usage.provider, limits.PROVIDER_BYTES_MAX),
        model=text("usage.model", usage.model, limits.PROVIDER_BYTES_MAX),
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _name(field_name: str, value: str) -> str:
    name = text(field_name, value, limits.NAME_BYTES_MAX, least=1)
    if not _NAME.fullmatch(name):
        raise malformed(field_name, 'must be without "/" and control characters')
    return name


def _unit(value: str) -> str:
    unit = text("unit", value, limits.UNIT_BYTES_MAX, least=1)
    if not _UNIT.fullmatch(unit):
        raise malformed("unit", 'consists of a-z, 0-9 and "_"')
    return unit


def _holder(value: str | None) -> str:
    if value is None:
        return ""
    return text("holder", value, limits.PRINCIPAL_BYTES_MAX, least=1)


def text(field_name: str, value: str, most: int, *, least: int = 0) -> str:
    """A text as it was given, if it has so many bytes of UTF-8."""
    if not isinstance(value, str):
        raise malformed(field_name, f"is text, not {type(value).__name__}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise malformed(field_name, "is no valid Unicode") from None
    if not least <= size <= most:
        raise malformed(field_name, f"must have {least} to {most} bytes, not {size}")
    if SECRET_TEXT.search(value):
        raise malformed(field_name, "must not contain a capability, a key or a webhook's secret")
    return value


def _id(field_name: str, value: bytes) -> bytes:
    if len(value) != limits.ID_BYTES:
        raise malformed(field_name, "must be an id of 16 bytes")
    return value


def malformed(field_name: str, problem: str) -> Malformed:
    """The caller's mistake in a field, noticed before anything is sent."""
    return Malformed(f"{field_name}: {problem}", facts={"field": field_name, "problem": problem})


def _too_large(field_name: str, size: int, limit: int) -> TooLarge:
    return TooLarge(
        f"{field_name}: {size} are more than the {limit} that one request may carry",
        facts={"field": field_name, "size": str(size), "limit": str(limit)},
    )
