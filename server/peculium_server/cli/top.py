"""The verb that shows who spends how fast, live."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Final, NamedTuple

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peculium import BudgetFilter, BudgetInfo, BudgetState, Client
from peculium_server.cli.amounts import show_amount
from peculium_server.cli.options import (
    ApiKey,
    Insecure,
    Json,
    Target,
    Timeout,
    connect,
    reference,
)
from peculium_server.cli.output import new_table, print_json, wide_console

_MINUTE: Final = 60.0
_KEPT_SECONDS: Final = 60.0
"""A rate is that of the last minute, or of as much of it as was seen."""


_REFUSED_WITHIN: Final = timedelta(minutes=5)
_REFUSALS_MAX: Final = 10_000
"""Counts that are added up in a look: one for each budget, reason and minute."""
_BELOW: Final = BudgetFilter(
    states=[BudgetState.OPEN, BudgetState.FROZEN, BudgetState.EXPIRED], depth=1
)
_STYLES: Final = {"frozen": "cyan", "expired": "yellow", "closed": "dim"}


class Order(StrEnum):
    """By what rows are sorted; the most comes first."""

    BURN = "burn"
    USED = "used"
    HELD = "held"
    LEFT = "left"
    NAME = "name"


class Row(NamedTuple):
    """A tree, or a budget with all below it, at one look."""

    path: str
    unit: str
    state: str
    used: int
    """Spent and forfeited."""
    held: int
    available: int
    """What is neither used nor held."""
    holds: int
    overrun: int
    refused: int
    """How often something was refused in the last five minutes."""


class Rated(NamedTuple):
    """A row, and how much of it goes in a minute."""

    row: Row
    burn: float | None
    """None: it was looked at once only."""


class Rates:
    """How fast each row goes: by what was used between looks of the last minute."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[float, int]]] = {}

    def rate(self, rows: Iterable[Row], now: float) -> list[Rated]:
        """Take the next look.

        Args:
            rows: As they are.
            now: In seconds, by whatever clock.
        """
        rated = []
        before, self._seen = self._seen, {}
        for row in rows:
            looks = [*before.get(row.path, ()), (now, row.used)]
            # The last look from before the minute is the one that it begins with.
            while len(looks) > 2 and looks[1][0] <= now - _KEPT_SECONDS:  # noqa: PLR2004 - two make a rate
                del looks[0]
            self._seen[row.path] = looks
            then, used = looks[0]
            burn = (row.used - used) / (now - then) * _MINUTE if now > then else None
            rated.append(Rated(row, burn))
        return rated


_KEYS: Final[Mapping[Order, Callable[[Rated], Any]]] = {
    Order.BURN: lambda rated: (-(rated.burn or 0.0), -rated.row.used, rated.row.path),
    Order.USED: lambda rated: (-rated.row.used, rated.row.path),
    Order.HELD: lambda rated: (-rated.row.held, rated.row.path),
    Order.LEFT: lambda rated: (rated.row.available, rated.row.path),
    Order.NAME: lambda rated: rated.row.path,
}


def top(
    *,
    budget: Annotated[
        str | None,
        typer.Argument(
            help="Show the budgets directly below this one instead of all trees: its path or ids.",
            show_default=False,
        ),
    ] = None,
    sort: Annotated[Order, typer.Option(help="What comes first.")] = Order.BURN,
    match: Annotated[
        str | None, typer.Option(help="Only those in whose path this text is.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many rows.")] = 30,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look twice, print the table, and end.")
    ] = False,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show live who spends how fast: trees, or the budgets below one, with all that is below them.

    Amounts are those of the whole subtree; burn is what was used in a minute; refused is how often
    something was refused in the last five. Ctrl-C ends it. An auditor's key is enough.

        peculium top

        peculium top acme --sort held

        peculium top --once --json
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        looks = _looks(client, budget, match, every)
        # A rate needs two.
        shown = itertools.islice(looks, 1, 2) if once else looks
        try:
            if json or once:
                for rated in shown:
                    _print(_chosen(rated, sort, limit), json=json)
            else:
                _live(shown, sort, limit)
        except KeyboardInterrupt:
            # That is how one leaves.
            return


def _print(rated: Sequence[Rated], *, json: bool) -> None:
    if not json:
        wide_console().print(_table(rated))
    for each in rated if json else ():
        print_json(_json(each))


def _looks(
    client: Client, budget: str | None, match: str | None, every: float
) -> Iterator[list[Rated]]:
    """Look again and again."""
    rates = Rates()
    while True:
        begun = time.monotonic()
        rows = [row for row in _rows(client, budget) if match is None or match in row.path]
        yield rates.rate(rows, begun)
        time.sleep(max(0.0, every - (time.monotonic() - begun)))


def _rows(client: Client, budget: str | None) -> Iterator[Row]:
    refused = _refused(client, budget)
    for info in list(_infos(client, budget)):
        # Of what has nothing below it the listing says everything.
        told = info
        if info.balances.delegated:
            told = client.audit.budget(info.ref, sum_subtree=True)
        balances = told.balances
        used, held, holds = told.subtree_used, told.subtree_held, told.subtree_holds_live
        if used is None or held is None or holds is None:
            used, held = balances.spent + balances.forfeited, balances.held
            holds = told.holds_live
        yield Row(
            path=told.path,
            unit=told.unit,
            state=told.state.name.lower(),
            used=used,
            held=held,
            available=balances.granted + balances.overrun - used - held,
            holds=holds,
            overrun=balances.overrun,
            refused=sum(
                count
                for path, count in refused.items()
                if path == told.path or path.startswith(f"{told.path}/")
            ),
        )


def _refused(client: Client, budget: str | None) -> Mapping[str, int]:
    """How often something was refused lately, by the path of the budget that was asked."""
    # Servers count by the minute, so a clock that is a little off does no harm.
    since = datetime.now(UTC) - _REFUSED_WITHIN  # noqa: TID251
    refused: Counter[str] = Counter()
    of = None if budget is None else reference(budget)
    for counted in itertools.islice(
        client.audit.refusals(of, since=since, descending=True), _REFUSALS_MAX
    ):
        if counted.ref is not None:
            refused[counted.ref.path] += counted.count
    return refused


def _infos(client: Client, budget: str | None) -> Iterator[BudgetInfo]:
    """All roots, or what is open directly below a budget."""
    if budget is None:
        return client.audit.budgets()
    above = client.audit.budget(reference(budget)).ref
    listed = client.audit.budgets(above, selected=_BELOW)
    return (info for info in listed if info.ref != above)


def _chosen(rated: Sequence[Rated], sort: Order, limit: int) -> list[Rated]:
    return sorted(rated, key=_KEYS[sort])[:limit]


def _live(shown: Iterator[list[Rated]], sort: Order, limit: int) -> None:
    """Show each look in the place of the one before, until somebody leaves."""
    with Live(screen=True, auto_refresh=False) as live:
        for rated in shown:
            chosen = _chosen(rated, sort, limit)
            said = f"{len(chosen)} of {len(rated)}, by {sort}; Ctrl-C ends it"
            live.update(Group(_table(chosen), Text(said, "dim")), refresh=True)


def _table(rated: Sequence[Rated]) -> Table:
    table = new_table(
        "budget", right=("burn/min", "used", "held", "holds", "left", "refused"), whole=("state",)
    )
    for row, burn in rated:
        state = Text(row.state, _STYLES.get(row.state, ""))
        if row.overrun:
            state.append(f", overrun {show_amount(row.overrun, row.unit)}", "bold red")
        table.add_row(
            Text(row.path),
            "" if burn is None else Text(show_amount(round(burn), row.unit), _burn_style(burn)),
            show_amount(row.used, row.unit),
            show_amount(row.held, row.unit),
            f"{row.holds:,}",
            show_amount(row.available, row.unit),
            Text(f"{row.refused:,}", "red" if row.refused else ""),
            state,
        )
    return table


def _burn_style(burn: float) -> str:
    return "bold yellow" if burn else ""


def _json(rated: Rated) -> dict[str, Any]:
    row, burn = rated
    return {**row._asdict(), "burn_per_minute": None if burn is None else round(burn)}
