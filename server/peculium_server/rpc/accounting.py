"""Statements of account, and what was spent on what."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final

from peculium.v1.audit_service_pb2 import (
    GetStatementRequest,
    GetStatementResponse,
    GetUsageRequest,
    GetUsageResponse,
    UsageGroup,
    UsageGrouping,
)
from peculium_server.core.limits import LABEL_KEY_BYTES_MAX
from peculium_server.core.refusals import Refusal, Refused, id_text
from peculium_server.core.selection import Period
from peculium_server.core.state import Balances
from peculium_server.core.usage import (
    Booked,
    Booking,
    By,
    Defaults,
    Grouping,
    Keys,
    TooManyGroups,
    Usage,
)
from peculium_server.lanes.answers import Position
from peculium_server.rpc.calls import CallRefused, deadline
from peculium_server.rpc.reading import Line, Reader
from peculium_server.rpc.responses import write_balances, write_position, write_time
from peculium_server.rpc.selecting import read_period, read_reach
from peculium_server.store.accounts import Account, Accounts, Totals
from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.lists import Reach
from peculium_server.store.store import Store

GROUPS_MAX: Final = 10_000
GROUPINGS_MAX: Final = 8
_GROUPS_BYTES_MAX: Final = 3 * 1024 * 1024
"""Of what a client accepts as one message, 4 MiB."""
_GROUP_BYTES: Final = 80
"""What a group takes beside its texts."""

SUMS_MAX: Final = 1
"""At a time; each has a connection to the database for as long as it lasts. Others wait."""
_LINES_MAX: Final = 10_000
"""Budgets of which is remembered where they belong: those of calls near each other are the same."""
_AT_A_TIME: Final = 100
"""Bookings that are counted before other calls get their turn: about a millisecond."""
_INT64_MAX: Final = 2**63 - 1
_SECONDS_WITHOUT_DEADLINE: Final = 60.0


class Accounting:
    """Sums up what budgets have moved and spent."""

    def __init__(self, reader: Reader, store: Store) -> None:
        self._reader = reader
        self._store = store
        self._summing = asyncio.Semaphore(SUMS_MAX)

    async def statement(self, request: GetStatementRequest) -> GetStatementResponse:
        """What moved in a period: opening, movements by kind, closing.

        Raises:
            CallRefused: BUDGET_UNKNOWN; MALFORMED; AMOUNT_OVERFLOW: a sum is beyond what the wire holds.
        """
        period = read_period(request)
        top, _ = await self._reader.for_auditor(request.budget)
        account = _account(request, top)
        async with self._accounts(account) as accounts:
            totals = await accounts.totals(account, period)
            since, until = _used_period(period, totals, accounts.now)
            response = GetStatementResponse(
                used_opening=_sum(account, "spent and forfeited", _used(totals.opening)),
                used_closing=_sum(account, "spent and forfeited", _used(totals.closing)),
                disputed_closing=_sum(account, "disputed", totals.disputed),
                budgets=totals.budgets,
                unit=top.budget.unit,
            )
            write_position(self._position(account, accounts), response.ledger)
        write_balances(_sums(account, totals.opening), response.opening)
        write_balances(_sums(account, totals.closing), response.closing)
        for movement in totals.movements:
            message = response.movements.add(
                kind=movement.kind,
                operations=movement.operations,
                entries=movement.entries,
            )
            write_balances(_sums(account, movement.changes), message.changes)
        write_time(since, getattr(response, "from"))
        write_time(until, response.until)
        return response

    async def usage(self, request: GetUsageRequest) -> GetUsageResponse:
        """What was spent in a period, by group.

        Raises:
            CallRefused: BUDGET_UNKNOWN; MALFORMED; TOO_LARGE: there are too many groups;
                AMOUNT_OVERFLOW: a sum is beyond what the wire holds.
        """
        period = read_period(request)
        usage = Usage(_read_groupings(request.group_by), groups_max=GROUPS_MAX)
        top, _ = await self._reader.for_auditor(request.budget)
        account = _account(request, top)
        response = GetUsageResponse(unit=top.budget.unit)
        async with self._accounts(account) as accounts:
            write_position(self._position(account, accounts), response.ledger)
            try:
                await _count(usage, accounts, account, period)
            except TooManyGroups:
                raise _too_many(f"more than {GROUPS_MAX} groups") from None
            except ValueError as error:
                raise LedgerCorrupt(str(error)) from error
        if sum(map(_group_bytes, usage.groups)) > _GROUPS_BYTES_MAX:
            raise _too_many(f"more than {_GROUPS_BYTES_MAX} bytes")
        for keys, booked in sorted(usage.groups.items()):
            response.groups.append(_group(account, booked, keys))
        response.total.CopyFrom(_group(account, usage.total()))
        return response

    @contextlib.asynccontextmanager
    async def _accounts(self, account: Account) -> AsyncIterator[Accounts]:
        async with self._summing:
            end, now = deadline(), asyncio.get_running_loop().time()
            seconds = _SECONDS_WITHOUT_DEADLINE if end is None else max(end - now, 0.001)
            async with self._store.accounts(account.root_id, seconds_max=seconds) as accounts:
                yield accounts

    def _position(self, account: Account, accounts: Accounts) -> Position:
        lane = self._store.lane_of(account.root_id)
        return Position(self._store.incarnation, lane, accounts.position)


class _Belonging:
    """Knows of the budgets that were met last where they belong."""

    def __init__(self, usage: Usage, accounts: Accounts, root_id: bytes) -> None:
        self._usage = usage
        self._accounts = accounts
        self._root_id = root_id
        self._known: OrderedDict[bytes, Defaults] = OrderedDict()

    async def of(self, bookings: Iterable[Booking]) -> dict[bytes, Defaults]:
        """What the budgets of some bookings say of each grouping."""
        asked = {booking.budget_id for booking in bookings}
        unknown = [budget_id for budget_id in asked if budget_id not in self._known]
        if unknown:
            lines = await self._accounts.lines(self._root_id, unknown)
            for budget_id in unknown:
                if budget_id not in lines:
                    raise LedgerCorrupt(
                        f"entries of budget {id_text(budget_id)}, which is not there"
                    )
                self._known[budget_id] = self._usage.defaults(lines[budget_id])
        found = {}
        for budget_id in asked:
            self._known.move_to_end(budget_id)
            found[budget_id] = self._known[budget_id]
        while len(self._known) > _LINES_MAX:
            self._known.popitem(last=False)
        return found


async def _count(usage: Usage, accounts: Accounts, account: Account, period: Period) -> None:
    belonging = _Belonging(usage, accounts, account.root_id)
    async with contextlib.aclosing(accounts.bookings(account, period)) as portions:
        async for portion in portions:
            defaults = await belonging.of(portion)
            for number, booking in enumerate(portion):
                usage.add(booking, defaults[booking.budget_id])
                if number % _AT_A_TIME == 0:
                    await asyncio.sleep(0)


# -- What is asked ------------------------------------------------------------------------------------


def _account(request: GetStatementRequest | GetUsageRequest, top: Line) -> Account:
    reach, root_id = read_reach(request.reach), top.budget.root_id
    budget_id = root_id if reach is Reach.TREE else top.budget.budget_id
    return Account(root_id, budget_id, subtree=reach is not Reach.BUDGET)


def _read_groupings(messages: Sequence[UsageGrouping]) -> list[Grouping]:
    if len(messages) > GROUPINGS_MAX:
        facts = {"field": "group_by", "limit": str(GROUPINGS_MAX), "size": str(len(messages))}
        raise CallRefused(Refused(Refusal.TOO_LARGE, facts))
    groupings = []
    for index, message in enumerate(messages):
        field = f"group_by[{index}]"
        try:
            by = By(message.by)
        except ValueError:
            raise CallRefused.malformed(
                f"{field}.by", "must be one that this server knows"
            ) from None
        size = len(message.label.encode())
        if by is By.LABEL and not 1 <= size <= LABEL_KEY_BYTES_MAX:
            problem = f"must be 1 to {LABEL_KEY_BYTES_MAX} bytes"
            raise CallRefused.malformed(f"{field}.label", problem)
        if by is not By.LABEL and size:
            raise CallRefused.malformed(f"{field}.label", "must be empty unless it is by label")
        grouping = Grouping(by, message.label)
        if grouping in groupings:
            raise CallRefused.malformed(field, "is said twice")
        groupings.append(grouping)
    return groupings


# -- What is told -------------------------------------------------------------------------------------


def _used_period(period: Period, totals: Totals, now: int) -> tuple[int, int]:
    """The period, where it was left open from the first entry until now, which no entry is after."""
    end = now if totals.last is None else max(now, totals.last + 1)
    until = end if period.until is None else min(period.until, end)
    first = until if totals.first is None else totals.first
    return min(first if period.since is None else period.since, until), until


def _group(account: Account, booked: Booked, keys: Keys = ()) -> UsageGroup:
    sums = {name: _sum(account, name, value) for name, value in booked._asdict().items()}
    return UsageGroup(keys=keys, **sums)


def _group_bytes(keys: Keys) -> int:
    return _GROUP_BYTES + sum(len(key.encode()) for key in keys)


def _too_many(size: str) -> CallRefused:
    facts = {"field": "group_by", "limit": str(GROUPS_MAX), "size": size}
    return CallRefused(Refused(Refusal.TOO_LARGE, facts))


def _used(money: Balances) -> int:
    return money.spent + money.forfeited


def _sums(account: Account, money: Balances) -> Balances:
    return Balances(*(_sum(account, *each) for each in money._asdict().items()))


def _sum(account: Account, name: str, value: int) -> int:
    """A sum, which may be beyond what the wire holds where money went round and round."""
    if abs(value) > _INT64_MAX:
        facts = {"budget": id_text(account.budget_id), "balance": name}
        raise CallRefused(Refused(Refusal.AMOUNT_OVERFLOW, facts))
    return value
