"""Bring `.venv` to what the lock file and `pyproject.toml` say, on a machine with Python and pip only.

Standard library only, since it runs before anything is installed. It finishes at once when nothing
changed since it last succeeded, and it is safe to run several times at the same time.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
STAMP = ENVIRONMENT / ".installed"
LOCK = ROOT / "requirements.lock"
INPUTS = (ROOT / "pyproject.toml", LOCK)
OLDEST_PYTHON = (3, 11)


def main() -> None:
    """Install, unless the stamp is newer than everything that it depends on."""
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        sys.exit(f"Python {wanted} or newer is needed, this is {sys.version.split()[0]}")
    with (ROOT / ".venv.lock").open("w") as mutex:
        fcntl.flock(mutex, fcntl.LOCK_EX)
        if not _current():
            _install()


def _current() -> bool:
    if not STAMP.exists():
        return False
    installed = STAMP.stat().st_mtime_ns
    return all(path.stat().st_mtime_ns <= installed for path in INPUTS)


def _install() -> None:
    # The stamp takes the time of the start: a file that changes meanwhile is installed next time.
    started = max(path.stat().st_mtime_ns for path in INPUTS)
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        _say("creating .venv")
        venv.create(ENVIRONMENT, with_pip=True, symlinks=True)
    _say("installing what requirements.lock names (the first time takes a minute or two)")
    _pip(python, "install", "--require-hashes", "--requirement", str(LOCK))
    _say("installing peculium, editable")
    _pip(python, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    STAMP.touch()
    os.utime(STAMP, ns=(started, started))
    _say("done")


def _pip(python: Path, *arguments: str) -> None:
    quiet = ("--disable-pip-version-check", "--no-input")
    finished = subprocess.run([str(python), "-m", "pip", *arguments, *quiet], check=False)
    if finished.returncode != 0:
        sys.exit(f"pip {arguments[0]} failed, see above")


def _say(text: str) -> None:
    sys.stderr.write(f"install: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
