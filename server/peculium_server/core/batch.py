"""Many operations decided in order: chains within a request, and what one leaves for the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from peculium_server.core.operations import (
    HOLD_KINDS,
    Actor,
    After,
    ByToken,
    Delegate,
    Operation,
    Recover,
)
from peculium_server.core.outcome import Outcome, tell
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.rules import decide
from peculium_server.core.state import Accepted, Tree


class Request(NamedTuple):
    """One operation of a client's request, and its index there."""

    operation: Operation
    actor: Actor
    index: int


_Key = tuple[int, bytes, bytes]
"""The index of an operation, the root, and the budget or hold whose token it left."""


def decide_group(
    trees: dict[bytes, Tree], group: Sequence[Request], now: int, position: int
) -> tuple[list[Outcome | Refused], list[Accepted]]:
    """Decide the operations of one request in order; each sees what the earlier ones did.

    Args:
        trees: By root id, what the operations' footprints name. Accepted operations are applied.
        group: The operations of one request, or those of them that belong to one lane.
        now: The database's clock, read after the trees.
        position: Operations committed in the lane before these.

    Returns:
        An answer for each operation, and everything to save.
    """
    answers: list[Outcome | Refused] = []
    accepted: list[Accepted] = []
    left: dict[_Key, bytes] = {}
    for request in group:
        operation = _resolve_chain(request, left)
        if isinstance(operation, Refused):
            answers.append(operation)
            continue
        tree = trees[operation.root_id]
        decision = decide(tree, operation, request.actor, now, position + len(accepted) + 1)
        if isinstance(decision, Accepted):
            answer: Outcome | Refused = tell(operation, decision.entries)
            if not operation.dry_run:
                tree.apply(decision)
                accepted.append(decision)
        else:
            answer = decision
        answers.append(answer)
        _leave(request.index, operation, answer, tree, left)
    return answers, accepted


def _resolve_chain(request: Request, left: dict[_Key, bytes]) -> Operation | Refused:
    """Name the token that `after` stands for: what the earlier operation left for this budget or hold."""
    operation = request.operation
    if not isinstance(operation.authority, After):
        return operation
    index = operation.authority.index
    if not 0 <= index < request.index:
        return Refused(
            Refusal.MALFORMED,
            {
                "field": "authority.after",
                "problem": "must be the index of an earlier operation of the batch",
            },
        )
    token_id = left.get((index, operation.root_id, _subject(operation)))
    if token_id is None:
        return Refused(Refusal.CAPABILITY_UNKNOWN, {"budget": operation.budget_id.hex()})
    return replace(operation, authority=ByToken(token_id))


def _subject(operation: Operation) -> bytes:
    """The budget or hold whose token the operation consumes."""
    if operation.kind in HOLD_KINDS:
        return operation.hold_id  # type: ignore[union-attr]
    return operation.budget_id


def _leave(
    index: int,
    operation: Operation,
    answer: Outcome | Refused,
    tree: Tree,
    left: dict[_Key, bytes],
) -> None:
    """Note the tokens that the operation leaves, so that later ones may name it.

    An accepted one leaves what it produced, or the token that it consumed as its last; a refused or
    dry-run one leaves the token as it was, if it was live.
    """
    root_id, subject = operation.root_id, _subject(operation)
    key = index, root_id, subject
    if isinstance(answer, Refused) or operation.dry_run:
        if isinstance(operation.authority, ByToken) and _live(tree, operation):
            left[key] = operation.authority.token_id
        return
    if isinstance(operation.authority, ByToken):
        left[key] = operation.authority.token_id
    if operation.kind in HOLD_KINDS:
        successor = getattr(operation, "next_hold_token_id", None)
        if successor is not None and answer.hold is not None and answer.hold.settleable:
            left[key] = successor
        return
    successor = getattr(operation, "next_token_id", None)
    if successor is not None:
        left[key] = successor
    hold_token = getattr(operation, "hold_token_id", None)
    if hold_token is not None:
        left[index, root_id, operation.hold_id] = hold_token  # type: ignore[union-attr]
    if isinstance(operation, Delegate):
        for child in operation.children:
            if child.token_id is not None:
                left[index, root_id, child.budget_id] = child.token_id
    if isinstance(operation, Recover):
        for rotation in operation.holds:
            left[index, root_id, rotation.hold_id] = rotation.next_token_id


def _live(tree: Tree, operation: Operation) -> bool:
    assert isinstance(operation.authority, ByToken)
    token_id = operation.authority.token_id
    if operation.kind in HOLD_KINDS:
        hold = tree.holds[operation.hold_id]  # type: ignore[union-attr]
        return hold is not None and hold.settleable and hold.token == token_id
    budget = tree.budgets[operation.budget_id]
    return budget is not None and budget.token == token_id
