"""What the rules of an export are written with."""

from __future__ import annotations

from peculium_server.core.offline.fold import Folded
from peculium_server.core.state import Effect, Entry


class Broken(Exception):
    """An operation breaks a rule."""

    def __init__(self, rule: str, detail: str, part: int = 0) -> None:
        super().__init__(detail)
        self.rule = rule
        self.detail = detail
        self.part = part
        """Where in the list of its entries."""


class Step:
    """One entry of an operation, with all that it is judged by."""

    __slots__ = ("before", "budget", "changes", "effect", "entry", "versions")

    def __init__(self, entry: Entry, effect: Effect, budget: Folded) -> None:
        self.entry = entry
        self.effect = effect
        self.changes = effect.changes
        self.budget = budget
        self.before: Effect | None = None
        """Of the entry before of its budget, which may be of the operation too; None: there is none."""
        self.versions = budget.versions()
        """Of its ancestors before the operation, the parent's first."""
