"""An auditor who has SQL and nothing else reads checkpoints, checks their hashes and takes them elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row

from peculium_server.core.checkpoint import signed_message
from peculium_server.signing import is_signed
from peculium_server.store import roles
from tests.audit_sql.filling import chain, instant, record_checkpoints
from tests.audit_sql.test_documented import PAGE
from tests.postgres import as_role
from tests.sealer.sealing import Sealing, new_key
from tests.sweeper.fleet import Fleet

[CHAINED] = re.findall(
    r"-- Are the checkpoints a chain.*?\n(.*?;)\n", PAGE.read_text(), flags=re.DOTALL
)
EDGES = (0, 23, 24, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**62)


def asked(dsn: str, query: str) -> list[dict[str, Any]]:
    """What an auditor is answered."""
    with psycopg.connect(as_role(dsn, roles.AUDITOR), row_factory=dict_row) as auditor:
        return auditor.execute(query.encode()).fetchall()


async def test_checkpoints_are_what_was_sealed(database: str, tmp_path: Path) -> None:
    key = new_key(tmp_path)
    async with Fleet.opened(database) as fleet, Sealing.opened(database, key) as sealing:
        for _ in range(3):
            root_id = await fleet.root()
            await fleet.holds(root_id, 4)
            await sealing.seal_all()
        sealed = await sealing.checkpoints()
    told = asked(database, "SELECT * FROM audit.checkpoints ORDER BY number")
    assert len(told) == 3
    for row, each in zip(told, sealed, strict=True):
        said = each.checkpoint
        assert row == {
            "number": said.number,
            "sealed_at": instant(said.sealed_at),
            "incarnation": UUID(bytes=said.incarnation),
            "positions": list(said.positions),
            "operations": 5 * said.number,
            "merkle_root": said.merkle_root,
            "leaves": said.leaves,
            "previous_hash": said.previous_hash,
            "hash": each.hash,
            "key_id": each.key_id,
            "signature": each.signature,
            "public_key": key.public_key,
            "hashed": b"peculium.checkpoint.v1\0" + said.encoded(),
            "signed": signed_message(each.hash),
        }
        assert is_signed(key.public_key, row["signature"], row["signed"])


def test_what_a_hash_is_made_of_is_told_for_numbers_of_any_length(database: str) -> None:
    checkpoints = chain(EDGES)
    record_checkpoints(database, *checkpoints)
    query = "SELECT hashed, sha256(hashed) AS hash FROM audit.checkpoints ORDER BY number"
    for row, sealed in zip(asked(database, query), checkpoints, strict=True):
        assert row["hashed"] == b"peculium.checkpoint.v1\0" + sealed.checkpoint.encoded()
        assert row["hash"] == sealed.hash


@pytest.mark.parametrize(
    ("alteration", "broken"),
    [
        ("UPDATE checkpoints SET leaves = leaves + 1 WHERE number = 2", {2: "says_so"}),
        ("UPDATE checkpoints SET merkle_root = hash WHERE number = 2", {2: "says_so"}),
        ("UPDATE checkpoints SET hash = merkle_root WHERE number = 2", {2: "says_so", 3: "follows"}),
        ("DELETE FROM checkpoints WHERE number = 2", {3: "follows"}),
        ("DELETE FROM checkpoints WHERE number = 1", {2: "follows"}),
        ("UPDATE checkpoint_keys SET public_key = sha256('')", dict.fromkeys((1, 2, 3), "key_is_so")),
        ("DELETE FROM checkpoint_keys", dict.fromkeys((1, 2, 3), "key_is_so")),
        ("DELETE FROM checkpoints WHERE number = 3", {}),
    ],
)  # fmt: skip
def test_the_pages_query_finds_what_does_not_hold_of_a_chain(
    database: str, alteration: str, broken: dict[int, str]
) -> None:
    """But for the last ones, cut off: those are missed by who knows that there were more."""
    record_checkpoints(database, *chain((1, 500, 70_000)))
    assert all(all(row.values()) for row in asked(database, CHAINED))
    with psycopg.connect(database) as connection:
        connection.execute(alteration.encode())
    found = {
        row["number"]: name
        for row in asked(database, CHAINED)
        for name in ("says_so", "key_is_so", "follows")
        if not row[name]
    }
    assert found == broken
