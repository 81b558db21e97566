"""The auditor's replay: from the entries of a tree alone, every decision is made again.

A tree verifies if each recorded operation, decided anew on the fold of those before it, leaves
entries with the recorded hashes, and if the fold equals the rows. Memory grows with the tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from peculium_server.core.admission import SYSTEM_KINDS
from peculium_server.core.encoding import decode_request, digest_of_parts, entry_hash
from peculium_server.core.operations import (
    SYSTEM,
    Actor,
    ByRole,
    Expire,
    Operation,
    Recover,
    Return,
    Revoke,
    Role,
)
from peculium_server.core.refusals import Refused, id_text
from peculium_server.core.rules import decide
from peculium_server.core.shape import check_shape
from peculium_server.core.state import GENESIS, Accepted, Budget, Entry, Hold, Tree

_K = TypeVar("_K")
_V = TypeVar("_V")


class Finding(NamedTuple):
    """The first thing that is wrong with a tree."""

    root_id: bytes
    budget_id: bytes
    seq: int
    """The entry; 0 if it is about the row of a budget or hold."""
    rule: str
    """What it breaks: "parts", "position", "operation", "seq", "digest", "chain", "request", "decision", "fold";
    "checkpoint", see `checkpoint`; "lane", "name", "collection", see `placement`; "ledger"."""
    detail: str


class _Known(dict[_K, _V | None]):
    """A part of a tree that is known as a whole: what is absent does not exist."""

    def __missing__(self, key: _K) -> None:
        return None


class _Broken(Exception):
    """A rule is broken at an entry."""

    def __init__(self, rule: str, detail: str, entry: Entry | None = None) -> None:
        super().__init__(detail)
        self.rule = rule
        self.detail = detail
        self.entry = entry


_SHARED = ("root_id", "position", "parts", "kind", "at", "principal", "trace_id", "amount")
"""What all parts of an operation say alike, beside its id."""


class Verifier:
    """Checks one tree.

    Feed `entry` in order of position and part, then `budget` and `hold` with every row, then ask
    `finish`.
    """

    def __init__(self, root_id: bytes) -> None:
        self.finding: Finding | None = None
        self.entries = 0
        self.root_id = root_id
        self._tree = _WholeTree(root_id)
        self._position = 0
        self._parts: list[Entry] = []
        self._rows_seen: set[bytes] = set()
        self._holds_seen: set[bytes] = set()

    def entry(self, entry: Entry) -> None:
        """Check the next entry; of an operation of several parts, with the last of them."""
        self.entries += 1
        if self.finding is not None:
            return
        try:
            self._next_part(entry)
        except _Broken as broken:
            self._found(broken, broken.entry or entry)

    def budget(self, row: Budget) -> None:
        """Compare the row of a budget with the fold of its entries."""
        self._no_more_entries()
        if self.finding is not None:
            return
        self._rows_seen.add(row.budget_id)
        fold = self._tree.budgets[row.budget_id]
        if fold is None:
            self._wrong_row(row.budget_id, "the budget has a row and no entries")
        elif fold != row:
            differing = [name for name, a, b in zip(row._fields, fold, row, strict=True) if a != b]
            self._wrong_row(row.budget_id, f"the row differs in {', '.join(differing)}")

    def hold(self, row: Hold) -> None:
        """Compare the row of a hold with the fold of its entries."""
        self._no_more_entries()
        if self.finding is not None:
            return
        self._holds_seen.add(row.hold_id)
        fold = self._tree.holds[row.hold_id]
        if fold != row:
            self._wrong_row(row.budget_id, f"the row of hold {id_text(row.hold_id)} differs")

    def finish(self) -> Finding | None:
        """The first finding, or None: the tree is verified."""
        self._no_more_entries()
        if self.finding is None:
            for budget_id in self._tree.budgets.keys() - self._rows_seen:
                self._wrong_row(budget_id, "the budget has entries and no row")
            for hold_id in self._tree.holds.keys() - self._holds_seen:
                hold = self._tree.holds[hold_id]
                assert hold is not None
                self._wrong_row(hold.budget_id, f"hold {id_text(hold_id)} has no row")
        return self.finding

    def _no_more_entries(self) -> None:
        if self.finding is None and self._parts:
            last = self._parts[-1]
            self._found(_Broken("parts", f"{last.parts - len(self._parts)} are missing"), last)

    def _found(self, broken: _Broken, entry: Entry) -> None:
        self.finding = Finding(self.root_id, entry.budget_id, entry.seq, broken.rule, broken.detail)

    def _wrong_row(self, budget_id: bytes, detail: str) -> None:
        if self.finding is None:
            self.finding = Finding(self.root_id, budget_id, 0, "fold", detail)

    def _next_part(self, entry: Entry) -> None:
        expected = len(self._parts)
        if entry.part != expected or (
            self._parts and entry.operation_id != self._parts[0].operation_id
        ):
            raise _Broken("parts", f"part {expected} was expected, and is missing")
        self._parts.append(entry)
        if len(self._parts) < entry.parts:
            return
        parts, self._parts = self._parts, []
        self._operation(parts)

    def _operation(self, parts: list[Entry]) -> None:
        first = parts[0]
        if first.parts != len(parts):
            raise _Broken("parts", f"{first.parts} were said, not {len(parts)}", first)
        for part in parts:
            self._check_header(first, part)
        if first.position <= self._position:
            raise _Broken("position", f"{first.position} is not after {self._position}", first)
        self._position = first.position
        if first.operation_id in self._tree.operations:
            raise _Broken("operation", "its id was recorded before", first)
        self._check_hashes(parts)
        try:
            operation = self._asked(first)
        except ValueError as error:
            raise _Broken("request", str(error), first) from error
        self._decide_again(operation, parts)

    def _check_header(self, first: Entry, part: Entry) -> None:
        """What all parts of an operation say alike."""
        for name in _SHARED:
            if getattr(part, name) != getattr(first, name):
                raise _Broken("parts", f"the parts disagree on {name}", part)
        if (part.request is None) is (part is first):
            raise _Broken("request", "part 0, and it alone, says what was asked", part)

    def _check_hashes(self, parts: list[Entry]) -> None:
        digest = digest_of_parts(parts)
        heads: dict[bytes, tuple[int, bytes]] = {}
        for part in parts:
            known = self._tree.budgets[part.budget_id]
            seq, head = heads.get(
                part.budget_id, (0, GENESIS) if known is None else (known.seq, known.head)
            )
            if part.seq != seq + 1:
                raise _Broken("seq", f"{seq + 1} was expected", part)
            if part.digest != digest:
                raise _Broken("digest", "the digest is not that of the operation's parts", part)
            told = part.previous_hash or head
            if told != head or part.hash != entry_hash(head, digest, part.part):
                raise _Broken("chain", "the hash is not that of the entry and the one before", part)
            heads[part.budget_id] = part.seq, part.hash

    def _asked(self, first: Entry) -> Operation:
        assert first.request is not None
        operation = decode_request(
            kind=first.kind,
            root_id=first.root_id,
            budget_id=first.budget_id,
            operation_id=first.operation_id,
            trace_id=first.trace_id,
            consumed=first.consumed,
            request=first.request,
        )
        malformed = check_shape(operation)
        if malformed is not None:
            raise ValueError(malformed.message)
        return operation

    def _decide_again(self, operation: Operation, parts: list[Entry]) -> None:
        first = parts[0]
        actor = Actor(first.principal, Role.AGENT)
        if operation.kind in SYSTEM_KINDS:
            actor = SYSTEM
        elif isinstance(operation.authority, ByRole):
            actor = Actor(first.principal, Role.ADMIN)
        self._tree.look_as_before(operation, parts)
        try:
            decision = decide(self._tree, operation, actor, first.at, first.position)
        except (ValueError, OverflowError) as error:
            # A forged time or number that is beyond what dates, or the encoding, can say.
            raise _Broken("decision", f"it cannot be decided again: {error}", first) from error
        if not isinstance(decision, Accepted):
            # An operation that was recorded before was found by its id.
            assert isinstance(decision, Refused)
            why = decision.reason.name
            raise _Broken("decision", f"decided again, the operation is refused: {why}", first)
        # Each hash covers all parts: if there are more or fewer now, the first one differs.
        for made, part in zip(decision.entries, parts, strict=False):
            if made.hash != part.hash:
                raise _Broken("decision", "decided again, the operation has another effect", part)
        self._tree.apply(decision)


class _WholeTree(Tree):
    """A tree of which everything is known, so that what is absent does not exist."""

    def __init__(self, root_id: bytes) -> None:
        super().__init__(root_id)
        self.budgets = _Known()
        self.holds = _Known()
        self.consumed = _Known()
        self.hold_tokens = _Known()
        self.recorded = _Known()
        self.names = _Known()
        self.operations: set[bytes] = set()
        self._children: dict[bytes, list[bytes]] = {}
        self._open: dict[bytes, set[bytes]] = {}
        self._visible: set[bytes] | None = None

    def apply(self, accepted: Accepted) -> None:
        """Take over what an operation changed; of the operation itself only its id is kept."""
        for budget in accepted.budgets:
            if self.budgets[budget.budget_id] is None and budget.parent_id is not None:
                self._children.setdefault(budget.parent_id, []).append(budget.budget_id)
        for hold in accepted.holds:
            ids = self._open.setdefault(hold.budget_id, set())
            if hold.settleable:
                ids.add(hold.hold_id)
            else:
                ids.discard(hold.hold_id)
        super().apply(accepted)
        del self.recorded[accepted.operation.operation_id]
        self.operations.add(accepted.operation.operation_id)

    def look_as_before(self, operation: Operation, parts: list[Entry]) -> None:
        """Show a decision what it saw: of what lies below a closing budget, only what it emptied."""
        self._visible = None
        if isinstance(operation, Recover):
            self.open_holds = {
                operation.budget_id: tuple(
                    hold
                    for hold_id in self._open.get(operation.budget_id, ())
                    if (hold := self.holds[hold_id]) is not None
                )
            }
        elif isinstance(operation, Return | Revoke | Expire):
            top = operation.descendant_id if isinstance(operation, Revoke) else operation.budget_id
            visible = {part.budget_id for part in parts}
            hidden = [
                budget
                for budget in self.below(top)
                if budget.money.available and budget.budget_id not in visible
            ]
            self.pending[top] = sum(budget.money.available for budget in hidden)
            open_children = (
                budget.budget_id
                for budget in hidden
                if budget.parent_id == top and not budget.closed
            )
            self.open_child[top] = next(open_children, None)
            self._visible = visible

    def below(self, budget_id: bytes) -> Iterator[Budget]:
        pending = [*self._children.get(budget_id, ())]
        while pending:
            child_id = pending.pop()
            child = self.budget(child_id)
            pending.extend(self._children.get(child_id, ()))
            if self._visible is None or child_id in self._visible or not child.money.available:
                yield child
