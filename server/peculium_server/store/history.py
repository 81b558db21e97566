"""What budgets were at a time, where they come from, and what their subtrees have used.

Everything is answered from the entries. Of a budget they are found by halving its seqs, since within a
budget the time of the entries never decreases; nothing here grows with the length of a history, but
the sums over a subtree do with its number of budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from peculium_server.core.operations import (
    Accept,
    ByRole,
    Child,
    Delegate,
    Grant,
    Operation,
    Recover,
)
from peculium_server.core.state import Budget, Custody, Entry
from peculium_server.store.audit_reads import STATEMENTS
from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.lists import NIL, window_of_budgets
from peculium_server.store.rows import asked_for, to_effect
from peculium_server.store.store import Page, Store

_SEQS_AT_ONCE: Final = 65_536
"""Entries of a budget that one statement looks through."""
_WINDOWS_MAX: Final = 4
"""Statements for one page."""
_BUDGETS_AT_ONCE: Final = 1_000


class Used(NamedTuple):
    """What a subtree has used, closed budgets included."""

    used: int
    """The sum of spent and forfeited."""
    disputed: int
    """The sum of what is disputed, beside that."""


class Totals(NamedTuple):
    """What a subtree has used and holds just now, closed budgets included."""

    used: int
    """The sum of spent and forfeited."""
    disputed: int
    """The sum of what is disputed, beside that."""
    held: int
    """What is held in live holds."""
    holds_live: int
    """How many of these there are."""


class Held(NamedTuple):
    """How a budget is held."""

    custody: Custody
    holder: str | None
    """None: whoever has the token."""


class Making(NamedTuple):
    """How a budget came to be."""

    entry: Entry
    """Its own first one."""
    first: Entry
    """Part 0 of the operation: of the parent, or of the root itself."""
    operation: Grant | Delegate

    @property
    def held(self) -> Held:
        """How it was held at first."""
        spec = self._spec()
        return Held(Custody.PRINCIPAL if spec.token_id is None else Custody.TOKEN, spec.holder)

    @property
    def token_id(self) -> bytes | None:
        """The token that it was made with."""
        return self._spec().token_id

    def _spec(self) -> Grant | Child:
        if isinstance(self.operation, Grant):
            return self.operation
        for child in self.operation.children:
            if child.budget_id == self.entry.budget_id:
                return child
        raise LedgerCorrupt(f"budget {self.entry.budget_id.hex()} was not made by its first entry")


class TokenStep(NamedTuple):
    """What one operation did to a budget's token or holder."""

    entry: Entry
    produced: bytes | None
    """The id of the token that it produced."""
    held: Held
    """From then on."""


async def with_totals(
    store: Store, root_id: bytes, budget_id: bytes
) -> tuple[tuple[Budget, ...], Totals]:
    """A budget and its ancestors, upwards, and the sums over its subtree: at one instant.

    Takes time with the number of budgets in the tree.
    """
    found = await store.fetch(STATEMENTS["with_totals"], **store.key(root_id, budget_id))
    line = tuple(budget for budget, *_ in found)
    return line, Totals(*found[0][1:]) if found else Totals(0, 0, 0, 0)


async def line_at(store: Store, line: Sequence[Budget], at: int) -> tuple[Budget, ...]:
    """A budget and its ancestors, upwards, as they were at a time; empty if it was not made yet.

    Which tokens were live is not told.

    Args:
        store: Of the ledger.
        line: As they are now.
        at: Microseconds since the Unix epoch; what was decided at this time is included.
    """
    key = store.key(line[0].root_id, line[0].budget_id)
    del key["budget_id"]
    found = await store.fetch(
        STATEMENTS["line_at"], **key, ids=[budget.budget_id for budget in line], at=at
    )
    entries = {entry.budget_id: entry for entry in found}
    if line[0].budget_id not in entries:
        return ()
    if len(entries) < len(line):
        raise LedgerCorrupt(f"what budget {line[0].budget_id.hex()} is below has no entry by then")
    held = await _held(store, line[0], entries[line[0].budget_id].seq)
    top, *above = (_after(budget, entries[budget.budget_id]) for budget in line)
    return (top._replace(custody=held.custody, holder=held.holder), *above)


def _after(budget: Budget, entry: Entry) -> Budget:
    effect = entry.effect
    return budget._replace(
        token=None,
        money=entry.money,
        disputed=effect.disputed,
        disputes=effect.disputes,
        holds_live=effect.holds_live,
        closed=effect.closed,
        frozen=effect.frozen,
        lease_until=effect.lease_until,
        lease_latest=effect.lease_latest,
        version=effect.version,
        seq=entry.seq,
        last_at=entry.at,
        head=entry.hash,
    )


async def used_at(store: Store, root_id: bytes, budget_id: bytes, at: int) -> Used:
    """What a subtree had used at a time.

    One pass over its budgets, some at a time, so that memory is bounded and other reads get their turn.
    """
    key = store.key(root_id, budget_id)
    used = disputed = 0
    after = NIL
    while True:
        until, last = await window_of_budgets(store, root_id, after, _BUDGETS_AT_ONCE)
        for owner, amount, effect in await store.fetch(
            STATEMENTS["used_at"], **key, after=after, until=until, at=at
        ):
            used += amount
            disputed += to_effect(owner, effect).disputed
        if last:
            return Used(used, disputed)
        after = until


async def makings(store: Store, root_id: bytes, ids: Sequence[bytes]) -> dict[bytes, Making]:
    """How budgets of one tree came to be, by their ids.

    Raises:
        LedgerCorrupt: The entries of one do not say.
    """
    lane = store.lane_of(root_id)
    entries = await store.fetch(
        STATEMENTS["first_entries"], lane=lane, root_id=root_id, ids=list(ids)
    )
    firsts = {
        first.operation_id: (first, asked_for(first))
        for first in await store.fetch(
            STATEMENTS["first_parts"],
            lane=lane,
            root_id=root_id,
            ids=sorted({entry.operation_id for entry in entries}),
        )
    }
    made = {}
    for entry in entries:
        if entry.operation_id not in firsts:
            raise LedgerCorrupt(f"what made budget {entry.budget_id.hex()} lacks its part 0")
        first, operation = firsts[entry.operation_id]
        if not isinstance(operation, Grant | Delegate):
            raise LedgerCorrupt(f"budget {entry.budget_id.hex()} begins with {entry.kind.name}")
        made[entry.budget_id] = Making(entry, first, operation)
    for budget_id in ids:
        if budget_id not in made:
            raise LedgerCorrupt(f"budget {budget_id.hex()} lacks its first entry")
    return made


async def token_steps(
    store: Store, budget: Budget, *, limit: int, after: int | None = None
) -> Page[TokenStep, int]:
    """What was done to a budget's token and holder, by seq. A page may be short and not the last."""
    key = store.key(budget.root_id, budget.budget_id)
    making = (await makings(store, budget.root_id, [budget.budget_id]))[budget.budget_id]
    low, held = after or 0, making.held
    if low:
        held = await _held(store, budget, low)
    steps: list[TokenStep] = []
    for _ in range(_WINDOWS_MAX):
        until = min(low + _SEQS_AT_ONCE, budget.seq)
        found: list[Entry] = await store.fetch(
            STATEMENTS["token_steps"], **key, after=low, until=until, limit=limit + 1 - len(steps)
        )
        for entry in found:
            produced = making.token_id
            if entry.seq > 1:
                operation = asked_for(entry)
                held = _held_after(held, operation, entry.principal)
                produced = getattr(operation, "next_token_id", None)
            steps.append(TokenStep(entry, produced, held))
        if len(steps) > limit:
            return Page(tuple(steps[:limit]), steps[limit - 1].entry.seq)
        if until == budget.seq:
            return Page(tuple(steps), None)
        low = until
    return Page(tuple(steps), low)


async def _held(store: Store, budget: Budget, seq: int) -> Held:
    """How a budget was held after an entry.

    It is found backwards: an operation by the holder's name says whose the budget was, and what changes
    it says what it became. Of a budget that was always held by token the making tells.
    """
    key = store.key(budget.root_id, budget.budget_id)
    high = seq
    while high > 0:
        low = max(high - _SEQS_AT_ONCE, 0)
        found: list[Entry] = await store.fetch(
            STATEMENTS["holder_told"], **key, after=low, until=high
        )
        if found:
            return _held_told(asked_for(found[0]), found[0].principal)
        high = low
    return (await makings(store, budget.root_id, [budget.budget_id]))[budget.budget_id].held


def _held_told(operation: Operation, principal: str) -> Held:
    """How a budget is held after an operation that tells it."""
    by_role = isinstance(operation.authority, ByRole)
    if isinstance(operation, Recover) and by_role:
        custody = Custody.PRINCIPAL if operation.next_token_id is None else Custody.TOKEN
        return Held(custody, operation.holder)
    if isinstance(operation, Accept | Recover):
        return Held(Custody.TOKEN, principal)
    return Held(Custody.PRINCIPAL, principal)


def _held_after(held: Held, operation: Operation, principal: str) -> Held:
    if isinstance(operation, Accept | Recover):
        return _held_told(operation, principal)
    return held
