"""A bill against a ledger by day, model and labels: for reports that do not name calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum

from peculium_server.reconcile.amounts import Amount, Tolerance, add, rounded
from peculium_server.reconcile.bill import Line
from peculium_server.reconcile.calls import Call
from peculium_server.reconcile.times import DAY_US, Period, day_text

Key = tuple[str, ...]
"""The day, the model, and the labels that were asked for, as far as the bill tells them."""


class GroupStatus(StrEnum):
    """What became of a group."""

    MATCHED = "matched"
    """The sums agree within the tolerance."""
    EXPLAINED = "explained"
    """The bill has more: what the ledger leaves open, forfeited or disputed, explains it."""
    DIFFERENT = "different"
    BILL_ONLY = "bill_only"
    LEDGER_ONLY = "ledger_only"


@dataclass(slots=True)
class Group:
    """Sums of one group.

    Attributes:
        key: The day, model and labels, as far as the bill tells them.
        billed: What the bill says, exact.
        booked: What the ledger has booked.
        open: What the ledger leaves open: forfeited by lapses, or disputed.
        lines: How many lines of the bill.
        fine: How many of them are finer than the unit.
        calls: How many calls of the ledger.
    """

    key: Key = ()
    billed: Amount = 0
    booked: int = 0
    open: int = 0
    lines: int = 0
    fine: int = 0
    calls: int = 0
    status: GroupStatus = field(default=GroupStatus.MATCHED, init=False)

    @property
    def difference(self) -> int:
        """What the bill says beyond the ledger; below zero: the ledger has more."""
        return rounded(add(self.billed, -self.booked))

    @property
    def rest(self) -> int:
        """What of the difference nothing explains: neither tolerance nor what is left open."""
        if self.reconciled:
            return 0
        difference = self.difference
        return difference if difference < 0 else max(0, difference - self.open)

    @property
    def reconciled(self) -> bool:
        """There is nothing to do about it."""
        return self.status in (GroupStatus.MATCHED, GroupStatus.EXPLAINED)

    def judge(self, tolerance: Tolerance) -> None:
        """Say what became of it."""
        allowed = tolerance.allows(self.billed, self.booked, self.fine)
        if tolerance.agree(self.billed, self.booked, self.fine):
            self.status = GroupStatus.MATCHED
        elif self.booked < self.billed <= self.booked + self.open + allowed:
            self.status = GroupStatus.EXPLAINED
        elif not self.calls:
            self.status = GroupStatus.BILL_ONLY
        elif not self.lines:
            self.status = GroupStatus.LEDGER_ONLY
        else:
            self.status = GroupStatus.DIFFERENT


class Groups:
    """Adds up a bill, then the calls of a ledger, by what the bill tells of its lines."""

    def __init__(self, label_keys: Iterable[str] = ()) -> None:
        self._labels = tuple(label_keys)
        self._by: dict[tuple[int | None, str, tuple[str, ...]], Group] = {}
        self._with_day = False
        self._with_model = False

    @property
    def names(self) -> Key:
        """What the groups' keys are."""
        day = ("day",) if self._with_day else ()
        model = ("model",) if self._with_model else ()
        return (*day, *model, *self._labels)

    def bill(self, lines: Iterable[Line]) -> None:
        """Add up the lines of a bill: all of them, before the ledger's calls."""
        for line in lines:
            day = None if line.moment is None else line.moment.at
            self._with_day = self._with_day or day is not None
            self._with_model = self._with_model or bool(line.model)
            group = self._group(day, line.model, line.labels)
            group.billed = add(group.billed, line.amount)
            group.lines += 1
            group.fine += isinstance(line.amount, Decimal)

    def book(self, calls: Iterable[Call], period: Period) -> None:
        """Add up the calls whose day is in a period."""
        for call in calls:
            if not period.has(call.counted_at) or not (call.booked or call.open):
                continue
            group = self._group(
                call.counted_at if self._with_day else None,
                call.model if self._with_model else "",
                call.labels,
            )
            group.booked += call.booked
            group.open += call.open
            group.calls += 1

    def judged(self, tolerance: Tolerance) -> list[Group]:
        """All groups in order of their keys, and what became of each."""
        groups = []
        for (day, model, labels), group in self._by.items():
            shown = ("" if day is None else day_text(day * DAY_US),) if self._with_day else ()
            group.key = (*shown, *((model,) if self._with_model else ()), *labels)
            group.judge(tolerance)
            groups.append(group)
        return sorted(groups, key=lambda group: group.key)

    def _group(self, at: int | None, model: str, labels: tuple[str, ...]) -> Group:
        key = (None if at is None else at // DAY_US, model, labels)
        group = self._by.get(key)
        if group is None:
            group = self._by[key] = Group()
        return group


def total(groups: Iterable[Group], tolerance: Tolerance) -> Group:
    """The sum of all groups, judged as one."""
    everything = Group()
    for group in groups:
        everything.billed = add(everything.billed, group.billed)
        everything.booked += group.booked
        everything.open += group.open
        everything.lines += group.lines
        everything.fine += group.fine
        everything.calls += group.calls
    everything.judge(tolerance)
    return everything
