"""Who calls: API keys from a file, each known by its SHA-256 alone.

The file is TOML:

    [[keys]]
    principal = "research-gateway"
    role = "agent"          # or "admin", or "auditor"
    sha256 = "…"            # of the key, as 64 hexadecimal digits

A principal may have several keys, for example an old one and a new one. Without a key file there is
one principal, `dev`, who may do everything: for a laptop, never for a network.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from peculium_server.core.limits import PRINCIPAL_BYTES_MAX
from peculium_server.core.operations import SYSTEM, Role

DEV_PRINCIPAL: Final = "dev"
_RESERVED: Final = frozenset({SYSTEM.principal})
_ROLES: Final = {"agent": Role.AGENT, "admin": Role.ADMIN, "auditor": Role.AUDITOR}
_FIELDS: Final = ("principal", "role", "sha256")
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class KeysInvalid(Exception):
    """The key file cannot be used; carries every problem that it has."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__(f"{path}: " + "; ".join(problems))
        self.path = path
        self.problems = problems


class Identity(NamedTuple):
    """An authenticated caller."""

    principal: str
    roles: frozenset[Role]
    """One, by a key file; all, without one."""


DEV: Final = Identity(DEV_PRINCIPAL, frozenset({Role.AGENT, Role.ADMIN, Role.AUDITOR}))


class Identities:
    """Everybody who may call."""

    def __init__(self, by_digest: Mapping[bytes, Identity] | None) -> None:
        self._by_digest = by_digest

    @classmethod
    def dev(cls) -> Identities:
        """Whoever calls is `dev` and may do everything."""
        return cls(None)

    @classmethod
    def load(cls, path: Path) -> Identities:
        """Read a key file.

        Raises:
            KeysInvalid: It cannot be read, or something is wrong with it; names every problem.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise KeysInvalid(path, [f"cannot be read: {error.strerror}"]) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise KeysInvalid(path, [f"is not TOML: {error}"]) from error
        return cls(_parse(path, content))

    @property
    def dev_mode(self) -> bool:
        """Say whether anybody who can connect may do everything."""
        return self._by_digest is None

    def identify(self, key: str | None) -> Identity | None:
        """The caller who presents this key; None if nobody has it."""
        if self._by_digest is None:
            return DEV
        if key is None:
            return None
        # A lookup by digest: how long it takes says nothing about the keys.
        return self._by_digest.get(hashlib.sha256(key.encode(errors="surrogatepass")).digest())


def _parse(path: Path, content: Mapping[str, Any]) -> dict[bytes, Identity]:
    problems = [f"{name!r} is not a setting of a key file" for name in content if name != "keys"]
    keys = content.get("keys")
    if not isinstance(keys, list) or not keys:
        raise KeysInvalid(path, [*problems, "has no [[keys]]"])
    by_digest: dict[bytes, Identity] = {}
    role_of: dict[str, str] = {}
    for number, key in enumerate(keys, start=1):
        wrong = _problems(key)
        if not wrong:
            principal, role, digest = key["principal"], key["role"], bytes.fromhex(key["sha256"])
            if role_of.setdefault(principal, role) != role:
                wrong.append(f"{principal!r} is {role_of[principal]} by another key")
            if digest in by_digest:
                wrong.append("its sha256 is that of another key")
            by_digest[digest] = Identity(principal, frozenset({_ROLES[role]}))
        problems += [f"key {number}: {problem}" for problem in wrong]
    if problems:
        raise KeysInvalid(path, problems)
    return by_digest


def _problems(key: object) -> list[str]:
    """Everything that is wrong with one key of the file, by itself."""
    if not isinstance(key, dict):
        return ["is not a table"]
    problems = [f"{name!r} is not a field of a key" for name in key if name not in _FIELDS]
    principal, role, digest = (key.get(name) for name in _FIELDS)
    if (
        not isinstance(principal, str)
        or not 1 <= len(principal.encode()) <= PRINCIPAL_BYTES_MAX
        or not principal.isprintable()
    ):
        problems.append(f"principal must be 1 to {PRINCIPAL_BYTES_MAX} bytes of printable text")
    elif principal in _RESERVED:
        problems.append(f"principal {principal!r} is reserved")
    if not isinstance(role, str) or role not in _ROLES:
        problems.append(f"role must be one of {', '.join(_ROLES)}")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        problems.append("sha256 must be 64 hexadecimal digits in lower case")
    return problems
