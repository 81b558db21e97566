"""Servers forked for the tests are what the program is that users start."""

from __future__ import annotations

import re
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.faults.liar import Liar
from tests.forked import Forked
from tests.server import Launch, RunningServer, program, starting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")

TOLD_BY_THE_SYSTEM = {"SigBlk", "SigIgn", "SigCgt", "Threads", "Umask"}


def told_by_the_system(server: RunningServer) -> set[str]:
    """Which signals it blocks, ignores and catches, and what else is a process's own."""
    process = Path(f"/proc/{server.process.pid}")
    lines = (process / "status").read_text().splitlines()
    own = {line for line in lines if line.partition(":")[0] in TOLD_BY_THE_SYSTEM}
    limits = (process / "limits").read_text()
    return {*own, limits, str((process / "cwd").readlink())}


def said(server: RunningServer) -> list[str]:
    """What it has said, whatever its port and file are."""
    lines = (re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", line) for line in server.said)
    return [re.sub(r"ready-\w+", "READY", line) for line in lines]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the process is that forks, which is there already."""
    forkserver.ensure_running()
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_forked_server_lives_and_ends_as_the_program_does(
    tmp_path: Path, database: str, number: signal.Signals
) -> None:
    def life(launch: Launch) -> tuple[set[str], int, list[str]]:
        with starting(tmp_path, launch) as start:
            server = start("--database-url", database, PECULIUM_DRAIN_SECONDS="7")
            own = told_by_the_system(server)
            if number is signal.SIGKILL:
                server.kill()
            return own, server.stop(number), said(server)

    own, code, lines = life(program)
    assert life(Forked) == (own, code, lines)
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else 0)
    assert "  drain_seconds = 7" in lines


def test_what_a_forked_server_would_not_heed_is_refused(tmp_path: Path) -> None:
    liar = Liar.off_by(0, tmp_path / "clock")
    with starting(tmp_path, Forked) as start, pytest.raises(ValueError, match="LD_PRELOAD"):
        start(**liar.environment())
