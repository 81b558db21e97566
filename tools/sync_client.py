"""Generate the blocking client from the one for asyncio, or prove that it is current.

The verbs, their arguments and their words are written once, in `aio.py`. What differs between the
two is in the senders, which have the same interface; here names are exchanged and `await` falls out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "client" / "peculium" / "aio.py"
TARGET = ROOT / "client" / "peculium" / "client.py"
HEADER = (
    '"""The blocking client, for any number of threads. Generated from `aio.py`; do not edit.\n'
)

EXCHANGES = (
    (r'\A"""The client for asyncio\..*\n', HEADER),
    (
        r"from peculium\._aio_sender import Pending, Sender",
        "from peculium._sync_sender import Sender",
    ),
    (r"\bPending\[(\w+)\]", r"\1"),
    (r"\bPending\((.*)\)$", r"\1"),
    (r"\bfrom grpc\.aio import", "from grpc import"),
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
)


def main() -> int:
    """Run the mode that the command line names; 1 when the checked-in client is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("generate", "verify"))
    made = generated(SOURCE.read_text())
    if parser.parse_args().mode == "generate":
        TARGET.write_text(made)
        return 0
    if TARGET.read_text() != made:
        sys.stderr.write(f"{TARGET.relative_to(ROOT)}: out of date, run `make gen`\n")
        return 1
    return 0


def generated(source: str) -> str:
    """The blocking client's source, formatted."""
    for pattern, replacement in EXCHANGES:
        source = re.sub(pattern, replacement, source, flags=re.MULTILINE)
    for arguments in (["check", "--fix-only", "--select", "I", "--quiet"], ["format", "--quiet"]):
        ruff = [str(Path(sys.executable).with_name("ruff")), *arguments]
        finished = subprocess.run(
            [*ruff, "--stdin-filename", str(TARGET), "-"],
            input=source,
            capture_output=True,
            check=True,
            text=True,
            cwd=ROOT,
        )
        source = finished.stdout
    return source


if __name__ == "__main__":
    sys.exit(main())
