"""Guessing: what a transaction would load, taken from what its writer remembers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from hmac import compare_digest
from typing import Final

from peculium_server.core.footprint import Footprint
from peculium_server.core.state import Tree
from peculium_server.store.known import Key, Known


class Guess:
    """The trees that a lane's footprints name, as the writer remembers them.

    What an operation is to make, and the operation itself, are taken for new. The unique indexes refuse
    what is not new, but only to what is saved: nothing may be decided so but what is accepted.
    """

    def __init__(self) -> None:
        self.trees: dict[bytes, Tree] = {}
        self.holds: set[Key] = set()
        """Those that exist."""
        self.unseen: set[tuple[bytes, bytes, bytes]] = set()
        """Tokens, each with its root and budget, of which it is not known that nobody had them before."""

    @classmethod
    def of(cls, footprints: Mapping[bytes, Footprint], known: Known) -> Guess | None:
        """Guess everything; None if something that is named is neither remembered nor new."""
        guess = cls()
        for root_id, footprint in footprints.items():
            if footprint.names or footprint.subtrees or footprint.open_holds:
                return None
            tree = guess.trees[root_id] = Tree(root_id)
            if not (
                _guess_budgets(tree, footprint, known)
                and guess._guess_holds(tree, footprint, known)
            ):
                return None
            guess._guess_tokens(tree, footprint)
            tree.recorded.update(dict.fromkeys(footprint.operations))
        return guess

    def _guess_holds(self, tree: Tree, footprint: Footprint, known: Known) -> bool:
        root_id = tree.root_id
        for hold_id in footprint.holds:
            hold = tree.holds[hold_id] = known.holds.get((root_id, hold_id))
            if hold is not None:
                self.holds.add((root_id, hold_id))
            elif hold_id not in footprint.new_holds:
                return False
        return True

    def _guess_tokens(self, tree: Tree, footprint: Footprint) -> None:
        holds = {
            (hold.budget_id, hold.token): hold.hold_id
            for hold in tree.holds.values()
            if hold is not None
        }
        for key in footprint.tokens:
            tree.consumed[key] = None
            tree.hold_tokens[key] = holds.get(key)
            live = tree.budget(key[0]).token
            if key not in holds and (live is None or not compare_digest(live, key[1])):
                self.unseen.add((tree.root_id, *key))


def _guess_budgets(tree: Tree, footprint: Footprint, known: Known) -> bool:
    """Take the budgets that are named, with their ancestors; say whether all are remembered."""
    budgets, root_id = known.budgets, tree.root_id
    for budget_id in footprint.budgets:
        budget = budgets.get((root_id, budget_id))
        if budget is None:
            return False
        tree.budgets[budget_id] = budget
        for above in budget.ancestors:
            if above not in tree.budgets:
                ancestor = budgets.get((root_id, above))
                if ancestor is None:
                    return False
                tree.budgets[above] = ancestor
    return True


class GuessedClock:
    """What the database's clock has shown by now, without asking: a little behind it, never ahead.

    It is the last reading and the time that has passed since it arrived, and never goes back. The database
    makes sure, in each transaction that is decided so, that its clock has come that far, and not much
    farther.
    """

    READING_SECONDS_MAX: Final = 10.0
    """A reading is of use for so long."""

    BEHIND_US_MAX: Final = 5_000_000
    """How far a decision's time may lie back when it is saved. Microseconds."""

    _DRIFT: Final = 0.0005
    """How much faster than the database's this machine's clock may run: what the system corrects it by."""

    def __init__(self) -> None:
        self._reading: tuple[int, float] | None = None
        self._told = 0

    def read(self, now: int) -> None:
        """Take note of what the clock has just shown. Microseconds since the Unix epoch."""
        self._reading = now, time.monotonic()

    def forget(self) -> None:
        """Begin anew: the next connection may be to another machine."""
        self._reading = None
        self._told = 0

    def now(self) -> int | None:
        """Microseconds since the Unix epoch; None if there is no recent reading."""
        if self._reading is None:
            return None
        reading, at = self._reading
        passed = time.monotonic() - at
        if passed > self.READING_SECONDS_MAX:
            return None
        self._told = max(self._told, reading + int(passed * (1 - self._DRIFT) * 1_000_000))
        return self._told
