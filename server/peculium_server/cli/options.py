"""The options and arguments that many verbs share, and what becomes of them."""

from __future__ import annotations

import uuid
from typing import Annotated, Final

import typer

import peculium
from peculium import BudgetRef, Client

_ID_PARTS_MAX: Final = 2

Target = Annotated[
    str | None,
    typer.Option(
        "--target", help="The server, as host:port. Default: 127.0.0.1:7415. Or PECULIUM_TARGET."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="The key to call with. Better given as PECULIUM_API_KEY."),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--allow-insecure",
        help="Send the key in clear text to another machine: something else encrypts the connection.",
    ),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.1, help="Seconds to wait for each answer.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for machines.")]
Budget = Annotated[
    str,
    typer.Argument(
        help="Its path, such as acme/research; or ids, as ROOT or ROOT/BUDGET.", show_default=False
    ),
]


def connect(
    target: str | None, api_key: str | None, allow_insecure: bool, timeout: float
) -> Client:
    """A client of the server that the options name."""
    return peculium.connect(target, api_key=api_key, allow_insecure=allow_insecure, timeout=timeout)


def reference(text: str) -> str | BudgetRef:
    """A budget as it was named: by its path, or by its ids as they are printed."""
    parts = text.split("/")
    try:
        ids = [uuid.UUID(part).bytes for part in parts]
    except ValueError:
        return text
    return BudgetRef("", ids[0], ids[-1]) if len(ids) <= _ID_PARTS_MAX else text


def parse_labels(given: list[str] | None) -> dict[str, str]:
    """Labels as they are written on the command line."""
    labels = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{text!r} is no label: write key=value")
        labels[key] = value
    return labels
