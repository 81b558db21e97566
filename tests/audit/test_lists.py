"""Every list, filter and order of pages, and every budget at every time, against the naive evaluation.

A tree is made in which every kind of operation was accepted. Then questions are asked while more is
recorded in it, and what is answered of the past is compared with what plain loops over the journal say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from peculium.v1 import audit_service_pb2 as audit, types_pb2
from peculium.v1.audit_service_pb2_grpc import AuditServiceStub
from peculium_server.core.operations import ByRole, ByToken, Delegate, Grant, Kind, Labels
from peculium_server.core.state import BudgetState, Entry
from peculium_server.rpc import listing
from peculium_server.rpc.responses import write_balances, write_entry
from peculium_server.store import history, lists
from tests.audit.journal import Account, Journal, Wanted, moved_token
from tests.audit.world import LABELS, PRINCIPALS, REFERENCES, TRACES, World
from tests.rpc.wire import Stored

pytestmark = pytest.mark.timeout(300)

EXAMPLES = settings(
    max_examples=20,
    deadline=None,
    # What is recorded meanwhile differs each time: nothing would be made shorter.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CHANCES = st.integers(0, 2**32).map(Random)
"""What is chosen from is another journal each time, which Hypothesis must not see."""
PAGES_MAX = 5_000
PAGES_COMPARED_MAX = 100
"""The tree grows with each page that is asked for, and later lists with it: what smaller pages of longer lists
would show, these have shown."""
PAGE_SIZES = st.sampled_from((1, 2, 3, 7, 100, 1_000))
REACHES = st.sampled_from((audit.REACH_BUDGET, audit.REACH_SUBTREE, audit.REACH_TREE))


class Auditor:
    """Asks a server about a tree, page after page."""

    def __init__(self, stored: Stored, world: World, root_id: bytes) -> None:
        self.stored = stored
        self.world = world
        self.root_id = root_id
        self.stub = AuditServiceStub(stored.channel)

    async def journal(self) -> Journal:
        return await Journal.read(self.stored.store, self.root_id)

    def ref(self, budget_id: bytes) -> types_pb2.BudgetRef:
        return types_pb2.BudgetRef(root_id=self.root_id, budget_id=budget_id)

    async def pages(
        self,
        ask: Callable[[Any], Any],
        request: Any,
        passed: Callable[[Any], bool] = lambda _: False,
    ) -> list[Any]:
        """The pages of a list: all, or until one of them has passed what is compared.

        Without that, small pages would run after what is recorded meanwhile.
        """
        pages = []
        for _ in range(PAGES_MAX):
            pages.append(await ask(request))
            if not pages[-1].next_page_token or passed(pages[-1]):
                return pages
            request.page_token = pages[-1].next_page_token
        raise AssertionError("the list has no end")


@pytest.fixture
async def auditor(stored: Stored) -> Auditor:
    world = World(stored.store, seed=7)
    root = await world.begin()
    return Auditor(stored, world, root.root_id)


@pytest.fixture(params=["usual bounds", "narrow bounds"], autouse=True)
def bounds(request: pytest.FixtureRequest) -> Iterator[None]:
    """What one call may look at: so much that it never matters here, or so little that it always does."""
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "narrow bounds":
            for module, name, value in (
                (lists, "KEYS_MAX", 60),
                (lists, "ENTRIES_MAX", 30),
                (lists, "_WINDOW_MAX", 16),
                # As many parts as an operation on this tree may have.
                (lists, "_ENTRIES_AT_ONCE", 200),
                (history, "_SEQS_AT_ONCE", 3),
                (history, "_WINDOWS_MAX", 1),
                (history, "_BUDGETS_AT_ONCE", 4),
                (listing, "_PORTION_ROWS", 2),
                (listing, "_PORTIONS_MAX", 2),
            ):
                patched.setattr(module, name, value)
        yield


def stamp(at: int) -> Timestamp:
    message = Timestamp()
    message.FromMicroseconds(at)
    return message


def some_of(chance: Random, choices: Sequence[Any], most: int) -> frozenset[Any]:
    """One to so many of them."""
    return frozenset(chance.sample(choices, chance.randint(1, most)))


def wanted_of(chance: Random, journal: Journal) -> Wanted:
    """A filter that says few things, most of which select something."""
    holds = [entry.effect.hold.hold_id for entry in journal.entries if entry.effect.hold]
    since, until = sorted(
        chance.choice(journal.entries).at + chance.choice((-1, 0, 1)) for _ in range(2)
    )
    choices: dict[str, Any] = {
        "kinds": some_of(chance, list(Kind), 4),
        "principals": some_of(chance, (*PRINCIPALS, "system", "admin", "nobody"), 3),
        "operation_id": chance.choice([*journal.operations, bytes(16)]),
        "trace_id": chance.choice([trace for trace in TRACES if trace]),
        "labels": chance.choice([*LABELS, (("team", "c"),)]),
        "since": since,
        "until": until,
        "hold_id": chance.choice([*holds, bytes(16)]),
        "reference": chance.choice((*REFERENCES, "call")),
    }
    said = chance.sample(sorted(choices), chance.randint(0, 3))
    return Wanted(**{name: choices[name] for name in said})


def filter_of(wanted: Wanted) -> audit.EntryFilter:
    message = audit.EntryFilter(
        kinds=[int(kind) for kind in wanted.kinds],  # type: ignore[misc]
        principals=wanted.principals,
        operation_id=wanted.operation_id or b"",
        trace_id=wanted.trace_id or b"",
        labels=dict(wanted.labels),
        hold_id=wanted.hold_id or b"",
        reference=wanted.reference,
    )
    if wanted.since is not None:
        getattr(message, "from").CopyFrom(stamp(wanted.since))
    if wanted.until is not None:
        message.until.CopyFrom(stamp(wanted.until))
    return message


def told(auditor: Auditor, entry: Entry) -> audit.Entry:
    message = audit.Entry()
    write_entry(entry, auditor.stored.store.lane_of(auditor.root_id), message)
    return message


@EXAMPLES
@given(chance=CHANCES, reach=REACHES, descending=st.booleans(), page_size=PAGE_SIZES)
async def test_entries_are_those_of_the_journal_in_any_reach_filter_and_order(
    auditor: Auditor, chance: Random, reach: Any, descending: bool, page_size: int
) -> None:
    journal = await auditor.journal()
    budget_id = chance.choice(sorted(journal.first))
    wanted = wanted_of(chance, journal)
    request = audit.ListEntriesRequest(
        budget=auditor.ref(budget_id),
        reach=reach,
        descending=descending,
        filter=filter_of(wanted),
    )
    whole = reach != audit.REACH_BUDGET
    budgets = {
        audit.REACH_BUDGET: {budget_id},
        audit.REACH_SUBTREE: journal.reach(budget_id),
        audit.REACH_TREE: journal.reach(auditor.root_id),
    }[reach]
    expected = journal.selected(budgets, wanted)
    request.page_size = page_size = max(page_size, len(expected) // PAGES_COMPARED_MAX)
    last = max(entry.position for entry in journal.entries)

    def passed(page: audit.ListEntriesResponse) -> bool:
        return not descending and any(entry.position > last for entry in page.entries)

    async with auditor.world.going_on():
        pages = await auditor.pages(auditor.stub.ListEntries, request, passed)
    for page in pages:
        keys = {entry.position if whole else entry.seq for entry in page.entries}
        assert len(keys) <= page_size
    listed = [entry for page in pages for entry in page.entries if entry.position <= last]
    if descending and whole:
        # Operations the latest first, each from its first part on.
        expected.sort(key=lambda entry: (-entry.position, entry.part))
    elif descending:
        expected.reverse()
    assert listed == [told(auditor, entry) for entry in expected]
    of_pages = [{entry.position for entry in page.entries} for page in pages]
    if whole:
        assert sum(map(len, of_pages)) == len(set().union(*of_pages)), (
            "an operation is in two pages"
        )


class Chosen:
    """A filter of budgets, and the naive evaluation of it."""

    states: frozenset[BudgetState]
    holder: str | None
    labels: Labels
    depth: int | None
    since: int | None
    until: int | None
    prefix: str

    def __init__(self, chance: Random, journal: Journal, top: bytes) -> None:
        made = list(journal.first.values())
        since, until = sorted(chance.choice(made).created_at for _ in range(2))
        name = chance.choice(made).name
        choices: dict[str, Any] = {
            "states": some_of(chance, list(BudgetState), 2),
            "holder": chance.choice((*PRINCIPALS, "nobody")),
            "labels": chance.choice([*LABELS, (("team", "c"),)]),
            "depth": chance.randint(0, 4),
            "since": since,
            "until": until,
            "prefix": name[: chance.randint(1, len(name))],
        }
        said = chance.sample(sorted(choices), chance.randint(0, 3))
        nothing = {"states": frozenset(), "labels": (), "prefix": ""}
        for field, value in choices.items():
            setattr(self, field, value if field in said else nothing.get(field))
        self._levels = len(journal.first[top].ancestors)

    def message(self) -> audit.BudgetFilter:
        return audit.BudgetFilter(
            states=[int(state) for state in self.states],  # type: ignore[misc]
            holder=self.holder or "",
            labels=dict(self.labels),
            created_from=None if self.since is None else stamp(self.since),
            created_until=None if self.until is None else stamp(self.until),
            depth=self.depth,
            name_prefix=self.prefix,
        )

    def takes(self, account: Account, state: BudgetState) -> bool:
        return (
            (not self.states or state in self.states)
            and self.holder in (None, account.holder)
            and set(self.labels) <= set(account.labels)
            and (self.since is None or self.since <= account.created_at)
            and (self.until is None or account.created_at < self.until)
            and (self.depth is None or len(account.ancestors) - self._levels <= self.depth)
            and account.name.startswith(self.prefix)
        )


def ever(
    chosen: Chosen, before: Journal, after: Journal, now: int, later: int
) -> dict[bytes, set[bool]]:
    """Whether each budget was to be listed, at any instant from one journal to the next."""
    accounts = {
        budget_id: account
        for budget_id in before.first
        if (account := before.account(budget_id)) is not None
    }
    found: dict[bytes, set[bool]] = {budget_id: set() for budget_id in accounts}

    def look(at: int) -> None:
        for budget_id, account in accounts.items():
            line = [account, *(accounts[each] for each in account.ancestors)]
            state = max(level.own_state(at) for level in line)
            if budget_id in found:
                found[budget_id].add(chosen.takes(account, state))

    look(now)
    known = len(before.entries)
    for entry in after.entries[known:]:
        look(entry.at)
        account = accounts.get(entry.budget_id, after.first[entry.budget_id])
        accounts[entry.budget_id] = after.after(account, entry)
        look(entry.at)
    look(later)
    return found


@EXAMPLES
@given(chance=CHANCES, page_size=PAGE_SIZES)
async def test_budgets_are_those_of_the_journal_in_any_filter(
    auditor: Auditor, chance: Random, page_size: int
) -> None:
    store = auditor.stored.store
    journal, now = await auditor.journal(), (await store.standing(0)).now
    top = chance.choice(sorted(journal.first))
    chosen = Chosen(chance, journal, top)
    request = audit.ListBudgetsRequest(
        below=auditor.ref(top), page_size=page_size, filter=chosen.message()
    )
    async with auditor.world.going_on():
        pages = await auditor.pages(auditor.stub.ListBudgets, request)
    assert all(len(page.budgets) <= page_size for page in pages)
    listed = [budget for page in pages for budget in page.budgets]
    after, later = await auditor.journal(), (await store.standing(0)).now
    for budget in listed:
        assert budget.path == after.path(budget.budget_id)
        account = after.first[budget.budget_id]
        assert tuple(sorted(budget.labels.items())) == account.labels
        assert not chosen.states or budget.state in chosen.states
        assert chosen.holder in (None, budget.holder)
    ids = [budget.budget_id for budget in listed]
    assert ids == sorted(set(ids), key=lambda each: (each != top, each))
    answers = ever(chosen, journal, after, now, later)
    for budget_id in journal.reach(top):
        if len(answers[budget_id]) == 1:
            # What held all the time is answered; what changed meanwhile may be told either way.
            assert (budget_id in ids) is answers[budget_id].pop()
    assert set(ids) <= after.reach(top)


@EXAMPLES
@given(chance=CHANCES)
async def test_a_budget_at_a_time_is_what_its_entries_until_then_add_up_to(
    auditor: Auditor, chance: Random
) -> None:
    journal = await auditor.journal()
    budget_id = chance.choice(sorted(journal.first))
    made = journal.first[budget_id].created_at
    times = [entry.at + aside for entry in journal.entries for aside in (-1, 0)]
    at = chance.choice([each for each in times if each >= made])
    request = audit.GetBudgetRequest(
        budget=auditor.ref(budget_id), as_of=stamp(at), sum_subtree=True
    )
    async with auditor.world.going_on():
        told = await auditor.stub.GetBudget(request)
    account = journal.account(budget_id, at)
    assert account is not None
    balances = types_pb2.Balances()
    write_balances(account.money, balances)
    assert told.budget.balances == balances
    assert int(told.budget.state) == journal.state(budget_id, at, at)
    assert told.budget.path == journal.path(budget_id)
    assert int(told.budget.custody) == account.custody
    assert told.budget.holder == (account.holder or "")
    assert (told.budget.seq, told.budget.head) == (account.seq, account.head)
    assert (told.budget.disputed, told.budget.holds_live) == (account.disputed, account.holds_live)
    assert told.budget.HasField("lease_expires_at") is (account.lease_until is not None)
    assert told.budget.lease_expires_at.ToMicroseconds() == (account.lease_until or 0)
    assert told.budget.lease_latest_at.ToMicroseconds() == (account.lease_latest or 0)
    assert told.used == journal.used(budget_id, at)
    assert told.disputed == journal.disputed(budget_id, at)


@EXAMPLES
@given(chance=CHANCES, page_size=PAGE_SIZES)
async def test_a_lineage_names_who_made_each_level_by_which_right_and_every_step_of_the_token(
    auditor: Auditor, chance: Random, page_size: int
) -> None:
    journal = await auditor.journal()
    budget_id = chance.choice(sorted(journal.first))
    request = audit.GetLineageRequest(budget=auditor.ref(budget_id), page_size=page_size)
    seq = max(entry.seq for entry in journal.entries if entry.budget_id == budget_id)

    def passed(page: audit.GetLineageResponse) -> bool:
        return any(step.seq > seq for step in page.steps)

    async with auditor.world.going_on():
        pages = await auditor.pages(auditor.stub.GetLineage, request, passed)
    assert not any(page.delegations for page in pages[1:])
    line = [budget_id, *journal.first[budget_id].ancestors]
    delegations = pages[0].delegations
    assert [each.budget.budget_id for each in delegations] == line[::-1]
    for delegation in delegations:
        entry = next(
            each for each in journal.entries if each.budget_id == delegation.budget.budget_id
        )
        assert delegation.made_by == told(auditor, entry)
        assert (delegation.amount, delegation.by) == (entry.money.granted, entry.principal)
        authority = journal.operations[entry.operation_id].authority
        if isinstance(authority, ByToken):
            assert delegation.token == authority.token_id
        elif isinstance(authority, ByRole):
            assert delegation.role == "admin"
        else:
            assert delegation.holder == entry.principal
    steps = [step for page in pages for step in page.steps if step.seq <= seq]
    assert all(len(page.steps) <= page_size for page in pages)
    assert [tuple_of(step) for step in steps] == expected_steps(journal, budget_id)


def tuple_of(step: audit.TokenStep) -> tuple[Any, ...]:
    return (
        *(step.seq, step.operation_id, step.kind, step.at.ToMicroseconds(), step.by),
        *(step.consumed, step.produced, step.holder),
    )


def expected_steps(journal: Journal, budget_id: bytes) -> list[tuple[Any, ...]]:
    """Each step by the fold, one entry after the other."""
    account, steps = journal.first[budget_id], []
    for entry in journal.entries:
        if entry.budget_id != budget_id:
            continue
        account = journal.after(account, entry)
        operation = journal.operations[entry.operation_id]
        if entry.seq == 1:
            assert isinstance(operation, Grant | Delegate)
            specs = [operation] if isinstance(operation, Grant) else operation.children
            [produced] = [spec.token_id for spec in specs if spec.budget_id == budget_id]
        elif entry.part == 0 and operation.budget_id == budget_id and moved_token(operation):
            produced = getattr(operation, "next_token_id", None)
        else:
            continue
        fingerprint = b"" if produced is None else hashlib.sha256(produced).digest()[:8]
        steps.append(
            (
                *(entry.seq, entry.operation_id, entry.kind, entry.at, entry.principal),
                *(entry.consumed or b"", fingerprint, account.holder or ""),
            )
        )
    return steps
