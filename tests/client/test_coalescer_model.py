"""Whatever is lost, late, repeated or given up: in the end client and ledger agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peculium import _requests as requests
from peculium._coalescer import Batch, Coalescer, Line, Place, Ticket
from peculium._ids import token_id
from peculium._requests import Asked, HoldTarget, Operation, Target
from peculium._retry import Failure, Policy
from peculium.errors import OutcomeUnknown, PeculiumError, Refused
from peculium.v1 import ledger_service_pb2 as wire
from peculium_server.core.state import Budget
from tests.client.ledger import PRINCIPAL, Ledger

AMOUNT = 100
POLICY = Policy(first_seconds=0.1, longest_seconds=1.0)
LOST = Failure("lost")
NOT_DONE = Failure("not done", not_done=True)


@dataclass(eq=False)
class Told:
    """A future that remembers what a caller was told."""

    result: Ticket | None = None
    error: BaseException | None = None
    cancelled: bool = False
    answers: int = 0

    def done(self) -> bool:
        return self.answers > 0 or self.cancelled

    def set_result(self, result: Ticket, /) -> None:
        self.result = result
        self.answers += 1

    def set_exception(self, exception: BaseException, /) -> None:
        self.error = exception
        self.answers += 1


@dataclass(eq=False)
class Held:
    """A budget and the line of its operations."""

    target: Target
    line: Line
    tickets: list[tuple[Ticket, Told]] = field(default_factory=list)


class Coalescing(RuleBasedStateMachine):
    """One token-held and one principal-held root, a bad connection, and impatient callers."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.ledger = Ledger()
        self.brain = Coalescer(
            policy=POLICY, jitter=lambda: 1.0, flights_max=3, finish_seconds=20.0
        )
        self.budgets = [self.granted(token=True), self.granted(token=False)]
        self.flying: list[Batch] = []
        self.strays: list[tuple[float, wire.BatchRequest]] = []
        self.settled: list[tuple[bytes, Told]] = []

    def granted(self, *, token: bool) -> Held:
        asked = requests.grant(
            Asked(),
            name=f"root-{token}",
            unit="calls",
            amount=AMOUNT,
            holder=None if token else PRINCIPAL,
            receiver=None,
            token=token,
        )
        self.ledger.grant(asked.request)
        root_id = asked.request.header.root_id
        line = Line("root", linear=token, secret=asked.secret)
        return Held(Target(root_id, root_id, by_token=token), line)

    def submit(self, held: Held, operation: Operation, wait: float = 0.0) -> None:
        told = Told()
        ticket = self.brain.submit(
            held.line,
            operation,
            told,
            now=self.now,
            deadline=self.now + 5 + wait,
            wait_until=self.now + wait if wait else 0.0,
        )
        held.tickets.append((ticket, told))

    # --- callers ---

    @rule(which=st.integers(0, 1), amount=st.integers(1, 60), wait=st.sampled_from([0, 0, 3]))
    def reserve(self, which: int, amount: int, wait: int) -> None:
        held = self.budgets[which]
        operation = requests.reserve(held.target, Asked(), amount=amount, ttl=None)
        self.submit(held, operation, float(wait))

    @rule(which=st.integers(0, 1), amounts=st.lists(st.integers(1, 40), min_size=2, max_size=6))
    def reserve_many(self, which: int, amounts: list[int]) -> None:
        for amount in amounts:
            self.reserve(which, amount, 0)

    @rule(which=st.integers(0, 1), amount=st.integers(1, 10))
    def spend(self, which: int, amount: int) -> None:
        held = self.budgets[which]
        self.submit(
            held,
            requests.spend(held.target, Asked(), amount=amount, reference="", usage=None),
        )

    def reserved(self) -> list[tuple[Held, Ticket]]:
        """Holds that a caller has and did not begin to settle."""
        begun = {hold_id for hold_id, _ in self.settled}
        return [
            (held, ticket)
            for held in self.budgets
            for ticket, told in held.tickets
            if told.result is not None
            and ticket.operation is not None
            and ticket.operation.kind == "reserve"
            and ticket.operation.hold_id not in begun
        ]

    @precondition(lambda self: self.reserved())
    @rule(data=st.data(), actual=st.integers(0, 80))
    def settle(self, data: Any, actual: int) -> None:
        held, ticket = data.draw(st.sampled_from(self.reserved()))
        reservation = ticket.operation
        hold = HoldTarget(held.target.root_id, held.target.budget_id, reservation.hold_id)
        operation = requests.settle(
            hold,
            Asked(),
            actual=actual,
            keep_open=False,
            reference="",
            usage=None,
            estimated=False,
        )
        line = Line("hold", linear=True, secret=reservation.hold_secret)
        told = Told()
        self.brain.submit(line, operation, told, now=self.now, deadline=self.now + 5)
        self.settled.append((reservation.hold_id, told))

    def waiting(self) -> list[tuple[Ticket, Told]]:
        return [
            (ticket, told)
            for held in self.budgets
            for ticket, told in held.tickets
            if not told.done()
        ]

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def expire(self, data: Any) -> None:
        ticket, _ = data.draw(st.sampled_from(self.waiting()))
        self.brain.expire(ticket, self.now)

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        ticket, told = data.draw(st.sampled_from(self.waiting()))
        told.cancelled = True
        self.brain.abandon(ticket, self.now)

    # --- the connection ---

    @rule()
    def send(self) -> None:
        batch = self.brain.next_batch(self.now)
        if batch is not None:
            self.flying.append(batch)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def answer(self, data: Any) -> None:
        batch = self.land(data)
        self.brain.completed(batch, self.ledger.answer(batch.request), self.now)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), first=st.integers(0, 5))
    def answer_in_part(self, data: Any, first: int) -> None:
        batch = self.land(data)
        response = self.ledger.answer(batch.request, lambda index: index >= first)
        self.brain.completed(batch, response, self.now)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def lose_the_answer(self, data: Any) -> None:
        batch = self.land(data)
        self.ledger.answer(batch.request)
        self.brain.failed(batch, LOST, self.now)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def lose_the_request_on_its_way(self, data: Any) -> None:
        batch = self.land(data)
        # The server decides nothing once the attempt's time is over.
        self.strays.append((self.now + batch.timeout, copied(batch.request)))
        self.brain.failed(batch, LOST, self.now)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def turn_the_request_away(self, data: Any) -> None:
        self.brain.failed(self.land(data), NOT_DONE, self.now)

    @precondition(lambda self: self.strays)
    @rule(data=st.data())
    def a_stray_arrives(self, data: Any) -> None:
        until, request = self.strays.pop(data.draw(st.integers(0, len(self.strays) - 1)))
        if self.now < until:
            self.ledger.answer(request)

    @rule(seconds=st.sampled_from([0.05, 0.5, 3.0, 30.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def land(self, data: Any) -> Batch:
        return self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))

    # --- what holds ---

    @invariant()
    def nobody_is_told_twice(self) -> None:
        for held in self.budgets:
            assert all(told.answers <= 1 for _, told in held.tickets)

    @invariant()
    def a_token_travels_once_at_a_time(self) -> None:
        line = self.budgets[0].line
        carrying = [batch for batch in self.flying if any(t.line is line for t in batch.tickets)]
        assert len(carrying) <= 1

    def teardown(self) -> None:
        self.drain()
        # A use of each handle resolves what was given up on.
        for held in self.budgets:
            use = requests.accept if held.line.linear else _least_spend
            self.submit(held, use(held.target, Asked()))
        self.drain()
        assert self.brain.idle
        for held in self.budgets:
            assert not held.line.parked
            for ticket, told in held.tickets:
                assert told.done() or told.cancelled
                assert ticket.place is Place.DONE
                self.check_told(held, ticket, told)
        self.check_tokens()
        self.check_holds()

    def drain(self) -> None:
        for _ in range(10_000):
            while (batch := self.brain.next_batch(self.now)) is not None:
                self.flying.append(batch)
            if not self.flying and self.brain.wake_at() is None:
                return
            for batch in self.flying:
                self.brain.completed(batch, self.ledger.answer(batch.request), self.now)
            self.flying.clear()
            self.now = max(self.now, self.brain.wake_at() or self.now)
        raise AssertionError("the client does not come to rest")

    def check_told(self, held: Held, ticket: Ticket, told: Told) -> None:
        tree = self.ledger.trees[held.target.root_id]
        assert ticket.operation is not None
        recorded = tree.recorded[ticket.operation.operation_id]
        if told.result is not None:
            assert recorded is not None, "told of something that never happened"
        elif isinstance(told.error, PeculiumError) and not isinstance(
            told.error, OutcomeUnknown | Refused
        ):
            assert recorded is None, f"told {told.error!r} of something that happened"

    def check_tokens(self) -> None:
        held = self.budgets[0]
        assert held.line.secret is not None
        assert self.budget(held).token == token_id(held.line.secret)

    def check_holds(self) -> None:
        ended = {hold_id for hold_id, told in self.settled if told.result is not None}
        for held in self.budgets:
            mine = {
                ticket.operation.hold_id
                for ticket, told in held.tickets
                if ticket.operation is not None
                and ticket.operation.kind == "reserve"
                and told.result is not None
            }
            tree = self.ledger.trees[held.target.root_id]
            live: set[bytes] = {
                hold.hold_id for hold in self.ledger.holds(tree, held.target.budget_id)
            }
            unknown = {hold_id for hold_id, told in self.settled if told.result is None}
            assert live - unknown == mine - ended - unknown, "a hold leaked, or was lost"

    def budget(self, held: Held) -> Budget:
        return self.ledger.trees[held.target.root_id].budget(held.target.budget_id)


def _least_spend(target: Target, asked: Asked) -> Operation:
    return requests.spend(target, asked, amount=1, reference="", usage=None)


def copied(request: wire.BatchRequest) -> wire.BatchRequest:
    made = wire.BatchRequest()
    made.CopyFrom(request)
    return made


Coalescing.TestCase.settings = settings(stateful_step_count=40)
TestCoalescing = pytest.mark.timeout(600)(Coalescing.TestCase)
