"""The open ledger: its lanes' writers, and everything that is read outside of them.

Reads are short transactions of their own; each sees whole operations only. Lists are paged by key:
`after` is the `next` of the page before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Generic, NamedTuple, Self, TypeVar

from peculium_server.core.state import Budget, Entry, Hold
from peculium_server.store.lane import LaneWriter

Row = TypeVar("Row")
Key = TypeVar("Key")


class Found(NamedTuple):
    """Where a path leads."""

    root_id: bytes
    budget_id: bytes


class Standing(NamedTuple):
    """Where a lane stands, and when that was."""

    now: int
    """The database's clock. Microseconds since the Unix epoch."""
    position: int
    """Operations committed in the lane."""


class Page(NamedTuple, Generic[Row, Key]):
    """Some rows of a list, and the key to ask for more with; None at the end."""

    rows: tuple[Row, ...]
    next: Key | None


class Snapshot:
    """The ledger at one instant, however long it is read."""

    now: int
    """The database's clock when the snapshot was taken."""

    def roots(self) -> AsyncIterator[bytes]:
        """The ids of all roots that any entry, budget or hold belongs to."""
        raise NotImplementedError

    def entries_in_order(self, root_id: bytes) -> AsyncIterator[Entry]:
        """All entries of a tree by position and part."""
        raise NotImplementedError

    def budgets_of(self, root_id: bytes) -> AsyncIterator[Budget]:
        """All budgets of a tree by id."""
        raise NotImplementedError

    def holds_of(self, root_id: bytes) -> AsyncIterator[Hold]:
        """All holds of a tree by id, ended ones included."""
        raise NotImplementedError


class Store:
    """An open ledger."""

    incarnation: bytes
    """16 bytes, made with the ledger: a restored copy keeps them, another ledger has others."""
    lanes: int

    @classmethod
    async def open(
        cls, dsn: str, *, pool_size: int = 4, unsafe_settings_allowed: bool = False
    ) -> Self:
        """Connect to a ledger, and make sure that it can be relied upon.

        Raises:
            StoreUnavailable: No connection to a primary.
            SchemaOutdated: It is not at this version's schema.
            SettingsUnsafe: It could lose what it has committed.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Close all connections, those of the writers too."""
        raise NotImplementedError

    def lane_of(self, root_id: bytes) -> int:
        """The lane that a root's operations are committed in."""
        raise NotImplementedError

    def writer(self, lane: int) -> LaneWriter:
        """The writer of a lane; the same one each time."""
        raise NotImplementedError

    async def standing(self, lane: int) -> Standing:
        """The clock, and the position that the lane has by now; also tells whether there is an answer."""
        raise NotImplementedError

    async def find(self, path: str) -> Found | None:
        """The budget that a path of names, separated by slashes, leads to."""
        raise NotImplementedError

    async def budget(self, root_id: bytes, budget_id: bytes) -> tuple[Budget, ...]:
        """A budget and its ancestors, upwards; empty if there is none."""
        raise NotImplementedError

    async def list_roots(self, *, limit: int, after: str | None = None) -> Page[Budget, str]:
        """Roots by name."""
        raise NotImplementedError

    async def list_children(
        self, root_id: bytes, budget_id: bytes, *, limit: int, after: str | None = None
    ) -> Page[Budget, str]:
        """A budget's direct children by name, closed ones included."""
        raise NotImplementedError

    async def list_subtree(
        self, root_id: bytes, budget_id: bytes, *, limit: int, after: bytes | None = None
    ) -> Page[Budget, bytes]:
        """Everything below a budget, at any depth, by id; closed budgets included."""
        raise NotImplementedError

    async def list_holds(
        self,
        root_id: bytes,
        budget_id: bytes,
        *,
        ended: bool = False,
        limit: int,
        after: bytes | None = None,
    ) -> Page[Hold, bytes]:
        """A budget's holds by id: those that can still be settled, or with `ended` all."""
        raise NotImplementedError

    async def list_entries(
        self,
        root_id: bytes,
        budget_id: bytes,
        *,
        limit: int,
        after: int | None = None,
        descending: bool = False,
    ) -> Page[Entry, int]:
        """A budget's entries by seq."""
        raise NotImplementedError

    async def list_tree_entries(
        self, root_id: bytes, *, limit: int, after: int | None = None, descending: bool = False
    ) -> Page[Entry, int]:
        """A tree's entries by position; a page has at most `limit` operations, each of them whole."""
        raise NotImplementedError

    def snapshot(self) -> AbstractAsyncContextManager[Snapshot]:
        """The ledger at one instant, for verification."""
        raise NotImplementedError
