"""What the entries of a budget add up to, while they are read."""

from __future__ import annotations

from array import array
from operator import attrgetter

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
_VERSION = attrgetter("version")


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
        "version",
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
        self.version = 0
        """Of that effect."""
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
        self.version = effect.version
        self.seq = entry.seq
        self.last_at = entry.at
        self.head = head = entry.hash
        self.hashes += head
        self.positions.append(entry.position)

    def hash_at(self, seq: int) -> bytes | None:
        """The hash of an entry; None if there is no such entry."""
        if not 1 <= seq <= self.seq:
            return None
        return bytes(self.hashes[(seq - 1) * HASH_BYTES : seq * HASH_BYTES])

    def versions(self) -> tuple[int, ...]:
        """The versions of its ancestors, the parent's first."""
        return tuple(map(_VERSION, self.line))

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
    overrun_changed = (money_before.overrun > 0) is not (money_after.overrun > 0)
    disputes, disputes_after = before[2], after[2]
    flags, flags_after = before[4:7], after[4:7]
    if flags == flags_after and disputes == disputes_after:
        # As after nearly every entry.
        return overrun_changed
    closed, frozen, lease_until = flags
    closed_after, frozen_after, lease_until_after = flags_after
    return (
        overrun_changed
        or closed is not closed_after
        or (frozen or disputes > 0) is not (frozen_after or disputes_after > 0)
        or lease_until != lease_until_after
    )
