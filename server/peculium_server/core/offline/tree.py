"""One tree of an export: every rule that its entries and rows have to keep, operation for operation.

The rules, by the names that findings have, in the order in which an operation is looked at:

- "parts", "request": its parts agree on what they share; the first one says what was asked
- "operation": its id is new in the tree
- "seq", "digest", "chain": the hashes, and the place of each entry in its budget
- "effect": what it did can be read
- "budget": a budget is made once, by its parent, before anything is done to it
- "time": no budget goes back in time
- "balances", "changes", "versions": of each budget touched, see `_check_money` and `_check_versions`
- "conservation": what leaves one budget arrives in another
- "authority", "token": see `rights`
- "hold", "amount": see `holds`
- "fold": the rows are what the entries add up to
"""

from __future__ import annotations

from operator import add, attrgetter
from typing import Any, Final

from peculium_server.core.encoding import (
    decode_effect,
    digest_of_parts,
    entry_hash,
    request_fields,
)
from peculium_server.core.limits import BALANCE_MAX, ID_BYTES
from peculium_server.core.offline.fold import Folded, gate_changed
from peculium_server.core.offline.holds import check_holds
from peculium_server.core.offline.records import digest_of
from peculium_server.core.offline.rights import check_rights
from peculium_server.core.offline.rules import Broken, Step
from peculium_server.core.operations import AtomicBatch, Child, Kind
from peculium_server.core.state import GENESIS, Balances, Budget, Effect, Entry, Hold
from peculium_server.core.verify import Finding

_MAKING: Final = frozenset({Kind.GRANT, Kind.DELEGATE})
"""They make budgets."""
_WORLD: Final = {Kind.GRANT: 1, Kind.TOP_UP: 1, Kind.WITHDRAW: -1}
"""What brings money into a root or takes it out; nothing else changes what was granted to it."""


class TreeAudit:
    """Checks one tree. Feed operations in order, then the rows, then ask `finish`."""

    def __init__(self, root_id: bytes, lane: int) -> None:
        self.root_id = root_id
        self.lane = lane
        """Where it belongs."""
        self.finding: Finding | None = None
        """The first thing that is wrong. What comes after it is not looked at."""
        self.budgets: dict[bytes, Folded] = {}
        self.holds: dict[bytes, Hold] = {}
        self._operations: set[bytes] = set()
        self._rows: set[bytes] = set()

    def operation(self, parts: list[Entry]) -> AtomicBatch | None:
        """Check the next operation, by its entries in order of their parts.

        Returns:
            The batch that it was accepted with, if it has one and nothing is wrong.
        """
        if self.finding is not None:
            return None
        try:
            return self._operation(parts)
        except Broken as broken:
            self.broken(broken, parts[broken.part])
            return None

    def broken(self, broken: Broken, entry: Entry) -> None:
        """Note that an entry breaks a rule, if nothing was found before."""
        if self.finding is None:
            self.finding = Finding(
                self.root_id, entry.budget_id, entry.seq, broken.rule, broken.detail
            )

    # -- An operation ---------------------------------------------------------------------------

    def _operation(self, parts: list[Entry]) -> AtomicBatch | None:
        first = parts[0]
        self._check_parts(parts)
        operation_id = first.operation_id
        if operation_id in self._operations:
            raise Broken("operation", "its id was recorded before")
        self._operations.add(operation_id)
        self._check_hashes(parts)
        asked = _asked(first)
        kind = first.kind
        if kind in _MAKING:
            self._make(first, asked)
        steps = [self._step(index, part) for index, part in enumerate(parts)]
        for index, step in enumerate(steps):
            budget, entry, effect = step.budget, step.entry, step.effect
            money = entry.money
            step.before = budget.effect
            _check_money(index, budget, money, effect)
            _check_versions(index, step, money)
            budget.take(entry, effect)
        if kind is Kind.DELEGATE:
            _check_children(steps, asked.get("children", ()))
        _check_conservation(steps)
        check_rights(steps, asked, self.holds)
        check_holds(steps, asked, self.holds)
        batch: AtomicBatch | None = asked.get("batch")
        return batch

    def _check_parts(self, parts: list[Entry]) -> None:
        first = parts[0]
        if first.root_id != self.root_id or first.request is None:
            raise Broken("request", "part 0 has to say what was asked")
        if len(parts) == 1:
            return
        shared = _SHARED(first)
        for index, part in enumerate(parts[1:], start=1):
            if _SHARED(part) != shared:
                raise Broken("parts", "it says another operation than the first part", index)
            if part.request is not None:
                raise Broken("request", "only part 0 says what was asked", index)

    def _check_hashes(self, parts: list[Entry]) -> None:
        first = parts[0]
        heads = [self._head_before(first, 0, None)]
        if len(parts) > 1:
            last = {first.budget_id: first}
            for index, part in enumerate(parts[1:], start=1):
                heads.append(self._head_before(part, index, last.get(part.budget_id)))
                last[part.budget_id] = part
        digest = digest_of_parts(parts)
        if first.digest != digest:
            raise Broken("digest", "the digest is not that of the operation's parts")
        for index, (part, head) in enumerate(zip(parts, heads, strict=True)):
            if part.hash != entry_hash(head, digest, index):
                raise Broken("chain", "the hash is not that of the entry and the one before", index)

    def _head_before(self, part: Entry, index: int, other: Entry | None) -> bytes:
        """The hash of the entry before of its budget, which may be another one of the operation."""
        if other is not None:
            seq, head = other.seq, other.hash
        else:
            budget = self.budgets.get(part.budget_id)
            seq, head = (0, GENESIS) if budget is None else (budget.seq, budget.head)
        if part.seq != seq + 1:
            raise Broken("seq", f"{seq + 1} was expected", index)
        return head

    def _make(self, first: Entry, asked: dict[str, Any]) -> None:
        """Add the budgets that a Grant or a Delegate makes."""
        if first.kind is Kind.GRANT:
            if first.budget_id != self.root_id or self.budgets:
                raise Broken("budget", "a grant makes the root, and is the first of its tree")
            root = Folded(
                self.root_id,
                None,
                name=asked.get("name", ""),
                unit=asked.get("unit", ""),
                holder=asked.get("holder"),
                token=asked.get("token_id"),
                overrun_factor=None,
                labels=asked.get("labels", ()),
                created_at=first.at,
            )
            self.budgets[self.root_id] = root
        else:
            parent = self.budgets.get(first.budget_id)
            if parent is None:
                raise Broken("budget", "nothing has made the budget")
            for child in asked.get("children", ()):
                self._add_child(parent, child, first.at)

    def _add_child(self, parent: Folded, child: Child, at: int) -> None:
        if child.budget_id in self.budgets or len(child.budget_id) != ID_BYTES:
            raise Broken("budget", f"{child.budget_id.hex()} was made before")
        self.budgets[child.budget_id] = Folded(
            child.budget_id,
            parent,
            name=child.name,
            unit=parent.unit,
            holder=child.holder,
            token=child.token_id,
            overrun_factor=child.overrun_factor,
            labels=child.labels,
            created_at=at,
        )

    def _step(self, index: int, part: Entry) -> Step:
        budget = self.budgets.get(part.budget_id)
        if budget is None:
            raise Broken("budget", "nothing has made the budget", index)
        try:
            # With the id of the fold: a hold keeps it.
            effect = decode_effect(part.effect_bytes, budget.budget_id)
        except ValueError as error:
            raise Broken("effect", str(error), index) from error
        if part.at < budget.last_at:
            raise Broken("time", "it was decided before the entry before it", index)
        return Step(part, effect, budget)

    # -- Rows -----------------------------------------------------------------------------------

    def budget(self, row: Budget, token_digest: bytes | None) -> None:
        """Compare the row of a budget, whose token is known by its digest, with its entries."""
        self._rows.add(row.budget_id)
        fold = self.budgets.get(row.budget_id)
        if fold is None or not fold.seq:
            self._wrong_row(row.budget_id, "the budget has a row and no entries")
            return
        made = fold.row(self.root_id)
        told = row._replace(token=made.token)
        differing = [name for name, a, b in zip(row._fields, made, told, strict=True) if a != b]
        if digest_of(made.token) != token_digest:
            differing.append("token")
        if differing:
            self._wrong_row(row.budget_id, f"the row differs in {', '.join(differing)}")

    def hold(self, row: Hold, token_digest: bytes | None) -> None:
        """Compare the row of a hold, whose token is known by its digest, with its entries."""
        # What has been compared is not needed any more; there may be millions.
        fold = self.holds.pop(row.hold_id, None)
        if (
            fold is None
            or row[:2] != fold[:2]
            or row[3:] != fold[3:]
            or digest_of(fold.token) != token_digest
        ):
            self._wrong_row(row.budget_id, f"the row of hold {row.hold_id.hex()} differs")

    def finish(self) -> Finding | None:
        """The first finding, or None: everything holds."""
        if self.finding is None:
            for budget_id in self.budgets.keys() - self._rows:
                self._wrong_row(budget_id, "the budget has entries and no row")
            for hold_id, hold in self.holds.items():
                self._wrong_row(hold.budget_id, f"hold {hold_id.hex()} has no row")
        return self.finding

    def _wrong_row(self, budget_id: bytes, detail: str) -> None:
        if self.finding is None:
            self.finding = Finding(self.root_id, budget_id, 0, "fold", detail)


_SHARED = attrgetter(
    "root_id",
    "position",
    "parts",
    "operation_id",
    "kind",
    "at",
    "principal",
    "trace_id",
    "amount",
    "digest",
)
"""What all parts of an operation say alike."""


def _asked(first: Entry) -> dict[str, Any]:
    assert first.request is not None
    try:
        return request_fields(first.kind, first.request)
    except (KeyError, ValueError) as error:
        raise Broken("request", str(error)) from error


def _check_money(index: int, budget: Folded, money: Balances, effect: Effect) -> None:
    """The balances are those before and the changes; they add up, and none is beyond its bounds."""
    # While nothing is overrun none is more than was granted.
    largest = max(money) if money.overrun else money.granted
    if not money.balanced() or largest > BALANCE_MAX or (budget.line and money.overrun):
        raise Broken("balances", "the balances do not add up, or are beyond their bounds", index)
    if money != tuple(map(add, budget.money, effect.changes)):
        raise Broken("changes", "the balances are not those before and the changes", index)


def _check_versions(index: int, step: Step, money: Balances) -> None:
    """It read its ancestors as they were; its own version counts what a decision below may read."""
    effect, before, budget = step.effect, step.before, step.budget
    if effect.versions != step.versions:
        raise Broken("versions", "the ancestors had other versions", index)
    expected = 0
    if before is not None:
        expected = budget.version + gate_changed(before, budget.money, effect, money)
    if effect.version != expected:
        raise Broken("versions", f"version {expected} was expected", index)


def _check_children(steps: list[Step], children: tuple[Child, ...]) -> None:
    """Each child that was asked for is made, with what it was to have, and no other budget is touched."""
    if len(steps) != 1 + len(children):
        raise Broken("budget", f"{len(children)} children were to be made")
    for index, (step, child) in enumerate(zip(steps[1:], children, strict=True), start=1):
        if step.entry.budget_id != child.budget_id or step.entry.money.available != child.amount:
            raise Broken("budget", "it is not the child that was asked for", index)


def _check_conservation(steps: list[Step]) -> None:
    """What was delegated by a budget was granted to its children; the world's money goes to roots."""
    first = steps[0]
    world = _WORLD.get(first.entry.kind, 0) * first.entry.amount
    if len(steps) == 1:
        granted = 0 if first.budget.line else world
        if first.changes.granted != granted or first.changes.delegated:
            raise Broken("conservation", "money comes from nowhere, or goes there")
        return
    unmatched: dict[bytes, int] = {}
    where: dict[bytes, int] = {}
    for index, step in enumerate(steps):
        budget, changes = step.budget, step.changes
        budget_id = budget.budget_id
        where.setdefault(budget_id, index)
        unmatched[budget_id] = unmatched.get(budget_id, 0) + changes.delegated
        above = budget.line[0].budget_id if budget.line else _NOBODY
        where.setdefault(above, index)
        unmatched[above] = unmatched.get(above, 0) - changes.granted
    unmatched[_NOBODY] = unmatched.get(_NOBODY, 0) + world
    for budget_id, difference in unmatched.items():
        if difference:
            detail = f"{difference} left a budget, or the world, and did not arrive in another"
            raise Broken("conservation", detail, where.get(budget_id, 0))


_NOBODY = b""
"""Above the roots is the world."""
