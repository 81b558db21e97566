"""Which rows an operation may look at, so that they are loaded before it is decided."""

from __future__ import annotations

from dataclasses import dataclass, field

from peculium_server.core.operations import (
    PRODUCING,
    ByToken,
    Delegate,
    Expire,
    Extend,
    Fund,
    Grant,
    Kind,
    Lapse,
    Operation,
    Recover,
    Release,
    Reserve,
    Resolve,
    Return,
    Revoke,
    Settle,
)


@dataclass(slots=True)
class Footprint:
    """Keys of one tree. What is absent from it must not be read."""

    budgets: set[bytes] = field(default_factory=set)
    """With all their ancestors, which need not be named."""
    holds: set[bytes] = field(default_factory=set)
    new_holds: set[bytes] = field(default_factory=set)
    """Those among `holds` that are to be made: mostly they do not exist."""
    operations: set[bytes] = field(default_factory=set)
    tokens: set[tuple[bytes, bytes]] = field(default_factory=set)
    """(budget, token id): was it consumed, does a hold have it?"""
    names: set[tuple[bytes | None, str]] = field(default_factory=set)
    """(parent, name): who has it?"""
    subtrees: set[bytes] = field(default_factory=set)
    """Budgets that may be closed: what is below them?"""
    open_holds: set[bytes] = field(default_factory=set)
    """Budgets whose live and lapsed holds are listed."""

    def add(self, operation: Operation) -> None:
        """Name everything that a decision on the operation may look at."""
        budget_id = operation.budget_id
        self.budgets.add(budget_id)
        self.operations.add(operation.operation_id)
        if isinstance(operation.authority, ByToken):
            self.tokens.add((budget_id, operation.authority.token_id))
        for name in PRODUCING[operation.kind]:
            self._produces(budget_id, getattr(operation, name))
        if isinstance(operation, _ON_HOLDS):
            self.holds.add(operation.hold_id)
            if operation.kind is Kind.RESERVE:
                self.new_holds.add(operation.hold_id)
            return
        match operation:
            case Grant():
                self.names.add((None, operation.name))
            case Delegate():
                for child in operation.children:
                    self.budgets.add(child.budget_id)
                    self._produces(child.budget_id, child.token_id)
                    self.names.add((budget_id, child.name))
            case Recover():
                self.open_holds.add(budget_id)
                for rotation in operation.holds:
                    self._produces(budget_id, rotation.next_token_id)
                    self.holds.add(rotation.hold_id)
            case Fund():
                self.budgets.add(operation.descendant_id)
            case Revoke():
                self.budgets.add(operation.descendant_id)
                self.subtrees.add(operation.descendant_id)
            case Return(amount=None) | Expire():
                self.subtrees.add(budget_id)
            case _:
                pass

    def _produces(self, budget_id: bytes, token_id: bytes | None) -> None:
        if token_id is not None:
            self.tokens.add((budget_id, token_id))


_ON_HOLDS = (Reserve, Settle, Release, Extend, Resolve, Lapse)
