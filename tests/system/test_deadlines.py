"""A database that does not answer, or whose answer is lost: calls end in time, and their outcome is found out."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio

from peculium.v1 import audit_service_pb2 as audit
from tests.faults.cluster import Cluster
from tests.faults.proxy import CommitCut, Faults, Proxy
from tests.system.calls import calls, granted, spend_of
from tests.system.health import NOT_SERVING, SERVING, becomes
from tests.system.wire import AioWire

# All of them harm one cluster, which heals each time.
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
]

CALL_SECONDS_MAX = 3
LATE_SECONDS_MAX = 1
"""What the design allows a call to outlive its deadline by."""
ENDS = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    chance = Random(5)  # noqa: S311 - repeatable, not secret
    flags = ("--call-seconds-max", str(CALL_SECONDS_MAX))
    with tempfile.TemporaryDirectory(prefix="peculium-deadlines-") as folder:
        async with Cluster.running(Path(folder), chance, servers=1, flags=flags) as running:
            yield running


@contextlib.asynccontextmanager
async def swallowed(cluster: Cluster) -> AsyncIterator[None]:
    """Whatever the server sends to its database goes nowhere, new connections included."""
    [node] = cluster.nodes
    node.back.trouble(up=Faults(swallow=True), down=Faults(swallow=True))
    try:
        yield
    finally:
        await node.back.heal()


@contextlib.asynccontextmanager
async def paused(cluster: Cluster) -> AsyncIterator[None]:
    """The database's machine answers, none of its processes does."""
    postmaster = psutil.Process(cluster.postgres.pid)
    postmaster.suspend()
    # By now it can start none.
    children = postmaster.children(recursive=True)
    try:
        for process in children:
            # What has done its work ends by itself.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        yield
    finally:
        for process in (postmaster, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def new_name() -> str:
    return f"root-{secrets.token_hex(4)}"


Silence = Callable[[Cluster], contextlib.AbstractAsyncContextManager[None]]


@pytest.mark.parametrize("silence", [swallowed, paused])
async def test_no_call_outlives_its_end_while_the_database_is_silent(
    cluster: Cluster, silence: Silence
) -> None:
    [node] = cluster.nodes
    # Not the front proxy: what is measured is the server's own doing.
    address = node.front.target
    async with AioWire(address) as connection:
        root_id = await granted(connection, new_name())
        requests = [spend_of(root_id) for _ in range(3)]
        # With sessions that are there already, for as many calls as come.
        await asyncio.gather(*(calls(connection, root_id) for _ in range(3)))
        async with silence(cluster):
            begun = time.monotonic()
            ends = await asyncio.gather(
                *(timed(connection.ledger.Spend(request)) for request in requests),
                *(timed(each) for each in reads(connection, root_id)),
            )
            await becomes(address, NOT_SERVING)
            for code, ended in ends:
                assert code in ENDS
                assert ended - begun <= CALL_SECONDS_MAX + LATE_SECONDS_MAX
            # A verification has no end but its caller's.
            await asyncio.gather(*(broken_off(connection) for _ in range(6)))
        await becomes(address, SERVING)
        await asyncio.gather(*(verified(connection) for _ in range(3)))
        for request in requests:
            await connection.ledger.Spend(request)
        assert await recorded(connection, root_id, requests) == [1, 1, 1]


def reads(connection: AioWire, root_id: bytes) -> list[Awaitable[Any]]:
    """More than there are connections for them."""
    ref = audit.GetBudgetRequest()
    ref.budget.root_id = ref.budget.budget_id = root_id
    entries = audit.ListEntriesRequest(budget=ref.budget)
    return [
        *(connection.audit.GetBudget(ref) for _ in range(4)),
        *(connection.audit.ListEntries(entries) for _ in range(4)),
        *(connection.audit.ListBudgets(audit.ListBudgetsRequest()) for _ in range(4)),
    ]


async def timed(call: Awaitable[Any]) -> tuple[grpc.StatusCode, float]:
    """How a call ends, and when."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), time.monotonic()
    return grpc.StatusCode.OK, time.monotonic()


async def broken_off(connection: AioWire) -> None:
    code, _ = await timed(verified(connection, timeout=0.3))
    assert code in ENDS


async def verified(connection: AioWire, timeout: float = 20) -> None:
    answers = [
        answer async for answer in connection.audit.Verify(audit.VerifyRequest(), timeout=timeout)
    ]
    assert answers[-1].verdict.verified


async def recorded(connection: AioWire, root_id: bytes, requests: list[Any]) -> list[int]:
    """How often each operation is in the ledger."""
    request = audit.ListEntriesRequest(page_size=1000)
    request.budget.root_id = request.budget.budget_id = root_id
    found = [entry.operation_id for entry in (await connection.audit.ListEntries(request)).entries]
    return [found.count(each.header.operation_id) for each in requests]


@pytest.mark.parametrize("when", list(CommitCut), ids=lambda when: when.name.lower())
async def test_the_outcome_of_a_commit_whose_answer_is_lost_is_found_out(
    cluster: Cluster, when: CommitCut
) -> None:
    """Also when what is to find it out loses its answer, and the next, until the network heals."""
    [node] = cluster.nodes
    async with AioWire(node.front.target) as connection:
        root_id = await granted(connection, new_name())
        requests = [spend_of(root_id) for _ in range(20)]
        for request in requests:
            before = node.back.commits_cut
            node.back.cut_commits(when)
            spending = asyncio.ensure_future(connection.ledger.Spend(request))
            await cut(node.back, before + 2)
            await node.back.heal()
            assert (await spending).outcome.operation_id == request.header.operation_id
        assert await recorded(connection, root_id, requests) == [1] * len(requests)
        await verified(connection)


async def cut(proxy: Proxy, commits: int) -> None:
    """Wait until so many commits have lost their answer."""
    async with asyncio.timeout(CALL_SECONDS_MAX):
        while proxy.commits_cut < commits:  # noqa: ASYNC110 - nobody tells when
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("when", list(CommitCut), ids=lambda when: when.name.lower())
async def test_an_outcome_that_cannot_be_found_out_in_time_is_not_guessed(
    cluster: Cluster, when: CommitCut
) -> None:
    """The same operation, sent again by its caller, tells the truth."""
    [node] = cluster.nodes
    async with AioWire(node.front.target) as connection:
        root_id = await granted(connection, new_name())
        requests = [spend_of(root_id) for _ in range(8)]
        node.back.cut_commits(when)
        begun = time.monotonic()
        ends = await asyncio.gather(
            *(timed(connection.ledger.Spend(request)) for request in requests)
        )
        for code, ended in ends:
            assert code in ENDS
            assert ended - begun <= CALL_SECONDS_MAX + LATE_SECONDS_MAX
        await node.back.heal()
        for request in requests:
            await connection.ledger.Spend(request)
        assert await recorded(connection, root_id, requests) == [1] * len(requests)
        await verified(connection)


async def test_a_connection_that_is_cut_after_any_byte_loses_and_doubles_nothing(
    cluster: Cluster,
) -> None:
    """In the middle of every statement, of every answer, and of what is to find out the outcome."""
    [node] = cluster.nodes
    async with AioWire(node.front.target) as connection:
        root_id = await granted(connection, new_name())
        requests = []
        for step in range(40):
            request = spend_of(root_id)
            requests.append(request)
            fault = Faults(cut_after_bytes=1 + 97 * step)
            way = {"up": fault} if step % 2 else {"down": fault}
            node.back.trouble(**way)
            await timed(connection.ledger.Spend(request, timeout=0.3))
            await node.back.heal()
            await rid_of_transactions(cluster)
            async with asyncio.timeout(60):
                # It may be given the connection that was being made when it was cut as well, and on a busy
                # machine have no time for another one.
                while (code := (await timed(connection.ledger.Spend(request)))[0]) in ENDS:
                    pass
            assert code is grpc.StatusCode.OK
        assert await recorded(connection, root_id, requests) == [1] * len(requests)
        await verified(connection)


async def rid_of_transactions(cluster: Cluster) -> None:
    """Wait until the database has ended those whose session was cut: until then their rows are locked."""
    query = (
        "SELECT 1 FROM pg_stat_activity"
        " WHERE application_name = 'peculium' AND xact_start IS NOT NULL"
    )
    async with asyncio.timeout(30):
        while await cluster.fetch(query):  # noqa: ASYNC110 - nobody tells when
            await asyncio.sleep(0.001)
