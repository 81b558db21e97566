"""Loading: from footprints to the trees that decisions look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peculium_server.core.footprint import Footprint
from peculium_server.core.state import Accepted, Budget, Entry, Hold, Tree
from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.known import Key, Known
from peculium_server.store.rows import to_consumption, to_recorded
from peculium_server.store.statements import LaneStatements
from peculium_server.store.wire import Result, Statement, Step


class Loading:
    """One transaction's loading: what to ask the database, and the trees made of its answers."""

    def __init__(
        self,
        footprints: Mapping[bytes, Footprint],
        statements: LaneStatements,
        known: Known,
        *,
        frozen: bool,
    ) -> None:
        """Prepare to load.

        Args:
            footprints: By root id.
            statements: Of the lane.
            known: What the writer remembers of the lane; it learns from what is loaded.
            frozen: The whole ledger is, until an operator has said that it may go on.
        """
        self.trees = {root_id: Tree(root_id) for root_id in footprints}
        for tree in self.trees.values():
            tree.restored = frozen
        self.holds: set[Key] = set()
        """Those that exist."""
        self.position = 0
        self.now = 0
        self._footprints = footprints
        self._statements = statements
        self._known = known
        self._takers: list[Callable[[Result], None]] = []
        self._steps: list[Step] = []
        self._totals: dict[Key, int] = {}
        self._below: set[Key] = set()
        self._budgets_loaded: list[Budget] = []
        self._holds_loaded: list[tuple[bytes, Hold]] = []

    def first(self) -> list[Step]:
        """What to ask first: all that the footprints name, last the clock."""
        for root_id, footprint in self._footprints.items():
            self._expect_nothing(self.trees[root_id], footprint)
        budgets = self._keys("budgets") | self._keys("subtrees")
        holds, operations = self._keys("holds"), self._keys("operations")
        tokens = {(root_id, *token) for root_id, token in self._keys("tokens")}
        of_budget = ("root_id", "budget_id")
        ask, statements = self._ask, self._statements
        self._ask_budgets(budgets)
        ask(statements.load_holds, holds, ("root_id", "hold_id"), self._take_holds)
        ask(statements.load_tokens, tokens, (*of_budget, "token"), self._take_tokens)
        ask(statements.load_recorded, operations, ("root_id", "operation_id"), self._take_recorded)
        self._ask_names()
        holders = self._keys("open_holds")
        ask(statements.load_open_holds, holders, of_budget, self._take_open_holds)
        ask(statements.load_below, self._keys("subtrees"), of_budget, self._take_below)
        return self._flight()

    def second(self) -> list[Step]:
        """What to ask once the first answers are taken; mostly nothing."""
        missing = set(self._below)
        for root_id, tree in self.trees.items():
            for budget in tree.budgets.values():
                if budget is not None:
                    missing.update((root_id, ancestor) for ancestor in budget.ancestors)
        missing = {
            (root, budget) for root, budget in missing if budget not in self.trees[root].budgets
        }
        if missing:
            self._ask_budgets(missing)
        tops = self._keys("subtrees")
        if tops:
            self._ask_open_children(tops, missing)
        return self._flight() if self._steps else []

    def take(self, results: list[Result]) -> None:
        """Take over the answers to `first` or `second`.

        Raises:
            LedgerCorrupt: They contradict each other.
        """
        takers, self._takers = self._takers, []
        for take, result in zip(takers, results, strict=True):
            take(result)

    def finish(self) -> None:
        """Make sure that the trees are whole.

        Raises:
            LedgerCorrupt: They are not.
        """
        for root_id, tree in self.trees.items():
            for budget in tree.budgets.values():
                if budget is not None and any(
                    tree.budgets.get(ancestor) is None for ancestor in budget.ancestors
                ):
                    raise LedgerCorrupt(
                        f"an ancestor of budget {budget.budget_id.hex()} is missing"
                    )
            for top in self._footprints[root_id].subtrees:
                known = sum(
                    budget.money.available
                    for budget in tree.budgets.values()
                    if budget is not None and top in budget.ancestors
                )
                tree.pending[top] = self._totals.get((root_id, top), 0) - known

    def learn(self, position: int, accepted: Iterable[Accepted]) -> None:
        """Let the writer remember what was loaded, and what was then written.

        Args:
            position: The lane's, after the transaction.
            accepted: What was written in the lane, in order.
        """
        self._known.learn(position, self._budgets_loaded, self._holds_loaded, accepted)

    # -- Asking -------------------------------------------------------------------------------------

    def _expect_nothing(self, tree: Tree, footprint: Footprint) -> None:
        """Every key that is named has an answer, also where the ledger has no row."""
        tree.budgets.update(dict.fromkeys(footprint.budgets | footprint.subtrees))
        tree.holds.update(dict.fromkeys(footprint.holds))
        tree.consumed.update(dict.fromkeys(footprint.tokens))
        tree.hold_tokens.update(dict.fromkeys(footprint.tokens))
        tree.recorded.update(dict.fromkeys(footprint.operations))
        tree.names.update(dict.fromkeys(footprint.names))
        tree.open_child.update(dict.fromkeys(footprint.subtrees))
        tree.open_holds.update(dict.fromkeys(footprint.open_holds, ()))

    def _keys(self, attribute: str) -> set[tuple[bytes, Any]]:
        return {
            (root_id, key)
            for root_id, footprint in self._footprints.items()
            for key in getattr(footprint, attribute)
        }

    def _ask(
        self,
        statement: Statement,
        keys: set[Any],
        columns: tuple[str, ...],
        take: Callable[[Result], None],
    ) -> None:
        if keys:
            arrays = zip(*sorted(keys), strict=True)
            self._add(Step(statement, dict(zip(columns, arrays, strict=True))), take)

    def _ask_budgets(self, keys: set[Key]) -> None:
        above: set[Key] = set()
        for key in keys:
            budgets = self.trees[key[0]].budgets
            for ancestor in self._known.ancestors(key):
                if budgets.setdefault(ancestor, None) is None:
                    above.add((key[0], ancestor))
        columns = ("root_id", "budget_id")
        self._ask(self._statements.load_budgets, keys | above, columns, self._take_budgets)

    def _ask_names(self) -> None:
        names = [
            (root_id, *name)
            for root_id, footprint in self._footprints.items()
            for name in footprint.names
        ]
        siblings = {key for key in names if key[1] is not None}
        columns = ("root_id", "parent_id", "name")
        self._ask(self._statements.load_names, siblings, columns, self._take_names)
        roots = {(name,) for _, parent, name in names if parent is None}
        self._ask(self._statements.load_roots, roots, ("name",), self._take_roots)

    def _ask_open_children(self, tops: set[Key], missing: set[Key]) -> None:
        known = missing | {
            (root_id, budget_id)
            for root_id, tree in self.trees.items()
            for budget_id in tree.budgets
        }
        root_ids, parent_ids = zip(*sorted(tops), strict=True)
        known_root_ids, known_budget_ids = zip(*known, strict=True)
        values = {
            "root_id": root_ids,
            "parent_id": parent_ids,
            "known_root_id": known_root_ids,
            "known_budget_id": known_budget_ids,
        }
        self._add(Step(self._statements.load_open_children, values), self._take_open_children)

    def _add(self, step: Step, take: Callable[[Result], None]) -> None:
        self._steps.append(step)
        self._takers.append(take)

    def _flight(self) -> list[Step]:
        self._add(Step(self._statements.load_position), self._take_position)
        steps, self._steps = self._steps, []
        return steps

    # -- Taking -------------------------------------------------------------------------------------

    def _take_budgets(self, budgets: list[Budget]) -> None:
        for budget in budgets:
            self.trees[budget.root_id].budgets[budget.budget_id] = budget
        self._budgets_loaded += budgets
        self._known.saw(budgets)

    def _take_holds(self, holds: list[tuple[bytes, Hold]]) -> None:
        for root_id, hold in holds:
            self.trees[root_id].holds[hold.hold_id] = hold
            self.holds.add((root_id, hold.hold_id))
        self._holds_loaded += holds

    def _take_open_holds(self, holds: list[tuple[bytes, Hold]]) -> None:
        for root_id, hold in holds:
            self.trees[root_id].open_holds[hold.budget_id] += (hold,)
            self.holds.add((root_id, hold.hold_id))

    def _take_tokens(self, rows: list[tuple[Any, ...]]) -> None:
        for root_id, budget_id, token, hold_id, operation_id, *consumption in rows:
            tree = self.trees[root_id]
            tree.hold_tokens[budget_id, token] = hold_id
            if operation_id is not None:
                tree.consumed[budget_id, token] = to_consumption(operation_id, *consumption)

    def _take_recorded(self, entries: list[Entry]) -> None:
        operations: dict[Key, list[Entry]] = {}
        for entry in entries:
            operations.setdefault((entry.root_id, entry.operation_id), []).append(entry)
        for (root_id, operation_id), parts in operations.items():
            try:
                self.trees[root_id].recorded[operation_id] = to_recorded(parts)
            except ValueError as error:
                raise LedgerCorrupt(f"operation {operation_id.hex()}: {error}") from error

    def _take_names(self, rows: list[tuple[bytes, bytes, str, bytes]]) -> None:
        for root_id, parent_id, name, budget_id in rows:
            self.trees[root_id].names[parent_id, name] = budget_id

    def _take_roots(self, rows: list[tuple[str, bytes]]) -> None:
        taken = dict(rows)
        for tree in self.trees.values():
            for parent_id, name in tree.names:
                if parent_id is None:
                    tree.names[None, name] = taken.get(name)

    def _take_below(self, rows: list[tuple[bytes, bytes, bytes, list[bytes], Any]]) -> None:
        for root_id, top, budget_id, ancestors, total in rows:
            self._totals[root_id, top] = int(total)
            self._below.update((root_id, needed) for needed in (budget_id, *ancestors))

    def _take_open_children(self, rows: list[tuple[bytes, bytes, bytes]]) -> None:
        for root_id, parent_id, budget_id in rows:
            self.trees[root_id].open_child[parent_id] = budget_id

    def _take_position(self, rows: list[tuple[int, int]]) -> None:
        if not rows:
            raise LedgerCorrupt("a lane has no position")
        ((self.position, self.now),) = rows
        self._known.check(self.position)
