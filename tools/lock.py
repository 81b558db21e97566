"""Regenerate `requirements.lock`: every dependency of every extra, pinned, with hashes.

The lock names no index: where packages come from is the business of whoever installs (pip's own
configuration), what they contain is fixed by the hashes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILER = "pip-tools==7.6.2"
HEADER = "# Written by `make lock` from pyproject.toml; do not edit.\n"


def main() -> None:
    """Compile in a throw-away environment, so that the lock does not depend on what is installed."""
    with tempfile.TemporaryDirectory(prefix="peculium-lock-") as folder:
        environment = Path(folder) / "venv"
        venv.create(environment, with_pip=True, symlinks=True)
        python = str(environment / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", COMPILER], check=True)
        compiled = Path(folder) / "requirements.lock"
        command = [python, "-m", "piptools", "compile", "--quiet", "--generate-hashes"]
        command += ["--all-extras", "--build-deps-for", "editable", "--allow-unsafe"]
        command += ["--strip-extras", "--no-header", "--no-annotate", "--no-emit-options"]
        command += ["--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host"]
        command += ["--upgrade", "--output-file", str(compiled), "pyproject.toml"]
        subprocess.run(command, check=True, cwd=ROOT)
        body = "".join(
            line
            for line in compiled.read_text().splitlines(keepends=True)
            if line.strip() and not line.startswith("#")
        )
    (ROOT / "requirements.lock").write_text(HEADER + body)
    sys.stderr.write(f"lock: {body.count('==')} packages\n")


if __name__ == "__main__":
    main()
