"""The verbs about checkpoints: listing them, proving an entry, making the key that they are signed with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from peculium import Checkpoint, Proof
from peculium_server.cli.options import (
    ApiKey,
    Budget,
    Insecure,
    Json,
    Target,
    Timeout,
    connect,
    parse_public_key,
    reference,
)
from peculium_server.cli.output import (
    entry_json,
    new_table,
    print_json,
    print_line,
    time_text,
    wide_console,
)
from peculium_server.cli.problems import REFUSED


def checkpoints(
    *,
    oldest_first: Annotated[
        bool, typer.Option("--oldest-first", help="In the order of sealing.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 50,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show the sealed checkpoints, the latest first.

    peculium audit checkpoints --limit 1
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        listed = itertools.islice(
            client.audit.checkpoints(descending=not oldest_first), limit or None
        )
        if json:
            for checkpoint in listed:
                print_json(_checkpoint_json(checkpoint))
        else:
            _print_checkpoints(listed)


def prove(
    *,
    budget: Budget,
    seq: Annotated[int, typer.Argument(min=1, help="Which of its entries.", show_default=False)],
    public_key: Annotated[
        str | None,
        typer.Option(
            help="The one that was published: a file of it, or its 64 hexadecimal digits."
        ),
    ] = None,
    target: Target = None,
    api_key: ApiKey = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Prove that an entry is under a sealed checkpoint. The proof is checked here; fails if it does not hold.

    peculium audit prove acme/research 12 --public-key published.pem
    """
    # Here, so that the other verbs do not wait for it.
    from peculium_server.signing import is_signed  # noqa: PLC0415

    given = None if public_key is None else parse_public_key(public_key)
    with connect(target, api_key, allow_insecure, timeout) as client:
        proof = client.audit.prove(reference(budget), seq)
    checkpoint = proof.checkpoint
    key = given or checkpoint.public_key
    flaw = proof.flaw()
    if flaw is None and proof.entry.seq != seq:
        flaw = f"the proof is one of entry {proof.entry.seq}"
    if flaw is None and not is_signed(key, checkpoint.signature, checkpoint.signed_message):
        flaw = "the checkpoint is not signed with this public key"
    if json:
        print_json(_proof_json(proof, flaw, key_given=given is not None))
    else:
        _print_proof(proof, flaw, key_given=given is not None)
    if flaw is not None:
        raise typer.Exit(REFUSED)


def new_key(
    *,
    file: Annotated[
        Path, typer.Argument(help="The new file of the private key.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """Make a key that checkpoints are signed with, and print the public key, which is to be published.

    peculium audit new-key checkpoint-key.pem
    """
    # Here, so that the other verbs do not wait for it.
    from peculium_server.signing import SigningKey, public_pem  # noqa: PLC0415

    key = SigningKey.make(file)
    if json:
        print_json({"key_id": key.key_id.hex(), "public_key": key.public_key.hex()})
        return
    print_line(f"key {key.key_id.hex()}; its private key is in {file}")
    print_line(f"public key {key.public_key.hex()}")
    print_line(public_pem(key.public_key).rstrip())


def _print_checkpoints(listed: Iterable[Checkpoint]) -> None:
    table = new_table(right=("number", "operations", "leaves"), whole=("sealed at", "key", "hash"))
    for checkpoint in listed:
        table.add_row(
            str(checkpoint.number),
            f"{sum(checkpoint.positions):,}",
            f"{checkpoint.leaves:,}",
            time_text(checkpoint.sealed_at),
            checkpoint.key_id.hex(),
            checkpoint.hash.hex(),
        )
    wide_console().print(table)


def _print_proof(proof: Proof, flaw: str | None, *, key_given: bool) -> None:
    checkpoint, entry = proof.checkpoint, proof.entry
    sealed = f"{checkpoint.number}, sealed at {time_text(checkpoint.sealed_at)}"
    if flaw is not None:
        print_line(f"NOT PROVEN: {flaw}")
        return
    print_line(f"entry {entry.seq} is under checkpoint {sealed}")
    print_line(f"entry {entry.hash.hex()}")
    print_line(f"checkpoint {checkpoint.hash.hex()}")
    if key_given:
        print_line(f"signed with the public key that was given ({checkpoint.key_id.hex()})")
    else:
        print_line(
            f"signed with {checkpoint.public_key.hex()}, which is what the ledger itself says:"
            " compare it with what was published, or give --public-key"
        )


def _checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "number": checkpoint.number,
        "sealed_at": time_text(checkpoint.sealed_at),
        "incarnation": checkpoint.incarnation.hex(),
        "positions": list(checkpoint.positions),
        "merkle_root": checkpoint.merkle_root.hex(),
        "leaves": checkpoint.leaves,
        "previous_hash": checkpoint.previous_hash.hex(),
        "hash": checkpoint.hash.hex(),
        "key_id": checkpoint.key_id.hex(),
        "signature": checkpoint.signature.hex(),
        "public_key": checkpoint.public_key.hex(),
    }


def _proof_json(proof: Proof, flaw: str | None, *, key_given: bool) -> dict[str, Any]:
    return {
        "proven": flaw is None,
        "flaw": flaw,
        "public_key_given": key_given,
        "entry": entry_json(proof.entry),
        "others": [entry_json(part) for part in proof.others],
        "links": [{"digest": link.digest.hex(), "part": link.part} for link in proof.links],
        "sealed_seq": proof.sealed_seq,
        "path": [{"sibling": step.sibling.hex(), "left": step.left} for step in proof.path],
        "checkpoint": _checkpoint_json(proof.checkpoint),
    }
