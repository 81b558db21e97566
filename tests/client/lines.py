"""The coalescer with a ledger at the other end and no connection between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from peculium import _requests as requests
from peculium._coalescer import Batch, Coalescer, Line, Ticket
from peculium._history import History
from peculium._recorder import Recorder
from peculium._requests import Asked, Operation, Target
from peculium._retry import Failure, Policy
from peculium.values import Child
from tests.client.ledger import PRINCIPAL, Ledger

POLICY = Policy(first_seconds=0.1, longest_seconds=1.0, attempt_seconds=5.0)
LOST = Failure("lost")
NOT_DONE = Failure("not done", not_done=True)


@dataclass(eq=False)
class Told:
    """A future that remembers what a caller was told."""

    resolved: bool = False
    error: BaseException | None = None
    cancelled: bool = False
    answers: int = 0

    def done(self) -> bool:
        return self.answers > 0 or self.cancelled

    def set_result(self, _: None, /) -> None:
        self.resolved = True
        self.answers += 1

    def set_exception(self, exception: BaseException, /) -> None:
        self.error = exception
        self.answers += 1


@dataclass(eq=False)
class Asking:
    """One caller's operation."""

    ticket: Ticket
    told: Told

    @property
    def operation(self) -> Operation:
        assert self.ticket.operation is not None
        return self.ticket.operation


@dataclass(eq=False)
class Held:
    """A root and the line of its operations."""

    target: Target
    line: Line
    asked: list[Asking] = field(default_factory=list)


class Bench:
    """A client's brain, a ledger, and a clock that stands still."""

    def __init__(self, *, flights_max: int = 3, finish_seconds: float = 20.0) -> None:
        self.now = 1000.0
        self.ledger = Ledger()
        self.history = History()
        self.brain = Coalescer(
            policy=POLICY,
            jitter=lambda: 1.0,
            flights_max=flights_max,
            history=self.history,
            recorder=Recorder(),
            finish_seconds=finish_seconds,
        )

    def root(self, amount: int = 100, *, token: bool = True, bound: bool = False) -> Held:
        """Make a root, held by principal, or by token: a bearer's, or one that is bound to it."""
        asked = requests.grant(
            Asked(),
            name=f"root-{len(self.ledger.trees)}",
            unit="calls",
            amount=amount,
            holder=PRINCIPAL if bound or not token else None,
            receiver=None,
            token=token,
        )
        self.ledger.grant(asked.request)
        root_id = asked.request.header.root_id
        line = Line("the root", linear=token, secret=asked.secret)
        return Held(Target(root_id, root_id, by_token=token), line)

    def submit(self, line: Line, operation: Operation | None, *, wait: float = 0.0) -> Asking:
        """Ask for an operation, with five seconds for it."""
        told = Told()
        until = self.now + wait
        ticket = Ticket(line, operation, told, until + 5, until if wait else 0.0)
        self.brain.submit(ticket)
        return Asking(ticket, told)

    def reserve(self, held: Held, amount: int, *, wait: float = 0.0) -> Asking:
        operation = requests.reserve(held.target, Asked(), amount=amount, ttl=None)
        return self.submit(held.line, operation, wait=wait)

    def spend(self, held: Held, amount: int) -> Asking:
        operation = requests.spend(held.target, Asked(), amount=amount, reference="", usage=None)
        return self.submit(held.line, operation)

    def children(self, held: Held, *amounts: int) -> list[Held]:
        """Ask for children, held by token."""
        specs = [Child(f"child-{index}", amount) for index, amount in enumerate(amounts)]
        operation = requests.delegate(held.target, Asked(), children=specs)
        self.submit(held.line, operation)
        return [
            Held(
                Target(operation.root_id, child.budget_id, by_token=True),
                Line(child.name, linear=True, secret=child.secret),
            )
            for child in operation.children
        ]

    def settle(self, reserved: Asking, actual: int | None, *, keep_open: bool = False) -> Asking:
        """Settle a hold, in a line of its own."""
        made = reserved.operation
        line = Line("the hold", linear=True, secret=made.hold_secret)
        return self.submit(line, self.settling(reserved, actual, keep_open=keep_open))

    @staticmethod
    def settling(reserved: Asking, actual: int | None, *, keep_open: bool = False) -> Operation:
        made = reserved.operation
        hold = requests.HoldTarget(made.root_id, made.budget_id, made.hold_id)
        return requests.settle(
            hold,
            Asked(),
            actual=actual,
            keep_open=keep_open,
            reference="",
            usage=None,
            estimated=False,
        )

    def send(self) -> Batch:
        """The next batch, of which there is one."""
        batch = self.brain.next_batch(self.now)
        assert batch is not None, "nothing to send"
        return batch

    def silent(self) -> bool:
        """Whether there is nothing to send now."""
        return self.brain.next_batch(self.now) is None

    def answer(self, batch: Batch) -> None:
        self.brain.completed(batch, self.ledger.answer(batch.request), self.now)

    def answer_all(self, *_: Asking) -> None:
        """Send what was asked, and answer it."""
        self.answer(self.send())

    def answer_before(self, batch: Batch, index: int) -> None:
        """Decide the whole batch, and tell the answers before an index only."""
        response = self.ledger.answer(batch.request, lambda at: at >= index)
        self.brain.completed(batch, response, self.now)

    def lose_answer(self, batch: Batch) -> None:
        self.ledger.answer(batch.request)
        self.brain.failed(batch, LOST, self.now)

    def lose_request(self, batch: Batch) -> None:
        self.brain.failed(batch, LOST, self.now)

    def settle_down(self) -> int:
        """Send and answer until nothing is left, as time passes; how many requests that took."""
        count = 0
        for _ in range(1000):
            batch = self.brain.next_batch(self.now)
            if batch is not None:
                self.answer(batch)
                count += 1
            elif (wake_at := self.brain.wake_at()) is not None:
                self.now = max(self.now, wake_at)
            else:
                return count
        raise AssertionError("the client does not come to rest")

    def live(self, held: Held) -> set[bytes]:
        """The ids of the holds that can still be settled."""
        tree = self.ledger.trees[held.target.root_id]
        return {hold.hold_id for hold in self.ledger.holds(tree, held.target.budget_id)}

    def available(self, held: Held) -> int:
        return self.ledger.trees[held.target.root_id].budget(held.target.budget_id).money.available
