"""Clocks that lie: what a process is started with, so that it is told another time than the machine's.

The monotonic clock stays true, as that of a real machine does whose clock is set.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


def library() -> Path:
    """The library that is loaded before all others, and answers in the system's stead."""
    found = importlib.util.find_spec("libfaketime")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"


@dataclass(frozen=True)
class Liar:
    """A clock that is off, and can be set while processes look at it."""

    file: Path
    """What it says: how far it is off. Each look at the clock reads it."""

    def set(self, seconds: float) -> None:
        """Let it be off by so much from now on: ahead, or below zero behind."""
        new = self.file.with_suffix(".new")
        new.write_text(f"{seconds:+.1f}\n")
        new.chmod(0o644)
        # As a whole, since it may be read at any time.
        new.replace(self.file)

    def environment(self, preload: Path | None = None) -> Mapping[str, str]:
        """What a process has to be started with to believe it."""
        return {
            "LD_PRELOAD": os.fspath(preload or library()),
            "FAKETIME_TIMESTAMP_FILE": os.fspath(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    @classmethod
    def off_by(cls, seconds: float, file: Path) -> Liar:
        """A new one."""
        liar = cls(file)
        liar.set(seconds)
        return liar
