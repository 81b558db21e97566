"""That everything lies where it is looked for.

Entries and rows can all be true and still not be found: by a name that leads elsewhere, in another lane, on
no list. Entries tell of none of this, and it follows from them all the same:

- "lane": what belongs to a tree lies in the lane that its root's id gives
- "position": the operations of a lane are numbered from 1 without a gap, up to where the lane stands
- "name": a root is found by its name, and by no other
- "fold": the parent of a budget's row is the first of its ancestors
- "collection": what is available below a closed budget is on the list of what is to be collected
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from peculium_server.core.refusals import id_text
from peculium_server.core.state import Budget, Entry
from peculium_server.core.verify import Finding


class Named(NamedTuple):
    """A name by which a root is found."""

    name: str
    lane: int
    root_id: bytes


class Lying(NamedTuple):
    """Where some rows of a tree are."""

    table: str
    lane: int
    root_id: bytes


class Placement:
    """Checks where one tree lies. Feed `budget` with every row, then ask `finish`."""

    def __init__(
        self,
        root_id: bytes,
        lane: int,
        *,
        names: Collection[Named],
        lying: Iterable[Lying],
        misplaced: Collection[bytes],
        collected: Collection[bytes],
    ) -> None:
        """Begin with what was found beside the rows.

        Args:
            root_id: The tree.
            lane: Where it belongs.
            names: By which it is found.
            lying: Where rows of it are.
            misplaced: Its budgets whose parent is not the first of their ancestors.
            collected: Its budgets on the list of what is to be collected.
        """
        self._root_id = root_id
        self._lane = lane
        self._names = names
        self._astray = [each for each in lying if each.lane != lane]
        self._misplaced = misplaced
        self._collected = collected
        self._root: Budget | None = None
        self._closed: set[bytes] = set()
        self._available: list[tuple[bytes, tuple[bytes, ...]]] = []

    def budget(self, row: Budget) -> None:
        """Take the row of a budget."""
        if row.budget_id == self._root_id:
            self._root = row
        if row.closed:
            self._closed.add(row.budget_id)
        if row.money.available:
            self._available.append((row.budget_id, row.ancestors))

    def finish(self) -> Finding | None:
        """The first finding, or None: everything lies where it belongs."""
        for table, lane, _ in self._astray:
            detail = f"{table} of the tree lie in lane {lane}, which is not its own"
            return self._found(b"", "lane", detail)
        for budget_id in self._misplaced:
            return self._found(budget_id, "fold", "the row differs in parent_id")
        problem = self._wrong_name()
        if problem is not None:
            return self._found(self._root_id, "name", problem)
        for budget_id, ancestors in self._available:
            if not self._closed.isdisjoint(ancestors) and not any(
                above in self._collected for above in ancestors
            ):
                detail = (
                    "what is available in it, below a closed budget, is on no list to be collected"
                )
                return self._found(budget_id, "collection", detail)
        return None

    def _wrong_name(self) -> str | None:
        """What is wrong with the names by which the tree is found. Without a root's row, others tell."""
        if self._root is None:
            return None
        if not self._names:
            return f"the root is not found by its name, {self._root.name!r}"
        for name, lane, _ in self._names:
            if name != self._root.name:
                return f"the root {self._root.name!r} is found by the name {name!r}"
            if lane != self._lane:
                return f"by its name the root is in lane {lane}, and not in {self._lane}"
        return None

    def _found(self, budget_id: bytes, rule: str, detail: str) -> Finding:
        return Finding(self._root_id, budget_id, 0, rule, detail)


def nameless(names: Iterable[Named], trees: Collection[bytes]) -> list[Finding]:
    """A finding for each name that leads to no tree."""
    return [
        Finding(root_id, b"", 0, "name", f"the name {name!r} leads to no tree")
        for name, _, root_id in names
        if root_id not in trees
    ]


class Positions:
    """Checks that lanes lack no operation and have none twice. Takes a bit for each operation."""

    def __init__(self, standing: Mapping[int, int], lanes: int) -> None:
        """Begin before the first entry.

        Args:
            standing: Where each lane stands.
            lanes: How many the ledger has.
        """
        self._findings = {
            lane: Finding(b"", b"", 0, "position", f"lane {lane} does not say where it stands")
            for lane in range(lanes)
            if lane not in standing
        }
        self._standing = standing
        self._seen = {lane: bytearray(last // 8 + 1) for lane, last in standing.items()}
        self._count = dict.fromkeys(standing, 0)

    def entry(self, lane: int, entry: Entry) -> None:
        """Take an entry of a lane, in any order."""
        if entry.part or lane in self._findings:
            return
        position = entry.position
        seen, last = self._seen[lane], self._standing[lane]
        if not 0 < position <= last:
            self._found(lane, entry, f"lane {lane} ends at {last}, before position {position}")
        elif seen[position >> 3] >> (position & 7) & 1:
            operation = id_text(entry.operation_id)
            self._found(lane, entry, f"operation {operation} is not alone at position {position}")
        else:
            seen[position >> 3] |= 1 << (position & 7)
            self._count[lane] += 1

    def finish(self) -> list[Finding]:
        """The first finding of each lane; none: no operation is missing, and none too many."""
        for lane, last in self._standing.items():
            if lane not in self._findings and self._count[lane] != last:
                seen = self._seen[lane]
                missing = next(at for at in range(1, last + 1) if not seen[at >> 3] >> (at & 7) & 1)
                detail = f"lane {lane} stands at {last}, and lacks the operation at {missing}"
                self._findings[lane] = Finding(b"", b"", 0, "position", detail)
        return [finding for _, finding in sorted(self._findings.items())]

    def _found(self, lane: int, entry: Entry, detail: str) -> None:
        self._findings[lane] = Finding(
            entry.root_id, entry.budget_id, entry.seq, "position", detail
        )
