"""Closing the top of a large subtree: bounded work, whatever its shape."""

from __future__ import annotations

import hashlib
import time

import psycopg
import pytest

from peculium_server.core.footprint import Footprint
from peculium_server.core.limits import EAGER_COLLECTIONS_MAX
from peculium_server.core.state import Accepted, Tree
from peculium_server.store.lane import Loaded
from peculium_server.store.store import Store

SIZE = 10_000

# A row for each number; number 0 is the root, and each other has the parent with the number given.
MAKE = """
    WITH RECURSIVE numbered AS (
        SELECT number, (number - 1) / %(width)s AS above,
            substr(sha256(('budget ' || number)::bytea), 1, 16) AS id
        FROM generate_series(0, %(size)s) AS number
    ), line AS (
        SELECT number, id, '{}'::bytea[] AS ancestors FROM numbered WHERE number = 0
        UNION ALL
        SELECT numbered.number, numbered.id, line.id || line.ancestors
        FROM line JOIN numbered ON numbered.number > 0 AND numbered.above = line.number
    ), as_uuid AS (
        SELECT number, encode(id, 'hex')::uuid AS id,
            array(SELECT encode(one, 'hex')::uuid FROM unnest(ancestors) AS one) AS ancestors
        FROM line
    )
    INSERT INTO budgets (
        granted, available, held, delegated, spent, forfeited, overrun, advanced, disputed, disputes,
        holds_live, version, seq, created_at, last_at, lane, custody, overrun_factor, closed, frozen,
        root_id, budget_id, parent_id, token, head, ancestors, name, unit, labels
    ) SELECT
        number, number, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, now(), now(), %(lane)s, 1,
        CASE WHEN number > 0 THEN 1 END, number %% 2 = 1, false,
        %(root)s, id, ancestors[1], sha256(''), sha256(''), ancestors, number, 'calls', '{}'
    FROM as_uuid
"""


def identifier(number: int) -> bytes:
    return hashlib.sha256(f"budget {number}".encode()).digest()[:16]


async def load(store: Store, root_id: bytes, top: bytes) -> tuple[Tree, float]:
    loaded: list[Loaded] = []

    def decide(found: Loaded) -> list[Accepted]:
        loaded.append(found)
        return []

    footprint = Footprint(budgets={top}, subtrees={top})
    begun = time.perf_counter()
    await store.writer(store.lane_of(root_id)).run({root_id: footprint}, decide, None)
    return loaded[0].trees[root_id], time.perf_counter() - begun


@pytest.mark.parametrize("width", [10_000, 3, 100])
@pytest.mark.parametrize("analyzed", [False, True])
async def test_ten_thousand_budgets_below_are_summed_up_quickly(
    store: Store, database: str, width: int, *, analyzed: bool
) -> None:
    root_id = identifier(0)
    parameters = {
        "size": SIZE,
        "width": width,
        "lane": store.lane_of(root_id),
        "root": root_id.hex(),
    }
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute(MAKE, parameters)
        if analyzed:
            await connection.execute("ANALYZE")
    tree, seconds = await load(store, root_id, root_id)
    loaded = [budget for budget in tree.below(root_id) if budget.money.available]
    assert len(loaded) >= EAGER_COLLECTIONS_MAX
    total = SIZE * (SIZE + 1) // 2
    assert tree.pending[root_id] == total - sum(budget.money.available for budget in loaded)
    open_child = tree.open_child[root_id]
    assert open_child is None or open_child not in tree.budgets
    assert seconds < 5
