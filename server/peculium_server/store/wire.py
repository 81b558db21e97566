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
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import psycopg
from psycopg import abc, errors
from psycopg.abc import Buffer, PQGen
from psycopg.adapt import Loader, Transformer
from psycopg.errors import Diagnostic
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGconn, PGresult
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
_pack_array = struct.Struct("!iiiii").pack
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


def encode_bytea(value: bytes) -> bytes:
    """Bytes as they are."""
    return value


def encode_bool(value: bool) -> bytes:
    """A boolean."""
    return b"\x01" if value else b"\x00"


def encode_text(value: str) -> bytes:
    """A text in UTF-8."""
    return value.encode()


def encode_time(value: int) -> bytes:
    """A timestamptz, of microseconds since the Unix epoch."""
    return _pack_int8(value - _POSTGRES_EPOCH_US)


def _array(oid: int, size: int, items: bytes) -> bytes:
    if not size:
        return struct.pack("!iii", 0, 0, oid)
    return _pack_array(1, 1, oid, size, 1) + items


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


encode_bools = _fixed(_BOOL_OID, 1, encode_bool)
encode_int2s = _fixed(_INT2_OID, 2, _pack_int2)
encode_int8s = _fixed(_INT8_OID, 8, _pack_int8)
encode_times = _fixed(_TIMESTAMPTZ_OID, 8, encode_time)
encode_uuids = _fixed(_UUID_OID, 16, encode_uuid)
encode_byteas = _sized(_BYTEA_OID, encode_bytea)
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

_COMMAND_OK = ExecStatus.COMMAND_OK
_SUCCESSES = (ExecStatus.TUPLES_OK, _COMMAND_OK)

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
        self._asked_statements: set[bytes] = set()
        """To be prepared by flights that have not landed yet."""
        self._in_the_air = 0
        self._landing = asyncio.Lock()
        self._answers: _Answers | None = None
        self._transformer: abc.Transformer | None = None
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
        return await self.launch(*segments)

    def launch(self, *segments: Sequence[Step]) -> Coroutine[Any, Any, list[Flown]]:
        """Send segments as `fly` does, at once; what is returned waits for what becomes of them.

        Flights may follow each other without waiting. The database takes them in this order, and they
        land in it. What is returned has to be awaited.

        Raises:
            psycopg.OperationalError: As of `fly`, here or when it is awaited. All flights that are in
                the air are lost with the connection.
        """
        try:
            self.pgconn.enter_pipeline_mode()
            prepares: list[list[bool]] = []
            for segment in segments:
                prepares.append([self._send(step) for step in segment])
                self.pgconn.pipeline_sync()
            # What the system does not take at once is sent when the flight is about to land.
            self.pgconn.flush()
            if self._answers is not None:
                # While libpq could not send, it has read: what a flight before waits for may be here.
                self._answers.wake()
        except BaseException:
            self._break_off()
            raise
        self._in_the_air += 1
        return self._landed(segments, prepares)

    async def landed(self) -> None:
        """Wait until everything that is in the air has landed."""
        async with self._landing:
            pass

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

    async def _landed(
        self, segments: Sequence[Sequence[Step]], prepares: Sequence[Sequence[bool]]
    ) -> list[Flown]:
        try:
            async with self._landing:
                with _Answers(self.pgconn) as self._answers:
                    await self._answers.to_be_asked_for()
                    flown = [
                        await self._land(self._answers, segment, new)
                        for segment, new in zip(segments, prepares, strict=True)
                    ]
                self._in_the_air -= 1
                if not self._in_the_air:
                    self.pgconn.exit_pipeline_mode()
        except BaseException:
            # Cancelled or broken on the way: answers may still come that nobody waits for.
            self._break_off()
            raise
        return flown

    def _break_off(self) -> None:
        """Close the connection; whoever waits for an answer hears of it."""
        if self._answers is not None:
            self._answers.leave()
        self.pgconn.finish()

    async def _land(
        self, answers: _Answers, segment: Sequence[Step], prepares: Sequence[bool]
    ) -> Flown:
        """Take the results of a segment, all of them, and what ends it."""
        results: list[Result] = []
        failure: errors.Error | None = None
        for step, prepare in zip(segment, prepares, strict=True):
            if prepare:
                self._asked_statements.discard(step.statement.name)
                prepared = await answers.next()
                if prepared.status == _COMMAND_OK:
                    self._known_statements.add(step.statement.name)
                elif failure is None:
                    failure = _error(prepared)
            result = answers.next_at_once() or await answers.next()
            if failure is None:
                if result.status in _SUCCESSES:
                    results.append(self._rows(result, step.statement))
                else:
                    failure = _error(result)
        await answers.sync()
        return failure or results

    def _rows(self, result: PGresult, statement: Statement) -> Result:
        if not result.ntuples:
            return []
        if self._transformer is None:
            self._transformer = Transformer(self)
        self._transformer.set_pgresult(result)
        return self._transformer.load_rows(0, result.ntuples, statement.row)

    def _send(self, step: Step) -> bool:
        """Put a statement into the pipeline, and say whether it had to be prepared before."""
        name, sql, parameters, _ = step.statement
        prepare = name not in self._known_statements and name not in self._asked_statements
        if prepare:
            self.pgconn.send_prepare(name, sql)
            self._asked_statements.add(name)
        values = step.values
        self.pgconn.send_query_prepared(
            name,
            [
                None if (value := values[parameter]) is None else encode(value)
                for parameter, encode in parameters
            ],
            [Format.BINARY] * len(parameters),
            Format.BINARY,
        )
        return prepare


class _Answers:
    """Takes what the database answers to a flight, while it watches libpq's socket.

    psycopg's own way watches it anew for each result, with an event and a timeout for each: for a flight
    of a few statements that is most of the time that it takes.
    """

    def __init__(self, pgconn: PGconn) -> None:
        self._pgconn = pgconn
        self._socket = pgconn.socket
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] | None = None
        self._late = False
        self._watching = True

    def __enter__(self) -> Self:
        self._loop.add_reader(self._socket, self.wake)
        self._timer = self._loop.call_later(ANSWER_SECONDS_MAX, self._give_up)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Watch no longer; whoever waits is woken, and finds what the connection says."""
        if not self._watching:
            return
        self._watching = False
        self._timer.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self.wake()

    async def to_be_asked_for(self) -> None:
        """Hand everything that is asked over to the system."""
        pgconn = self._pgconn
        while pgconn.flush():
            # The other side may not take more before its answers are taken.
            self._loop.add_writer(self._socket, self.wake)
            try:
                await self._wait()
            finally:
                if self._watching:
                    self._loop.remove_writer(self._socket)
            pgconn.consume_input()

    def next_at_once(self) -> PGresult | None:
        """The result of the next statement, if it is there."""
        return None if self._pgconn.is_busy() else self._statements_result()

    async def next(self) -> PGresult:
        """The result of the next statement."""
        await self._arrive()
        return self._statements_result()

    async def sync(self) -> None:
        """The end of a segment."""
        await self._arrive()
        result = self._pgconn.get_result()
        if result is None or result.status != ExecStatus.PIPELINE_SYNC:
            raise _out_of_step()

    def _statements_result(self) -> PGresult:
        """Of each statement there is one result, and an end that comes with it."""
        result = self._pgconn.get_result()
        if result is None or self._pgconn.get_result() is not None:
            raise _out_of_step()
        return result

    async def _arrive(self) -> None:
        while self._pgconn.is_busy():
            await self._wait()
            self._pgconn.consume_input()

    async def _wait(self) -> None:
        self._woken = self._loop.create_future()
        await self._woken
        if self._late:
            raise psycopg.OperationalError("no answer")

    def wake(self) -> None:
        """Let whoever waits look what is there."""
        # Called again and again until what came is taken.
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def _give_up(self) -> None:
        self._late = True
        self.wake()


def _error(result: PGresult) -> errors.Error:
    return errors.error_from_result(result, encoding="utf-8")


def _out_of_step() -> psycopg.OperationalError:
    return psycopg.OperationalError("the answers are not in step with what was asked")
