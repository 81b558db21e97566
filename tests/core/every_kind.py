"""An operation of every kind, each with every field that it may have, and a world in which it is accepted."""

from __future__ import annotations

from collections.abc import Callable

from peculium_server.core.operations import Child, Kind, Operation, Usage
from tests.core.ledger import DAY, HOUR, MINUTE, Ledger, Node

LABELS = (("model", "m"), ("run", "7"))
USAGE = Usage(provider="p", model="m", input_tokens=3, output_tokens=2, cached_tokens=1)


class World:
    """A root, a leased child with a hold and a child of its own; everything by token."""

    def __init__(self) -> None:
        self.ledger = ledger = Ledger()
        self.root = ledger.grant(1_000, holder="agent")
        self.child = self.root.child(500, lease_us=HOUR, lease_latest_us=5 * HOUR, holder="agent")
        self.below = self.child.child(100)
        self.hold = self.child.hold(50)
        self.token = ledger.token()
        self.id = ledger.id()


def _children(world: World) -> tuple[Child, ...]:
    full = world.child.spec(
        10,
        name="full",
        holder="agent",
        lease_us=HOUR,
        lease_latest_us=2 * HOUR,
        labels=LABELS,
        overrun_factor=3,
    )
    return (full, world.child.spec(20, name="bare"))


def _later(world: World, microseconds: int) -> World:
    world.ledger.pass_time(microseconds)
    return world


MAKE: dict[Kind, Callable[[World], Operation]] = {
    Kind.GRANT: lambda world: world.ledger.ask_grant(10, holder="agent"),
    Kind.TOP_UP: lambda world: world.root.top_up(10),
    Kind.WITHDRAW: lambda world: world.root.withdraw(10),
    Kind.RESERVE: lambda world: world.child.reserve(10),
    Kind.SETTLE: lambda world: world.hold.settle(
        10, keep_open=True, reference="r", usage=USAGE, estimated=True
    ),
    Kind.RELEASE: lambda world: world.hold.release(),
    Kind.EXTEND: lambda world: world.hold.extend(),
    Kind.SPEND: lambda world: world.child.spend(10, reference="r", usage=USAGE),
    Kind.DELEGATE: lambda world: world.child.delegate(*_children(world)),
    Kind.ACCEPT: lambda world: world.child.accept(),
    Kind.RECOVER: lambda world: world.child.admin_recover(
        holder="agent", holds=(world.hold.rotation(),), if_seq=world.child.budget.seq
    ),
    Kind.FUND: lambda world: world.root.fund(world.child, 10, lease_us=2 * HOUR),
    Kind.RENEW: lambda world: world.child.renew(2 * HOUR),
    Kind.RETURN: lambda world: world.child.give_back(10),
    Kind.REVOKE: lambda world: world.root.revoke(world.below),
    Kind.RESOLVE: lambda world: world.child.resolve(world.hold, 10),
    Kind.FREEZE: lambda world: world.child.freeze(reason="r"),
    Kind.UNFREEZE: lambda world: world.child.unfreeze(reason="r"),
    Kind.LAPSE: lambda world: _later(world, 11 * MINUTE).hold.lapse(),
    Kind.EXPIRE: lambda world: _later(world, HOUR).child.expire(),
    Kind.COLLECT: lambda world: _closed(world).below.collect(),
}


def _closed(world: World) -> World:
    world.ledger.eager = 0
    world.ledger.do(world.root.revoke(world.child))
    return world


def lived() -> tuple[Ledger, Node]:
    """A tree in which every kind of operation has happened, many of them with several parts."""
    ledger = Ledger(eager=1)
    root = ledger.grant(1_000, holder="agent", labels=(("team", "größe"),))
    ledger.do(root.top_up(100, trace_id=bytes(range(16))))
    ledger.do(root.withdraw(50))
    team = root.child(500, lease_us=HOUR, lease_latest_us=5 * HOUR, overrun_factor=3)
    run = team.child(300, holder="agent")
    step = run.child(100, by_token=False, holder="agent")
    _work(ledger, run, step)
    ledger.do(team.freeze())
    ledger.do(team.unfreeze())
    ledger.do(team.renew(2 * HOUR))
    ledger.do(root.fund(run, 40))
    late = run.hold(30)
    ledger.pass_time(30 * MINUTE)
    ledger.do(late.lapse())
    ledger.do(root.revoke(step))
    ledger.do(run.admin_resolve(late, 50))
    ledger.pass_time(DAY)
    ledger.do(team.expire())
    ledger.do(run.collect())
    ledger.do(root.hold(1).settle(2_000))
    assert {entry.kind for entry in ledger.journal} == set(Kind)
    return ledger, root


def _work(ledger: Ledger, run: Node, step: Node) -> None:
    ledger.do(run.accept())
    first, second, third = (run.hold(amount) for amount in (30, 20, 10))
    ledger.do(first.extend(20 * MINUTE))
    ledger.do(first.settle(5, keep_open=True, reference="é", usage=Usage(), estimated=True))
    seq = run.budget.seq
    ledger.do(run.recover(holds=(first.rotation(), third.rotation()), if_seq=seq))
    ledger.do(run.resolve(second, 12))
    ledger.do(third.release())
    ledger.do(run.spend(3, reference="call-1", usage=USAGE, labels=LABELS))
    ledger.do(run.give_back(2))
    named = run.spec(
        5, by_token=False, holder="agent", lease_us=HOUR, labels=LABELS, overrun_factor=0
    )
    ledger.do(run.delegate(run.spec(4), named))
    ledger.do(Node(ledger, run.root_id, named.budget_id).return_all(cascade=True))
    ledger.do(step.hold(100).settle(130))
