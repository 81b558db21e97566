"""Which rows an operation may look at, so that they are loaded before it is decided."""

from __future__ import annotations

from dataclasses import dataclass, field

from peculium_server.core.operations import (
    Accept,
    ByToken,
    Delegate,
    Expire,
    Extend,
    Fund,
    Grant,
    Lapse,
    Operation,
    Recover,
    Release,
    Renew,
    Reserve,
    Resolve,
    Return,
    Revoke,
    Settle,
    Spend,
)


@dataclass(slots=True)
class Footprint:
    """Keys of one tree. What is absent from it must not be read."""

    budgets: set[bytes] = field(default_factory=set)
    """With all their ancestors, which need not be named."""
    holds: set[bytes] = field(default_factory=set)
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
        match operation:
            case Reserve():
                self._produces(budget_id, operation.next_token_id, operation.hold_token_id)
                self.holds.add(operation.hold_id)
            case Settle() | Extend():
                self._produces(budget_id, operation.next_hold_token_id)
                self.holds.add(operation.hold_id)
            case Release() | Lapse():
                self.holds.add(operation.hold_id)
            case Spend() | Accept() | Renew():
                self._produces(budget_id, operation.next_token_id)
            case Grant():
                self._produces(budget_id, operation.token_id)
                self.names.add((None, operation.name))
            case Delegate():
                self._produces(budget_id, operation.next_token_id)
                for child in operation.children:
                    self.budgets.add(child.budget_id)
                    self._produces(child.budget_id, child.token_id)
                    self.names.add((budget_id, child.name))
            case Recover():
                self._produces(budget_id, operation.next_token_id)
                self.open_holds.add(budget_id)
                for rotation in operation.holds:
                    self._produces(budget_id, rotation.next_token_id)
                    self.holds.add(rotation.hold_id)
            case Fund():
                self._produces(budget_id, operation.next_token_id)
                self.budgets.add(operation.descendant_id)
            case Revoke():
                self._produces(budget_id, operation.next_token_id)
                self.budgets.add(operation.descendant_id)
                self.subtrees.add(operation.descendant_id)
            case Return():
                self._produces(budget_id, operation.next_token_id)
                if operation.amount is None:
                    self.subtrees.add(budget_id)
            case Resolve():
                self._produces(budget_id, operation.next_token_id)
                self.holds.add(operation.hold_id)
            case Expire():
                self.subtrees.add(budget_id)
            case _:
                pass

    def _produces(self, budget_id: bytes, *token_ids: bytes | None) -> None:
        self.tokens.update((budget_id, token) for token in token_ids if token is not None)
