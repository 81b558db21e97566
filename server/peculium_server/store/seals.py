"""Checkpoints in the store: what there is to seal, sealing it, and what was sealed.

Sealing is off the hot path. It looks at nothing but committed entries, which never change, by short
statements that lock nothing, and writes to tables that no operation touches.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg

from peculium_server.core.checkpoint import Leaf, Sealed
from peculium_server.core.state import Entry
from peculium_server.store import tail
from peculium_server.store.checkpoints import (
    STATEMENTS,
    Covered,
    Kept,
    checkpoint_values,
    leaf_values,
)
from peculium_server.store.connect import Readers
from peculium_server.store.errors import LedgerCorrupt, is_contention, translate
from peculium_server.store.reading import BEGIN, COMMIT, ROLLBACK, fetch_together, reading, stream
from peculium_server.store.wire import Connection, Step

_PORTION_ROWS: Final = 500
"""Rows that are written at once: other calls get their turn in between."""

NUMBER_MAX: Final = 2**63 - 1


class Unsealed(NamedTuple):
    """What was sealed, and what was not yet."""

    now: int
    """The database's clock. Microseconds since the Unix epoch."""
    last: Sealed | None
    """The last checkpoint."""
    positions: tuple[int, ...]
    """Where the lanes stand."""
    since: int | None
    """When the earliest operation was decided that is not sealed; None if all are."""

    @property
    def sealed(self) -> tuple[int, ...]:
        """Up to where the lanes are sealed."""
        return (0,) * len(self.positions) if self.last is None else self.last.checkpoint.positions

    @property
    def waiting(self) -> tuple[int, ...]:
        """How many operations of each lane are not sealed."""
        return tuple(
            max(0, now - then) for now, then in zip(self.positions, self.sealed, strict=True)
        )


async def unsealed(connection: Connection, lanes: int) -> Unsealed:
    """What there is to seal.

    Raises:
        psycopg.Error: The database does not say.
        LedgerCorrupt: What it says cannot be.
    """
    clock, last, positions = await fetch_together(
        connection,
        Step(STATEMENTS["sealing_clock"]),
        # First what was sealed: where the lanes stand afterwards is not before that.
        Step(STATEMENTS["last_checkpoint"]),
        Step(tail.STATEMENTS["positions"]),
    )
    found = Unsealed(
        clock[0], last[0].sealed if last else None, tail.to_positions(positions, lanes), None
    )
    if len(found.sealed) != lanes:
        raise LedgerCorrupt("the last checkpoint is of other lanes")
    behind = [
        Step(STATEMENTS["decided_at"], {"lane": lane, "after": at, "until": at + 1})
        for lane, (at, waiting) in enumerate(zip(found.sealed, found.waiting, strict=True))
        if waiting
    ]
    earliest = await fetch_together(connection, *behind) if behind else []
    return found._replace(since=min((at for each in earliest for at in each), default=None))


class Seals:
    """The checkpoints of an open ledger."""

    def __init__(self, readers: Readers, lanes: int) -> None:
        self._readers = readers
        self._lanes = lanes

    async def unsealed(self) -> Unsealed:
        """What there is to seal.

        Raises:
            StoreError: The database does not say.
        """
        async with reading(self._readers) as connection:
            return await unsealed(connection, self._lanes)

    async def covered(self, lane: int, *, after: int, until: int, limit: int) -> Covered:
        """How far the entries of a lane between two positions reach, if so many are looked at."""
        values = {"lane": lane, "after": after, "until": until, "limit": limit}
        async with reading(self._readers) as connection:
            found: list[Covered] = await connection.fetch(Step(STATEMENTS["covered"], values))
        return found[0]

    async def heads(self, lane: int, *, after: int, until: int) -> list[Leaf]:
        """Of each budget with an entry between two positions of a lane, the last one's."""
        leaves: list[Leaf] = await self._collect("heads", lane, after, until)
        return leaves

    async def add(
        self,
        after: Sealed | None,
        seal: Callable[[int], Sealed],
        public_key: bytes,
        leaves: Mapping[int, Sequence[Leaf]],
    ) -> Sealed | None:
        """Record a checkpoint, unless another one was recorded meanwhile.

        Args:
            after: The one that it follows.
            seal: Makes it, given the database's clock.
            public_key: That it is signed with.
            leaves: By lane.

        Returns:
            The checkpoint; None if another server was faster.

        Raises:
            StoreError: It was not recorded, or nobody knows.
        """
        try:
            async with self._readers.connection() as connection:
                _, clock, last = await fetch_together(
                    connection,
                    BEGIN,
                    Step(STATEMENTS["sealing_clock"]),
                    Step(STATEMENTS["last_checkpoint"]),
                )
                if (last[0].sealed if last else None) != after:
                    await fetch_together(connection, ROLLBACK)
                    return None
                sealed = seal(clock[0])
                for steps in _changes(sealed, public_key, leaves):
                    await fetch_together(connection, *steps)
                await fetch_together(connection, COMMIT)
                return sealed
        except psycopg.Error as error:
            if is_contention(error):
                return None
            raise translate(error) from error

    async def page(self, *, limit: int, after: int | None, descending: bool) -> list[Kept]:
        """Some checkpoints by number, from the one after another on."""
        if descending:
            name, edge = "list_checkpoints_descending", NUMBER_MAX
        else:
            name, edge = "list_checkpoints", 0
        values = {"after": edge if after is None else after, "limit": limit}
        async with reading(self._readers) as connection:
            return await connection.fetch(Step(STATEMENTS[name], values))

    async def first_over(
        self, lane: int, root_id: bytes, budget_id: bytes, seq: int
    ) -> tuple[int, Leaf] | None:
        """The first leaf that seals an entry, and the number of its checkpoint; None if none does."""
        values = {"lane": lane, "root_id": root_id, "budget_id": budget_id, "seq": seq}
        async with reading(self._readers) as connection:
            found = await connection.fetch(Step(STATEMENTS["first_leaf_over"], values))
        return found[0] if found else None

    async def sealed_seq(self, lane: int, root_id: bytes, budget_id: bytes) -> int:
        """The seq of a budget's last entry that is sealed; 0 if none is."""
        values = {"lane": lane, "root_id": root_id, "budget_id": budget_id}
        async with reading(self._readers) as connection:
            found = await connection.fetch(Step(STATEMENTS["last_leaf"], values))
        return found[0][1].seq if found else 0

    async def chain(
        self, lane: int, root_id: bytes, budget_id: bytes, *, after: int, limit: int
    ) -> list[Entry]:
        """Some entries of a budget by seq."""
        values = {
            "lane": lane,
            "root_id": root_id,
            "budget_id": budget_id,
            "after": after,
            "limit": limit,
        }
        async with reading(self._readers) as connection:
            return await connection.fetch(Step(STATEMENTS["chain"], values))

    async def operation(self, lane: int, root_id: bytes, operation_id: bytes) -> list[Entry]:
        """All parts of an operation. Their previous hashes are left empty."""
        values = {"lane": lane, "root_id": root_id, "operation_id": operation_id}
        async with reading(self._readers) as connection:
            return await connection.fetch(Step(STATEMENTS["operation"], values))

    async def leaves(self, number: int) -> list[Leaf]:
        """The leaves of a checkpoint, in order."""
        found = await self._collect("leaves", list(range(self._lanes)), number - 1, number)
        return [leaf for _, leaf in found]

    async def _collect(self, name: str, *values: Any) -> list[Any]:
        """The rows of a statement that may have many: other calls get their turn in between."""
        async with reading(self._readers) as connection:
            return [row async for row in stream(connection, STATEMENTS[name], *values)]


class SnapshotSeals:
    """The checkpoints of the ledger at one instant, for verification. One list at a time."""

    def __init__(self, connection: Connection, lanes: int) -> None:
        self._connection = connection
        self._lanes = lanes

    def checkpoints(self, *, after: int, limit: int) -> AsyncIterator[Kept]:
        """Checkpoints by number, from the one after another on."""
        return self._rows("list_checkpoints", after, limit)

    def public_keys(self) -> AsyncIterator[tuple[bytes, bytes]]:
        """All public keys that were ever signed with, each behind the id that it is found by."""
        return self._rows("public_keys")

    def leaves(self, *, after: int, until: int) -> AsyncIterator[tuple[int, Leaf]]:
        """The leaves of some checkpoints, each with its checkpoint's number, in order."""
        return self._rows("leaves", list(range(self._lanes)), after, until)

    def leaves_of(self, lane: int, root_id: bytes) -> AsyncIterator[tuple[int, Leaf]]:
        """The leaves of a tree, each with its checkpoint's number, in order."""
        return self._rows("leaves_of_tree", lane, UUID(bytes=root_id))

    def _rows(self, name: str, *values: Any) -> AsyncIterator[Any]:
        return stream(self._connection, STATEMENTS[name], *values)


def _changes(
    sealed: Sealed, public_key: bytes, leaves: Mapping[int, Sequence[Leaf]]
) -> Sequence[Sequence[Step]]:
    """What is written: first that of which there can be one, so that two servers meet at once."""
    key = {"key_id": sealed.key_id, "public_key": public_key}
    steps = [
        [
            Step(STATEMENTS["add_checkpoint"], checkpoint_values(sealed)),
            Step(STATEMENTS["add_key"], key),
        ]
    ]
    for lane, of_lane in sorted(leaves.items()):
        for start in range(0, len(of_lane), _PORTION_ROWS):
            portion = of_lane[start : start + _PORTION_ROWS]
            values = leaf_values(lane, sealed.checkpoint.number, portion)
            steps.append([Step(STATEMENTS["add_leaves"], values)])
    return steps
