"""Random trees and operations against the model, with everything checked after each step.

The ledger itself checks the money equation, the sums over the tree, that no token is consumed twice, the
chain of hashes, and that what was refused has changed nothing; here it is compared with the model, and at
the end an auditor verifies the journal and finds what was altered in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from peculium_server.core.limits import HOLD_AGE_US_MAX
from peculium_server.core.operations import (
    HOLD_OPERATIONS,
    Actor,
    ByHolder,
    ByRole,
    ByToken,
    Child,
    Kind,
    Operation,
    Role,
)
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.core.state import Custody, HoldState
from tests.core.ledger import DAY, HOUR, MINUTE, SYSTEM_KINDS, HoldRef, Ledger, Node
from tests.core.model import Model, ModelBudget, ModelHold
from tests.core.offline.exported import Exported
from tests.core.tampering import tampered, tampered_rows

R = Refusal
DEPTH_MAX = 5

WEIGHTS = {
    "settle": 6,
    "reserve_or_spend": 5,
    "release": 2,
    "extend": 1,
    "lapse": 3,
    "resolve": 3,
    "delegate": 3,
    "accept": 1,
    "recover": 2,
    "fund": 3,
    "renew": 1,
    "give_back": 2,
    "return_all": 2,
    "revoke": 1,
    "expire": 1,
    "collect": 2,
    "freeze_or_unfreeze": 1,
    "pass_time": 3,
    "top_up_or_withdraw": 2,
    "replay": 3,
}
STEPS_TAKEN = [name for name, weight in WEIGHTS.items() for _ in range(weight)]
AMOUNTS = st.sampled_from([5, 1, 2, 10, 20, 40, 100, 0, -1, 2**62])
ACTUALS = st.sampled_from([30, 60, 0, 1, 3, 10, 150, 500, 10**6])
FACTORS = st.sampled_from([1, 0, 3, 30])
LEASES = st.sampled_from([None, HOUR, 30 * DAY])
HELD = st.sampled_from(["bearer", "bound", "principal"])
STEPS = st.sampled_from([11 * MINUTE, MINUTE, HOUR])


class Machine(RuleBasedStateMachine):
    """One root, some budgets below it, and some holds."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.nodes: list[Node] = []
        self.holds: list[HoldRef] = []
        self.done: list[tuple[Operation, Actor, Outcome]] = []

    @initialize(
        data=st.data(),
        parents=st.lists(st.integers(0, 5), min_size=2, max_size=6),
        eager=st.sampled_from([0, 1, 64]),
    )
    def begin(self, data: st.DataObject, parents: list[int], eager: int) -> None:
        """A tree in which little is available, so that debts are common."""
        self.ledger.eager = eager
        self.root = self.ledger.grant(256, **_holder(data.draw(HELD, "held")))
        self.model = Model(self.root.id, 256)
        self.model.budgets[self.root.id] = ModelBudget(None, 256)
        self.nodes.append(self.root)
        for parent in parents:
            node = self.nodes[parent % len(self.nodes)]
            factor = data.draw(FACTORS, "factor")
            spec = node.spec(
                node.money.available // 2,
                overrun_factor=factor,
                lease_us=data.draw(LEASES, "lease"),
                **_holder(data.draw(HELD, "held")),
            )
            self.ledger.do(node.delegate(spec))
            self._made(node, spec)
        for node in self.nodes:
            amount = data.draw(st.integers(0, node.money.available // 2), "held")
            if amount:
                self._held(node, node.hold(amount).id)

    def _made(self, node: Node, spec: Child) -> None:
        parent = self.model.budgets[node.id]
        parent.own -= spec.amount
        until = spec.lease_us and self.ledger.now + spec.lease_us
        latest = spec.lease_us and self.ledger.now + (spec.lease_latest_us or spec.lease_us)
        self.model.budgets[spec.budget_id] = ModelBudget(
            node.id,
            spec.amount,
            spec.overrun_factor,
            lease=_earlier(until, parent.lease),
            latest=_earlier(latest, parent.latest),
        )
        self.nodes.append(Node(self.ledger, self.root.id, spec.budget_id))

    def _held(self, node: Node, hold_id: bytes) -> None:
        ref = HoldRef(node, hold_id)
        hold = ref.hold
        self.model.budgets[node.id].own -= hold.amount
        self.model.holds[hold_id] = ModelHold(
            node.id, hold.amount, hold.amount, hold.created_at, hold.expires_at
        )
        self.holds.append(ref)

    @rule(data=st.data(), what=st.sampled_from(STEPS_TAKEN))
    def step(self, data: st.DataObject, what: str) -> None:
        if not self.holds and what in ("settle", "release", "extend", "lapse", "resolve"):
            what = "reserve_or_spend"
        getattr(self, what)(data)

    # -- Asking ---------------------------------------------------------------------------------------

    def node(self, data: st.DataObject) -> Node:
        return data.draw(st.sampled_from(self.nodes), "budget")

    def pair(self, data: st.DataObject) -> tuple[Node, Node]:
        """Two budgets, most often one above the other."""
        node = self.node(data)
        above = [other for other in self.nodes if other.id in self.model.above(node.id)]
        if above and data.draw(st.integers(0, 3), "unrelated") < 3:
            return data.draw(st.sampled_from(above), "above"), node
        return self.node(data), node

    def hold(self, data: st.DataObject) -> HoldRef:
        """A hold, most often one that can still be settled."""
        open_ones = [hold for hold in self.holds if hold.hold.settleable]
        any_one = not open_ones or data.draw(st.integers(0, 4), "any") == 4
        some = self.holds if any_one else open_ones
        return data.draw(st.sampled_from(some), "hold")

    def usable(self, node: Node, *refusals: Refusal | None) -> list[Refusal | None]:
        """What is to be expected of an operation by the budget's own authority."""
        budget = node.budget
        returned = budget.custody is Custody.TOKEN and budget.token is None
        return [R.CAPABILITY_UNKNOWN if returned else None, *refusals]

    def ask(
        self, data: st.DataObject, operation: Operation, expected: list[Refusal | None]
    ) -> Outcome | None:
        """Ask for it, or for something that is wrong with it besides; None if it was refused."""
        actor = self.ledger.actor(operation)
        reasons = [reason for reason in expected if reason is not None]
        wrong = data.draw(st.sampled_from(WRONG), "wrong")
        spoiled, who = self._spoil(data, wrong, operation, actor)
        if (spoiled, who) != (operation, actor):
            assert wrong is not None
            if wrong is R.TOKEN_CONSUMED:
                # Of a budget that was returned, no token is live, but those that were are known.
                reasons = [reason for reason in reasons if reason is not R.CAPABILITY_UNKNOWN]
            reasons.append(wrong)
        answer = self.ledger.ask(spoiled, who)
        if reasons:
            assert isinstance(answer, Refused), (reasons, operation)
            assert answer.reason is min(reasons), (answer.message, reasons, operation)
            return None
        assert isinstance(answer, Outcome), (answer.message, operation)
        self.done.append((operation, actor, answer))
        return answer

    def _spoil(
        self, data: st.DataObject, wrong: Refusal | None, operation: Operation, actor: Actor
    ) -> tuple[Operation, Actor]:
        """The operation and who asks for it, with something wrong if that can be."""
        if wrong is R.PERMISSION_DENIED:
            return operation, replace(actor, role=Role.AUDITOR)
        if wrong is R.CAPABILITY_UNKNOWN and isinstance(operation.authority, ByHolder):
            return operation, replace(actor, principal="somebody else")
        changes = dict(self._spoiled_fields(data, wrong, operation))
        return replace(operation, **changes), actor

    def _spoiled_fields(
        self, data: st.DataObject, wrong: Refusal | None, operation: Operation
    ) -> Iterator[tuple[str, Any]]:
        by_token = isinstance(operation.authority, ByToken)
        consumed = self._consumed(operation.budget_id)
        if wrong is R.MALFORMED:
            yield "labels", (("", ""),)
        elif wrong is R.BUDGET_UNKNOWN and isinstance(operation.authority, ByRole):
            yield "budget_id", self.ledger.id()
        elif wrong is R.CAPABILITY_UNKNOWN and by_token:
            yield "authority", ByToken(self.ledger.token())
        elif wrong is R.OPERATION_ID_REUSED:
            # Clients and the ledger itself cannot even try to use each other's.
            of_system = operation.kind in SYSTEM_KINDS
            used = [
                entry.operation_id
                for entry in self.ledger.journal
                if (entry.kind in SYSTEM_KINDS) is of_system
            ]
            if used:
                yield "operation_id", data.draw(st.sampled_from(used), "reused")
                yield "labels", (("other", "content"),)
        elif wrong is R.TOKEN_CONSUMED and by_token and consumed:
            yield "authority", ByToken(data.draw(st.sampled_from(consumed), "consumed"))
        elif wrong is R.TOKEN_ID_REUSED and consumed:
            field = (
                "next_hold_token_id" if isinstance(operation, HOLD_OPERATIONS) else "next_token_id"
            )
            if getattr(operation, field, None) is not None:
                yield field, data.draw(st.sampled_from(consumed), "seen")

    def _consumed(self, budget_id: bytes) -> list[bytes]:
        return [
            entry.consumed
            for entry in self.ledger.journal
            if entry.budget_id == budget_id and entry.consumed is not None
        ]

    # -- The operations -------------------------------------------------------------------------------

    def top_up_or_withdraw(self, data: st.DataObject) -> None:
        amount = data.draw(AMOUNTS, "amount")
        node = self.node(data)
        adds = data.draw(st.booleans(), "adds")
        refused = [
            None if 1 <= amount < 2**62 else R.MALFORMED,
            None if node == self.root else R.ONLY_FOR_ROOTS,
            None if adds else self.model.lacks(node.id, amount),
        ]
        if self.ask(data, node.top_up(amount) if adds else node.withdraw(amount), refused):
            self.model.budgets[node.id].own += amount if adds else -amount
            self.model.granted += amount if adds else -amount

    def reserve_or_spend(self, data: st.DataObject) -> None:
        amount = data.draw(AMOUNTS, "amount")
        spends = data.draw(st.booleans(), "spends")
        node = self.node(data)
        kind = Kind.SPEND if spends else Kind.RESERVE
        refused = self.usable(
            node,
            None if 1 <= amount < 2**62 else R.MALFORMED,
            self.model.state_refuses(kind, node.id, self.ledger.now),
            self.model.lacks(node.id, amount),
        )
        reserve = node.reserve(amount)
        if self.ask(data, node.spend(amount) if spends else reserve, refused):
            if spends:
                self.model.budgets[node.id].own -= amount
                self.model.budgets[node.id].spent += amount
            else:
                self._held(node, reserve.hold_id)

    def settle(self, data: st.DataObject) -> None:
        actual = data.draw(st.none() | ACTUALS, "actual")
        keep_open = data.draw(st.booleans(), "keep_open")
        hold = self.hold(data)
        told = self.model.holds[hold.id]
        keep_open = keep_open and actual is not None
        refused = [
            None if hold.hold.settleable else R.TOKEN_CONSUMED,
            self.model.state_refuses(Kind.EXTEND, told.budget, self.ledger.now)
            if keep_open
            else None,
            R.HOLD_LAPSED if keep_open and told.state is HoldState.LAPSED else None,
        ]
        if not self.ask(data, hold.settle(actual, keep_open=keep_open), refused):
            return
        actual = told.remaining if actual is None else actual
        if keep_open and actual <= told.remaining:
            told.remaining -= actual
            told.booked += actual
            self.model.budgets[told.budget].spent += actual
        else:
            self.model.end(hold.id, told.booked + actual, limited=True)

    def release(self, data: st.DataObject) -> None:
        hold = self.hold(data)
        refused = [None if hold.hold.settleable else R.TOKEN_CONSUMED]
        if self.ask(data, hold.release(), refused):
            told = self.model.holds[hold.id]
            self.model.end(hold.id, told.booked, limited=True)
            if not told.booked:
                told.state = HoldState.RELEASED

    def extend(self, data: st.DataObject) -> None:
        ttl = data.draw(st.sampled_from([MINUTE, HOUR, HOLD_AGE_US_MAX]), "ttl")
        hold = self.hold(data)
        told = self.model.holds[hold.id]
        refused = [
            None if hold.hold.settleable else R.TOKEN_CONSUMED,
            self.model.state_refuses(Kind.EXTEND, told.budget, self.ledger.now),
            R.HOLD_LAPSED if told.state is HoldState.LAPSED else None,
        ]
        if self.ask(data, hold.extend(ttl), refused):
            told.expires = min(self.ledger.now + ttl, told.created + HOLD_AGE_US_MAX)

    def lapse(self, data: st.DataObject) -> None:
        hold = self.hold(data)
        told = self.model.holds[hold.id]
        if data.draw(st.integers(0, 4), "too early") < 4:
            self.ledger.now = max(self.ledger.now, told.expires)
        refused = [
            None if told.state is HoldState.LIVE else R.HOLD_ENDED,
            None if told.expires <= self.ledger.now else R.NOT_DUE,
        ]
        if self.ask(data, hold.lapse(), refused):
            told.state = HoldState.LAPSED

    def resolve(self, data: st.DataObject) -> None:
        actual = data.draw(ACTUALS, "actual")
        by_admin = data.draw(st.booleans(), "by_admin")
        hold = self.hold(data)
        other = data.draw(st.integers(0, 7), "in another's name") == 7
        node = self.node(data) if other else hold.node
        told = self.model.holds[hold.id]
        is_open = told.state in (HoldState.LIVE, HoldState.LAPSED)
        refused = [
            None if told.budget == node.id else R.HOLD_UNKNOWN,
            None if is_open or by_admin else R.HOLD_ENDED,
        ]
        if by_admin:
            resolve = node.admin_resolve(hold, actual)
        else:
            resolve = node.resolve(hold, actual)
            refused = self.usable(node, *refused)
        if self.ask(data, resolve, refused):
            self.model.end(hold.id, actual, limited=not by_admin)

    def delegate(self, data: st.DataObject) -> None:
        amounts = data.draw(st.lists(AMOUNTS, min_size=1, max_size=3), "amounts")
        factor = data.draw(FACTORS, "factor")
        lease = data.draw(LEASES, "lease")
        node = self.node(data)
        now = self.ledger.now
        if len(node.budget.ancestors) + 1 >= DEPTH_MAX:
            return
        specs = [
            node.spec(
                amount,
                overrun_factor=factor,
                lease_us=lease,
                lease_latest_us=lease and 2 * lease,
                **_holder(data.draw(HELD, "held")),
            )
            for amount in amounts
        ]
        refused = self.usable(
            node,
            None if all(0 <= amount < 2**62 for amount in amounts) else R.MALFORMED,
            self.model.state_refuses(Kind.DELEGATE, node.id, now),
            self.model.lacks(node.id, sum(amounts)),
        )
        if not self.ask(data, node.delegate(*specs), refused):
            return
        for spec in specs:
            self._made(node, spec)

    def accept(self, data: st.DataObject) -> None:
        node = self.node(data)
        by_name = isinstance(node.authority, ByHolder)
        refused = self.usable(
            node,
            R.NOT_TOKEN_HELD if by_name else None,
            self.model.state_refuses(Kind.ACCEPT, node.id, self.ledger.now),
        )
        self.ask(data, node.accept(), refused)

    def recover(self, data: st.DataObject) -> None:
        by_admin = data.draw(st.booleans(), "by_admin")
        held = data.draw(st.sampled_from(["bearer", "principal"]), "held")
        node = self.node(data)
        own = [hold for hold in self.holds if hold.node.id == node.id]
        some = own if data.draw(st.integers(0, 3), "of any budget") else self.holds
        lists = st.lists(st.sampled_from(some), max_size=2, unique=True) if some else st.just([])
        holds = data.draw(lists, "rotated")
        refused: list[Refusal | None] = [
            None if hold.node.id == node.id else R.HOLD_UNKNOWN for hold in holds
        ]
        refused += [None if hold.hold.settleable else R.HOLD_ENDED for hold in holds]
        rotations = tuple(hold.rotation() for hold in holds)
        if by_admin:
            token = self.ledger.token() if held == "bearer" else None
            holder = None if held == "bearer" else "agent"
            recover = node.admin_recover(next_token_id=token, holder=holder, holds=rotations)
        else:
            recover = node.recover(holds=rotations)
            refused.append(None if node.budget.holder else R.CAPABILITY_UNKNOWN)
            if isinstance(node.authority, ByHolder):
                refused.append(R.NOT_TOKEN_HELD)
        outcome = self.ask(data, recover, refused)
        if outcome:
            told = [
                key
                for key, hold in self.model.holds.items()
                if hold.budget == node.id and hold.state in (HoldState.LIVE, HoldState.LAPSED)
            ]
            assert [hold.hold_id for hold in outcome.holds] == sorted(told)

    def fund(self, data: st.DataObject) -> None:
        amount = data.draw(AMOUNTS, "amount")
        lease = data.draw(st.none() | st.sampled_from([HOUR, 5 * HOUR]), "lease")
        node, target = self.pair(data)
        refused = self.usable(
            node,
            None if 0 <= amount < 2**62 else R.MALFORMED,
            None if node.id in self.model.above(target.id) else R.DESCENDANT_UNKNOWN,
            self.model.state_refuses(Kind.FUND, target.id, self.ledger.now),
            self.model.lacks(node.id, amount),
        )
        if not self.ask(data, node.fund(target, amount, lease_us=lease), refused):
            return
        self.model.budgets[node.id].own -= amount
        told = self.model.budgets[target.id]
        told.own += amount
        if lease:
            parent = self.model.line(target.id)[1]
            told.lease = _earlier(self.ledger.now + lease, parent.lease)
            assert told.lease is not None
            told.latest = max(told.lease, _earlier(told.latest or told.lease, parent.latest) or 0)

    def renew(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from([HOUR, 5 * HOUR]), "lease")
        node = self.node(data)
        refused = self.usable(node, self.model.state_refuses(Kind.RENEW, node.id, self.ledger.now))
        told = self.model.budgets[node.id]
        if self.ask(data, node.renew(lease), refused) and told.latest:
            told.lease = min(self.ledger.now + lease, told.latest)

    def give_back(self, data: st.DataObject) -> None:
        amount = data.draw(AMOUNTS, "amount")
        node = self.node(data)
        told = self.model.budgets[node.id]
        refused = self.usable(
            node,
            None if 1 <= amount < 2**62 else R.MALFORMED,
            R.NOT_FOR_ROOTS if told.parent is None else None,
            self.model.state_refuses(Kind.RETURN, node.id, self.ledger.now),
            self.model.lacks(node.id, amount),
        )
        if self.ask(data, node.give_back(amount), refused) and told.parent:
            told.own -= amount
            self.model.budgets[told.parent].own += amount

    def return_all(self, data: st.DataObject) -> None:
        cascade = data.draw(st.booleans(), "cascade")
        node = self.node(data)
        budgets, holds = self.model.budgets, self.model.holds.values()
        live = any(hold.budget == node.id and hold.state is HoldState.LIVE for hold in holds)
        children = any(each.parent == node.id and not each.closed for each in budgets.values())
        refused = self.usable(
            node,
            R.NOT_FOR_ROOTS if node == self.root else None,
            self.model.state_refuses(Kind.RETURN, node.id, self.ledger.now),
            R.LIVE_HOLDS if live and not cascade else None,
            R.OPEN_CHILDREN if children and not cascade else None,
        )
        self._closing(self.ask(data, node.return_all(cascade=cascade), refused), node)

    def revoke(self, data: st.DataObject) -> None:
        node, target = self.pair(data)
        refused = self.usable(
            node,
            None if node.id in self.model.above(target.id) else R.DESCENDANT_UNKNOWN,
            self.model.state_refuses(Kind.REVOKE, target.id, self.ledger.now),
        )
        self._closing(self.ask(data, node.revoke(target), refused), target)

    def expire(self, data: st.DataObject) -> None:
        leased = [node for node in self.nodes if self.model.budgets[node.id].lease]
        node = data.draw(st.sampled_from(leased or self.nodes), "leased")
        lease = self.model.budgets[node.id].lease
        if lease and data.draw(st.integers(0, 4), "too early") < 4:
            self.ledger.now = max(self.ledger.now, lease)
        refused = [
            self.model.state_refuses(Kind.EXPIRE, node.id, self.ledger.now),
            None if lease and lease <= self.ledger.now else R.NOT_DUE,
        ]
        self._closing(self.ask(data, node.expire(), refused), node)

    def _closing(self, outcome: Outcome | None, top: Node) -> None:
        if outcome:
            told = self.model.close(top.id, self.ledger.eager)
            assert (outcome.returned, outcome.pending) == told

    def collect(self, data: st.DataObject) -> None:
        node = self.node(data)
        refused = [None if self.model.closed(node.id) else R.NOT_DUE]
        outcome = self.ask(data, node.collect(), refused)
        if outcome:
            assert outcome.returned == self.model.collect(node.id)

    def freeze_or_unfreeze(self, data: st.DataObject) -> None:
        freezes = data.draw(st.booleans(), "freezes")
        node = self.node(data)
        refused = [self.model.state_refuses(Kind.FREEZE, node.id, self.ledger.now)]
        if self.ask(data, node.freeze() if freezes else node.unfreeze(), refused):
            self.model.budgets[node.id].frozen = freezes

    def pass_time(self, data: st.DataObject) -> None:
        self.ledger.pass_time(data.draw(STEPS, "step"))

    # -- Replay, and what always holds --------------------------------------------------------------------

    def replay(self, data: st.DataObject) -> None:
        if not self.done:
            return
        operation, actor, outcome = data.draw(st.sampled_from(self.done), "replayed")
        budget = self.root.tree.budget(operation.budget_id)
        by_name = isinstance(operation.authority, ByHolder)
        usual = Custody.TOKEN if operation.kind is Kind.RECOVER else Custody.PRINCIPAL
        if by_name and budget.holder != actor.principal:
            # Who is not its holder any more is told nothing.
            self.ledger.refuse(operation, R.CAPABILITY_UNKNOWN, actor)
        elif by_name and budget.custody is not usual:
            recovers = operation.kind is Kind.RECOVER
            reason = R.NOT_TOKEN_HELD if recovers else R.CAPABILITY_UNKNOWN
            self.ledger.refuse(operation, reason, actor)
        else:
            assert self.ledger.do(operation, actor) == outcome._replace(replayed=True)

    @invariant()
    def the_balances_are_those_of_the_model(self) -> None:
        for node in self.nodes:
            told = self.model.budgets[node.id]
            budget = node.budget
            assert budget.money == self.model.balances(node.id)
            assert (budget.closed, budget.frozen) == (told.closed, told.frozen)
            assert (budget.lease_until, budget.lease_latest) == (told.lease, told.latest)
            assert budget.disputes == self.model.disputes(node.id)
        for ref in self.holds:
            hold, known = ref.hold, self.model.holds[ref.id]
            assert (hold.state, hold.remaining, hold.booked, hold.disputed, hold.expires_at) == (
                known.state,
                known.remaining,
                known.booked,
                known.disputed,
                known.expires,
            )
        if self.nodes:
            assert self.root.money.granted == self.model.granted

    def teardown(self) -> None:
        if not self.nodes:
            return
        assert self.ledger.verify(self.root.id) is None
        exported = Exported.of(self.ledger)
        assert exported.findings() == []
        for seed in range(3):
            assert tampered(self.ledger, self.root.id, seed) is not None
            assert tampered_rows(self.ledger, self.root.id, seed) is not None
            assert exported.tampered(seed).findings() != []


WRONG: list[Refusal | None] = [
    *[None] * 12,
    R.MALFORMED,
    R.PERMISSION_DENIED,
    R.CAPABILITY_UNKNOWN,
    R.BUDGET_UNKNOWN,
    R.OPERATION_ID_REUSED,
    R.TOKEN_CONSUMED,
    R.TOKEN_ID_REUSED,
]


def _holder(held: str) -> dict[str, Any]:
    return {
        "by_token": held != "principal",
        "holder": None if held == "bearer" else "agent",
    }


def _earlier(end: int | None, bound: int | None) -> int | None:
    return min((each for each in (end, bound) if each), default=None)


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestMachine = pytest.mark.timeout(300)(Machine.TestCase)
