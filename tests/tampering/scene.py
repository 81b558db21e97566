"""The ledger's tables under the hands of a superuser, who puts everything back afterwards.

Checks and unique indexes besides the primary keys are dropped first, as a superuser can: what they forbid has
to be found all the same, by those who verify.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from sqlalchemy import BigInteger, Boolean, Column, LargeBinary, SmallInteger, Text, Uuid
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP

from peculium._ids import new_id
from peculium_server.core.checkpoint import Checkpoint, Leaf, key_id_of
from peculium_server.core.lanes import lane_of
from peculium_server.core.merkle import Growing
from peculium_server.core.offline.tree import TreeAudit
from peculium_server.core.operations import Kind
from peculium_server.core.state import GENESIS, Custody, Entry, HoldState
from peculium_server.signing import SigningKey
from peculium_server.store import rows
from peculium_server.store.schema import LANES, metadata
from peculium_server.store.wire import Connection
from tests.core.tampering import rehashed
from tests.tampering.auditing import Place

Row = dict[str, Any]

TABLES: Final = {table.name: table for table in metadata.sorted_tables}
OF_TREES: Final = ("entries", "budgets", "holds", "roots", "collections", "checkpoint_leaves")
"""Tables whose rows belong to trees."""
OF_ALL: Final = ("ledger", "lanes", "checkpoints", "checkpoint_keys")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
SMALL_ENTRIES: Final = (20, 1_500)
"""How many entries a tree has in which most things are done: each is verified many times."""


class Scene:
    """The tables, what they were, and a superuser's session."""

    def __init__(self, dsn: str, chance: Random) -> None:
        self.dsn = dsn
        self.chance = chance
        self.connection = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)
        self._touched: set[str] = set()
        self._kept: dict[tuple[str, uuid.UUID], list[Row]] = {}

    @classmethod
    @contextlib.contextmanager
    def prepared(cls, dsn: str, chance: Random) -> Iterator[Scene]:
        """Keep a copy of everything, and drop what would forbid to change it."""
        scene = cls(dsn, chance)
        with scene.connection:
            scene.do("CREATE SCHEMA kept")
            for name, table in TABLES.items():
                scene.do(f"CREATE TABLE kept.{name} AS TABLE public.{name}")
                if "root_id" in table.c:
                    scene.do(f"CREATE INDEX ON kept.{name} (root_id)")
            scene.do("ANALYZE")
            for row in scene.rows(_CHECKS):
                scene.do(f"ALTER TABLE {row['of']} DROP CONSTRAINT {row['name']}")
            for row in scene.rows(_UNIQUE):
                scene.do(f"DROP INDEX {row['name']}")
            yield scene

    def do(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> int:
        """Send a statement: how many rows it has changed."""
        return self.connection.execute(statement.encode(), values).rowcount

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Row]:
        """The rows of a query."""
        return self.connection.execute(query.encode(), values).fetchall()

    # -- What was there --------------------------------------------------------------------------------

    def kept(self, table: str, root_id: uuid.UUID) -> list[Row]:
        """The rows that a tree had; entries in the order of their position and part."""
        key = table, root_id
        if key not in self._kept:
            order = ("position", "part") if table == "entries" else _key(table)
            self._kept[key] = self.rows(
                f"SELECT * FROM kept.{table} WHERE root_id = %s ORDER BY {', '.join(order)}",
                [root_id],
            )
        return self._kept[key]

    def is_there(self, tree: bytes) -> bool:
        """Whether there is a root that a server can be asked for."""
        root_id = uuid.UUID(bytes=tree)
        found = self.rows(
            "SELECT 1 FROM budgets WHERE root_id = %s AND budget_id = %s", [root_id, root_id]
        )
        return bool(found)

    def all_kept(self, table: str) -> list[Row]:
        """All rows that a table had."""
        return self.rows(f"SELECT * FROM kept.{table} ORDER BY {', '.join(_key(table))}")

    def trees(self, having: str, *, entries: tuple[int, int] = SMALL_ENTRIES) -> list[uuid.UUID]:
        """The roots with so many entries for which a condition holds."""
        found = self.rows(
            "SELECT t.root_id FROM (SELECT root_id, lane, count(*) AS n FROM kept.entries"
            f" GROUP BY root_id, lane) AS t WHERE n BETWEEN %s AND %s AND {having} ORDER BY 1",
            entries,
        )
        return [row["root_id"] for row in found]

    def victim(self, table: str, having: str = "true", *, deep: bool = False) -> Row:
        """A row of a tree, by lot, for which a condition holds.

        Args:
            table: Whose row.
            having: The condition.
            deep: Of a tree of any size that is as deep as may be.
        """
        most = (1, 10**9) if deep else SMALL_ENTRIES
        among = f"EXISTS (SELECT FROM kept.{table} AS r WHERE r.root_id = t.root_id AND ({having}))"
        if deep:
            among += (
                " AND EXISTS (SELECT FROM kept.budgets AS b WHERE b.root_id = t.root_id"
                " AND cardinality(b.ancestors) = 15)"
            )
        trees = self.trees(among, entries=most)
        if not trees:
            raise LookupError(f"no tree has such a row of {table}: {having}")
        root_id = self.chance.choice(trees)
        found = self.rows(
            f"SELECT * FROM kept.{table} AS r WHERE root_id = %s AND ({having})"
            f" ORDER BY {', '.join(_key(table))}",
            [root_id],
        )
        return self.chance.choice(found)

    @property
    def checkpoints(self) -> list[Row]:
        """All checkpoints as they were."""
        return self.all_kept("checkpoints")

    def id_in(self, lane: int) -> uuid.UUID:
        """An id of a root in a lane, that nothing has."""
        while lane_of(made := new_id(), LANES) != lane:
            pass
        return uuid.UUID(bytes=made)

    # -- Doing it --------------------------------------------------------------------------------------

    def touch(self, *tables: str) -> None:
        """Note that tables which are of all trees have to be put back."""
        self._touched.update(tables)

    def change(self, table: str, row: Row, **values: Any) -> None:
        """Give a row other values."""
        if table in OF_ALL:
            self.touch(table)
        names = [f"{name} = %({name})s" for name in values]
        keys = [f"{name} = %(key_{name})s" for name in _key(table)]
        changed = self.do(
            f"UPDATE {table} SET {', '.join(names)} WHERE {' AND '.join(keys)}",
            {name: _adapted(value) for name, value in values.items()}
            | {f"key_{name}": row[name] for name in _key(table)},
        )
        assert changed == 1, (table, values)

    def delete(self, table: str, row: Row) -> None:
        """Take a row out."""
        if table in OF_ALL:
            self.touch(table)
        keys = " AND ".join(f"{name} = %({name})s" for name in _key(table))
        deleted = self.do(f"DELETE FROM {table} WHERE {keys}", row)
        assert deleted == 1, table

    def insert(self, table: str, row: Row) -> None:
        """Put a row in."""
        if table in OF_ALL:
            self.touch(table)
        names = ", ".join(row)
        places = ", ".join(f"%({name})s" for name in row)
        values = {name: _adapted(value) for name, value in row.items()}
        self.do(f"INSERT INTO {table} ({names}) VALUES ({places})", values)

    def restore(self, trees: Iterable[bytes]) -> None:
        """Put back everything that was touched."""
        ids = [uuid.UUID(bytes=tree) for tree in trees if tree]
        tables = [name for name in OF_TREES if ids and name not in self._touched]
        with self.connection.transaction():
            for name in tables:
                self.do(f"DELETE FROM {name} WHERE root_id = ANY(%s)", [ids])
                self.do(
                    f"INSERT INTO {name} SELECT * FROM kept.{name} WHERE root_id = ANY(%s)", [ids]
                )
            for name in self._touched:
                self.do(f"DELETE FROM {name}")
                self.do(f"INSERT INTO {name} SELECT * FROM kept.{name}")
            # What servers have noticed of it is forgotten, too.
            self.do(
                "DELETE FROM incarnations AS i WHERE NOT EXISTS"
                " (SELECT FROM kept.incarnations AS k WHERE k.number = i.number)"
            )
        self._touched.clear()

    def restore_all(self) -> None:
        """Put back everything, whatever was touched."""
        # Of this one the rows tell which transaction has written them.
        self.touch(*(name for name in TABLES if name != "incarnations"))
        self.restore([])

    def differing(self) -> list[str]:
        """The tables that are not what they were."""
        return [
            name
            for name in TABLES
            if self.rows(
                f"(TABLE {name} EXCEPT ALL TABLE kept.{name}) UNION ALL"
                f" (TABLE kept.{name} EXCEPT ALL TABLE {name}) LIMIT 1"
            )
        ]

    # -- Knowing the format ------------------------------------------------------------------------------

    def entries(self, root_id: uuid.UUID) -> list[Entry]:
        """The entries of a tree as they are now."""
        return asyncio.run(_entries(self.dsn, root_id))

    def rehash(self, root_id: uuid.UUID, forged: Sequence[Entry]) -> None:
        """Write a tree's entries with all hashes made anew, and its budgets' heads."""
        anew = rehashed(forged)
        with self.connection.cursor() as cursor:
            cursor.executemany(
                "UPDATE entries SET trace_id = %s, hash = %s,"
                " digest = CASE WHEN parts > 1 THEN %s::bytea END"
                " WHERE lane = %s AND root_id = %s AND operation_id = %s AND part = %s",
                [
                    (
                        each.trace_id,
                        each.hash,
                        each.digest,
                        lane_of(root_id.bytes, LANES),
                        root_id,
                        uuid.UUID(bytes=each.operation_id),
                        each.part,
                    )
                    for each in anew
                ],
            )
        self.do(
            "UPDATE budgets SET head = e.hash FROM entries AS e WHERE e.budget_id = budgets.budget_id"
            " AND e.root_id = budgets.root_id AND e.lane = budgets.lane AND e.seq = budgets.seq"
            " AND budgets.root_id = %s",
            [root_id],
        )

    def truncate(self, root_id: uuid.UUID, position: int) -> None:
        """Take back everything that was done in a tree after a position, so that its rows are as they were."""
        lane = lane_of(root_id.bytes, LANES)
        self.do("DELETE FROM entries WHERE root_id = %s AND position > %s", [root_id, position])
        for table in ("budgets", "holds", "roots"):
            self.do(f"DELETE FROM {table} WHERE root_id = %s", [root_id])
        audit = TreeAudit(root_id.bytes, lane)
        parts: list[Entry] = []
        for entry in self.entries(root_id):
            parts.append(entry)
            if len(parts) == entry.parts:
                audit.operation(parts)
                parts = []
        assert audit.finding is None, audit.finding
        for folded in audit.budgets.values():
            budget = folded.row(root_id.bytes)
            row = dict(zip(rows.BUDGET_COLUMNS, rows.from_budget(budget), strict=False))
            row |= {"parent_id": budget.parent_id, "lane": lane}
            row |= {"ancestors": list(budget.ancestors), "labels": dict(budget.labels)}
            self.insert("budgets", _from_core("budgets", row))
            if budget.parent_id is None:
                self.do(
                    "INSERT INTO roots (lane, root_id, name) VALUES (%s, %s, %s)"
                    " ON CONFLICT DO NOTHING",
                    [lane, root_id, budget.name],
                )
            if budget.closed:
                # What had to be collected then may have been collected since.
                self.do(
                    "INSERT INTO collections (lane, root_id, budget_id, closed_at)"
                    " VALUES (%s, %s, %s, now()) ON CONFLICT DO NOTHING",
                    [lane, root_id, uuid.UUID(bytes=budget.budget_id)],
                )
        for hold in audit.holds.values():
            row = dict(zip(rows.HOLD_COLUMNS, rows.from_hold(root_id.bytes, hold), strict=True))
            self.insert("holds", _from_core("holds", row | {"lane": lane}))

    def seal_anew(self, key: SigningKey | None) -> None:
        """Make all checkpoints anew over the heads that there are now.

        Args:
            key: Signs them, and is named in the ledger; None: the signatures stay what they were.
        """
        self.touch("checkpoints", "checkpoint_leaves", "checkpoint_keys")
        self.do(
            "UPDATE checkpoint_leaves AS l SET head = e.hash FROM entries AS e WHERE e.lane = l.lane"
            " AND e.root_id = l.root_id AND e.budget_id = l.budget_id AND e.seq = l.seq"
            " AND e.hash <> l.head"
        )
        growing: dict[int, Growing] = {}
        for row in self.rows("SELECT * FROM checkpoint_leaves ORDER BY number, root_id, budget_id"):
            leaf = Leaf(row["root_id"].bytes, row["budget_id"].bytes, row["seq"], row["head"])
            growing.setdefault(row["number"], Growing()).add(leaf.hash())
        [ledger] = self.rows("SELECT incarnation FROM ledger")
        previous = GENESIS
        if key is not None:
            self.do("DELETE FROM checkpoint_keys")
            named: Row = {"key_id": key.key_id, "public_key": key.public_key}
            self.insert("checkpoint_keys", named | {"added_at": datetime.now(UTC)})
        for row in self.rows("SELECT * FROM checkpoints ORDER BY number"):
            checkpoint = Checkpoint(
                number=row["number"],
                sealed_at=_microseconds(row["sealed_at"]),
                incarnation=ledger["incarnation"].bytes,
                positions=tuple(row["positions"]),
                merkle_root=growing[row["number"]].root(),
                leaves=row["leaves"],
                previous_hash=previous,
            )
            previous = checkpoint.hash()
            signed = {}
            if key is not None:
                signed = {"key_id": key.key_id, "signature": key.sign(previous)}
            self.change(
                "checkpoints",
                row,
                merkle_root=checkpoint.merkle_root,
                previous_hash=checkpoint.previous_hash,
                hash=previous,
                **signed,
            )

    # -- What findings may name --------------------------------------------------------------------------

    def operation(self, entry: Row) -> set[Place]:
        """All entries of the operation that an entry belongs to."""
        return {
            place(each)
            for each in self.kept("entries", entry["root_id"])
            if each["operation_id"] == entry["operation_id"]
        }

    def following(self, entry: Row) -> set[Place]:
        """The next operation of its tree, and the next entry of its budget; its row, if there is none."""
        entries = self.kept("entries", entry["root_id"])
        later = [each for each in entries if each["position"] > entry["position"]]
        found = {place(each) for each in later if each["operation_id"] == later[0]["operation_id"]}
        of_budget = [each for each in entries if each["budget_id"] == entry["budget_id"]]
        found |= {place(each) for each in of_budget if each["seq"] == entry["seq"] + 1}
        found.add((entry["root_id"].bytes, entry["budget_id"].bytes, 0))
        return found

    def later(self, entry: Row) -> set[Place]:
        """Everything in its tree from the operation of an entry on, and all rows."""
        entries = self.kept("entries", entry["root_id"])
        found = {place(each) for each in entries if each["position"] >= entry["position"]}
        return found | {(root, budget, 0) for root, budget, _ in found}

    def sealing(self, entry: Row) -> set[Place]:
        """The heads of its tree that the checkpoint over an entry has sealed."""
        lane, position = entry["lane"], entry["position"]
        number = min(
            each["number"] for each in self.checkpoints if each["positions"][lane] >= position
        )
        leaves = self.kept("checkpoint_leaves", entry["root_id"])
        return {place(leaf) for leaf in leaves if leaf["number"] == number}

    def up_to(self, leaf: Row) -> set[Place]:
        """The entries of a budget that a leaf stands for, and those before."""
        tree, budget_id, seq = place(leaf)
        return {(tree, budget_id, each) for each in range(1, seq + 1)}

    @property
    def sealed_positions(self) -> list[int]:
        """Up to where each lane is sealed."""
        positions: list[int] = self.checkpoints[-1]["positions"]
        return positions

    @property
    def is_sealed(self) -> str:
        """The condition that an entry r is sealed."""
        positions = ", ".join(map(str, self.sealed_positions))
        return f"r.position <= (ARRAY[{positions}])[r.lane + 1]"


def place(row: Row) -> Place:
    """An entry, or the row of a budget."""
    return row["root_id"].bytes, row["budget_id"].bytes, row.get("seq", 0)


def other(column: Column[Any], value: Any, row: Row, chance: Random) -> Any:
    """Another value of a column, as near to the one that it has as can be.

    Args:
        column: Of which table.
        value: What it is.
        row: The rest of the row.
        chance: For ids.
    """
    if column.name in _OTHERS:
        return _OTHERS[column.name](value, row)
    if value is None:
        return _ABSENT[type(column.type)]
    if isinstance(value, uuid.UUID):
        return uuid.UUID(bytes=chance.randbytes(16), version=4)
    if isinstance(value, datetime):
        return value + timedelta(microseconds=1)
    return _altered(value)


def _altered(value: Any) -> Any:
    match value:
        case bool():
            altered: Any = not value
        case int():
            altered = value + 1
        case str():
            altered = value + "x"
        case bytes():
            altered = value[:-1] + bytes((value[-1] ^ 1,))
        case dict():
            altered = value | {"forged": "yes"}
        case [uuid.UUID(), *_]:
            altered = [*value, value[0]]
        case [int(), *rest]:
            altered = [value[0] + 1, *rest]
        case _:
            raise AssertionError(f"no other value is known for {value!r}")
    return altered


def _next_of(members: Iterable[int]) -> Callable[[Any, Row], Any]:
    every = [int(each) for each in members]
    return lambda value, _: every[(every.index(value) + 1) % len(every)]


_OTHERS: Final[Mapping[str, Callable[[Any, Row], Any]]] = {
    "part": lambda _, row: row["parts"],
    "lane": _next_of(range(LANES)),
    "custody": _next_of(Custody),
    "kind": _next_of(Kind),
    "state": _next_of(HoldState),
    # Of a leaf the next one's; a checkpoint's, and the seq of a leaf, are such as no other has.
    "number": lambda value, row: value + (1 if "head" in row else 1_000),
    "seq": lambda value, row: value + (1_000_000 if "number" in row else 1),
}
_ABSENT: Final[dict[type, Any]] = {
    BigInteger: 1,
    Boolean: True,
    LargeBinary: bytes(32),
    SmallInteger: 1,
    Text: "mallory",
    TIMESTAMP: datetime(2031, 1, 1, tzinfo=UTC),
    Uuid: uuid.UUID(int=7),
}
"""What to write where nothing was. A balance that is absent is zero."""


def _key(table: str) -> list[str]:
    return [column.name for column in TABLES[table].primary_key]


def _adapted(value: Any) -> Any:
    return Jsonb(value) if isinstance(value, dict) else value


def _microseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


def _from_core(table: str, row: Row) -> Row:
    """A row of the core's values as psycopg takes it."""

    def value_of(name: str, value: Any) -> Any:
        kind = TABLES[table].c[name].type
        if value is None:
            return None
        if isinstance(kind, Uuid):
            return value if isinstance(value, uuid.UUID) else uuid.UUID(bytes=value)
        if isinstance(kind, ARRAY):
            return [uuid.UUID(bytes=each) for each in value]
        if isinstance(kind, TIMESTAMP):
            return _EPOCH + timedelta(microseconds=value)
        return value if isinstance(kind, JSONB | LargeBinary | Boolean | Text) else int(value)

    return {name: value_of(name, value) for name, value in row.items()}


async def _entries(dsn: str, root_id: uuid.UUID) -> list[Entry]:
    connection = await Connection.connect(dsn, autocommit=True)
    try:
        cursor = connection.cursor(binary=True)
        await cursor.execute(
            f"SELECT {', '.join(rows.ENTRY_COLUMNS)} FROM entries"
            " WHERE root_id = %s ORDER BY position, part".encode(),
            [root_id],
        )
        return [rows.to_entry(row) for row in await cursor.fetchall()]
    finally:
        await connection.close()


_CHECKS: Final = """
    SELECT conrelid::regclass AS of, quote_ident(conname) AS name FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND conparentid = 0 AND coninhcount = 0
      AND (contype = 'c' OR contype = 'u')
"""
_UNIQUE: Final = """
    SELECT indexrelid::regclass AS name FROM pg_index JOIN pg_class ON oid = indexrelid
    WHERE relnamespace = 'public'::regnamespace AND indisunique AND NOT indisprimary
      AND NOT relispartition
"""


def key_ids(keys: Iterable[SigningKey]) -> dict[bytes, bytes]:
    """Public keys by their ids."""
    return {key_id_of(key.public_key): key.public_key for key in keys}
