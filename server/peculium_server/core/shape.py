"""Is a request well-formed? Checked before anything is loaded, whatever the state of the ledger."""

from __future__ import annotations

from collections.abc import Iterator

from peculium_server.core import limits
from peculium_server.core.operations import (
    Accept,
    After,
    AtomicBatch,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Collect,
    Delegate,
    Expire,
    Extend,
    Freeze,
    Fund,
    Grant,
    Labels,
    Lapse,
    Operation,
    Recover,
    Release,
    Renew,
    Reserve,
    Resolve,
    Return,
    Revoke,
    Settle,
    Spend,
    TopUp,
    Unfreeze,
    Usage,
    Withdraw,
)
from peculium_server.core.refusals import Refusal, Refused

Problem = tuple[str, str]
"""The field and what is wrong with it."""

_UNIT_ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_")


def check_shape(operation: Operation) -> Refused | None:
    """Refuse a malformed or oversized operation; the first problem in the order of fields is told.

    Of what is too large, only as much is looked at as it may have.
    """
    for field, problem in _problems(operation):
        return Refused(Refusal.MALFORMED, {"field": field, "problem": problem})
    for field, size, limit in _sizes(operation):
        if size > limit:
            return Refused(
                Refusal.TOO_LARGE, {"field": field, "limit": str(limit), "size": str(size)}
            )
    return None


def _sizes(operation: Operation) -> Iterator[tuple[str, int, int]]:
    """What may be repeated: the field, how many there are, and how many there may be."""
    yield "labels", len(operation.labels), limits.LABELS_MAX
    if isinstance(operation, Delegate):
        yield "children", len(operation.children), limits.CHILDREN_MAX
        for index, child in enumerate(operation.children):
            yield f"children[{index}].labels", len(child.labels), limits.LABELS_MAX
    if isinstance(operation, Recover):
        yield "holds", len(operation.holds), limits.ROTATIONS_MAX


def _problems(operation: Operation) -> Iterator[Problem]:
    # Of the ledger's own operations the version is another, so that no client can take their ids.
    version = 8 if isinstance(operation, Lapse | Expire | Collect) else 7
    yield from _uuid("operation_id", operation.operation_id, version)
    yield from _id("root_id", operation.root_id)
    yield from _id("budget_id", operation.budget_id)
    yield from _authority(operation)
    yield from _labels("labels", operation.labels)
    if operation.trace_id is not None:
        yield from _length("trace_id", operation.trace_id, limits.ID_BYTES)
    if operation.batch is not None:
        yield from _batch(operation.batch)
    yield from _own(operation)


def _batch(batch: AtomicBatch) -> Iterator[Problem]:
    yield from _uuid("batch.operation_id", batch.batch_id)
    if not 1 <= batch.size <= limits.OPERATIONS_MAX:
        yield "batch.size", f"must be 1 to {limits.OPERATIONS_MAX}"


def _own(operation: Operation) -> Iterator[Problem]:
    match operation:
        case Grant():
            yield from _uuid("budget_id", operation.budget_id)
            if operation.root_id != operation.budget_id:
                yield "budget_id", "must be the root id: a grant makes a root"
            yield from _name("name", operation.name)
            yield from _unit(operation.unit)
            yield from _amount("amount", operation.amount, 0)
            yield from _receiver("", operation.token_id, operation.holder)
        case TopUp() | Withdraw():
            yield from _amount("amount", operation.amount, 1)
        case Reserve():
            yield from _amount("amount", operation.amount, 1)
            yield from _duration(
                "ttl", operation.ttl_us, limits.HOLD_TTL_US_MIN, limits.HOLD_AGE_US_MAX
            )
            yield from _uuid("hold_id", operation.hold_id)
            yield from _token("hold_token_id", operation.hold_token_id)
        case Settle():
            yield from _settle(operation)
        case Release() | Lapse():
            yield from _id("hold_id", operation.hold_id)
        case Extend():
            yield from _id("hold_id", operation.hold_id)
            yield from _duration(
                "ttl", operation.ttl_us, limits.HOLD_TTL_US_MIN, limits.HOLD_AGE_US_MAX
            )
            yield from _token("next_hold_token_id", operation.next_hold_token_id)
        case Spend():
            yield from _amount("amount", operation.amount, 1)
            yield from _text("reference", operation.reference, limits.REFERENCE_BYTES_MAX)
            yield from _usage(operation.usage)
        case Delegate():
            yield from _children(operation.children)
        case Recover():
            yield from _recover(operation)
        case Fund():
            yield from _id("descendant_id", operation.descendant_id)
            yield from _amount("amount", operation.amount, 0)
            if operation.lease_us is not None:
                yield from _lease("lease", operation.lease_us)
        case Renew():
            yield from _lease("lease", operation.lease_us)
        case Return():
            if operation.amount is not None:
                yield from _amount("amount", operation.amount, 1)
                if operation.cascade:
                    yield "cascade", "only with all"
        case Revoke():
            yield from _id("descendant_id", operation.descendant_id)
        case Resolve():
            yield from _id("hold_id", operation.hold_id)
            yield from _amount("actual", operation.actual, 0)
            yield from _text("reason", operation.reason, limits.REASON_BYTES_MAX, least=1)
        case Freeze() | Unfreeze():
            yield from _text("reason", operation.reason, limits.REASON_BYTES_MAX)
        case Accept() | Expire() | Collect():
            pass


def _authority(operation: Operation) -> Iterator[Problem]:
    """By what right, and whether the token that this right needs next is named."""
    match operation.authority:
        case ByToken(token_id):
            yield from _length("authority.secret", token_id, limits.TOKEN_ID_BYTES)
        case After(index):
            if not 0 <= index < limits.OPERATIONS_MAX:
                yield "authority.after", "must be the index of an earlier operation of the batch"
        case ByHolder() | ByRole():
            pass
    by_token = isinstance(operation.authority, ByToken | After)
    match operation:
        case (
            Grant() | TopUp() | Withdraw() | Freeze() | Unfreeze() | Lapse() | Expire() | Collect()
        ):
            if not isinstance(operation.authority, ByRole):
                yield "authority", "must be absent: the caller's role is the authority"
        case Settle() | Release() | Extend():
            if not by_token:
                yield "authority", "must be the hold's secret"
        case Accept():
            if isinstance(operation.authority, ByRole):
                yield "authority", "is missing"
            yield from _token("next_token_id", operation.next_token_id)
        case Recover():
            if by_token:
                yield "authority", "must be the holder: who has the secret needs no Recover"
        case Resolve():
            yield from _next(operation.next_token_id, wanted=by_token)
        case _:
            if isinstance(operation.authority, ByRole):
                yield "authority", "is missing"
            closes = isinstance(operation, Return) and operation.amount is None
            yield from _next(operation.next_token_id, wanted=by_token and not closes)


def _next(token_id: bytes | None, *, wanted: bool) -> Iterator[Problem]:
    if wanted:
        yield from _token("next_token_id", token_id)
    elif token_id is not None:
        yield "next_token_id", "must be absent: this operation produces no token"


def _settle(operation: Settle) -> Iterator[Problem]:
    yield from _id("hold_id", operation.hold_id)
    if operation.actual is not None:
        yield from _amount("actual", operation.actual, 0)
    elif operation.keep_open:
        yield "actual", "must be said when the hold is kept open"
    if operation.keep_open:
        yield from _token("next_hold_token_id", operation.next_hold_token_id)
    elif operation.next_hold_token_id is not None:
        yield "next_hold_token_id", "only with keep_open"
    yield from _text("reference", operation.reference, limits.REFERENCE_BYTES_MAX)
    yield from _usage(operation.usage)


def _recover(operation: Recover) -> Iterator[Problem]:
    if isinstance(operation.authority, ByHolder):
        yield from _token("next_token_id", operation.next_token_id)
        if operation.holder is not None:
            yield "holder", "is set by an admin only"
    else:
        yield from _receiver("", operation.next_token_id, operation.holder, "next_token_id")
    if operation.if_seq is not None:
        yield from _amount("if_seq", operation.if_seq, 1)
    seen = set()
    for index, rotation in enumerate(operation.holds[: limits.ROTATIONS_MAX]):
        yield from _id(f"holds[{index}].hold_id", rotation.hold_id)
        yield from _token(f"holds[{index}].next_token_id", rotation.next_token_id)
        if rotation.hold_id in seen:
            yield f"holds[{index}].hold_id", "is named twice"
        seen.add(rotation.hold_id)


def _children(children: tuple[Child, ...]) -> Iterator[Problem]:
    if not children:
        yield "children", "must be at least 1"
    ids: set[bytes] = set()
    names: set[str] = set()
    for index, child in enumerate(children[: limits.CHILDREN_MAX]):
        prefix = f"children[{index}]."
        yield from _uuid(f"{prefix}budget_id", child.budget_id)
        yield from _name(f"{prefix}name", child.name)
        yield from _amount(f"{prefix}amount", child.amount, 0)
        yield from _receiver(prefix, child.token_id, child.holder)
        yield from _labels(f"{prefix}labels", child.labels)
        if not 0 <= child.overrun_factor <= limits.OVERRUN_FACTOR_MAX:
            yield f"{prefix}overrun_factor", f"must be 0 to {limits.OVERRUN_FACTOR_MAX}"
        if child.lease_us is not None:
            yield from _lease(f"{prefix}lease", child.lease_us)
        if child.lease_latest_us is not None:
            yield from _lease(f"{prefix}lease_latest", child.lease_latest_us)
            if child.lease_us is None:
                yield f"{prefix}lease_latest", "only with a lease"
            elif child.lease_latest_us < child.lease_us:
                yield f"{prefix}lease_latest", "must not be before the lease's end"
        if child.budget_id in ids:
            yield f"{prefix}budget_id", "is named twice"
        if child.name in names:
            yield f"{prefix}name", "is named twice"
        ids.add(child.budget_id)
        names.add(child.name)


def _length(field: str, value: bytes, length: int) -> Iterator[Problem]:
    if len(value) != length:
        yield field, f"must be {length} bytes, not {len(value)}"


def _id(field: str, value: bytes) -> Iterator[Problem]:
    yield from _length(field, value, limits.ID_BYTES)


def _uuid(field: str, value: bytes, version: int = 7) -> Iterator[Problem]:
    if len(value) != limits.ID_BYTES:
        yield from _id(field, value)
    elif value[6] >> 4 != version or value[8] >> 6 != 2:  # noqa: PLR2004 - RFC 9562, section 4.1
        yield field, f"must be a UUIDv{version}"


def _token(field: str, value: bytes | None) -> Iterator[Problem]:
    if value is None:
        yield field, "is missing"
    else:
        yield from _length(field, value, limits.TOKEN_ID_BYTES)


def _receiver(
    prefix: str, token_id: bytes | None, holder: str | None, field: str = "token_id"
) -> Iterator[Problem]:
    if token_id is None and holder is None:
        yield f"{prefix}{field}", "is missing: name a token id, a holder, or both"
    if token_id is not None:
        yield from _length(f"{prefix}{field}", token_id, limits.TOKEN_ID_BYTES)
    if holder is not None:
        yield from _text(f"{prefix}holder", holder, limits.PRINCIPAL_BYTES_MAX, least=1)


def _amount(field: str, value: int, least: int) -> Iterator[Problem]:
    if value < least:
        yield field, f"must be at least {least}"
    elif value > limits.AMOUNT_MAX:
        yield field, f"must be at most {limits.AMOUNT_MAX}"


def _duration(field: str, value: int, least: int, most: int) -> Iterator[Problem]:
    if not least <= value <= most:
        yield (
            field,
            f"must be {least // limits.SECOND_US} to {most // limits.SECOND_US} seconds",
        )


def _lease(field: str, value: int) -> Iterator[Problem]:
    yield from _duration(field, value, limits.LEASE_US_MIN, limits.LEASE_US_MAX)


def _text(field: str, value: str, most: int, least: int = 0) -> Iterator[Problem]:
    size = len(value.encode(errors="surrogatepass"))
    if not least <= size <= most:
        yield field, f"must be {least} to {most} bytes of UTF-8, not {size}"
    elif not all(map(_printable, value)):
        yield field, "must not contain control characters"


def _printable(character: str) -> bool:
    """Neither a control character (NUL does not fit into the database) nor half a surrogate pair."""
    if character < " " or "\x7f" <= character <= "\x9f":
        return False
    return not "\ud800" <= character <= "\udfff"


def _name(field: str, value: str) -> Iterator[Problem]:
    yield from _text(field, value, limits.NAME_BYTES_MAX, least=1)
    if "/" in value:
        yield field, "must not contain a slash: it separates the names of a path"
    if value != value.strip():
        yield field, "must not begin or end with white space"


def _unit(value: str) -> Iterator[Problem]:
    if not 1 <= len(value) <= limits.UNIT_BYTES_MAX or not _UNIT_ALPHABET.issuperset(value):
        yield "unit", f"must be 1 to {limits.UNIT_BYTES_MAX} of a-z, 0-9 and _"


def _labels(field: str, labels: Labels) -> Iterator[Problem]:
    for key, value in labels[: limits.LABELS_MAX]:
        yield from _text(f"{field} key", key, limits.LABEL_KEY_BYTES_MAX, least=1)
        yield from _text(f"{field} value", value, limits.LABEL_VALUE_BYTES_MAX)


def _usage(usage: Usage | None) -> Iterator[Problem]:
    if usage is None:
        return
    yield from _text("usage.provider", usage.provider, limits.PROVIDER_BYTES_MAX)
    yield from _text("usage.model", usage.model, limits.PROVIDER_BYTES_MAX)
    for field in ("input_tokens", "output_tokens", "cached_tokens"):
        if not 0 <= getattr(usage, field) <= limits.USAGE_TOKENS_MAX:
            yield f"usage.{field}", f"must be 0 to {limits.USAGE_TOKENS_MAX}"
