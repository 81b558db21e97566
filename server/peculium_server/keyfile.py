"""The key file: who may call, as a file that is handed out with the server's settings.

It is TOML:

    [[keys]]
    principal = "research-gateway"
    role = "agent"                          # or "admin", or "auditor"
    sha256 = "…"                            # of the key, as 64 hexadecimal digits
    roots = ["0192f0c1-…"]                  # if it is limited to some trees: their ids
    expires = 2027-01-01T00:00:00Z          # if it does

    [[certificates]]
    spiffe = "spiffe://example.org/gateway" # or all below a path: "spiffe://example.org/agents/*"
    role = "agent"
    roots = ["0192f0c1-…"]

A principal may have several keys, for example an old one and a new one. Of a key that begins with `pek_` the
digest is the one that `peculium keys new` prints. A certificate's principal is its SPIFFE id.
"""

from __future__ import annotations

import re
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from peculium_server.core.keys import KEY_ROLES, principal_problem
from peculium_server.core.limits import KEY_ROOTS_MAX, PRINCIPAL_BYTES_MAX, SECOND_US
from peculium_server.core.operations import Role
from peculium_server.files import Version, version_of, version_of_open

_ROLES: Final = {role.name.lower(): role for role in KEY_ROLES}
_TABLES: Final = ("keys", "certificates")
_KEY_FIELDS: Final = ("principal", "role", "sha256", "roots", "expires")
_CERTIFICATE_FIELDS: Final = ("spiffe", "role", "roots")
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_BELOW: Final = "/*"
_SPIFFE = re.compile(r"spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)*", re.ASCII)
"""As the SPIFFE ID standard has it: a trust domain, and the segments of a path."""


class KeysInvalid(Exception):
    """The key file cannot be used; carries every problem that it has."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__(f"{path}: " + "; ".join(problems))
        self.path = path
        self.problems = problems


class FileKey(NamedTuple):
    """A key of the file."""

    principal: str
    role: Role
    roots: frozenset[bytes] | None
    """The trees that it is limited to; None: all."""
    expires_at: int | None
    """Microseconds since the Unix epoch; None: never."""


class CertificateRule(NamedTuple):
    """What those may do who have certificates with some SPIFFE ids."""

    role: Role
    roots: frozenset[bytes] | None


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What the file says."""

    path: Path
    keys: Mapping[bytes, FileKey]
    """By digest."""
    exact: Mapping[str, CertificateRule]
    """By SPIFFE id."""
    below: tuple[tuple[str, CertificateRule], ...]
    """By what SPIFFE ids begin with, the longest first."""
    version: Version

    @classmethod
    def load(cls, path: Path) -> KeyFile:
        """Read a key file.

        Raises:
            KeysInvalid: It cannot be read, or something is wrong with it; names every problem.
        """
        try:
            with path.open("rb") as file:
                # Of what was opened, whatever the name leads to a moment later.
                version = version_of_open(file)
                content = tomllib.loads(file.read().decode("utf-8"))
        except OSError as error:
            raise KeysInvalid(path, [f"cannot be read: {error.strerror}"]) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise KeysInvalid(path, [f"is not TOML: {error}"]) from error
        problems = [
            f"{name!r} is not a setting of a key file" for name in content if name not in _TABLES
        ]
        if not any(content.get(name) for name in _TABLES):
            problems.append("has no [[keys]] and no [[certificates]]")
        keys = _keys(_tables(content, "keys", problems), problems)
        exact, below = _certificates(_tables(content, "certificates", problems), problems)
        if problems:
            raise KeysInvalid(path, problems)
        longest_first = tuple(sorted(below.items(), key=lambda rule: len(rule[0]), reverse=True))
        return cls(path, keys, exact, longest_first, version)

    def is_current(self, tried: Version | None) -> bool:
        """Say whether the file is the one that was read, or one that was tried; also if it is not there."""
        return version_of(self.path) in (self.version, tried, None)

    def rule_of(self, spiffe_id: str) -> CertificateRule | None:
        """What those may do who have this id: of the rules that fit, the most particular one's."""
        found = self.exact.get(spiffe_id)
        if found is not None:
            return found
        return next((rule for begins, rule in self.below if spiffe_id.startswith(begins)), None)


def spiffe_problem(spiffe_id: str) -> str | None:
    """What is wrong with a SPIFFE id."""
    if len(spiffe_id) > PRINCIPAL_BYTES_MAX or not _SPIFFE.fullmatch(spiffe_id):
        return f"must be spiffe://TRUST-DOMAIN/PATH, at most {PRINCIPAL_BYTES_MAX} bytes"
    return None


def _tables(content: Mapping[str, Any], name: str, problems: list[str]) -> list[Any]:
    tables = content.get(name, [])
    if isinstance(tables, list):
        return tables
    problems.append(f"{name} must be tables: [[{name}]]")
    return []


def _keys(tables: list[Any], problems: list[str]) -> dict[bytes, FileKey]:
    by_digest: dict[bytes, FileKey] = {}
    role_of: dict[str, str] = {}
    for number, key in enumerate(tables, start=1):
        wrong = _key_problems(key)
        if not wrong:
            principal, role, digest = key["principal"], key["role"], bytes.fromhex(key["sha256"])
            if role_of.setdefault(principal, role) != role:
                wrong.append(f"{principal!r} is {role_of[principal]} by another key")
            if digest in by_digest:
                wrong.append("its sha256 is that of another key")
            by_digest[digest] = FileKey(
                principal, _ROLES[role], _roots(key), _microseconds(key.get("expires"))
            )
        problems += [f"key {number}: {problem}" for problem in wrong]
    return by_digest


def _certificates(
    tables: list[Any], problems: list[str]
) -> tuple[dict[str, CertificateRule], dict[str, CertificateRule]]:
    exact: dict[str, CertificateRule] = {}
    below: dict[str, CertificateRule] = {}
    for number, table in enumerate(tables, start=1):
        wrong = _certificate_problems(table)
        if not wrong:
            spiffe, rule = table["spiffe"], CertificateRule(_ROLES[table["role"]], _roots(table))
            # With the slash, so that what is below /agents is not below /agents-of-others.
            found, named = (
                (below, spiffe.removesuffix("*")) if spiffe.endswith(_BELOW) else (exact, spiffe)
            )
            if named in found:
                wrong.append(f"{spiffe!r} is said twice")
            found[named] = rule
        problems += [f"certificate {number}: {problem}" for problem in wrong]
    return exact, below


def _key_problems(key: object) -> list[str]:
    """Everything that is wrong with one key of the file, by itself."""
    if not isinstance(key, dict):
        return ["is not a table"]
    problems = [f"{name!r} is not a field of a key" for name in key if name not in _KEY_FIELDS]
    principal, digest, expires = key.get("principal"), key.get("sha256"), key.get("expires")
    if not isinstance(principal, str) or not principal.isprintable():
        problems.append(f"principal must be 1 to {PRINCIPAL_BYTES_MAX} bytes of printable text")
    else:
        wrong = principal_problem(principal)
        if wrong == "is reserved":
            problems.append(f"principal {principal!r} is reserved")
        elif wrong is not None:
            problems.append(f"principal must be 1 to {PRINCIPAL_BYTES_MAX} bytes of printable text")
    problems += _role_problems(key)
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        problems.append("sha256 must be 64 hexadecimal digits in lower case")
    problems += _root_problems(key)
    if expires is not None and not (isinstance(expires, datetime) and expires.tzinfo is not None):
        problems.append("expires must be a time with its zone, as 2027-01-01T00:00:00Z")
    return problems


def _certificate_problems(table: object) -> list[str]:
    """Everything that is wrong with one rule for certificates, by itself."""
    if not isinstance(table, dict):
        return ["is not a table"]
    problems = [
        f"{name!r} is not a field of a certificate"
        for name in table
        if name not in _CERTIFICATE_FIELDS
    ]
    spiffe = table.get("spiffe")
    if not isinstance(spiffe, str) or spiffe_problem(spiffe.removesuffix(_BELOW)) is not None:
        problems.append(
            "spiffe must be spiffe://TRUST-DOMAIN/PATH, or end with /* for all below it"
        )
    return problems + _role_problems(table) + _root_problems(table)


def _role_problems(table: Mapping[str, Any]) -> list[str]:
    role = table.get("role")
    if isinstance(role, str) and role in _ROLES:
        return []
    return [f"role must be one of {', '.join(_ROLES)}"]


def _root_problems(table: Mapping[str, Any]) -> list[str]:
    try:
        _roots(table)
    except ValueError:
        return [f"roots must be the ids of 1 to {KEY_ROOTS_MAX} roots, as UUIDs"]
    return []


def _roots(table: Mapping[str, Any]) -> frozenset[bytes] | None:
    """The roots that a table names; None if it names none.

    Raises:
        ValueError: It says something else.
    """
    if "roots" not in table:
        return None
    roots = table["roots"]
    if not isinstance(roots, list) or not 1 <= len(roots) <= KEY_ROOTS_MAX:
        raise ValueError(roots)
    return frozenset(uuid.UUID(str(root)).bytes for root in roots)


def _microseconds(at: datetime | None) -> int | None:
    if at is None:
        return None
    since = at - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * SECOND_US + since.microseconds
