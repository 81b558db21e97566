"""If several refusals apply at once, the first in the order of the enum is the answer.

For each kind of operation, and each authority that it may have, a table names the refusals that can
befall it. Each of them is brought about alone, with every later one, and with all later ones together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from peculium_server.core.limits import AMOUNT_MAX, DEPTH_MAX, LABELS_MAX
from peculium_server.core.operations import (
    HOLD_OPERATIONS,
    ByHolder,
    ByToken,
    Grant,
    Kind,
    Operation,
    Role,
    Rotation,
)
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from tests.core.ledger import HOUR, MINUTE, Answer, Ledger, Node

R = Refusal

NOT_OF_THE_CORE = {
    *(R.UNAUTHENTICATED, R.BATCH_REFUSED, R.NOT_SEALED),
    *(R.KEY_UNKNOWN, R.KEY_ENDED),
    *(R.ALERT_UNKNOWN, R.WEBHOOK_UNKNOWN, R.TOO_MANY, R.WEBHOOKS_OFF),
}
"""Who the caller is, whether all of an atomic batch may happen, and what is sealed is found out around the
core."""

NEVER_TOGETHER = (
    {R.CAPABILITY_UNKNOWN, R.TOKEN_CONSUMED},
    # Below a tree of the full depth nothing has a name.
    {R.NAME_TAKEN, R.TREE_TOO_DEEP},
)


@dataclass(frozen=True)
class Row:
    """One way to ask for one kind of operation, and the refusals that can befall it, in their order."""

    make: Callable[[World], Operation]
    faults: tuple[Refusal, ...]
    always: Refusal | None = None
    """Befalls it whatever else does."""
    by_holder: bool = False
    """The budget is principal-held."""
    bound: bool = False
    """The budget is token-held and bound to a principal."""
    at_root: bool = False
    prepare: Callable[[World], object] | None = None


class World:
    """root > parent > budget > below, a hold of the budget, and whatever is to be wrong with them."""

    def __init__(self, row: Row, faults: frozenset[Refusal]) -> None:
        self.row = row
        self.faults = faults
        self.ledger = ledger = Ledger(checked=False)
        self.old_id = ledger.id()
        self.root = self.parent = ledger.grant(1_000_000)
        emptied = self.root.child(1)
        ledger.do(self.root.revoke(emptied))
        collect = emptied.collect()
        ledger.do(collect)
        self.used_ids = {7: ledger.journal[0].operation_id, 8: collect.operation_id}
        for _ in range(DEPTH_MAX - 2 if R.TREE_TOO_DEEP in faults else 1):
            self.parent = self.parent.child(1_000, lease_us=HOUR, lease_latest_us=2 * HOUR)
        held = {"by_token": False, "holder": "agent"} if row.by_holder else {}
        self.budget = self.root if row.at_root else self.parent.child(1_000, **held)
        self.old_token = self.budget.budget.token or ledger.token()
        self.hold = self.budget.hold(50)
        self.old_hold_token = self.hold.hold.token
        ledger.do(self.hold.extend())
        if R.TREE_TOO_DEEP not in faults:
            self._below = self.budget.child(100, name="run-1")
        if row.bound:
            ledger.do(self.budget.admin_recover(holder="agent"))
        if row.prepare is not None:
            row.prepare(self)
        self._befall()

    @property
    def below(self) -> Node:
        return self._below

    def choose(self, fault: Refusal, if_it_is: Any, otherwise: Any) -> Any:
        return if_it_is if fault in self.faults else otherwise

    def ask(self) -> Answer:
        operation = self.row.make(self)
        actor = self.ledger.actor(operation)
        operation = replace(operation, **dict(self._spoiled(operation)))
        if R.CAPABILITY_UNKNOWN in self.faults and (self.row.by_holder or self.row.bound):
            actor = replace(actor, principal="other")
        if R.PERMISSION_DENIED in self.faults:
            actor = replace(actor, role=Role.AUDITOR)
        return self.ledger.ask(operation, actor)

    def _befall(self) -> None:
        """Let happen what is not of the request but of the tree."""
        ledger, faults = self.ledger, self.faults
        if R.HOLD_LAPSED in faults:
            ledger.pass_time(11 * MINUTE)
            ledger.do(self.hold.lapse())
        if R.HOLD_ENDED in faults:
            ledger.do(self.hold.settle())
        if R.TREE_OVERRUN in faults:
            ledger.do(self.root.hold(1).settle(2_000_000))
        if R.BUDGET_FROZEN in faults:
            ledger.do(self.parent.freeze())
        if R.OPERATION_TOO_OLD in faults:
            ledger.pass_time(11 * MINUTE)
        if R.BUDGET_EXPIRED in faults:
            ledger.pass_time(2 * HOUR)
        if R.BUDGET_CLOSED in faults:
            ledger.do(self.root.revoke(self.parent))

    def _spoiled(self, operation: Operation) -> Iterator[tuple[str, Any]]:
        """The fields of the request that are wrong."""
        faults = self.faults
        if R.MALFORMED in faults or R.TOO_LARGE in faults:
            first = "" if R.MALFORMED in faults else "key"
            rest = LABELS_MAX if R.TOO_LARGE in faults else 0
            yield "labels", ((first, ""), *((f"key-{number:02}", "") for number in range(rest)))
        if R.BUDGET_UNKNOWN in faults:
            yield "budget_id", self.ledger.id()
        if R.OPERATION_ID_REUSED in faults:
            yield "operation_id", self.used_ids[operation.operation_id[6] >> 4]
        elif R.OPERATION_TOO_OLD in faults:
            yield "operation_id", self.old_id
        of_hold = isinstance(operation, HOLD_OPERATIONS)
        old_token = self.old_hold_token if of_hold else self.old_token
        if R.TOKEN_CONSUMED in faults:
            yield "authority", ByToken(old_token)
        elif R.CAPABILITY_UNKNOWN in faults and not (self.row.by_holder or self.row.bound):
            yield "authority", ByToken(self.ledger.token())
        if R.TOKEN_ID_REUSED in faults:
            if isinstance(operation, Grant):
                yield "token_id", self.root.budget.token
            elif self.row.by_holder:
                yield "hold_token_id", self.old_hold_token
            else:
                yield "next_hold_token_id" if of_hold else "next_token_id", old_token


def _descendant(world: World) -> Node:
    """For what is not below the budget: the budget itself."""
    return world.budget if R.DESCENDANT_UNKNOWN in world.faults else world.below


def _taken_hold_id(world: World) -> dict[str, Any]:
    return {"hold_id": world.choose(R.ID_TAKEN, world.hold.id, world.ledger.id())}


def _hold_id(world: World) -> dict[str, bytes]:
    return {"hold_id": world.choose(R.HOLD_UNKNOWN, world.ledger.id(), world.hold.id)}


def _spent(world: World) -> int:
    return int(world.choose(R.BUDGET_EXHAUSTED, 5_000_000, 10))


def _actual(world: World) -> int:
    return int(world.choose(R.AMOUNT_OVERFLOW, AMOUNT_MAX, 20))


def _grant(world: World) -> Operation:
    if R.NAME_TAKEN in world.faults:
        world.ledger.grant(1, name="acme")
    grant = world.ledger.ask_grant(10, name="acme")
    if R.ID_TAKEN in world.faults:
        grant = replace(grant, root_id=world.root.id, budget_id=world.root.id)
    return grant


def _grant_again(world: World) -> Operation:
    return replace(world.ledger.ask_grant(10), root_id=world.root.id, budget_id=world.root.id)


def _delegate(world: World) -> Operation:
    """The name is taken of a child before the one whose id is."""
    first = world.budget.spec(_spent(world), name=world.choose(R.NAME_TAKEN, "run-1", "run-2"))
    second = world.budget.spec(1)
    if R.ID_TAKEN in world.faults:
        second = replace(second, budget_id=world.parent.id)
    return world.budget.delegate(first, second)


def _rotations(world: World) -> tuple[Rotation, ...]:
    """The hold that has ended is named before the one that does not exist."""
    unknown = replace(world.hold.rotation(), hold_id=world.ledger.id())
    return (world.hold.rotation(), *world.choose(R.HOLD_UNKNOWN, (unknown,), ()))


def _seen(world: World) -> int:
    """The budget as it is, or as it was one entry before."""
    return world.budget.budget.seq - int(R.BUDGET_CHANGED in world.faults)


def _dispute_much(world: World) -> None:
    """As much as one report can name: a second one passes the bound."""
    if R.AMOUNT_OVERFLOW in world.faults:
        world.ledger.do(world.budget.hold(1).settle(AMOUNT_MAX))


def _overrun_much(world: World) -> None:
    if R.AMOUNT_OVERFLOW in world.faults:
        world.ledger.do(world.root.hold(1).settle(AMOUNT_MAX))


def _end_what_is_open(world: World) -> None:
    if R.LIVE_HOLDS not in world.faults:
        world.ledger.do(world.hold.release())
    if R.OPEN_CHILDREN not in world.faults:
        world.ledger.do(world.budget.revoke(world.below))


def _wait(world: World) -> None:
    if R.NOT_DUE not in world.faults:
        world.ledger.pass_time(HOUR)


def _close(world: World) -> None:
    if R.NOT_DUE not in world.faults:
        world.ledger.do(world.root.revoke(world.parent))


SHAPE = (R.MALFORMED, R.TOO_LARGE, R.PERMISSION_DENIED)
BY_TOKEN = (*SHAPE, R.CAPABILITY_UNKNOWN, R.OPERATION_ID_REUSED, R.TOKEN_CONSUMED)
BY_HOLDER = (*SHAPE, R.CAPABILITY_UNKNOWN, R.OPERATION_ID_REUSED, R.OPERATION_TOO_OLD)
BY_ROLE = (*SHAPE, R.BUDGET_UNKNOWN, R.OPERATION_ID_REUSED)
USABLE = (R.BUDGET_CLOSED, R.BUDGET_EXPIRED, R.BUDGET_FROZEN)
SPENDABLE = (*USABLE, R.TREE_OVERRUN)

ROWS = {
    "grant": Row(_grant, (*SHAPE, R.ID_TAKEN, R.NAME_TAKEN)),
    "grant a root again": Row(
        _grant_again,
        (*SHAPE, R.OPERATION_ID_REUSED, R.TOKEN_ID_REUSED, R.ID_TAKEN),
        always=R.ID_TAKEN,
    ),
    "top up": Row(
        lambda world: world.budget.top_up(_actual(world)),
        (*BY_ROLE, R.AMOUNT_OVERFLOW),
        at_root=True,
    ),
    "top up what is no root": Row(
        lambda world: world.budget.top_up(_actual(world)),
        (*BY_ROLE, R.ONLY_FOR_ROOTS, R.AMOUNT_OVERFLOW),
        always=R.ONLY_FOR_ROOTS,
    ),
    "withdraw": Row(
        lambda world: world.budget.withdraw(_spent(world)),
        (*BY_ROLE, R.BUDGET_EXHAUSTED),
        at_root=True,
    ),
    "withdraw from what is no root": Row(
        lambda world: world.budget.withdraw(_spent(world)),
        (*BY_ROLE, R.ONLY_FOR_ROOTS, R.BUDGET_EXHAUSTED),
        always=R.ONLY_FOR_ROOTS,
    ),
    "reserve by token": Row(
        lambda world: world.budget.reserve(_spent(world), **_taken_hold_id(world)),
        (*BY_TOKEN, R.TOKEN_ID_REUSED, R.ID_TAKEN, *SPENDABLE, R.BUDGET_EXHAUSTED),
    ),
    "reserve by a bound token": Row(
        lambda world: world.budget.reserve(_spent(world), **_taken_hold_id(world)),
        (*BY_TOKEN, R.TOKEN_ID_REUSED, R.ID_TAKEN, *SPENDABLE, R.BUDGET_EXHAUSTED),
        bound=True,
    ),
    "reserve by holder": Row(
        lambda world: world.budget.reserve(_spent(world), **_taken_hold_id(world)),
        (*BY_HOLDER, R.TOKEN_ID_REUSED, R.ID_TAKEN, *SPENDABLE, R.BUDGET_EXHAUSTED),
        by_holder=True,
    ),
    "settle": Row(
        lambda world: world.hold.settle(_actual(world)),
        (*BY_TOKEN, R.AMOUNT_OVERFLOW),
        prepare=_dispute_much,
    ),
    "settle and keep open": Row(
        lambda world: world.hold.settle(20, keep_open=True),
        (*BY_TOKEN, R.TOKEN_ID_REUSED, *USABLE, R.HOLD_LAPSED),
    ),
    "release": Row(lambda world: world.hold.release(), BY_TOKEN),
    "extend": Row(
        lambda world: world.hold.extend(), (*BY_TOKEN, R.TOKEN_ID_REUSED, *USABLE, R.HOLD_LAPSED)
    ),
    "spend by token": Row(
        lambda world: world.budget.spend(_spent(world)),
        (*BY_TOKEN, R.TOKEN_ID_REUSED, *SPENDABLE, R.BUDGET_EXHAUSTED),
    ),
    "spend by holder": Row(
        lambda world: world.budget.spend(_spent(world)),
        (*BY_HOLDER, *SPENDABLE, R.BUDGET_EXHAUSTED),
        by_holder=True,
    ),
    "delegate by token": Row(
        _delegate,
        (
            *BY_TOKEN,
            R.TOKEN_ID_REUSED,
            R.ID_TAKEN,
            R.NAME_TAKEN,
            *SPENDABLE,
            R.TREE_TOO_DEEP,
            R.BUDGET_EXHAUSTED,
        ),
    ),
    "delegate by holder": Row(
        _delegate,
        (
            *BY_HOLDER,
            R.ID_TAKEN,
            R.NAME_TAKEN,
            *SPENDABLE,
            R.TREE_TOO_DEEP,
            R.BUDGET_EXHAUSTED,
        ),
        by_holder=True,
    ),
    "accept": Row(lambda world: world.budget.accept(), (*BY_TOKEN, R.TOKEN_ID_REUSED, *USABLE)),
    "accept by holder": Row(
        lambda world: world.budget.accept(authority=ByHolder()),
        (*SHAPE, R.CAPABILITY_UNKNOWN, R.NOT_TOKEN_HELD, R.OPERATION_ID_REUSED, *USABLE),
        always=R.NOT_TOKEN_HELD,
        by_holder=True,
    ),
    "recover": Row(
        lambda world: world.budget.recover(holds=_rotations(world), if_seq=_seen(world)),
        (
            *SHAPE,
            R.CAPABILITY_UNKNOWN,
            R.OPERATION_ID_REUSED,
            R.TOKEN_ID_REUSED,
            R.HOLD_UNKNOWN,
            R.HOLD_ENDED,
            R.BUDGET_CHANGED,
        ),
        bound=True,
    ),
    "recover what is principal-held": Row(
        lambda world: world.budget.recover(),
        (*SHAPE, R.CAPABILITY_UNKNOWN, R.NOT_TOKEN_HELD, R.OPERATION_ID_REUSED),
        always=R.NOT_TOKEN_HELD,
        by_holder=True,
    ),
    "recover by an admin": Row(
        lambda world: world.budget.admin_recover(holds=_rotations(world)),
        (*BY_ROLE, R.TOKEN_ID_REUSED, R.HOLD_UNKNOWN, R.HOLD_ENDED),
    ),
    "fund by token": Row(
        lambda world: world.budget.fund(_descendant(world), _spent(world)),
        (*BY_TOKEN, R.TOKEN_ID_REUSED, R.DESCENDANT_UNKNOWN, *SPENDABLE, R.BUDGET_EXHAUSTED),
    ),
    "fund by holder": Row(
        lambda world: world.budget.fund(_descendant(world), _spent(world)),
        (*BY_HOLDER, R.DESCENDANT_UNKNOWN, *SPENDABLE, R.BUDGET_EXHAUSTED),
        by_holder=True,
    ),
    "renew by token": Row(
        lambda world: world.budget.renew(),
        (*BY_TOKEN, R.TOKEN_ID_REUSED, R.BUDGET_CLOSED, R.BUDGET_EXPIRED),
    ),
    "renew by holder": Row(
        lambda world: world.budget.renew(),
        (*BY_HOLDER, R.BUDGET_CLOSED, R.BUDGET_EXPIRED),
        by_holder=True,
    ),
    "return some by token": Row(
        lambda world: world.budget.give_back(_spent(world)),
        (*BY_TOKEN, R.TOKEN_ID_REUSED, R.BUDGET_CLOSED, R.BUDGET_EXHAUSTED),
    ),
    "return some by holder": Row(
        lambda world: world.budget.give_back(_spent(world)),
        (*BY_HOLDER, R.BUDGET_CLOSED, R.BUDGET_EXHAUSTED),
        by_holder=True,
    ),
    "return some of a root": Row(
        lambda world: world.budget.give_back(_spent(world)),
        (*BY_TOKEN, R.TOKEN_ID_REUSED, R.NOT_FOR_ROOTS, R.BUDGET_EXHAUSTED),
        always=R.NOT_FOR_ROOTS,
        at_root=True,
    ),
    "return all by token": Row(
        lambda world: world.budget.return_all(),
        (*BY_TOKEN, R.BUDGET_CLOSED, R.LIVE_HOLDS, R.OPEN_CHILDREN),
        prepare=_end_what_is_open,
    ),
    "return all by holder": Row(
        lambda world: world.budget.return_all(),
        (*BY_HOLDER, R.BUDGET_CLOSED, R.LIVE_HOLDS, R.OPEN_CHILDREN),
        by_holder=True,
        prepare=_end_what_is_open,
    ),
    "return all of a root": Row(
        lambda world: world.budget.return_all(),
        (*BY_TOKEN, R.NOT_FOR_ROOTS, R.LIVE_HOLDS, R.OPEN_CHILDREN),
        always=R.NOT_FOR_ROOTS,
        at_root=True,
    ),
    "revoke by token": Row(
        lambda world: world.budget.revoke(_descendant(world)),
        (*BY_TOKEN, R.TOKEN_ID_REUSED, R.DESCENDANT_UNKNOWN, R.BUDGET_CLOSED),
    ),
    "revoke by holder": Row(
        lambda world: world.budget.revoke(_descendant(world)),
        (*BY_HOLDER, R.DESCENDANT_UNKNOWN, R.BUDGET_CLOSED),
        by_holder=True,
    ),
    "resolve by token": Row(
        lambda world: world.budget.resolve(world.hold, _actual(world), **_hold_id(world)),
        (*BY_TOKEN, R.TOKEN_ID_REUSED, R.HOLD_UNKNOWN, R.HOLD_ENDED, R.AMOUNT_OVERFLOW),
        prepare=_dispute_much,
    ),
    "resolve by holder": Row(
        lambda world: world.budget.resolve(world.hold, _actual(world), **_hold_id(world)),
        (*BY_HOLDER, R.HOLD_UNKNOWN, R.HOLD_ENDED, R.AMOUNT_OVERFLOW),
        by_holder=True,
        prepare=_dispute_much,
    ),
    "resolve by an admin": Row(
        lambda world: world.budget.admin_resolve(world.hold, _actual(world), **_hold_id(world)),
        (*BY_ROLE, R.HOLD_UNKNOWN, R.AMOUNT_OVERFLOW),
        prepare=_overrun_much,
    ),
    "freeze": Row(lambda world: world.budget.freeze(), (*BY_ROLE, R.BUDGET_CLOSED)),
    "unfreeze": Row(lambda world: world.budget.unfreeze(), (*BY_ROLE, R.BUDGET_CLOSED)),
    "lapse": Row(
        lambda world: world.hold.lapse(**_hold_id(world)),
        (*BY_ROLE, R.HOLD_UNKNOWN, R.HOLD_ENDED, R.NOT_DUE),
        prepare=_wait,
    ),
    "expire": Row(
        lambda world: world.parent.expire(), (*BY_ROLE, R.BUDGET_CLOSED, R.NOT_DUE), prepare=_wait
    ),
    "collect": Row(lambda world: world.budget.collect(), (*BY_ROLE, R.NOT_DUE), prepare=_close),
}

CASES = [
    pytest.param(row, fault, id=f"{name}-{fault.name}")
    for name, row in ROWS.items()
    for fault in row.faults
    if row.always is None or fault <= row.always
]


def _together(faults: list[Refusal]) -> frozenset[Refusal]:
    """These, without what cannot be there with an earlier one."""
    kept: set[Refusal] = set()
    for fault in faults:
        if not any({fault, other} in NEVER_TOGETHER for other in kept):
            kept.add(fault)
    return frozenset(kept)


@pytest.mark.parametrize(("row", "fault"), CASES)
def test_the_first_refusal_is_the_answer_whatever_comes_after_it(row: Row, fault: Refusal) -> None:
    later = [other for other in row.faults if other > fault]
    sets = {_together([fault]), _together([fault, *later])}
    sets |= {_together([fault, other]) for other in later}
    for faults in sets:
        answer = World(row, faults).ask()
        assert isinstance(answer, Refused), faults
        assert answer.reason is fault, faults


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS.values() if row.always is None],
    ids=[name for name, row in ROWS.items() if row.always is None],
)
def test_what_no_refusal_befalls_is_accepted(row: Row) -> None:
    assert isinstance(World(row, frozenset()).ask(), Outcome)


def test_each_row_names_its_refusals_in_order() -> None:
    for row in ROWS.values():
        assert list(row.faults) == sorted(row.faults)


def test_every_refusal_of_the_core_is_reached() -> None:
    reached = {fault for row in ROWS.values() for fault in row.faults}
    assert reached == set(Refusal) - NOT_OF_THE_CORE


def test_every_kind_has_a_row() -> None:
    assert {row.make(World(row, frozenset())).kind for row in ROWS.values()} == set(Kind)
