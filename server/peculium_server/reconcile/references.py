"""A bill against a ledger call by call: by the reference that both have of a call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from peculium_server.core.state import HoldState
from peculium_server.reconcile.amounts import Amount, Tolerance, add, rounded
from peculium_server.reconcile.bill import Line
from peculium_server.reconcile.calls import Call
from peculium_server.reconcile.lapsed import Unexplained, fitting
from peculium_server.reconcile.times import Period


class Status(StrEnum):
    """What became of a reference."""

    MATCHED = "matched"
    """Bill and ledger say the same."""
    DIFFERENT = "different"
    """They say different amounts."""
    LAPSED = "lapsed"
    """The bill explains a hold that lapsed: what it held is forfeited, and nothing was settled."""
    LIVE = "live"
    """The call is not over: more may be settled."""
    TWICE = "twice"
    """The bill has several lines for it, and they do not add up to what was settled."""
    AMBIGUOUS = "ambiguous"
    """Several calls were settled with it."""
    BILL_ONLY = "bill_only"
    """The ledger knows no such call."""
    LEDGER_ONLY = "ledger_only"
    """It was settled, and the bill has no line."""
    EDGE = "edge"
    """As LEDGER_ONLY, of a call that began before or ended after the period: another bill may have it."""


_HARMLESS: Final = frozenset({Status.MATCHED, Status.EDGE})
_BOOKABLE: Final = frozenset({Status.DIFFERENT, Status.LAPSED})
"""What Resolve can settle."""


@dataclass(slots=True)
class Billed:
    """What a bill says of one reference."""

    amount: Amount
    lines: int
    line: int
    """The first of them."""
    at: int | None
    model: str
    hold_id: bytes | None


@dataclass(frozen=True, slots=True)
class Finding:
    """References that belong together, mostly one, and what bill and ledger say of them.

    Attributes:
        status: What became of them.
        references: As they are in the bill and in the ledger; none: nobody named the call.
        billed: The sum of the lines, exact.
        booked: The sum of what the calls have booked.
        lines: How many lines the bill has.
        line: The first of them; None if there is none.
        calls: The calls of the ledger.
        agrees: The sums agree, whatever else there is to say.
        fits: A lapsed hold that would explain the line, and the only one, by its time and amount.
    """

    status: Status
    references: tuple[str, ...]
    billed: Amount
    booked: int
    lines: int
    line: int | None
    calls: tuple[Call, ...]
    agrees: bool
    fits: Call | None = None

    @property
    def difference(self) -> int:
        """What the bill says beyond the ledger, in the tree's unit; below zero: the ledger has more."""
        return rounded(add(self.billed, -self.booked))

    @property
    def reconciled(self) -> bool:
        """There is nothing to do about it."""
        return self.status in _HARMLESS or (self.status is Status.AMBIGUOUS and self.agrees)

    @property
    def bookable(self) -> bool:
        """An admin may resolve the hold to what was billed."""
        return (
            self.status in _BOOKABLE and len(self.calls) == 1 and self.calls[0].hold_id is not None
        )


def collect(lines: Iterable[Line]) -> dict[str, Billed]:
    """What a bill says, by reference; of lines that have none, by the hold's id, or by their number."""
    billed: dict[str, Billed] = {}
    for line in lines:
        key = line.reference
        if not key:
            key = _hold_key(line.hold_id) if line.hold_id else f"{_LINE}{line.line}"
        before = billed.get(key)
        if before is None:
            at = None if line.moment is None or line.moment.whole_day else line.moment.at
            billed[key] = Billed(line.amount, 1, line.line, at, line.model, line.hold_id)
        else:
            before.amount = add(before.amount, line.amount)
            before.lines += 1
            before.hold_id = before.hold_id or line.hold_id
    return billed


# Keys that no reference has, for what has no reference.
_HOLD: Final = "\x00hold "
_LINE: Final = "\x00line "


def _hold_key(hold_id: bytes) -> str:
    return _HOLD + hold_id.hex()


class Matching:
    """Compares what was collected from a bill with the calls of a ledger."""

    def __init__(
        self,
        billed: dict[str, Billed],
        calls: Iterable[Call],
        *,
        period: Period,
        tolerance: Tolerance,
        sum_lines: bool = False,
        by_time: bool = False,
    ) -> None:
        """Prepare.

        Args:
            billed: From `collect`.
            calls: Those that the bill should have.
            period: The bill's: calls of another time that it does not have are nothing to say.
            tolerance: How far a call's amounts may be apart.
            sum_lines: Several lines with one reference are parts of one call.
            by_time: A line that nothing explains is taken for the lapsed hold that it fits.
        """
        self._billed = billed
        self._period = period
        self._tolerance = tolerance
        self._sum_lines = sum_lines
        self._by_time = by_time
        self._calls = list(calls)
        self._names = self._named()
        # Almost every name has one owner, and there may be a million of them.
        self._owner: dict[str, Call] = {}
        self._more_owners: dict[str, list[Call]] = {}
        for call in self._calls:
            for name in self._names_of(call):
                if self._owner.setdefault(name, call) is not call:
                    self._more_owners.setdefault(name, []).append(call)

    def __iter__(self) -> Iterator[Finding]:
        """Everything that there is to say, what has matched included: calls in order, then lines."""
        seen: set[int] = set()
        lapsed: list[Call] = []
        resolved: list[Call] = []
        for call in self._calls:
            if id(call) in seen:
                continue
            if self._by_time and call.booked and not call.settled and not self._names_of(call):
                resolved.append(call)
                continue
            names, calls = self._together(call)
            if len(calls) > 1:
                seen.update(map(id, calls))
            finding = self._compare(names, calls)
            if finding is not None:
                yield finding
            elif call.state is HoldState.LAPSED and not call.settled:
                lapsed.append(call)
        taken: set[int] = set()
        for finding in self._unexplained(lapsed + resolved):
            taken.update(map(id, finding.calls))
            yield finding
        for call in resolved:
            left = None if id(call) in taken else self._compare((), (call,))
            if left is not None:
                yield left

    def _named(self) -> dict[bytes, list[str]]:
        """The names in the bill by which a hold is known through its id."""
        names: dict[bytes, list[str]] = {}
        if all(billed.hold_id is None for billed in self._billed.values()):
            return names
        known = {name for call in self._calls for name in call.references}
        for name, billed in self._billed.items():
            if billed.hold_id is not None and name not in known:
                names.setdefault(billed.hold_id, []).append(name)
        return names

    def _names_of(self, call: Call) -> Sequence[str]:
        by_id = self._names.get(call.hold_id) if self._names and call.hold_id else None
        return (*call.references, *by_id) if by_id else call.references

    def _together(self, first: Call) -> tuple[tuple[str, ...], tuple[Call, ...]]:
        """The names and calls that hang together, from one call on."""
        names = self._names_of(first)
        if len(names) == 1 and names[0] not in self._more_owners:
            return (names[0],), (first,)
        all_names: dict[str, None] = {}
        all_calls = {id(first): first}
        pending = [first]
        while pending:
            for name in self._names_of(pending.pop()):
                if name in all_names:
                    continue
                all_names[name] = None
                for owner in (self._owner[name], *self._more_owners.get(name, ())):
                    if id(owner) not in all_calls:
                        all_calls[id(owner)] = owner
                        pending.append(owner)
        return tuple(all_names), tuple(all_calls.values())

    def _compare(self, names: tuple[str, ...], calls: tuple[Call, ...]) -> Finding | None:
        """What there is to say of them; None if neither side has any money in it."""
        found = [self._billed[name] for name in names if name in self._billed]
        booked = sum(call.booked for call in calls)
        billed: Amount = 0
        for each in found:
            billed = add(billed, each.amount)
        lines = sum(each.lines for each in found)
        if not found and not booked:
            return None
        fine = 0 if isinstance(billed, int) else lines
        agrees = self._tolerance.agree(billed, booked, fine)
        status = self._status(found, calls, agrees=agrees, above=billed > booked)
        if status is None:
            return None
        line = min((each.line for each in found), default=None)
        shown = tuple(name for name in names if not name.startswith("\x00"))
        return Finding(status, shown, billed, booked, lines, line, calls, agrees)

    def _status(
        self, found: list[Billed], calls: tuple[Call, ...], *, agrees: bool, above: bool
    ) -> Status | None:
        if not found:
            return self._without_line(calls)
        if len(calls) > 1:
            return Status.AMBIGUOUS
        if agrees:
            return Status.MATCHED
        state = calls[0].state
        if state is HoldState.LIVE:
            return Status.LIVE
        if not self._sum_lines and any(each.lines > 1 for each in found):
            return Status.TWICE
        return Status.LAPSED if state is HoldState.LAPSED and above else Status.DIFFERENT

    def _without_line(self, calls: tuple[Call, ...]) -> Status | None:
        """A call is missing from the bill if all of its life was in the bill's period."""
        within = [(self._period.has(call.created_at), self._period.has(call.at)) for call in calls]
        if all(began and ended for began, ended in within):
            return Status.LEDGER_ONLY
        return Status.EDGE if any(began or ended for began, ended in within) else None

    def _unexplained(self, candidates: list[Call]) -> Iterator[Finding]:
        names = [name for name in self._billed if name not in self._owner]
        lines = [
            Unexplained(each.at, rounded(each.amount), each.model)
            for each in map(self._billed.__getitem__, names)
        ]
        for name, call in zip(names, fitting(lines, candidates), strict=True):
            billed = self._billed[name]
            shown = () if name.startswith("\x00") else (name,)
            finding = Finding(
                Status.BILL_ONLY,
                shown,
                billed.amount,
                booked=0,
                lines=billed.lines,
                line=billed.line,
                calls=(),
                agrees=False,
                fits=call,
            )
            if call is not None and self._by_time:
                lapsed = call.state is HoldState.LAPSED
                finding = replace(
                    finding,
                    status=Status.LAPSED if lapsed else Status.MATCHED,
                    calls=(call,),
                    booked=call.booked,
                    agrees=not lapsed,
                    fits=None,
                )
            if finding.billed:
                yield finding
