"""What is still to be done about alerts, for those who watch over the servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Executable, func, literal_column, select

from peculium_server.core.alerts import DeliveryState
from peculium_server.store import alerts, checkpoints, tail
from peculium_server.store.errors import LedgerCorrupt
from peculium_server.store.reading import fetch_together
from peculium_server.store.schema import alert_rules, alerts as alerts_table, webhook_deliveries
from peculium_server.store.statements import compiled
from peculium_server.store.wire import Connection, Statement, Step


class Waiting(NamedTuple):
    """What is still to be done. Times are in microseconds since the Unix epoch."""

    now: int
    """The database's clock."""
    since: int | None
    """When the earliest operation was decided, in a lane with rules, that was not looked at; None: all were."""
    due: int
    """Rules whose subtree is to be summed up."""
    deliveries: int
    """To webhooks, to be tried or tried again."""
    oldest: int | None
    """When the alert of the earliest of these was recorded; None if there are none."""


def _watched() -> Executable:
    """Lanes with rules: up to where there is nothing for any of them, and how many are due."""
    due = func.count().filter(alert_rules.c.due)
    return (
        select(alert_rules.c.lane, func.min(alert_rules.c.since), due)
        .where(alert_rules.c.deleted_at.is_(None))
        .group_by(alert_rules.c.lane)
    )


def _outbox() -> Executable:
    """How many deliveries are to be tried, and when the alert of the earliest was recorded."""
    number = webhook_deliveries.c.number
    pending = (
        select(func.count().label("deliveries"), func.min(number).label("number"))
        .where(
            webhook_deliveries.c.state == literal_column(str(int(DeliveryState.PENDING))),
        )
        .subquery("pending")
    )
    return select(pending.c.deliveries, alerts_table.c.recorded_at).select_from(
        pending.outerjoin(alerts_table, alerts_table.c.number == pending.c.number)
    )


RECIPES: dict[str, tuple[Executable, Callable[[Sequence[Any]], Any]]] = {
    "watched_lanes": (_watched(), tuple),
    "outbox": (_outbox(), tuple),
}

STATEMENTS: dict[str, Statement] = {
    name: compiled(name, executable, row) for name, (executable, row) in RECIPES.items()
}


async def waiting(connection: Connection, lanes: int) -> Waiting:
    """What is still to be done about alerts.

    Raises:
        psycopg.Error: The database does not say.
        LedgerCorrupt: What it says cannot be.
    """
    clock, watched, progress, positions, outbox = await fetch_together(
        connection,
        Step(alerts.STATEMENTS["alert_clock"]),
        Step(STATEMENTS["watched_lanes"]),
        # First up to where was looked: where the lanes stand afterwards is not before that.
        Step(alerts.STATEMENTS["progress"]),
        Step(tail.STATEMENTS["positions"]),
        Step(STATEMENTS["outbox"]),
    )
    if not progress or len(progress[0].positions) != lanes:
        raise LedgerCorrupt(
            "the row that says how far alerts have come is missing, or of other lanes"
        )
    stands = tail.to_positions(positions, lanes)
    looked = {lane: max(progress[0].positions[lane], since) for lane, since, _ in watched}
    behind = [
        Step(
            checkpoints.STATEMENTS["decided_at"],
            {"lane": lane, "after": after, "until": after + 1},
        )
        for lane, after in looked.items()
        if after < stands[lane]
    ]
    earliest = await fetch_together(connection, *behind) if behind else []
    deliveries, oldest = outbox[0]
    return Waiting(
        now=clock[0],
        since=min((at for each in earliest for at in each), default=None),
        due=sum(due for *_, due in watched),
        deliveries=deliveries,
        oldest=oldest,
    )
