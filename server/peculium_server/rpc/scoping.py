"""Whose rows of the tables beside the ledger an auditor asks for, and of which time."""

from __future__ import annotations

from typing import Final, TypeVar

from peculium.v1.audit_service_pb2 import ListRefusalsRequest, ListSecurityEventsRequest
from peculium_server.rpc.reading import Reader
from peculium_server.rpc.selecting import read_period, read_reach
from peculium_server.store import refusals, security
from peculium_server.store.clauses import Scope
from peculium_server.store.lists import Reach
from peculium_server.store.store import Store

_SCOPES: Final = {
    Reach.BUDGET: Scope.BUDGET,
    Reach.SUBTREE: Scope.SUBTREE,
    Reach.TREE: Scope.TREE,
}

_Asked = TypeVar("_Asked", refusals.Asked, security.Asked)


async def narrowed(
    asked: _Asked,
    request: ListRefusalsRequest | ListSecurityEventsRequest,
    reader: Reader,
    store: Store,
) -> _Asked:
    """What is asked for, of the budgets and the time that a request names.

    Raises:
        CallRefused: BUDGET_UNKNOWN, MALFORMED.
    """
    period = read_period(request)
    if period.since is not None:
        asked = asked._replace(since=period.since)
    if period.until is not None:
        asked = asked._replace(before=period.until)
    reach = read_reach(request.reach)
    named = request.budget if request.HasField("budget") else None
    read = await reader.for_auditor_or_all(named)
    if read is None:
        return asked
    budget = read[0].budget
    return asked._replace(
        scope=_SCOPES[reach],
        lane=store.lane_of(budget.root_id),
        root_id=budget.root_id,
        budget_id=budget.budget_id,
    )
