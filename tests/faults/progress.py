"""What is being done just now, for whoever waits for it."""

from __future__ import annotations

import sys
import time

_BEGUN = time.monotonic()


def say(text: str) -> None:
    """Tell a step on the error stream, with the seconds since the program began."""
    sys.stderr.write(f"{time.monotonic() - _BEGUN:7.1f} {text}\n")
    sys.stderr.flush()
