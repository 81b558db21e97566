"""A provider's bill: its rows, checked and in the tree's unit."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, BinaryIO, Final, NamedTuple

from peculium_server.reconcile.amounts import Amount, add, parse_amount
from peculium_server.reconcile.columns import Columns, get, has, model_of, names_told, text_of
from peculium_server.reconcile.problems import BillInvalid
from peculium_server.reconcile.rows import Format, Row, read_rows
from peculium_server.reconcile.times import Moment, Period, parse_moment

USD_NANOS: Final = "usd_nanos"
_USD: Final = "usd"
_NANOS_PER_USD: Final = 10**9
_NANOS_PER_CENT: Final = 10**7


class AmountIn(StrEnum):
    """What a bill's amounts are counted in."""

    USD = "usd"
    CENTS = "cents"
    UNIT = "unit"
    """The tree's own unit: tokens, calls, or billionths of a dollar."""


class Line(NamedTuple):
    """A billed call, or one group of a report."""

    line: int
    reference: str
    """Empty if the bill has none."""
    hold_id: bytes | None
    amount: Amount
    moment: Moment | None
    model: str
    labels: tuple[str, ...]
    """In the order in which they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a bill is to be read.

    Attributes:
        unit: What the trees count.
        form: How the file is written; None: find it out.
        columns: Which columns say what.
        amount_in: What its amounts are counted in; None: cents in Anthropic's report, otherwise
            dollars if the trees count those, otherwise the unit.
        period: Lines of another time are left out.
        models: What the ledger calls a model, by what the bill calls it.
    """

    unit: str
    form: Format | None = None
    columns: Columns = field(default_factory=Columns)
    amount_in: AmountIn | None = None
    period: Period = field(default_factory=Period)
    models: Mapping[str, str] = field(default_factory=dict)


class Bill:
    """Iterates over the lines of a file once; tells what they add up to when it is through."""

    def __init__(self, file: BinaryIO, reading: Reading) -> None:
        self._file = file
        self._reading = reading
        self.columns = reading.columns
        """As they were found, from the first line on."""
        self.lines = 0
        self.total: Amount = 0
        self.outside = 0
        """Lines that were left out, for they are of another time."""
        self.extent = Period()
        """From the first to the last time that a line has."""

    @property
    def has_references(self) -> bool:
        """Its lines name calls."""
        return bool(self.columns.reference or self.columns.hold)

    def __iter__(self) -> Iterator[Line]:
        """Read the lines.

        Raises:
            BillInvalid: The file cannot be read, or a line is not of a bill in this unit.
        """
        factor: int | None = None
        # Rows of JSON may leave out what they do not have; but not all of them what was named.
        unseen = self._reading.columns.names()
        first: Row | None = None
        for row in read_rows(self._file, self._reading.form):
            if factor is None:
                self.columns = self._reading.columns.found_in(row.values, row.line)
                factor = self._factor(row)
                first = row
            if unseen:
                unseen = {name for name in unseen if not has(row.values, name)}
            line = self._line(row, factor)
            if line is None:
                continue
            if not self._covers(line.moment):
                self.outside += 1
                continue
            self.lines += 1
            self.total = add(self.total, line.amount)
            yield line
        if first is None:
            raise BillInvalid("there is not one row in the file")
        if unseen:
            problem = f"is in no row; the first has {names_told(first.values)}"
            raise BillInvalid(problem, column=min(unseen))

    def _line(self, row: Row, factor: int) -> Line | None:
        values, columns = row.values, self.columns
        self._check_currency(row)
        reference = _limited(row, columns.reference)
        hold_id = _hold_id(row, columns.hold)
        amount = get(values, columns.amount)
        if amount is None or amount == "":
            if reference or hold_id:
                raise _wrong(row, columns.amount, "a billed call has no amount")
            # A day on which nothing was billed, as OpenAI's export writes it.
            return None
        try:
            exact = parse_amount(amount, factor)
        except ValueError as error:
            raise _wrong(row, columns.amount, str(error)) from None
        return Line(
            row.line,
            reference,
            hold_id,
            exact,
            _moment(row, columns.time),
            self._model(row),
            tuple(_limited(row, name) for name in columns.labels.values()),
        )

    def _factor(self, row: Row) -> int:
        """How many of the tree's unit one of the file's is."""
        amount_in = self._reading.amount_in
        if self._reading.unit != USD_NANOS:
            if amount_in in (AmountIn.USD, AmountIn.CENTS) or row.cents:
                raise _wrong(
                    row,
                    self.columns.amount,
                    f"in dollars, and the tree counts {self._reading.unit}",
                )
            return 1
        if amount_in is None:
            amount_in = AmountIn.CENTS if row.cents else AmountIn.USD
        return {
            AmountIn.USD: _NANOS_PER_USD,
            AmountIn.CENTS: _NANOS_PER_CENT,
            AmountIn.UNIT: 1,
        }[amount_in]

    def _check_currency(self, row: Row) -> None:
        currency = text_of(get(row.values, self.columns.currency)) if self.columns.currency else ""
        if not currency:
            return
        if self._reading.unit != USD_NANOS:
            problem = f"{currency[:20]!r}, and the tree counts {self._reading.unit}"
        elif currency.lower() != _USD:
            problem = f"{currency[:20]!r}, and the tree counts US dollars"
        else:
            return
        raise _wrong(row, self.columns.currency, problem)

    def _model(self, row: Row) -> str:
        column = self.columns.model
        if not column:
            return ""
        model = model_of(column, _limited(row, column))
        return self._reading.models.get(model, model)

    def _covers(self, moment: Moment | None) -> bool:
        if moment is None:
            return True
        if not self._reading.period.has(moment.at):
            return False
        start, end = self.extent
        self.extent = Period(
            moment.at if start is None else min(start, moment.at),
            moment.end if end is None else max(end, moment.end),
        )
        return True


_TEXT_MAX: Final = 1024
"""Characters of an id, model or label."""


def _limited(row: Row, column: str) -> str:
    value = get(row.values, column) if column else None
    if isinstance(value, dict | list):
        raise _wrong(row, column, "is not one value: name a column inside of it, with a dot")
    text = text_of(value)
    if len(text) > _TEXT_MAX:
        raise _wrong(row, column, f"is longer than {_TEXT_MAX} characters")
    return text


def _hold_id(row: Row, column: str) -> bytes | None:
    text = _limited(row, column)
    if not text:
        return None
    try:
        return uuid.UUID(text).bytes
    except ValueError:
        raise _wrong(row, column, f"{text[:40]!r} is no hold's id") from None


def _moment(row: Row, column: str) -> Moment | None:
    value: Any = get(row.values, column) if column else None
    if value is None or value == "":
        return None
    try:
        return parse_moment(value)
    except ValueError as error:
        raise _wrong(row, column, str(error)) from None


def _wrong(row: Row, column: str, problem: str) -> BillInvalid:
    return BillInvalid(
        problem, line=row.line, column=f"{row.path}.{column}" if row.path else column
    )
