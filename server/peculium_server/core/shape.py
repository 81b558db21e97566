"""Is a request well-formed? Checked before anything is loaded, whatever the state of the ledger."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

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
    Kind,
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
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters (NUL does not fit into the database) and halves of surrogate pairs."""
_SECRET = re.compile("pe[ck]_[A-Za-z0-9_-]{72}|whsec_[A-Za-z0-9+/]{43}")
"""A capability, an API key or a webhook's secret, as clients write them: what is recorded is kept for ever."""
_SECRET_CHARACTERS_MIN = 49
NOT_TOLD = "must not contain a capability, a key or a webhook's secret"


def check_shape(operation: Operation) -> Refused | None:
    """Refuse a malformed or oversized operation; the first problem in the order of fields is told.

    Of what is too large, only as much is looked at as it may have.
    """
    found = _problem(operation)
    if found is not None:
        field, problem = found
        return Refused(Refusal.MALFORMED, {"field": field, "problem": problem})
    return _check_sizes(operation)


def _check_sizes(operation: Operation) -> Refused | None:
    """What may be repeated is bounded."""
    if len(operation.labels) > limits.LABELS_MAX:
        return _too_large("labels", operation.labels, limits.LABELS_MAX)
    if isinstance(operation, Delegate):
        if len(operation.children) > limits.CHILDREN_MAX:
            return _too_large("children", operation.children, limits.CHILDREN_MAX)
        for index, child in enumerate(operation.children):
            if len(child.labels) > limits.LABELS_MAX:
                return _too_large(f"children[{index}].labels", child.labels, limits.LABELS_MAX)
    if isinstance(operation, Recover) and len(operation.holds) > limits.ROTATIONS_MAX:
        return _too_large("holds", operation.holds, limits.ROTATIONS_MAX)
    return None


def _too_large(field: str, repeated: tuple[object, ...], limit: int) -> Refused:
    return Refused(
        Refusal.TOO_LARGE, {"field": field, "limit": str(limit), "size": str(len(repeated))}
    )


# Every check below returns the first problem that it finds, or None.


def _problem(operation: Operation) -> Problem | None:
    return (
        _operation_id(operation)
        or _id("root_id", operation.root_id)
        or _id("budget_id", operation.budget_id)
        or _authority(operation)
        or labels_problem("labels", operation.labels)
        or (None if operation.trace_id is None else _id("trace_id", operation.trace_id))
        or (None if operation.batch is None else _batch(operation.batch))
        or _OWN[operation.kind](operation)
    )


_SYSTEM = (Lapse, Expire, Collect)


def _operation_id(operation: Operation) -> Problem | None:
    """Of the ledger's own operations the version is another, so that no client can take their ids.

    A Freeze may be the ledger's own, too.
    """
    field, value = "operation_id", operation.operation_id
    if isinstance(operation, Freeze) and uuid_problem(field, value, 8) is None:
        return None
    return uuid_problem(field, value, 8 if isinstance(operation, _SYSTEM) else 7)


def _batch(batch: AtomicBatch) -> Problem | None:
    found = uuid_problem("batch.operation_id", batch.batch_id)
    if found is None and not 1 <= batch.size <= limits.OPERATIONS_MAX:
        return "batch.size", f"must be 1 to {limits.OPERATIONS_MAX}"
    return found


# -- By what right ----------------------------------------------------------------------------------


def _authority(operation: Operation) -> Problem | None:
    """By what right, and whether the token that this right needs next is named."""
    authority, found = operation.authority, None
    if isinstance(authority, ByToken):
        found = _token("authority.secret", authority.token_id)
    elif isinstance(authority, After) and not 0 <= authority.index < limits.OPERATIONS_MAX:
        found = "authority.after", "must be the index of an earlier operation of the batch"
    return found or _RIGHT[operation.kind](operation, isinstance(authority, (ByToken, After)))


def _by_role(operation: Operation, _: bool) -> Problem | None:
    if not isinstance(operation.authority, ByRole):
        return "authority", "must be absent: the caller's role is the authority"
    return None


def _by_hold(_: Operation, by_token: bool) -> Problem | None:
    return None if by_token else ("authority", "must be the hold's secret")


def _by_budget(operation: Any, by_token: bool) -> Problem | None:
    if isinstance(operation.authority, ByRole):
        return "authority", "is missing"
    return _next(operation.next_token_id, wanted=by_token)


def _by_budget_or_role(operation: Resolve, by_token: bool) -> Problem | None:
    return _next(operation.next_token_id, wanted=by_token)


def _by_closing(operation: Return, by_token: bool) -> Problem | None:
    if isinstance(operation.authority, ByRole):
        return "authority", "is missing"
    return _next(operation.next_token_id, wanted=by_token and operation.amount is not None)


def _by_new_holder(operation: Accept, _: bool) -> Problem | None:
    if isinstance(operation.authority, ByRole):
        return "authority", "is missing"
    return _token("next_token_id", operation.next_token_id)


def _without_secret(_: Operation, by_token: bool) -> Problem | None:
    if by_token:
        return "authority", "must be the holder: who has the secret needs no Recover"
    return None


def _next(token_id: bytes | None, *, wanted: bool) -> Problem | None:
    if wanted:
        return _token("next_token_id", token_id)
    if token_id is not None:
        return "next_token_id", "must be absent: this operation produces no token"
    return None


_RIGHT: dict[Kind, Callable[[Any, bool], Problem | None]] = {
    Kind.GRANT: _by_role,
    Kind.TOP_UP: _by_role,
    Kind.WITHDRAW: _by_role,
    Kind.RESERVE: _by_budget,
    Kind.SETTLE: _by_hold,
    Kind.RELEASE: _by_hold,
    Kind.EXTEND: _by_hold,
    Kind.SPEND: _by_budget,
    Kind.DELEGATE: _by_budget,
    Kind.ACCEPT: _by_new_holder,
    Kind.RECOVER: _without_secret,
    Kind.FUND: _by_budget,
    Kind.RENEW: _by_budget,
    Kind.RETURN: _by_closing,
    Kind.REVOKE: _by_budget,
    Kind.RESOLVE: _by_budget_or_role,
    Kind.FREEZE: _by_role,
    Kind.UNFREEZE: _by_role,
    Kind.LAPSE: _by_role,
    Kind.EXPIRE: _by_role,
    Kind.COLLECT: _by_role,
}


# -- What each kind has of its own ------------------------------------------------------------------


def _grant(grant: Grant) -> Problem | None:
    return (
        _root(grant)
        or _name("name", grant.name)
        or _unit(grant.unit)
        or _amount("amount", grant.amount, 0)
        or _receiver(grant.token_id, grant.holder)
    )


def _root(grant: Grant) -> Problem | None:
    found = uuid_problem("budget_id", grant.budget_id)
    if found is None and grant.root_id != grant.budget_id:
        return "budget_id", "must be the root id: a grant makes a root"
    return found


def _positive(operation: TopUp | Withdraw) -> Problem | None:
    return _amount("amount", operation.amount, 1)


def _reserve(reserve: Reserve) -> Problem | None:
    return (
        _amount("amount", reserve.amount, 1)
        or _ttl(reserve.ttl_us)
        or uuid_problem("hold_id", reserve.hold_id)
        or _token("hold_token_id", reserve.hold_token_id)
    )


def _settle(settle: Settle) -> Problem | None:
    return (
        _id("hold_id", settle.hold_id)
        or _actual(settle)
        or _next_hold(settle)
        or text_problem("reference", settle.reference, limits.REFERENCE_BYTES_MAX)
        or _usage(settle.usage)
    )


def _actual(settle: Settle) -> Problem | None:
    if settle.actual is not None:
        return _amount("actual", settle.actual, 0)
    if settle.keep_open:
        return "actual", "must be said when the hold is kept open"
    return None


def _next_hold(settle: Settle) -> Problem | None:
    if settle.keep_open:
        return _token("next_hold_token_id", settle.next_hold_token_id)
    if settle.next_hold_token_id is not None:
        return "next_hold_token_id", "only with keep_open"
    return None


def _hold(operation: Release | Lapse) -> Problem | None:
    return _id("hold_id", operation.hold_id)


def _extend(extend: Extend) -> Problem | None:
    return (
        _id("hold_id", extend.hold_id)
        or _ttl(extend.ttl_us)
        or _token("next_hold_token_id", extend.next_hold_token_id)
    )


def _spend(spend: Spend) -> Problem | None:
    return (
        _amount("amount", spend.amount, 1)
        or text_problem("reference", spend.reference, limits.REFERENCE_BYTES_MAX)
        or _usage(spend.usage)
    )


def _delegate(delegate: Delegate) -> Problem | None:
    if not delegate.children:
        return "children", "must be at least 1"
    ids: set[bytes] = set()
    names: set[str] = set()
    for index, child in enumerate(delegate.children[: limits.CHILDREN_MAX]):
        found = _child(child)
        if found is None and child.budget_id in ids:
            found = "budget_id", "is named twice"
        if found is None and child.name in names:
            found = "name", "is named twice"
        if found is not None:
            field, problem = found
            return f"children[{index}].{field}", problem
        ids.add(child.budget_id)
        names.add(child.name)
    return None


def _child(child: Child) -> Problem | None:
    return (
        uuid_problem("budget_id", child.budget_id)
        or _name("name", child.name)
        or _amount("amount", child.amount, 0)
        or _receiver(child.token_id, child.holder)
        or labels_problem("labels", child.labels)
        or _overrun_factor(child.overrun_factor)
        or (None if child.lease_us is None else _lease("lease", child.lease_us))
        or _lease_latest(child)
    )


def _overrun_factor(value: int) -> Problem | None:
    if not 0 <= value <= limits.OVERRUN_FACTOR_MAX:
        return "overrun_factor", f"must be 0 to {limits.OVERRUN_FACTOR_MAX}"
    return None


def _lease_latest(child: Child) -> Problem | None:
    if child.lease_latest_us is None:
        return None
    found = _lease("lease_latest", child.lease_latest_us)
    if found is not None:
        return found
    if child.lease_us is None:
        return "lease_latest", "only with a lease"
    if child.lease_latest_us < child.lease_us:
        return "lease_latest", "must not be before the lease's end"
    return None


def _recover(recover: Recover) -> Problem | None:
    return (
        _recovered(recover)
        or (None if recover.if_seq is None else _amount("if_seq", recover.if_seq, 1))
        or _rotations(recover)
    )


def _recovered(recover: Recover) -> Problem | None:
    if not isinstance(recover.authority, ByHolder):
        return _receiver(recover.next_token_id, recover.holder, "next_token_id")
    found = _token("next_token_id", recover.next_token_id)
    if found is None and recover.holder is not None:
        return "holder", "is set by an admin only"
    return found


def _rotations(recover: Recover) -> Problem | None:
    seen: set[bytes] = set()
    for index, rotation in enumerate(recover.holds[: limits.ROTATIONS_MAX]):
        found = _id(f"holds[{index}].hold_id", rotation.hold_id) or _token(
            f"holds[{index}].next_token_id", rotation.next_token_id
        )
        if found is not None:
            return found
        if rotation.hold_id in seen:
            return f"holds[{index}].hold_id", "is named twice"
        seen.add(rotation.hold_id)
    return None


def _fund(fund: Fund) -> Problem | None:
    return (
        _id("descendant_id", fund.descendant_id)
        or _amount("amount", fund.amount, 0)
        or (None if fund.lease_us is None else _lease("lease", fund.lease_us))
    )


def _renew(renew: Renew) -> Problem | None:
    return _lease("lease", renew.lease_us)


def _return(give: Return) -> Problem | None:
    if give.amount is None:
        return None
    found = _amount("amount", give.amount, 1)
    if found is None and give.cascade:
        return "cascade", "only with all"
    return found


def _revoke(revoke: Revoke) -> Problem | None:
    return _id("descendant_id", revoke.descendant_id)


def _resolve(resolve: Resolve) -> Problem | None:
    return (
        _id("hold_id", resolve.hold_id)
        or _amount("actual", resolve.actual, 0)
        or text_problem("reason", resolve.reason, limits.REASON_BYTES_MAX, least=1)
    )


def _freeze(operation: Freeze | Unfreeze) -> Problem | None:
    return text_problem("reason", operation.reason, limits.REASON_BYTES_MAX)


def _nothing(_: Operation) -> Problem | None:
    return None


_OWN: dict[Kind, Callable[[Any], Problem | None]] = {
    Kind.GRANT: _grant,
    Kind.TOP_UP: _positive,
    Kind.WITHDRAW: _positive,
    Kind.RESERVE: _reserve,
    Kind.SETTLE: _settle,
    Kind.RELEASE: _hold,
    Kind.EXTEND: _extend,
    Kind.SPEND: _spend,
    Kind.DELEGATE: _delegate,
    Kind.ACCEPT: _nothing,
    Kind.RECOVER: _recover,
    Kind.FUND: _fund,
    Kind.RENEW: _renew,
    Kind.RETURN: _return,
    Kind.REVOKE: _revoke,
    Kind.RESOLVE: _resolve,
    Kind.FREEZE: _freeze,
    Kind.UNFREEZE: _freeze,
    Kind.LAPSE: _hold,
    Kind.EXPIRE: _nothing,
    Kind.COLLECT: _nothing,
}


# -- Values -----------------------------------------------------------------------------------------


def _length(field: str, value: bytes, length: int) -> Problem | None:
    if len(value) != length:
        return field, f"must be {length} bytes, not {len(value)}"
    return None


def _id(field: str, value: bytes) -> Problem | None:
    return _length(field, value, limits.ID_BYTES)


def uuid_problem(field: str, value: bytes, version: int = 7) -> Problem | None:
    """What is wrong with an id that somebody has made."""
    found = _id(field, value)
    if found is None and (value[6] >> 4 != version or value[8] >> 6 != 2):  # noqa: PLR2004 - RFC 9562, section 4.1
        return field, f"must be a UUIDv{version}"
    return found


def _token(field: str, value: bytes | None) -> Problem | None:
    if value is None:
        return field, "is missing"
    return _length(field, value, limits.TOKEN_ID_BYTES)


def _receiver(
    token_id: bytes | None, holder: str | None, field: str = "token_id"
) -> Problem | None:
    if token_id is None and holder is None:
        return field, "is missing: name a token id, a holder, or both"
    return (None if token_id is None else _token(field, token_id)) or (
        None
        if holder is None
        else text_problem("holder", holder, limits.PRINCIPAL_BYTES_MAX, least=1)
    )


def _amount(field: str, value: int, least: int) -> Problem | None:
    if value < least:
        return field, f"must be at least {least}"
    if value > limits.AMOUNT_MAX:
        return field, f"must be at most {limits.AMOUNT_MAX}"
    return None


def _duration(field: str, value: int, least: int, most: int) -> Problem | None:
    if not least <= value <= most:
        return (
            field,
            f"must be {least // limits.SECOND_US} to {most // limits.SECOND_US} seconds",
        )
    return None


def _ttl(value: int) -> Problem | None:
    return _duration("ttl", value, limits.HOLD_TTL_US_MIN, limits.HOLD_AGE_US_MAX)


def _lease(field: str, value: int) -> Problem | None:
    return _duration(field, value, limits.LEASE_US_MIN, limits.LEASE_US_MAX)


def text_problem(field: str, value: str, most: int, least: int = 0) -> Problem | None:
    """What is wrong with a text: its length in bytes, or what it is made of."""
    fits = value.isascii() and value.isprintable() and least <= len(value) <= most
    if fits and len(value) < _SECRET_CHARACTERS_MIN:
        return None
    size = len(value.encode(errors="surrogatepass"))
    if not least <= size <= most:
        return field, f"must be {least} to {most} bytes of UTF-8, not {size}"
    if _UNPRINTABLE.search(value):
        return field, "must not contain control characters"
    if has_secret(value):
        return field, NOT_TOLD
    return None


def has_secret(value: str) -> bool:
    """Say whether somebody who reads a text could spend, or call, or sign with what is in it."""
    return _SECRET.search(value) is not None


def _name(field: str, value: str) -> Problem | None:
    found = text_problem(field, value, limits.NAME_BYTES_MAX, least=1)
    if found is not None:
        return found
    if "/" in value:
        return field, "must not contain a slash: it separates the names of a path"
    if value != value.strip():
        return field, "must not begin or end with white space"
    return None


def _unit(value: str) -> Problem | None:
    if not 1 <= len(value) <= limits.UNIT_BYTES_MAX or not _UNIT_ALPHABET.issuperset(value):
        return "unit", f"must be 1 to {limits.UNIT_BYTES_MAX} of a-z, 0-9 and _"
    return None


def labels_problem(field: str, labels: Labels) -> Problem | None:
    """What is wrong with the first labels, as many as an operation may carry."""
    for key, value in labels[: limits.LABELS_MAX]:
        found = text_problem(
            f"{field} key", key, limits.LABEL_KEY_BYTES_MAX, least=1
        ) or text_problem(f"{field} value", value, limits.LABEL_VALUE_BYTES_MAX)
        if found is not None:
            return found
    return None


def _usage(usage: Usage | None) -> Problem | None:
    if usage is None:
        return None
    return (
        text_problem("usage.provider", usage.provider, limits.PROVIDER_BYTES_MAX)
        or text_problem("usage.model", usage.model, limits.PROVIDER_BYTES_MAX)
        or _tokens("usage.input_tokens", usage.input_tokens)
        or _tokens("usage.output_tokens", usage.output_tokens)
        or _tokens("usage.cached_tokens", usage.cached_tokens)
    )


def _tokens(field: str, value: int) -> Problem | None:
    if not 0 <= value <= limits.USAGE_TOKENS_MAX:
        return field, f"must be 0 to {limits.USAGE_TOKENS_MAX}"
    return None
