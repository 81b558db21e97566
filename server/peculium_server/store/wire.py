"""Many statements in one network round trip, with parameters and rows in the binary format.

A batch needs about a dozen statements and they would be cheap, were it not for a round trip and a
cursor each. So a connection sends them as a *flight*: libpq's pipeline, driven directly, one result
for each. A list of a hundred budgets travels as one array for each column, which SQL unnests.

Ids stay 16 raw bytes and times stay integers of microseconds on the way.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg import abc, errors
from psycopg.abc import Buffer, PQGen
from psycopg.adapt import Loader, Transformer
from psycopg.errors import Diagnostic
from psycopg.generators import fetch_many, send
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGresult
from psycopg.rows import TupleRow
from psycopg.types.string import ByteaBinaryLoader
from psycopg.waiting import wait_async

from peculium_server.core.operations import Labels

# -- Values ---------------------------------------------------------------------------------------

_POSTGRES_EPOCH_US = 946_684_800_000_000
"""2000-01-01, from which Postgres counts, in microseconds since the Unix epoch."""

_NULL = b"\xff\xff\xff\xff"
_BOOL_OID, _BYTEA_OID, _INT8_OID, _INT2_OID, _TEXT_OID = 16, 17, 20, 21, 25
_TIMESTAMPTZ_OID, _UUID_OID = 1184, 2950

_pack_int8 = struct.Struct("!q").pack
_pack_int2 = struct.Struct("!h").pack
_pack_length = struct.Struct("!I").pack
_unpack_int8 = struct.Struct("!q").unpack

Encoder = Callable[[Any], bytes]
"""From a parameter's value to its binary form; an array's value is a sequence."""


def encode_int8(value: int) -> bytes:
    """A bigint."""
    return _pack_int8(value)


def encode_int2(value: int) -> bytes:
    """A smallint."""
    return _pack_int2(value)


def encode_uuid(value: bytes) -> bytes:
    """An id as it is."""
    return value


def encode_text(value: str) -> bytes:
    """A text in UTF-8."""
    return value.encode()


def _array(oid: int, size: int, items: bytes) -> bytes:
    if not size:
        return struct.pack("!iii", 0, 0, oid)
    return struct.pack("!iiiii", 1, 1, oid, size, 1) + items


def _fixed(oid: int, length: int, pack: Callable[[Any], bytes]) -> Encoder:
    """Arrays of values of one length. Nulls only where a value is None."""
    prefix = _pack_length(length)

    def encode(values: Sequence[Any]) -> bytes:
        items = b"".join([_NULL if value is None else prefix + pack(value) for value in values])
        return _array(oid, len(values), items)

    return encode


def _sized(oid: int, pack: Callable[[Any], bytes]) -> Encoder:
    """Arrays of values of differing length."""

    def encode(values: Sequence[Any]) -> bytes:
        items: list[bytes] = []
        for value in values:
            if value is None:
                items.append(_NULL)
            else:
                packed = pack(value)
                items += (_pack_length(len(packed)), packed)
        return _array(oid, len(values), b"".join(items))

    return encode


def _pack_time(at: int) -> bytes:
    return _pack_int8(at - _POSTGRES_EPOCH_US)


def _pack_bool(value: bool) -> bytes:
    return b"\x01" if value else b"\x00"


encode_bools = _fixed(_BOOL_OID, 1, _pack_bool)
encode_int2s = _fixed(_INT2_OID, 2, _pack_int2)
encode_int8s = _fixed(_INT8_OID, 8, _pack_int8)
encode_times = _fixed(_TIMESTAMPTZ_OID, 8, _pack_time)
encode_uuids = _fixed(_UUID_OID, 16, encode_uuid)
encode_byteas = _sized(_BYTEA_OID, encode_uuid)
encode_texts = _sized(_TEXT_OID, encode_text)


class _TimeLoader(Loader):
    """A timestamptz as integer microseconds since the Unix epoch."""

    format = Format.BINARY

    def load(self, data: Buffer) -> int:
        value: int = _unpack_int8(data)[0]
        return value + _POSTGRES_EPOCH_US


class _LabelsLoader(Loader):
    """A jsonb object of texts as labels."""

    format = Format.BINARY

    def load(self, data: Buffer) -> Labels:
        document = bytes(data)[1:]  # After the format's version.
        return () if document == b"{}" else tuple(sorted(json.loads(document).items()))


# -- Statements -----------------------------------------------------------------------------------


class Statement(NamedTuple):
    """SQL that is prepared once for each connection that uses it."""

    name: bytes
    sql: bytes
    parameters: tuple[tuple[str, Encoder], ...] = ()
    """In the order of $1, $2, …"""
    row: Callable[[Sequence[Any]], Any] = tuple
    """What becomes of each row of the result."""


class Step(NamedTuple):
    """A statement with the values of its parameters, by name."""

    statement: Statement
    values: Mapping[str, Any] = {}


Result = list[Any]
"""Rows, as the statement wants them."""

Flown = list[Result] | errors.Error
"""What became of a segment: the result of each statement, or the error of the first that failed."""

Waited = TypeVar("Waited")

ANSWER_SECONDS_MAX = 15.0
"""A flight without an answer for so long is lost. The database ends each of its statements before that
(see `statement_timeout`), so it is gone, or whatever is between keeps the connection up without it."""
_WAKE_SECONDS = 10.0

_WAITS_FOR_STANDBY = "SyncRepWaitForLSN"
"""Where PostgreSQL's notices of a cancelled wait come from; it has no code of its own for them."""


class Connection(psycopg.AsyncConnection[TupleRow]):
    """A connection that sends flights. Autocommit: what begins a transaction says so.

    Whoever is cancelled while it waits for an answer leaves a closed connection behind.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known_statements: set[bytes] = set()
        self.unreplicated = False
        """A commit of this session was reported as done, and its synchronous standby may lack it."""
        self.add_notice_handler(self._note)
        self.adapters.register_loader("uuid", ByteaBinaryLoader)
        self.adapters.register_loader("timestamptz", _TimeLoader)
        self.adapters.register_loader("jsonb", _LabelsLoader)

    async def fly(self, *segments: Sequence[Step]) -> list[Flown]:
        """Send segments of statements, and give for each its results, or the error that ended it.

        The statements of a segment stand or fall together, and the next segment is tried in any
        case: outside of a transaction block each segment is a transaction of its own.

        Raises:
            psycopg.OperationalError: The connection broke, or nothing came back for longer than any
                statement may take; what was sent may have been done.
        """
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                return await wait_async(self._fly(segments), self.pgconn.socket, _WAKE_SECONDS)
        except BaseException as error:
            # Cancelled or broken on the way: answers may still come that nobody waits for.
            self.pgconn.finish()
            if isinstance(error, TimeoutError):
                raise psycopg.OperationalError("no answer") from None
            raise

    async def wait(
        self, gen: PQGen[Waited], interval: float = _WAKE_SECONDS, timeout: float | None = None
    ) -> Waited:
        """Wait as psycopg does; but who is cancelled does not wait for the database to notice."""
        try:
            return await wait_async(gen, self.pgconn.socket, interval, timeout)
        except asyncio.CancelledError:
            self.pgconn.finish()
            raise

    async def fetch(self, step: Step) -> Result:
        """The rows of a single statement.

        Raises:
            psycopg.Error: It failed.
        """
        (flown,) = await self.fly([step])
        if isinstance(flown, errors.Error):
            raise flown
        return flown[0]

    def _note(self, notice: Diagnostic) -> None:
        self.unreplicated |= notice.source_function == _WAITS_FOR_STANDBY

    def _fly(self, segments: Sequence[Sequence[Step]]) -> PQGen[list[Flown]]:
        pgconn = self.pgconn
        pgconn.enter_pipeline_mode()
        asked: set[bytes] = set()
        new: list[list[bool]] = []
        for segment in segments:
            new.append([self._send(step, asked) for step in segment])
            pgconn.pipeline_sync()
        yield from send(pgconn)
        flown: list[Flown] = []
        transformer = Transformer(self)
        for segment, prepares in zip(segments, new, strict=True):
            results: list[Result] = []
            failure: errors.Error | None = None
            for step, prepare in zip(segment, prepares, strict=True):
                ends: list[PGresult] = []
                if prepare:
                    ends += yield from fetch_many(pgconn)
                    if ends[0].status == ExecStatus.COMMAND_OK:
                        self._known_statements.add(step.statement.name)
                ends += yield from fetch_many(pgconn)
                failure = failure or _failure(ends)
                if failure is None:
                    results.append(_rows(transformer, ends[-1], step.statement))
            yield from fetch_many(pgconn)
            flown.append(failure or results)
        pgconn.exit_pipeline_mode()
        return flown

    def _send(self, step: Step, asked: set[bytes]) -> bool:
        """Put a statement into the pipeline, and say whether it had to be prepared before."""
        name, sql, parameters, _ = step.statement
        prepare = name not in self._known_statements and name not in asked
        if prepare:
            self.pgconn.send_prepare(name, sql)
            asked.add(name)
        values = step.values
        self.pgconn.send_query_prepared(
            name,
            [encode(values[parameter]) for parameter, encode in parameters],
            [Format.BINARY] * len(parameters),
            Format.BINARY,
        )
        return prepare


def _failure(results: Sequence[PGresult]) -> errors.Error | None:
    for result in results:
        if result.status == ExecStatus.FATAL_ERROR:
            return errors.error_from_result(result, encoding="utf-8")
    return None


def _rows(transformer: abc.Transformer, result: PGresult, statement: Statement) -> Result:
    if result.status != ExecStatus.TUPLES_OK:
        return []
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, statement.row)
