"""Generate the blocking client from the one for asyncio, or prove that it is current.

The verbs, their arguments and their words are written once, for asyncio. What differs between the
two is in the senders, which have the same interface; here names are exchanged and `await` falls out.
The transports for httpx2 are those for httpx, under its name.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "client" / "peculium"


BLOCKING = (
    (r"\b_aio_(alerts|audit|keys|sender)\b", r"_sync_\1"),
    (r"\bimport Pending, Sender$", "import Sender"),
    (r"\bPending\[(\w+)\]", r"\1"),
    (r"\bPending\((.*)\)$", r"\1"),
    (r"\bfrom grpc\.aio import", "from grpc import"),
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
)
SUCCESSOR = ((r"\bhttpx\b", "httpx2"),)


class Module(NamedTuple):
    """A module, and the one that is generated from it."""

    source: Path
    target: Path
    header: str
    """What the generated one is, for the first line of its docstring."""
    exchanges: tuple[tuple[str, str], ...] = BLOCKING


MODULES = (
    Module(
        PACKAGE / "aio.py",
        PACKAGE / "client.py",
        "The blocking client, for any number of threads.",
    ),
    Module(
        PACKAGE / "_aio_audit.py",
        PACKAGE / "_sync_audit.py",
        "What auditors may ask, blocking.",
    ),
    Module(
        PACKAGE / "_aio_keys.py",
        PACKAGE / "_sync_keys.py",
        "What operators may do with API keys, blocking.",
    ),
    Module(
        PACKAGE / "_aio_alerts.py",
        PACKAGE / "_sync_alerts.py",
        "Alerts and webhooks, blocking.",
    ),
    Module(
        PACKAGE / "httpx.py",
        PACKAGE / "httpx2.py",
        "Transports for httpx2 (`peculium[httpx2]`).",
        SUCCESSOR,
    ),
)


def main() -> int:
    """Run the mode that the command line names; 1 when the checked-in client is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("generate", "verify"))
    generate = parser.parse_args().mode == "generate"
    outdated = 0
    for module in MODULES:
        made = generated(module)
        if generate:
            module.target.write_text(made)
        elif not module.target.exists() or module.target.read_text() != made:
            sys.stderr.write(f"{module.target.relative_to(ROOT)}: out of date, run `make gen`\n")
            outdated = 1
    return outdated


def generated(module: Module) -> str:
    """The source of a generated module, formatted."""
    first, _, rest = module.source.read_text().partition("\n")
    end = '"""' if first.endswith('"""') else ""
    header = f'"""{module.header} Generated from `{module.source.name}`; do not edit.{end}'
    for pattern, replacement in module.exchanges:
        rest = re.sub(pattern, replacement, rest, flags=re.MULTILINE)
    source = f"{header}\n{rest}"
    for arguments in (["check", "--fix-only", "--select", "I", "--quiet"], ["format", "--quiet"]):
        ruff = [str(Path(sys.executable).with_name("ruff")), *arguments]
        finished = subprocess.run(
            [*ruff, "--stdin-filename", str(module.target), "-"],
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
