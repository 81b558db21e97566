"""`peculium`, with somebody who looks over its shoulder.

    python observed.py serve …

For each line that it is told, the name of a file, it writes down there what its own objects say of themselves,
and then a line on standard output. That is what a log, an error tracker or a debugger would show of them.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from peculium_server.cli import main

OURS = ("peculium", "peculium_server")


def shown(packages: tuple[str, ...] = OURS) -> Iterator[str]:
    """What the objects of some packages say of themselves, and tasks and errors of anybody."""
    # The server keeps what it was started with out of the collector's sight.
    gc.unfreeze()
    # What nobody can get at any more, nobody shows.
    gc.collect()
    beginnings = tuple(f"{package}." for package in packages)
    for each in gc.get_objects():
        kind = type(each)
        module = f"{kind.__module__}."
        own = module.startswith(beginnings)
        # A message says all that is in it to whoever asks: nobody may.
        if own and ".v1." in module:
            continue
        if own or issubclass(kind, asyncio.Future | BaseException):
            try:
                yield repr(each)
            except Exception as error:  # noqa: BLE001 - it is just being made
                yield f"{kind}: {error!r}"


def _observe() -> None:
    for line in sys.stdin:
        Path(line.strip()).write_text("\n".join(shown()), errors="surrogateescape")
        sys.stdout.write("observed\n")
        sys.stdout.flush()


if __name__ == "__main__":
    threading.Thread(target=_observe, daemon=True).start()
    main()
