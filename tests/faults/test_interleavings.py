"""Two transactions at once come out as if one had come after the other, and who checks that can tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import ColumnElement, Update

from peculium_server.core.operations import OPERATIONS
from peculium_server.store import lane, statements
from peculium_server.store.wire import Statement, Step
from tests.core.ledger import Ledger
from tests.faults import interleavings
from tests.faults.interleavings import Orders, explore
from tests.faults.pairs import ASKS, Pair, Root, World, asked, pairs
from tests.faults.tally import Setting

pytestmark = pytest.mark.timeout(120)

BOUND_SECONDS = 60
"""What stops at the first problem has this long to come upon one."""

CONSUMERS = [
    Pair("reserve all of the run", "spend all of the run"),
    Pair("settle", "release"),
    Pair("delegate all of the run", "delegate all of the run"),
]
"""Two that present one token."""


def setting(folder: Path, seconds: float) -> Setting:
    return Setting(seed=7, seconds=seconds, folder=folder)


async def test_all_pairs_of_operations_come_out_as_if_one_had_come_after_the_other(
    database: str, tmp_path: Path
) -> None:
    tally = await explore(database, setting(tmp_path, 5), list(pairs()))
    assert tally.clean, tally.problems
    assert tally.rounds


async def test_all_orders_of_a_pair_come_out_as_if_one_had_come_after_the_other(
    database: str, tmp_path: Path
) -> None:
    pair = Pair("reserve all of the root", "freeze the root")
    tally = await explore(database, setting(tmp_path, BOUND_SECONDS), [pair])
    assert tally.clean, tally.problems
    assert tally.rounds > 30


def test_everything_that_can_be_asked_is_paired_with_everything() -> None:
    made = list(pairs())
    assert len(made) == len(set(made)) == len(ASKS) + len(ASKS) * (len(ASKS) + 1) // 2
    ids = Ledger()
    root, other, third = (ids.id() for _ in range(3))
    world = World(1_000, ids.now, Root(root, 0), Root(other, 0), iter([third]))
    assert {each.kind for name in ASKS for each in asked(name, world)} == set(OPERATIONS)


def test_orders_are_gone_through_one_by_one() -> None:
    """Two with two statements each: six orders."""
    orders = Orders()
    seen = []
    more = True
    while more:
        left = {"A": 2, "B": 2}
        played = ""
        while sum(left.values()):
            ready = [name for name in left if left[name]]
            name = ready[orders.choose(len(ready)) if len(ready) > 1 else 0]
            left[name] -= 1
            played += name
        seen.append(played)
        more = orders.next()
    assert seen == ["AABB", "ABAB", "ABBA", "BAAB", "BABA", "BBAA"]


# -- Broken on purpose: whatever keeps transactions apart is taken away, and that is noticed ------------


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Changes of rows that are not as they were loaded change nothing, and nobody minds."""

    def change_at_most(change: Update, expected: ColumnElement[int]) -> Update:
        return change

    monkeypatch.setattr(statements, "_exactly", change_at_most)
    statements.of_lane.cache_clear()
    yield
    statements.of_lane.cache_clear()


@pytest.fixture
def read_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Step(Statement(b"begin", b"BEGIN ISOLATION LEVEL READ COMMITTED"))
    monkeypatch.setattr(lane, "_BEGIN", begin)


@pytest.fixture
def first_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleavings, "PROBLEMS_MAX", 1)


async def test_serializable_isolation_alone_is_enough(
    database: str, tmp_path: Path, unchecked: None
) -> None:
    tally = await explore(database, setting(tmp_path, 3), list(pairs()))
    assert tally.clean, tally.problems
    assert tally.rounds


async def test_without_isolation_and_checks_what_comes_out_is_told_to_be_wrong(
    database: str, tmp_path: Path, unchecked: None, read_committed: None, first_problem: None
) -> None:
    tally = await explore(database, setting(tmp_path, BOUND_SECONDS), list(pairs()))
    assert tally.wrong_totals
    assert "not as A before B" in tally.problems[0]


async def test_without_isolation_checks_and_index_a_token_that_is_consumed_twice_is_told(
    database: str, tmp_path: Path, unchecked: None, read_committed: None
) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("DROP INDEX uq_entries_consumed")
    tally = await explore(database, setting(tmp_path, BOUND_SECONDS), CONSUMERS)
    assert tally.applied_twice
    assert any("a token was consumed twice" in problem for problem in tally.problems)


async def test_without_isolation_the_checks_do_not_let_anything_wrong_be_saved(
    database: str, tmp_path: Path, read_committed: None, first_problem: None
) -> None:
    tally = await explore(database, setting(tmp_path, BOUND_SECONDS), CONSUMERS)
    assert "LedgerCorrupt" in tally.problems[0]
