from __future__ import annotations

import asyncio
import math

import pytest

from peculium_server.core.operations import ByHolder, Grant
from peculium_server.core.outcome import Outcome
from peculium_server.core.refusals import Refusal, Refused
from peculium_server.lanes import lane as lane_module
from peculium_server.lanes.answers import Unanswered, Unavailability
from peculium_server.lanes.lane import (
    GATHERED_ROWS,
    QUIET_TURNS,
    Answered,
    DeadlinePassed,
    Lane,
)
from peculium_server.store.errors import (
    LedgerCorrupt,
    StatementRefused,
    StoreContended,
    StoreUnavailable,
)
from tests.lanes.memory import ADMIN, MemoryWriter, grant, request, reserve, spend

QUEUE = 1_000


@pytest.fixture
def writer() -> MemoryWriter:
    return MemoryWriter()


@pytest.fixture(autouse=True)
def turns_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a busy machine takes for a turn of the event loop, what decides is their number."""
    monkeypatch.setattr(lane_module, "GATHER_SECONDS_MAX", math.inf)


@pytest.fixture
def lane(writer: MemoryWriter) -> Lane:
    return Lane(0, writer, queue_rows_max=QUEUE)


async def granted(lane: Lane, amount: int = 100) -> Grant:
    root = grant(amount)
    answer = await lane.submit([request(root, actor=ADMIN)], {}, None)
    assert isinstance(answer, Answered)
    return root


async def test_an_operation_alone_is_committed_at_once(lane: Lane, writer: MemoryWriter) -> None:
    root = await granted(lane)
    answer = await lane.submit([request(spend(root))], {}, None)
    assert isinstance(answer, Answered)
    [outcome] = answer.results
    assert isinstance(outcome, Outcome)
    assert outcome.money.spent == 1
    assert writer.transactions == [1, 1]


async def test_what_came_during_a_commit_shares_the_next_one(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane)
    writer.gate.clear()
    writer.begun.clear()
    first = lane.submit([request(spend(root))], {}, None)
    await writer.begun.wait()
    others = [lane.submit([request(spend(root))], {}, None) for _ in range(50)]
    writer.gate.set()
    await asyncio.gather(first, *others)
    assert writer.transactions == [1, 1, 50]


async def test_what_waits_is_decided_while_what_was_decided_before_is_saved(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane)
    writer.landing.clear()
    saved = [lane.submit([request(spend(root))], {}, None)]
    await settled()
    saved.append(lane.submit([request(spend(root))], {}, None))
    await settled()
    assert writer.transactions == [1, 1, 1]
    assert not any(answered.done() for answered in saved)
    writer.landing.set()
    await asyncio.gather(*saved)


async def test_no_more_than_two_transactions_of_a_lane_are_under_way(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane)
    writer.landing.clear()
    saved = []
    for _ in range(9):
        saved.append(lane.submit([request(spend(root))], {}, None))
        await settled()
    assert writer.transactions == [1, 1, 1]
    writer.landing.set()
    await asyncio.gather(*saved)
    assert writer.transactions == [1, 1, 1, 7]


@pytest.mark.parametrize(("waiting", "transactions"), [(4, [1, 10]), (5, [1, 10, 5])])
async def test_a_transaction_begins_early_only_with_half_of_what_is_under_way(
    lane: Lane, writer: MemoryWriter, waiting: int, transactions: list[int]
) -> None:
    root = await granted(lane)
    writer.landing.clear()
    saved = [lane.submit([request(spend(root), index) for index in range(10)], {}, None)]
    await settled()
    saved += [lane.submit([request(spend(root))], {}, None) for _ in range(waiting)]
    await settled()
    assert writer.transactions == transactions
    writer.landing.set()
    await asyncio.gather(*saved)
    assert writer.transactions == [1, 10, waiting]


async def settled() -> None:
    """Let everything happen that waits for nothing."""
    await turns(2 * QUIET_TURNS)


async def turns(number: int) -> None:
    """Let the event loop turn so often."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_whoever_is_alone_waits_for_nobody(lane: Lane, writer: MemoryWriter) -> None:
    root = await granted(lane)
    writer.begun.clear()
    answered = lane.submit([request(spend(root))], {}, None)
    await turns(1)
    assert writer.begun.is_set()
    await answered


async def test_those_who_follow_each_other_closely_share_a_transaction(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane)
    await asyncio.gather(*(lane.submit([request(spend(root))], {}, None) for _ in range(2)))
    following = []
    for _ in range(10):
        following.append(lane.submit([request(spend(root))], {}, None))
        await turns(QUIET_TURNS - 1)
    await asyncio.gather(*following)
    assert writer.transactions == [1, 2, 10]


async def test_behind_a_transaction_that_is_under_way_company_is_waited_for(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane)
    writer.landing.clear()
    saved = [lane.submit([request(spend(root))], {}, None)]
    await settled()
    for _ in range(3):
        saved.append(lane.submit([request(spend(root))], {}, None))
        await turns(QUIET_TURNS - 1)
    writer.landing.set()
    await asyncio.gather(*saved)
    assert writer.transactions == [1, 1, 3]


async def test_nobody_waits_for_company_without_end(
    lane: Lane, writer: MemoryWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await granted(lane)
    await asyncio.gather(*(lane.submit([request(spend(root))], {}, None) for _ in range(2)))
    monkeypatch.setattr(lane_module, "GATHER_SECONDS_MAX", 0.0)
    writer.begun.clear()
    answered = lane.submit([request(spend(root))], {}, None)
    await turns(1)
    assert writer.begun.is_set()
    await answered


@pytest.mark.parametrize(("size", "begun"), [(GATHERED_ROWS - 1, False), (GATHERED_ROWS, True)])
async def test_a_transaction_that_is_worth_its_cost_waits_for_nobody(
    lane: Lane, writer: MemoryWriter, size: int, begun: bool
) -> None:
    root = await granted(lane)
    await asyncio.gather(*(lane.submit([request(spend(root))], {}, None) for _ in range(2)))
    writer.begun.clear()
    several = [request(spend(root), index) for index in range(size)]
    answered = lane.submit(several, {}, None)
    await turns(1)
    assert writer.begun.is_set() is begun
    await answered


async def test_requests_are_decided_in_the_order_of_their_coming(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane, 3)
    answers = await asyncio.gather(
        *(lane.submit([request(spend(root))], {}, None) for _ in range(5))
    )
    results = [answer.results[0] for answer in answers if isinstance(answer, Answered)]
    assert [isinstance(result, Outcome) for result in results] == [True] * 3 + [False] * 2


async def test_a_refusal_touches_nothing_else_in_its_commit(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane, 10)
    amounts = [4, 100, 6]
    answers = await asyncio.gather(
        *(lane.submit([request(spend(root, amount))], {}, None) for amount in amounts)
    )
    kept, refused, last = (a.results[0] for a in answers if isinstance(a, Answered))
    assert isinstance(kept, Outcome)
    assert isinstance(refused, Refused)
    assert refused.reason is Refusal.BUDGET_EXHAUSTED
    assert isinstance(last, Outcome)
    assert last.money.available == 0
    assert writer.transactions == [1, 2]


async def test_every_answer_tells_a_position_at_which_its_operation_is_committed(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane)
    answers = await asyncio.gather(
        *(lane.submit([request(spend(root))], {}, None) for _ in range(4))
    )
    assert [answer.positions for answer in answers if isinstance(answer, Answered)] == [{0: 5}] * 4
    assert writer.position == 5


async def test_a_commit_takes_no_more_operations_than_its_bound(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane, QUEUE)
    futures = [
        lane.submit([request(spend(root), index) for index in range(100)], {}, None)
        for _ in range(5)
    ]
    await asyncio.gather(*futures)
    assert writer.transactions == [1, 200, 200, 100]
    assert max(writer.transactions) <= lane_module.COMMIT_OPERATIONS_MAX


async def test_a_full_queue_answers_at_once_that_it_is_full(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane)
    writer.gate.clear()
    writer.begun.clear()
    in_progress = lane.submit([request(spend(root))], {}, None)
    await writer.begun.wait()
    batch = [request(spend(root), index) for index in range(250)]
    waiting = [lane.submit(batch, {}, None) for _ in range(QUEUE // 250)]
    answer = await lane.submit([request(spend(root))], {}, None)
    assert isinstance(answer, Unanswered)
    assert answer.reason is Unavailability.QUEUE_FULL
    assert answer.facts == {"lane": "0", "queued": str(QUEUE)}
    assert answer.retry_delay_ms > 0
    writer.gate.set()
    await asyncio.gather(in_progress, *waiting)
    after = await lane.submit([request(spend(root))], {}, None)
    assert isinstance(after, Answered)


async def test_what_its_caller_has_left_is_never_decided(lane: Lane, writer: MemoryWriter) -> None:
    root = await granted(lane)
    writer.gate.clear()
    writer.begun.clear()
    first = lane.submit([request(spend(root))], {}, None)
    await writer.begun.wait()
    left = lane.submit([request(spend(root))], {}, None)
    kept = lane.submit([request(spend(root))], {}, None)
    left.cancel()
    writer.gate.set()
    await asyncio.gather(first, kept)
    assert writer.position == 3


async def test_a_caller_who_leaves_while_rows_are_loaded_is_not_decided_either(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane)
    writer.gate.clear()
    writer.begun.clear()
    left = lane.submit([request(spend(root))], {}, None)
    await writer.begun.wait()
    left.cancel()
    writer.gate.set()
    await lane.idle()
    assert writer.transactions == [1, 0]


async def test_what_is_late_is_dropped_and_told_so(lane: Lane, writer: MemoryWriter) -> None:
    root = await granted(lane)
    now = asyncio.get_running_loop().time()
    late = lane.submit([request(spend(root))], {}, now - 1)
    in_time = lane.submit([request(spend(root))], {}, now + 60)
    with pytest.raises(DeadlinePassed):
        await late
    assert isinstance(await in_time, Answered)
    assert writer.position == 2


async def test_a_repeated_transaction_is_decided_anew(lane: Lane, writer: MemoryWriter) -> None:
    root = await granted(lane, 1)
    writer.conflicts = 3
    answer = await lane.submit([request(spend(root))], {}, None)
    assert isinstance(answer, Answered)
    [outcome] = answer.results
    assert isinstance(outcome, Outcome)
    assert not outcome.replayed
    assert writer.attempts == 5
    assert writer.position == 2


@pytest.mark.parametrize(
    ("failure", "reason", "facts"),
    [
        (StoreUnavailable("gone"), Unavailability.DATABASE_UNAVAILABLE, {}),
        (StoreContended(10), Unavailability.CONTENDED, {"attempts": "10"}),
    ],
)
async def test_without_the_store_every_caller_of_the_commit_is_told_why(
    lane: Lane,
    writer: MemoryWriter,
    failure: Exception,
    reason: Unavailability,
    facts: dict[str, str],
) -> None:
    root = await granted(lane)
    writer.failures = [failure]
    answers = await asyncio.gather(
        *(lane.submit([request(spend(root))], {}, None) for _ in range(3))
    )
    for answer in answers:
        assert isinstance(answer, Unanswered)
        assert (answer.reason, answer.facts) == (reason, facts)
    assert isinstance(await lane.submit([request(spend(root))], {}, None), Answered)


@pytest.mark.parametrize(
    "failure", [LedgerCorrupt("rows"), StatementRefused("42501"), ZeroDivisionError("a bug")]
)
async def test_a_failure_befalls_only_the_request_that_causes_it(
    lane: Lane, writer: MemoryWriter, failure: Exception
) -> None:
    root = await granted(lane)
    # All three together, then the first alone succeeds, the second fails, the third succeeds.
    writer.failures = [failure, None, failure, None]
    answers = await asyncio.gather(
        *(lane.submit([request(spend(root))], {}, None) for _ in range(3)), return_exceptions=True
    )
    assert isinstance(answers[0], Answered)
    assert answers[1] is failure
    assert isinstance(answers[2], Answered)
    assert writer.position == 3


async def test_a_lane_goes_on_after_a_request_has_failed_alone(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane)
    writer.failures = [ZeroDivisionError("a bug")]
    with pytest.raises(ZeroDivisionError):
        await lane.submit([request(spend(root))], {}, None)
    assert isinstance(await lane.submit([request(spend(root))], {}, None), Answered)


async def test_the_store_is_given_until_the_last_of_the_callers_has_gone(
    lane: Lane, writer: MemoryWriter
) -> None:
    root = await granted(lane)
    now = asyncio.get_running_loop().time()
    await asyncio.gather(
        *(lane.submit([request(spend(root))], {}, now + seconds) for seconds in (10, 30, 20))
    )
    await asyncio.gather(
        *(lane.submit([request(spend(root))], {}, deadline) for deadline in (now + 10, None))
    )
    assert writer.deadlines == [None, now + 30, None]


async def test_a_chain_is_decided_as_a_whole(lane: Lane, writer: MemoryWriter) -> None:
    root = await granted(lane, 10)
    operations = [reserve(root, amount, ByHolder()) for amount in (5, 6, 5)]
    answer = await lane.submit(
        [request(operation, index) for index, operation in enumerate(operations)], {}, None
    )
    assert isinstance(answer, Answered)
    assert [type(result) for result in answer.results] == [Outcome, Refused, Outcome]


async def test_an_abandoned_lane_waits_for_nothing(lane: Lane, writer: MemoryWriter) -> None:
    root = await granted(lane)
    writer.gate.clear()
    lost = [lane.submit([request(spend(root))], {}, None) for _ in range(3)]
    await asyncio.sleep(0)
    lane.abandon()
    await lane.idle()
    assert not any(answered.done() for answered in lost)
