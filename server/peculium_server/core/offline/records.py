"""What an export consists of, record by record."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from peculium_server.core.checkpoint import Leaf, Sealed
from peculium_server.core.state import Budget, Entry, Hold


def digest_of(token: bytes | None) -> bytes | None:
    """How a row tells of a token's id, that may be live: told to nobody, and found by who has the entries."""
    return None if token is None else hashlib.sha256(token).digest()


class Header(NamedTuple):
    """What is exported."""

    encoding_version: int
    incarnation: bytes
    at: int
    """When it was read, by the database's clock. Microseconds since the Unix epoch."""
    positions: tuple[int, ...]
    """Each lane's position at that instant."""
    root_id: bytes | None
    """The only tree; None: the whole ledger."""
    earlier_incarnations: tuple[bytes, ...] = ()
    """Those that the ledger had before it was restored, the first one first."""


class Recorded(NamedTuple):
    """An entry, without its previous hash and with its effect in bytes only."""

    lane: int
    entry: Entry


class BudgetRow(NamedTuple):
    """A budget as the ledger has it."""

    budget: Budget
    """Without its token."""
    token_digest: bytes | None
    """See `digest_of`."""


class HoldRow(NamedTuple):
    """A hold as the ledger has it."""

    root_id: bytes
    hold: Hold
    """Without its token."""
    token_digest: bytes
    """See `digest_of`."""


class SealedBy(NamedTuple):
    """A checkpoint; its leaves follow."""

    sealed: Sealed
    public_key: bytes
    """As the ledger knows it."""


class LeafOf(NamedTuple):
    """A leaf of the checkpoint before."""

    checkpoint: int
    """Its number."""
    leaf: Leaf


class Counts(NamedTuple):
    """The end of an export: how much there was of everything."""

    entries: int = 0
    budgets: int = 0
    holds: int = 0
    checkpoints: int = 0


Record = Header | Recorded | BudgetRow | HoldRow | SealedBy | LeafOf | Counts
