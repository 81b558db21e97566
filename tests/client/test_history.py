"""A ledger that knows less than it has told before is not believed any more."""

from __future__ import annotations

import asyncio
import pickle
from urllib.parse import urlsplit

import pytest

import peculium
from peculium import Child, LedgerWentBack, Unavailable
from peculium._history import LANES_MAX, History
from peculium.aio import Budget, Client, connect
from peculium.v1 import audit_service_pb2 as audit, ledger_service_pb2 as wire, types_pb2
from tests.client.ledger import INCARNATION, Ledger, Serving
from tests.client.lines import Bench
from tests.postgres import Server
from tests.server import StartServer

OTHER = bytes(reversed(range(16)))


def read(
    position: int, *, lane: int = 0, incarnation: bytes = INCARNATION
) -> wire.ListHoldsResponse:
    return wire.ListHoldsResponse(
        ledger=types_pb2.LedgerPosition(incarnation=incarnation, lane=lane, position=position)
    )


# --- what is compared with what ---


def test_an_answer_may_be_older_than_one_that_came_while_it_was_on_its_way() -> None:
    history = History()
    sent_first, sent_second = history.known(), history.known()
    history.observe(sent_second, read(9))
    history.observe(sent_first, read(8))
    with pytest.raises(LedgerWentBack) as caught:
        history.observe(history.known(), read(8))
    assert (caught.value.lane, caught.value.seen, caught.value.told) == (0, 9, 8)


def test_an_answer_may_stand_where_the_last_one_stood() -> None:
    history = History()
    for position in (5, 5, 6):
        history.observe(history.known(), read(position))
    assert history.went_back is None


def test_each_lane_is_compared_with_itself() -> None:
    history = History()
    history.observe(history.known(), read(9, lane=1))
    history.observe(history.known(), read(1, lane=2))
    with pytest.raises(LedgerWentBack):
        history.observe(history.known(), read(8, lane=1))


def test_another_incarnation_is_another_ledger_however_far_it_is() -> None:
    history = History()
    sent = history.known()
    history.observe(history.known(), read(5))
    with pytest.raises(LedgerWentBack) as caught:
        history.observe(sent, read(500, incarnation=OTHER))
    assert caught.value.facts["incarnation_seen"] == INCARNATION.hex()
    assert caught.value.facts["incarnation_told"] == OTHER.hex()


def test_once_it_went_back_it_stays_so() -> None:
    history = History()
    history.observe(history.known(), read(5))
    history.check()
    with pytest.raises(LedgerWentBack):
        history.observe(history.known(), read(4))
    with pytest.raises(LedgerWentBack):
        history.check()


def test_operations_and_reads_of_all_services_say_where_they_stand() -> None:
    position = types_pb2.LedgerPosition(incarnation=INCARNATION, lane=0, position=4)
    outcome = types_pb2.Outcome(ledger=position)
    for response in (
        wire.SpendResponse(outcome=outcome),
        wire.LedgerServiceGetBudgetResponse(ledger=position),
        audit.GetBudgetResponse(ledger=position),
        read(4),
    ):
        history = History()
        history.observe(history.known(), read(5))
        with pytest.raises(LedgerWentBack):
            history.observe(history.known(), response)


def test_what_does_not_say_where_it_stands_says_nothing() -> None:
    history = History()
    history.observe(history.known(), read(5))
    for response in (audit.ListBudgetsResponse(), wire.ListHoldsResponse(), wire.SpendResponse()):
        history.observe(history.known(), response)
    assert history.went_back is None


def test_what_is_remembered_is_bounded() -> None:
    history = History()
    for lane in range(2 * LANES_MAX):
        history.observe(history.known(), read(1, lane=lane))
    assert len(history.known().positions) == LANES_MAX


def test_it_is_no_answer_that_permits_to_spend() -> None:
    error = LedgerWentBack("back", facts={"lane": "3"})
    assert isinstance(error, Unavailable)
    assert "operator" in error.remedy
    assert pickle.loads(pickle.dumps(error)).lane == 3  # noqa: S301 - our own


# --- nothing more is sent, and everybody is told ---


def test_whoever_waits_in_whatever_place_is_told(bench: Bench) -> None:
    root, token = bench.root(token=False), bench.root()
    restore = bench.ledger.backup()
    bench.answer_all(*(bench.spend(root, 1) for _ in range(5)))
    holding = bench.reserve(root, 90)
    bench.answer(bench.send())
    waiting = bench.reserve(root, 50, wait=60)
    bench.answer(bench.send())
    pausing = bench.spend(root, 2)
    bench.lose_request(bench.send())
    pausing_in_line = bench.spend(token, 2)
    bench.lose_request(bench.send())
    flying = bench.spend(root, 3)
    other_flight = bench.send()
    noticing = bench.spend(root, 4)
    batch = bench.send()
    behind = bench.spend(token, 5)
    restore()
    bench.answer(batch)
    assert bench.silent()
    bench.answer(other_flight)
    assert bench.silent()
    for asking in (waiting, pausing, pausing_in_line, flying, noticing, behind):
        assert isinstance(asking.told.error, LedgerWentBack), asking.operation.kind
        assert asking.told.answers == 1
    assert holding.told.error is None
    assert bench.brain.wake_at() is None
    assert bench.brain.idle
    late = bench.spend(token, 6)
    assert bench.silent()
    assert isinstance(late.told.error, LedgerWentBack)


def test_who_waits_behind_one_that_was_woken_is_told_once(bench: Bench) -> None:
    root = bench.root(token=False)
    restore = bench.ledger.backup()
    bench.answer_all(*(bench.spend(root, 1) for _ in range(5)))
    held = bench.reserve(root, 95)
    bench.answer(bench.send())
    woken, waiting = bench.reserve(root, 90, wait=60), bench.reserve(root, 95, wait=60)
    bench.answer(bench.send())
    bench.settle(held, 0)
    noticing = bench.send(), bench.spend(root, 1)
    bench.answer(noticing[0])
    batch = bench.send()
    restore()
    bench.answer(batch)
    assert bench.silent()
    for asking in (woken, waiting, noticing[1]):
        assert asking.told.answers == 1
        assert asking.told.error is not None
    assert bench.brain.idle
    assert bench.brain.unresolved == 0


def test_what_was_refused_and_might_win_late_is_not_undone_any_more(bench: Bench) -> None:
    root = bench.root(50)
    restore = bench.ledger.backup()
    bench.answer_all(*(bench.spend(root, 1) for _ in range(5)))
    refused = bench.reserve(root, 60)
    bench.lose_request(bench.send())
    bench.now += 0.1
    bench.answer(bench.send())
    assert refused.told.error is not None
    assert bench.brain.wake_at() is not None
    bench.spend(root, 1)
    batch = bench.send()
    restore()
    bench.answer(batch)
    assert bench.silent()
    assert bench.brain.wake_at() is None
    assert bench.brain.idle


def test_an_accepted_answer_from_the_past_is_not_believed_either(bench: Bench) -> None:
    root = bench.root()
    bench.answer_all(bench.spend(root, 1))
    restore = bench.ledger.backup()
    bench.answer_all(*(bench.reserve(root, 1) for _ in range(5)))
    secret = root.line.secret
    restore()
    principal = bench.root(token=False)
    asked = bench.reserve(principal, 1)
    bench.answer(bench.send())
    assert not asked.told.resolved
    assert isinstance(asked.told.error, LedgerWentBack)
    assert asked.told.error.operation_id is not None
    assert root.line.secret == secret


@pytest.fixture
def bench() -> Bench:
    return Bench()


# --- both clients ---


async def test_the_first_answer_of_a_ledger_that_went_back_ends_the_client(
    ledger: Ledger, client: Client, run: Budget, root: Budget
) -> None:
    restore = ledger.backup()
    hold = await run.reserve(10)
    await run.spend(1)
    restore()
    with pytest.raises(LedgerWentBack) as caught:
        await root.spend(1)
    assert caught.value.seen == caught.value.told + 1
    asked = len(ledger.batches)
    # Also when it has caught up.
    ledger.position += 10
    with pytest.raises(LedgerWentBack):
        await run.spend(1)
    with pytest.raises(LedgerWentBack):
        await hold.settle(1)
    with pytest.raises(LedgerWentBack):
        await client.open("acme")
    with pytest.raises(LedgerWentBack):
        await run.hand_over()
    with pytest.raises(LedgerWentBack):
        await client.admin.top_up("acme", 1)
    assert len(ledger.batches) == asked
    await client.close()


async def test_a_token_that_a_ledger_has_forgotten_is_not_told_as_unknown(
    ledger: Ledger, run: Budget
) -> None:
    restore = ledger.backup()
    await run.spend(1)
    restore()
    with pytest.raises(LedgerWentBack):
        await run.spend(1)


async def test_a_read_notices_it_too(
    ledger: Ledger, client: Client, root: Budget, run: Budget
) -> None:
    restore = ledger.backup()
    await root.spend(1)
    restore()
    with pytest.raises(LedgerWentBack):
        await root.balances()
    with pytest.raises(LedgerWentBack):
        await root.spend(1)


async def test_an_operators_call_notices_it_too(
    ledger: Ledger, client: Client, root: Budget
) -> None:
    restore = ledger.backup()
    for _ in range(3):
        await client.admin.top_up(root.ref, 1)
    restore()
    with pytest.raises(LedgerWentBack):
        await client.admin.top_up(root.ref, 1)


async def test_another_client_begins_anew(
    ledger: Ledger, served: Serving, client: Client, root: Budget
) -> None:
    restore = ledger.backup()
    await root.spend(1)
    restore()
    with pytest.raises(LedgerWentBack):
        await root.info()
    async with connect(served.target) as another:
        assert (await (await another.open("acme")).balances()).spent == 0


async def test_answers_that_overtake_each_other_trouble_nobody(
    ledger: Ledger, root: Budget
) -> None:
    gate = ledger.hold_up()
    first = asyncio.create_task(root.spend(1))
    await asyncio.to_thread(gate.reached.wait, 10)
    for _ in range(3):
        await root.spend(1)
    assert gate.until is not None
    gate.until.set()
    assert (await first).balances.spent == 1
    await root.spend(1)


def test_threads_are_told_as_tasks_are(
    ledger: Ledger, blocking: peculium.Client, blocking_run: peculium.Budget
) -> None:
    restore = ledger.backup()
    hold = blocking_run.reserve(10)
    blocking_run.spend(1)
    restore()
    with pytest.raises(LedgerWentBack):
        blocking.open("acme")
    # Also when it has caught up.
    ledger.position += 10
    with pytest.raises(LedgerWentBack):
        blocking.open("acme")
    with pytest.raises(LedgerWentBack):
        blocking_run.spend(1)
    with pytest.raises(LedgerWentBack):
        hold.settle(1)


# --- a real ledger ---


@pytest.mark.timeout(180)
async def test_a_database_that_was_restored_to_its_past_is_noticed(
    start_server: StartServer, postgres: Server
) -> None:
    with postgres.fresh_database(postgres.migrated_template()) as url:
        server = start_server("--database-url", url)
        address = server.address
        async with connect(address, timeout=60) as client, connect(address, timeout=60) as agent:
            await client.admin.grant("acme", unit="calls", amount=100, holder="dev")
            acme = await client.open("acme")
            [made] = await acme.delegate([Child("run", 10)])
            run = await agent.accept(made.capability)
            await acme.spend(1)
            server.stop()
            source = urlsplit(url).path.removeprefix("/")
            with postgres.fresh_database(source) as backup:
                server = await asyncio.to_thread(
                    start_server, "--database-url", url, listen=address
                )
                # A restart is no going back.
                await acme.spend(1)
                await run.spend(1)
                assert (await acme.balances()).spent == 2
                await asyncio.to_thread(server.stop)
                server = await asyncio.to_thread(
                    start_server, "--database-url", backup, listen=address
                )
                with pytest.raises(LedgerWentBack) as caught:
                    await acme.balances()
                assert caught.value.seen == caught.value.told + 2
                with pytest.raises(LedgerWentBack):
                    await acme.reserve(1)
                with pytest.raises(LedgerWentBack):
                    await run.spend(1)
                async with connect(address, timeout=60) as another:
                    assert (await (await another.open("acme")).balances()).spent == 1
                await asyncio.to_thread(server.stop)
