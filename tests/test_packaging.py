"""What `pip install peculium` gives: the light client, alone, on every protobuf that it allows."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
NEWEST_PROTOBUF = ROOT / "tests" / "protobuf-newest.lock"

# Pip takes its time.
pytestmark = [pytest.mark.packaging, pytest.mark.timeout(300)]

# Every module of the client but those of its extras, and one message there and back.
IMPORT_THE_CLIENT = """
import importlib, pkgutil, sys
import peculium
for module in pkgutil.walk_packages(peculium.__path__, "peculium."):
    if module.name not in {"peculium.httpx", "peculium.httpx2"}:
        importlib.import_module(module.name)
from peculium.v1 import ledger_service_pb2 as ledger
sent = ledger.ReserveRequest(amount=2**62 - 1, hold_id=b"id")
assert ledger.ReserveRequest.FromString(sent.SerializeToString()) == sent
import google.protobuf
print(google.protobuf.__version__, peculium.__file__)
"""
ABSENT = ("alembic", "opentelemetry.sdk", "psycopg", "rich", "sqlalchemy", "typer")
FIND_WHAT_SHOULD_BE_ABSENT = f"""
import importlib.util
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(*filter(there, {ABSENT!r}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of a new environment with the wheel and its base dependencies only."""
    folder = tmp_path_factory.mktemp("clean")
    python = _new_environment(folder / "venv")
    base = folder / "base.lock"
    base.write_text(_locked(_needed_by("peculium")))
    _pip(python, "install", "--require-hashes", "-r", str(base))
    _pip(python, "install", "--no-deps", str(wheel))
    return python


def test_the_wheel_carries_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "peculium",
        "peculium_migrations",
        "peculium_server",
    }
    assert "peculium/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_base_install_is_complete_and_light(clean_python: str) -> None:
    _pip(clean_python, "check")
    assert _run(clean_python, FIND_WHAT_SHOULD_BE_ABSENT).split() == []


def test_the_client_imports_from_the_base_install(clean_python: str) -> None:
    version, origin = _run(clean_python, IMPORT_THE_CLIENT).split()
    assert version == importlib.metadata.version("protobuf")
    assert not origin.startswith(str(ROOT / "client"))


def test_the_client_runs_on_the_other_major_version_of_protobuf(
    clean_python: str, tmp_path: Path
) -> None:
    # Laid over the environment's own: what comes first on the path wins.
    _pip(
        clean_python,
        *("install", "--require-hashes", "-r", str(NEWEST_PROTOBUF), "--target", str(tmp_path)),
    )
    version, _ = _run(
        clean_python, f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + IMPORT_THE_CLIENT
    ).split()
    assert version.partition(".")[0] != importlib.metadata.version("protobuf").partition(".")[0]
    assert f"protobuf=={version} " in NEWEST_PROTOBUF.read_text()


def _new_environment(folder: Path) -> str:
    venv.create(folder, with_pip=True, symlinks=True)
    return str(folder / "bin" / "python")


def _run(python: str, script: str) -> str:
    # -I: neither this checkout nor the user's site; -W error: a warning would be the users' too.
    finished = subprocess.run(
        [python, "-I", "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def _pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def _needed_by(name: str) -> set[str]:
    """The distributions that a distribution without extras needs, directly or not."""
    needed: set[str] = set()
    waiting = [name]
    while waiting:
        for line in importlib.metadata.requires(waiting.pop()) or []:
            requirement = Requirement(line)
            found = canonicalize_name(requirement.name)
            if found in needed or not (
                requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            ):
                continue
            needed.add(found)
            waiting.append(found)
    return needed


def _locked(names: set[str]) -> str:
    """The lines of the lock file, hashes included, for these distributions."""
    lines = LOCK.read_text().splitlines(keepends=True)
    chosen, taking = [], False
    for line in lines:
        if not line.startswith((" ", "#")):
            taking = canonicalize_name(line.partition("==")[0]) in names
        if taking:
            chosen.append(line)
    assert len([line for line in chosen if "==" in line]) == len(names)
    return "".join(chosen)
