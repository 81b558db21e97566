"""Statements and usage, compared with a naive evaluation of the whole journal."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from peculium_server.core.operations import Kind, Operation
from peculium_server.core.selection import Period
from peculium_server.core.state import Balances, Budget, Entry
from peculium_server.core.usage import Booked, By, Grouping, Usage
from peculium_server.store.accounts import Account, Movement, Totals
from peculium_server.store.store import Store
from tests.audit.histories import History
from tests.audit_sql.filling import record
from tests.core.ledger import Ledger, requested
from tests.store.stored import StoredLedger

pytestmark = pytest.mark.timeout(240)

EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    # A history that is wrong is not made shorter by another seed.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ZERO = Balances()
GROUPINGS = [
    *(Grouping(by) for by in By if by is not By.LABEL),
    *(Grouping(By.LABEL, label) for label in ("run", "team", "model", "nobody's")),
]


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as opened:
        yield opened


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    opened = await Store.open(database)
    yield opened
    await opened.close()


class Naive:
    """The same questions, answered by looking at every entry."""

    def __init__(
        self, ledger: Ledger, account: Account, period: Period, position: int | None = None
    ) -> None:
        """As of a position in the lane; None: as of now."""
        self.account = account
        self.tree = ledger.trees[account.root_id]
        self.entries = [
            entry
            for entry in ledger.journal
            if self._concerns(entry.budget_id) and (position is None or entry.position <= position)
        ]
        self.since = min(each.at for each in self.entries) if period.since is None else period.since
        self.until = max(each.at for each in self.entries) + 1
        if period.until is not None:
            self.until = period.until
        self.within = [each for each in self.entries if self.since <= each.at < self.until]

    def _concerns(self, budget_id: bytes) -> bool:
        line = (budget_id, *self.tree.budget(budget_id).ancestors)
        return self.account.budget_id in (line if self.account.subtree else line[:1])

    def last(self, before: int) -> list[Entry]:
        """Of each budget the last entry before a time."""
        found = {entry.budget_id: entry for entry in self.entries if entry.at < before}
        return list(found.values())

    def counted(self, budget_id: bytes, money: Balances) -> Balances:
        """What a budget's balances count in the account."""
        if not self.account.subtree:
            return money
        if budget_id == self.account.budget_id:
            return money._replace(delegated=0)
        return money._replace(granted=0, delegated=0, overrun=0, advanced=0)

    def standing(self, at: int) -> Balances:
        return added(self.counted(entry.budget_id, entry.money) for entry in self.last(at))

    def totals(self) -> Totals:
        by_kind: dict[Kind, list[Entry]] = defaultdict(list)
        for entry in self.within:
            by_kind[entry.kind].append(entry)
        movements = tuple(
            Movement(
                kind,
                len({entry.position for entry in entries}),
                len(entries),
                added(self.counted(entry.budget_id, entry.effect.changes) for entry in entries),
            )
            for kind, entries in sorted(by_kind.items())
        )
        before = [entry.at for entry in self.entries if entry.at < self.until]
        last = self.last(self.until)
        return Totals(
            opening=self.standing(self.since),
            movements=movements,
            closing=self.standing(self.until),
            disputed=sum(entry.effect.disputed for entry in last),
            budgets=len(last),
            first=min(before, default=None),
            last=max(before, default=None),
        )

    def usage(self, groupings: list[Grouping]) -> dict[tuple[str, ...], Booked]:
        found: dict[tuple[str, ...], list[Booked]] = defaultdict(list)
        for entry in self.within:
            changes = entry.effect.changes
            if entry.part == 0 and (
                changes.spent
                or changes.forfeited
                or entry.kind in (Kind.SETTLE, Kind.SPEND, Kind.RESOLVE)
            ):
                operation = requested(entry)
                keys = tuple(self._key(grouping, entry, operation) for grouping in groupings)
                found[keys].append(booked(entry, operation))
            else:
                assert (changes.spent, changes.forfeited) == (0, 0)
        return {keys: Booked(*map(sum, zip(*each, strict=True))) for keys, each in found.items()}

    def _key(self, grouping: Grouping, entry: Entry, operation: Operation) -> str:
        usage = getattr(operation, "usage", None)
        match grouping.by:
            case By.DAY:
                return str(
                    (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=entry.at)).date()
                )
            case By.PRINCIPAL:
                return entry.principal
            case By.PROVIDER:
                return usage.provider if usage else ""
            case By.BUDGET:
                return "/".join(level.name for level in reversed(self._line(entry.budget_id)))
            case By.MODEL if usage and usage.model:
                return str(usage.model)
        label = "model" if grouping.by is By.MODEL else grouping.label
        said = [operation.labels, *(level.labels for level in self._line(entry.budget_id))]
        return next((dict(labels)[label] for labels in said if label in dict(labels)), "")

    def _line(self, budget_id: bytes) -> list[Budget]:
        return self.tree.line(self.tree.budget(budget_id))


def booked(entry: Entry, operation: Operation) -> Booked:
    usage = getattr(operation, "usage", None)
    return Booked(
        operations=int(entry.kind in (Kind.SETTLE, Kind.SPEND, Kind.RESOLVE)),
        spent=entry.effect.changes.spent,
        forfeited=entry.effect.changes.forfeited,
        estimated=int(getattr(operation, "estimated", False)),
        input_tokens=usage.input_tokens if usage else 0,
        output_tokens=usage.output_tokens if usage else 0,
        cached_tokens=usage.cached_tokens if usage else 0,
    )


def added(each: Iterable[Balances]) -> Balances:
    return Balances(*map(sum, zip(ZERO, *each, strict=True)))


def asked(data: st.DataObject, history: History) -> tuple[Account, Period]:
    """Any account of the tree, and any period."""
    node = data.draw(st.sampled_from(history.nodes), "budget")
    times = st.none() | st.sampled_from(history.times())
    since, until = data.draw(times, "since"), data.draw(times, "until")
    if since is not None and until is not None and until < since:
        since, until = until, since
    account = Account(node.root_id, node.id, data.draw(st.booleans(), "subtree"))
    return account, Period(since, until)


async def used(store: Store, account: Account, period: Period, groupings: list[Grouping]) -> Usage:
    """Everything that was booked, by group."""
    usage = Usage(groupings, groups_max=10_000)
    async with store.accounts(account.root_id, seconds_max=30) as accounts:
        async for portion in accounts.bookings(account, period):
            lines = await accounts.lines(
                account.root_id, {booking.budget_id for booking in portion}
            )
            for booking in portion:
                usage.add(booking, usage.defaults(lines[booking.budget_id]))
    return usage


@EXAMPLES
@given(seed=st.integers(0), data=st.data())
async def test_opening_movements_and_closing_are_those_of_the_journal_and_add_up(
    store: Store, connection: psycopg.Connection, seed: int, data: st.DataObject
) -> None:
    history = History(seed)
    history.grow(60)
    record(connection, history.ledger)
    for _ in range(6):
        account, period = asked(data, history)
        async with store.accounts(account.root_id, seconds_max=30) as accounts:
            totals = await accounts.totals(account, period)
        assert totals == Naive(history.ledger, account, period).totals()
        moved = added(movement.changes for movement in totals.movements)
        assert added([totals.opening, moved]) == totals.closing
        assert totals.opening.balanced()
        assert totals.closing.balanced()


@EXAMPLES
@given(seed=st.integers(0), data=st.data())
async def test_usage_in_any_grouping_is_that_of_the_journal_and_adds_up_to_the_statement(
    store: Store, connection: psycopg.Connection, seed: int, data: st.DataObject
) -> None:
    history = History(seed)
    history.grow(60)
    record(connection, history.ledger)
    for _ in range(6):
        account, period = asked(data, history)
        groupings = data.draw(st.lists(st.sampled_from(GROUPINGS), unique=True, max_size=4), "by")
        usage = await used(store, account, period, groupings)
        naive = Naive(history.ledger, account, period)
        assert usage.groups == naive.usage(groupings)
        totals = naive.totals()
        total = usage.total()
        assert total.spent == totals.closing.spent - totals.opening.spent
        assert total.forfeited == totals.closing.forfeited - totals.opening.forfeited


async def test_while_others_write_all_is_told_as_of_one_instant(store: Store) -> None:
    ledger = StoredLedger(store)
    root = await ledger.root(100_000, name="acme", labels=(("team", "t"),))
    account = Account(root.root_id, root.id, subtree=True)
    asked_for = asyncio.Event()

    async def write() -> None:
        while not asked_for.is_set():
            child = await ledger.below(root, 100)
            await ledger.accept(child.spend(7, labels=(("run", "7"),)))
            await ledger.accept(child.return_all())

    async with asyncio.TaskGroup() as running:
        running.create_task(write())
        told = []
        for _ in range(30):
            async with store.accounts(root.root_id, seconds_max=30) as accounts:
                opened = await accounts.totals(account, Period())
                usage = Usage([Grouping(By.LABEL, "run")], groups_max=10)
                async for portion in accounts.bookings(account, Period()):
                    lines = await accounts.lines(root.root_id, {each.budget_id for each in portion})
                    for booking in portion:
                        usage.add(booking, usage.defaults(lines[booking.budget_id]))
                told.append((accounts.position, opened, usage))
        asked_for.set()
    assert len({position for position, *_ in told}) > 1
    for position, totals, usage in told:
        naive = Naive(ledger, account, Period(), position)
        assert totals == naive.totals()
        assert usage.groups == naive.usage([Grouping(By.LABEL, "run")])
        assert usage.total().spent == totals.closing.spent
