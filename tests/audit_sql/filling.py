"""Puts a ledger that a test keeps in memory into a database, row for row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql
from sqlalchemy import Table
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.types import Uuid

from peculium_server.core.checkpoint import Checkpoint, Sealed
from peculium_server.core.lanes import lane_of
from peculium_server.core.state import GENESIS
from peculium_server.store import rows, schema
from tests.core.checkpoints import KEY, public, signed
from tests.core.ledger import Ledger

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def instant(microseconds: int) -> datetime:
    """The time that an int of the ledger means."""
    return EPOCH + timedelta(microseconds=microseconds)


def fill(dsn: str, ledger: Ledger) -> None:
    """Save everything of the ledger."""
    holds = [(tree.root_id, hold) for tree in ledger.trees.values() for hold in tree.known_holds()]
    with psycopg.connect(dsn) as connection:
        _insert(
            connection,
            schema.roots,
            ("root_id", "name"),
            ((tree.root_id, tree.budget(tree.root_id).name) for tree in ledger.trees.values()),
        )
        record(connection, ledger)
        _insert(
            connection,
            schema.holds,
            rows.HOLD_COLUMNS,
            (rows.from_hold(root_id, hold) for root_id, hold in holds),
        )
        connection.execute(
            "UPDATE lanes SET position = coalesce("
            "(SELECT max(position) FROM entries WHERE entries.lane = lanes.lane), 0)"
        )


def record(connection: psycopg.Connection, ledger: Ledger) -> None:
    """Save what auditors' sums are made of, its budgets and entries, beside those of other ledgers."""
    _insert(
        connection,
        schema.budgets,
        (*rows.BUDGET_COLUMNS, "parent_id"),
        (
            rows.from_budget(budget)
            for tree in ledger.trees.values()
            for budget in tree.known_budgets()
        ),
    )
    _insert(
        connection,
        schema.entries,
        rows.ENTRY_COLUMNS,
        (rows.from_entry(entry) for entry in ledger.journal),
    )


def record_checkpoints(dsn: str, *checkpoints: Sealed) -> None:
    """Save checkpoints as they are given, without leaves; the ledger's incarnation becomes theirs."""
    with psycopg.connect(dsn) as connection:
        incarnation = UUID(bytes=checkpoints[0].checkpoint.incarnation)
        connection.execute("UPDATE ledger SET incarnation = %s", [incarnation])
        for sealed in checkpoints:
            said = sealed.checkpoint
            connection.execute(
                "INSERT INTO checkpoints (number, leaves, sealed_at, merkle_root, previous_hash,"
                " hash, key_id, signature, positions) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
                [said.number, said.leaves, instant(said.sealed_at), said.merkle_root,
                 said.previous_hash, *sealed[1:], list(said.positions)],
            )  # fmt: skip
        connection.execute(
            "INSERT INTO checkpoint_keys (key_id, public_key) VALUES (%s, %s)",
            [checkpoints[0].key_id, public(KEY)],
        )


def chain(numbers: Sequence[int]) -> list[Sealed]:
    """Checkpoints that follow one another, in each of which the numbers are others."""
    made: list[Sealed] = []
    for index, number in enumerate(numbers):
        checkpoint = Checkpoint(
            number=index + 1,
            sealed_at=1_795_000_000_000_000 + number % 10**12,
            incarnation=bytes(range(16)),
            positions=tuple(number if lane == index else 0 for lane in range(schema.LANES)),
            merkle_root=bytes([index]) * 32,
            leaves=max(1, number),
            previous_hash=made[-1].hash if made else GENESIS,
        )
        made.append(signed(checkpoint))
    return made


def _insert(
    connection: psycopg.Connection,
    table: Table,
    names: Sequence[str],
    values: Iterable[Sequence[Any]],
) -> None:
    """Insert rows that begin with the root's id, which tells the lane."""
    statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        sql.Identifier(table.name),
        sql.SQL(", ").join(map(sql.Identifier, ("lane", *names))),
        sql.SQL(", ").join(
            [sql.Placeholder()]
            + [
                sql.SQL("%s::uuid[]")
                if isinstance(table.c[name].type, ARRAY)
                else sql.SQL("%s::jsonb")
                if isinstance(table.c[name].type, JSONB)
                else sql.Placeholder()
                for name in names
            ]
        ),
    )
    connection.cursor().executemany(
        statement,
        [
            (
                lane_of(row[0], schema.LANES),
                *(_value(table, name, value) for name, value in zip(names, row, strict=True)),
            )
            for row in values
        ],
    )


def _value(table: Table, name: str, value: Any) -> Any:
    kind = table.c[name].type
    if value is None:
        return None
    if isinstance(kind, TIMESTAMP):
        return instant(value)
    return UUID(bytes=value) if isinstance(kind, Uuid) else value
