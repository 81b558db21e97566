"""Where and when a run took place, and with what."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from tests.bench.ledgers import Postgres

ROOT = Path(__file__).parents[2]
_PACKAGES = ("peculium", "grpcio", "protobuf", "psycopg", "SQLAlchemy", "uvloop")
_SETTINGS = (
    "server_version",
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "shared_buffers",
    "max_connections",
    "max_wal_size",
)


def prepare(folder: Path) -> None:
    """Make a folder to work in, forget settings that are meant for others, and end in order when told to."""
    for name in [name for name in os.environ if name.startswith("PECULIUM_")]:
        del os.environ[name]
    folder.mkdir(parents=True, exist_ok=True)
    # The user who runs PostgreSQL has to get in.
    folder.chmod(0o755)
    # As Ctrl-C does: servers and PostgreSQL would stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def now() -> str:
    """The time, for people."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def load() -> list[float]:
    """How many processes wanted to run lately: over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def facts(postgres: Postgres, folder: Path) -> dict[str, Any]:
    """What figures depend on."""
    return {
        "cores": psutil.cpu_count(),
        "processor": _processor(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "file_system": _file_system(folder),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "postgresql": postgres.settings(*_SETTINGS),
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _file_system(folder: Path) -> str:
    there = [
        part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)
    ]
    return max(there, key=lambda part: len(part.mountpoint)).fstype if there else "unknown"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"
