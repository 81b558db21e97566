"""Many operations decided in order: chains within a request, and what one leaves for the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peculium_server.core.operations import (
    HOLD_KINDS,
    Actor,
    After,
    ByToken,
    Delegate,
    Extend,
    Operation,
    Recover,
    Release,
    Reserve,
    Settle,
)
from peculium_server.core.outcome import Outcome, tell
from peculium_server.core.refusals import Refusal, Refused, id_text
from peculium_server.core.rules import decide
from peculium_server.core.shape import check_shape
from peculium_server.core.state import Accepted, Budget, Hold, Tree


@dataclass(frozen=True, slots=True)
class Request:
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
        malformed = check_shape(operation)
        if malformed is not None:
            answers.append(malformed)
            _leave_as_it_was(request.index, operation, trees, left)
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
        if isinstance(answer, Refused) or operation.dry_run:
            _leave_as_it_was(request.index, operation, trees, left)
        else:
            _leave(request.index, operation, answer, left)
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
        return Refused(Refusal.CAPABILITY_UNKNOWN, {"budget": id_text(operation.budget_id)})
    return replace(operation, authority=ByToken(token_id))


def _subject(operation: Operation) -> bytes:
    """The budget or hold whose token the operation consumes."""
    if isinstance(operation, Settle | Release | Extend):
        return operation.hold_id
    return operation.budget_id


def _leave_as_it_was(
    index: int, operation: Operation, trees: dict[bytes, Tree], left: dict[_Key, bytes]
) -> None:
    """A refused or dry-run operation leaves the token that it presented, if that was live.

    A malformed one was not looked up: only what others of the batch name is known of it.
    """
    tree = trees.get(operation.root_id)
    if tree is None or not isinstance(operation.authority, ByToken):
        return
    owner: Budget | Hold | None
    if operation.kind in HOLD_KINDS:
        owner = tree.holds.get(_subject(operation))
        live = owner is not None and owner.settleable
    else:
        owner = tree.budgets.get(_subject(operation))
        live = owner is not None
    if owner is not None and live and owner.token == operation.authority.token_id:
        left[index, operation.root_id, _subject(operation)] = operation.authority.token_id


def _leave(index: int, operation: Operation, outcome: Outcome, left: dict[_Key, bytes]) -> None:
    """An accepted operation leaves what it produced, or what it consumed as the last token."""
    root_id = operation.root_id
    key = index, root_id, _subject(operation)
    if isinstance(operation.authority, ByToken):
        left[key] = operation.authority.token_id
    match operation:
        case Settle() | Extend():
            if outcome.hold is not None and outcome.hold.settleable:
                assert operation.next_hold_token_id is not None
                left[key] = operation.next_hold_token_id
            return
        case Release():
            return
        case Reserve():
            left[index, root_id, operation.hold_id] = operation.hold_token_id
        case Delegate():
            for child in operation.children:
                if child.token_id is not None:
                    left[index, root_id, child.budget_id] = child.token_id
        case Recover():
            for rotation in operation.holds:
                left[index, root_id, rotation.hold_id] = rotation.next_token_id
        case _:
            pass
    produced = getattr(operation, "next_token_id", None)
    if produced is not None:
        left[key] = produced
