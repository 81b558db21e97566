"""The tests' own Postgres: a run that is killed leaves it behind, and the next one removes it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.postgres import mark_of, remove_what_killed_runs_left

A_RUN = """
import fcntl, signal, sys
from peculium_server.embedded import EmbeddedPostgres

with open(sys.argv[1] + ".running", "wb") as running:
    fcntl.flock(running, fcntl.LOCK_SH)
    server = EmbeddedPostgres.start(sys.argv[1])
    print(server.pid, flush=True)
    signal.pause()
"""


def runs(process: psutil.Process) -> bool:
    """An orphan that has ended stays a zombie where nobody waits for it, as in a container without init."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_what_a_killed_run_has_left_is_removed_and_what_a_living_one_has_is_not(
    own_postgres: Path,
) -> None:
    folder = own_postgres.parent
    data_dir = folder / "peculium-tests-abc"
    with subprocess.Popen(
        [sys.executable, "-c", A_RUN, str(data_dir)], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        postmaster = psutil.Process(int(run.stdout.readline()))
        remove_what_killed_runs_left(folder)
        assert runs(postmaster)
        assert data_dir.exists()
        run.kill()
    remove_what_killed_runs_left(folder)
    assert not runs(postmaster)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif("TEST_DATABASE_URL" in os.environ, reason="it has no server of its own")
def test_this_run_counts_as_living(pytestconfig: pytest.Config) -> None:
    with mark_of(pytestconfig).open("rb") as mark, pytest.raises(BlockingIOError):
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
