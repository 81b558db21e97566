"""That everything lies where it is looked for: what no entry tells of, and follows from them all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from peculium_server.core.placement import Lying, Named, Placement, Positions, nameless
from peculium_server.core.state import Budget, Entry
from peculium_server.core.verify import Finding
from tests.core.ledger import Ledger

LANE = 7
LEDGER = Ledger(eager=0)
ROOT = LEDGER.grant(1_000, name="acme")
TEAM = ROOT.child(500)
RUN = TEAM.child(100)
LEDGER.do(ROOT.revoke(TEAM))
BUDGETS: Sequence[Budget] = tuple(ROOT.tree.known_budgets())
NAME = Named("acme", LANE, ROOT.id)
TABLES = ("entries", "budgets", "holds", "checkpoint_leaves")
LYING = tuple(Lying(each, LANE, ROOT.id) for each in TABLES)


def placed(
    *,
    names: Sequence[Named] = (NAME,),
    lying: Sequence[Lying] = LYING,
    misplaced: Sequence[bytes] = (),
    collected: Sequence[bytes] = (TEAM.id,),
    budgets: Sequence[Budget] = BUDGETS,
) -> Finding | None:
    placement = Placement(
        ROOT.id, LANE, names=names, lying=lying, misplaced=misplaced, collected=collected
    )
    for budget in budgets:
        placement.budget(budget)
    return placement.finish()


def test_a_tree_that_lies_where_it_is_looked_for_is_fine() -> None:
    assert RUN.budget.money.available == 100
    assert placed() is None


@pytest.mark.parametrize("table", TABLES)
def test_rows_in_another_lane_are_found(table: str) -> None:
    finding = placed(lying=[Lying(table, LANE, ROOT.id), Lying(table, 8, ROOT.id)])
    assert finding is not None
    assert (finding.root_id, finding.rule) == (ROOT.id, "lane")
    assert finding.detail == f"{table} of the tree lie in lane 8, which is not its own"


@pytest.mark.parametrize(
    ("names", "detail"),
    [
        ((), "the root is not found by its name, 'acme'"),
        ((Named("other", LANE, ROOT.id),), "the root 'acme' is found by the name 'other'"),
        ((NAME, Named("b", LANE, ROOT.id)), "the root 'acme' is found by the name 'b'"),
        ((Named("acme", 8, ROOT.id),), "by its name the root is in lane 8, and not in 7"),
    ],
)
def test_a_root_is_found_by_its_name_and_by_no_other(names: Sequence[Named], detail: str) -> None:
    assert placed(names=names) == Finding(ROOT.id, ROOT.id, 0, "name", detail)


def test_of_a_root_without_a_row_no_name_is_told() -> None:
    assert placed(names=(), budgets=[]) is None


def test_a_name_that_leads_to_no_tree_is_found() -> None:
    assert nameless([NAME], {ROOT.id}) == []
    detail = "the name 'acme' leads to no tree"
    assert nameless([NAME], set()) == [Finding(ROOT.id, b"", 0, "name", detail)]


def test_a_parent_that_is_not_the_first_ancestor_is_found() -> None:
    finding = placed(misplaced=[RUN.id])
    assert finding == Finding(ROOT.id, RUN.id, 0, "fold", "the row differs in parent_id")


def test_what_waits_below_a_closed_budget_is_on_the_list() -> None:
    finding = placed(collected=[])
    assert finding is not None
    assert (finding.budget_id, finding.rule) == (RUN.id, "collection")
    # Any of those above will do, which the sweeper then looks below; itself would not.
    assert placed(collected=[ROOT.id]) is None
    assert placed(collected=[RUN.id]) is not None


def test_what_is_available_where_nothing_is_closed_waits_for_nobody() -> None:
    opened = [budget._replace(closed=False) for budget in BUDGETS]
    assert placed(collected=[], budgets=opened) is None


# --- positions ---


def entry(position: int, **changes: Any) -> Entry:
    return LEDGER.journal[0]._replace(position=position, **changes)


def counted(entries: Sequence[Entry], stands: int) -> list[Finding]:
    positions = Positions({0: stands}, 1)
    for each in entries:
        positions.entry(0, each)
    return positions.finish()


@pytest.mark.parametrize("stands", [0, 1, 7, 8, 9, 64])
def test_a_lane_that_has_every_position_once_is_fine(stands: int) -> None:
    entries = [entry(at) for at in range(1, stands + 1)]
    assert counted(entries, stands) == []
    # Trees are read one after another: their positions come in no order.
    assert counted(entries[::-1], stands) == []
    # Further parts are at the same position.
    assert counted([*entries, *(each._replace(part=1) for each in entries)], stands) == []


@pytest.mark.parametrize("missing", [1, 8, 9, 20])
def test_a_position_that_is_missing_is_named(missing: int) -> None:
    [finding] = counted([entry(at) for at in range(1, 21) if at != missing], 20)
    assert (finding.root_id, finding.rule) == (b"", "position")
    assert finding.detail == f"lane 0 stands at 20, and lacks the operation at {missing}"


def test_a_position_that_two_operations_have_is_named_at_the_second() -> None:
    second = entry(3, seq=9)
    [finding] = counted([entry(1), entry(2), entry(3), second], 3)
    assert (finding.root_id, finding.budget_id, finding.seq) == (ROOT.id, second.budget_id, 9)
    assert finding.detail.endswith("is not alone at position 3")


@pytest.mark.parametrize("beyond", [4, 2**62, 0, -1])
def test_a_position_behind_where_the_lane_stands_is_named(beyond: int) -> None:
    [finding] = counted([entry(1), entry(2), entry(3), entry(beyond, seq=9)], 3)
    assert (finding.seq, finding.rule) == (9, "position")
    assert "lane 0 ends at 3" in finding.detail


def test_each_lane_says_where_it_stands() -> None:
    positions = Positions({0: 0}, 2)
    positions.entry(1, entry(1))
    [finding] = positions.finish()
    assert (finding.rule, finding.detail) == ("position", "lane 1 does not say where it stands")
