"""What the rules of an export are written with."""

from __future__ import annotations

from typing import NamedTuple

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


class Step(NamedTuple):
    """One entry of an operation, with all that it is judged by."""

    entry: Entry
    effect: Effect
    budget: Folded
    versions: tuple[int, ...]
    """Of its ancestors before the operation, the parent's first."""
