from __future__ import annotations

import inspect
import pickle
import re
from datetime import UTC, datetime

import pytest

from peculium import errors
from peculium.errors import (
    BudgetExhausted,
    BudgetFrozen,
    Invalid,
    LiveHolds,
    NameTaken,
    OpenChildren,
    OperationTooOld,
    OutcomeUnknown,
    PeculiumError,
    Refused,
    TokenConsumed,
    TreeOverrun,
    Unavailable,
)

BRANCHES = (Refused, Invalid, Unavailable)
CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, PeculiumError) and cls is not PeculiumError
]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_on_one_branch(cls: type[PeculiumError]) -> None:
    assert sum(issubclass(cls, branch) for branch in BRANCHES) == 1
    assert cls.__doc__


def test_the_tree_that_is_drawn_is_the_tree_that_is_there() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert sorted(drawn) == sorted(cls.__name__ for cls in CLASSES)
    names = {cls.__name__: cls for cls in CLASSES}
    branch = None
    for name in drawn:
        if names[name] in BRANCHES:
            branch = names[name]
        else:
            assert branch is not None
            assert issubclass(names[name], branch)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_travels_between_processes(cls: type[PeculiumError]) -> None:
    error = cls("no", budget="acme", operation_id="0192", facts={"available": "3"})
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(again) is cls
    assert (again.message, again.budget, again.operation_id) == ("no", "acme", "0192")
    assert again.facts == {"available": "3"}


def test_facts_are_typed() -> None:
    facts = {"available": "30", "held": "20", "requested": "80", "remedy": "top_up"}
    error = BudgetExhausted("no", facts=facts)
    assert (error.available, error.held, error.requested) == (30, 20, 80)
    assert error.remedy == "top_up"
    facts = {
        "consumed_by": "0192",
        "consumed_at": "2026-11-23T10:00:00.000001Z",
        "fenced_by": "svc-a",
    }
    consumed = TokenConsumed("no", facts=facts)
    assert consumed.consumed_by == "0192"
    assert consumed.consumed_at == datetime(2026, 11, 23, 10, 0, 0, 1, tzinfo=UTC)
    assert consumed.fenced_by == "svc-a"
    assert BudgetFrozen("no", facts={"by": "dispute"}).by == "dispute"
    assert TreeOverrun("no", facts={"overrun": "12000"}).overrun == 12000
    assert LiveHolds("no", facts={"holds_live": "3", "held": "1200"}).held == 1200
    assert OpenChildren("no", facts={"child": "0192"}).child == "0192"
    assert NameTaken("no", facts={"name": "run-7"}).name == "run-7"
    ahead = OperationTooOld("no", facts={"age_seconds": "-3600", "limit_seconds": "600"})
    assert (ahead.age_seconds, ahead.limit_seconds) == (-3600, 600)


def test_facts_that_were_not_told_are_not_made_up() -> None:
    error = TokenConsumed("no")
    assert (error.consumed_by, error.consumed_at, error.fenced_by) == ("", None, None)
    assert BudgetExhausted("no", facts={"available": "plenty"}).available == 0
    with pytest.raises(TypeError):
        error.facts["new"] = "fact"  # type: ignore[index]


def test_what_would_help_is_said() -> None:
    assert BudgetFrozen("no").remedy == "an admin can unfreeze it, or resolve the dispute"
    assert "next verb" in OutcomeUnknown("no").remedy
    assert Refused("no").remedy == ""


def test_an_error_names_the_budget_and_the_operation_once() -> None:
    error = Refused("No money in acme.", budget="acme", operation_id="0192")
    assert str(error) == "No money in acme. [operation 0192]"
    assert str(Refused("No.")) == "No."


def test_one_refusal_is_told_of_each_operation_that_it_answers() -> None:
    original = BudgetExhausted("no", facts={"available": "3"})
    told = original.concerning("acme", "0192")
    assert type(told) is BudgetExhausted
    assert (told.budget, told.operation_id, told.available) == ("acme", "0192", 3)
    assert told.concerning(None, None).budget == "acme"
