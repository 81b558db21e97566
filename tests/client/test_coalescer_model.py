"""Whatever is lost, late, repeated or given up: in the end client and ledger agree."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peculium import _requests as requests
from peculium._coalescer import Batch, Place
from peculium._ids import token_id
from peculium._requests import Asked
from peculium.errors import OutcomeUnknown, PeculiumError, Refused
from peculium.v1 import ledger_service_pb2 as wire
from tests.client.lines import NOT_DONE, Asking, Bench, Held

COUNTS = st.integers(0, 5)
WHICH = st.integers(0, 1)


class Coalescing(RuleBasedStateMachine):
    """One token-held and one principal-held root, a bad connection, and impatient callers."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.budgets = [self.bench.root(), self.bench.root(token=False)]
        self.settled: list[tuple[Asking, Asking]] = []
        """Reserves, and what settles them."""
        self.flying: list[Batch] = []
        self.strays: list[tuple[float, wire.BatchRequest]] = []

    # --- callers ---

    @rule(which=WHICH, amount=st.integers(1, 60), wait=st.sampled_from([0.0, 0.0, 3.0]))
    def reserve(self, which: int, amount: int, wait: float) -> None:
        held = self.budgets[which]
        held.asked.append(self.bench.reserve(held, amount, wait=wait))

    @rule(which=WHICH, amounts=st.lists(st.integers(1, 40), min_size=2, max_size=6))
    def reserve_many(self, which: int, amounts: list[int]) -> None:
        for amount in amounts:
            self.reserve(which, amount, 0.0)

    @rule(which=WHICH, amount=st.integers(1, 10))
    def spend(self, which: int, amount: int) -> None:
        held = self.budgets[which]
        held.asked.append(self.bench.spend(held, amount))

    def reserved(self) -> list[Asking]:
        """Reserves whose hold a caller has and did not begin to settle."""
        begun = [reserve for reserve, _ in self.settled]
        return [
            asked
            for held in self.budgets
            for asked in held.asked
            if asked.told.resolved and asked.operation.kind == "reserve" and asked not in begun
        ]

    @precondition(lambda self: self.reserved())
    @rule(data=st.data(), actual=st.integers(0, 80))
    def settle(self, data: Any, actual: int) -> None:
        reserved = self.pick(data, self.reserved())
        self.settled.append((reserved, self.bench.settle(reserved, actual)))

    def waiting(self) -> list[Asking]:
        return [each for held in self.budgets for each in held.asked if not each.told.done()]

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def expire(self, data: Any) -> None:
        self.bench.brain.expire(self.pick(data, self.waiting()).ticket, self.bench.now)

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        asked = self.pick(data, self.waiting())
        asked.told.cancelled = True
        self.bench.brain.abandon(asked.ticket, self.bench.now)

    # --- the connection ---

    @rule()
    def send(self) -> None:
        batch = self.bench.brain.next_batch(self.bench.now)
        if batch is not None:
            self.flying.append(batch)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def answer(self, data: Any) -> None:
        self.bench.answer(self.land(data))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), first=COUNTS)
    def answer_in_part(self, data: Any, first: int) -> None:
        self.bench.answer_before(self.land(data), first)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def lose_the_answer(self, data: Any) -> None:
        self.bench.lose_answer(self.land(data))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def lose_the_request_on_its_way(self, data: Any) -> None:
        batch = self.land(data)
        stray = wire.BatchRequest()
        stray.CopyFrom(batch.request)
        # The server decides nothing once the attempt's time is over.
        self.strays.append((self.bench.now + batch.timeout, stray))
        self.bench.lose_request(batch)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def turn_the_request_away(self, data: Any) -> None:
        self.bench.brain.failed(self.land(data), NOT_DONE, self.bench.now)

    @precondition(lambda self: self.strays)
    @rule(data=st.data())
    def a_stray_arrives(self, data: Any) -> None:
        until, stray = self.strays.pop(data.draw(st.integers(0, len(self.strays) - 1)))
        if self.bench.now < until:
            self.bench.ledger.answer(stray)

    @rule(seconds=st.sampled_from([0.05, 0.5, 3.0, 30.0]))
    def pass_time(self, seconds: float) -> None:
        self.bench.now += seconds

    def land(self, data: Any) -> Batch:
        return self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))

    @staticmethod
    def pick(data: Any, asked: list[Asking]) -> Asking:
        index: int = data.draw(st.integers(0, len(asked) - 1))
        return asked[index]

    # --- what holds ---

    @invariant()
    def nobody_is_told_twice(self) -> None:
        for held in self.budgets:
            assert all(asked.told.answers <= 1 for asked in held.asked)

    @invariant()
    def a_token_travels_once_at_a_time(self) -> None:
        line = self.budgets[0].line
        carrying = [batch for batch in self.flying if any(t.line is line for t in batch.tickets)]
        assert len(carrying) <= 1

    def teardown(self) -> None:
        self.come_to_rest()
        # A use of each handle resolves what was given up on.
        for held in self.budgets:
            use = requests.accept(held.target, Asked()) if held.line.linear else None
            if use is None:
                held.asked.append(self.bench.spend(held, 1))
            else:
                held.asked.append(self.bench.submit(held.line, use))
        self.come_to_rest()
        assert self.bench.brain.idle
        for held in self.budgets:
            for asked in held.asked:
                self.check_told(held, asked)
            self.check_holds(held)
        self.check_token(self.budgets[0])

    def come_to_rest(self) -> None:
        for batch in self.flying:
            self.bench.answer(batch)
        self.flying.clear()
        self.bench.settle_down()

    def check_told(self, held: Held, asked: Asking) -> None:
        assert asked.told.done()
        assert asked.ticket.place is Place.DONE
        tree = self.bench.ledger.trees[held.target.root_id]
        happened = tree.recorded[asked.operation.operation_id] is not None
        error = asked.told.error
        if asked.told.resolved:
            assert happened, "told of something that never happened"
        elif isinstance(error, PeculiumError) and not isinstance(error, OutcomeUnknown | Refused):
            assert not happened, f"told {error!r} of something that happened"

    def check_holds(self, held: Held) -> None:
        settles = {reserve.operation.hold_id: settle for reserve, settle in self.settled}
        expected = {
            asked.operation.hold_id
            for asked in held.asked
            if asked.operation.kind == "reserve" and asked.told.resolved
        } - settles.keys()
        assert self.bench.live(held) == expected, "a hold leaked, or was lost"

    def check_token(self, held: Held) -> None:
        tree = self.bench.ledger.trees[held.target.root_id]
        assert held.line.secret is not None
        assert tree.budget(held.target.budget_id).token == token_id(held.line.secret)


Coalescing.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
TestCoalescing = pytest.mark.timeout(600)(Coalescing.TestCase)
