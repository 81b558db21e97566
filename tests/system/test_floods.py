"""Who floods a server, with calls or with connections: the others are served, and nothing is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import resource
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from peculium.v1 import ledger_service_pb2 as ledger
from tests.certificates import Authority
from tests.server import StartServer
from tests.system.calls import granted, spend_of
from tests.system.http2 import (
    CLIENT_HELLO,
    DATA,
    END_HEADERS,
    HEADERS,
    PREFACE,
    frame,
    headers,
    settings,
)
from tests.system.wire import AioWire, Wire, grant_of, told

pytestmark = pytest.mark.timeout(120)

OF_EACH = 100
"""Connections of each sort."""
CALLS_OF_EACH = 5
"""That are begun on a connection, and never ended."""
SPEND = "/peculium.v1.LedgerService/Spend"
CONNECTIONS = 40
OWN_FILES_MAX = 30
"""That a server opens for itself while it works: connections to its database."""
KEYS = {"ops": "admin", "flood": "agent", "modest": "agent"}
FLOOD_CALLS = 150
LIMITED = {"RATE_LIMITED", "TOO_MANY_AT_ONCE"}


def present(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {name}-key"),)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text(
        "".join(
            f'[[keys]]\nprincipal = "{name}"\nrole = "{role}"\n'
            f'sha256 = "{hashlib.sha256(f"{name}-key".encode()).hexdigest()}"\n'
            for name, role in KEYS.items()
        )
    )
    return file


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not condition():  # noqa: ASYNC110 - nobody tells when
            await asyncio.sleep(0.05)


# -- Calls -------------------------------------------------------------------------------------------------


async def test_of_two_principals_one_floods_and_the_other_is_served(
    start_server: StartServer, served_database: str, keys_file: Path
) -> None:
    server = start_server(
        *("--database-url", served_database, "--keys-file", str(keys_file)),
        *("--principal-rate-max", "50", "--principal-burst-max", "100"),
    )
    with Wire(server.address, "ops-key") as ops:
        roots = {name: grant_of(name, 10**9, holder=name) for name in ("flood", "modest")}
        for request in roots.values():
            ops.admin.Grant(request)

    async def spend(wire: AioWire, name: str) -> str:
        request = spend_of(roots[name].header.root_id)
        try:
            await wire.ledger.Spend(request, metadata=present(name), timeout=30)
        except grpc.aio.AioRpcError as error:
            return told(error).reason or f"{error.code()} {error.details()}"
        return "OK"

    async def batch(wire: AioWire) -> str:
        root_id = roots["flood"].header.root_id
        operations = [ledger.Operation(spend=spend_of(root_id)) for _ in range(50)]
        request = ledger.BatchRequest(operations=operations)
        try:
            await wire.ledger.Batch(request, metadata=present("flood"), timeout=30)
        except grpc.aio.AioRpcError as error:
            return told(error).reason or f"{error.code()} {error.details()}"
        return "OK"

    async with AioWire(server.address) as flooding, AioWire(server.address) as behaving:
        flood = [
            asyncio.ensure_future(spend(flooding, "flood") if number % 2 else batch(flooding))
            for number in range(FLOOD_CALLS)
        ]
        served = [await spend(behaving, "modest") for _ in range(50)]
        answers = Counter(await asyncio.gather(*flood))
    assert served == ["OK"] * 50
    assert set(answers) <= {"OK", *LIMITED}
    assert answers["OK"] > 0
    assert sum(answers[each] for each in LIMITED) > FLOOD_CALLS // 2


# -- Connections -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def allowed_files(count: int) -> Iterator[None]:
    """How many files may be open, here and in what is started meanwhile."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


async def silent(address: str) -> asyncio.StreamWriter:
    return await saying(address, b"")


async def half_a_preface(address: str) -> asyncio.StreamWriter:
    return await saying(address, PREFACE[:12])


async def half_of_tls(address: str) -> asyncio.StreamWriter:
    return await saying(address, CLIENT_HELLO)


async def half_of_headers(address: str) -> asyncio.StreamWriter:
    block = frame(HEADERS, END_HEADERS, 1, headers(SPEND))
    return await saying(address, PREFACE + settings() + block[: len(block) // 2])


async def calls_without_end(address: str) -> asyncio.StreamWriter:
    """Calls whose requests are begun, and never ended."""
    calls = b"".join(
        frame(HEADERS, END_HEADERS, stream, headers(SPEND))
        + frame(DATA, 0, stream, b"\x00\x00\x00\x10\x00half of it")
        for stream in range(1, 2 * CALLS_OF_EACH, 2)
    )
    return await saying(address, PREFACE + settings() + calls)


async def saying(address: str, said: bytes) -> asyncio.StreamWriter:
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(ConnectionError):
        writer.write(said)
        await writer.drain()
    return writer


SORTS = (silent, half_a_preface, half_of_tls, half_of_headers, calls_without_end)


@contextlib.asynccontextmanager
async def flooded(address: str, of_each: int) -> AsyncIterator[None]:
    """So many connections of each sort, for the time of the block."""
    async with contextlib.AsyncExitStack() as open_:
        for make in SORTS:
            for _ in range(of_each):
                # Whoever forgets a writer closes what it writes to.
                open_.callback(_abort, await make(address))
        yield


def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def work(connection: AioWire, root_id: bytes) -> None:
    for _ in range(10):
        await connection.ledger.Spend(spend_of(root_id), timeout=30)


@pytest.mark.parametrize(("encrypted", "lasting"), [(False, 4), (True, 2)], ids=["plain", "tls"])
async def test_connections_that_never_say_what_they_want_hold_up_nobody(
    start_server: StartServer, served_database: str, tmp_path: Path, encrypted: bool, lasting: int
) -> None:
    """Of so many sorts they last; what is nonsense from the first byte on is cut off at once."""
    authority = Authority()
    certificate, key = authority.server().write(tmp_path)
    tls = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key))
    server = await asyncio.to_thread(
        start_server,
        *("--database-url", served_database, "--log-level", "info"),
        *(tls if encrypted else ()),
    )
    credentials = grpc.ssl_channel_credentials(authority.pem) if encrypted else None
    process = psutil.Process(server.process.pid)
    async with AioWire(server.address, credentials) as connection:
        root_id = await granted(connection, "acme")
        await work(connection, root_id)
        files, said = process.num_fds(), len(server.said)
        with allowed_files(4 * OF_EACH * len(SORTS)):
            async with flooded(server.address, OF_EACH):
                await until(lambda: process.num_fds() >= files + OF_EACH * lasting)
                await work(connection, root_id)
                # Whoever comes now is served as well.
                async with AioWire(server.address, credentials) as late:
                    await work(late, root_id)
        await until(lambda: process.num_fds() <= files + OF_EACH // 10)
        await work(connection, root_id)
    noise = [line for line in server.said[said:] if " event=call " not in line]
    assert len(noise) < OF_EACH // 5, noise[:20]


async def test_as_many_connect_as_may_and_the_rest_of_the_files_is_the_servers_own(
    start_server: StartServer, served_database: str
) -> None:
    server = await asyncio.to_thread(
        start_server, "--database-url", served_database, "--connections-max", str(CONNECTIONS)
    )
    process = psutil.Process(server.process.pid)
    async with AioWire(server.address) as connection:
        root_id = await granted(connection, "acme")
        await work(connection, root_id)
        files = process.num_fds()
        async with flooded(server.address, CONNECTIONS):
            await until(lambda: process.num_fds() >= files + CONNECTIONS - 1)
            # Lanes that are not connected to the database yet find room for that.
            for number in range(20):
                await granted(connection, f"root-{number}")
            assert process.num_fds() <= files + CONNECTIONS + OWN_FILES_MAX
        await comes_in(server.address, root_id)


async def test_a_server_that_has_run_out_of_files_goes_on_when_there_are_some_again(
    start_server: StartServer, served_database: str
) -> None:
    server = await asyncio.to_thread(start_server, "--database-url", served_database)
    process = psutil.Process(server.process.pid)
    async with AioWire(server.address) as connection:
        root_id = await granted(connection, "acme")
        await work(connection, root_id)
        few, said = process.num_fds() + CONNECTIONS, len(server.said)
        process.rlimit(psutil.RLIMIT_NOFILE, (few, few))
        async with flooded(server.address, CONNECTIONS):
            await until(lambda: process.num_fds() >= few - 1)
            # Who is connected is served as ever.
            await work(connection, root_id)
        await comes_in(server.address, root_id)
        await work(connection, root_id)
    assert len(server.said) - said < CONNECTIONS // 2, server.said[said:]


async def comes_in(address: str, root_id: bytes) -> None:
    """Somebody connects anew, which the server may have to notice that it can be done again."""
    async with AioWire(address) as late, asyncio.timeout(15):
        await late.ledger.Spend(spend_of(root_id), timeout=60, wait_for_ready=True)
