"""Limits of each principal, on real sockets: who has reached one waits, and nobody else notices."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from peculium.v1 import ledger_service_pb2 as ledger, types_pb2
from peculium.v1.ledger_service_pb2_grpc import LedgerServiceStub
from peculium_server.core.operations import Role
from peculium_server.core.throttle import Limits
from peculium_server.identity import Identities
from peculium_server.rpc import call_log, interceptors, throttling
from peculium_server.rpc.permissions import PERMISSIONS
from peculium_server.rpc.throttling import OTHER_WEIGHT
from tests.lanes.memory import grant, spend
from tests.rpc.messages import message_of
from tests.rpc.test_server import HOLDER, Failing, bearer, refused
from tests.rpc.wire import MESSAGE_BYTES_MAX, Wire, info_of, serving
from tests.system.wire import retry_seconds

GATEWAY, CRAWLER, REVISION = bearer("gateway-key"), bearer("crawler-key"), bearer("revision-key")
ROLES = {"gateway": Role.AGENT, "crawler": Role.AGENT, "revision": Role.AUDITOR, "ops": Role.ADMIN}
SPEND = "/peculium.v1.LedgerService/Spend"
VERIFY = "/peculium.v1.AuditService/Verify"
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.ns = 10**12

    def monotonic_ns(self) -> int:
        return self.ns

    def pass_ms(self, ms: int) -> None:
        self.ns += ms * 1_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(throttling, "time", made)
    return made


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    write_keys(file, *ROLES)
    return file


def write_keys(file: Path, *principals: str) -> None:
    unfinished = file.with_suffix(".new")
    unfinished.write_text(
        "".join(
            f'[[keys]]\nprincipal = "{name}"\nrole = "{ROLES[name].name.lower()}"\n'
            f'sha256 = "{hashlib.sha256(f"{name}-key".encode()).hexdigest()}"\n'
            for name in principals
        )
    )
    unfinished.replace(file)


@pytest.fixture
def keys(keys_file: Path) -> Identities:
    return Identities.load(keys_file)


def spending() -> Any:
    return message_of(spend(grant()), HOLDER)


async def spent(wire: Wire, metadata: Any) -> str:
    """What a Spend of a budget that there is not is answered."""
    error = await refused(LedgerServiceStub(wire.channel).Spend(spending(), metadata=metadata))
    return info_of(error).reason


def half_asked(wire: Wire, method: str, metadata: Any) -> Any:
    """A call whose caller has not said yet what it asks for."""
    call: Any = wire.channel.stream_unary(method)
    return call(metadata=metadata)


async def asking_alone(wire: Wire, method: str, metadata: Any, full: Any) -> Any:
    """Such a call that has its caller's only place: whoever asks whether it has may have taken that."""
    async with asyncio.timeout(30):
        while True:
            asking = half_asked(wire, method, metadata)
            while not asking.done():
                if await full(wire):
                    return asking


# -- By the second ---------------------------------------------------------------------------------------


async def test_who_asks_for_too_much_is_told_so_and_when_to_come_back(
    keys: Identities, clock: Clock
) -> None:
    async with serving(keys, limits=Limits(rate=2, burst=3)) as wire:
        stub = LedgerServiceStub(wire.channel)
        assert [await spent(wire, GATEWAY) for _ in range(3)] == ["CAPABILITY_UNKNOWN"] * 3
        error = await refused(stub.Spend(spending(), metadata=GATEWAY))
        assert error.code() is EXHAUSTED
        info = info_of(error)
        assert (info.reason, info.domain) == ("RATE_LIMITED", "peculium")
        assert dict(info.metadata) == {"principal": "gateway", "limit": "2", "burst": "3"}
        assert retry_seconds(error) == 0.5
        # Another principal is another matter.
        assert await spent(wire, CRAWLER) == "CAPABILITY_UNKNOWN"
        clock.pass_ms(499)
        assert await spent(wire, GATEWAY) == "RATE_LIMITED"
        clock.pass_ms(1)
        assert await spent(wire, GATEWAY) == "CAPABILITY_UNKNOWN"


async def test_nobody_is_asked_to_come_back_at_once(keys: Identities, clock: Clock) -> None:
    async with serving(keys, limits=Limits(rate=100_000, burst=1)) as wire:
        await spent(wire, GATEWAY)
        error = await refused(LedgerServiceStub(wire.channel).Spend(spending(), metadata=GATEWAY))
        assert retry_seconds(error) == throttling.RETRY_MS_MIN / 1000


@pytest.mark.parametrize("atomic", [False, True])
async def test_a_batch_counts_as_all_that_it_asks_for(
    keys: Identities, clock: Clock, atomic: bool
) -> None:
    child = types_pb2.ChildSpec(budget_id=bytes(16), name="x", amount=1, holder="gateway")
    delegate = ledger.DelegateRequest(header=spending().header, children=[child] * 9)
    operations = [ledger.Operation(spend=spending()) for _ in range(10)]
    operations.append(ledger.Operation(delegate=delegate))
    request = ledger.BatchRequest(operations=operations, atomic=atomic)
    if atomic:
        request.operation_id = bytes(16)
    async with serving(keys, limits=Limits(rate=10, burst=10)) as wire:
        await LedgerServiceStub(wire.channel).Batch(request, metadata=GATEWAY)
        error = await refused(LedgerServiceStub(wire.channel).Spend(spending(), metadata=GATEWAY))
        # Twenty, in a bucket for ten, which has to have room for one more.
        assert retry_seconds(error) == 1.1


async def test_operations_of_a_batch_that_are_none_count_too(
    keys: Identities, clock: Clock
) -> None:
    request = ledger.BatchRequest(operations=[ledger.Operation()] * 30)
    async with serving(keys, limits=Limits(rate=10, burst=10)) as wire:
        await LedgerServiceStub(wire.channel).Batch(request, metadata=GATEWAY)
        error = await refused(LedgerServiceStub(wire.channel).Spend(spending(), metadata=GATEWAY))
        assert retry_seconds(error) == 2.1


@pytest.mark.parametrize("method", PERMISSIONS)
async def test_every_method_is_limited_before_its_request_is_read(
    keys: Identities, clock: Clock, method: str
) -> None:
    name = next(name for name, role in ROLES.items() if role in PERMISSIONS[method])
    metadata = bearer(f"{name}-key")
    async with serving(keys, limits=Limits(rate=1, burst=1)) as wire:
        await refused(wire.send(method, b"\xff", metadata=metadata))
        error = await refused(half_asked(wire, method, metadata))
        assert (error.code(), info_of(error).reason) == (EXHAUSTED, "RATE_LIMITED")


async def test_what_is_no_operation_weighs_as_the_settings_say(
    keys: Identities, clock: Clock
) -> None:
    read = "/peculium.v1.LedgerService/GetBudget"
    async with serving(keys, limits=Limits(rate=10, burst=1)) as wire:
        await refused(wire.send(read, b"\xff", metadata=GATEWAY))
        error = await refused(wire.send(read, b"\xff", metadata=GATEWAY))
        assert retry_seconds(error) == OTHER_WEIGHT / 10


# -- At once ---------------------------------------------------------------------------------------------


async def test_who_has_as_much_in_progress_as_one_may_waits_and_others_do_not(
    keys: Identities,
) -> None:
    hanging = Failing(hang=True)
    async with serving(keys, ledger=hanging, limits=Limits(at_once=2)) as wire:
        stub = LedgerServiceStub(wire.channel)
        running = [
            asyncio.ensure_future(stub.Spend(spending(), metadata=GATEWAY)) for _ in range(2)
        ]
        await until(lambda: len(hanging.requests) == 2)
        error = await refused(stub.Spend(spending(), metadata=GATEWAY))
        assert error.code() is EXHAUSTED
        info = info_of(error)
        assert info.reason == "TOO_MANY_AT_ONCE"
        assert dict(info.metadata) == {"principal": "gateway", "limit": "2"}
        assert retry_seconds(error) == throttling.RETRY_MS_MIN / 1000
        other = asyncio.ensure_future(stub.Spend(spending(), metadata=CRAWLER))
        await until(lambda: len(hanging.requests) == 3)
        # Whoever goes makes room.
        running[0].cancel()
        await hanging.cancelled.wait()
        again = asyncio.ensure_future(stub.Spend(spending(), metadata=GATEWAY))
        await until(lambda: len(hanging.requests) == 4)
        for call in (*running, other, again):
            call.cancel()


async def test_a_call_in_progress_counts_from_its_first_byte_to_its_end_however_it_ends(
    keys: Identities,
) -> None:
    failing = Failing(ZeroDivisionError())
    async with serving(keys, ledger=failing, limits=Limits(at_once=1)) as wire:
        asking = await asking_alone(wire, SPEND, GATEWAY, no_more_at_once)
        await asking.write(spending().SerializeToString())
        assert (await refused(asking)).code() is grpc.StatusCode.INTERNAL
        malformed = await wire.status_of(SPEND, b"\xff", metadata=GATEWAY)
        assert malformed is grpc.StatusCode.INVALID_ARGUMENT
        assert await spent(wire, GATEWAY) == "INTERNAL"


async def no_more_at_once(wire: Wire) -> bool:
    return await spent(wire, GATEWAY) == "TOO_MANY_AT_ONCE"


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - nobody tells when
            await asyncio.sleep(0.001)


async def test_streams_that_are_open_are_counted_apart(keys: Identities) -> None:
    async with serving(keys, limits=Limits(at_once=1, streams=1)) as wire:
        asking = await asking_alone(wire, VERIFY, REVISION, no_more_streams)
        error = await refused(wire.send(VERIFY, b"", metadata=REVISION))
        assert error.code() is EXHAUSTED
        assert dict(info_of(error).metadata) == {"principal": "revision", "limit": "1"}
        assert retry_seconds(error) == throttling.STREAMS_RETRY_MS / 1000
        # Calls that are no streams are none of its business.
        read = "/peculium.v1.AuditService/GetBudget"
        assert await wire.status_of(read, b"", metadata=REVISION) is not EXHAUSTED
        asking.cancel()
        while await no_more_streams(wire):
            pass


async def no_more_streams(wire: Wire) -> bool:
    error = await refused(wire.send(VERIFY, b"", metadata=REVISION))
    return info_of(error).reason == "TOO_MANY_STREAMS"


# -- Who is nobody ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SPEND, VERIFY])
async def test_who_is_unknown_is_told_so_before_anything_is_received(
    keys: Identities, method: str
) -> None:
    async with serving(keys) as wire:
        error = await refused(half_asked(wire, method, bearer("guessed")))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        # Nor is a megabyte of it.
        error = await refused(
            wire.send(method, bytes(MESSAGE_BYTES_MAX), metadata=bearer("guessed"))
        )
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_who_is_unknown_uses_up_nothing_of_who_is_not(keys: Identities, clock: Clock) -> None:
    async with serving(keys, limits=Limits(rate=1, burst=1, at_once=1)) as wire:
        for _ in range(20):
            assert await spent(wire, bearer("guessed")) == "UNAUTHENTICATED"
        assert await spent(wire, GATEWAY) == "CAPABILITY_UNKNOWN"


@pytest.fixture
def logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[pytest.LogCaptureFixture, Clock]]:
    made = Clock()
    monkeypatch.setattr(call_log, "time", made)
    monkeypatch.setattr(call_log, "_few", call_log._Few())
    with caplog.at_level(logging.INFO, "peculium_server.calls"):
        yield caplog, made


async def test_a_storm_of_calls_that_are_turned_away_does_not_fill_the_log(
    keys: Identities, logged: tuple[pytest.LogCaptureFixture, Clock]
) -> None:
    caplog, clock = logged
    burst = call_log.TURNED_AWAY_BURST
    async with serving(keys) as wire:
        for _ in range(burst + 30):
            await spent(wire, bearer("guessed"))
        clock.pass_ms(1_000 // call_log.TURNED_AWAY_RATE)
        await spent(wire, bearer("guessed"))
        # What is served is logged as ever.
        for _ in range(5):
            await spent(wire, GATEWAY)
    facts = [vars(record)["peculium_facts"] for record in caplog.records]
    away = [each for each in facts if each["status"] == "UNAUTHENTICATED"]
    assert len(away) == burst + 1
    assert [each.get("not_logged") for each in away] == [None] * burst + [30]
    assert len(facts) - len(away) == 5


# -- Who is slow to ask ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SPEND, VERIFY])
async def test_who_never_says_what_is_asked_is_told_that_the_time_is_over(
    keys: Identities, method: str
) -> None:
    async with serving(keys, call_seconds_max=0.1) as wire:
        metadata = GATEWAY if method == SPEND else REVISION
        error = await refused(half_asked(wire, method, metadata))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert info_of(error).reason == "DEADLINE_EXCEEDED"


async def test_a_call_without_a_request_is_malformed(
    keys: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptors, "_CUT_OFF_SECONDS", 0)
    async with serving(keys) as wire:
        asking = half_asked(wire, SPEND, GATEWAY)
        await asking.done_writing()
        error = await refused(asking)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert dict(info_of(error).metadata) == {"field": "request", "problem": "is missing"}


async def test_a_key_that_ends_while_its_caller_takes_time_to_ask_is_worth_nothing(
    keys: Identities, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptors, "_SLOW_SECONDS", 0)
    noting = Failing(ZeroDivisionError())
    async with serving(keys, ledger=noting, limits=Limits(at_once=1)) as wire:
        asking = await asking_alone(wire, SPEND, GATEWAY, no_more_at_once)
        write_keys(keys_file, "crawler")
        keys._reload()
        noting.requests.clear()
        await asking.write(spending().SerializeToString())
        assert (await refused(asking)).code() is grpc.StatusCode.UNAUTHENTICATED
        assert noting.requests == []
