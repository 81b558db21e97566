"""The verbs for exports: taking one away, and verifying it without a server."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from peculium import LedgerUnavailable
from peculium_server.archive.files import is_compressed
from peculium_server.archive.verifying import Verified, verify_file
from peculium_server.archive.writing import SINKS, JsonlSink, Sink
from peculium_server.cli.export_records import record_of
from peculium_server.cli.options import (
    ApiKey,
    Insecure,
    Json,
    Target,
    Timeout,
    Tree,
    connect,
    reference,
)
from peculium_server.cli.output import (
    TOLD_EVERY,
    finding_json,
    print_findings,
    print_json,
    print_line,
)
from peculium_server.cli.problems import REFUSED
from peculium_server.cli.trusting import Known
from peculium_server.core.offline.records import Counts, Recorded


class Format(StrEnum):
    """What a file may be."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


def export(
    *,
    tree: Tree = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write.", show_default=False)
    ],
    form: Annotated[
        Format,
        typer.Option("--format", help="jsonl can be verified; csv and parquet have entries only."),
    ] = Format.JSONL,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a file that was cut, or bring it up to date: jsonl only, not compressed.",
        ),
    ] = False,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Write a tree, or the whole ledger, into a file that is verified without a server, as it is at one instant.

    peculium audit export --output ledger.jsonl

    peculium audit export acme --output acme.parquet --format parquet

    peculium audit export --output ledger.jsonl --resume
    """
    if resume and form is not Format.JSONL:
        raise typer.BadParameter("only a jsonl file can be gone on with")
    counts: Counts | None = None
    sink: Sink = JsonlSink(output, resume=resume) if form is Format.JSONL else SINKS[form](output)
    after = sink.begun.after if isinstance(sink, JsonlSink) else []
    read = sink.begun.entries if isinstance(sink, JsonlSink) else 0
    with (
        sink,
        connect(target, api_key, allow_insecure, timeout) as client,
        Console(stderr=True).status("exporting") as status,
    ):
        exported = client.audit.export(None if tree is None else reference(tree), after=after)
        for piece in exported:
            record = record_of(piece)
            sink.take(record)
            if isinstance(record, Recorded):
                read += 1
                if read % TOLD_EVERY == 0:
                    status.update(f"exporting: {read:,} entries")
            elif isinstance(record, Counts):
                counts = record
    if counts is None:
        # Of a file of another format nothing is left.
        begun = form is Format.JSONL
        goes_on = begun and not is_compressed(output)
        left = f"remove {output}, which is cut, and export" if begun else "export"
        advice = "--resume goes on" if goes_on else f"{left} anew: only plain jsonl is gone on with"
        raise LedgerUnavailable(f"the server ended the export before its end: {advice}")
    if json:
        print_json({"file": str(output), **counts._replace(entries=read)._asdict()})
    else:
        print_line(
            f"{output}: {read:,} entries, {counts.budgets:,} budgets, {counts.holds:,} holds"
        )


def verify_export(path: Path, known: Known, *, decide: bool, json: bool) -> None:
    """Verify a file, and end with the exit code that says so.

    Args:
        path: The file.
        known: What is known from elsewhere. Without keys those are used that the file names itself.
        decide: Make every decision again too.
        json: For machines.
    """
    from peculium_server.signing import is_signed  # noqa: PLC0415 - takes long to import

    errors = Console(stderr=True)
    if known.public_keys is None:
        errors.print(Text(_NO_KEY), soft_wrap=True)
    with errors.status("verifying") as status:
        verified = verify_file(
            path,
            public_keys=known.public_keys,
            published=known.published,
            is_signed=is_signed,
            decide=decide,
            progress=lambda read: status.update(f"verifying: {read:,} entries"),
        )
    if json:
        print_json(_verified_json(verified, trusted=known.public_keys is not None))
    else:
        _print_verified(verified)
    if verified.findings:
        raise typer.Exit(REFUSED)


_NO_KEY: Final = (
    "no --public-key: signatures are checked with the keys that the export names itself. That proves"
    " that it is consistent, not that it is your ledger's."
)


def _verified_json(verified: Verified, *, trusted: bool) -> dict[str, object]:
    return {
        "verified": not verified.findings,
        "keys_trusted": trusted,
        **verified.counts._asdict(),
        "trees": verified.trees,
        "unsealed": verified.unsealed,
        "findings": [finding_json(finding) for finding in verified.findings],
    }


def _print_verified(verified: Verified) -> None:
    counts = verified.counts
    counted = f"{counts.entries:,} entries of {verified.trees:,} trees"
    if verified.unsealed is None:
        sealed = "no checkpoint is in the export: that nothing was cut off its end is not proved"
    else:
        sealed = f"{counts.checkpoints:,} checkpoints; {verified.unsealed:,} entries after the last"
    if not verified.findings:
        print_line(f"verified: {counted}: hashes, money, tokens, holds and rows hold")
        print_line(sealed)
        return
    print_findings(counted, verified.findings)
