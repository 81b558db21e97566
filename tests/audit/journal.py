"""What auditors are told, evaluated anew by plain loops over all entries: slow, and obvious.

Nothing here looks at the rows of budgets or holds, at an index, or at the order in which anything was
read. Compare with what the entries say that were there when the question was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from peculium_server.core.operations import (
    HOLD_OPERATIONS,
    Accept,
    ByRole,
    ByToken,
    Delegate,
    Grant,
    Kind,
    Labels,
    Operation,
    Recover,
)
from peculium_server.core.state import (
    GENESIS,
    Balances,
    BudgetState,
    Custody,
    Entry,
)
from peculium_server.store.store import Store
from tests.core.ledger import requested


@dataclass(frozen=True)
class Account:
    """A budget after some of its entries."""

    root_id: bytes
    budget_id: bytes
    ancestors: tuple[bytes, ...]
    """The parent first."""
    name: str
    unit: str
    labels: Labels
    overrun_factor: int | None
    created_at: int
    custody: Custody
    holder: str | None
    money: Balances = field(default_factory=Balances)
    disputed: int = 0
    disputes: int = 0
    holds_live: int = 0
    closed: bool = False
    frozen: bool = False
    lease_until: int | None = None
    lease_latest: int | None = None
    seq: int = 0
    last_at: int = 0
    head: bytes = GENESIS

    def own_state(self, at: int) -> BudgetState:
        """What it allows by itself."""
        if self.closed:
            return BudgetState.CLOSED
        if self.lease_until is not None and self.lease_until <= at:
            return BudgetState.EXPIRED
        if self.frozen or self.disputes:
            return BudgetState.FROZEN
        return BudgetState.OPEN


@dataclass(frozen=True)
class Wanted:
    """Which entries are selected: those for which everything holds that is said."""

    kinds: frozenset[Kind] = frozenset()
    principals: frozenset[str] = frozenset()
    operation_id: bytes | None = None
    trace_id: bytes | None = None
    labels: Labels = ()
    since: int | None = None
    until: int | None = None
    hold_id: bytes | None = None
    reference: str = ""


@dataclass
class Journal:
    """All entries of one tree, by position and part."""

    entries: Sequence[Entry]
    operations: dict[bytes, Operation] = field(default_factory=dict)
    """As they were asked for, by their ids."""
    first: dict[bytes, Account] = field(default_factory=dict)
    """Each budget as it was asked for, before its first entry."""

    def __post_init__(self) -> None:
        self.entries = _chained(sorted(self.entries, key=lambda each: (each.position, each.part)))
        for entry in self.entries:
            if entry.part == 0:
                self.operations[entry.operation_id] = requested(entry)
                self._made(entry)

    @classmethod
    async def read(cls, store: Store, root_id: bytes) -> Journal:
        """Everything that a ledger has recorded of a tree, at one instant."""
        async with store.snapshot() as snapshot:
            return cls([entry async for entry in snapshot.entries_in_order(root_id)])

    # -- Which budgets ----------------------------------------------------------------------------

    def path(self, budget_id: bytes) -> str:
        """Names from the root downwards."""
        line = [budget_id, *self.first[budget_id].ancestors]
        return "/".join(self.first[each].name for each in reversed(line))

    def reach(self, budget_id: bytes) -> set[bytes]:
        """A budget and everything below it."""
        return {
            each.budget_id
            for each in self.first.values()
            if budget_id in (each.budget_id, *each.ancestors)
        }

    # -- How they were ----------------------------------------------------------------------------

    def account(self, budget_id: bytes, at: int | None = None) -> Account | None:
        """A budget after its entries up to a time, that time included; None: there was none yet."""
        account = self.first[budget_id]
        for entry in self.entries:
            if entry.budget_id == budget_id and (at is None or entry.at <= at):
                account = self.after(account, entry)
        return account if account.seq else None

    def state(self, budget_id: bytes, now: int, at: int | None = None) -> BudgetState:
        """What a budget allowed, its ancestors considered.

        Args:
            budget_id: Which.
            now: The clock that leases are held against.
            at: After which entries; absent: after all.
        """
        line = [budget_id, *self.first[budget_id].ancestors]
        accounts = [self.account(each, at) for each in line]
        return max(account.own_state(now) for account in accounts if account is not None)

    def total(
        self, budgets: Iterable[bytes], of: Callable[[Account], int], at: int | None = None
    ) -> int:
        """The sum of something over budgets, up to a time."""
        accounts = [self.account(each, at) for each in budgets]
        return sum(of(account) for account in accounts if account is not None)

    def used(self, top: bytes, at: int | None = None) -> int:
        """What a subtree had used."""
        return self.total(self.reach(top), lambda each: each.money.spent + each.money.forfeited, at)

    def disputed(self, top: bytes, at: int | None = None) -> int:
        """What was disputed in a subtree."""
        return self.total(self.reach(top), lambda each: each.disputed, at)

    # -- What was recorded ------------------------------------------------------------------------

    def selected(self, budgets: Iterable[bytes], wanted: Wanted) -> list[Entry]:
        """The entries of some budgets that are selected, by position and part."""
        among = set(budgets)
        return [
            entry
            for entry in self.entries
            if entry.budget_id in among and self.matches(entry, wanted)
        ]

    def matches(self, entry: Entry, wanted: Wanted) -> bool:
        """Say whether an entry is selected."""
        operation = self.operations[entry.operation_id]
        hold = entry.effect.hold
        return (
            (not wanted.kinds or entry.kind in wanted.kinds)
            and (not wanted.principals or entry.principal in wanted.principals)
            and wanted.operation_id in (None, entry.operation_id)
            and wanted.trace_id in (None, entry.trace_id)
            and set(wanted.labels) <= set(operation.labels)
            and (wanted.since is None or wanted.since <= entry.at)
            and (wanted.until is None or entry.at < wanted.until)
            and (wanted.hold_id is None or (hold is not None and hold.hold_id == wanted.hold_id))
            and wanted.reference in ("", getattr(operation, "reference", ""))
        )

    # -- The fold ---------------------------------------------------------------------------------

    def _made(self, entry: Entry) -> None:
        operation = self.operations[entry.operation_id]
        if isinstance(operation, Grant):
            self.first[operation.budget_id] = Account(
                root_id=operation.root_id,
                budget_id=operation.budget_id,
                ancestors=(),
                name=operation.name,
                unit=operation.unit,
                labels=operation.labels,
                overrun_factor=None,
                created_at=entry.at,
                custody=Custody.PRINCIPAL if operation.token_id is None else Custody.TOKEN,
                holder=operation.holder,
            )
        elif isinstance(operation, Delegate):
            parent = self.first[operation.budget_id]
            for child in operation.children:
                self.first[child.budget_id] = Account(
                    root_id=operation.root_id,
                    budget_id=child.budget_id,
                    ancestors=(parent.budget_id, *parent.ancestors),
                    name=child.name,
                    unit=parent.unit,
                    labels=child.labels,
                    overrun_factor=child.overrun_factor,
                    created_at=entry.at,
                    custody=Custody.PRINCIPAL if child.token_id is None else Custody.TOKEN,
                    holder=child.holder,
                )

    def after(self, account: Account, entry: Entry) -> Account:
        """A budget after its next entry."""
        custody, holder = account.custody, account.holder
        operation = self.operations[entry.operation_id]
        if operation.budget_id == account.budget_id:
            if isinstance(operation, Accept):
                holder = entry.principal
            elif isinstance(operation, Recover) and isinstance(operation.authority, ByRole):
                holder = operation.holder
                by_name = operation.next_token_id is None
                custody = Custody.PRINCIPAL if by_name else Custody.TOKEN
        money = Balances(*(a + b for a, b in zip(account.money, entry.effect.changes, strict=True)))
        assert money == entry.money
        effect = entry.effect
        return replace(
            account,
            custody=custody,
            holder=holder,
            money=money,
            disputed=effect.disputed,
            disputes=effect.disputes,
            holds_live=effect.holds_live,
            closed=effect.closed,
            frozen=effect.frozen,
            lease_until=effect.lease_until,
            lease_latest=effect.lease_latest,
            seq=entry.seq,
            last_at=entry.at,
            head=entry.hash,
        )


def moved_token(operation: Operation) -> bool:
    """Say whether an operation is one that a budget's own token, or its holder, was changed by."""
    if isinstance(operation, Accept | Recover):
        return True
    return isinstance(operation.authority, ByToken) and not isinstance(operation, HOLD_OPERATIONS)


def _chained(entries: Sequence[Entry]) -> list[Entry]:
    """Each entry with the hash that it follows."""
    heads: dict[bytes, bytes] = {}
    chained = []
    for entry in entries:
        previous = heads.get(entry.budget_id, GENESIS)
        chained.append(entry._replace(previous_hash=previous))
        heads[entry.budget_id] = entry.hash
    return chained
