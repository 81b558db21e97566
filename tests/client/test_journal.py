"""What a process wrote down before it died is what its successor goes on with."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

import peculium
from peculium import (
    Child,
    Journal,
    JournalLocked,
    JournalUnreadable,
    LedgerUnavailable,
    OutcomeUnknown,
    TokenConsumed,
    Unavailable,
)
from peculium.aio import Budget, Client, Resumed, connect
from peculium.errors import BudgetExhausted, Invalid, Malformed, NotSupported
from peculium.v1 import ledger_service_pb2 as wire
from tests.client.ledger import Ledger, Serving
from tests.faults.proxy import Faults, Proxy
from tests.server import RunningServer

KEY = bytes(range(32))
SECONDS_MAX = 60


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


class Life:
    """One process after the other, each with the same journal: here they are clients that just stop."""

    def __init__(self, served: Serving, path: Path) -> None:
        self._served = served
        self._path = path
        self._lives: list[tuple[Client, Journal]] = []

    async def begin(self) -> Client:
        """Start a process."""
        journal = Journal(self._path, key=KEY)
        client = connect(self._served.target, journal=journal)
        await client.__aenter__()
        self._lives.append((client, journal))
        return client

    def end(self) -> None:
        """Let it die: nothing more is written, and its lock is gone."""
        _, journal = self._lives[-1]
        if journal._file >= 0:
            journal._release()

    async def next(self) -> tuple[Client, Resumed]:
        """Let it die, start another one, and take over what was left."""
        self.end()
        client = await self.begin()
        return client, await client.resume()

    async def close(self) -> None:
        for client, _ in self._lives:
            await client.close()


@pytest.fixture
async def life(served: Serving, root: Budget, path: Path) -> AsyncIterator[Life]:
    lives = Life(served, path)
    yield lives
    await lives.close()


async def taken(client: Client, root: Budget, name: str = "job") -> Budget:
    [made] = await root.delegate([Child(name, 100)])
    return await client.accept(made.capability.reveal())


# --- what a successor gets ---


async def test_budgets_and_holds_go_on_where_they_were(
    ledger: Ledger, root: Budget, life: Life
) -> None:
    client = await life.begin()
    job = await taken(client, root)
    await job.spend(1)
    first, second, third = [await job.reserve(10 + number) for number in range(3)]
    await first.settle(5)
    await second.settle(2, keep_open=True)
    acme = await client.open("acme")
    of_principal = await acme.reserve(7)
    _, resumed = await life.next()
    [budget] = resumed.budgets
    assert str(budget.ref) == "acme/job"
    assert [hold.hold_id for hold in resumed.holds] == [
        second.hold_id,
        third.hold_id,
        of_principal.hold_id,
    ]
    assert [hold.amount for hold in resumed.holds] == [11, 12, 7]
    assert resumed.capabilities == ()
    for hold in resumed.holds:
        await hold.settle(1)
    await budget.spend(1)
    assert (await budget.balances()).spent == 1 + 5 + 2 + 1 + 1 + 1
    assert ledger.live_holds("acme/job") == []
    assert ledger.live_holds("acme") == []


async def test_what_has_ended_is_not_left(ledger: Ledger, root: Budget, life: Life) -> None:
    client = await life.begin()
    job = await taken(client, root)
    async with job.reserve(1) as hold:
        await hold.release()
    await job.give_back()
    other = await taken(client, root, "other")
    (await other.hand_over()).reveal()
    _, resumed = await life.next()
    assert resumed == Resumed((), (), ())


async def test_a_budget_that_somebody_else_took_meanwhile_is_not_given_back(
    client: Client, root: Budget, life: Life, path: Path
) -> None:
    mine = await life.begin()
    await taken(mine, root)
    life.end()
    await client.claim("acme/job", if_held=peculium.FENCE)
    successor, resumed = await life.next()
    assert resumed.budgets == ()
    await successor.close()
    assert names(path) == []


async def test_capabilities_that_were_not_handed_over_are_still_there(
    root: Budget, life: Life
) -> None:
    client = await life.begin()
    job = await taken(client, root)
    await job.info()
    revealed, kept = await job.delegate([Child("revealed", 1), Child("kept", 2)])
    revealed.capability.reveal()
    other = await taken(client, root, "other")
    await other.info()
    await other.hand_over()
    await job.spend(1)
    successor, resumed = await life.next()
    assert [str(each) for each in resumed.capabilities] == [
        "capability for acme/job/kept",
        "capability for acme/other",
    ]
    child = await successor.accept(resumed.capabilities[0])
    assert (await child.balances()).available == kept.granted


async def test_a_block_of_its_own_child_goes_on(root: Budget, life: Life) -> None:
    client = await life.begin()
    acme = await client.open("acme")
    entered = acme.delegate_here(10, name="step")
    await entered.__aenter__()
    await acme.spend(1)
    _, resumed = await life.next()
    [budget] = resumed.budgets
    assert str(budget.ref) == "acme/step"
    await budget.give_back()


async def test_a_recovered_budget_and_reattached_holds_are_left_too(
    client: Client, root: Budget, life: Life
) -> None:
    theirs = await taken(client, root)
    await theirs.reserve(10)
    mine = await life.begin()
    job = await mine.claim("acme/job", if_held=peculium.FENCE)
    await job.reattach()
    _, resumed = await life.next()
    [budget], [hold] = resumed.budgets, resumed.holds
    assert hold.amount == 10
    await hold.settle(3)
    assert (await budget.balances()).spent == 3


# --- what became of what was on its way ---


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("how", ["token", "principal"])
async def test_an_operation_of_unknown_outcome_is_found_out_and_never_done(
    ledger: Ledger, root: Budget, life: Life, *, how: str, done: bool
) -> None:
    client = await life.begin()
    budget = await taken(client, root) if how == "token" else await client.open("acme")
    await budget.spend(1)
    path = "acme/job" if how == "token" else "acme"
    available = ledger.budget(path).money.available
    ledger.hold_up(done=done)
    with pytest.raises(OutcomeUnknown):
        await budget.reserve(40, timeout=0.2)
    recorded = ledger.recorded()
    successor, resumed = await life.next()
    assert ledger.recorded() == recorded
    assert [hold.amount for hold in resumed.holds] == ([40] if done else [])
    assert ledger.budget(path).money.available == available - 40 * done
    if how == "token":
        [budget] = resumed.budgets
    else:
        budget = await successor.open("acme")
    for hold in resumed.holds:
        await hold.release()
    await budget.spend(1)
    assert (await budget.balances()).available == available - 1


@pytest.mark.parametrize("done", [0, 1, 2, 3])
async def test_of_a_chain_that_was_cut_anywhere_the_token_is_found(
    ledger: Ledger, root: Budget, life: Life, *, done: int
) -> None:
    client = await life.begin()
    job = await taken(client, root)
    before = len(ledger.batches)
    gate = ledger.hold_up(done=False)
    spending = [asyncio.create_task(job.spend(amount, timeout=20)) for amount in (1, 2, 4)]
    await asyncio.to_thread(ledger.wait_for_batches, before + 1)
    life.end()
    # The first of them happened, and the process died before it heard of any.
    cut = wire.BatchRequest(operations=list(ledger.batches[-1].operations)[:done])
    if done:
        ledger.answer(cut)
    _, resumed = await life.next()
    [budget] = resumed.budgets
    assert (await budget.balances()).spent == (0, 1, 3, 7)[done]
    await budget.spend(10)
    assert gate.until is not None
    gate.until.set()
    for task in spending:
        task.cancel()


@pytest.mark.parametrize("done", [True, False])
async def test_an_acceptance_of_unknown_outcome_is_found_out(
    ledger: Ledger, root: Budget, life: Life, *, done: bool
) -> None:
    client = await life.begin()
    [made] = await root.delegate([Child("job", 100)])
    text = made.capability.reveal()
    ledger.hold_up(done=done)
    with pytest.raises(OutcomeUnknown):
        await client.accept(text, timeout=0.2)
    _, resumed = await life.next()
    # It has the token that was accepted, or the one that it was to become.
    [budget] = resumed.budgets
    await budget.spend(1)


@pytest.mark.parametrize("done", [True, False])
async def test_a_settle_that_was_not_heard_is_done(
    ledger: Ledger, root: Budget, life: Life, *, done: bool
) -> None:
    client = await life.begin()
    job = await taken(client, root)
    hold = await job.reserve(40)
    ledger.hold_up(done=done)
    with pytest.raises(OutcomeUnknown):
        await hold.settle(13, timeout=0.2)
    _, resumed = await life.next()
    assert resumed.holds == ()
    [budget] = resumed.budgets
    assert (await budget.balances()).spent == 13


async def test_a_settle_whose_hold_somebody_ended_is_given_up(
    ledger: Ledger, root: Budget, life: Life
) -> None:
    client = await life.begin()
    acme = await client.open("acme")
    hold = await acme.reserve(40)
    ledger.hold_up(done=False)
    with pytest.raises(OutcomeUnknown):
        await hold.settle(13, timeout=0.2)
    life.end()
    await root.resolve(hold.hold_id, 20, "the bill says so")
    _, resumed = await life.next()
    assert resumed.holds == ()
    assert (await root.balances()).spent == 20


async def test_what_was_refused_stays_refused(ledger: Ledger, root: Budget, life: Life) -> None:
    """Also if it could be done by now, and if its refusal was not written down in time."""
    client = await life.begin()
    job = await taken(client, root)
    with pytest.raises(BudgetExhausted):
        await job.spend(150)
    life.end()
    await root.fund(job.ref, 100)
    _, resumed = await life.next()
    [budget] = resumed.budgets
    assert (await budget.balances()).spent == 0


@pytest.mark.parametrize("how", ["token", "principal"])
async def test_a_straggler_that_wins_after_it_was_asked_about_leaves_no_hold(
    ledger: Ledger, root: Budget, life: Life, how: str
) -> None:
    client = await life.begin()
    budget = await taken(client, root) if how == "token" else await client.open("acme")
    ledger.hold_up(done=False)
    with pytest.raises(OutcomeUnknown):
        await budget.reserve(40, timeout=0.2)
    straggler = ledger.batches[-1]
    successor, resumed = await life.next()
    ledger.answer(straggler)
    path = "acme/job" if how == "token" else "acme"
    assert len(ledger.live_holds(path)) == 1
    for each in resumed.budgets:
        await each.spend(1)
    await successor.close()
    assert ledger.live_holds(path) == []


async def test_what_is_not_told_to_this_principal_any_more_is_left_alone(
    ledger: Ledger, client: Client, root: Budget, life: Life
) -> None:
    """The hold may be there, and its call may have been made."""
    mine = await life.begin()
    acme = await mine.open("acme")
    ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        await acme.reserve(40, timeout=0.2)
    life.end()
    await client.admin.recover("acme", holder="somebody-else")
    successor, resumed = await life.next()
    assert resumed == Resumed((), (), ())
    assert successor._sender._brain.wake_at() is None
    assert len(ledger.live_holds("acme")) == 1


async def test_what_was_refused_for_a_token_that_is_anothers_by_now_is_forgotten(
    ledger: Ledger, client: Client, root: Budget, life: Life, path: Path
) -> None:
    mine = await life.begin()
    job = await taken(mine, root)
    ledger.lose_requests()
    with pytest.raises(BudgetExhausted):
        await job.reserve(150)
    await client.recover("acme/job")
    ledger.lose_requests()
    with pytest.raises(TokenConsumed):
        await job.spend(1)
    await mine.close()
    journal = Journal(path, key=KEY)
    assert journal.left.refused == []
    journal.close()


@pytest.mark.parametrize("lose", ["requests", "answers"])
async def test_a_ledger_that_does_not_answer_is_asked_another_time(
    ledger: Ledger, root: Budget, life: Life, lose: str
) -> None:
    client = await life.begin()
    job = await taken(client, root)
    ledger.hold_up()
    with pytest.raises(OutcomeUnknown):
        await job.reserve(40, timeout=0.2)
    life.end()
    successor = await life.begin()
    (ledger.lose_requests if lose == "requests" else ledger.lose_answers)(1000)
    with pytest.raises(Unavailable):
        await successor.resume(timeout=0.3)
    ledger.faults.clear()

    async def answered() -> bool:
        return successor._sender._brain.idle

    # What was asked is answered by then, and is no reason to give the hold back.
    await until(answered)
    resumed = await successor.resume()
    [budget], [hold] = resumed.budgets, resumed.holds
    await hold.settle(1)
    await budget.spend(1)
    assert await successor.resume() == Resumed((), (), ())


async def test_what_nobody_resumed_is_left_to_the_next(root: Budget, life: Life) -> None:
    client = await life.begin()
    await taken(client, root)
    for _ in range(3):
        life.end()
        await life.begin()
    _, resumed = await life.next()
    assert len(resumed.budgets) == 1


async def test_who_has_no_journal_resumes_nothing(client: Client, root: Budget) -> None:
    with pytest.raises(Invalid, match="no journal"):
        await client.resume()


def test_threads_resume_as_tasks_do(
    served: Serving, blocking_root: peculium.Budget, path: Path
) -> None:
    [made] = blocking_root.delegate([Child("job", 100)])
    journal = Journal(path, key=KEY)
    client = peculium.connect(served.target, journal=journal)
    job = client.accept(made.capability.reveal())
    job.reserve(10)
    job.spend(1)
    journal._release()
    with peculium.connect(served.target, journal=Journal(path, key=KEY)) as successor:
        resumed = successor.resume()
        [budget], [hold] = resumed.budgets, resumed.holds
        hold.settle(2)
        assert budget.balances().spent == 3
    client.close()


# --- the file ---


async def filled(served: Serving, root: Budget, path: Path) -> bytes:
    """A journal of a closed client that holds something; its contents."""
    async with connect(served.target, journal=Journal(path, key=KEY)) as client:
        job = await taken(client, root)
        for _ in range(3):
            await job.reserve(1)
    return path.read_bytes()


def names(path: Path, key: bytes = KEY) -> list[str]:
    """What a journal knows."""
    journal = Journal(path, key=key)
    try:
        return [token.name for token in journal.left.tokens.values()]
    finally:
        journal.close()


async def test_only_its_owner_may_read_it_and_there_is_no_secret_in_it(
    served: Serving, root: Budget, path: Path
) -> None:
    async with connect(served.target, journal=Journal(path, key=KEY)) as client:
        job = await taken(client, root)
        hold = await job.reserve(1)
        assert path.stat().st_mode & 0o777 == 0o600
        data = path.read_bytes()
        for secret in (job._line.secret, hold._line.secret):
            assert secret is not None
            assert secret not in data
            assert secret.hex().encode() not in data
        assert b"acme" not in data
    path.chmod(0o640)
    with pytest.raises(JournalUnreadable, match="0600"):
        Journal(path, key=KEY)
    path.chmod(0o600)
    assert len(names(path)) == 2


async def test_another_key_opens_nothing_and_changes_nothing(
    served: Serving, root: Budget, path: Path
) -> None:
    data = await filled(served, root, path)
    with pytest.raises(JournalUnreadable):
        Journal(path, key=Journal.new_key())
    assert path.read_bytes() == data
    assert len(names(path)) == 4


async def test_whatever_is_changed_in_it_is_noticed(
    served: Serving, root: Budget, path: Path
) -> None:
    data = await filled(served, root, path)
    known = len(names(path))
    data = path.read_bytes()
    chance = Random(7)  # noqa: S311 - the same places each time
    for at in [*range(60), *(chance.randrange(len(data)) for _ in range(60))]:
        changed = bytearray(data)
        changed[at] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            found = names(path)
        except JournalUnreadable:
            continue
        # At worst it looks as if its end was not written.
        assert len(found) < known, at


async def test_records_cannot_be_swapped_repeated_left_out_or_taken_from_elsewhere(
    served: Serving, root: Budget, path: Path, tmp_path: Path
) -> None:
    await filled(served, root, path)
    names(path)
    data = path.read_bytes()
    other = tmp_path / "other"
    other.write_bytes(data)
    other.chmod(0o600)
    names(other)
    head, *records = pieces(data)
    _, *strangers = pieces(other.read_bytes())
    first, second, third, *rest = records
    for forged in (
        [second, first, third, *rest],
        [first, third, second, *rest],
        [first, first, second, third, *rest],
        [first, third, *rest],
        [first, strangers[1], third, *rest],
    ):
        path.write_bytes(b"".join([head, *forged]))
        with pytest.raises(JournalUnreadable):
            Journal(path, key=KEY)


def pieces(data: bytes) -> list[bytes]:
    """The header and the records of a file."""
    found, at = [data[:40]], 40
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4])
        found.append(data[at:end])
        at = end
    return found


async def test_a_record_that_a_crash_left_half_written_is_ignored(
    served: Serving, root: Budget, path: Path
) -> None:
    await filled(served, root, path)
    known = len(names(path))
    data = path.read_bytes()
    last = len(pieces(data)[-1])
    for cut in (1, 3, 4, 5, last - 5, last - 1):
        path.write_bytes(data[: len(data) - cut])
        assert len(names(path)) == known - 1
        path.write_bytes(data + bytes(cut))
        assert len(names(path)) == known
    path.write_bytes(data[:-5] + bytes(5))
    assert len(names(path)) == known - 1


@pytest.mark.parametrize("data", [b"PECJRNL2" + bytes(100), b"PECJRNL1", b"something else"])
def test_what_is_no_journal_is_not_overwritten(path: Path, data: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(data)
    with pytest.raises(JournalUnreadable):
        Journal(path, key=KEY)
    assert path.read_bytes() == data


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Journal(path, key=KEY)


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33), "x" * 32])
def test_a_key_is_of_32_bytes(path: Path, key: Any) -> None:
    with pytest.raises(Malformed) as caught:
        Journal(path, key=key)
    assert caught.value.field == "key"
    assert not path.exists()


def test_keys_are_different() -> None:
    assert len({Journal.new_key() for _ in range(10)}) == 10


def test_a_journal_has_one_process_and_one_client(path: Path) -> None:
    journal = Journal(path, key=KEY)
    assert repr(journal) == f"<Journal {path}>"
    with pytest.raises(JournalLocked):
        Journal(path, key=KEY)
    code = (
        "import sys, peculium\n"
        "try:\n    peculium.Journal(sys.argv[1], key=bytes(range(32)))\n"
        "except peculium.JournalLocked:\n    print('locked')"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert told.stdout == "locked\n"
    peculium.connect("127.0.0.1:1", journal=journal)
    with pytest.raises(JournalLocked):
        peculium.connect("127.0.0.1:1", journal=journal)
    journal.close()
    Journal(path, key=KEY).close()


def test_a_child_that_was_forked_does_not_keep_its_parents_journal(path: Path) -> None:
    journal = Journal(path, key=KEY)
    reading, writing = os.pipe()
    begun, begin = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.write(begin, b"1")
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    os.read(begun, 1)
    journal.close()
    with contextlib.closing(Journal(path, key=KEY)):
        os.close(writing)
        assert os.waitpid(child, 0)[1] == 0
    for end in (begun, begin):
        os.close(end)


def test_who_opens_a_file_that_is_being_renewed_does_not_get_the_older_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path, key=KEY)
    lock = fcntl.flock

    def lock_too_late(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        journal._sealing = journal._renew()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    with pytest.raises(JournalLocked):
        Journal(path, key=KEY)
    journal.close()


async def test_it_stays_small_and_keeps_what_matters(
    served: Serving, root: Budget, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peculium.journal._COMPACT_BYTES_MIN", 20_000)
    async with connect(served.target, journal=Journal(path, key=KEY)) as client:
        job = await taken(client, root)
        kept = await job.reserve(1)
        sizes = []
        for _ in range(150):
            hold = await job.reserve(1)
            await hold.release()
            sizes.append(path.stat().st_size)
        assert max(sizes) < 40_000
        assert sizes[-1] < sum(sizes)
    async with connect(served.target, journal=Journal(path, key=KEY)) as client:
        resumed = await client.resume()
        [budget], [hold] = resumed.budgets, resumed.holds
        assert hold.hold_id == kept.hold_id
        await budget.spend(1)


async def test_nothing_is_sent_before_it_is_written(
    ledger: Ledger, root: Budget, life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await life.begin()
    job = await taken(client, root)
    order: list[str] = []
    sync, answer = os.fsync, ledger.answer

    def synced(file: int) -> None:
        order.append("written")
        sync(file)

    def answered(*arguments: Any) -> wire.BatchResponse:
        order.append("sent")
        return answer(*arguments)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(ledger, "answer", answered)
    await job.spend(1)
    await asyncio.gather(*(job.reserve(1) for _ in range(50)))
    assert order == ["written", "sent", "written", "sent"]


async def test_an_operation_is_written_once_however_often_it_is_sent(
    ledger: Ledger, root: Budget, life: Life, path: Path
) -> None:
    client = await life.begin()
    job = await taken(client, root)
    sizes = [path.stat().st_size]
    for lost in (0, 0, 3):
        ledger.lose_answers(lost)
        await job.spend(1)
        sizes.append(path.stat().st_size)
    _, once, often = [after - before for before, after in pairwise(sizes)]
    assert abs(often - once) < once / 2


async def test_what_is_known_is_not_asked_again(
    ledger: Ledger, root: Budget, life: Life, path: Path
) -> None:
    client = await life.begin()
    job = await taken(client, root)
    ledger.lose_requests()
    with pytest.raises(BudgetExhausted):
        await job.spend(150)
    with pytest.raises(BudgetExhausted):
        await job.spend(150)
    await job.spend(1)
    await client.close()
    journal = Journal(path, key=KEY)
    assert (journal.left.unknown, journal.left.refused) == ([], [])
    journal.close()


async def test_what_was_refused_and_may_win_late_is_left_too(
    ledger: Ledger, root: Budget, life: Life
) -> None:
    client = await life.begin()
    job = await taken(client, root)
    ledger.lose_requests()
    with pytest.raises(BudgetExhausted):
        await job.reserve(150)
    straggler = ledger.batches[-1]
    await client.close()
    await root.fund(job.ref, 100)
    successor, resumed = await life.next()
    [budget] = resumed.budgets
    ledger.answer(straggler)
    assert len(ledger.live_holds("acme/job")) == 1
    await budget.spend(1)
    await successor.close()
    assert ledger.live_holds("acme/job") == []


async def test_without_a_disk_nothing_is_sent(
    ledger: Ledger, root: Budget, life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await life.begin()
    job = await taken(client, root)
    before = len(ledger.batches)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(LedgerUnavailable, match="No space left"):
            await job.spend(1)
    # What is on the disk is not known by then, so it is not continued.
    with pytest.raises(LedgerUnavailable, match="could not be written before"):
        await job.spend(1)
    assert len(ledger.batches) == before


def test_without_the_extra_the_client_works_and_a_journal_says_what_is_missing(path: Path) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "import peculium\n"
        "peculium.connect('127.0.0.1:1').close()\n"
        "try:\n    peculium.Journal(sys.argv[1], key=bytes(32))\n"
        "except peculium.errors.NotSupported as error:\n    print(error)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert told.stdout == "a journal needs the package's extra `journal`\n"
    assert issubclass(NotSupported, Invalid)


# --- a process that is killed ---

DYING = """
import sys
import peculium

target, path, capability = sys.argv[1:]
client = peculium.connect(target, timeout=60, journal=peculium.Journal(path, key=bytes(range(32))))
job = client.accept(capability)
holds = [job.reserve(10) for _ in range(3)]
holds[0].settle(4)
print("in flight", flush=True)
sys.stdin.readline()
job.reserve(7)
print("answered", flush=True)
"""


@contextlib.contextmanager
def dying(target: str, path: Path, capability: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", DYING, target, str(path), capability],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    over = time.monotonic() + SECONDS_MAX
    while not await condition():
        assert time.monotonic() < over, "it never came to be so"
        await asyncio.sleep(0.01)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("done", [True, False])
async def test_a_process_that_was_killed_is_gone_on_with(
    running_server: RunningServer, path: Path, *, done: bool
) -> None:
    """Without a holder, on whose word it could be recovered: by its journal alone."""
    async with (
        Proxy(running_server.address, Random(1)) as proxy,  # noqa: S311 - faults by seed
        connect(running_server.address, timeout=SECONDS_MAX) as owner,
    ):
        await owner.admin.grant("acme", unit="calls", amount=1000, holder="dev")
        acme = await owner.open("acme")
        [made] = await acme.delegate([Child("job", 100)])
        with dying(proxy.address, path, made.capability.reveal()) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            assert await asyncio.to_thread(process.stdout.readline) == "in flight\n"
            size = path.stat().st_size
            lost = Faults(swallow=True)
            proxy.trouble(**({"down": lost} if done else {"up": lost}))
            process.stdin.write("\n")
            process.stdin.flush()

            async def sent() -> bool:
                live = (await owner.audit.budget("acme/job")).holds_live
                return live == 3 if done else path.stat().st_size > size and proxy.cuts > 0

            await until(sent)
            process.kill()
            process.wait()
        async with connect(running_server.address, journal=Journal(path, key=KEY)) as successor:
            resumed = await successor.resume()
            [job] = resumed.budgets
            assert [hold.amount for hold in resumed.holds] == [10, 10, 7][: 2 + done]
            for hold in resumed.holds:
                await hold.settle(2)
            balances = await job.balances()
            spent = 4 + 2 * (2 + done)
            assert (balances.spent, balances.held, balances.available) == (spent, 0, 100 - spent)
            await job.give_back()
        *_, verdict = [progress async for progress in owner.audit.verify()]
        assert verdict.verified
