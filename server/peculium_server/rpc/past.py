"""What a budget was, and where it comes from."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Final

from peculium.v1 import audit_service_pb2
from peculium.v1.audit_service_pb2 import (
    GetBudgetRequest,
    GetBudgetResponse,
    GetLineageRequest,
    GetLineageResponse,
)
from peculium_server.core.operations import ByRole, ByToken, Role
from peculium_server.core.refusals import Refusal, Refused, time_text
from peculium_server.lanes.answers import Position
from peculium_server.rpc.calls import CallRefused
from peculium_server.rpc.pages import page_token, read_page
from peculium_server.rpc.reading import Line, Reader, line_of
from peculium_server.rpc.responses import write_budget, write_entry, write_position, write_time
from peculium_server.rpc.times import read_past
from peculium_server.store.history import (
    Making,
    TokenStep,
    Totals,
    Used,
    line_at,
    makings,
    token_steps,
    used_at,
    with_totals,
)
from peculium_server.store.store import Store

SUMS_MAX: Final = 2
"""Subtrees that are summed up at a time. Others wait."""
_FINGERPRINT_BYTES: Final = 8


class Past:
    """Tells what budgets are and were."""

    def __init__(self, reader: Reader, store: Store) -> None:
        self._reader = reader
        self._store = store
        self._summing = asyncio.Semaphore(SUMS_MAX)

    async def budget(self, request: GetBudgetRequest) -> GetBudgetResponse:
        """A budget as it is, or as it was at a time.

        Raises:
            CallRefused: BUDGET_UNKNOWN, also if it was not made yet; MALFORMED.
        """
        line, position = await self._reader.for_auditor(request.budget)
        sums: Used | Totals | None = None
        if request.HasField("as_of"):
            at = read_past("as_of", request.as_of, line.at)
            line = await self._line_at(line, at)
            if request.sum_subtree:
                async with self._summing:
                    sums = await used_at(
                        self._store, line.budget.root_id, line.budget.budget_id, at
                    )
        elif request.sum_subtree:
            async with self._summing:
                ancestry, sums = await with_totals(
                    self._store, line.budget.root_id, line.budget.budget_id
                )
            line = line_of(ancestry, line.at)
        return self._told(line, position, sums)

    async def _line_at(self, line: Line, at: int) -> Line:
        ancestry = await self._reader.ancestry(line.budget)
        then = await line_at(self._store, ancestry, at)
        if not then:
            facts = {
                "budget": "/".join(line.path),
                "as_of": time_text(at),
                "created_at": time_text(line.budget.created_at),
            }
            raise CallRefused(Refused(Refusal.BUDGET_UNKNOWN, facts))
        return line_of(then, at)

    def _told(
        self, line: Line, position: Position, sums: Used | Totals | None
    ) -> GetBudgetResponse:
        response = GetBudgetResponse()
        write_budget(line.budget, line.path, line.state, response.budget)
        write_position(position, response.ledger)
        if sums is not None:
            response.used, response.disputed = sums.used, sums.disputed
        if isinstance(sums, Totals):
            response.held, response.holds_live = sums.held, sums.holds_live
        return response

    async def lineage(self, request: GetLineageRequest) -> GetLineageResponse:
        """By whose authority a budget exists, and how its token went from hand to hand.

        Raises:
            CallRefused: BUDGET_UNKNOWN; MALFORMED.
        """
        line, _ = await self._reader.for_auditor(request.budget)
        budget = line.budget
        scope = b"lineage" + budget.root_id + budget.budget_id
        asked = read_page(scope, request.page_size, request.page_token)
        page = await token_steps(self._store, budget, limit=asked.size, after=asked.after_number)
        response = GetLineageResponse(next_page_token=page_token(scope, page.next))
        if asked.after is None:
            await self._write_delegations(line, response)
        for step in page.rows:
            _write_step(step, response.steps.add())
        return response

    async def _write_delegations(self, line: Line, response: GetLineageResponse) -> None:
        ancestry = await self._reader.ancestry(line.budget)
        root_id = line.budget.root_id
        made = await makings(self._store, root_id, [each.budget_id for each in ancestry])
        lane = self._store.lane_of(root_id)
        for depth in reversed(range(len(ancestry))):
            told = line_of(ancestry[depth:], line.at)
            message = response.delegations.add()
            write_budget(told.budget, told.path, told.state, message.budget)
            _write_making(made[told.budget.budget_id], lane, message)


def _write_making(making: Making, lane: int, message: audit_service_pb2.Delegation) -> None:
    write_entry(making.entry, lane, message.made_by)
    message.amount = making.entry.money.granted
    message.by = making.entry.principal
    authority = making.operation.authority
    if isinstance(authority, ByToken):
        message.token = authority.token_id
    elif isinstance(authority, ByRole):
        message.role = Role.ADMIN.name.lower()
    else:
        message.holder = making.entry.principal


def _write_step(step: TokenStep, message: audit_service_pb2.TokenStep) -> None:
    entry = step.entry
    message.seq = entry.seq
    message.operation_id = entry.operation_id
    message.kind = entry.kind  # type: ignore[assignment]
    write_time(entry.at, message.at)
    message.by = entry.principal
    message.consumed = entry.consumed or b""
    if step.produced is not None:
        message.produced = hashlib.sha256(step.produced).digest()[:_FINGERPRINT_BYTES]
    message.holder = step.held.holder or ""
