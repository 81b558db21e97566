"""What may exist once exists once, although two servers are asked for it at the same instant."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from peculium.v1 import ledger_service_pb2 as ledger, types_pb2
from tests.forked import Forked
from tests.postgres import Server as PostgresServer
from tests.server import starting
from tests.system.wire import (
    HOLDER,
    AioWire,
    Wire,
    grant_of,
    header,
    new_id,
    new_secret,
    token_id,
    told,
)

pytestmark = pytest.mark.timeout(240)

GRANTED = 1_000_000
ROUNDS = 20
RIVALS = 8
ATTEMPTS_MAX = 20

Method = Callable[[AioWire], Callable[[Any], Awaitable[object]]]


class Rivals:
    """Connections to two servers on one database, and a root that all of them hold."""

    def __init__(self, wires: Sequence[AioWire], root_id: bytes) -> None:
        self.wires = wires
        self.root_id = root_id

    def header(self, operation_id: bytes | None = None) -> types_pb2.OperationHeader:
        return header(self.root_id, self.root_id, HOLDER, operation_id)

    async def ask(self, method: Method, requests: Sequence[Message]) -> Counter[str]:
        """Let each rival ask for its own at once; how often they succeeded, and why they did not."""
        pairs = zip(self.wires, requests, strict=True)
        return Counter(
            await asyncio.gather(*(self._answer(method(wire), request) for wire, request in pairs))
        )

    @staticmethod
    async def _answer(call: Callable[[Any], Awaitable[object]], request: Message) -> str:
        for _ in range(ATTEMPTS_MAX):
            try:
                await call(request)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    continue
                return told(error).reason
            return "accepted"
        raise AssertionError("the ledger gave no answer")


@pytest.fixture(scope="module")
def addresses(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[str]]:
    """Two servers on one database, for all tests."""
    with (
        postgres.fresh_database(postgres.migrated_template()) as database,
        starting(tmp_path_factory.mktemp("servers"), Forked) as start,
    ):
        yield [start("--database-url", database).address for _ in range(2)]


@pytest.fixture
async def rivals(addresses: list[str], request: pytest.FixtureRequest) -> AsyncIterator[Rivals]:
    grant = grant_of(request.node.name, GRANTED, holder="dev")
    with Wire(addresses[0]) as wire:
        wire.admin.Grant(grant)
        async with AsyncExitStack() as connected:
            wires = [
                await connected.enter_async_context(AioWire(addresses[number % 2]))
                for number in range(RIVALS)
            ]
            yield Rivals(wires, grant.header.root_id)
        assert wire.verified()


def _exactly_one(answers: Counter[str], otherwise: str) -> None:
    assert answers == {"accepted": 1, otherwise: RIVALS - 1}


async def test_a_name_belongs_to_one_root_whichever_lane_it_is_in(rivals: Rivals) -> None:
    for number in range(ROUNDS):
        grants = [grant_of(f"root-{number}", 1, holder="dev") for _ in range(RIVALS)]
        answers = await rivals.ask(lambda wire: wire.admin.Grant, grants)
        _exactly_one(answers, "NAME_TAKEN")


async def test_a_name_belongs_to_one_sibling(rivals: Rivals) -> None:
    for number in range(ROUNDS):
        requests = [
            ledger.DelegateRequest(
                header=rivals.header(),
                children=[
                    types_pb2.ChildSpec(
                        budget_id=new_id(), name=f"child-{number}", amount=1, holder="dev"
                    )
                ],
            )
            for _ in range(RIVALS)
        ]
        answers = await rivals.ask(lambda wire: wire.ledger.Delegate, requests)
        _exactly_one(answers, "NAME_TAKEN")


async def test_an_id_belongs_to_one_budget(rivals: Rivals) -> None:
    for number in range(ROUNDS):
        budget_id = new_id()
        requests = [
            ledger.DelegateRequest(
                header=rivals.header(),
                children=[
                    types_pb2.ChildSpec(
                        budget_id=budget_id, name=f"{number}-{rival}", amount=1, holder="dev"
                    )
                ],
            )
            for rival in range(RIVALS)
        ]
        answers = await rivals.ask(lambda wire: wire.ledger.Delegate, requests)
        _exactly_one(answers, "ID_TAKEN")


async def test_an_id_belongs_to_one_hold(rivals: Rivals) -> None:
    for _ in range(ROUNDS):
        hold_id = new_id()
        requests = [
            ledger.ReserveRequest(
                header=rivals.header(),
                amount=1,
                hold_id=hold_id,
                hold_token_id=token_id(new_secret()),
            )
            for _ in range(RIVALS)
        ]
        answers = await rivals.ask(lambda wire: wire.ledger.Reserve, requests)
        _exactly_one(answers, "ID_TAKEN")


async def test_an_operation_id_belongs_to_one_operation(rivals: Rivals) -> None:
    for _ in range(ROUNDS):
        operation_id = new_id()
        requests = [
            ledger.SpendRequest(header=rivals.header(operation_id), amount=rival + 1)
            for rival in range(RIVALS)
        ]
        answers = await rivals.ask(lambda wire: wire.ledger.Spend, requests)
        _exactly_one(answers, "OPERATION_ID_REUSED")


async def test_a_hold_is_ended_once_by_whoever_is_first(rivals: Rivals) -> None:
    for _ in range(ROUNDS):
        hold_id, secret = new_id(), new_secret()
        await rivals.wires[0].ledger.Reserve(
            ledger.ReserveRequest(
                header=rivals.header(),
                amount=10,
                hold_id=hold_id,
                hold_token_id=token_id(secret),
            )
        )
        own = header(rivals.root_id, rivals.root_id, types_pb2.Authority(secret=secret))
        settles = []
        for actual in range(RIVALS):
            settle = ledger.SettleRequest(header=own, hold_id=hold_id, actual=actual)
            settle.header.operation_id = new_id()
            settles.append(settle)
        answers = await rivals.ask(lambda wire: wire.ledger.Settle, settles)
        _exactly_one(answers, "TOKEN_CONSUMED")


async def test_the_last_of_the_money_goes_to_as_many_as_it_is_enough_for(rivals: Rivals) -> None:
    left = GRANTED
    for number in range(ROUNDS):
        share = left // 3 - number
        requests = [
            ledger.SpendRequest(header=rivals.header(), amount=share) for _ in range(RIVALS)
        ]
        answers = await rivals.ask(lambda wire: wire.ledger.Spend, requests)
        accepted = min(left // share, RIVALS)
        assert answers == {"accepted": accepted, "BUDGET_EXHAUSTED": RIVALS - accepted}
        left -= accepted * share
        if left < 100:
            break
