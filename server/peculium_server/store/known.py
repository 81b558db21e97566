"""What a writer knows of its lane without asking: the rows that it has last seen or written.

Every transaction that changes anything in a lane raises the lane's position. As long as that is where
the writer has left it, nothing has changed, and rows that it remembers are as good as loaded ones. Each
transaction reads the position, so a guess that was wrong is noticed before anything is decided.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from peculium_server.core.state import Accepted, Budget, Hold

Key = tuple[bytes, bytes]
"""A root's id, and the id of something in its tree."""

Value = TypeVar("Value")


class Known:
    """The memory of one lane, for the time of one connection."""

    BUDGETS_MAX: Final = 8_192
    """A budget takes about a kilobyte. Of 16 lanes that are all full: some 130 MB."""
    HOLDS_MAX: Final = 8_192
    """A hold takes about half a kilobyte."""
    ANCESTORS_MAX: Final = 16_384
    """A few megabytes."""

    ALONE_AFTER: Final = 8
    """So many transactions in a row have found the lane as the last one had left it, and needed nothing
    but what could be guessed: nobody else is writing to it, or hardly ever."""

    def __init__(self) -> None:
        self.budgets: dict[Key, Budget] = {}
        self.holds: dict[Key, Hold] = {}
        """Those that can still be settled. They exist."""
        self._ancestors: dict[Key, tuple[bytes, ...]] = {}
        self.position: int | None = None
        """Of the lane, at which what is remembered is true."""
        self._undisturbed = 0

    @property
    def alone(self) -> bool:
        """Say whether nobody else seems to write to the lane."""
        return self._undisturbed >= self.ALONE_AFTER

    def ancestors(self, key: Key) -> tuple[bytes, ...]:
        """A budget's ancestors as far as they are known: they never change."""
        return self._ancestors.get(key, ())

    def check(self, position: int) -> None:
        """Compare what is remembered with the lane's position, and forget it if the lane has changed."""
        if position != self.position:
            self.disturbed()

    def disturbed(self) -> None:
        """Forget everything that somebody may have changed."""
        self.budgets.clear()
        self.holds.clear()
        self.position = None
        self._undisturbed = 0

    def guessed_in_vain(self) -> None:
        """Load everything for a while: what is refused, or recorded before, rarely comes alone."""
        self._undisturbed = 0

    def saw(self, budgets: Iterable[Budget]) -> None:
        """Remember the ancestors of budgets that were loaded."""
        for budget in budgets:
            if budget.ancestors:
                self._ancestors[budget.root_id, budget.budget_id] = budget.ancestors
        _make_room(self._ancestors, self.ANCESTORS_MAX)

    def learn(
        self,
        position: int,
        budgets: Iterable[Budget],
        holds: Iterable[tuple[bytes, Hold]],
        accepted: Iterable[Accepted],
    ) -> None:
        """Remember what a transaction has loaded, and then what it has written.

        Args:
            position: The lane's, after the transaction.
            budgets: As loaded.
            holds: As loaded, each with the root that it is of.
            accepted: What was written, in order.
        """
        self._undisturbed = 0 if self.position is None else self._undisturbed + 1
        self.position = position
        for budget in budgets:
            self.budgets[budget.root_id, budget.budget_id] = budget
        for root_id, hold in holds:
            self._put(root_id, hold)
        for one in accepted:
            for budget in one.budgets:
                self.budgets[budget.root_id, budget.budget_id] = budget
            for hold in one.holds:
                self._put(one.operation.root_id, hold)
        _make_room(self.budgets, self.BUDGETS_MAX)
        _make_room(self.holds, self.HOLDS_MAX)

    def _put(self, root_id: bytes, hold: Hold) -> None:
        if hold.settleable:
            self.holds[root_id, hold.hold_id] = hold
        else:
            self.holds.pop((root_id, hold.hold_id), None)


def _make_room(rows: dict[Key, Value], most: int) -> None:
    """Forget those that were learnt first."""
    while len(rows) > most:
        del rows[next(iter(rows))]
