from __future__ import annotations

import subprocess
import sys

import peculium

FORBIDDEN = (
    "alembic",
    "cryptography",
    "httpx",
    "httpx2",
    "opentelemetry.sdk",
    "peculium_server",
    "psycopg",
    "rich",
    "sqlalchemy",
    "typer",
    "uvloop",
)


def test_the_client_is_light() -> None:
    looked_up = f"sorted(set({FORBIDDEN!r}) & set(sys.modules))"
    code = f"import sys, peculium; print({looked_up}); print(peculium.aio.connect, peculium.usd)"
    finished = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert finished.stdout.splitlines()[0] == "[]"


def test_what_is_exported_is_there_and_sorted() -> None:
    exported = peculium.__all__
    assert exported == sorted(
        exported, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )
    assert all(hasattr(peculium, name) for name in exported)


def test_nothing_public_is_left_out() -> None:
    public = {
        name
        for name, value in vars(peculium).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("peculium")
    }
    assert public <= set(peculium.__all__)
