"""What must be true of a ledger after a campaign, whatever was done to it meanwhile.

The journal is replayed in the order of its commits through the pure core: every decision is made again
on a tree that is built of nothing but the journal's requests. Then

- every acknowledged answer is the model's, in all that the wire tells;
- every refusal was right at some moment between question and answer, and left nothing behind, unless
  another copy of the same operation won;
- every operation of unknown outcome is there as a whole, once, or not at all;
- the rows are what the replay ends in.

Each thing that is wrong is a `Problem` of a rule, so that a planted fault can be told from another.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from peculium.v1 import types_pb2
from peculium_server.core.admission import SYSTEM_KINDS
from peculium_server.core.encoding import decode_request
from peculium_server.core.lanes import lane_of
from peculium_server.core.operations import (
    SYSTEM,
    Actor,
    After,
    AtomicBatch,
    ByRole,
    ByToken,
    Expire,
    Operation,
    Return,
    Revoke,
    Role,
)
from peculium_server.core.outcome import Outcome, tell
from peculium_server.core.refusals import Refused
from peculium_server.core.rules import decide
from peculium_server.core.shape import check_shape
from peculium_server.core.state import Accepted, Budget, Entry, Hold, HoldState
from peculium_server.core.verify import _WholeTree
from peculium_server.rpc.responses import write_outcome
from peculium_server.store.schema import LANES
from peculium_server.store.wire import Connection
from tests.faults.tally import Tally

SLACK_US = 1_000_000
"""How far two readings of the machine's one clock are trusted to be in order."""
_PROBLEMS_MAX = 200
_NOT_COMPARED = {"age_seconds", "child"}
"""Facts of a refusal that are one of several that are equally right."""


class Problem(NamedTuple):
    """Something that is wrong."""

    rule: str
    """Which rule it breaks; `_COUNTS` says what that counts as."""
    detail: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}"


_COUNTS = {
    "lost": "acked_lost",
    "unfinished": "acked_lost",
    "token twice": "applied_twice",
    "operation twice": "applied_twice",
    "acknowledged twice": "applied_twice",
    "overshoot": "",
    "leaked": "",
}
"""What a broken rule counts as; all others as a wrong total."""


def tallied(problems: Iterable[Problem]) -> Tally:
    """The problems as counts and sentences."""
    tally = Tally()
    for problem in problems:
        counted = _COUNTS.get(problem.rule, "wrong_totals")
        if counted:
            setattr(tally, counted, getattr(tally, counted) + 1)
        if len(tally.problems) < _PROBLEMS_MAX:
            tally.problems.append(str(problem))
    return tally


# -- What was asked -------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """A refusal as the wire tells it."""

    reason: str
    facts: Mapping[str, str]


@dataclass
class Attempt:
    """One time that an operation was sent."""

    operation: Operation
    """As the server had to understand it: a chained authority is resolved, if it could be."""
    sent_at: int
    """Microseconds since the Unix epoch, by the machine's clock, which is the database's too."""
    floor: int
    """The highest position of the lane that anybody had been told before it was sent."""
    answered_at: int = 0
    answer: types_pb2.Outcome | Refusal | None = None
    """None: nobody knows."""
    judged: bool = True
    """Whether a refusal can be judged by the state of the tree: not within an atomic batch, where it
    rests on what the batch itself would have done before."""


@dataclass
class Asked:
    """An operation of one client, however often it was sent."""

    process: int
    operation: Operation
    actor: Actor
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def id(self) -> bytes:
        """Its operation id."""
        return self.operation.operation_id

    @property
    def acknowledged(self) -> list[types_pb2.Outcome]:
        """What it was told as done, dry runs aside."""
        answers = (attempt.answer for attempt in self.attempts)
        return [a for a in answers if isinstance(a, types_pb2.Outcome) and not a.dry_run]

    @property
    def may_be_done(self) -> bool:
        """Whether one of its copies could have won: it was acknowledged, or got no answer."""
        return not self.operation.dry_run and any(
            not isinstance(attempt.answer, Refusal) for attempt in self.attempts
        )

    def __str__(self) -> str:
        return f"{self.operation.kind.name} {self.id.hex()} of process {self.process}"


# -- What is there --------------------------------------------------------------------------------------


@dataclass
class Journal:
    """All rows of a ledger at one instant."""

    entries: list[Entry]
    """By lane, position, root, operation, part."""
    budgets: list[Budget]
    holds: list[tuple[bytes, Hold]]
    """With their roots."""
    positions: dict[int, int]
    """Of each lane."""
    roots: dict[bytes, str]


async def read_journal(dsn: str) -> Journal:
    """Read everything, in one snapshot."""
    from peculium_server.store import rows

    connection = await Connection.connect(dsn, autocommit=True)
    try:
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        cursor = connection.cursor(binary=True)

        async def fetched(query: str) -> list[tuple[object, ...]]:
            await cursor.execute(query.encode())
            return await cursor.fetchall()

        columns = ", ".join(rows.ENTRY_COLUMNS)
        entries = await fetched(
            f"SELECT {columns} FROM entries ORDER BY lane, position, root_id, operation_id, part, seq"
        )
        budgets = await fetched(f"SELECT {', '.join(rows.BUDGET_COLUMNS)} FROM budgets")
        holds = await fetched(f"SELECT {', '.join(rows.HOLD_COLUMNS)} FROM holds")
        lanes: list[tuple[int, int]] = await fetched("SELECT lane, position FROM lanes")  # type: ignore[assignment]
        roots: list[tuple[bytes, str]] = await fetched("SELECT root_id, name FROM roots")  # type: ignore[assignment]
        return Journal(
            entries=[rows.to_entry(row) for row in entries],
            budgets=[rows.to_budget(row) for row in budgets],
            holds=[rows.to_hold_of_root(row) for row in holds],
            positions=dict(lanes),
            roots=dict(roots),
        )
    finally:
        await connection.close()


# -- The checks -----------------------------------------------------------------------------------------


def check(
    journal: Journal,
    asked: Sequence[Asked],
    *,
    of: Collection[bytes] | None = None,
    lanes: int = LANES,
) -> list[Problem]:
    """Everything that is wrong with a ledger of which this was asked.

    Args:
        journal: All that is there.
        asked: All that was asked.
        of: Of these trees; None: of all, and all are replayed in any case.
        lanes: Of the ledger.
    """
    return list(_Check(journal, asked, of, lanes).problems())


class Parts(NamedTuple):
    """An operation of the journal."""

    root_id: bytes
    entries: list[Entry]

    @property
    def first(self) -> Entry:
        """Part 0."""
        return self.entries[0]


class _Check:
    def __init__(
        self,
        journal: Journal,
        asked: Sequence[Asked],
        of: Collection[bytes] | None,
        lanes: int,
    ) -> None:
        self._journal = journal
        self._of = of
        self._lanes = lanes
        self._asked = {(each.operation.root_id, each.id): each for each in asked}
        self._by_root: dict[bytes, list[Asked]] = defaultdict(list)
        for each in asked:
            self._by_root[each.operation.root_id].append(each)
        self._operations = _operations(journal.entries)
        self._times = self._times_of_lanes()

    def problems(self) -> Iterator[Problem]:
        yield from self._positions()
        yield from self._once()
        yield from self._acknowledged()
        yield from self._nobody_asked()
        yield from self._whole_batches()
        yield from self._money()
        done: dict[bytes, list[Parts]] = defaultdict(list)
        for parts in self._operations:
            done[parts.root_id].append(parts)
        for root_id in sorted(done.keys() | self._by_root.keys() | self._journal.roots.keys()):
            yield from _Replay(self, root_id, done[root_id], self._by_root[root_id]).problems()

    # -- Without a model ------------------------------------------------------------------------------

    def _times_of_lanes(self) -> dict[int, tuple[list[int], list[int]]]:
        """Of each lane the times of its operations, as a rising bound, and their positions."""
        times: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for parts in self._operations:
            ats, positions = times[self.lane(parts.root_id)]
            ats.append(max(parts.first.at, ats[-1] if ats else 0))
            positions.append(parts.first.position)
        return times

    def lane(self, root_id: bytes) -> int:
        return lane_of(root_id, self._lanes)

    def latest(self, root_id: bytes, at: int) -> int:
        """The last position that can have been seen at a time."""
        ats, positions = self._times[self.lane(root_id)]
        index = bisect_right(ats, at + SLACK_US)
        return positions[index - 1] if index else 0

    def _positions(self) -> Iterator[Problem]:
        """Each lane counts its operations without a gap, each position once."""
        seen: dict[int, list[int]] = defaultdict(list)
        for parts in self._operations:
            seen[self.lane(parts.root_id)].append(parts.first.position)
        for lane, position in self._journal.positions.items():
            found = seen.pop(lane, [])
            for each, times in Counter(found).items():
                if times > 1:
                    yield Problem("position", f"lane {lane} has {times} operations at {each}")
            missing = set(range(1, position + 1)) - set(found)
            if missing or max(found, default=0) > position:
                yield Problem(
                    "position",
                    f"lane {lane} stands at {position}, has {len(set(found))} positions,"
                    f" of which the first missing is {min(missing, default=None)}",
                )

    def _once(self) -> Iterator[Problem]:
        """No token is consumed twice, no operation recorded twice, none in part."""
        consumed: Counter[tuple[bytes, bytes]] = Counter(
            (entry.budget_id, entry.consumed)
            for entry in self._journal.entries
            if entry.consumed is not None
        )
        for (budget_id, token), times in consumed.items():
            if times > 1:
                yield Problem(
                    "token twice",
                    f"token {token.hex()} of budget {budget_id.hex()} was consumed {times} times",
                )
        recorded = Counter((p.root_id, p.first.operation_id) for p in self._operations)
        for (_, operation_id), times in recorded.items():
            if times > 1:
                yield Problem("operation twice", f"{operation_id.hex()} is recorded {times} times")
        for parts in self._operations:
            if [entry.part for entry in parts.entries] != list(range(parts.first.parts)):
                yield Problem(
                    "partial",
                    f"{parts.first.operation_id.hex()} has {len(parts.entries)} parts"
                    f" of {parts.first.parts}",
                )
        seqs = Counter((entry.budget_id, entry.seq) for entry in self._journal.entries)
        for (budget_id, seq), times in seqs.items():
            if times > 1:
                yield Problem(
                    "seq", f"budget {budget_id.hex()} has {times} entries of the seq {seq}"
                )

    def _acknowledged(self) -> Iterator[Problem]:
        """What was acknowledged is there, from then on; what was refused in all its copies is not."""
        recorded = {(p.root_id, p.first.operation_id): p for p in self._operations}
        for key, asked in self._asked.items():
            parts = recorded.get(key)
            answers = asked.acknowledged
            if answers and parts is None:
                yield Problem("lost", f"{asked} was acknowledged, and is not recorded")
            if sum(not answer.replayed for answer in answers) > 1:
                yield Problem("acknowledged twice", f"{asked} was told twice that it was new")
            if parts is not None and not asked.may_be_done:
                yield Problem(
                    "refused", f"{asked} was refused whenever it was sent, and is recorded"
                )
            if parts is not None:
                yield from self._in_order(asked, parts.first)

    def _in_order(self, asked: Asked, first: Entry) -> Iterator[Problem]:
        """An operation takes its place after all that was known before it was sent."""
        if first.position <= asked.attempts[0].floor:
            yield Problem(
                "order",
                f"{asked} is at {first.position}, and was sent when"
                f" {asked.attempts[0].floor} was known already",
            )
        for attempt in asked.attempts:
            answer = attempt.answer
            if isinstance(answer, types_pb2.Outcome) and not answer.dry_run:
                told = answer.ledger.position
                if told < max(first.position, attempt.floor):
                    yield Problem(
                        "order",
                        f"{asked} was told position {told}, of {first.position} itself"
                        f" and {attempt.floor} that was known before",
                    )

    def _nobody_asked(self) -> Iterator[Problem]:
        for parts in self._operations:
            first = parts.first
            asked = self._asked.get((parts.root_id, first.operation_id))
            if asked is None:
                known = self._of is None or parts.root_id in self._of
                if known and first.kind not in SYSTEM_KINDS:
                    yield Problem(
                        "unasked",
                        f"{first.operation_id.hex()} is recorded, and nobody asked for it",
                    )
            elif first.part == 0 and first.request is not None:
                yield from _same(asked, requested(first))

    def _whole_batches(self) -> Iterator[Problem]:
        """Of an atomic batch all operations are there, or none."""
        found: Counter[AtomicBatch] = Counter()
        for parts in self._operations:
            first = parts.first
            batch = requested(first).batch if first.request is not None else None
            if batch is not None:
                found[batch] += 1
        for batch, size in found.items():
            if size != batch.size:
                yield Problem(
                    "atomic",
                    f"{size} of {batch.size} operations of batch {batch.batch_id.hex()} are recorded",
                )

    def _money(self) -> Iterator[Problem]:
        """The sum over each tree, and no more spent than granted and declared as overrun."""
        trees: dict[bytes, list[Budget]] = defaultdict(list)
        for budget in self._journal.budgets:
            trees[budget.root_id].append(budget)
            if not budget.money.balanced():
                yield Problem("row", f"budget {budget.budget_id.hex()} is not balanced")
        for root_id, budgets in trees.items():
            root = next((each for each in budgets if each.is_root), None)
            if root is None:
                yield Problem("row", f"tree {root_id.hex()} has no root")
                continue
            money = [budget.money for budget in budgets]
            total = sum(m.available + m.held + m.spent + m.forfeited for m in money)
            if root.money.granted != total - root.money.overrun:
                yield Problem("row", f"tree {root_id.hex()} does not add up")


def overshoot(journal: Journal) -> int:
    """What was spent beyond what roots were granted and have declared as overrun."""
    spent: Counter[bytes] = Counter()
    bound: Counter[bytes] = Counter()
    for budget in journal.budgets:
        spent[budget.root_id] += budget.money.spent
        if budget.is_root:
            bound[budget.root_id] += budget.money.granted + budget.money.overrun
    return sum(max(0, spent[root_id] - bound[root_id]) for root_id in spent)


def leaked(journal: Journal, swept_at: int) -> list[Hold]:
    """Holds that are live although their time was over before everything due was done."""
    return [
        hold
        for _, hold in journal.holds
        if hold.state is HoldState.LIVE and hold.expires_at <= swept_at
    ]


def unswept(journal: Journal, swept_at: int) -> list[Problem]:
    """Leases that had to end and did not, and money that was left below a closed budget."""
    found = []
    closed = {budget.budget_id for budget in journal.budgets if budget.closed}
    for budget in journal.budgets:
        if not budget.closed and budget.expired(swept_at):
            found.append(Problem("unswept", f"the lease of {budget.budget_id.hex()} is over"))
        if budget.money.available and closed & {budget.budget_id, *budget.ancestors}:
            found.append(Problem("unswept", f"closed {budget.budget_id.hex()} has something"))
    return found


def requested(first: Entry) -> Operation:
    """The operation, decoded from part 0 of its entries."""
    assert first.request is not None
    return decode_request(
        kind=first.kind,
        root_id=first.root_id,
        budget_id=first.budget_id,
        operation_id=first.operation_id,
        trace_id=first.trace_id,
        consumed=first.consumed,
        request=first.request,
    )


def _operations(entries: Sequence[Entry]) -> list[Parts]:
    """The entries as operations; two of the same id stay two, if they are at different positions."""
    found: list[Parts] = []
    for entry in entries:
        last = found[-1] if found else None
        if (
            last is not None
            and entry.part > 0
            and last.first.operation_id == entry.operation_id
            and last.first.position == entry.position
        ):
            last.entries.append(entry)
        else:
            found.append(Parts(entry.root_id, [entry]))
    return found


def _same(asked: Asked, recorded: Operation) -> Iterator[Problem]:
    """What is recorded is what was asked."""
    if type(recorded) is not type(asked.operation):
        yield Problem("content", f"{asked} is recorded as {recorded.kind.name}")
        return
    for each in fields(recorded):
        was, now = getattr(asked.operation, each.name), getattr(recorded, each.name)
        if each.name == "authority" and isinstance(was, After) and isinstance(now, ByToken):
            continue
        if was != now:
            yield Problem("content", f"{asked} is recorded with another {each.name}")


class _Replay:
    """One tree, all over again."""

    def __init__(
        self, whole: _Check, root_id: bytes, done: Sequence[Parts], asked: Sequence[Asked]
    ) -> None:
        self._whole = whole
        self._root_id = root_id
        self._done = done
        self._tree = _WholeTree(root_id)
        self._position = 0
        self._answers = {each.id: each for each in asked}
        doubtful = (_Doubtful(each, attempt) for each in asked for attempt in each.attempts)
        self._pending = deque(
            sorted((one for one in doubtful if one.told), key=lambda one: one.attempt.floor)
        )
        self._active: list[_Doubtful] = []

    def problems(self) -> Iterator[Problem]:
        for parts in self._done:
            first = parts.first
            yield from self._explain(first.position)
            broken = self._again(parts)
            if broken is not None:
                yield broken
                # What follows is decided on what this one did, and cannot be judged.
                return
            self._position = first.position
            yield from self._compare(first)
        yield from self._explain(None)
        yield from self._rows()

    def _again(self, parts: Parts) -> Problem | None:
        first = parts.first
        try:
            operation = requested(first)
            self._tree.look_as_before(operation, parts.entries)
            decision = decide(
                self._tree, operation, _actor(operation, first), first.at, first.position
            )
        except (AssertionError, ValueError, LookupError) as error:
            return Problem("decision", f"{_named(first)} cannot be decided again: {error!r}")
        if isinstance(decision, Refused):
            why = decision.message
            return Problem("decision", f"{_named(first)}, decided again, is refused: {why}")
        if not isinstance(decision, Accepted):
            return Problem("operation twice", f"{_named(first)} was recorded before")
        for made, entry in zip(decision.entries, parts.entries, strict=False):
            differing = [
                name
                for name in made._fields
                if name not in {"previous_hash", "effect"}
                and getattr(made, name) != getattr(entry, name)
            ]
            if differing:
                return Problem(
                    "decision",
                    f"{_named(entry)}, decided again, differs in {', '.join(differing)}",
                )
        if len(decision.entries) != len(parts.entries):
            return Problem("partial", f"{_named(first)} has other parts, decided again")
        self._made = decision
        self._tree.apply(decision)
        return None

    def _compare(self, first: Entry) -> Iterator[Problem]:
        """What anybody was told of it is what the model would have told."""
        asked = self._answers.get(first.operation_id)
        if asked is None:
            return
        expected = _wire(tell(self._made.operation, self._made.entries))
        for answer in asked.acknowledged:
            if (differing := _differing(expected, answer)) is not None:
                yield Problem("answer", f"{asked} was told another {differing} than is right")

    def _explain(self, before: int | None) -> Iterator[Problem]:
        """Refusals and dry runs that may have seen the tree as it is now."""
        while self._pending and (before is None or self._pending[0].attempt.floor < before):
            self._active.append(self._pending.popleft())
        left = []
        for one in self._active:
            if self._is_right(one):
                continue
            latest = self._whole.latest(self._root_id, one.attempt.answered_at)
            if before is None or latest < before:
                yield Problem("refusal", f"{one.asked} was told {one.told}: never so")
            else:
                left.append(one)
        self._active = left

    def _is_right(self, one: _Doubtful) -> bool:
        attempt = one.attempt
        operation, answer = attempt.operation, attempt.answer
        if isinstance(operation.authority, After):
            # There was nothing that it could follow.
            return isinstance(answer, Refusal) and answer.reason == "CAPABILITY_UNKNOWN"
        if (malformed := check_shape(operation)) is not None:
            return _as_told(malformed, answer)
        self._look_at_all(operation)
        for now in self._moments(attempt):
            decision = decide(self._tree, operation, one.asked.actor, now, self._position + 1)
            if isinstance(decision, Accepted):
                decided = tell(operation, decision.entries)
                if isinstance(answer, types_pb2.Outcome) and (
                    _differing(_wire(decided), answer) is None
                ):
                    return True
            elif isinstance(decision, Refused) and _as_told(decision, answer):
                return True
        return False

    def _look_at_all(self, operation: Operation) -> None:
        """Show a decision the whole tree, of which a server loads as much as is small."""
        self._tree.look_as_before(operation, [])
        if isinstance(operation, Return | Revoke | Expire):
            top = operation.descendant_id if isinstance(operation, Revoke) else operation.budget_id
            self._tree._visible = None
            self._tree.pending[top] = 0
            self._tree.open_child[top] = None

    def _moments(self, attempt: Attempt) -> list[int]:
        """Times at which it may have been decided, that differ in what they allow."""
        if isinstance(attempt.answer, types_pb2.Outcome):
            return [_microseconds(attempt.answer)]
        sent, answered = attempt.sent_at, attempt.answered_at
        moments = {sent, answered, sent - SLACK_US, answered + SLACK_US}
        for budget_id in {
            attempt.operation.budget_id,
            getattr(attempt.operation, "descendant_id", attempt.operation.budget_id),
        }:
            budget = self._tree.budgets[budget_id]
            if budget is not None:
                ends = (level.lease_until for level in self._tree.line(budget))
                moments |= {end for end in ends if end is not None and sent <= end <= answered}
        return sorted(moments)

    def _rows(self) -> Iterator[Problem]:
        """What the replay ends in is what the tables have."""
        journal = self._whole._journal
        rows = {each.budget_id: each for each in journal.budgets if each.root_id == self._root_id}
        folds = {key: each for key, each in self._tree.budgets.items() if each is not None}
        for budget_id in rows.keys() | folds.keys():
            yield from _row("budget", budget_id, folds.get(budget_id), rows.get(budget_id))
        holds = {hold.hold_id: hold for root_id, hold in journal.holds if root_id == self._root_id}
        held = {key: each for key, each in self._tree.holds.items() if each is not None}
        for hold_id in holds.keys() | held.keys():
            yield from _row("hold", hold_id, held.get(hold_id), holds.get(hold_id))
        root = self._tree.budgets[self._root_id]
        if journal.roots.get(self._root_id) != (root.name if root else None):
            yield Problem("row", f"root {self._root_id.hex()} has another name")


@dataclass
class _Doubtful:
    """An answer that left nothing in the journal: was it right?"""

    asked: Asked
    attempt: Attempt

    @property
    def told(self) -> str:
        """What it was; empty for others."""
        answer = self.attempt.answer
        if not self.attempt.judged:
            return ""
        if isinstance(answer, Refusal):
            return f"{answer.reason} {dict(answer.facts)}"
        if isinstance(answer, types_pb2.Outcome) and answer.dry_run:
            return "the outcome of a dry run"
        return ""


def _row(
    what: str, id_: bytes, fold: Budget | Hold | None, row: Budget | Hold | None
) -> Iterator[Problem]:
    if fold is None:
        yield Problem("row", f"{what} {id_.hex()} has a row and no entries")
    elif row is None:
        yield Problem("row", f"{what} {id_.hex()} has entries and no row")
    elif fold != row:
        differing = [
            name for name in fold._fields if getattr(fold, name) != getattr(row, name, None)
        ]
        yield Problem("row", f"{what} {id_.hex()} differs in {', '.join(differing)}")


def _actor(operation: Operation, first: Entry) -> Actor:
    """Who asked, as the ledger recorded it."""
    if operation.kind in SYSTEM_KINDS:
        return SYSTEM
    if isinstance(operation.authority, ByRole):
        return Actor(first.principal, Role.ADMIN)
    return Actor(first.principal, Role.AGENT)


def _named(entry: Entry) -> str:
    return f"{entry.kind.name} {entry.operation_id.hex()} at {entry.position} (part {entry.part})"


def _wire(outcome: Outcome) -> types_pb2.Outcome:
    message = types_pb2.Outcome()
    write_outcome(outcome, None, message)
    return message


def _differing(expected: types_pb2.Outcome, told: types_pb2.Outcome) -> str | None:
    """The first field that differs, beside what says how the answer came about."""
    for descriptor in types_pb2.Outcome.DESCRIPTOR.fields:
        name = descriptor.name
        if name not in {"replayed", "ledger"} and getattr(expected, name) != getattr(told, name):
            return name
    return None


def _as_told(refused: Refused, answer: types_pb2.Outcome | Refusal | None) -> bool:
    if not isinstance(answer, Refusal) or answer.reason != refused.reason.name:
        return False
    names = (refused.facts.keys() | answer.facts.keys()) - _NOT_COMPARED
    return all(refused.facts.get(name) == answer.facts.get(name) for name in names)


def _microseconds(outcome: types_pb2.Outcome) -> int:
    return outcome.at.seconds * 1_000_000 + outcome.at.nanos // 1000


def resolved(operation: Operation, token: bytes | None) -> Operation:
    """An operation with the token that its chain stands for; as it is if there is none."""
    if token is None or not isinstance(operation.authority, After):
        return operation
    return replace(operation, authority=ByToken(token))
