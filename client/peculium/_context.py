"""Carries a budget through frameworks that know nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from peculium.errors import NoCurrentBudget

if TYPE_CHECKING:
    from peculium import aio, client

    AnyBudget = TypeVar("AnyBudget", aio.Budget, client.Budget)

_current: ContextVar[Any] = ContextVar("peculium_budget")


@contextmanager
def use(budget: AnyBudget) -> Iterator[AnyBudget]:
    """Make a budget the current one of this context: of this thread, or this task and its children.

    The handle is shared, not copied: all that is reserved meanwhile comes from one budget, in order.
    """
    token = _current.set(budget)
    try:
        yield budget
    finally:
        _current.reset(token)


def current() -> Any:
    """The budget that `use` made the current one, a handle of the client that it came from.

    Raises:
        NoCurrentBudget: There is none.
    """
    budget = _current.get(None)
    if budget is None:
        raise NoCurrentBudget("no budget is in use here: enter `with peculium.use(budget)` first")
    return budget
