"""The checker check: with a planted fault the campaign fails, each for its own reason.

The ledger has several guards behind each other: a lane's advisory lock, the checks of the lane's position
and of each budget's seq that travel with a commit, unique keys, and serializable isolation. One that is
taken away is mostly made up for by the next. So each fault takes away the guard that it is named after and
those that would hide it, and is found by what that guard alone prevents. Each guard taken away alone is
run, too, where time allows: what then still holds is told.

    python -m tests.faults.planted read-committed serve …

is a server with such a fault: the store is changed in its process, before anything of it is used. The
product has no switch for that.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import psycopg
from sqlalchemy import (
    BigInteger,
    Select,
    Update,
    bindparam,
    func,
    literal_column,
    select,
    update,
)

from peculium_server.store import lane, rows, statements
from peculium_server.store.schema import budgets, lanes
from peculium_server.store.wire import Connection, Statement, Step
from tests.faults.progress import say
from tests.faults.tally import Setting, Tally

Change = Callable[[], None]


def _read_committed() -> None:
    """Every statement sees what was committed by then, and nothing is checked at the end."""
    lane._BEGIN = Step(Statement(b"begin", b"BEGIN ISOLATION LEVEL READ COMMITTED"))


def _without_lock() -> None:
    """Nobody waits for the lane."""
    lane._LOCK = lane._LOCK._replace(sql=b"SELECT $1::bigint")
    lane._UNLOCK = lane._UNLOCK._replace(sql=b"SELECT $1::bigint")


def _without_position_check() -> None:
    """The lane's position is written whatever it is by then."""

    def save_position(lane_number: Any) -> Any:
        change = (
            update(lanes)
            .where(lanes.c.lane == lane_number)
            .values(
                position=func.greatest(
                    lanes.c.position,
                    bindparam("after", type_=BigInteger),
                )
            )
        )
        # The parameter stays, so that the step can be sent as it is.
        before = bindparam("before", type_=BigInteger)
        changed = change.returning(literal_column("1")).cte("changed")
        return select(func.count(), before).select_from(changed)

    recipes = statements.LANE_RECIPES
    recipes["save_position"] = recipes["save_position"]._replace(build=save_position)


def _without_row_checks() -> None:
    """A budget is written whatever its seq is by then, and however many rows that changes."""

    def anyhow(change: Update) -> Select[Any]:
        changed = change.returning(literal_column("1")).cte("changed")
        expected = bindparam("rows", type_=BigInteger)
        return select(func.count(), expected).select_from(changed)

    def save_budgets(lane_number: Any, given: statements.Given = statements.unnested) -> Any:
        keys = given(
            root_id=statements._ID,
            budget_id=statements._ID,
            before=BigInteger(),
            **statements._types(budgets, rows.BUDGET_CHANGES),
        )
        change = (
            update(budgets)
            .where(
                budgets.c.lane == lane_number,
                budgets.c.root_id == keys.c.root_id,
                budgets.c.budget_id == keys.c.budget_id,
                keys.c.before >= literal_column("0"),
            )
            .values({name: keys.c[name] for name in rows.BUDGET_CHANGES})
        )
        return anyhow(change)

    recipes = statements.LANE_RECIPES
    recipes["save_budgets"] = recipes["save_budgets"]._replace(build=save_budgets)
    save_budget = partial(save_budgets, given=statements.one_row)
    recipes["save_budget"] = recipes["save_budget"]._replace(build=save_budget)


def _without_waiting() -> None:
    """A commit whose answer does not come counts as done."""
    end = lane.LanesWriter._end

    async def hasty(self: lane.LanesWriter, connection: Connection, steps: Sequence[Step]) -> None:
        with contextlib.suppress(psycopg.OperationalError):
            await end(self, connection, steps)

    lane.LanesWriter._end = hasty  # type: ignore[method-assign]


@dataclass(frozen=True)
class Planted:
    """A fault, what it takes away, and by what it is found."""

    name: str
    changes: Sequence[Change]
    """In the server's process."""
    reason: str
    """The rule that is found broken: its own reason."""
    load: str = "fight"
    """What the clients do that finds it soonest; see `contended`."""
    sql: Sequence[str] = field(default=())
    """In the database."""
    says: str = ""
    """What the fault is, and what it takes away beside that, for people."""

    def plant(self) -> None:
        """Change the store of this process."""
        for change in self.changes:
            change()


_FREE_FOR_ALL = (_read_committed, _without_lock, _without_position_check)

PLANTED = {
    fault.name: fault
    for fault in (
        Planted(
            "read-committed",
            _FREE_FOR_ALL,
            "position",
            says="READ COMMITTED instead of SERIALIZABLE; and no advisory lock and no check of the"
            " lane's position, which both still keep one writer of a lane from another. Found by two"
            " operations that take the same place in a lane: none saw the other. The checks of each"
            " budget's seq and all unique keys stay.",
        ),
        Planted(
            "row-check",
            (*_FREE_FOR_ALL, _without_row_checks),
            "seq",
            says="The checks of rows are skipped: of the lane's position and of each budget's seq; and"
            " READ COMMITTED without the lock, since SERIALIZABLE refuses the second writer of a row by"
            " itself. Found by a lost update: two entries of one budget follow the same one.",
        ),
        Planted(
            "unique-consumed",
            (*_FREE_FOR_ALL, _without_row_checks),
            "token twice",
            load="race",
            sql=("DROP INDEX uq_entries_consumed",),
            says="The unique index over consumed tokens is dropped; and, since each of them alone keeps"
            " two writers from the same budget, isolation, lock and row checks as above. Found by a"
            " token that was consumed twice.",
        ),
        Planted(
            "unique-operation",
            (*_FREE_FOR_ALL, _without_row_checks),
            "operation twice",
            load="twice",
            sql=("ALTER TABLE entries DROP CONSTRAINT pk_entries",),
            says="The primary key of entries is dropped; and the rest as above. Found by an operation"
            " that was sent twice at once and is recorded twice.",
        ),
        Planted(
            "hasty",
            (_without_waiting,),
            "lost",
            load="cut",
            says="A commit whose answer was cut off counts as done, where it has to be found out. Found by"
            " acknowledged operations that are not recorded. Nothing else is taken away.",
        ),
    )
}
"""Each has to be found, for its own reason."""

ALONE = {
    fault.name: fault
    for fault in (
        Planted("read-committed-alone", (_read_committed,), "position"),
        Planted("no-lock-alone", (_without_lock,), "position"),
        Planted("no-position-check-alone", (_without_position_check,), "position"),
        Planted("no-row-check-alone", (_without_row_checks,), "seq"),
        Planted(
            "unique-consumed-alone",
            (),
            "token twice",
            load="race",
            sql=("DROP INDEX uq_entries_consumed",),
        ),
        Planted(
            "unique-operation-alone",
            (),
            "operation twice",
            load="twice",
            sql=("ALTER TABLE entries DROP CONSTRAINT pk_entries",),
        ),
    )
}
"""Each is expected to be made up for by the other guards."""

SECONDS_MIN, SECONDS_MAX = 6.0, 20.0
"""Of a try to find a fault."""
TRIES_MAX = 3
"""A fault that is not found by then is not found."""


@dataclass
class Checked:
    """What became of the planted faults."""

    tally: Tally
    found: list[str]
    masked: list[str]


async def check_checkers(setting: Setting, *, alone: bool) -> Checked:
    """Plant each fault and see whether a short campaign finds it.

    Args:
        setting: Its time is for all of them.
        alone: Whether to try each guard alone, too.
    """
    # Here, since a server that is run with a fault needs nothing of the campaign.
    from tests.faults.contended import contended

    faults = [*PLANTED.values(), *(ALONE.values() if alone else ())]
    # The time is that of the faults which have to be found.
    seconds = min(SECONDS_MAX, max(SECONDS_MIN, setting.seconds / len(PLANTED)))
    checked = Checked(Tally(), [], [])
    for fault in faults:
        reasons: list[str] = []
        for number in range(1 if fault.name in ALONE else TRIES_MAX):
            say(f"  planted: {fault.name}")
            # Whether two servers meet is a matter of chance.
            tried = replace(setting, seed=setting.seed + number, seconds=seconds)
            found = await contended(tried, fault)
            checked.tally.rounds += 1
            checked.tally.operations += found.operations
            reasons = sorted({problem.rule for problem in found.problems})
            if fault.reason in reasons:
                break
        if fault.name in ALONE:
            # What was found may be a lack of answers, never a wrong ledger.
            if fault.reason not in reasons:
                checked.masked.append(fault.name)
            else:
                checked.tally.problems.append(f"{fault.name} alone breaks {fault.reason}")
        elif fault.reason in reasons:
            checked.found.append(fault.name)
        else:
            checked.tally.problems.append(
                f"{fault.name} was not found for its own reason ({fault.reason}), but for {reasons}"
            )
    return checked


def main() -> int:
    """Run a server, or whatever the command line says, with a fault."""
    from peculium_server.cli import main as command_line

    fault = (PLANTED | ALONE)[sys.argv.pop(1)]
    fault.plant()
    command_line()
    return 0


if __name__ == "__main__":
    sys.exit(main())
