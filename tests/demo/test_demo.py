"""The demonstration as its users run it: the command, its processes, a real server and Postgres."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from peculium_server.demo import trace
from peculium_server.demo.prices import actual, upper
from peculium_server.demo.trace import HEADER, Request
from tests.forked import Forked
from tests.postgres import Server
from tests.server import StartServer, starting

COMMAND = (sys.executable, "-m", "peculium_server", "demo")
FIELDS = [
    *("agents", "processes", "calls", "refused", "granted", "spent", "billed", "overshoot"),
    *("utilisation", "entries", "verified", "seconds"),
]
SMALL = ("--processes", "2", "--agents", "4")
SOME_CALLS = 30
RUN_SECONDS_MAX = 120
_PROGRESS = re.compile(r"([\d,]+) calls, ")

pytestmark = pytest.mark.timeout(RUN_SECONDS_MAX + 60)


def _command_line(process: psutil.Process) -> str:
    """What it was started with; nothing if it has ended meanwhile."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class Demo:
    """A running demonstration, all of whose processes keep their files in one folder."""

    def __init__(self, folder: Path, *arguments: str, **variables: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            env={**os.environ, **variables, "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._told: list[str] = []
        self._calls: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._told.append(line)
            if found := _PROGRESS.match(line):
                self._calls.put(int(found[1].replace(",", "")))
        self._calls.put(None)

    def wait_for_calls(self, least: int) -> int:
        """Wait until it has made some calls; how many those are."""
        while (calls := self._calls.get(timeout=RUN_SECONDS_MAX)) is not None:
            if calls >= least:
                return calls
        raise AssertionError(f"it ended before:\n{''.join(self._told)}")

    def finish(self) -> tuple[int, list[str], str]:
        """Wait for its end: its exit code, the lines of its output, and what it told."""
        assert self.process.stdout is not None
        lines = self.process.stdout.read().splitlines()
        code = self.process.wait(RUN_SECONDS_MAX)
        self._reader.join(RUN_SECONDS_MAX)
        return code, lines, "".join(self._told)

    def members(self) -> list[psutil.Process]:
        """What it has started and still runs, Postgres included."""
        return [
            process
            for process in psutil.process_iter()
            if process.pid != self.process.pid and self._has_started(process)
        ]

    def _has_started(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            # Postgres writes its title over its environment, but stays in its data directory.
            return process.environ().get("TMPDIR") == str(self.folder) or process.cwd().startswith(
                f"{self.folder}/"
            )
        return False

    def member(self, part: str) -> psutil.Process:
        """The process with this in its command line, the first of them."""
        (process, *_) = (each for each in self.members() if part in _command_line(each))
        return process

    def end(self) -> None:
        """End it if it still runs, with all that it has started."""
        with self.process:
            self.process.kill()
        self._reader.join(RUN_SECONDS_MAX)
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.folder)

    def assert_nothing_is_left(self) -> None:
        assert self.members() == []
        assert list(self.folder.iterdir()) == []


StartDemo = Callable[..., Demo]


@pytest.fixture
def start_demo() -> Iterator[StartDemo]:
    with contextlib.ExitStack() as started:

        def start(*arguments: str, **variables: str) -> Demo:
            # Every user may enter it, also the one who runs Postgres where we are root.
            folder = Path(tempfile.mkdtemp(prefix="peculium-test-demo-"))
            folder.chmod(0o755)
            demo = Demo(folder, *arguments, **variables)
            started.callback(demo.end)
            return demo

        yield start


@pytest.fixture(scope="module")
def ledger(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on a database of its own."""
    with (
        postgres.fresh_database(postgres.migrated_template()) as url,
        starting(tmp_path_factory.mktemp("ledger"), Forked) as start,
    ):
        yield start("--database-url", url).address


def write(path: Path, rows: Sequence[tuple[int, int]], end: str = "\r\n") -> Path:
    """A trace with the context and generated tokens of each request."""
    lines = [",".join(HEADER)]
    lines += [f"2023-11-16 18:17:03.9799600,{context},{generated}" for context, generated in rows]
    path.write_bytes(end.join([*lines, ""]).encode())
    return path


@pytest.fixture(scope="module")
def some_rows() -> list[tuple[int, int]]:
    return [(request.context_tokens, request.generated_tokens) for request in trace.read(None)]


def result_of(lines: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(lines[-1])
    assert list(result) == FIELDS
    return result


def assert_sound(result: dict[str, Any], requests: int) -> None:
    """What holds at the end of every run, whatever its trace."""
    assert result["verified"] is True
    assert result["overshoot"] == 0
    assert result["spent"] == result["billed"] <= result["granted"]
    assert result["calls"] + result["refused"] == requests
    assert result["utilisation"] == result["spent"] * 10**6 // result["granted"] / 10**6
    # Each call was reserved and settled.
    assert result["entries"] > 2 * result["calls"]
    for field in ("granted", "spent", "billed", "overshoot"):
        assert type(result[field]) is int


def test_agents_of_several_processes_spend_the_cap_and_nothing_is_left_behind(
    start_demo: StartDemo, tmp_path: Path, some_rows: list[tuple[int, int]]
) -> None:
    file = write(tmp_path / "trace.csv", some_rows[:400])
    demo = start_demo("--trace", str(file))
    code, lines, told = demo.finish()
    assert code == 0, told
    result = result_of(lines)
    assert_sound(result, 400)
    assert (result["processes"], result["agents"]) == (4, 32)
    cost = sum(actual(*row)[0] for row in some_rows[:400])
    assert result["granted"] == cost * 85 // 100
    # The cap binds, and what it leaves could hardly pay anything.
    assert result["refused"] > 0
    assert result["utilisation"] > 0.99
    assert not any("✗" in line for line in lines)
    assert sum("worker-" in line for line in lines) == 4
    assert sum("agent-" in line for line in lines) == 32
    demo.assert_nothing_is_left()


CHEAP, DEAR = (3, 1), (400_000, 4_000)


@pytest.mark.parametrize(
    ("rows", "calls", "utilisation"),
    [
        ([(4808, 10)], 1, 0.98),
        ([(1000, 20)] * 10, 8, 0.9),
        ([CHEAP] * 50 + [DEAR], 50, 0.0),
        ([DEAR, *[CHEAP] * 200, DEAR, DEAR], 202, 0.6),
        ([(0, 0)] * 5, 5, 0.0),
        ([(2**40, 2**20)] * 20, 17, 0.99),
    ],
    ids=["one", "ten", "one dear", "some dear", "for nothing", "huge"],
)
def test_a_trace_of_any_size_is_spent_sensibly(
    start_demo: StartDemo,
    ledger: str,
    tmp_path: Path,
    rows: list[tuple[int, int]],
    calls: int,
    utilisation: float,
) -> None:
    file = write(tmp_path / "trace.csv", rows, end="\n")
    demo = start_demo("--trace", str(file), "--target", ledger, "--json")
    code, lines, told = demo.finish()
    assert code == 0, told
    assert len(lines) == 1
    result = result_of(lines)
    assert_sound(result, len(rows))
    assert result["calls"] >= calls
    assert result["utilisation"] >= utilisation
    # Whoever was refused needs more than everything that was left.
    dearest = sorted(upper(Request(1, *row)) for row in rows)[len(rows) - result["refused"] :]
    assert all(need > result["granted"] - result["spent"] for need in dearest)
    demo.assert_nothing_is_left()


def test_runs_on_one_ledger_do_not_disturb_each_other(
    start_demo: StartDemo, ledger: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "trace.csv", [(1000, 20)] * 60)
    shape = ("--processes", "2", "--agents", "3", "--cap-percent", "50")
    demos = [start_demo("--trace", str(file), "--target", ledger, *shape) for _ in range(2)]
    for demo in demos:
        code, lines, told = demo.finish()
        assert code == 0, told
        result = result_of(lines)
        assert_sound(result, 60)
        assert (result["processes"], result["agents"]) == (2, 6)
        # One more would need more than is left, although it would cost less.
        assert result["calls"] == 29


def test_a_ledger_that_knows_keys_is_called_with_an_admins_key(
    start_demo: StartDemo, start_server: StartServer, database: str, tmp_path: Path
) -> None:
    digest = hashlib.sha256(b"open-sesame").hexdigest()
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[keys]]\nprincipal = "ops"\nrole = "admin"\nsha256 = "{digest}"\n')
    server = start_server("--database-url", database, "--keys-file", str(keys))
    file = write(tmp_path / "trace.csv", [(1000, 20)] * 20)
    arguments = ("--trace", str(file), "--target", server.address, *SMALL)
    code, lines, told = start_demo(*arguments, PECULIUM_API_KEY="open-sesame").finish()
    assert code == 0, told
    assert_sound(result_of(lines), 20)
    code, lines, _ = start_demo(*arguments).finish()
    assert (code, lines) == (1, [])


def test_agents_go_on_when_the_server_is_killed_and_restarted(
    start_demo: StartDemo,
    start_server: StartServer,
    tmp_path: Path,
    database: str,
    some_rows: list[tuple[int, int]],
) -> None:
    file = write(tmp_path / "trace.csv", some_rows[:2000])
    server = start_server("--database-url", database)
    demo = start_demo("--trace", str(file), "--target", server.address)
    at_kill: list[int] = []
    for _ in range(2):
        at_kill.append(demo.wait_for_calls(at_kill[-1] + 1 if at_kill else SOME_CALLS))
        server.kill()
        server = start_server("--database-url", database, listen=server.address)
    code, lines, told = demo.finish()
    assert code == 0, told
    result = result_of(lines)
    assert_sound(result, 2000)
    assert result["calls"] > at_kill[-1]
    assert result["utilisation"] > 0.99


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_leaves_nothing_behind(
    start_demo: StartDemo, number: signal.Signals
) -> None:
    demo = start_demo(*SMALL)
    demo.wait_for_calls(SOME_CALLS)
    demo.process.send_signal(number)
    code, lines, told = demo.finish()
    assert code == 128 + number
    assert lines == []
    assert told.endswith(f"stopped by {number.name}\n")
    demo.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("part", "told_of_it"),
    [
        (" serve ", "the server ended in the middle of the run"),
        ("demo.worker", "worker-1 ended before its work was done"),
        ("demo.provider", "the provider hung up"),
    ],
)
def test_a_run_that_loses_a_process_fails_and_leaves_nothing_behind(
    start_demo: StartDemo, part: str, told_of_it: str
) -> None:
    demo = start_demo(*SMALL)
    demo.wait_for_calls(SOME_CALLS)
    demo.member(part).kill()
    code, lines, told = demo.finish()
    assert code == 1
    assert lines == []
    assert told_of_it in told
    demo.assert_nothing_is_left()


def test_a_trace_with_bad_lines_is_wrong_usage_and_starts_nothing(
    start_demo: StartDemo, tmp_path: Path
) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(f"{','.join(HEADER)}\n2023-11-16 18:17:03,1,1\nrubbish\n")
    demo = start_demo("--trace", str(file))
    code, lines, told = demo.finish()
    assert (code, lines) == (2, [])
    assert "line 3: must have 3 fields, not 1" in " ".join(told.split())


def test_a_ledger_that_is_not_there_is_no_answer(start_demo: StartDemo, tmp_path: Path) -> None:
    file = write(tmp_path / "trace.csv", [(1, 1)])
    demo = start_demo("--trace", str(file), "--target", "127.0.0.1:9")
    code, lines, told = demo.finish()
    assert (code, lines) == (3, []), told
    demo.assert_nothing_is_left()


def test_a_server_that_cannot_start_fails_the_run_with_what_it_said(
    start_demo: StartDemo, tmp_path: Path
) -> None:
    (tmp_path / "precious").touch()
    demo = start_demo(*SMALL, "--data-dir", str(tmp_path))
    code, lines, told = demo.finish()
    assert (code, lines) == (1, [])
    assert "the server ended before it was ready" in told
    assert str(tmp_path) in told.partition("before it was ready")[2]
    demo.assert_nothing_is_left()
    assert (tmp_path / "precious").exists()
