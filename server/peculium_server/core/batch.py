"""Many operations decided in order: chains within a request, and what one leaves for the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from peculium_server.core.admission import check_role
from peculium_server.core.operations import (
    HOLD_OPERATIONS,
    Actor,
    After,
    ByToken,
    Delegate,
    Extend,
    Grant,
    Operation,
    Recover,
    Reserve,
    Settle,
)
from peculium_server.core.outcome import Outcome, tell
from peculium_server.core.refusals import Refusal, Refused, id_text
from peculium_server.core.rules import decide
from peculium_server.core.shape import check_shape
from peculium_server.core.state import Accepted, Tree


class Request:
    """One operation of a client's request, and its index there. It is never changed."""

    __slots__ = ("_checked", "_malformed", "actor", "index", "operation", "traceparent")

    def __init__(
        self, operation: Operation, actor: Actor, index: int, traceparent: str = ""
    ) -> None:
        self.operation = operation
        self.actor = actor
        self.index = index
        self.traceparent = traceparent
        """The W3C trace context that it came with, as it came, if anybody collects spans."""
        self._checked = False
        self._malformed: Refused | None = None

    def malformed(self) -> Refused | None:
        """Why no state of the ledger could accept it (see `check_shape`), if so; looked for once."""
        if not self._checked:
            self._malformed = check_shape(self.operation)
            self._checked = True
        return self._malformed


Left = dict[int, tuple[Operation, Outcome | None]]
"""What the operations of a request leave for later ones, by their index: each of them as it was decided,
and what it did, if it did anything."""


def decide_group(
    trees: dict[bytes, Tree],
    group: Sequence[Request],
    now: int,
    position: int,
    left: Left | None = None,
) -> tuple[list[Outcome | Refused], list[Accepted]]:
    """Decide the operations of one request in order; each sees what the earlier ones did.

    Args:
        trees: By root id, what the operations' footprints name. Accepted operations are applied.
        group: The operations of one request, or those of them that belong to one lane.
        now: The database's clock, read after the trees.
        position: Operations committed in the lane before these.
        left: What earlier operations of the same request have left, if they were committed before;
            extended by what these leave.

    Returns:
        An answer for each operation, and everything to save.
    """
    answers: list[Outcome | Refused] = []
    accepted: list[Accepted] = []
    left = {} if left is None else left
    for request in group:
        answer, decision = _decide_next(trees, request, now, position + len(accepted) + 1, left)
        answers.append(answer)
        if decision is not None:
            accepted.append(decision)
    return answers, accepted


def decide_atomic(
    trees: dict[bytes, Tree],
    batch: Sequence[Request],
    now: int,
    lane_of: Callable[[bytes], int],
    positions: dict[int, int],
) -> tuple[list[Outcome | Refused], list[Accepted]]:
    """Decide the operations of an atomic batch in order: all of them happen, or none.

    The first refusal is that of the batch. A batch that was accepted before replays as a whole; if only
    some of its operations are recorded, it has other content than it had then. In a dry run each
    operation sees what those before it would do.

    Args:
        trees: By root id, what the operations' footprints name. Of an accepted batch all operations
            are applied, of a refused one none.
        batch: All operations of the batch; see `check_atomic`.
        now: The database's clock, read after the trees.
        lane_of: The lane of a root.
        positions: By lane, operations committed before these; counted on if the batch is accepted.

    Returns:
        An answer for each operation, and everything to save.
    """
    answers: list[Outcome | Refused] = []
    accepted: list[Accepted] = []
    left: Left = {}
    changed = {root_id: trees[root_id].copy() for root_id in {_root_of(each) for each in batch}}
    ahead = dict(positions)
    for request in batch:
        lane = lane_of(_root_of(request))
        answer, decision = _decide_next(
            changed, request, now, ahead[lane] + 1, left, rehearsed=True
        )
        if isinstance(answer, Outcome) and answers:
            answer = _check_recorded_alike(request, answer, answers[0])
        if isinstance(answer, Refused):
            return refuse_batch(request.index, answer, size=len(batch)), []
        answers.append(answer)
        if decision is not None:
            accepted.append(decision)
            ahead[lane] += 1
    if batch[0].operation.dry_run:
        return answers, []
    trees |= changed
    positions |= ahead
    return answers, accepted


def check_atomic(batch: Sequence[Request]) -> list[Outcome | Refused] | None:
    """Refuse an atomic batch that no state of the ledger could accept."""
    for request in batch:
        refused = request.malformed()
        if refused is None and request.operation.dry_run is not batch[0].operation.dry_run:
            problem = "must be the same in all operations of an atomic batch"
            refused = Refused(Refusal.MALFORMED, {"field": "dry_run", "problem": problem})
        if refused is not None:
            return refuse_batch(request.index, refused, size=len(batch))
    return None


def refuse_batch(index: int, refused: Refused, *, size: int) -> list[Outcome | Refused]:
    """The answers to an atomic batch in which one operation is refused, and so all of them."""
    facts = {"index": str(index), "reason": refused.reason.name}
    answers: list[Outcome | Refused] = [Refused(Refusal.BATCH_REFUSED, facts)] * size
    answers[index] = refused
    return answers


def _root_of(request: Request) -> bytes:
    return request.operation.root_id


def _check_recorded_alike(
    request: Request, answer: Outcome, first: Outcome | Refused
) -> Outcome | Refused:
    """Refuse an operation that is new where the first of the batch is recorded, or the reverse."""
    assert isinstance(first, Outcome)
    if answer.replayed == first.replayed:
        return answer
    batch = request.operation.batch
    assert batch is not None
    field = f"operations[{request.index}].operation_id"
    return Refused(
        Refusal.OPERATION_ID_REUSED, {"operation": id_text(batch.batch_id), "field": field}
    )


def _decide_next(
    trees: dict[bytes, Tree],
    request: Request,
    now: int,
    position: int,
    left: Left,
    *,
    rehearsed: bool = False,
) -> tuple[Outcome | Refused, Accepted | None]:
    """Decide one operation after those before it, and take over what it changes and leaves.

    What a dry run would change is taken over where all of it is only `rehearsed`.
    """
    operation = _resolve_chain(request, left)
    if isinstance(operation, Refused):
        return operation, None
    answer: Outcome | Refused
    accepted: Accepted | None = None
    chained = operation is not request.operation
    malformed = check_shape(operation) if chained else request.malformed()
    if malformed is not None:
        answer = malformed
    else:
        tree = trees[operation.root_id]
        decision = decide(tree, operation, request.actor, now, position)
        if isinstance(decision, Accepted):
            answer = tell(operation, decision.entries)
            if rehearsed or not operation.dry_run:
                _apply(trees, decision)
                accepted = decision
        else:
            answer = decision
    outcome = answer if isinstance(answer, Outcome) else None
    left[request.index] = operation, outcome if rehearsed or not operation.dry_run else None
    return answer, accepted


def _apply(trees: dict[bytes, Tree], accepted: Accepted) -> None:
    """Let the operations that follow see what this one did."""
    operation = accepted.operation
    trees[operation.root_id].apply(accepted)
    if isinstance(operation, Grant):
        # Names of roots are unique over all trees, and each tree knows of its own only.
        for tree in trees.values():
            tree.names[None, operation.name] = operation.root_id


def _resolve_chain(request: Request, left: Left) -> Operation | Refused:
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
    token_id = _token_left(left, index, operation)
    if token_id is None:
        return (
            check_shape(operation)
            or check_role(operation, request.actor)
            or Refused(Refusal.CAPABILITY_UNKNOWN, {"budget": id_text(operation.budget_id)})
        )
    return replace(operation, authority=ByToken(token_id))


def with_carried(operation: Operation, left: Left) -> Operation:
    """The operation as its footprint has to be told: by the token that was carried to its transaction.

    What an operation of its own transaction will leave is in that one's footprint.
    """
    if not isinstance(operation.authority, After):
        return operation
    token_id = _token_left(left, operation.authority.index, operation)
    return operation if token_id is None else replace(operation, authority=ByToken(token_id))


def _token_left(left: Left, index: int, operation: Operation) -> bytes | None:
    """The token that an earlier operation has left for the budget or hold of this one.

    What an accepted operation has produced takes the place of the token that it presented. Refused,
    dry-run and ending operations leave the token that they presented, so that the next in the chain
    is told the truth about it, and is found if it was recorded before.
    """
    if index not in left:
        return None
    before, outcome = left[index]
    subject = _subject(operation)
    produced = None if outcome is None else _produced(before, outcome, subject)
    if produced is None and isinstance(before.authority, ByToken) and _subject(before) == subject:
        return before.authority.token_id
    return produced


_Subject = tuple[bytes, bytes, bytes | None]


def _subject(operation: Operation) -> _Subject:
    """Whose token the operation consumes: root, budget and, if it is a hold's, the hold."""
    hold_id = operation.hold_id if isinstance(operation, HOLD_OPERATIONS) else None
    return operation.root_id, operation.budget_id, hold_id


def _produced(operation: Operation, outcome: Outcome, subject: _Subject) -> bytes | None:
    """The token that an accepted operation has produced for a budget or hold, if any."""
    root_id, budget_id, hold_id = subject
    if root_id != operation.root_id:
        return None
    if budget_id != operation.budget_id:
        if hold_id is None and isinstance(operation, Delegate):
            for child in operation.children:
                if child.budget_id == budget_id:
                    return child.token_id
        return None
    if hold_id is None:
        if isinstance(operation, Grant):
            return operation.token_id
        token_id: bytes | None = getattr(operation, "next_token_id", None)
        return token_id
    match operation:
        case Reserve() if operation.hold_id == hold_id:
            return operation.hold_token_id
        case Settle() | Extend() if operation.hold_id == hold_id:
            stays = outcome.hold is not None and outcome.hold.settleable
            return operation.next_hold_token_id if stays else None
        case Recover():
            for rotation in operation.holds:
                if rotation.hold_id == hold_id:
                    return rotation.next_token_id
        case _:
            pass
    return None
