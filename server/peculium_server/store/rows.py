"""Between the core's values and rows: the order of columns, and what becomes of each row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from peculium_server.core.encoding import (
    BY_TOKEN,
    Part,
    decode_effect,
    decode_request,
    operation_digest,
    request_fields,
)
from peculium_server.core.operations import Kind, Operation
from peculium_server.core.state import (
    Balances,
    Budget,
    Consumption,
    Custody,
    Effect,
    Entry,
    Hold,
    HoldState,
    Recorded,
)
from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.schema import SPARSE

MONEY = Balances._fields

BUDGET_COLUMNS = (
    "root_id",
    "budget_id",
    "ancestors",
    "name",
    "unit",
    "custody",
    "holder",
    "token",
    "overrun_factor",
    "labels",
    "created_at",
    *MONEY,
    "disputed",
    "disputes",
    "holds_live",
    "closed",
    "frozen",
    "lease_until",
    "lease_latest",
    "version",
    "seq",
    "last_at",
    "head",
)
BUDGET_CHANGES = (
    "custody",
    "holder",
    "token",
    *MONEY,
    "disputed",
    "disputes",
    "holds_live",
    "closed",
    "frozen",
    "lease_until",
    "lease_latest",
    "version",
    "seq",
    "last_at",
    "head",
)
"""The columns that operations change, in the order of `budget_changes`."""

_IS_SPARSE = tuple(name in SPARSE for name in MONEY)

_CUSTODY = {int(custody): custody for custody in Custody}
_HOLD_STATE = {int(state): state for state in HoldState}
_KIND = {int(kind): kind for kind in Kind}


def to_budget(row: Sequence[Any]) -> Budget:
    """A row of `BUDGET_COLUMNS`."""
    return _budget(row, _CUSTODY[row[5]])


def to_budget_as_found(row: Sequence[Any]) -> Budget:
    """A row of `BUDGET_COLUMNS` for somebody who verifies it, whatever custody it may say."""
    return _budget(row, _CUSTODY.get(row[5], row[5]))


def _budget(row: Sequence[Any], custody: Custody) -> Budget:
    money = Balances._make(row[11:19])
    return Budget._make((*row[:2], tuple(row[2]), *row[3:5], custody, *row[6:11], money, *row[19:]))


def from_budget(budget: Budget) -> tuple[Any, ...]:
    """The row of `BUDGET_COLUMNS`, then `parent_id`, of a new budget.

    What is neither a scalar nor an array of scalars travels as text: ancestors and labels.
    """
    return (
        budget.root_id,
        budget.budget_id,
        "{" + ",".join(ancestor.hex() for ancestor in budget.ancestors) + "}",
        *budget[3:9],
        json.dumps(dict(budget.labels), ensure_ascii=False),
        budget.created_at,
        *budget.money,
        *budget[12:],
        budget.parent_id,
    )


def budget_changes(budget: Budget, entries: int) -> tuple[Any, ...]:
    """The key, the seq before so many entries, and the row of `BUDGET_CHANGES`."""
    return (
        budget.root_id,
        budget.budget_id,
        budget.seq - entries,
        budget.custody,
        budget.holder,
        budget.token,
        *budget.money,
        *budget[12:],
    )


COLLECTION_COLUMNS = ("root_id", "budget_id", "closed_at")

HOLD_COLUMNS = (
    "root_id",
    "budget_id",
    "hold_id",
    "token",
    "state",
    "amount",
    "remaining",
    "booked",
    "disputed",
    "created_at",
    "expires_at",
)
HOLD_CHANGES = ("token", "state", "remaining", "booked", "disputed", "expires_at")
"""The columns that operations change, in the order of `hold_changes`."""


def to_hold(row: Sequence[Any]) -> Hold:
    """A row of `HOLD_COLUMNS`."""
    return Hold(row[1], row[2], row[3], _HOLD_STATE[row[4]], *row[5:])


def to_hold_as_found(row: Sequence[Any]) -> Hold:
    """A row of `HOLD_COLUMNS` for somebody who verifies it, whatever state it may say."""
    return Hold(row[1], row[2], row[3], _HOLD_STATE.get(row[4], row[4]), *row[5:])


def to_hold_of_root(row: Sequence[Any]) -> tuple[bytes, Hold]:
    """A row of `HOLD_COLUMNS`, and the root that it is of."""
    return row[0], to_hold(row)


def from_hold(root_id: bytes, hold: Hold) -> tuple[Any, ...]:
    """The row of `HOLD_COLUMNS` of a new hold."""
    return (root_id, *hold)


def hold_changes(root_id: bytes, hold: Hold) -> tuple[Any, ...]:
    """The key and the row of `HOLD_CHANGES`."""
    return (
        root_id,
        hold.hold_id,
        hold.token,
        hold.state,
        hold.remaining,
        hold.booked,
        hold.disputed,
        hold.expires_at,
    )


ENTRY_COLUMNS = (
    "root_id",
    "budget_id",
    "seq",
    "position",
    "part",
    "parts",
    "operation_id",
    "kind",
    "at",
    "principal",
    "trace_id",
    "consumed",
    "amount",
    *MONEY,
    "request",
    "effect",
    "digest",
    "hash",
)


def to_entry(row: Sequence[Any], previous_hash: bytes = b"") -> Entry:
    """A row of `ENTRY_COLUMNS`. The previous hash is in another row; it is empty if not given.

    Raises:
        LedgerCorrupt: It is not an entry.
    """
    try:
        return _entry(row, _KIND[row[7]], decode_effect(row[22], row[1]), previous_hash)
    except (KeyError, ValueError) as error:
        raise LedgerCorrupt(f"entry {row[2]} of budget {row[1].hex()} is unreadable") from error


def to_effect(budget_id: bytes, effect: bytes) -> Effect:
    """What an entry of a budget has done to it.

    Raises:
        LedgerCorrupt: It cannot be read.
    """
    try:
        return decode_effect(effect, budget_id)
    except ValueError as error:
        raise LedgerCorrupt(f"an entry of budget {budget_id.hex()} is unreadable") from error


def to_entry_as_found(row: Sequence[Any]) -> Entry:
    """A row of `ENTRY_COLUMNS` for somebody who verifies its hash, whatever may be in it.

    An effect that cannot be read is left out; its bytes are there.
    """
    try:
        effect = decode_effect(row[22], row[1])
    except ValueError:
        effect = Effect(changes=Balances())
    return _entry(row, _KIND.get(row[7], row[7]), effect, b"")


def _entry(row: Sequence[Any], kind: Kind, effect: Effect, previous_hash: bytes) -> Entry:
    money = Balances._make([value or 0 for value in row[13:21]])
    request, effect_bytes, digest, hash_ = row[21:25]
    if digest is None and request is not None:
        # That of an operation of a single part is not stored.
        digest = operation_digest(
            kind=kind,
            root_id=row[0],
            operation_id=row[6],
            position=row[3],
            at=row[8],
            principal=row[9],
            trace_id=row[10],
            amount=row[12],
            request=request,
            parts=[Part(row[1], row[2], row[11], money, effect_bytes)],
        )
    return Entry._make(
        (
            *row[:7],
            kind,
            *row[8:13],
            money,
            effect,
            request,
            effect_bytes,
            digest or b"",
            previous_hash,
            hash_,
        )
    )


def _sparse(money: Balances) -> list[int | None]:
    """The balances, with nothing for those that are zero in nearly every entry."""
    return [
        value or None if sparse else value for value, sparse in zip(money, _IS_SPARSE, strict=True)
    ]


def from_entry(entry: Entry) -> tuple[Any, ...]:
    """The row of `ENTRY_COLUMNS`."""
    return (
        *entry[:13],
        *_sparse(entry.money),
        entry.request,
        entry.effect_bytes,
        entry.digest if entry.parts > 1 else None,
        entry.hash,
    )


def to_recorded(entries: Sequence[Entry]) -> Recorded:
    """An operation of all its entries, in order.

    Raises:
        ValueError: These are not all the entries of one operation.
    """
    first = entries[0]
    if [entry.part for entry in entries] != list(range(first.parts)):
        raise ValueError("an operation lacks a part")
    return Recorded(_requested(first), first.principal, tuple(entries))


def asked_for(first: Entry) -> Operation:
    """The operation as it was requested, of its part 0.

    Raises:
        LedgerCorrupt: It is not one.
    """
    try:
        return _requested(first)
    except ValueError as error:
        budget = first.budget_id.hex()
        raise LedgerCorrupt(
            f"the request of entry {first.seq} of {budget} is unreadable"
        ) from error


def _requested(first: Entry) -> Operation:
    if first.request is None:
        raise ValueError("part 0 has no request")
    return decode_request(
        kind=first.kind,
        root_id=first.root_id,
        budget_id=first.budget_id,
        operation_id=first.operation_id,
        trace_id=first.trace_id,
        consumed=first.consumed,
        request=first.request,
    )


def to_consumption(
    operation_id: bytes, kind: int, at: int, principal: str, part: int, request: bytes | None
) -> Consumption:
    """Who consumed a token.

    Raises:
        LedgerCorrupt: What was asked is unreadable.
    """
    consumed_by = _KIND[kind]
    try:
        # Only part 0 says what was asked.
        shown = (
            request is not None and request_fields(consumed_by, request)["authority"] == BY_TOKEN
        )
    except ValueError as error:
        raise LedgerCorrupt(f"the request of {operation_id.hex()} is unreadable") from error
    return Consumption(operation_id, consumed_by, at, principal, part, shown)
