"""What somebody could do to the journal and the rows who can write to the database."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeVar

from peculium_server.core.encoding import digest_of_parts, entry_hash
from peculium_server.core.state import GENESIS, Balances, Budget, Entry, Hold
from peculium_server.core.verify import Finding
from tests.core.ledger import Ledger, verify

_T = TypeVar("_T", Entry, Budget, Hold)

ENTRY_COLUMNS = tuple(name for name in Entry._fields if name != "effect")
"""The effect itself is not recorded; `effect_bytes` is."""

ABSENT: dict[str, Any] = {
    "trace_id": bytes(16),
    "consumed": bytes(32),
    "request": b"\xa0",
    "token": bytes(32),
    "holder": "somebody",
    "overrun_factor": 1,
    "lease_until": 1,
    "lease_latest": 1,
}
"""What to write where nothing was."""


def altered(row: _T, column: str, at: int = 0) -> _T:
    """A row with another value in one column; of bytes, with one bit flipped in the byte `at`."""
    changes: dict[str, Any] = {column: _other(getattr(row, column), column, at)}
    return row._replace(**changes)


def _other(value: Any, column: str, at: int) -> Any:
    match value:
        case None:
            return ABSENT[column]
        case IntEnum():
            members = list(type(value))
            return members[(members.index(value) + 1) % len(members)]
        case int():
            return not value if isinstance(value, bool) else value + 1
        case str():
            return value + "x"
        case bytes():
            place = at % len(value)
            return value[:place] + bytes((value[place] ^ 1,)) + value[place + 1 :]
        case Balances():
            value = value._replace(granted=value.granted + 1, available=value.available + 1)
        case _:
            value = (*value, value[-1] if value else ("another", "label"))
    return value


def tampered(ledger: Ledger, root_id: bytes, seed: int) -> Finding | None:
    """What an auditor finds after one column of one entry, both chosen by a seed, was altered."""
    entries = [entry for entry in ledger.journal if entry.root_id == root_id]
    alter_one(entries, ENTRY_COLUMNS, seed)
    tree = ledger.trees[root_id]
    return verify(entries, tree.known_budgets(), tree.known_holds(), root_id)


def tampered_rows(ledger: Ledger, root_id: bytes, seed: int) -> Finding | None:
    """What an auditor finds after one column of the row of a budget or a hold was altered."""
    tree = ledger.trees[root_id]
    budgets, holds = tree.known_budgets(), tree.known_holds()
    if holds and seed % 2:
        alter_one(holds, Hold._fields, seed)
    else:
        alter_one(budgets, Budget._fields, seed)
    entries = [entry for entry in ledger.journal if entry.root_id == root_id]
    return verify(entries, budgets, holds, root_id)


def alter_one(rows: list[_T], columns: Sequence[str], seed: int) -> None:
    """Alter one column of one row, both chosen by a seed."""
    where = _chosen(seed, len(rows))
    column = columns[_chosen(seed + 1, len(columns))]
    rows[where] = altered(rows[where], column, at=_chosen(seed + 2, 64))


def _chosen(seed: int, bound: int) -> int:
    """One of so many, spread by a multiplicative hash."""
    return (seed * 2_654_435_761 >> 7) % bound


def rehashed(entries: Sequence[Entry]) -> list[Entry]:
    """The journal with all digests and hashes computed anew: whoever does this knows the encoding."""
    operations: dict[bytes, list[Entry]] = {}
    for entry in entries:
        operations.setdefault(entry.operation_id, []).append(entry)
    heads: dict[bytes, bytes] = {}
    forged = []
    for parts in operations.values():
        digest = digest_of_parts(parts)
        for part in parts:
            head = heads.get(part.budget_id, GENESIS)
            chained = entry_hash(head, digest, part.part)
            heads[part.budget_id] = chained
            forged.append(part._replace(digest=digest, previous_hash=head, hash=chained))
    return forged
