"""The verbs for API keys: they call a running server, but for the first key, which goes to the database itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.text import Text

from peculium import ApiKey, BudgetRef, Client, KeyInfo, KeyState, NewKey, Role
from peculium_server.cli.options import (
    ApiKey as ApiKeyOption,
    Insecure,
    Json,
    Target,
    Timeout,
    connect,
    reference,
)
from peculium_server.cli.output import new_table, print_json, print_line, time_text, wide_console
from peculium_server.core.refusals import id_text

_DURATION = re.compile(r"(\d+)([smhdw])", re.ASCII)
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_STYLES: Final = {KeyState.EXPIRED: "yellow", KeyState.REVOKED: "dim"}

app = typer.Typer(
    no_args_is_help=True,
    help="""
    Say who may call: make, list, rotate and revoke API keys.

    The first one of a ledger goes straight to its database:

        peculium keys bootstrap --database-url postgresql://ledger@db.example/peculium

    The others are made by whoever has an admin's key:

        export PECULIUM_API_KEY=pek_…

        peculium keys create research-gateway --role agent --expires 90d
    """,
)


class RoleName(Enum):
    """Roles as they are written."""

    AGENT = "agent"
    ADMIN = "admin"
    AUDITOR = "auditor"


Key = Annotated[
    str, typer.Argument(help="Its id; or a text of it, pek_…, whole.", show_default=False)
]
Expires = Annotated[
    str | None,
    typer.Option("--expires", help="How long it is valid: 12h, 90d.", show_default="until revoked"),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Write the key to this file, for its owner only, and print it nowhere."
    ),
]


@app.command()
def create(
    *,
    principal: Annotated[str, typer.Argument(help="Who is to call with it.", show_default=False)],
    role: Annotated[
        list[RoleName] | None,
        typer.Option(help="As what; may be repeated.", show_default="agent"),
    ] = None,
    root: Annotated[
        list[str] | None,
        typer.Option(
            help="Limited to this root, by name or id; may be repeated.", show_default="all roots"
        ),
    ] = None,
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires: Expires = None,
    out: Out = None,
    target: Target = None,
    api_key: ApiKeyOption = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Make a key. It is printed once, alone on the output, and never again.

    peculium keys create research-gateway --expires 90d

    peculium keys create finance --role auditor --root acme --out finance.key
    """
    roles = [Role[each.name] for each in role or (RoleName.AGENT,)]
    lifetime = parse_duration("--expires", expires)
    with (
        _handed_over(out, replacing=False) as hand_over,
        connect(target, api_key, allow_insecure, timeout) as client,
    ):
        roots = None if not root else [_root(client, each) for each in root]
        made = client.admin.keys.create(
            principal, roles=roles, roots=roots, label=label, lifetime=lifetime
        )
        hand_over.append(made.key)
    _tell_new(made, out, json=json)


@app.command("list")
def list_keys(
    *,
    principal: Annotated[str | None, typer.Option(help="Of this principal.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Expired and revoked ones, too.")
    ] = False,
    target: Target = None,
    api_key: ApiKeyOption = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """List the keys of the ledger. Those of a server's key file are not among them.

    peculium keys list --principal research-gateway --all
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        keys = [
            key
            for key in client.admin.keys.list(principal)
            if everything or key.state is KeyState.ACTIVE
        ]
    if json:
        for key in keys:
            print_json(key_json(key))
        return
    table = new_table("principal", "roles", "roots", "state", "label", whole=("expires", "id"))
    for key in keys:
        table.add_row(
            Text(key.principal),
            _roles(key),
            _roots(key),
            key.state.name.lower(),
            Text(key.label),
            time_text(key.expires_at) or "never",
            key.key_id,
            style=_STYLES.get(key.state, ""),
        )
    wide_console().print(table)


@app.command()
def show(
    *,
    key: Key,
    target: Target = None,
    api_key: ApiKeyOption = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Show a key, and who has done what to it.

    peculium keys show 0192f0c1-…
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        found = client.admin.keys.show(_key_id(key))
    if json:
        print_json(key_json(found))
        return
    _print_key(found)
    table = new_table("at", "what", "by", "with key", "why", whole=("operation",))
    for act in found.acts:
        table.add_row(
            time_text(act.at),
            act.kind.lower(),
            Text(act.by),
            act.by_key or "",
            Text(act.reason),
            act.operation_id,
        )
    wide_console().print(table)


@app.command()
def rotate(
    *,
    key: Key,
    overlap: Annotated[
        str,
        typer.Option(help="How long the text before stays valid: 1h, 7d; 0s: not at all."),
    ] = "1h",
    expires: Annotated[
        str | None,
        typer.Option(help="How long it is valid from now: 90d.", show_default="as long as before"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the key to this file, in place of what is there, and print it nowhere."
        ),
    ] = None,
    target: Target = None,
    api_key: ApiKeyOption = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """Give a key a new text, which is printed once. The one before stays valid for a while.

    peculium keys rotate 0192f0c1-… --overlap 1d --expires 90d
    """
    overlapping = parse_duration("--overlap", overlap) or timedelta()
    lifetime = parse_duration("--expires", expires)
    with (
        _handed_over(out, replacing=True) as hand_over,
        connect(target, api_key, allow_insecure, timeout) as client,
    ):
        made = client.admin.keys.rotate(_key_id(key), overlap=overlapping, lifetime=lifetime)
        hand_over.append(made.key)
    _tell_new(made, out, json=json)


@app.command()
def revoke(
    *,
    key: Key,
    reason: Annotated[str, typer.Option(help="Why; it is recorded.")] = "",
    target: Target = None,
    api_key: ApiKeyOption = None,
    allow_insecure: Insecure = False,
    timeout: Timeout = 10,
    json: Json = False,
) -> None:
    """End a key, with all its texts: at once here, within two seconds at every other server.

    peculium keys revoke pek_… --reason 'was in a public repository'
    """
    with connect(target, api_key, allow_insecure, timeout) as client:
        ended = client.admin.keys.revoke(_key_id(key), reason)
    if json:
        print_json(key_json(ended))
        return
    print_line(f"revoked key {ended.key_id} of {ended.principal}")


@app.command()
def bootstrap(
    *,
    principal: Annotated[str, typer.Argument(help="Who is to call with it.")] = "admin",
    expires: Expires = None,
    out: Out = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            help="The ledger's PostgreSQL, as its owner or a server's user. Without it, the one that"
            " peculium serve keeps for itself. Or PECULIUM_DATABASE_URL.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(
            help="Where that one keeps its data. Or PECULIUM_DATA_DIR.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Make an admin's key straight in the database: the first one, or another if all are lost.

    Whoever may add to the ledger's database may do so; it is recorded under that user's name.

        peculium keys bootstrap --database-url postgresql://ledger@db.example/peculium --out admin.key

        peculium keys bootstrap
    """
    # Here, so that the verbs of clients do not wait for the server's modules.
    from peculium_server.config import Config  # noqa: PLC0415
    from peculium_server.embedded import EmbeddedPostgres  # noqa: PLC0415

    config = Config.load({"database_url": database_url, "data_dir": data_dir})
    lifetime = parse_duration("--expires", expires)
    key = ApiKey.new()
    with _handed_over(out, replacing=False) as hand_over:
        if config.database_url is not None:
            _add_admin(config.database_url, key, principal, lifetime)
        else:
            with EmbeddedPostgres.start(config.data_dir, progress=_say) as postgres:
                _add_admin(postgres.dsn, key, principal, lifetime)
        hand_over.append(key)
    _say(f"made an admin's key for {principal} in {config.told_database}")
    if json:
        told = {"key_id": id_text(key.key_id), "principal": principal, "roles": ["admin"]}
        print_json(told | ({} if out else {"key": key.reveal()}))
    elif out is None:
        typer.echo(key.reveal())


@app.command()
def new() -> None:
    """Make a key for a key file: print it, and the lines for the file. Nothing is called or recorded."""
    # Here, so that the verbs of clients do not wait for it.
    from peculium_server.identity import digest_of  # noqa: PLC0415

    key = ApiKey.new()
    _say("the lines for the key file, as keys_file names it:")
    _say(f'[[keys]]\nprincipal = "…"\nrole = "agent"\nsha256 = "{digest_of(key.reveal()).hex()}"')
    _say("the key, shown this once:")
    typer.echo(key.reveal())


def parse_duration(option: str, text: str | None) -> timedelta | None:
    """A duration as it is written on the command line: 45s, 30m, 12h, 90d, 4w."""
    if text is None:
        return None
    found = _DURATION.fullmatch(text)
    if found is None or int(found[1]) > _COUNT_MAX:
        problem = f"{option}: {text!r} is no duration: write 45s, 30m, 12h, 90d or 4w"
        raise typer.BadParameter(problem)
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


_COUNT_MAX: Final = 10**9


def key_json(key: KeyInfo) -> dict[str, Any]:
    """A key for machines."""
    return {
        "key_id": key.key_id,
        "principal": key.principal,
        "roles": [role.name.lower() for role in key.roles],
        "roots": None if key.roots is None else [id_text(root) for root in key.roots],
        "label": key.label,
        "state": key.state.name.lower(),
        "expires_at": time_text(key.expires_at),
        "overlap_until": time_text(key.overlap_until),
        "acts": [
            {
                "kind": act.kind.lower(),
                "at": time_text(act.at),
                "by": act.by,
                "by_key": act.by_key,
                "operation_id": act.operation_id,
                "reason": act.reason,
            }
            for act in key.acts
        ],
    }


def _print_key(key: KeyInfo) -> None:
    facts = {
        "key": key.key_id,
        "principal": key.principal,
        "roles": _roles(key),
        "roots": _roots(key),
        "label": key.label,
        "state": key.state.name.lower(),
        "expires": time_text(key.expires_at) or "never",
        "text before until": time_text(key.overlap_until),
    }
    for name, value in facts.items():
        if value:
            print_line(f"{name}: {value}")


def _roles(key: KeyInfo) -> str:
    return " ".join(role.name.lower() for role in key.roles)


def _roots(key: KeyInfo) -> str:
    return "all" if key.roots is None else " ".join(id_text(root) for root in key.roots)


def _root(client: Client, text: str) -> bytes:
    """The id of a root: as it is written, or looked up by its name."""
    named = reference(text)
    return (named if isinstance(named, BudgetRef) else client.audit.budget(named).ref).root_id


def _key_id(text: str) -> str | bytes:
    """The id of a key: as it is written, or that of a text of it."""
    return ApiKey.parse(text).key_id if text.startswith("pek_") else text


@contextlib.contextmanager
def _handed_over(path: Path | None, *, replacing: bool) -> Iterator[list[ApiKey]]:
    """Where a key is put that is to be written to a file.

    The file is made before the key is: a key that cannot be written is not made.
    """
    if path is None:
        yield []
        return
    if path.exists() and not replacing:
        raise typer.BadParameter(f"--out: {path} is there already")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        file = os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
    except OSError as error:
        raise typer.BadParameter(f"--out: {path} cannot be made: {error.strerror}") from None
    try:
        with file:
            keys: list[ApiKey] = []
            yield keys
            file.write(f"{keys[0].reveal()}\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _tell_new(made: NewKey, out: Path | None, *, json: bool) -> None:
    info = made.info
    if json:
        print_json(key_json(info) | ({} if out else {"key": made.key.reveal()}))
        return
    until = time_text(info.expires_at)
    _say(
        f"key {info.key_id} of {info.principal} ({_roles(info)}; roots: {_roots(info)}),"
        f" {'valid until revoked' if until is None else f'expires {until}'}"
    )
    if info.overlap_until is not None:
        _say(f"the text before stays valid until {time_text(info.overlap_until)}")
    if out is not None:
        _say(f"written to {out}")
        return
    _say("shown this once:")
    typer.echo(made.key.reveal())


def _add_admin(dsn: str, key: ApiKey, principal: str, lifetime: timedelta | None) -> None:
    # Here, so that the verbs of clients do not wait for the server's modules.
    from peculium_server.bootstrap import add_admin  # noqa: PLC0415

    lifetime_us = None if lifetime is None else lifetime // timedelta(microseconds=1)
    asyncio.run(add_admin(dsn, key.key_id, key.digest, principal, lifetime_us))


def _say(line: str) -> None:
    typer.echo(line, err=True)
