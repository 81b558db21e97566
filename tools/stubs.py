"""Generate the Python stubs from `proto/`, or prove that the checked-in ones are current.

The wire package and the Python package have the same name, so no import is rewritten.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
PACKAGE = Path("peculium") / "v1"
CHECKED_IN = ROOT / "client"
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def main() -> int:
    """Run the mode that the command line names; 1 when the checked-in stubs are out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("generate", "verify"))
    if parser.parse_args().mode == "generate":
        _generate(CHECKED_IN)
        for name in _stubs(CHECKED_IN) - _expected():
            (CHECKED_IN / PACKAGE / name).unlink()
        return 0
    return _verify()


def _generate(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    protos = [str(path.relative_to(PROTO)) for path in _protos()]
    # Only files with a service get gRPC stubs: for the others they would be empty.
    services = [name for name in protos if name.endswith("_service.proto")]
    _protoc(protos, f"--python_out={target}", f"--mypy_out={target}")
    if services:
        _protoc(services, f"--grpc_python_out={target}", f"--mypy_grpc_out={target}")


def _protos() -> list[Path]:
    protos = sorted((PROTO / PACKAGE).glob("*.proto"))
    if not protos:
        sys.exit(f"no .proto file in proto/{PACKAGE}")
    return protos


def _protoc(protos: list[str], *outputs: str) -> None:
    # protoc looks for its plug-ins on the path; they are beside this interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTO), *outputs, *protos]
    finished = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    if finished.returncode != 0:
        sys.exit(f"protoc failed:\n{finished.stderr}")


def _verify() -> int:
    with tempfile.TemporaryDirectory(prefix="peculium-stubs-") as folder:
        fresh = Path(folder)
        _generate(fresh)
        wanted, present = _stubs(fresh), _stubs(CHECKED_IN)
        _, differing, missing = filecmp.cmpfiles(
            fresh / PACKAGE, CHECKED_IN / PACKAGE, sorted(wanted), shallow=False
        )
    for kind, names in (
        ("out of date", differing),
        ("missing", missing),
        ("generated from no proto", sorted(present - wanted)),
    ):
        for name in names:
            sys.stderr.write(f"client/{PACKAGE}/{name}: {kind}\n")
    if differing or missing or present - wanted:
        sys.stderr.write("run `make gen` and commit what it writes\n")
        return 1
    return 0


def _stubs(target: Path) -> set[str]:
    return {path.name for pattern in PATTERNS for path in (target / PACKAGE).glob(pattern)}


def _expected() -> set[str]:
    names = set()
    for path in _protos():
        names |= {f"{path.stem}_pb2.py", f"{path.stem}_pb2.pyi"}
        if path.stem.endswith("_service"):
            names |= {f"{path.stem}_pb2_grpc.py", f"{path.stem}_pb2_grpc.pyi"}
    return names


if __name__ == "__main__":
    sys.exit(main())
