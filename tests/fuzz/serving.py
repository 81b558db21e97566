"""What a server has to be told that is asked whatever can be asked."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Final

from tests.fuzz.campaign import Keys
from tests.fuzz.guessing import HOLDER
from tests.system.world import webhook_flags

FLAGS: Final = ("--sweep-seconds", "0", "--seal-seconds", "0")
"""What is recorded is what was asked for, and nothing else."""
_PRINCIPALS: Final = {HOLDER: "admin", "agent": "agent", "auditor": "auditor"}


def key_file(folder: Path) -> tuple[Keys, tuple[str, ...]]:
    """Keys of an admin, an agent and an auditor, and the flags of a server that knows them."""
    keys = Keys(*(secrets.token_urlsafe(24) for _ in _PRINCIPALS))
    file = folder / "keys.toml"
    file.write_text(
        "".join(
            f'[[keys]]\nprincipal = "{principal}"\nrole = "{role}"\n'
            f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
            for (principal, role), key in zip(_PRINCIPALS.items(), keys, strict=True)
        )
    )
    return keys, ("--keys-file", str(file), *webhook_flags(folder))
