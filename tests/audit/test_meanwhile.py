"""Statements and usage over the wire, while others write: true of one instant, and of the past for good.

The naive evaluation is that of `test_sums`, told the position in the lane that an answer names.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from peculium.v1 import audit_service_pb2 as audit, types_pb2
from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
from peculium_server.core.selection import Period
from peculium_server.core.state import Balances
from peculium_server.core.usage import Booked, Grouping, Keys
from peculium_server.rpc import accounting
from peculium_server.rpc.responses import write_balances
from peculium_server.store import accounts
from peculium_server.store.accounts import Account
from tests.audit.test_lists import stamp
from tests.audit.test_sums import GROUPINGS, Naive
from tests.audit.world import World
from tests.rpc.wire import Stored

pytestmark = pytest.mark.timeout(300)

EXAMPLES = settings(
    max_examples=20,
    deadline=None,
    # What is recorded meanwhile differs each time: nothing would be made shorter.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CHANCES = st.integers(0, 2**32).map(Random)
"""What is chosen from is another journal each time, which Hypothesis must not see."""
REACHES = st.sampled_from((audit.REACH_BUDGET, audit.REACH_SUBTREE, audit.REACH_TREE))
TIMES = 3
"""How often the same is asked while others write."""

Response = TypeVar("Response", audit.GetStatementResponse, audit.GetUsageResponse)


@pytest.fixture(params=["usual portions", "small portions"], autouse=True)
def portions(request: pytest.FixtureRequest) -> Iterator[None]:
    """How much is read at once: all that there is here, or so little that others come in between."""
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "small portions":
            patched.setattr(accounts, "_PORTION_ROWS", 3)
            patched.setattr(accounting, "_LINES_MAX", 2)
            patched.setattr(accounting, "_AT_A_TIME", 1)
        yield


class Auditor:
    """Asks a server about an account of a tree that grows."""

    def __init__(self, stored: Stored, world: World) -> None:
        self.world = world
        self.stub = AuditServiceStub(stored.channel)

    def chosen(self, chance: Random, reach: Any) -> tuple[Account, audit.GetStatementRequest]:
        """Any account, and any period: of the past, or one that goes on."""
        node = chance.choice(self.world.nodes)
        at = [entry.at + aside for entry in self.world.ledger.journal for aside in (-1, 0, 1)]
        since, until = sorted(chance.choice(at) for _ in range(2))
        request = audit.GetStatementRequest(
            budget=types_pb2.BudgetRef(root_id=node.root_id, budget_id=node.id), reach=reach
        )
        if chance.random() < 0.7:
            getattr(request, "from").CopyFrom(stamp(since))
        if chance.random() < 0.7:
            request.until.CopyFrom(stamp(until))
        top = node.root_id if reach == audit.REACH_TREE else node.id
        return Account(node.root_id, top, subtree=reach != audit.REACH_BUDGET), request


@pytest.fixture
async def auditor(stored: Stored) -> Auditor:
    world = World(stored.store, seed=7)
    await world.begin()
    return Auditor(stored, world)


def period_of(request: audit.GetStatementRequest) -> Period:
    since, until = (
        getattr(request, name).ToMicroseconds() if request.HasField(name) else None
        for name in ("from", "until")
    )
    return Period(since, until)


def of_one_past(request: Any, answers: list[Response]) -> None:
    """What was over when it was asked for is answered alike, whatever is recorded meanwhile."""
    positions = [answer.ledger.position for answer in answers]
    assert positions == sorted(positions)
    if request.HasField("until"):
        for answer in answers:
            answer.ClearField("ledger")
        assert all(answer == answers[0] for answer in answers)


def balances(money: Balances) -> types_pb2.Balances:
    message = types_pb2.Balances()
    write_balances(money, message)
    return message


@EXAMPLES
@given(chance=CHANCES, reach=REACHES)
async def test_a_statement_is_that_of_the_journal_up_to_the_position_that_it_tells(
    auditor: Auditor, chance: Random, reach: Any
) -> None:
    account, request = auditor.chosen(chance, reach)
    async with auditor.world.going_on():
        answers = [await auditor.stub.GetStatement(request) for _ in range(TIMES)]
    period = period_of(request)
    for told in answers:
        naive = Naive(auditor.world.ledger, account, period, told.ledger.position)
        totals = naive.totals()
        assert told.opening == balances(totals.opening)
        assert told.closing == balances(totals.closing)
        assert [
            (int(each.kind), each.operations, each.entries, each.changes) for each in told.movements
        ] == [
            (int(each.kind), each.operations, each.entries, balances(each.changes))
            for each in totals.movements
        ]
        assert told.used_opening == totals.opening.spent + totals.opening.forfeited
        assert told.used_closing == totals.closing.spent + totals.closing.forfeited
        assert (told.disputed_closing, told.budgets) == (totals.disputed, totals.budgets)
        assert told.unit == naive.tree.budget(account.budget_id).unit
        assert told.until.ToMicroseconds() >= (totals.last or 0)
        if period.until is not None:
            assert told.until.ToMicroseconds() == period.until
        since = period.since if period.since is not None else totals.first
        if since is not None:
            assert getattr(told, "from").ToMicroseconds() == since
    of_one_past(request, answers)


@EXAMPLES
@given(
    chance=CHANCES,
    reach=REACHES,
    groupings=st.lists(st.sampled_from(GROUPINGS), unique=True, max_size=4),
)
async def test_usage_is_that_of_the_journal_up_to_the_position_that_it_tells(
    auditor: Auditor, chance: Random, reach: Any, groupings: list[Grouping]
) -> None:
    account, asked = auditor.chosen(chance, reach)
    request = audit.GetUsageRequest(
        budget=asked.budget,
        reach=asked.reach,
        group_by=[
            audit.UsageGrouping(by=int(each.by), label=each.label)  # type: ignore[arg-type]
            for each in groupings
        ],
    )
    period = period_of(asked)
    for name in ("from", "until"):
        if asked.HasField(name):
            getattr(request, name).CopyFrom(getattr(asked, name))
    async with auditor.world.going_on():
        answers = [await auditor.stub.GetUsage(request) for _ in range(TIMES)]
    for told in answers:
        naive = Naive(auditor.world.ledger, account, period, told.ledger.position)
        groups = naive.usage(groupings)
        assert list(map(group_of, told.groups)) == sorted(groups.items())
        total = Booked(*map(sum, zip(Booked(), *groups.values(), strict=True)))
        assert group_of(told.total) == ((), total)
        assert told.unit == naive.tree.budget(account.budget_id).unit
    of_one_past(request, answers)


def group_of(message: audit.UsageGroup) -> tuple[Keys, Booked]:
    return tuple(message.keys), Booked(*(getattr(message, name) for name in Booked._fields))
