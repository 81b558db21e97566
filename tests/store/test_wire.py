"""Values and rows in the binary format, out and back."""

from __future__ import annotations

import asyncio
import secrets
import select
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


# -- Several flights in the air -----------------------------------------------------------------------


async def test_flights_that_follow_each_other_land_in_their_order(connection: Connection) -> None:
    landings = [connection.launch([step(f"SELECT {number}")]) for number in range(5)]
    landed: list[int] = []

    async def land(number: int) -> None:
        assert await landings[number] == [[[(number,)]]]
        landed.append(number)

    await asyncio.gather(*(land(number) for number in range(5)))
    assert landed == [0, 1, 2, 3, 4]
    assert await connection.fetch(step("SELECT 5")) == [(5,)]


async def test_an_answer_that_arrives_while_the_next_flight_is_sent_is_noticed(
    connection: Connection,
) -> None:
    # More than the system takes at once: libpq, which cannot send the rest, reads what is there instead.
    large = Statement(b"large", b"SELECT length($1)", (("text", wire.encode_text),))
    # Also what is prepared, so that nothing but the answer is missing.
    await connection.fly([step("SELECT 1 FROM pg_sleep(0.01)", "first")])
    first = asyncio.create_task(connection.launch([step("SELECT 1 FROM pg_sleep(0.01)", "first")]))
    await asyncio.sleep(0)
    # The event loop does not get to see it.
    select.select([connection.pgconn.socket], [], [])
    second = connection.launch([Step(large, {"text": "x" * 5_000_000})])
    assert [await first, await second] == [[[[(1,)]]], [[[(5_000_000,)]]]]


async def test_a_statement_that_a_flight_in_the_air_prepares_is_not_prepared_again(
    connection: Connection,
) -> None:
    twice = step("SELECT 7", "twice")
    landings = [connection.launch([twice]) for _ in range(2)]
    assert await asyncio.gather(*landings) == [[[[(7,)]]]] * 2
    assert await connection.fetch(step("SELECT count(*) FROM pg_prepared_statements")) == [(2,)]


async def test_a_failure_fails_what_follows_it_in_a_transaction_that_nobody_has_left(
    connection: Connection,
) -> None:
    """So that what was decided on the assumption that it would land is not done without it."""
    await connection.execute("CREATE TABLE kept (n int)")
    begin, commit = step("BEGIN", "begin"), step("COMMIT", "commit")
    first = connection.launch([begin, step("SELECT 1 / 0"), commit])
    second = connection.launch([begin, step("INSERT INTO kept VALUES (1)"), commit])
    [failed], [swept] = await asyncio.gather(first, second)
    assert isinstance(failed, psycopg.errors.DivisionByZero)
    assert isinstance(swept, psycopg.errors.InFailedSqlTransaction)
    await connection.fly([step("ROLLBACK")])
    assert await connection.fetch(step("SELECT count(*) FROM kept")) == [(0,)]


async def test_whoever_gives_up_a_flight_loses_all_that_are_in_the_air(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "ANSWER_SECONDS_MAX", 3_600)
    slow = asyncio.create_task(connection.fly([step("SELECT pg_sleep(60)")]))
    behind = asyncio.create_task(connection.fly([step("SELECT 1")]))
    await asyncio.sleep(0)
    behind.cancel()
    lost, given_up = await asyncio.gather(slow, behind, return_exceptions=True)
    assert isinstance(lost, psycopg.OperationalError)
    assert isinstance(given_up, asyncio.CancelledError)
    assert connection.closed


async def test_whoever_waits_until_everything_has_landed_waits_for_all(
    connection: Connection,
) -> None:
    flying = [asyncio.create_task(connection.fly([step("SELECT 1")])) for _ in range(3)]
    await asyncio.sleep(0)
    await connection.landed()
    assert all(flight.done() for flight in flying[:2])
    await asyncio.gather(*flying)
