"""What a superuser does to a sealed ledger is found by the online verification, however well it is hashed."""

from __future__ import annotations

import psycopg
import pytest

from peculium_server.core.encoding import entry_hash
from peculium_server.core.limits import EAGER_COLLECTIONS_MAX
from peculium_server.core.state import GENESIS, Entry
from peculium_server.store.errors import LedgerCorrupt
from tests.core.tampering import rehashed
from tests.sealer.sealing import Sealing, found
from tests.sweeper.fleet import Fleet

STATEMENTS = {
    "a checkpoint's number": "UPDATE checkpoints SET number = 9 WHERE number = 3",
    "how many leaves it has": "UPDATE checkpoints SET leaves = leaves + 1 WHERE number = 2",
    "when it was sealed": "UPDATE checkpoints SET sealed_at = sealed_at + interval '1 us' WHERE number = 2",
    "its Merkle root": "UPDATE checkpoints SET merkle_root = sha256('') WHERE number = 2",
    "the hash before it": "UPDATE checkpoints SET previous_hash = sha256('') WHERE number = 2",
    "its hash": "UPDATE checkpoints SET hash = sha256('') WHERE number = 3",
    "its key": "UPDATE checkpoints SET key_id = decode('0011223344556677', 'hex') WHERE number = 2",
    "its signature": "UPDATE checkpoints SET signature = sha512('') WHERE number = 2",
    "its positions": "UPDATE checkpoints SET positions[1] = positions[1] + 1 WHERE number = 2",
    "one is gone": "DELETE FROM checkpoints WHERE number = 2",
    "the last one is gone": "DELETE FROM checkpoints WHERE number = 3",
    "all are gone": "DELETE FROM checkpoints",
    "a leaf's seq": "UPDATE checkpoint_leaves SET seq = seq + 1 WHERE number = 2",
    "a leaf's head": "UPDATE checkpoint_leaves SET head = sha256('') WHERE number = 2",
    "a leaf's number": "UPDATE checkpoint_leaves SET number = 3 WHERE number = 2",
    "a leaf's budget": "UPDATE checkpoint_leaves SET budget_id = gen_random_uuid() WHERE number = 2",
    "a leaf's tree": "UPDATE checkpoint_leaves SET root_id = gen_random_uuid() WHERE number = 2",
    "leaves are gone": "DELETE FROM checkpoint_leaves WHERE number = 2",
    "a leaf is added": (
        "INSERT INTO checkpoint_leaves SELECT number, seq, lane, root_id, gen_random_uuid(), head"
        " FROM checkpoint_leaves WHERE number = 2 LIMIT 1"
    ),
    "a public key": "UPDATE checkpoint_keys SET public_key = sha256('')",
    "the public key is gone": "DELETE FROM checkpoint_keys",
    "the ledger's incarnation": "UPDATE incarnations SET incarnation = gen_random_uuid() WHERE number > 1",
    "a checkpoint's incarnation": "UPDATE checkpoints SET incarnation = gen_random_uuid()",
}


async def sealed(fleet: Fleet, sealing: Sealing) -> bytes:
    """A tree that three checkpoints have sealed."""
    root = await fleet.root(lane=1)
    await sealing.seal_all()
    for _ in range(2):
        await fleet.children(root, root, 2)
        await fleet.ask(fleet.spend(root))
        await sealing.seal_all()
    assert len(await sealing.checkpoints()) == 3
    assert await found(sealing.store) == []
    return root


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=list(STATEMENTS))
async def test_whatever_is_done_to_checkpoints_is_found(
    fleet: Fleet, sealing: Sealing, database: str, statement: str
) -> None:
    await sealed(fleet, sealing)
    with psycopg.connect(database, autocommit=True) as connection:
        assert connection.execute(statement.encode()).rowcount > 0
    async with Sealing.opened(database, sealing.key) as anew:
        findings = await found(anew.store)
    assert findings[0].rule == "checkpoint"
    # A leaf of another tree lies in a lane that is not that tree's.
    assert {finding.rule for finding in findings[1:]} <= {"checkpoint", "lane", "ledger"}


async def entries_of(fleet: Fleet, root: bytes) -> list[Entry]:
    async with fleet.store.snapshot() as snapshot:
        return [entry async for entry in snapshot.entries_in_order(root)]


async def test_a_history_that_was_written_anew_with_all_its_hashes_is_found(
    fleet: Fleet, sealing: Sealing, database: str
) -> None:
    root = await sealed(fleet, sealing)
    entries = await entries_of(fleet, root)
    # It is made to belong to another trace, which no rule forbids, and all is hashed again.
    spent = entries[-1].operation_id
    forged = rehashed(
        [
            each._replace(trace_id=bytes(16)) if each.operation_id == spent else each
            for each in entries
        ]
    )
    with psycopg.connect(database, autocommit=True) as connection:
        for entry in forged:
            connection.execute(
                "UPDATE entries SET trace_id = %s, hash = %s,"
                " digest = CASE WHEN parts > 1 THEN %s::bytea END"
                " WHERE operation_id = %s AND part = %s",
                [entry.trace_id, entry.hash, entry.digest, entry.operation_id.hex(), entry.part],
            )
        connection.execute(
            "UPDATE budgets SET head = e.hash FROM entries AS e WHERE e.budget_id = budgets.budget_id"
            " AND e.root_id = budgets.root_id AND e.lane = budgets.lane AND e.seq = budgets.seq"
        )
    [finding] = await found(sealing.store, root)
    assert (finding.rule, finding.root_id, finding.budget_id) == ("checkpoint", root, root)
    assert finding.seq == entries[-1].seq
    assert "another hash" in finding.detail


async def test_a_tree_that_is_gone_with_all_its_rows_is_found(
    fleet: Fleet, sealing: Sealing, database: str
) -> None:
    root = await sealed(fleet, sealing)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("TRUNCATE entries, budgets, holds, roots")
    finding, counted = await found(sealing.store)
    assert (finding.rule, finding.root_id, finding.seq) == ("checkpoint", root, 1)
    assert finding.detail.endswith("is missing")
    assert (counted.rule, counted.root_id) == ("position", b"")


async def test_a_tree_that_is_put_into_what_was_sealed_is_found(
    fleet: Fleet, sealing: Sealing, database: str
) -> None:
    root = await sealed(fleet, sealing)
    lane = fleet.store.lane_of(root)
    put_in = await fleet.root(lane=lane)
    [entry] = await entries_of(fleet, put_in)
    assert entry.previous_hash in (b"", GENESIS)
    # At a position that is sealed already, and hashed accordingly.
    [forged] = rehashed([entry._replace(position=1)])
    assert forged.hash == entry_hash(GENESIS, forged.digest, 0)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "UPDATE entries SET position = 1, hash = %s WHERE root_id = %s",
            [forged.hash, put_in.hex()],
        )
        connection.execute(
            "UPDATE budgets SET head = %s WHERE root_id = %s", [forged.hash, put_in.hex()]
        )
    finding, twice = await found(sealing.store)
    assert (finding.rule, finding.root_id, finding.seq) == ("checkpoint", put_in, 1)
    assert finding.detail.endswith("is not sealed by checkpoint 1")
    assert twice.detail.endswith("is not alone at position 1")


async def test_a_tree_alone_is_verified_with_all_checkpoints(
    fleet: Fleet, sealing: Sealing, database: str
) -> None:
    root = await sealed(fleet, sealing)
    other = await fleet.root()
    await sealing.seal_all()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DELETE FROM checkpoint_leaves WHERE root_id = %s", [other.hex()])
    [finding] = await found(sealing.store, root)
    assert finding.detail.startswith("checkpoint 4: it has 0 leaves")


ELSEWHERE = {
    "a root's name": ("name", "UPDATE roots SET name = 'other'"),
    "where a name leads": ("name", "UPDATE roots SET root_id = gen_random_uuid()"),
    "the lane of a name": ("name", "UPDATE roots SET lane = (lane + 1) % 16"),
    "a name is gone": ("name", "DELETE FROM roots"),
    "another name": ("name", "INSERT INTO roots SELECT lane, root_id, 'other' FROM roots"),
    "a name of nothing": ("name", "INSERT INTO roots VALUES (0, gen_random_uuid(), 'other')"),
    "where a lane stands": ("position", "UPDATE lanes SET position = position + 1"),
    "a lane that is gone": ("position", "DELETE FROM lanes WHERE position > 0"),
    "an entry in another lane": (
        "lane",
        (
            "INSERT INTO entries SELECT (jsonb_populate_record(e,"
            " jsonb_build_object('lane', (e.lane + 1) % 16))).* FROM entries AS e LIMIT 1"
        ),
    ),
    "a parent": (
        "fold",
        (
            "ALTER TABLE budgets DROP CONSTRAINT ck_budgets_ancestors;"
            "UPDATE budgets SET parent_id = gen_random_uuid() WHERE parent_id IS NOT NULL"
        ),
    ),
    "a custody that there is not": (
        "fold",
        (
            "ALTER TABLE budgets DROP CONSTRAINT ck_budgets_custody;"
            "UPDATE budgets SET custody = 9 WHERE parent_id IS NOT NULL"
        ),
    ),
    "the version of the encoding": ("ledger", "UPDATE ledger SET encoding_version = 2"),
    "a second ledger": (
        "ledger",
        (
            "ALTER TABLE ledger DROP CONSTRAINT ck_ledger_singleton;"
            "INSERT INTO ledger SELECT created_at, false, lanes, encoding_version, incarnation FROM ledger"
        ),
    ),
    "the id of a public key": (
        "checkpoint",
        "UPDATE checkpoint_keys SET key_id = decode('0011223344556677', 'hex')",
    ),
}
"""What is altered, and the rule that this breaks."""


@pytest.mark.parametrize(("rule", "statement"), ELSEWHERE.values(), ids=list(ELSEWHERE))
async def test_what_is_only_looked_for_by_it_is_found_too(
    fleet: Fleet, sealing: Sealing, database: str, rule: str, statement: str
) -> None:
    await sealed(fleet, sealing)
    with psycopg.connect(database, autocommit=True) as connection:
        *before, change = statement.split(";")
        for each in before:
            connection.execute(each.encode())
        assert connection.execute(change.encode()).rowcount > 0
    findings = await found(sealing.store)
    assert rule in {finding.rule for finding in findings}, findings


async def test_without_the_first_lane_there_is_no_moment_to_verify_at(
    fleet: Fleet, sealing: Sealing, database: str
) -> None:
    await sealed(fleet, sealing)
    with psycopg.connect(database, autocommit=True) as connection:
        assert connection.execute("DELETE FROM lanes WHERE lane = 0").rowcount == 1
    with pytest.raises(LedgerCorrupt, match="lane 0 has no position"):
        await found(sealing.store)


async def test_what_waits_to_be_collected_is_on_the_list(
    fleet: Fleet, sealing: Sealing, database: str
) -> None:
    root = await fleet.root()
    [child] = await fleet.children(root, root, 1, 1_000)
    below = await fleet.children(root, child, EAGER_COLLECTIONS_MAX + 1)
    await fleet.revoke(root, child)
    assert await found(sealing.store) == []
    with psycopg.connect(database, autocommit=True) as connection:
        assert connection.execute("DELETE FROM collections").rowcount == 1
    [finding] = await found(sealing.store)
    assert (finding.root_id, finding.rule) == (root, "collection")
    assert finding.budget_id in below
