"""What an auditor knows from elsewhere, and no ledger can make anew: keys and hashes that were published."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Final, NamedTuple

import typer

from peculium import Checkpoint, Finding
from peculium_server.cli.options import parse_public_key
from peculium_server.core.checkpoint import RULE, Published, key_id_of, wrong_signature

PublicKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--public-key",
        help="Whose checkpoints to trust: a file, or 64 hexadecimal digits; may be repeated. Without it"
        " the ledger itself names the keys.",
    ),
]
PublishedHashes = Annotated[
    list[str] | None,
    typer.Option(
        "--published",
        metavar="NUMBER:HASH",
        help="A checkpoint that was published, which has to be there with this hash; may be repeated.",
    ),
]

_PUBLISHED: Final = re.compile(r"([1-9][0-9]{0,18}):([0-9a-fA-F]{64})")


class Known(NamedTuple):
    """What is known from elsewhere."""

    public_keys: Mapping[bytes, bytes] | None
    """By their ids; None: nothing."""
    published: Mapping[int, bytes]
    """Hashes of checkpoints by their numbers."""

    @classmethod
    def parse(cls, public_keys: list[str] | None, published: list[str] | None) -> Known:
        """What is given on the command line.

        Raises:
            SigningKeyInvalid: A file has no key.
        """
        keys = [parse_public_key(each) for each in public_keys or ()]
        hashes: dict[int, bytes] = {}
        for text in published or ():
            match = _PUBLISHED.fullmatch(text)
            if match is None:
                raise typer.BadParameter(f"{text!r} is no checkpoint: write NUMBER:HASH")
            number, digest = int(match[1]), bytes.fromhex(match[2])
            if hashes.setdefault(number, digest) != digest:
                raise typer.BadParameter(f"checkpoint {number} is given with two hashes")
        return cls({key_id_of(key): key for key in keys} or None, hashes)

    def contradicted(self, checkpoints: Iterable[Checkpoint]) -> list[Finding]:
        """What is wrong with checkpoints that verify by themselves, from the first one on."""
        if self.public_keys is None and not self.published:
            return []
        from peculium_server.signing import is_signed  # noqa: PLC0415 - takes long to import

        problem: str | None = None
        told = Published(self.published)
        for each in checkpoints:
            told.checkpoint(each.number, each.hash)
            if self.public_keys is not None and problem is None:
                problem = wrong_signature(
                    each.hash, each.key_id, each.signature, self.public_keys, is_signed
                )
                if problem is not None:
                    problem = f"checkpoint {each.number}: {problem}"
        details = [finding.detail for finding in told.finish()]
        return [
            Finding(b"", None, 0, RULE, detail)
            for detail in (*([] if problem is None else [problem]), *details)
        ]
