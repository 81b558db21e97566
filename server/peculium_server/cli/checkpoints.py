"""The verbs about checkpoints: making the key that they are signed with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peculium_server.cli.options import Json
from peculium_server.cli.output import print_json, print_line


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
