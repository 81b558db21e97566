"""Those who verify: a server that is asked, and an export of it that is checked without any."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import peculium
from peculium import BudgetRef, Client
from peculium.errors import PeculiumError
from peculium_server.archive.files import ExportUnreadable
from peculium_server.archive.verifying import verify_file
from peculium_server.archive.writing import JsonlSink
from peculium_server.cli.export_records import record_of
from peculium_server.cli.trusting import Known
from peculium_server.core.verify import Finding
from peculium_server.signing import is_signed

REFUSED: Final = "refused"
"""In place of a rule: there was no verdict, but an error."""

Place = tuple[bytes, bytes, int]
"""What a finding names: a tree, a budget of it, and an entry of that; empty, empty and 0 where it names none."""


@dataclass(frozen=True)
class Expected:
    """What a finding may say, so that whoever reads it knows where to look."""

    rules: Collection[str]
    places: Collection[Place]
    words: str = ""
    """They have to be in its detail."""

    def is_said(self, finding: Finding) -> bool:
        """Whether a finding says so."""
        return (
            finding.rule in self.rules
            and finding[:3] in self.places
            and self.words in finding.detail
        )


@dataclass(frozen=True)
class Audited:
    """What one verification has come to."""

    findings: tuple[Finding, ...]
    seconds: float
    entries: int = 0

    def named(self, expected: Sequence[Expected]) -> Finding | None:
        """The finding that names what was done; None if none does."""
        said = (one for one in self.findings if any(each.is_said(one) for each in expected))
        return next(said, None)


class Auditor:
    """Verifies a ledger that a server serves, knowing the operator's public keys."""

    def __init__(
        self, address: str, client: Client, folder: Path, keys: Mapping[bytes, bytes]
    ) -> None:
        self.address = address
        """Of the server."""
        self._client = client
        self._file = folder / "export.jsonl"
        self._keys = keys

    @classmethod
    @contextlib.contextmanager
    def of(cls, address: str, folder: Path, keys: Mapping[bytes, bytes]) -> Iterator[Auditor]:
        """Connect to a server."""
        with peculium.connect(address, timeout=60) as client:
            yield cls(address, client, folder, keys)

    def online(
        self,
        tree: bytes | None = None,
        *,
        published: Mapping[int, bytes] | None = None,
        keys_known: bool = True,
    ) -> Audited:
        """What `peculium verify` finds, in one tree or in all.

        Args:
            tree: Its root; None: all.
            published: Hashes of checkpoints that were published.
            keys_known: Say `--public-key`.
        """
        begun = time.monotonic()
        known = Known(self._keys if keys_known else None, published or {})
        try:
            *_, last = self._client.audit.verify(_ref(tree))
            contradicted = known.contradicted(self._client.audit.checkpoints())
        except PeculiumError as error:
            return Audited((_refused(error),), time.monotonic() - begun)
        told = (*last.findings, *contradicted)
        findings = tuple(
            Finding(one.root_id, one.budget_id or b"", one.seq, one.rule, one.detail)
            for one in told
        )
        assert bool(last.findings) is not last.verified
        return Audited(findings, time.monotonic() - begun, last.entries)

    def offline(
        self,
        tree: bytes | None = None,
        *,
        published: Mapping[int, bytes] | None = None,
        keys_known: bool = True,
    ) -> Audited:
        """What `peculium audit verify --export` finds in what `peculium audit export` has written."""
        self._file.unlink(missing_ok=True)
        begun = time.monotonic()
        try:
            with JsonlSink(self._file, resume=False) as sink:
                for piece in self._client.audit.export(_ref(tree)):
                    sink.take(record_of(piece))
            begun = time.monotonic()
            verified = verify_file(
                self._file,
                public_keys=self._keys if keys_known else None,
                published=published,
                is_signed=is_signed,
            )
        except (PeculiumError, ExportUnreadable) as error:
            return Audited((_refused(error),), time.monotonic() - begun)
        return Audited(verified.findings, time.monotonic() - begun, verified.counts.entries)


def _ref(tree: bytes | None) -> BudgetRef | None:
    return None if tree is None else BudgetRef("", tree, tree)


def _refused(error: Exception) -> Finding:
    return Finding(b"", b"", 0, REFUSED, f"{type(error).__name__}: {error}")
