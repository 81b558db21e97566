"""How much an operation costs the lane that it is committed in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from peculium_server.core.limits import DEPTH_MAX, EAGER_COLLECTIONS_MAX
from peculium_server.core.operations import (
    Collect,
    Delegate,
    Expire,
    Operation,
    Recover,
    Return,
    Revoke,
)

GROUP_ROWS_MAX: Final = 1_000
"""Entries that the operations of one request may write in one lane: they share a transaction."""


def rows(operations: Iterable[Operation]) -> int:
    """How many entries the operations may write, ancestors that lend or receive left aside."""
    return sum(map(rows_of, operations))


def rows_of(operation: Operation) -> int:
    """As `rows`, of one operation."""
    match operation:
        case Delegate():
            return 1 + len(operation.children)
        case Recover():
            return 1 + len(operation.holds)
        case Revoke() | Expire() | Return(amount=None, cascade=True):
            return 1 + EAGER_COLLECTIONS_MAX
        case Collect():
            # One for each closed level that the money passes: there are many of it at once.
            return DEPTH_MAX
        case _:
            return 1
