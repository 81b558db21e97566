"""What the entries of a budget add up to, while they are read."""

from __future__ import annotations

from array import array

from peculium_server.core.merkle import HASH_BYTES
from peculium_server.core.operations import Labels
from peculium_server.core.state import (
    GENESIS,
    Balances,
    Budget,
    Custody,
    Effect,
    Entry,
    new,
)

NOTHING = Balances()


class Folded:
    """A budget as its entries so far have left it. Changed in place: there are millions of entries."""

    __slots__ = (
        "budget_id",
        "created_at",
        "custody",
        "effect",
        "hashes",
        "head",
        "holder",
        "labels",
        "last_at",
        "line",
        "money",
        "name",
        "overrun_factor",
        "positions",
        "sealed",
        "seen",
        "seq",
        "token",
        "unit",
    )

    def __init__(
        self,
        budget_id: bytes,
        parent: Folded | None,
        *,
        name: str,
        unit: str,
        holder: str | None,
        token: bytes | None,
        overrun_factor: int | None,
        labels: Labels,
        created_at: int,
    ) -> None:
        self.budget_id = budget_id
        self.line: tuple[Folded, ...] = () if parent is None else (parent, *parent.line)
        """Its ancestors, the parent first."""
        self.name = name
        self.unit = unit
        self.holder = holder
        self.token = token
        self.custody = Custody.PRINCIPAL if token is None else Custody.TOKEN
        self.overrun_factor = overrun_factor
        self.labels = labels
        self.created_at = created_at
        self.money = NOTHING
        self.effect: Effect | None = None
        """Of its last entry; None before the first one."""
        self.seq = 0
        self.last_at = 0
        self.head = GENESIS
        self.hashes = bytearray()
        """Of all its entries, one after the other: a checkpoint seals any of them."""
        self.positions = array("q")
        """Of all its entries, in their lane."""
        self.sealed = 0
        """The seq of its last entry that a checkpoint has sealed."""
        self.seen: set[bytes] = set() if token is None else {token}
        """Every token id that it or one of its holds ever had."""

    def take(self, entry: Entry, effect: Effect) -> None:
        """Go on to the state after an entry."""
        self.money = entry.money
        self.effect = effect
        self.seq = entry.seq
        self.last_at = entry.at
        self.head = entry.hash
        self.hashes += entry.hash
        self.positions.append(entry.position)

    def hash_at(self, seq: int) -> bytes | None:
        """The hash of an entry; None if there is no such entry."""
        if not 1 <= seq <= self.seq:
            return None
        return bytes(self.hashes[(seq - 1) * HASH_BYTES : seq * HASH_BYTES])

    def versions(self) -> tuple[int, ...]:
        """The versions of its ancestors, the parent's first."""
        return tuple([0 if above.effect is None else above.effect.version for above in self.line])

    def row(self, root_id: bytes) -> Budget:
        """The row that the ledger has to have of it."""
        effect = self.effect
        assert effect is not None, "it was made by an entry of its own"
        return new(
            Budget,
            (
                root_id,
                self.budget_id,
                tuple([above.budget_id for above in self.line]),
                self.name,
                self.unit,
                self.custody,
                self.holder,
                self.token,
                self.overrun_factor,
                self.labels,
                self.created_at,
                self.money,
                *effect[1:9],
                self.seq,
                self.last_at,
                self.head,
            ),
        )


def gate_changed(
    before: Effect, money_before: Balances, after: Effect, money_after: Balances
) -> bool:
    """Say whether anything of a budget changed that a decision below may read: its version counts that."""
    return (
        before.closed is not after.closed
        or (before.frozen or before.disputes > 0) is not (after.frozen or after.disputes > 0)
        or before.lease_until != after.lease_until
        or (money_before.overrun > 0) is not (money_after.overrun > 0)
    )
