"""Clocks that are off or jump: of servers, clients and the database."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import clock
from tests.faults.clock import HOUR, OFF, Fleet, Wrong
from tests.faults.liar import Liar, library
from tests.server import RunningServer, StartServer, starting

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform != "linux", reason="clocks lie by what Linux preloads"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where whoever may run PostgreSQL can read."""
    made = Path(tempfile.mkdtemp(prefix="peculium-clock-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def start_lied_to(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers that believe a liar: as programs of their own, since that is when it is loaded."""
    with starting(tmp_path) as start:

        def start_lied_to(liar: Liar, *flags: str) -> RunningServer:
            server = start(*flags, **liar.environment())
            assert str(library()) in Path(f"/proc/{server.process.pid}/maps").read_text()
            return server

        yield start_lied_to


@pytest.fixture
def fleet(start_lied_to: StartServer, database: str, folder: Path) -> Fleet:
    """A server that is an hour ahead, and one whose clock jumps, beginning an hour behind."""
    liars = [Liar.off_by(seconds, folder / f"clock-{number}") for number, seconds in enumerate(OFF)]
    servers = [start_lied_to(liar, "--database-url", database) for liar in liars]
    return Fleet([server.address for server in servers], database, liars[-1])


def test_a_process_believes_its_clock_and_waits_by_a_true_one(folder: Path) -> None:
    """Otherwise nothing here would test anything."""
    liar = Liar.off_by(-HOUR, folder / "clock")
    script = (
        "import json, sys, threading, time\n"
        "def look():\n"
        "    print(json.dumps(time.time()), flush=True)\n"
        "    sys.stdin.readline()\n"
        "look()\n"
        "look()\n"
        "begun = time.monotonic()\n"
        "threading.Event().wait(0.2)\n"
        "print(json.dumps(time.monotonic() - begun), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **liar.environment()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for seconds, following in ((-HOUR, HOUR), (HOUR, -HOUR)):
            said = json.loads(process.stdout.readline())
            assert abs(said - time.time() - seconds) < 60
            liar.set(following)
            process.stdin.write("\n")
            process.stdin.flush()
        assert 0.2 <= json.loads(process.stdout.readline()) < 60


async def test_servers_whose_clocks_are_off_serve_by_the_databases(fleet: Fleet) -> None:
    await clock.money_moves_while_clocks_jump(fleet, "money")
    await clock.recorded_times_are_the_databases(fleet, "times")
    await clock.age_is_told_by_the_database(fleet, "age")
    await clock.waiting_is_not_measured_by_clocks_that_jump(fleet, "waiting")

    entries = await clock.entries_of(fleet.addresses[0], "times")
    with pytest.raises(Wrong, match="follows"):
        clock.never_back(entries[::-1])


@pytest.mark.parametrize("seconds", OFF)
async def test_a_server_whose_clock_is_off_ends_holds_and_leases_by_the_databases(
    start_lied_to: StartServer, database: str, folder: Path, seconds: float
) -> None:
    liar = Liar.off_by(seconds, folder / "clock")
    server = start_lied_to(liar, "--database-url", database, "--sweep-seconds", "1")
    assert await clock.holds_and_leases_end_by_the_database(
        Fleet([server.address], database), "acme"
    )


@pytest.mark.parametrize("seconds", OFF)
async def test_a_client_whose_clock_is_off_is_told_so_and_spends_by_token_all_the_same(
    start_server: StartServer, database: str, folder: Path, seconds: float
) -> None:
    fleet = Fleet([start_server("--database-url", database).address], database)
    liar = Liar.off_by(seconds, folder / "clock")
    assert await clock.a_client_whose_clock_is_off_is_told_so(fleet, "acme", seconds, liar)


async def test_recorded_times_do_not_go_back_with_the_databases_clock(folder: Path) -> None:
    liar = Liar.off_by(0, folder / "clock")
    with contextlib.ExitStack() as open_:
        dsn = await asyncio.to_thread(open_.enter_context, clock.lying_postgres(folder, liar))
        start = open_.enter_context(starting(folder))
        server = await asyncio.to_thread(start, "--database-url", dsn)
        fleet = Fleet([server.address], dsn)
        assert await clock.times_do_not_go_back_with_the_database(fleet, "acme", liar)
