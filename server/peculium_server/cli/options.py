"""The options and arguments that many verbs share, and what becomes of them."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer

import peculium
from peculium import BudgetRef, Client

_ID_PARTS_MAX: Final = 2
_HEX_KEY: Final = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)

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
TlsSwitch = Annotated[
    bool | None,
    typer.Option(
        "--tls/--no-tls",
        envvar="PECULIUM_TLS",
        help="Encrypt the connection; so do the following, unless it is --no-tls. Or PECULIUM_TLS.",
        show_default=False,
        show_envvar=False,
    ),
]


def _tls_option(flag: str, meaning: str) -> Any:
    variable = "PECULIUM_" + flag.removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        flag,
        envvar=variable,
        help=f"{meaning} Or {variable}.",
        show_default=False,
        show_envvar=False,
    )


TlsCaFile = Annotated[
    str | None,
    _tls_option(
        "--tls-ca-file", "Who may vouch for the server, as PEM; else those that gRPC brings along."
    ),
]
TlsCertFile = Annotated[
    str | None, _tls_option("--tls-client-cert-file", "The client's own certificate, as PEM.")
]
TlsKeyFile = Annotated[
    str | None, _tls_option("--tls-client-key-file", "The private key of that certificate.")
]
TlsServerName = Annotated[
    str | None,
    _tls_option(
        "--tls-server-name",
        "The name that the server's certificate has to have; else the target's.",
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
Tree = Annotated[
    str | None,
    typer.Argument(
        help="A root, or any budget of its tree. Absent: the whole ledger.", show_default=False
    ),
]
Kinds = Annotated[
    list[str] | None,
    typer.Option("--kind", help="Of this kind, as settle; may be repeated: any of them."),
]
Principals = Annotated[
    list[str] | None,
    typer.Option("--principal", help="By this principal, or system; may be repeated: any of them."),
]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="key=value; may be repeated: all of them.")
]
Since = Annotated[
    str | None,
    typer.Option(
        help="From this time on, such as 2026-11-01 or 2026-11-01T12:00+01:00; UTC unless it says so.",
        show_default="the beginning",
    ),
]
Until = Annotated[str | None, typer.Option(help="Before this time.", show_default="now")]


def connect(
    target: str | None, api_key: str | None, allow_insecure: bool, timeout: float
) -> Client:
    """A client of the server that the options name."""
    tls = (TLS.get() or TlsOptions()).read()
    return peculium.connect(
        target, api_key=api_key, allow_insecure=allow_insecure, timeout=timeout, tls=tls
    )


class TlsOptions(NamedTuple):
    """How to encrypt, as is said before the verb or in the environment."""

    switch: bool | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None

    def read(self) -> peculium.Tls | bool:
        """With which certificates; False: not at all.

        Raises:
            Malformed: A file cannot be read.
        """
        switch, *named = self
        if switch is False or not (switch or any(named)):
            return False
        return peculium.Tls.of_files(
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
            server_name=self.server_name,
        )


TLS: Final[ContextVar[TlsOptions | None]] = ContextVar("tls", default=None)
"""What was said before the verb."""


def reference(text: str) -> str | BudgetRef:
    """A budget as it was named: by its path, or by its ids as they are printed."""
    parts = text.split("/")
    try:
        ids = [uuid.UUID(part).bytes for part in parts]
    except ValueError:
        return text
    return BudgetRef("", ids[0], ids[-1]) if len(ids) <= _ID_PARTS_MAX else text


def parse_time(option: str, text: str | None) -> datetime | None:
    """A time as it is written on the command line: in UTC, unless it says another zone."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        problem = f"{option}: {text!r} is no time: write 2026-11-01 or 2026-11-01T12:00Z"
        raise typer.BadParameter(problem) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def parse_id(text: str | None) -> bytes | None:
    """An id as it is printed."""
    try:
        return None if text is None else uuid.UUID(text).bytes
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no id: write a UUID") from None


def parse_kinds(given: list[str] | None) -> list[str]:
    """Kinds of operations as the ledger names them."""
    return [each.upper() for each in given or ()]


def parse_public_key(text: str) -> bytes:
    """A public key: its hexadecimal digits, or a file that has it.

    Raises:
        SigningKeyInvalid: The file has none.
    """
    # Here, so that the other verbs do not wait for it.
    from peculium_server.signing import load_public_key  # noqa: PLC0415

    return bytes.fromhex(text) if _HEX_KEY.fullmatch(text) else load_public_key(Path(text))


def parse_labels(given: list[str] | None) -> dict[str, str]:
    """Labels as they are written on the command line."""
    labels = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{text!r} is no label: write key=value")
        labels[key] = value
    return labels
