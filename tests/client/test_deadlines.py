from __future__ import annotations

import math

from peculium._coalescer import Line, Ticket
from peculium._deadlines import Deadlines
from tests.client.lines import Told


def waited_for(deadline: float) -> Ticket:
    return Ticket(Line("a line", linear=False), None, Told(), deadline)


def answer(ticket: Ticket) -> None:
    assert ticket.future is not None
    ticket.future.set_result(None)


def test_those_are_due_whose_time_is_over_and_who_are_still_waited_for() -> None:
    deadlines = Deadlines()
    answered, early, late = (waited_for(at) for at in (1.0, 2.0, 3.0))
    for ticket in (late, answered, early):
        deadlines.add(ticket)
    answer(answered)
    deadlines.leave()
    assert deadlines.due(2.5) == [early]
    assert deadlines.next() == 3.0
    assert deadlines.due(3.0) == [late]
    assert deadlines.next() == math.inf


def test_whoever_waits_again_has_the_later_deadline() -> None:
    deadlines = Deadlines()
    ticket = waited_for(1.0)
    deadlines.add(ticket)
    answer(ticket)
    deadlines.leave()
    ticket.future, ticket.deadline = Told(), 5.0
    deadlines.add(ticket)
    assert deadlines.due(2.0) == []
    assert deadlines.due(5.0) == [ticket]


def test_what_was_answered_long_ago_is_not_kept() -> None:
    deadlines = Deadlines()
    for number in range(10_000):
        ticket = waited_for(1000.0 + number)
        deadlines.add(ticket)
        answer(ticket)
        deadlines.leave()
    assert len(deadlines._heap) < 100
