"""The ledger's books, read past the server: whether everything in them was answered for."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import psycopg

from peculium_server.core.state import Balances

_BALANCES = ", ".join(f"coalesce({name}, 0)" for name in Balances._fields)
_BUDGETS = f"SELECT root_id, budget_id, seq, {_BALANCES} FROM budgets"  # noqa: S608 - our own names
_LANES = "SELECT lane, position FROM lanes"
_ENTRIES = f"""
    SELECT e.root_id, e.budget_id, e.operation_id, e.seq, {_BALANCES}
    FROM entries AS e
    JOIN unnest(%s::smallint[], %s::bigint[]) AS before(lane, position)
        ON e.lane = before.lane AND e.position > before.position
"""  # noqa: S608 - our own names


Name = tuple[UUID, UUID]
"""Of a budget: its root's id and its own, which another tree may have, too."""


class Row(NamedTuple):
    """A budget, or what an entry says of it."""

    seq: int
    money: Balances


@dataclass
class Books:
    """Everything at one instant."""

    budgets: Mapping[Name, Row]
    lanes: Mapping[int, int]
    """How far each has come."""

    @classmethod
    def read(cls, connection: psycopg.Connection) -> Books:
        """Read them as they are."""
        with connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            budgets = {
                (root_id, budget_id): Row(seq, Balances(*money))
                for root_id, budget_id, seq, *money in connection.execute(_BUDGETS.encode())
            }
            return cls(budgets, dict(connection.execute(_LANES).fetchall()))

    def granted(self) -> Counter[UUID]:
        """What each root was granted."""
        return Counter(
            {
                root_id: row.money.granted
                for (root_id, budget_id), row in self.budgets.items()
                if budget_id == root_id
            }
        )


@dataclass
class Answered:
    """What callers were told that has happened."""

    operations: set[UUID] = field(default_factory=set)
    put_in: Counter[UUID] = field(default_factory=Counter)
    """By root: granted and topped up, less what was withdrawn."""


@dataclass
class Audit:
    """What is wrong with the books."""

    changed: int = 0
    """Balances that nobody has answered for."""
    problems: list[str] = field(default_factory=list)


def audit(connection: psycopg.Connection, before: Books, after: Books, answered: Answered) -> Audit:
    """Compare two states of the books with each other, and with what was answered between them."""
    found = Audit()
    lanes = [*before.lanes], [*before.lanes.values()]
    last: dict[Name, Row] = {}
    recorded: set[UUID] = set()
    for root_id, budget_id, operation_id, seq, *money in connection.execute(
        _ENTRIES.encode(), lanes
    ):
        recorded.add(operation_id)
        name = root_id, budget_id
        if name not in last or last[name].seq < seq:
            last[name] = Row(seq, Balances(*money))
    for operation_id in recorded ^ answered.operations:
        found.changed += 1
        how = "recorded and not answered" if operation_id in recorded else "answered, not recorded"
        found.problems.append(f"operation {operation_id} was {how}")
    for name in before.budgets.keys() | after.budgets.keys():
        expected = last.get(name, before.budgets.get(name))
        if after.budgets.get(name) != expected:
            found.changed += 1
            found.problems.append(f"budget {name[1]} of {name[0]} is not as its entries say")
    found.problems += _unconserved(before, after, answered)
    return found


def _unconserved(before: Books, after: Books, answered: Answered) -> Iterator[str]:
    """Trees that have not what was put into them."""
    expected = before.granted()
    expected.update(answered.put_in)
    trees: defaultdict[UUID, int] = defaultdict(int)
    for (root_id, _), row in after.budgets.items():
        money: Any = row.money
        parts = money.available + money.held + money.spent + money.forfeited
        trees[root_id] += parts - money.overrun
    for root_id, granted in after.granted().items():
        if not granted == expected[root_id] == trees[root_id]:
            yield (
                f"root {root_id} was granted {granted}, should have been {expected[root_id]},"
                f" and {trees[root_id]} are in its tree"
            )
