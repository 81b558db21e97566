"""Tests that share what their module makes run in one worker, which makes it once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SHARING = """
import os, pytest

@pytest.fixture(scope="module")
def made():
    with open({said!r}, "a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)

@pytest.fixture
def used(made):
    pass

@pytest.mark.parametrize("number", range(8))
def test_something(used, number):
    pass
"""


def test_what_a_module_makes_for_its_tests_is_made_in_one_worker(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.scheduling"]\n')
    (tmp_path / "test_sharing.py").write_text(SHARING.format(said=str(tmp_path / "said")))
    # Each of two workers would be given some of them at once.
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-c", "/dev/null"]
    finished = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "8 passed" in finished.stdout, finished.stdout
    assert len((tmp_path / "said").read_text().split()) == 1
