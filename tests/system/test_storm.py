"""Everybody presents the same tokens at once: each is consumed exactly once, whoever asks how often."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

from peculium.v1 import ledger_service_pb2 as ledger, types_pb2
from tests.server import StartServer
from tests.system.wire import (
    AioWire,
    Held,
    Wire,
    balanced,
    delegated,
    granted,
    id_text,
    new_id,
    new_secret,
    reason_of,
    reserve_of,
    spend_of,
    token_id,
)

pytestmark = pytest.mark.timeout(240)

CLIENTS = 64
ROOTS = 20
CHILDREN = 10
"""Of each root: together 200 tokens."""
AMOUNT = 100
AT_ONCE = 20
"""Operations in one request of a client."""
ATTEMPTS_MAX = 50


class Asked(NamedTuple):
    """One client's attempt to consume one token."""

    token: int
    operation_id: str
    operation: ledger.Operation


def _spend(held: Held) -> ledger.Operation:
    return ledger.Operation(spend=spend_of(held, 1))


def _reserve(held: Held) -> ledger.Operation:
    return ledger.Operation(reserve=reserve_of(held, 1))


def _accept(held: Held) -> ledger.Operation:
    request = ledger.AcceptRequest(header=held.header(), next_token_id=token_id(new_secret()))
    return ledger.Operation(accept=request)


def _give_back(held: Held) -> ledger.Operation:
    request = ledger.ReturnRequest(
        header=held.header(), next_token_id=token_id(new_secret()), amount=1
    )
    operation = ledger.Operation()
    getattr(operation, "return").CopyFrom(request)
    return operation


def _delegate(held: Held) -> ledger.Operation:
    child = types_pb2.ChildSpec(
        budget_id=new_id(), name="below", amount=1, token_id=token_id(new_secret())
    )
    request = ledger.DelegateRequest(
        header=held.header(), next_token_id=token_id(new_secret()), children=[child]
    )
    return ledger.Operation(delegate=request)


KINDS: Sequence[Callable[[Held], ledger.Operation]] = (
    _spend,
    _reserve,
    _accept,
    _give_back,
    _delegate,
)


def _ask(client: int, token: int, held: Held) -> Asked:
    operation = KINDS[(client + token) % len(KINDS)](held)
    kind = operation.WhichOneof("operation")
    assert kind is not None
    header: types_pb2.OperationHeader = getattr(operation, kind).header
    return Asked(token, id_text(header.operation_id), operation)


def _make_tokens(wire: Wire) -> list[Held]:
    tokens = []
    for number in range(ROOTS):
        root = granted(wire, f"root-{number}", AMOUNT * CHILDREN)
        tokens += [delegated(wire, root, f"child-{child}", AMOUNT) for child in range(CHILDREN)]
    return tokens


async def _send(wire: AioWire, asked: Sequence[Asked]) -> list[ledger.OperationResult]:
    """Send operations until each has an answer: the same ones, as a client would."""
    results: dict[int, ledger.OperationResult] = {}
    for _ in range(ATTEMPTS_MAX):
        missing = [index for index in range(len(asked)) if index not in results]
        if not missing:
            return [results[index] for index in range(len(asked))]
        request = ledger.BatchRequest(operations=[asked[index].operation for index in missing])
        response = await wire.ledger.Batch(request, timeout=60)
        results |= {
            index: result
            for index, result in zip(missing, response.results, strict=True)
            if not result.HasField("unavailable")
        }
    raise AssertionError("the ledger gave no answer")


async def _client(
    wires: Sequence[AioWire], number: int, tokens: Sequence[Held]
) -> list[tuple[Asked, ledger.OperationResult]]:
    """Ask for every token in an order of one's own; everything is sent twice, at the same time."""
    order = list(range(len(tokens)))
    random.Random(number).shuffle(order)  # noqa: S311 - repeatable, not secret
    answers: list[tuple[Asked, ledger.OperationResult]] = []
    for start in range(0, len(order), AT_ONCE):
        asked = [_ask(number, token, tokens[token]) for token in order[start : start + AT_ONCE]]
        both = await asyncio.gather(
            _send(wires[number % len(wires)], asked),
            _send(wires[(number + 1) % len(wires)], asked),
        )
        for results in both:
            answers += zip(asked, results, strict=True)
    return answers


async def _storm(
    addresses: Sequence[str], tokens: Sequence[Held]
) -> list[tuple[Asked, ledger.OperationResult]]:
    wires = [AioWire(addresses[number % len(addresses)]) for number in range(CLIENTS)]
    try:
        clients = (_client(wires, number, tokens) for number in range(CLIENTS))
        return [answer for answers in await asyncio.gather(*clients) for answer in answers]
    finally:
        for wire in wires:
            await wire.channel.close()


@pytest.mark.parametrize("servers", [1, 2])
async def test_of_many_clients_with_one_token_exactly_one_wins_and_the_others_are_told_who(
    start_server: StartServer, database: str, servers: int
) -> None:
    addresses = [start_server("--database-url", database).address for _ in range(servers)]
    with Wire(addresses[0]) as wire:
        tokens = _make_tokens(wire)
        answers = await _storm(addresses, tokens)
        _check_answers(answers)
        _check_ledger(wire, tokens, answers)


def _check_answers(answers: Sequence[tuple[Asked, ledger.OperationResult]]) -> None:
    assert len(answers) == 2 * CLIENTS * ROOTS * CHILDREN
    winners: dict[int, set[str]] = defaultdict(set)
    by_operation: dict[str, list[ledger.OperationResult]] = defaultdict(list)
    for asked, result in answers:
        by_operation[asked.operation_id].append(result)
        if result.HasField("outcome"):
            winners[asked.token].add(asked.operation_id)
    assert Counter(map(len, winners.values())) == {1: ROOTS * CHILDREN}
    for asked, result in answers:
        if result.HasField("outcome"):
            continue
        [winner] = winners[asked.token]
        assert reason_of(result.refused) == "TOKEN_CONSUMED"
        assert result.refused.metadata["consumed_by"] == winner
    for first, second in by_operation.values():
        _check_same(first, second)


def _check_same(first: ledger.OperationResult, second: ledger.OperationResult) -> None:
    """Both answers to one operation are bit-equal, but for which of them came again, and when."""
    if first.HasField("outcome"):
        assert {first.outcome.replayed, second.outcome.replayed} == {False, True}
    assert _content(first) == _content(second)


def _content(result: ledger.OperationResult) -> bytes:
    content = ledger.OperationResult()
    content.CopyFrom(result)
    if content.HasField("outcome"):
        content.outcome.ClearField("replayed")
        content.outcome.ClearField("ledger")
    else:
        content.refused.ClearField("ledger")
    return content.SerializeToString(deterministic=True)


def _check_ledger(
    wire: Wire, tokens: Sequence[Held], answers: Sequence[tuple[Asked, ledger.OperationResult]]
) -> None:
    won = {asked.operation_id for asked, result in answers if result.HasField("outcome")}
    consumed: Counter[bytes] = Counter()
    recorded = set()
    for root_id in {held.root_id for held in tokens}:
        for entry in wire.entries(root_id):
            consumed[entry.consumed] += 1
            if entry.consumed in {held.token_id for held in tokens}:
                recorded.add(id_text(entry.operation_id))
    assert recorded == won
    assert {consumed[held.token_id] for held in tokens} == {1}
    budgets = wire.budgets()
    assert all(balanced(budget.balances) for budget in budgets.values())
    assert sum(
        budget.balances.granted for path, budget in budgets.items() if "/" not in path
    ) == sum(
        budget.balances.available + budget.balances.held + budget.balances.spent
        for budget in budgets.values()
    )
    assert wire.verified()
