from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from peculium import _requests as requests
from peculium._coalescer import SHARE_OPERATIONS_MIN, Batch, Line
from peculium._ids import token_id
from peculium._limits import OPERATIONS_MAX, REQUEST_BYTES_MAX
from peculium._recorder import Recorder
from peculium._requests import Asked, Operation, Target
from peculium._retry import Failure
from peculium.errors import (
    BudgetExhausted,
    CapabilityMoved,
    CapabilityUnknown,
    DeadlineExceeded,
    LedgerUnavailable,
    OutcomeUnknown,
    TokenConsumed,
    Unauthenticated,
)
from peculium.v1 import ledger_service_pb2 as wire, types_pb2
from peculium.values import Child
from tests.client.ledger import PRINCIPAL
from tests.client.lines import NOT_DONE, Asking, Bench, Held, Told


@pytest.fixture
def bench() -> Bench:
    return Bench()


def proofs(batch: Batch) -> list[str | None]:
    """How each operation of a batch proves its authority."""
    return [
        getattr(operation, operation.WhichOneof("operation") or "").header.authority.WhichOneof(
            "proof"
        )
        for operation in batch.request.operations
    ]


def live_token(bench: Bench, held: Held) -> bytes | None:
    return bench.ledger.trees[held.target.root_id].budget(held.target.budget_id).token


def in_step(bench: Bench, held: Held) -> bool:
    """Whether the client knows the live token's secret."""
    assert held.line.secret is not None
    return token_id(held.line.secret) == live_token(bench, held)


# --- together, and in order ---


def test_one_operation_is_sent_at_once(bench: Bench) -> None:
    root = bench.root()
    asked = bench.reserve(root, 10)
    bench.answer(bench.send())
    assert asked.told.resolved
    assert in_step(bench, root)


def test_concurrent_operations_of_one_token_travel_as_a_chain(bench: Bench) -> None:
    root = bench.root()
    asked = [bench.reserve(root, 10) for _ in range(3)]
    batch = bench.send()
    assert proofs(batch) == ["secret", "after", "after"]
    assert [op.reserve.header.authority.after for op in batch.request.operations] == [0, 0, 1]
    bench.answer(batch)
    assert all(each.told.resolved for each in asked)
    assert in_step(bench, root)


def test_operations_of_a_principal_need_no_chain(bench: Bench) -> None:
    root = bench.root(token=False)
    for _ in range(3):
        bench.reserve(root, 10)
    assert proofs(bench.send()) == ["holder", "holder", "holder"]


def test_every_operation_of_a_chain_gets_its_own_true_answer(bench: Bench) -> None:
    root = bench.root(50)
    asked = [bench.reserve(root, amount) for amount in (30, 40, 15, 10, 5)]
    bench.answer(bench.send())
    fits = [each.told.error is None for each in asked]
    assert fits == [True, False, True, False, True]
    refused = asked[1].told.error
    assert isinstance(refused, BudgetExhausted)
    assert (refused.available, refused.held, refused.requested) == (20, 30, 40)
    assert in_step(bench, root)


def test_what_comes_while_a_token_is_on_its_way_waits_for_it(bench: Bench) -> None:
    root = bench.root()
    bench.reserve(root, 1)
    first = bench.send()
    bench.reserve(root, 2)
    bench.reserve(root, 3)
    assert bench.silent()
    bench.answer(first)
    assert [op.reserve.amount for op in bench.send().request.operations] == [2, 3]


def test_other_lines_do_not_wait_for_a_token_that_is_on_its_way(bench: Bench) -> None:
    one, other = bench.root(), bench.root()
    bench.reserve(one, 1)
    bench.send()
    bench.reserve(other, 2)
    assert [op.reserve.amount for op in bench.send().request.operations] == [2]


def test_several_tokens_share_a_request_each_in_its_own_chain(bench: Bench) -> None:
    one, other = bench.root(), bench.root()
    for held in (one, other, one, other):
        bench.spend(held, 1)
    batch = bench.send()
    assert proofs(batch) == ["secret", "after", "secret", "after"]
    bench.answer(batch)
    assert in_step(bench, one)
    assert in_step(bench, other)


def test_requests_on_their_way_are_bounded() -> None:
    bench = Bench(flights_max=2)
    root = bench.root(token=False)
    first = []
    for _ in range(2):
        bench.spend(root, 1)
        first.append(bench.send())
    bench.spend(root, 1)
    assert bench.silent()
    bench.answer(first[0])
    bench.send()


def sizes(bench: Bench, flights: int) -> list[int]:
    return [len(bench.send().request.operations) for _ in range(flights)]


def test_many_operations_of_one_tree_are_spread_over_several_requests() -> None:
    bench = Bench(flights_max=4)
    root = bench.root(10_000, token=False)
    for _ in range(3 * SHARE_OPERATIONS_MIN + 8):
        bench.spend(root, 1)
    assert sizes(bench, 4) == [SHARE_OPERATIONS_MIN] * 3 + [8]


def test_very_many_fill_the_requests_evenly() -> None:
    bench = Bench(flights_max=4)
    root = bench.root(10_000, token=False)
    for _ in range(800):
        bench.spend(root, 1)
    assert sizes(bench, 4) == [200] * 4


def test_what_is_left_goes_with_the_last_request_that_may_go() -> None:
    bench = Bench(flights_max=2)
    root = bench.root(10_000, token=False)
    bench.spend(root, 1)
    bench.send()
    for _ in range(3 * SHARE_OPERATIONS_MIN):
        bench.spend(root, 1)
    assert sizes(bench, 1) == [3 * SHARE_OPERATIONS_MIN]


def test_operations_of_many_trees_go_together() -> None:
    bench = Bench(flights_max=4)
    for root in [bench.root(token=False) for _ in range(SHARE_OPERATIONS_MIN)]:
        for _ in range(2):
            bench.spend(root, 1)
    assert sizes(bench, 1) == [2 * SHARE_OPERATIONS_MIN]
    assert bench.silent()


def test_a_chain_is_not_cut(bench: Bench) -> None:
    one, other = bench.root(10_000), bench.root(10_000)
    for _ in range(2 * SHARE_OPERATIONS_MIN):
        bench.spend(one, 1)
    bench.spend(other, 1)
    batch = bench.send()
    assert proofs(batch).count("secret") == 2
    assert len(batch.request.operations) == 2 * SHARE_OPERATIONS_MIN + 1


def test_a_batch_has_a_bounded_number_of_operations(bench: Bench) -> None:
    root = bench.root(10_000)
    asked = [bench.spend(root, 1) for _ in range(OPERATIONS_MAX + 10)]
    batch = bench.send()
    assert len(batch.request.operations) == OPERATIONS_MAX
    bench.answer(batch)
    batch = bench.send()
    assert len(batch.request.operations) == 10
    bench.answer(batch)
    assert all(each.told.resolved for each in asked)


def test_a_batch_has_a_bounded_size(bench: Bench) -> None:
    root = bench.root(10_000)
    labels = {f"{index:02}": "x" * 250 for index in range(16)}
    for _ in range(300):
        bench.submit(
            root.line,
            requests.delegate(
                root.target,
                Asked(labels),
                children=[Child(f"{bench.now}-{index}", 0, labels=labels) for index in range(8)],
            ),
        )
    batch = bench.send()
    assert batch.request.ByteSize() <= REQUEST_BYTES_MAX
    assert batch.request.ByteSize() > REQUEST_BYTES_MAX // 2


def test_an_attempt_takes_no_longer_than_its_callers_wait(bench: Bench) -> None:
    root = bench.root()
    bench.spend(root, 1)
    bench.now += 3
    assert bench.send().timeout == pytest.approx(2)


# --- lost, and found again ---


@pytest.mark.parametrize("lose", [Bench.lose_answer, Bench.lose_request])
def test_an_operation_whose_fate_is_unknown_is_sent_again_unchanged(
    bench: Bench, lose: Callable[[Bench, Batch], None]
) -> None:
    root = bench.root()
    asked = bench.reserve(root, 10)
    first = bench.send()
    sent = first.request.SerializeToString()
    lose(bench, first)
    assert bench.silent(), "there is a pause between attempts"
    bench.now += 0.1
    second = bench.send()
    assert second.request.SerializeToString() == sent
    bench.answer(second)
    assert asked.told.resolved
    assert len(bench.live(root)) == 1
    assert in_step(bench, root)


def test_the_ledgers_own_word_on_when_to_come_back_counts(bench: Bench) -> None:
    root = bench.root()
    bench.reserve(root, 10)
    bench.brain.failed(bench.send(), Failure("busy", not_done=True, retry_seconds=2.5), bench.now)
    bench.now += 2.4
    assert bench.silent()
    bench.now += 0.1
    bench.send()


def test_what_the_ledger_sent_away_does_not_come_back_early_with_others(bench: Bench) -> None:
    root = bench.root(token=False)
    first = bench.reserve(root, 10)
    busy = Failure("the queue is full", not_done=True, retry_seconds=2.5)
    bench.brain.failed(bench.send(), busy, bench.now)
    bench.reserve(root, 20)
    batch = bench.send()
    assert [op.reserve.amount for op in batch.request.operations] == [20]
    bench.answer(batch)
    bench.now += 2.5
    bench.answer(bench.send())
    assert first.told.resolved


def test_a_pause_ends_when_its_caller_leaves_or_asks_again(bench: Bench) -> None:
    root = bench.root(token=False)
    left, again = bench.reserve(root, 10), bench.reserve(root, 20)
    bench.brain.failed(bench.send(), Failure("busy", not_done=True, retry_seconds=60), bench.now)
    bench.brain.expire(left.ticket, bench.now)
    assert isinstance(left.told.error, LedgerUnavailable)
    told = Told()
    bench.brain.wait_again(again.ticket, told, deadline=bench.now + 5)
    assert [op.reserve.amount for op in bench.send().request.operations] == [20]


def test_a_chain_is_replayed_whole_and_tells_every_caller_the_truth(bench: Bench) -> None:
    root = bench.root(50)
    asked = [bench.reserve(root, amount) for amount in (30, 40, 15, 10, 5)]
    bench.lose_answer(bench.send())
    bench.settle_down()
    fits = [each.told.error is None for each in asked]
    assert fits == [True, False, True, False, True]
    assert bench.live(root) == {each.operation.hold_id for each in asked if each.told.error is None}
    assert in_step(bench, root)


def test_what_a_replay_shows_was_refused_is_asked_anew(bench: Bench) -> None:
    root = bench.root(50)
    large, small = bench.reserve(root, 60), bench.reserve(root, 30)
    before = large.operation.operation_id
    bench.lose_answer(bench.send())
    bench.settle_down()
    assert isinstance(large.told.error, BudgetExhausted)
    assert large.told.error.available == 20, "the answer is the true one of now"
    assert large.operation.operation_id != before, "an id is never used for something else"
    assert small.told.resolved
    assert in_step(bench, root)


def test_answers_behind_an_undecided_one_are_asked_for_again(bench: Bench) -> None:
    root = bench.root()
    asked = [bench.reserve(root, 10) for _ in range(4)]
    bench.answer_before(bench.send(), 1)
    assert [each.told.done() for each in asked] == [True, False, False, False]
    bench.settle_down()
    assert all(each.told.resolved for each in asked)
    assert len(bench.live(root)) == 4
    assert in_step(bench, root)


def test_a_caller_that_left_a_half_answered_chain_leaves_no_hold_behind(bench: Bench) -> None:
    root = bench.root()
    asked = [bench.reserve(root, 10) for _ in range(3)]
    batch = bench.send()
    response = bench.ledger.answer(batch.request)
    response.results[1].Clear()
    response.results[1].unavailable.reason = types_pb2.UNAVAILABLE_REASON_CONTENDED
    asked[2].told.cancelled = True
    bench.brain.abandon(asked[2].ticket, bench.now)
    bench.brain.completed(batch, response, bench.now)
    bench.settle_down()
    assert bench.live(root) == {asked[0].operation.hold_id, asked[1].operation.hold_id}
    assert in_step(bench, root)


def test_behind_one_that_left_no_token_the_others_go_on(bench: Bench) -> None:
    root = bench.root()
    asked = [bench.reserve(root, 10) for _ in range(3)]
    # As a ledger refuses what it cannot read: it does not look up the token, and leaves none.
    batch = bench.send()
    batch.request.operations[0].reserve.ttl.nanos = 2_000_000_000
    bench.answer(batch)
    assert asked[0].told.error is not None
    assert not isinstance(asked[0].told.error, CapabilityUnknown)
    assert not asked[1].told.done()
    bench.settle_down()
    assert asked[1].told.resolved
    assert asked[2].told.resolved


def test_a_wrong_secret_is_refused_and_not_tried_for_ever(bench: Bench) -> None:
    root = bench.root()
    root.line.secret = bytes(32)
    asked = [bench.reserve(root, 10) for _ in range(3)]
    assert bench.settle_down() == 3
    assert all(isinstance(each.told.error, CapabilityUnknown) for each in asked)


def test_an_answer_with_too_few_results_is_no_answer(bench: Bench) -> None:
    root = bench.root()
    asked = [bench.reserve(root, 10) for _ in range(2)]
    batch = bench.send()
    response = bench.ledger.answer(batch.request)
    del response.results[1]
    bench.brain.completed(batch, response, bench.now)
    bench.settle_down()
    assert all(each.told.resolved for each in asked)


def test_a_result_that_says_nothing_is_no_answer(bench: Bench) -> None:
    root = bench.root(token=False)
    asked = bench.reserve(root, 10)
    batch = bench.send()
    bench.brain.completed(batch, wire.BatchResponse(results=[wire.OperationResult()]), bench.now)
    bench.settle_down()
    assert asked.told.resolved
    assert len(bench.live(root)) == 1


def test_a_recovery_goes_in_order_with_what_else_its_line_does(bench: Bench) -> None:
    """It presents no token, and renews it all the same."""
    root = bench.root(bound=True)
    before = bench.spend(root, 1)
    recover = requests.recover(
        Target(root.target.root_id, root.target.budget_id, by_token=False), Asked()
    )
    recovery = bench.submit(root.line, recover)
    behind = bench.spend(root, 2)
    batch = bench.send()
    assert proofs(batch) == ["secret", "holder", "after"]
    bench.lose_answer(batch)
    bench.settle_down()
    for asked in (before, recovery, behind):
        assert asked.told.resolved
    assert in_step(bench, root)


def test_behind_a_recovery_that_was_refused_the_line_goes_on(bench: Bench) -> None:
    root = bench.root()
    recover = requests.recover(
        Target(root.target.root_id, root.target.budget_id, by_token=False), Asked()
    )
    recovery = bench.submit(root.line, recover)
    behind = bench.spend(root, 2)
    bench.settle_down()
    assert isinstance(recovery.told.error, CapabilityUnknown)
    assert behind.told.resolved
    assert in_step(bench, root)


# --- a refusal that comes true later ---


def refused_with_a_stray(bench: Bench, root: Held, amount: int) -> tuple[Asking, wire.BatchRequest]:
    """A reserve that was refused, and a copy of its request that is still on its way."""
    return with_a_stray(bench, bench.reserve(root, amount))


def with_a_stray(bench: Bench, asked: Asking) -> tuple[Asking, wire.BatchRequest]:
    """What was asked is refused, and a copy of its request is still on its way."""
    batch = bench.send()
    stray = wire.BatchRequest()
    stray.CopyFrom(batch.request)
    bench.lose_request(batch)
    bench.now += 0.1
    bench.answer(bench.send())
    assert isinstance(asked.told.error, BudgetExhausted)
    return asked, stray


def test_an_own_duplicate_that_won_late_is_adopted_and_undone(bench: Bench) -> None:
    root = bench.root(50)
    held = bench.reserve(root, 40)
    bench.answer(bench.send())
    _, stray = refused_with_a_stray(bench, root, 20)
    bench.settle(held, 0)
    bench.answer(bench.send())
    bench.ledger.answer(stray)
    assert len(bench.live(root)) == 1
    assert not in_step(bench, root)
    others = [bench.reserve(root, 5), bench.reserve(root, 6)]
    bench.answer(bench.send())
    bench.settle_down()
    assert all(each.told.resolved for each in others)
    assert bench.live(root) == {each.operation.hold_id for each in others}
    assert in_step(bench, root)


def test_several_own_duplicates_that_won_late_are_adopted_one_after_the_other(
    bench: Bench,
) -> None:
    root = bench.root(50)
    held = bench.reserve(root, 50)
    bench.answer(bench.send())
    asked = [bench.reserve(root, 1) for _ in range(3)]
    batch = bench.send()
    stray = wire.BatchRequest()
    stray.CopyFrom(batch.request)
    bench.lose_request(batch)
    bench.now += 0.1
    bench.answer(bench.send())
    assert all(isinstance(each.told.error, BudgetExhausted) for each in asked)
    bench.settle(held, 0)
    bench.answer(bench.send())
    bench.ledger.answer(stray)
    assert len(bench.live(root)) == 3
    use = bench.reserve(root, 5)
    bench.settle_down()
    assert use.told.resolved
    assert bench.live(root) == {use.operation.hold_id}
    assert in_step(bench, root)


@pytest.mark.parametrize("token", [True, False])
def test_a_hold_that_a_late_duplicate_made_is_released_by_itself(
    bench: Bench, *, token: bool
) -> None:
    root = bench.root(50, token=token)
    held = bench.reserve(root, 40)
    bench.answer(bench.send())
    _, stray = refused_with_a_stray(bench, root, 20)
    bench.settle(held, 0)
    bench.answer(bench.send())
    bench.ledger.answer(stray)
    assert len(bench.live(root)) == 1
    bench.settle_down()
    assert not bench.live(root)
    assert bench.brain.idle


@pytest.mark.parametrize("token", [True, False])
def test_children_that_a_late_duplicate_made_are_revoked(bench: Bench, *, token: bool) -> None:
    root = bench.root(50, token=token)
    held = bench.reserve(root, 40)
    bench.answer(bench.send())
    children = [Child("ours", 20), Child("theirs", 0, holder=PRINCIPAL)]
    delegate = requests.delegate(root.target, Asked(), children=children)
    asked, stray = with_a_stray(bench, bench.submit(root.line, delegate))
    bench.settle(held, 0)
    bench.answer(bench.send())
    bench.ledger.answer(stray)
    tree = bench.ledger.trees[root.target.root_id]
    ours, theirs = (tree.budget(child.budget_id) for child in asked.operation.children)
    assert not ours.closed
    if token:
        # Who came before it is told to the next operation of its line.
        bench.spend(root, 1)
    bench.settle_down()
    ours, theirs = (tree.budget(child.budget_id) for child in asked.operation.children)
    assert ours.closed
    assert not theirs.closed
    assert bench.available(root) == 50 - token
    assert bench.brain.idle
    assert not token or in_step(bench, root)


def test_children_that_no_duplicate_made_are_not_missed(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    root = bench.root(50, token=False)
    children = [Child("ours", 60)]
    delegate = requests.delegate(root.target, Asked(), children=children)
    with_a_stray(bench, bench.submit(root.line, delegate))
    bench.settle_down()
    assert bench.brain.idle
    assert not caplog.records


@pytest.mark.parametrize("kind", ["spend", "return"])
def test_what_a_late_duplicate_did_and_cannot_be_undone_is_followed(
    bench: Bench, kind: str
) -> None:
    """It stays done, as the entries say, and the line goes on with the token that it left."""
    root = bench.root(50)
    held = bench.reserve(root, 40)
    bench.answer(bench.send())
    [child] = bench.children(root, 0)
    bench.answer(bench.send())
    if kind == "spend":
        subject = root
        _, stray = with_a_stray(bench, bench.spend(root, 20))
        bench.settle(held, 0)
        bench.answer(bench.send())
    else:
        subject = child
        back = requests.give_back(child.target, Asked(), amount=5, cascade=False)
        _, stray = with_a_stray(bench, bench.submit(child.line, back))
        bench.settle(held, 0)
        bench.answer(bench.send())
        fund = requests.fund(
            root.target, Asked(), descendant_id=child.target.budget_id, amount=9, lease=None
        )
        bench.submit(root.line, fund)
        bench.answer(bench.send())
    bench.ledger.answer(stray)
    assert not in_step(bench, subject)
    asked = bench.spend(subject, 1)
    bench.settle_down()
    assert asked.told.resolved
    assert in_step(bench, subject)
    assert bench.available(subject) == (29 if kind == "spend" else 3)


def test_a_refusal_of_what_was_sent_once_is_not_kept(bench: Bench) -> None:
    root = bench.root(5)
    bench.reserve(root, 10)
    bench.answer(bench.send())
    assert not root.line.refused
    assert bench.brain.wake_at() is None


def test_a_refusal_is_forgotten_once_its_token_is_consumed(bench: Bench) -> None:
    root = bench.root(50)
    refused_with_a_stray(bench, root, 60)
    assert len(root.line.refused) == 1
    bench.reserve(root, 10)
    bench.answer(bench.send())
    assert not root.line.refused


def test_a_token_that_somebody_else_consumed_is_told_with_who_did(bench: Bench) -> None:
    root = bench.root()
    stolen = Line("elsewhere", linear=True, secret=root.line.secret)
    theft = bench.submit(
        stolen, requests.spend(root.target, Asked(), amount=1, reference="", usage=None)
    )
    bench.answer(bench.send())
    asked = [bench.reserve(root, 10) for _ in range(2)]
    bench.settle_down()
    for each in asked:
        assert isinstance(each.told.error, TokenConsumed)
        assert each.told.error.consumed_by.replace("-", "") == theft.operation.operation_id.hex()
        assert each.told.error.consumed_at is not None


# --- callers that leave ---


def test_what_was_never_sent_is_not_sent_once_its_caller_has_gone(bench: Bench) -> None:
    root = bench.root()
    asked = bench.reserve(root, 10)
    bench.brain.expire(asked.ticket, bench.now)
    assert isinstance(asked.told.error, DeadlineExceeded)
    assert bench.silent()
    assert bench.brain.idle


def test_what_was_turned_away_for_certain_is_told_as_unavailable(bench: Bench) -> None:
    root = bench.root()
    asked = bench.reserve(root, 10)
    bench.brain.failed(bench.send(), Failure("draining", not_done=True), bench.now)
    bench.brain.expire(asked.ticket, bench.now)
    assert isinstance(asked.told.error, LedgerUnavailable)
    assert "draining" in str(asked.told.error)
    assert bench.settle_down() == 0


def test_what_was_turned_away_after_its_caller_left_is_forgotten_at_once(bench: Bench) -> None:
    root = bench.root()
    asked = bench.reserve(root, 10)
    batch = bench.send()
    bench.brain.expire(asked.ticket, bench.now)
    bench.brain.failed(batch, Failure("draining", not_done=True), bench.now)
    assert bench.brain.idle


@pytest.mark.parametrize("token", [True, False])
def test_a_reserve_whose_caller_left_is_released_once_it_is_found(
    bench: Bench, *, token: bool
) -> None:
    root = bench.root(token=token)
    asked = bench.reserve(root, 10)
    batch = bench.send()
    bench.brain.expire(asked.ticket, bench.now)
    assert isinstance(asked.told.error, OutcomeUnknown)
    assert asked.told.error.operation_id is not None
    bench.lose_answer(batch)
    assert len(bench.live(root)) == 1
    bench.settle_down()
    assert not bench.live(root)
    assert bench.available(root) == 100


def test_an_answer_that_its_caller_did_not_take_any_more_is_undone(bench: Bench) -> None:
    root = bench.root()
    asked = bench.reserve(root, 10)
    bench.answer(bench.send())
    bench.brain.abandon(asked.ticket, bench.now)
    bench.settle_down()
    assert not bench.live(root)


def test_children_that_nobody_can_reach_are_revoked_and_others_are_not(bench: Bench) -> None:
    root = bench.root()
    children = [Child("lost", 10), Child("found", 20, holder=PRINCIPAL)]
    asked = bench.submit(root.line, requests.delegate(root.target, Asked(), children=children))
    batch = bench.send()
    asked.told.cancelled = True
    bench.brain.abandon(asked.ticket, bench.now)
    bench.answer(batch)
    bench.settle_down()
    assert bench.ledger.budget("root-0/lost").closed
    assert not bench.ledger.budget("root-0/found").closed
    assert bench.available(root) == 80
    assert in_step(bench, root)


def test_a_settle_goes_on_although_its_caller_left(bench: Bench) -> None:
    root = bench.root()
    reserved = bench.reserve(root, 10)
    bench.answer(bench.send())
    settled = bench.settle(reserved, 4)
    settled.told.cancelled = True
    bench.brain.abandon(settled.ticket, bench.now)
    bench.settle_down()
    assert bench.available(root) == 96


def test_a_settle_is_pursued_for_as_long_as_the_client_lives(bench: Bench) -> None:
    root = bench.root()
    reserved = bench.reserve(root, 10)
    bench.answer(bench.send())
    settled = bench.settle(reserved, 4)
    bench.brain.expire(settled.ticket, bench.now)
    for _ in range(100):
        bench.lose_request(bench.send())
        bench.now += 10
    bench.settle_down()
    assert bench.available(root) == 96


def test_what_nobody_waits_for_rests_until_its_line_is_used_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    root = bench.root()
    lost = bench.reserve(root, 10)
    batch = bench.send()
    bench.brain.expire(lost.ticket, bench.now)
    bench.now += 100
    with caplog.at_level(logging.WARNING):
        bench.lose_answer(batch)
    assert "stays unknown" in caplog.text
    assert bench.brain.idle
    assert bench.settle_down() == 0
    use = bench.reserve(root, 20)
    batch = bench.send()
    assert [op.reserve.amount for op in batch.request.operations] == [10, 20], "first things first"
    bench.answer(batch)
    bench.settle_down()
    assert bench.live(root) == {use.operation.hold_id}


def test_an_unknown_outcome_can_be_waited_for_again(bench: Bench) -> None:
    root = bench.root()
    asked = bench.spend(root, 10)
    batch = bench.send()
    bench.brain.expire(asked.ticket, bench.now)
    bench.lose_answer(batch)
    told = Told()
    bench.brain.wait_again(asked.ticket, told, deadline=bench.now + 5)
    bench.settle_down()
    assert told.resolved
    assert bench.available(root) == 90
    late = Told()
    bench.brain.wait_again(asked.ticket, late, deadline=bench.now + 5)
    assert late.resolved


def test_a_refusal_of_the_whole_request_refuses_what_it_carried(bench: Bench) -> None:
    root = bench.root()
    asked = [bench.reserve(root, 10) for _ in range(2)]
    refused = Failure("who are you", refused=Unauthenticated("who are you"), not_done=True)
    bench.brain.failed(bench.send(), refused, bench.now)
    for each in asked:
        assert isinstance(each.told.error, Unauthenticated)
        assert each.told.error.budget == "the root"
    assert bench.brain.idle


def test_a_refusal_of_the_whole_request_does_not_say_what_an_attempt_before_it_did(
    bench: Bench,
) -> None:
    root = bench.root()
    asked = bench.reserve(root, 10)
    bench.lose_answer(bench.send())
    bench.now += 0.1
    refused = Failure("who are you", refused=Unauthenticated("who are you"), not_done=True)
    bench.brain.failed(bench.send(), refused, bench.now)
    assert isinstance(asked.told.error, OutcomeUnknown)
    use = bench.reserve(root, 5)
    bench.settle_down()
    assert bench.live(root) == {use.operation.hold_id}


# --- lines that end ---


def test_behind_the_end_of_a_budget_nothing_is_sent(bench: Bench) -> None:
    root = bench.root()
    operation = requests.delegate(root.target, Asked(), children=[Child("run", 10)])
    bench.submit(root.line, operation)
    bench.answer(bench.send())
    made = operation.children[0]
    line = Line("the child", linear=True, secret=made.secret)
    target = requests.Target(root.target.root_id, made.budget_id, by_token=True)
    bench.submit(line, requests.give_back(target, Asked(), amount=None, cascade=False))
    bench.answer(bench.send())
    late = bench.submit(line, requests.give_back(target, Asked(), amount=1, cascade=False))
    assert bench.silent()
    assert isinstance(late.told.error, CapabilityMoved)


def test_an_end_whose_answer_was_lost_is_found_out_together_with_what_comes_behind(
    bench: Bench,
) -> None:
    root = bench.root()
    operation = requests.delegate(root.target, Asked(), children=[Child("run", 10)])
    bench.submit(root.line, operation)
    bench.answer(bench.send())
    made = operation.children[0]
    line = Line("the child", linear=True, secret=made.secret)
    target = requests.Target(root.target.root_id, made.budget_id, by_token=True)
    ended = bench.submit(line, requests.give_back(target, Asked(), amount=None, cascade=False))
    bench.lose_answer(bench.send())
    late = bench.submit(line, requests.give_back(target, Asked(), amount=1, cascade=False))
    bench.now += 0.1
    bench.answer(bench.send())
    assert ended.told.resolved
    assert isinstance(late.told.error, CapabilityMoved), "not somebody else consumed the token"


def test_an_increment_beyond_what_a_hold_has_left_ends_it(bench: Bench) -> None:
    root = bench.root()
    reserved = bench.reserve(root, 10)
    bench.answer(bench.send())
    line = Line("the hold", linear=True, secret=reserved.operation.hold_secret)
    asked = [
        bench.submit(line, bench.settling(reserved, 4, keep_open=True)),
        bench.submit(line, bench.settling(reserved, 9, keep_open=True)),
    ]
    batch = bench.send()
    assert proofs(batch) == ["secret", "after"]
    bench.answer(batch)
    assert all(each.told.resolved for each in asked)
    assert line.secret is None
    assert bench.available(root) == 87


def test_a_dry_run_leaves_the_token_where_it_is(bench: Bench) -> None:
    root = bench.root()
    before = root.line.secret
    dry = bench.submit(
        root.line, requests.reserve(root.target, Asked(dry_run=True), amount=10, ttl=None)
    )
    bench.answer(bench.send())
    assert dry.told.resolved
    assert root.line.secret == before
    assert in_step(bench, root)
    wet = bench.reserve(root, 10)
    bench.answer(bench.send())
    assert wet.told.resolved
    assert bench.live(root) == {wet.operation.hold_id}


# --- sections ---


def test_a_section_has_the_token_to_itself_after_what_came_before(bench: Bench) -> None:
    root = bench.root()
    before = bench.spend(root, 1)
    section = bench.submit(root.line, None)
    after = bench.spend(root, 2)
    batch = bench.send()
    assert len(batch.request.operations) == 1
    assert not section.told.done()
    bench.answer(batch)
    assert before.told.resolved
    assert bench.silent()
    assert section.told.resolved
    assert in_step(bench, root)
    bench.brain.leave_section(section.ticket)
    bench.answer(bench.send())
    assert after.told.resolved


def test_a_section_whose_caller_left_lets_the_line_go_on(bench: Bench) -> None:
    root = bench.root()
    entered, waiting = bench.submit(root.line, None), bench.submit(root.line, None)
    after = bench.spend(root, 2)
    assert bench.silent()
    bench.brain.expire(waiting.ticket, bench.now)
    assert isinstance(waiting.told.error, DeadlineExceeded)
    bench.brain.abandon(entered.ticket, bench.now)
    bench.answer(bench.send())
    assert after.told.resolved


# --- waiting for own holds ---


def test_a_reserve_waits_for_a_hold_of_this_process(bench: Bench) -> None:
    root = bench.root(50)
    reserved = bench.reserve(root, 40)
    bench.answer(bench.send())
    waiting = bench.reserve(root, 30, wait=60)
    bench.answer(bench.send())
    assert not waiting.told.done()
    assert bench.silent()
    bench.settle(reserved, 5)
    bench.answer(bench.send())
    bench.answer(bench.send())
    assert waiting.told.resolved


def test_without_wait_a_reserve_is_refused_at_once(bench: Bench) -> None:
    root = bench.root(50)
    bench.reserve(root, 40)
    bench.answer(bench.send())
    asked = bench.reserve(root, 30)
    bench.answer(bench.send())
    assert isinstance(asked.told.error, BudgetExhausted)
    assert asked.told.error.remedy == "wait_for_holds"


def test_a_reserve_does_not_wait_for_what_own_holds_cannot_free(bench: Bench) -> None:
    root = bench.root(50)
    bench.reserve(root, 40)
    bench.answer(bench.send())
    asked = bench.reserve(root, 60, wait=60)
    bench.answer(bench.send())
    assert isinstance(asked.told.error, BudgetExhausted)
    assert asked.told.error.remedy == "top_up"


def test_a_reserve_does_not_wait_for_holds_of_others(bench: Bench) -> None:
    root = bench.root(50, token=False)
    elsewhere = Bench()
    elsewhere.ledger = bench.ledger
    elsewhere.reserve(root, 40)
    elsewhere.answer(elsewhere.send())
    line = Line("the root", linear=False)
    asked = bench.submit(line, requests.reserve(root.target, Asked(), amount=30, ttl=None), wait=60)
    bench.answer(bench.send())
    assert isinstance(asked.told.error, BudgetExhausted)


def test_waiting_is_bounded(bench: Bench) -> None:
    root = bench.root(50)
    bench.reserve(root, 40)
    bench.answer(bench.send())
    waiting = bench.reserve(root, 30, wait=60)
    bench.answer(bench.send())
    assert bench.brain.wake_at() == bench.now + 60
    bench.now += 60
    assert bench.silent()
    assert isinstance(waiting.told.error, BudgetExhausted)


def test_whoever_waits_longest_is_served_first_and_is_not_overtaken(bench: Bench) -> None:
    root = bench.root(100)
    holds = [bench.reserve(root, 50), bench.reserve(root, 50)]
    bench.answer(bench.send())
    large, small = bench.reserve(root, 80, wait=60), bench.reserve(root, 10, wait=60)
    bench.answer(bench.send())
    bench.settle(holds[0], 0)
    bench.answer(bench.send())
    assert bench.silent(), "50 are free, and the first in line needs 80"
    bench.settle(holds[1], 0)
    bench.answer(bench.send())
    bench.answer(bench.send())
    assert large.told.resolved
    assert small.told.resolved


def test_nobody_waits_once_no_own_hold_is_left(bench: Bench) -> None:
    root = bench.root(50)
    reserved = bench.reserve(root, 40)
    bench.answer(bench.send())
    waiting = bench.reserve(root, 30, wait=60)
    bench.answer(bench.send())
    bench.settle(reserved, 40)
    bench.answer(bench.send())
    assert isinstance(waiting.told.error, BudgetExhausted)
    assert bench.brain.idle


def test_nobody_waits_for_a_hold_that_somebody_else_has_ended(bench: Bench) -> None:
    root = bench.root(50, token=False)
    reserved = bench.reserve(root, 40)
    bench.answer(bench.send())
    waiting = bench.reserve(root, 30, wait=60)
    bench.answer(bench.send())
    elsewhere = Bench()
    elsewhere.ledger = bench.ledger
    elsewhere.settle(reserved, 40)
    elsewhere.answer(elsewhere.send())
    late = bench.settle(reserved, 40)
    bench.answer(bench.send())
    assert isinstance(late.told.error, TokenConsumed)
    assert isinstance(waiting.told.error, BudgetExhausted)


def test_who_is_woken_in_a_chain_that_is_answered_in_part_goes_with_the_rest(bench: Bench) -> None:
    root = bench.root(50)
    reserved = bench.reserve(root, 40)
    bench.answer(bench.send())
    waiting = bench.reserve(root, 30, wait=60)
    bench.answer(bench.send())
    hold_id = reserved.operation.hold_id
    bench.submit(
        root.line,
        requests.resolve(root.target, Asked(), hold_id=hold_id, actual=0, reason="a test"),
    )
    behind = bench.spend(root, 1)
    bench.answer_before(bench.send(), 1)
    batch = bench.send()
    assert proofs(batch) == ["secret", "after"]
    bench.spend(root, 2)
    bench.now += 30
    assert bench.silent(), "its token is on its way"
    bench.answer(batch)
    assert behind.told.resolved
    assert waiting.told.resolved
    assert in_step(bench, root)


def test_a_refusal_that_is_older_than_the_end_of_a_hold_is_not_believed(bench: Bench) -> None:
    root = bench.root(50, token=False)
    reserved = bench.reserve(root, 40)
    bench.answer(bench.send())
    waiting = bench.reserve(root, 30, wait=60)
    asked_first = bench.send()
    response = bench.ledger.answer(asked_first.request)
    bench.settle(reserved, 0)
    bench.answer(bench.send())
    bench.brain.completed(asked_first, response, bench.now)
    bench.settle_down()
    assert waiting.told.resolved


def test_a_reserve_waits_also_if_its_first_attempt_was_lost(bench: Bench) -> None:
    root = bench.root(50)
    reserved = bench.reserve(root, 40)
    bench.answer(bench.send())
    waiting = bench.reserve(root, 30, wait=60)
    stray = wire.BatchRequest()
    batch = bench.send()
    stray.CopyFrom(batch.request)
    bench.lose_request(batch)
    bench.now += 0.1
    bench.answer(bench.send())
    assert not waiting.told.done()
    bench.settle(reserved, 0)
    bench.answer(bench.send())
    bench.ledger.answer(stray)
    bench.settle_down()
    assert waiting.told.resolved
    assert bench.live(root) == {waiting.operation.hold_id}
    assert in_step(bench, root)


def test_a_waiter_that_leaves_does_not_hold_up_the_next(bench: Bench) -> None:
    root = bench.root(50)
    reserved = bench.reserve(root, 50)
    bench.answer(bench.send())
    first, second = bench.reserve(root, 40, wait=60), bench.reserve(root, 30, wait=60)
    bench.answer(bench.send())
    first.told.cancelled = True
    bench.brain.abandon(first.ticket, bench.now)
    bench.settle(reserved, 20)
    bench.answer(bench.send())
    bench.answer(bench.send())
    assert second.told.resolved
    assert not first.told.answers


# --- what is written down ---


class Unknown(Recorder):
    """Of what was sent, what has not become known."""

    def __init__(self) -> None:
        self.ids: set[bytes] = set()

    def sending(self, _: str, operation: Operation, **__: Any) -> None:
        self.ids.add(operation.operation_id)

    def accepted(self, _: str, operation: Operation, *__: Any, **___: Any) -> None:
        self.ids.discard(operation.operation_id)

    def ended(self, operation: Operation) -> None:
        self.ids.discard(operation.operation_id)


@pytest.fixture
def unknown(bench: Bench) -> Unknown:
    recorder = Unknown()
    bench.brain._recorder = recorder
    return recorder


def test_whatever_was_sent_is_unknown_until_it_is_known(bench: Bench, unknown: Unknown) -> None:
    root = bench.root()
    asked = bench.reserve(root, 10)
    batch = bench.send()
    assert unknown.ids == {asked.operation.operation_id}
    bench.lose_answer(batch)
    assert unknown.ids == {asked.operation.operation_id}
    bench.settle_down()
    assert not unknown.ids


def test_what_was_refused_is_known(bench: Bench, unknown: Unknown) -> None:
    root = bench.root(5)
    bench.reserve(root, 10)
    bench.answer(bench.send())
    assert not unknown.ids


def test_what_was_turned_away_is_known_once_nobody_wants_it(bench: Bench, unknown: Unknown) -> None:
    root = bench.root()
    asked = bench.reserve(root, 10)
    bench.brain.failed(bench.send(), NOT_DONE, bench.now)
    bench.brain.expire(asked.ticket, bench.now)
    assert isinstance(asked.told.error, LedgerUnavailable)
    assert not unknown.ids


def test_what_is_asked_anew_is_known_not_to_have_happened(bench: Bench, unknown: Unknown) -> None:
    root = bench.root(50)
    bench.reserve(root, 60)
    behind = bench.spend(root, 1)
    bench.lose_answer(bench.send())
    bench.settle_down()
    assert behind.told.resolved
    assert not unknown.ids


def test_what_a_ledger_that_went_back_has_said_is_not_known(bench: Bench, unknown: Unknown) -> None:
    root = bench.root()
    restore = bench.ledger.backup()
    bench.answer_all(*(bench.spend(root, 1) for _ in range(3)))
    asked = bench.spend(root, 1)
    batch = bench.send()
    restore()
    bench.answer(batch)
    assert unknown.ids == {asked.operation.operation_id}
