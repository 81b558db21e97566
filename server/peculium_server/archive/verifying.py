"""Verification of an export's file."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from peculium_server.archive.files import opened, records
from peculium_server.core.checkpoint import SignatureCheck
from peculium_server.core.offline.export import ExportAudit
from peculium_server.core.offline.records import (
    BudgetRow,
    Counts,
    Header,
    HoldRow,
    LeafOf,
    Recorded,
    SealedBy,
)
from peculium_server.core.verify import Finding

_PROGRESS_ENTRIES: Final = 10_000


class Verified(NamedTuple):
    """What a verification has come to."""

    counts: Counts
    trees: int
    unsealed: int | None
    """Entries after the last checkpoint, which nothing has sealed yet; None: there is no checkpoint."""
    findings: tuple[Finding, ...]
    """What is wrong, the first finding of each tree; empty: the export is verified."""


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Nothing refers to itself in what is kept of millions of entries: to look for that takes a tenth more."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def verify_file(
    path: Path,
    *,
    public_keys: Mapping[bytes, bytes] | None,
    is_signed: SignatureCheck,
    decide: bool = False,
    published: Mapping[int, bytes] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Verified:
    """Verify a complete export.

    Args:
        path: Its file.
        public_keys: Those that are trusted, by their ids; None: those that the export itself names.
        is_signed: Checks signatures.
        decide: Make every decision again too, which takes several times as long.
        published: Hashes of checkpoints that are known from elsewhere, by their numbers.
        progress: Is told now and then how many entries were read.

    Raises:
        ExportUnreadable: It is none, is cut or damaged.
    """
    audit = ExportAudit(
        public_keys=public_keys, is_signed=is_signed, decide=decide, published=published
    )
    read = 0
    with opened(path) as file, _without_garbage_collection():
        for record in records(file):
            if type(record) is Recorded:
                lane, entry = record
                audit.entry(entry, lane)
                read += 1
                if read % _PROGRESS_ENTRIES == 0:
                    progress(read)
                continue
            match record:
                case HoldRow(root_id, hold, token_digest):
                    audit.hold(root_id, hold, token_digest)
                case LeafOf():
                    audit.leaf(record)
                case BudgetRow(budget, token_digest):
                    audit.budget(budget, token_digest)
                case SealedBy():
                    audit.checkpoint(record)
                case Header():
                    audit.header(record)
                case Counts():
                    audit.trailer(record)
                case _:
                    raise AssertionError("an entry was taken before")
    findings = tuple(audit.finish())
    return Verified(audit.counts, len(audit.trees), audit.unsealed, findings)
