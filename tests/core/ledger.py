"""A whole ledger in memory, over the core alone: what the tests of the core are written with.

It loads for each transaction exactly what the footprints name, as a store does, and nothing more, so
that a decision that looks at anything else fails with KeyError. What was recorded is decoded from the
entries' bytes again. After each transaction it checks what always has to hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from peculium_server.core.batch import (
    Left,
    Request,
    check_atomic,
    decide_atomic,
    decide_group,
    with_carried,
)
from peculium_server.core.encoding import decode_effect, decode_request, token_id
from peculium_server.core.footprint import Footprint
from peculium_server.core.limits import EAGER_COLLECTIONS_MAX, OPEN_HOLDS_MAX
from peculium_server.core.operations import (
    SYSTEM,
    Accept,
    Actor,
    After,
    AtomicBatch,
    Authority,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Collect,
    Delegate,
    Expire,
    Extend,
    Freeze,
    Fund,
    Grant,
    Kind,
    Lapse,
    Operation,
    Recover,
    Release,
    Renew,
    Reserve,
    Resolve,
    Return,
    Revoke,
    Role,
    Rotation,
    Settle,
    Spend,
    TopUp,
    Unfreeze,
    Withdraw,
)
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import RULES, Refusal, Refused
from peculium_server.core.state import (
    GENESIS,
    Accepted,
    Balances,
    Budget,
    Custody,
    Entry,
    Hold,
    HoldState,
    Recorded,
    Tree,
)
from peculium_server.core.verify import Finding, Verifier

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
START = 1_800_000_000 * SECOND

AGENT = Actor("agent", Role.AGENT)
OTHER = Actor("other", Role.AGENT)
ADMIN = Actor("admin", Role.ADMIN)
AUDITOR = Actor("auditor", Role.AUDITOR)

SYSTEM_KINDS = {Kind.LAPSE, Kind.EXPIRE, Kind.COLLECT}

Answer = Outcome | Refused

_K = TypeVar("_K")
_V = TypeVar("_V")
_O = TypeVar("_O", bound=Operation)


class Known(dict[_K, _V | None]):
    """A part of a tree of which everything is known: what is absent does not exist."""

    def __missing__(self, key: _K) -> None:
        return None


class WholeTree(Tree):
    """A tree of which everything is known."""

    def __init__(self, root_id: bytes) -> None:
        super().__init__(root_id)
        self.budgets = Known()
        self.holds = Known()
        self.consumed = Known()
        self.hold_tokens = Known()
        self.recorded = Known()
        self.names = Known()

    def known_budgets(self) -> list[Budget]:
        return [budget for budget in self.budgets.values() if budget is not None]

    def known_holds(self) -> list[Hold]:
        return [hold for hold in self.holds.values() if hold is not None]


class Ledger:
    """Roots, a clock, a journal of entries, and makers of ids and tokens.

    `eager` is how many budgets with something available are loaded below a closing one: the rest is
    left to Collect.
    """

    def __init__(self, *, eager: int = EAGER_COLLECTIONS_MAX, checked: bool = True) -> None:
        self.now = START
        self.eager = eager
        self.restored = False
        self.checked = checked
        self.trees: dict[bytes, WholeTree] = {}
        self.journal: list[Entry] = []
        self.position = 0
        self._made = 0
        self._consumed: set[tuple[bytes, bytes]] = set()

    # -- Makers ---------------------------------------------------------------------------------

    def id(self, version: int = 7) -> bytes:
        """A new UUID of the ledger's time."""
        self._made += 1
        low = self._made.to_bytes(9)
        milliseconds = (self.now // 1000).to_bytes(6)
        return milliseconds + bytes((version << 4, low[0], 0x80)) + low[2:]

    def token(self) -> bytes:
        """The token id of a new secret."""
        self._made += 1
        return token_id(self._made.to_bytes(32))

    def pass_time(self, microseconds: int) -> None:
        self.now += microseconds

    # -- Asking ---------------------------------------------------------------------------------

    def do(self, operation: Operation, actor: Actor | None = None) -> Outcome:
        """Ask for one operation, which has to be accepted."""
        answer = self.ask(operation, actor)
        assert isinstance(answer, Outcome), answer.message
        return answer

    def refuse(
        self, operation: Operation, reason: Refusal, actor: Actor | None = None
    ) -> dict[str, str]:
        """Ask for one operation, which has to be refused for a reason; its facts."""
        answer = self.ask(operation, actor)
        assert isinstance(answer, Refused), f"was accepted, not {reason.name}"
        assert answer.reason is reason, answer.message
        assert answer.message.startswith(RULES[reason].sentence)
        return answer.facts

    def ask(self, operation: Operation, actor: Actor | None = None) -> Answer:
        return self.batch([operation], actor)[0]

    def batch(self, operations: Sequence[Operation], actor: Actor | None = None) -> list[Answer]:
        """Ask for several operations in one request; answers in the same order."""
        return self.transaction([operations], actor)[0]

    def transaction(
        self, requests: Sequence[Sequence[Operation]], actor: Actor | None = None
    ) -> list[list[Answer]]:
        """Decide several requests on what is loaded once, as a lane does, and commit it."""
        groups = [self._group(operations, 0, actor) for operations in requests]
        return self._transaction(groups, [{} for _ in requests])

    def atomic(
        self,
        operations: Sequence[Operation],
        *,
        batch_id: bytes | None = None,
        actor: Actor | None = None,
    ) -> list[Answer]:
        """Ask for several operations as one atomic batch; answers in the same order."""
        batch = AtomicBatch(batch_id or self.id(), len(operations))
        named = [replace(operation, batch=batch) for operation in operations]
        group = self._group(named, 0, actor)
        refused = check_atomic(group)
        if refused is not None:
            return refused
        loaded = self.load(named)
        before = {root_id: _copied(tree) for root_id, tree in loaded.items()}
        positions = {0: self.position}
        answers, accepted = decide_atomic(loaded, group, self.now, lambda _: 0, positions)
        if not accepted:
            after = {root_id: _copied(tree) for root_id, tree in loaded.items()}
            assert after == before, "a refusal or a replay has changed something"
        assert positions == {0: self.position + len(accepted)}
        for each in accepted:
            self.commit(each)
        return answers

    def cut_batch(
        self, operations: Sequence[Operation], after: int, actor: Actor | None = None
    ) -> list[Answer]:
        """As `batch`, but in two transactions, the first of so many operations."""
        left: Left = {}
        first = self._transaction([self._group(operations[:after], 0, actor)], [left])[0]
        rest = self._group(operations[after:], after, actor)
        return first + self._transaction([rest], [left])[0]

    def _group(
        self, operations: Sequence[Operation], first: int, actor: Actor | None
    ) -> list[Request]:
        return [
            Request(operation, actor or self.actor(operation), index)
            for index, operation in enumerate(operations, start=first)
        ]

    def _transaction(
        self, groups: Sequence[Sequence[Request]], carried: Sequence[Left]
    ) -> list[list[Answer]]:
        loaded = self.load(
            [
                with_carried(request.operation, left)
                for group, left in zip(groups, carried, strict=True)
                for request in group
            ]
        )
        before = {root_id: _copied(tree) for root_id, tree in loaded.items()}
        answers: list[list[Answer]] = []
        accepted: list[Accepted] = []
        for group, left in zip(groups, carried, strict=True):
            position = self.position + len(accepted)
            told, more = decide_group(loaded, group, self.now, position, left)
            answers.append(told)
            accepted += more
        if not accepted:
            after = {root_id: _copied(tree) for root_id, tree in loaded.items()}
            assert after == before, "a refusal or a replay has changed something"
        for each in accepted:
            self.commit(each)
        return answers

    def actor(self, operation: Operation) -> Actor:
        """Whoever may be expected to ask for the operation."""
        if operation.kind in SYSTEM_KINDS:
            return SYSTEM
        if isinstance(operation.authority, ByRole):
            return ADMIN
        tree = self.trees.get(operation.root_id)
        budget = tree and tree.budgets[operation.budget_id]
        return Actor(budget.holder, Role.AGENT) if budget and budget.holder else AGENT

    # -- A store in memory ------------------------------------------------------------------------

    def load(self, operations: Sequence[Operation]) -> dict[bytes, Tree]:
        """What the operations' footprints name, and nothing else."""
        footprints: dict[bytes, Footprint] = {}
        for operation in operations:
            footprints.setdefault(operation.root_id, Footprint()).add(operation)
        return {root_id: self._load(root_id, named) for root_id, named in footprints.items()}

    def _load(self, root_id: bytes, named: Footprint) -> Tree:
        whole = self.trees.get(root_id) or WholeTree(root_id)
        tree = Tree(root_id)
        tree.restored = self.restored
        wanted = set(named.budgets)
        for top in named.subtrees:
            free = sorted(
                (budget for budget in whole.below(top) if budget.money.available),
                key=lambda budget: (len(budget.ancestors), budget.budget_id),
            )
            wanted |= {budget.budget_id for budget in free[: self.eager]}
        for budget_id in list(wanted):
            budget = whole.budgets[budget_id]
            wanted |= set(budget.ancestors) if budget else set()
        tree.budgets = {budget_id: whole.budgets[budget_id] for budget_id in wanted}
        for top in named.subtrees:
            unknown = [each for each in whole.below(top) if each.budget_id not in wanted]
            tree.pending[top] = sum(each.money.available for each in unknown)
            open_children = (
                each.budget_id for each in unknown if each.parent_id == top and not each.closed
            )
            tree.open_child[top] = next(open_children, None)
        tree.holds = {hold_id: whole.holds[hold_id] for hold_id in named.holds}
        tree.consumed = {key: whole.consumed[key] for key in named.tokens}
        tree.hold_tokens = {key: _open_hold_with(whole, key) for key in named.tokens}
        tree.recorded = {
            operation_id: self._recorded(root_id, operation_id) for operation_id in named.operations
        }
        tree.names = {
            (parent_id, name): self._named(whole, parent_id, name)
            for parent_id, name in named.names
        }
        tree.open_holds = {
            budget_id: _open_holds(whole, budget_id, OPEN_HOLDS_MAX)
            for budget_id in named.open_holds
        }
        return tree

    def _named(self, whole: WholeTree, parent_id: bytes | None, name: str) -> bytes | None:
        if parent_id is not None:
            return whole.names[parent_id, name]
        return next((tree.root_id for tree in self.trees.values() if tree.names[None, name]), None)

    def _recorded(self, root_id: bytes, operation_id: bytes) -> Recorded | None:
        entries = tuple(
            reread(entry)
            for entry in self.journal
            if (entry.root_id, entry.operation_id) == (root_id, operation_id)
        )
        if not entries:
            return None
        return Recorded(requested(entries[0]), entries[0].principal, entries)

    def commit(self, accepted: Accepted) -> None:
        """Save what was accepted, as a store would: everything that it says and nothing else."""
        root_id = accepted.operation.root_id
        whole = self.trees.setdefault(root_id, WholeTree(root_id))
        assert not accepted.operation.dry_run
        self.position += 1
        for entry in accepted.entries:
            self._check_entry(whole, entry)
        self.journal += accepted.entries
        whole.apply(accepted)
        if self.checked:
            self.check(root_id)

    # -- What always has to hold --------------------------------------------------------------------

    def _check_entry(self, whole: WholeTree, entry: Entry) -> None:
        assert entry.position == self.position
        if entry.consumed is not None:
            key = entry.budget_id, entry.consumed
            assert key not in self._consumed, "a token was consumed twice"
            self._consumed.add(key)
        if not self.checked:
            return
        assert reread(entry) == entry
        assert (entry.request is None) == (entry.part > 0)
        previous = next(
            (one for one in reversed(self.journal) if one.budget_id == entry.budget_id), None
        )
        if entry.part:
            # Earlier parts of the same operation are not in the journal yet.
            return
        budget = whole.budgets[entry.budget_id]
        assert (previous.hash if previous else GENESIS) == (budget.head if budget else GENESIS)

    def check(self, root_id: bytes) -> None:
        """The money equation, the sums over the tree and its holds, and the chain of hashes."""
        tree = self.trees[root_id]
        budgets, holds = tree.known_budgets(), tree.known_holds()
        for budget in budgets:
            self._check_budget(tree, budget, [h for h in holds if h.budget_id == budget.budget_id])
        root = tree.budget(root_id)
        assert root.money.granted == (
            sum(
                each.money.available + each.money.held + each.money.spent + each.money.forfeited
                for each in budgets
            )
            - root.money.overrun
        )
        self._check_chain(root_id)

    def _check_budget(self, tree: WholeTree, budget: Budget, holds: list[Hold]) -> None:
        money = budget.money
        assert min(money) >= 0
        assert money.granted == (
            money.available
            + money.held
            + money.delegated
            + money.spent
            + money.forfeited
            - money.overrun
        )
        assert money.advanced <= money.granted
        assert not money.overrun or budget.is_root
        assert not (money.overrun and money.available)
        assert not (budget.is_root and money.advanced)
        if not any(level.closed for level in tree.line(budget)):
            assert not (money.advanced and money.available), "a child lives on its parent's money"
        children = [each for each in tree.known_budgets() if each.parent_id == budget.budget_id]
        assert money.delegated == sum(child.money.granted for child in children)
        live = [hold for hold in holds if hold.state is HoldState.LIVE]
        lapsed = [hold for hold in holds if hold.state is HoldState.LAPSED]
        assert money.held == sum(hold.remaining for hold in live)
        assert money.forfeited == sum(hold.remaining for hold in lapsed)
        assert money.spent >= sum(hold.booked for hold in holds)
        assert budget.holds_live == len(live)
        assert budget.disputes == sum(hold.state is HoldState.DISPUTED for hold in holds)
        assert budget.disputed == sum(hold.disputed for hold in holds)
        for hold in holds:
            assert (hold.disputed > 0) == (hold.state is HoldState.DISPUTED)
            assert 0 <= hold.remaining <= hold.amount
            assert hold.settleable or not hold.remaining

    def _check_chain(self, root_id: bytes) -> None:
        heads: dict[bytes, tuple[int, bytes, int]] = {}
        for entry in self.journal:
            if entry.root_id != root_id:
                continue
            seq, head, at = heads.get(entry.budget_id, (0, GENESIS, 0))
            assert entry.seq == seq + 1
            assert entry.previous_hash == head
            assert entry.at >= at
            part = entry.part.to_bytes(2)
            chained = hashlib.sha256(b"peculium.entry.v1\x00" + head + entry.digest + part)
            assert entry.hash == chained.digest()
            heads[entry.budget_id] = entry.seq, entry.hash, entry.at
        for budget in self.trees[root_id].known_budgets():
            assert (budget.seq, budget.head, budget.last_at) == heads[budget.budget_id]

    def verify(self, root_id: bytes) -> Finding | None:
        """What an auditor finds in the journal and the rows of a tree."""
        return verify(
            [entry for entry in self.journal if entry.root_id == root_id],
            self.trees[root_id].known_budgets(),
            self.trees[root_id].known_holds(),
            root_id,
        )

    # -- Setting up ---------------------------------------------------------------------------------

    def grant(
        self, amount: int = 100, *, holder: str | None = None, by_token: bool = True, **changes: Any
    ) -> Node:
        """Make a root, by default a bearer's."""
        operation = self.ask_grant(amount, holder=holder, by_token=by_token, **changes)
        self.do(operation)
        return Node(self, operation.root_id, operation.root_id)

    def ask_grant(
        self, amount: int = 100, *, holder: str | None = None, by_token: bool = True, **changes: Any
    ) -> Grant:
        root_id = self.id()
        grant = Grant(
            operation_id=self.id(),
            root_id=root_id,
            budget_id=root_id,
            authority=ByRole(),
            name=f"root-{self._made}",
            unit="usd_nanos",
            amount=amount,
            token_id=self.token() if by_token else None,
            holder=holder,
        )
        return replace(grant, **changes)


@dataclass(frozen=True)
class Node:
    """One budget of a ledger. Its methods make operations on it, by its live authority.

    `changes` replaces fields of the operation. `child` and `hold` also do what they make.
    """

    ledger: Ledger
    root_id: bytes
    id: bytes

    def __repr__(self) -> str:
        return f"<budget {int.from_bytes(self.id[9:])}>"

    @property
    def tree(self) -> WholeTree:
        return self.ledger.trees[self.root_id]

    @property
    def budget(self) -> Budget:
        return self.tree.budget(self.id)

    @property
    def money(self) -> Balances:
        return self.budget.money

    @property
    def authority(self) -> Authority:
        budget = self.budget
        if budget.custody is Custody.PRINCIPAL:
            return ByHolder()
        return ByToken(budget.token or self.ledger.token())

    def child(self, amount: int = 50, **changes: Any) -> Node:
        """Delegate to one child, by default a bearer's."""
        child = self.spec(amount, **changes)
        self.ledger.do(self.delegate(child))
        return Node(self.ledger, self.root_id, child.budget_id)

    def hold(self, amount: int = 10, **changes: Any) -> HoldRef:
        """Reserve."""
        reserve = self.reserve(amount, **changes)
        self.ledger.do(reserve)
        return HoldRef(self, reserve.hold_id)

    def spec(self, amount: int = 50, *, by_token: bool = True, **changes: Any) -> Child:
        budget_id = self.ledger.id()
        child = Child(
            budget_id=budget_id,
            name=f"child-{budget_id.hex()}",
            amount=amount,
            token_id=self.ledger.token() if by_token else None,
        )
        return replace(child, **changes)

    # -- Operations -------------------------------------------------------------------------------

    def reserve(self, amount: int = 10, *, ttl_us: int = 10 * MINUTE, **changes: Any) -> Reserve:
        return self._make(
            Reserve,
            changes,
            amount=amount,
            ttl_us=ttl_us,
            hold_id=self.ledger.id(),
            hold_token_id=self.ledger.token(),
        )

    def spend(self, amount: int = 10, **changes: Any) -> Spend:
        return self._make(Spend, changes, amount=amount)

    def delegate(self, *children: Child, **changes: Any) -> Delegate:
        return self._make(Delegate, changes, children=children)

    def accept(self, **changes: Any) -> Accept:
        return self._make(Accept, {"next_token_id": self.ledger.token()} | changes)

    def recover(self, **changes: Any) -> Recover:
        """By the holder."""
        changes = {"authority": ByHolder(), "next_token_id": self.ledger.token()} | changes
        return self._make(Recover, changes)

    def fund(self, descendant: Node, amount: int = 10, **changes: Any) -> Fund:
        return self._make(Fund, changes, descendant_id=descendant.id, amount=amount)

    def renew(self, lease_us: int = HOUR, **changes: Any) -> Renew:
        return self._make(Renew, changes, lease_us=lease_us)

    def give_back(self, amount: int, **changes: Any) -> Return:
        return self._make(Return, changes, amount=amount)

    def return_all(self, **changes: Any) -> Return:
        return self._make(Return, {"next_token_id": None} | changes)

    def revoke(self, descendant: Node, **changes: Any) -> Revoke:
        return self._make(Revoke, changes, descendant_id=descendant.id)

    def resolve(self, hold: HoldRef, actual: int, **changes: Any) -> Resolve:
        """By the budget's own authority."""
        reason = {"reason": "the bill says so"}
        return self._make(Resolve, reason | changes, hold_id=hold.id, actual=actual)

    def top_up(self, amount: int = 10, **changes: Any) -> TopUp:
        return self._make_by_role(TopUp, changes, amount=amount)

    def withdraw(self, amount: int = 10, **changes: Any) -> Withdraw:
        return self._make_by_role(Withdraw, changes, amount=amount)

    def freeze(self, **changes: Any) -> Freeze:
        return self._make_by_role(Freeze, changes)

    def unfreeze(self, **changes: Any) -> Unfreeze:
        return self._make_by_role(Unfreeze, changes)

    def admin_recover(self, **changes: Any) -> Recover:
        return self._make_by_role(Recover, {"next_token_id": self.ledger.token()} | changes)

    def admin_resolve(self, hold: HoldRef, actual: int, **changes: Any) -> Resolve:
        reason = {"reason": "the bill says so"}
        return self._make_by_role(Resolve, reason | changes, hold_id=hold.id, actual=actual)

    def expire(self, **changes: Any) -> Expire:
        return self._make_by_role(Expire, changes)

    def collect(self, **changes: Any) -> Collect:
        return self._make_by_role(Collect, changes)

    def _make(self, type_: type[_O], changes: dict[str, Any], **fields: Any) -> _O:
        """An operation by the budget's authority, with its next token if that needs one."""
        authority = changes.get("authority") or self.authority
        fields = {"authority": authority} | fields | changes
        if isinstance(authority, ByToken | After):
            fields.setdefault("next_token_id", self.ledger.token())
        return self.make(type_, fields)

    def _make_by_role(self, type_: type[_O], changes: dict[str, Any], **fields: Any) -> _O:
        return self.make(type_, {"authority": ByRole()} | fields | changes)

    def make(self, type_: type[_O], fields: dict[str, Any]) -> _O:
        header = {
            "operation_id": self.ledger.id(8 if type_.kind in SYSTEM_KINDS else 7),
            "root_id": self.root_id,
            "budget_id": self.id,
        }
        return type_(**(header | fields))


@dataclass(frozen=True)
class HoldRef:
    """One hold of a ledger. Its methods make operations on it, by its live token."""

    node: Node
    id: bytes

    def __repr__(self) -> str:
        return f"<hold {int.from_bytes(self.id[9:])} of {self.node}>"

    @property
    def hold(self) -> Hold:
        hold = self.node.tree.holds[self.id]
        assert hold is not None
        return hold

    def settle(self, actual: int | None = None, **changes: Any) -> Settle:
        if changes.get("keep_open"):
            changes = {"next_hold_token_id": self.node.ledger.token()} | changes
        return self._made(Settle, changes, actual=actual)

    def release(self, **changes: Any) -> Release:
        return self._made(Release, changes)

    def extend(self, ttl_us: int = 10 * MINUTE, **changes: Any) -> Extend:
        changes = {"next_hold_token_id": self.node.ledger.token()} | changes
        return self._made(Extend, changes, ttl_us=ttl_us)

    def lapse(self, **changes: Any) -> Lapse:
        return self._made(Lapse, {"authority": ByRole()} | changes)

    def rotation(self) -> Rotation:
        return Rotation(hold_id=self.id, next_token_id=self.node.ledger.token())

    def _made(self, type_: type[_O], changes: dict[str, Any], **fields: Any) -> _O:
        # A chained operation may name a hold that an earlier one of its batch makes.
        authority = changes.get("authority") or ByToken(self.hold.token)
        fields = {"authority": authority, "hold_id": self.id} | fields | changes
        return self.node.make(type_, fields)


# -- Entries and trees --------------------------------------------------------------------------------


def requested(first: Entry) -> Operation:
    """The operation, decoded from part 0 of its entries."""
    assert first.request is not None
    return decode_request(
        kind=first.kind,
        root_id=first.root_id,
        budget_id=first.budget_id,
        operation_id=first.operation_id,
        trace_id=first.trace_id,
        consumed=first.consumed,
        request=first.request,
    )


def reread(entry: Entry) -> Entry:
    """An entry with its effect decoded from its bytes."""
    return entry._replace(effect=decode_effect(entry.effect_bytes, entry.budget_id))


def verify(
    entries: Sequence[Entry], budgets: Sequence[Budget], holds: Sequence[Hold], root_id: bytes
) -> Finding | None:
    """What an auditor of a root finds who is shown these."""
    verifier = Verifier(root_id)
    for entry in entries:
        verifier.entry(entry)
    for budget in budgets:
        verifier.budget(budget)
    for hold in holds:
        verifier.hold(hold)
    return verifier.finish()


def _copied(tree: Tree) -> dict[str, Any]:
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(tree).items()
    }


def _open_hold_with(whole: WholeTree, key: tuple[bytes, bytes]) -> bytes | None:
    hold_id = whole.hold_tokens[key]
    hold = whole.holds[hold_id] if hold_id else None
    return hold_id if hold and hold.settleable and hold.token == key[1] else None


def _open_holds(whole: WholeTree, budget_id: bytes, most: int) -> tuple[Hold, ...]:
    holds = [
        hold for hold in whole.known_holds() if hold.budget_id == budget_id and hold.settleable
    ]
    return tuple(sorted(holds, key=lambda hold: hold.hold_id)[:most])
