"""The verb that compares a provider's bill with the ledger, and books what an admin accepts."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.status import Status as Spinner

from peculium import Client
from peculium.errors import PeculiumError
from peculium_server.cli.amounts import parse_amount
from peculium_server.cli.options import (
    ApiKey,
    Insecure,
    Json,
    Target,
    Timeout,
    connect,
    parse_labels,
)
from peculium_server.cli.output import TOLD_EVERY, print_json, print_line
from peculium_server.cli.problems import REFUSED
from peculium_server.cli.reconcile_ledger import Booking, Known, Trees, book, find_trees, read_calls
from peculium_server.cli.reconcile_output import (
    Shown,
    Tally,
    period_json,
    tally_json,
    total_json,
)
from peculium_server.reconcile.amounts import Tolerance
from peculium_server.reconcile.bill import AmountIn, Bill, Line, Reading
from peculium_server.reconcile.columns import Columns
from peculium_server.reconcile.groups import Groups, total
from peculium_server.reconcile.references import Finding, Matching, collect
from peculium_server.reconcile.rows import Format
from peculium_server.reconcile.times import Period, parse_moment

_REASON_BYTES_MAX: Final = 512


class By(StrEnum):
    """How bill and ledger are compared."""

    REFERENCE = "reference"
    GROUP = "group"


@dataclass(frozen=True, slots=True)
class _Applying:
    """That differences are to be booked, and how."""

    reason: str
    confirmed: bool


def reconcile(
    *,
    file: Annotated[
        Path,
        typer.Argument(
            help="The bill: CSV with a header, JSON, or JSON Lines, in UTF-8.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    budgets: Annotated[
        list[str] | None,
        typer.Argument(
            help="Whose calls it is about, with all below: paths or ids. Absent: all roots.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        By | None,
        typer.Option(help="Call by call, or in groups. Default: by reference if the bill has one."),
    ] = None,
    form: Annotated[
        Format | None, typer.Option("--format", help="How the file is written. Default: found out.")
    ] = None,
    reference: Annotated[
        str, typer.Option(metavar="COLUMN", help="The column with the provider's id of the call.")
    ] = "",
    hold: Annotated[
        str,
        typer.Option(
            metavar="COLUMN", help="The column with the id of the hold, if a gateway was told it."
        ),
    ] = "",
    amount: Annotated[
        str, typer.Option(metavar="COLUMN", help="The column with what was billed.")
    ] = "",
    currency: Annotated[
        str, typer.Option(metavar="COLUMN", help="The column with the currency.")
    ] = "",
    day: Annotated[
        str,
        typer.Option(
            metavar="COLUMN", help="The column with the day or time, in UTC where it says no zone."
        ),
    ] = "",
    model: Annotated[str, typer.Option(metavar="COLUMN", help="The column with the model.")] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=COLUMN",
            help="Group by this label, too, whose values a column has; may be repeated.",
        ),
    ] = None,
    rename_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BILL=LEDGER",
            help="What the ledger calls a model that the bill calls otherwise; may be repeated.",
        ),
    ] = None,
    amount_in: Annotated[
        AmountIn | None,
        typer.Option(
            help="What amounts are counted in. Default: dollars (Anthropic's cost report: cents) if the"
            " budgets count those, otherwise their unit."
        ),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(help="Only calls whose usage names this provider, or none. Default: all."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--from", "--since", help="From this day or time on. Default: the bill's first."
        ),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option("--until", help="Before this day or time. Default: after the bill's last."),
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            help="What may differ, of each call or group: 0.5%, or an amount, or (repeated) the larger"
            " of both. Default: nothing."
        ),
    ] = None,
    sum_lines: Annotated[
        bool, typer.Option("--sum-lines", help="Several lines of one reference are one call.")
    ] = False,
    by_time: Annotated[
        bool,
        typer.Option(
            "--by-time",
            help="Take a call that is in the bill only for the one lapsed hold it fits.",
        ),
    ] = False,
    apply: Annotated[
        bool,
        typer.Option("--apply", help="Book the differences, as an admin. Asks before it does."),
    ] = False,
    reason: Annotated[str, typer.Option(help="Why they are booked; recorded with each.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Compare a provider's bill with the calls that were settled. Fails if they differ.

    Logs of gateways name each call by its reference; cost reports only tell sums, of days, models
    and what else there is a label for. Nothing is changed without --apply.

    peculium audit reconcile litellm-spend.jsonl acme

    peculium audit reconcile openai-costs.json acme --provider openai --tolerance 0.5%

    peculium audit reconcile gateway.csv acme --reference call --amount price --apply --reason "November bill"
    """
    applying = _applying(apply=apply, reason=reason, yes=yes)
    labels = parse_labels(label)
    columns = Columns(reference, hold, amount, currency, day, model, labels)
    given = Period(_time(since, "--from"), _time(until, "--until"))
    if given.start is not None and given.end is not None and given.start >= given.end:
        raise typer.BadParameter("--from has to be before --until")
    models = parse_labels(rename_model)
    with (
        connect(target, api_key, allow_insecure, timeout) as client,
        Console(stderr=True).status("asking for the budgets") as spinner,
        file.open("rb") as opened,
    ):
        trees = find_trees(client, budgets or ())
        reading = Reading(
            unit=trees.unit,
            form=form,
            columns=columns,
            amount_in=amount_in,
            period=given,
            models=models,
        )
        run = _Run(
            client,
            spinner,
            trees,
            Bill(opened, reading),
            given=given,
            tolerance=_tolerance(tolerance, trees.unit),
            provider=provider,
            label_keys=tuple(labels),
            json=json,
        )
        lines = run.lines()
        # The columns are known with the first line.
        first = list(itertools.islice(lines, 1))
        lines = itertools.chain(first, lines)
        if by is None:
            by = By.REFERENCE if run.bill.has_references else By.GROUP
        if by is By.GROUP:
            if applying is not None:
                raise typer.BadParameter(
                    "only what has a reference can be booked: --apply needs one"
                )
            done = run.by_group(lines)
        else:
            if not run.bill.has_references:
                raise typer.BadParameter("no column is known to be the reference: name it")
            done = run.by_reference(lines, sum_lines=sum_lines, by_time=by_time, applying=applying)
    if not done:
        raise typer.Exit(REFUSED)


@dataclass(frozen=True, slots=True)
class _Run:
    """One reconciliation. Its ways tell whether everything is reconciled at the end."""

    client: Client
    spinner: Spinner
    trees: Trees
    bill: Bill
    given: Period
    tolerance: Tolerance
    provider: str | None
    label_keys: tuple[str, ...]
    json: bool

    def lines(self) -> Iterator[Line]:
        """The lines of the bill, with progress."""
        for number, line in enumerate(self.bill, 1):
            if number % TOLD_EVERY == 0:
                self.spinner.update(f"reading the bill: {number:,} lines")
            yield line

    def by_reference(
        self, lines: Iterable[Line], *, sum_lines: bool, by_time: bool, applying: _Applying | None
    ) -> bool:
        """Compare call by call, and book what is to be booked."""
        billed = collect(lines)
        known = self._known()
        tally = Tally()
        for finding in Matching(
            billed,
            known.calls,
            period=self._period(),
            tolerance=self.tolerance,
            sum_lines=sum_lines,
            by_time=by_time,
        ):
            tally.add(finding)
        self.spinner.stop()
        shown = Shown(self.trees.unit, known.budgets)
        if self.json:
            shown.findings_json(tally.kept)
        else:
            shown.findings(tally.kept)
            shown.tally(tally, self.bill, self._period())
        bookable = [finding for finding in tally.kept if finding.bookable]
        open_ones = sum(not finding.reconciled for finding in tally.kept)
        bookings = self._book(bookable, known, shown, applying)
        booked = sum(booking.operation_id is not None for booking in bookings)
        done = open_ones == booked
        if self.json:
            summary = {
                "status": "reconciled" if done else "not_reconciled",
                "findings": tally_json(tally),
                "bookable": len(bookable),
                "booked": booked,
                "lines": self.bill.lines,
                "lines_outside": self.bill.outside,
                **period_json(self._period()),
            }
            print_json(summary)
        else:
            _tell_end(done, len(bookable) if applying is None else 0)
        return done

    def by_group(self, lines: Iterable[Line]) -> bool:
        """Compare sums."""
        groups = Groups(self.label_keys)
        groups.bill(lines)
        known = self._known()
        period = self._period(whole_days=True)
        groups.book(known.calls, period)
        self.spinner.stop()
        judged = groups.judged(self.tolerance)
        everything = total(judged, self.tolerance)
        done = all(group.reconciled for group in judged)
        shown = Shown(self.trees.unit, known.budgets)
        if self.json:
            shown.groups_json(groups.names, judged)
            summary = {
                "status": "reconciled" if done else "not_reconciled",
                "total": total_json(everything),
                "groups": len(judged),
                "lines": self.bill.lines,
                "lines_outside": self.bill.outside,
                **period_json(period),
            }
            print_json(summary)
        else:
            shown.groups(groups.names, judged, everything)
            shown.grouped(judged, self.bill, period)
            _tell_end(done, 0)
        return done

    def _known(self) -> Known:
        return read_calls(
            self.client,
            self.trees,
            self.label_keys,
            self.provider,
            lambda count: self.spinner.update(f"reading the ledger: {count:,} entries"),
        )

    def _period(self, *, whole_days: bool = False) -> Period:
        """The one that was asked for, or else the bill's own."""
        extent = self.bill.extent.whole_days() if whole_days else self.bill.extent
        return Period(
            extent.start if self.given.start is None else self.given.start,
            extent.end if self.given.end is None else self.given.end,
        )

    def _book(
        self, bookable: list[Finding], known: Known, shown: Shown, applying: _Applying | None
    ) -> list[Booking]:
        if applying is None or not bookable:
            return []
        if not applying.confirmed:
            question = (
                f"Book these {len(bookable):,} as billed, for the reason {applying.reason!r}?"
            )
            if not typer.confirm(question, err=True):
                print_line("nothing was booked")
                return []
        bookings: list[Booking] = []
        tell = shown.booking_json if self.json else shown.booking
        try:
            for booking in book(self.client, bookable, known.budgets, applying.reason):
                bookings.append(booking)
                tell(booking)
        except PeculiumError as error:
            error.add_note(f"{len(bookings):,} of {len(bookable):,} were dealt with before that")
            raise
        return bookings


def _tell_end(done: bool, bookable: int) -> None:
    if done:
        print_line("reconciled")
        return
    hint = f"; {bookable:,} can be booked: --apply --reason …" if bookable else ""
    print_line(f"NOT reconciled{hint}")


def _applying(*, apply: bool, reason: str, yes: bool) -> _Applying | None:
    if not apply:
        if reason or yes:
            raise typer.BadParameter("--reason and --yes go with --apply")
        return None
    if not reason:
        raise typer.BadParameter("--apply needs a --reason, which is recorded with each booking")
    if len(reason.encode()) > _REASON_BYTES_MAX:
        raise typer.BadParameter(f"the reason is longer than {_REASON_BYTES_MAX} bytes")
    if not yes and not sys.stdin.isatty():
        raise typer.BadParameter("nobody can be asked here: --apply needs --yes")
    return _Applying(reason, yes)


def _time(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    try:
        return parse_moment(text).at
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from None


def _tolerance(given: list[str] | None, unit: str) -> Tolerance:
    """What may differ, of amounts and parts of a hundred."""
    absolute, percent = 0, Decimal(0)
    for text in given or ():
        if not text.strip().endswith("%"):
            absolute = parse_amount(text, unit)[0]
            continue
        try:
            percent = Decimal(text.strip().removesuffix("%"))
        except InvalidOperation:
            percent = Decimal(-1)
        if (
            not percent.is_finite()
            or not 0 <= percent <= _PERCENT_MAX
            or len(text) > _PERCENT_TEXT_MAX
        ):
            raise typer.BadParameter(f"{text!r} is no part of a hundred: write 0.5%")
    return Tolerance(absolute, percent)


_PERCENT_MAX: Final = 100
_PERCENT_TEXT_MAX: Final = 12
