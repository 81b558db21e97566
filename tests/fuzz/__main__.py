"""The campaign: a server of its own on a PostgreSQL of its own, asked whatever can be asked.

    python -m tests.fuzz [--cases N] [--seed S]

Progress goes to the error stream. The last line of standard output is the verdict as JSON; the exit code is 1
unless no call ended as the server's failure, no balance changed that nobody has answered for, and the ledger verifies.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

from peculium_server.store import migrate
from tests.bench.ledgers import Postgres
from tests.faults.progress import say
from tests.fuzz.campaign import Campaign
from tests.fuzz.serving import FLAGS, key_file

CASES_DEFAULT: Final = 200_000
_DATABASE: Final = "fuzz"


def main() -> int:
    """Run the campaign: 0 if nothing is wrong, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=CASES_DEFAULT)
    parser.add_argument("--seed", type=int, default=None, help="default: one of its own")
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    folder = Path(tempfile.mkdtemp(prefix="peculium-fuzz-"))
    folder.chmod(0o755)
    # To be told to end is to be interrupted: what was started has to be stopped.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    say(f"seed {seed}, in {folder}")
    try:
        with Postgres.running(folder) as postgres:
            database = postgres.create(_DATABASE)
            migrate.upgrade(database)
            keys, flags = key_file(folder)
            server = postgres.start_server("--database-url", database, *flags, *FLAGS)
            campaign = Campaign(server.address, keys, database, server.process.pid, seed)
            verdict = asyncio.run(campaign.run(arguments.cases, say))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for problem in verdict.problems:
        say(f"NOT CLEAN: {problem}")
    say(f"memory by epoch, in MB: {[round(each) for each in verdict.memory_mb]}")
    say(f"again: make fuzz CASES={arguments.cases} SEED={seed}")
    sys.stdout.write(verdict.line() + "\n")
    return 0 if verdict.clean else 1


if __name__ == "__main__":
    sys.exit(main())
