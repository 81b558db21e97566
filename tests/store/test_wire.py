"""Values and rows in the binary format, out and back."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import psycopg
import pytest
from hypothesis import given, strategies as st

from peculium_server.store import wire
from peculium_server.store.wire import Connection, Statement, Step

ENCODERS = {
    "uuid": (wire.encode_uuids, st.binary(min_size=16, max_size=16)),
    "bigint": (wire.encode_int8s, st.integers(-(2**63), 2**63 - 1)),
    "smallint": (wire.encode_int2s, st.integers(-(2**15), 2**15 - 1)),
    "bytea": (wire.encode_byteas, st.binary(max_size=300)),
    "text": (
        wire.encode_texts,
        st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=200),
    ),
    "boolean": (wire.encode_bools, st.booleans()),
    # From the year 1 to 9999, in microseconds since 1970.
    "timestamptz": (
        wire.encode_times,
        st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999),
    ),
}


@pytest.fixture
async def connection(database: str) -> AsyncIterator[Connection]:
    async with await Connection.connect(database, autocommit=True) as opened:
        yield opened


def step(sql: str, name: str | None = None) -> Step:
    return Step(Statement((name or secrets.token_hex(8)).encode(), sql.encode()))


@pytest.mark.parametrize("kind", ENCODERS)
async def test_every_value_comes_back_as_it_was_sent(connection: Connection, kind: str) -> None:
    encode, values = ENCODERS[kind]
    array = f"unnest($1::{kind}[]) WITH ORDINALITY AS k(x, n)"
    statement = Statement(
        b"echo",
        b"SELECT x FROM %b ORDER BY n" % array.encode(),
        (("values", encode),),
        lambda row: row[0],
    )
    samples: list[list[object]] = [[], [None]]

    @given(st.lists(st.one_of(st.none(), values), min_size=1, max_size=20))
    def collect(sample: list[object]) -> None:
        samples.append(sample)

    collect()
    for sample in samples:
        assert await connection.fetch(Step(statement, {"values": sample})) == sample


async def test_labels_and_arrays_of_ids_come_back_as_the_core_has_them(
    connection: Connection,
) -> None:
    found = await connection.fetch(
        step("""SELECT '{"b": "ü", "a": ""}'::jsonb, '{}'::jsonb, ARRAY[gen_random_uuid()]""")
    )
    [(labels, none, [identifier])] = found
    assert labels == (("a", ""), ("b", "ü"))
    assert none == ()
    assert len(identifier) == 16


async def test_a_failure_ends_its_segment_and_no_other(connection: Connection) -> None:
    await connection.execute("CREATE TABLE kept (n int)")
    first, second, third = await connection.fly(
        [step("INSERT INTO kept VALUES (1)"), step("SELECT 1 / 0"), step("SELECT 2")],
        [step("INSERT INTO kept VALUES (3) RETURNING n")],
        [step("SELECT n FROM kept")],
    )
    assert isinstance(first, psycopg.errors.DivisionByZero)
    assert second == [[(3,)]]
    assert third == [[(3,)]]


async def test_a_statement_that_could_not_be_prepared_is_prepared_the_next_time(
    connection: Connection,
) -> None:
    again = step("SELECT 5", "again")
    [failed] = await connection.fly([step("SELECT 1 / 0"), again])
    assert isinstance(failed, psycopg.errors.DivisionByZero)
    for _ in range(2):
        assert await connection.fetch(again) == [(5,)]
    with pytest.raises(psycopg.errors.UndefinedTable):
        await connection.fetch(step("SELECT * FROM nowhere", "bad"))


async def test_the_same_statement_flies_twice_at_once(connection: Connection) -> None:
    twice = step("SELECT 7", "twice")
    assert await connection.fly([twice, twice], [twice]) == [[[(7,)], [(7,)]], [[(7,)]]]


async def test_large_flights_arrive_whole(connection: Connection) -> None:
    """Larger than what fits into the sockets' buffers, in both directions."""
    statement = Statement(
        b"echo", b"SELECT x FROM unnest($1::bytea[]) AS k(x)", (("values", wire.encode_byteas),)
    )
    values = [secrets.token_bytes(100_000) for _ in range(100)]
    [results] = await connection.fly([Step(statement, {"values": values})] * 3)
    assert results == [[(value,) for value in values]] * 3


async def test_a_connection_that_breaks_in_flight_is_closed(connection: Connection) -> None:
    with pytest.raises(psycopg.OperationalError):
        await connection.fly([step("SELECT pg_terminate_backend(pg_backend_pid(), 1000)")])
    assert connection.closed
