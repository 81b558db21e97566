"""How long an export takes to verify: `python -m tests.archive.measure FILE --public-key KEY`.

Runs `peculium audit verify --export` as an auditor does, in a process of its own on one processor, several
times, and tells the processor time and the memory that it took.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

_PECULIUM = (sys.executable, "-c", "from peculium_server.cli import main; main()")


class Measured(NamedTuple):
    """One verification."""

    verdict: dict[str, Any]
    """As the command says it."""
    seconds: float
    """Of a processor, in user and system mode."""
    peak_bytes: int
    """The most memory that was resident."""


def measure(path: Path, keys: Sequence[str]) -> Measured:
    """Verify a file once.

    Raises:
        RuntimeError: It does not verify.
    """
    trusted = [argument for key in keys for argument in ("--public-key", key)]
    command = [*_PECULIUM, "audit", "verify", "--export", str(path), *trusted, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{path} does not verify: {said.decode()}")
    return Measured(json.loads(said), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def main() -> None:
    """Measure the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--public-key", action="append", default=[], help="as of the command")
    parser.add_argument("--times", type=int, default=3)
    asked = parser.parse_args()
    runs = [measure(asked.file, asked.public_key) for _ in range(asked.times)]
    verdict = runs[0].verdict
    seconds = sorted(run.seconds for run in runs)
    entries = verdict["entries"]
    peak = max(run.peak_bytes for run in runs)
    sys.stdout.write(
        f"{entries:,} entries, {verdict['checkpoints']:,} checkpoints, {verdict['unsealed']}"
        f" entries not sealed; keys trusted: {verdict['keys_trusted']}\n"
        f"{median(seconds):.1f} s of one processor ({seconds[0]:.1f} … {seconds[-1]:.1f}),"
        f" {median(seconds) / entries * 1e6:.1f} µs an entry\n"
        f"{peak / 1e6:,.0f} MB at most, {peak / entries:,.0f} bytes an entry\n"
    )


if __name__ == "__main__":
    main()
