"""Regenerate the lock files: dependencies pinned, with hashes.

`requirements.lock` has every dependency of every extra. `tests/protobuf-newest.lock` has the newest
protobuf that users may have, where the generator that we develop with asks for an older one. The locks in
`deploy/container` have what the image is made of, in the same versions: of the server, and of what builds
its wheel. `tests/replay/litellm.lock` has what incidents are replayed against: it is not installed with the project.

A lock names no index: where packages come from is the business of whoever installs (pip's own
configuration), what they contain is fixed by the hashes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
COMPILER = "pip-tools==7.6.2"
HEADER = "# Written by `make lock` from pyproject.toml; do not edit.\n"


def main() -> None:
    """Compile in a throw-away environment, so that the lock does not depend on what is installed."""
    with tempfile.TemporaryDirectory(prefix="peculium-lock-") as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True, symlinks=True)
        python = str(folder / "venv" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", COMPILER], check=True)
        options = ("--all-extras", "--build-deps-for", "editable", "--allow-unsafe")
        _compile(python, folder, LOCK, *options, "pyproject.toml")
        newest = folder / "newest.in"
        newest.write_text(_requirement("protobuf"))
        _compile(python, folder, ROOT / "tests" / "protobuf-newest.lock", str(newest))
        same = folder / "same.txt"
        same.write_text(_pins(LOCK.read_text()))
        container, pinned = ROOT / "deploy" / "container", ("--constraint", str(same))
        server, build = ("--extra", "server"), ("--only-build-deps", "--build-deps-for", "wheel")
        _compile(python, folder, container / "server.lock", *server, *pinned, "pyproject.toml")
        _compile(python, folder, container / "build.lock", *build, *pinned, "pyproject.toml")
        proxy = folder / "litellm.in"
        proxy.write_text("litellm[proxy]")
        _compile(python, folder, ROOT / "tests" / "replay" / "litellm.lock", str(proxy))


def _requirement(name: str) -> str:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(str(line) for line in dependencies if line.startswith(name))


def _pins(lock: str) -> str:
    """The versions of a lock, without its hashes."""
    return "".join(f"{line.partition(' ')[0]}\n" for line in lock.splitlines() if "==" in line)


def _compile(python: str, folder: Path, target: Path, *arguments: str) -> None:
    compiled = folder / target.name
    command = [python, "-m", "piptools", "compile", "--quiet", "--upgrade", "--generate-hashes"]
    command += ["--strip-extras", "--no-header", "--no-annotate", "--no-emit-options"]
    command += ["--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host"]
    subprocess.run([*command, "--output-file", str(compiled), *arguments], check=True, cwd=ROOT)
    lines = compiled.read_text().splitlines(keepends=True)
    body = "".join(line for line in lines if line.strip() and not line.startswith("#"))
    target.write_text(HEADER + body)
    sys.stderr.write(f"lock: {body.count('==')} packages in {target.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
