"""Who says which budget or tree is answered from one lane, by its indexes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.audit_sql.conftest import Lived

BUDGET = (
    "(lane, root_id, budget_id) = (SELECT lane, root_id, budget_id FROM audit.budget('{root}'))"
)
LANE = "lane = (SELECT lane FROM audit.budget('{root}'))"
LAST = "ORDER BY seq >> 6 DESC, seq DESC LIMIT 1"
OPERATION = "'00000000-0000-7000-8000-000000000000'"
TREE = "(lane, root_id) = (SELECT lane, root_id FROM audit.budget('{root}'))"


def executed(auditor: psycopg.Connection, query: str) -> Iterator[dict[str, Any]]:
    """The steps of a plan that were taken."""
    # Tables this small are read as a whole, unless that is made dear.
    auditor.execute("SET enable_seqscan = off")
    explained = f"EXPLAIN (ANALYZE, FORMAT JSON) {query}".encode()
    (((top,),),) = auditor.execute(explained).fetchall()
    steps = [top["Plan"]]
    while steps:
        step = steps.pop()
        if step["Actual Loops"]:
            yield step
            steps += step.get("Plans", ())


@pytest.fixture
def root(lived: Lived) -> str:
    """The name of the tree in which most has happened."""
    tree = lived.ledger.trees[lived.ledger.journal[0].root_id]
    return tree.budget(tree.root_id).name


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (f"SELECT kind FROM audit.entries WHERE {BUDGET}", ""),
        (f"SELECT kind FROM audit.entries WHERE {BUDGET} AND at > now()", ""),
        (f"SELECT kind FROM audit.entries WHERE {TREE} AND at > now()", ""),
        (f"SELECT seq FROM audit.entries WHERE {BUDGET} {LAST}", "lane_root_id_budget_id_expr_idx"),
        (f"SELECT kind FROM audit.entries WHERE {TREE} AND operation_id = {OPERATION}", "pkey"),
        (f"SELECT kind FROM audit.entries WHERE {LANE} AND position = 3", "position_idx"),
        (f"SELECT spent FROM audit.usage WHERE {BUDGET}", ""),
        (f"SELECT spent FROM audit.statements WHERE {BUDGET}", ""),
        (f"SELECT made_by FROM audit.lineage WHERE {BUDGET}", "lane_root_id_budget_id_expr_idx"),
    ],
)
def test_entries_are_found_in_one_lane_by_an_index(
    auditor: psycopg.Connection, root: str, query: str, index: str
) -> None:
    steps = [
        step
        for step in executed(auditor, query.format(root=root))
        if "entries_" in step.get("Relation Name", step.get("Index Name", ""))
    ]
    assert {step["Node Type"] for step in steps} <= {
        "Index Scan",
        "Index Only Scan",
        "Bitmap Heap Scan",
        "Bitmap Index Scan",
    }
    (lane,) = {step["Relation Name"] for step in steps if "Relation Name" in step}
    assert [step for step in steps if step.get("Index Name", "").startswith(f"{lane}_{index}")]
