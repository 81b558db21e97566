"""The verbs of whoever operates the ledger's database."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from peculium_server.cli.options import TLS, Json, Timeout, TlsOptions
from peculium_server.cli.output import new_table, print_json, print_line
from peculium_server.cli.problems import REFUSED
from peculium_server.cli.serving import database_of, option
from peculium_server.config import PORT_DEFAULT, Config
from peculium_server.core.refusals import id_text, time_text

if TYPE_CHECKING:
    from peculium_server.store.examine import Finding

_RENEWED_BEFORE: Final = timedelta(days=14)
"""A certificate that expires sooner should have been renewed by what renews it."""
_STYLES: Final = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def restored(
    *,
    reason: Annotated[
        str,
        typer.Option(
            help="What happened, and what was reconciled: it is recorded, and auditors read it.",
            show_default=False,
        ),
    ],
    by: Annotated[
        str | None, typer.Option(help="Who says so. Default: the user of this machine.")
    ] = None,
    nothing_lost: Annotated[
        bool,
        typer.Option(
            "--nothing-lost",
            help="Everything that was acknowledged is there, as after the failover to a synchronous"
            " standby: clients go on as if nothing had happened.",
        ),
    ] = False,
    database_url: Annotated[str | None, option("database_url")] = None,
    data_dir: Annotated[str | None, option("data_dir")] = None,
    json: Json = False,
) -> None:
    """Say that a ledger whose database was restored, or copied, may go on.

    Until then it answers reads and takes settles, and nothing new is spent. What was consumed after the
    moment that was restored to is live again: reconcile first, as docs/operating/restore.md says.

        peculium restored --database-url postgresql://ledger@db.example/peculium
        --reason "disk lost; restored to 12:00; bills until 12:40 reconciled"

    Run it after every restore, also if no server has noticed it: clients that have seen what is lost are
    told then.
    """
    # Here, so that the verbs of clients do not wait for the server's modules.
    from peculium_server.store import operating  # noqa: PLC0415

    config = Config.load({"database_url": database_url, "data_dir": data_dir})
    with database_of(config) as dsn:
        before, after = asyncio.run(
            operating.restored(
                dsn,
                principal=by or getpass.getuser(),
                reason=reason,
                nothing_lost=nothing_lost,
            )
        )
    if json:
        print_json(
            {
                "was_frozen": before.frozen,
                "noticed": before.reason if before.frozen else None,
                "noticed_at": time_text(before.at) if before.frozen else None,
                "incarnation_before": id_text(before.incarnation),
                "incarnation": id_text(after.incarnation),
                "confirmed_by": after.principal,
                "positions": list(after.positions),
            }
        )
        return
    if before.frozen:
        print_line(f"noticed at {time_text(before.at)}: {before.reason}")
    else:
        print_line("no server had noticed a restore")
    print_line(
        f"the ledger goes on as incarnation {id_text(after.incarnation)},"
        f" with {sum(after.positions):,} operations, as {after.principal} has said"
    )
    print_line(
        "servers that run learn of it within seconds, or end if they are of another incarnation"
    )


def doctor(
    *,
    database_url: Annotated[str | None, option("database_url")] = None,
    data_dir: Annotated[str | None, option("data_dir")] = None,
    tls_cert_file: Annotated[str | None, option("tls_cert_file")] = None,
    tls_key_file: Annotated[str | None, option("tls_key_file")] = None,
    tls_client_ca_file: Annotated[str | None, option("tls_client_ca_file")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="A server to ask for its health, too, as host:port.",
            envvar="PECULIUM_TARGET",
            show_default=False,
        ),
    ] = None,
    timeout: Timeout = 10,
    json: Json = False,
) -> int | None:
    """Look for what is wrong with a ledger's database and a server; each finding has its remedy.

    Run it as the user that the server connects as, on the server's machine. It changes nothing. Fails if
    a check does; warnings are told, and do not count.

        peculium doctor --database-url postgresql://peculium@db.example/peculium --target 127.0.0.1:7415
    """
    config = Config.load(
        {
            "database_url": database_url,
            "data_dir": data_dir,
            "tls_cert_file": tls_cert_file,
            "tls_key_file": tls_key_file,
            "tls_client_ca_file": tls_client_ca_file,
        }
    )
    # Here, so that the verbs of clients do not wait for the server's modules.
    from peculium_server.store.examine import Level  # noqa: PLC0415

    findings = [*_of_database(config), *_of_certificate(config)]
    if target is not None:
        findings.append(_of_server(target, timeout))
    if json:
        for finding in findings:
            print_json(finding._asdict())
    else:
        _print_findings(findings)
    return REFUSED if any(finding.level is Level.FAILED for finding in findings) else None


def health(
    *,
    target: Annotated[
        str,
        typer.Option(
            help="The server, as host:port. Or PECULIUM_TARGET.",
            envvar="PECULIUM_TARGET",
            show_envvar=False,
        ),
    ] = f"127.0.0.1:{PORT_DEFAULT}",
    timeout: Timeout = 5,
) -> int | None:
    """Ask a server whether it answers operations, as orchestrators do. Fails if it does not.

    Anybody may ask, without a key. It asks that server only, and looks at nothing else, as doctor does.

        peculium health --target 127.0.0.1:7415
    """
    from peculium_server.rpc.asking import SERVING, health as asked  # noqa: PLC0415 - as above

    said = asked(target, (TLS.get() or TlsOptions()).read(), seconds_max=timeout)
    print_line(said)
    return None if said == SERVING else REFUSED


def _of_database(config: Config) -> list[Finding]:
    from peculium_server.store.examine import Finding, Level, examine  # noqa: PLC0415 - as above

    embedded = config.database_url is None
    if embedded and not config.data_dir.exists():
        said = f"none is configured, and there is none of a server's own in {config.data_dir}"
        return [
            Finding("database", Level.FAILED, said, "name it with --database-url or --data-dir")
        ]

    async def collect(dsn: str) -> list[Finding]:
        return [finding async for finding in examine(dsn, embedded=embedded)]

    with database_of(config) as dsn:
        return asyncio.run(collect(dsn))


def _of_certificate(config: Config) -> Iterator[Finding]:
    """What is wrong with the files that the server encrypts with, if it does."""
    from peculium_server.certificates import expiry  # noqa: PLC0415 - as above
    from peculium_server.rpc.tls import Tls, TlsFiles, TlsInvalid  # noqa: PLC0415
    from peculium_server.store.examine import Finding, Level  # noqa: PLC0415

    certificate, key = config.tls_cert_file, config.tls_key_file
    if certificate is None or key is None:
        return
    try:
        Tls(TlsFiles(certificate, key, config.tls_client_ca_file))
        ends = expiry(certificate.read_bytes())
    except TlsInvalid as error:
        yield Finding("certificate", Level.FAILED, str(error), "see docs/operating/identity.md")
        return
    left = ends - datetime.now(UTC)  # noqa: TID251 - what clients compare it with is a clock, too
    said = f"{certificate} expires at {ends.isoformat()}"
    remedy = "renew it; the server reads the files again when they change"
    if left < timedelta():
        yield Finding("certificate", Level.FAILED, said, remedy)
    elif left < _RENEWED_BEFORE:
        yield Finding("certificate", Level.WARNING, said, remedy)
    else:
        yield Finding("certificate", Level.OK, said)


def _of_server(target: str, timeout: float) -> Finding:
    from peculium_server.rpc.asking import SERVING, health  # noqa: PLC0415 - as above
    from peculium_server.store.examine import Finding, Level  # noqa: PLC0415

    said = health(target, (TLS.get() or TlsOptions()).read(), seconds_max=timeout)
    if said == SERVING:
        return Finding("server", Level.OK, f"{target} says {said}")
    remedy = "look at its log, and at what it says of its database"
    return Finding("server", Level.FAILED, f"{target}: {said}", remedy)


def _print_findings(findings: Iterable[Finding]) -> None:
    table = new_table("check", "", "found", "what to do")
    for finding in findings:
        style = _STYLES[finding.level.value]
        table.add_row(
            finding.check,
            Text(finding.level.value, style),
            Text(finding.said),
            Text(finding.remedy),
        )
    Console().print(table)
