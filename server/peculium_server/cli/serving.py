"""The verbs that run a server, and prepare its database."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from peculium_server.config import SERVER_SETTINGS, Config, unknown_variables

_BY_NAME = {setting.name: setting for setting in SERVER_SETTINGS}


def option(name: str) -> Any:
    """A server's setting as a flag, described in the settings' own words."""
    setting = _BY_NAME[name]
    default = f" Default: {setting.default}." if setting.default else ""
    return typer.Option(
        setting.flag,
        help=f"{setting.meaning.replace('`', '')}{default} Or {setting.variable}.",
        show_default=False,
    )


def serve(
    *,
    listen: Annotated[str | None, option("listen")] = None,
    database_url: Annotated[str | None, option("database_url")] = None,
    data_dir: Annotated[str | None, option("data_dir")] = None,
    keys_file: Annotated[str | None, option("keys_file")] = None,
    tls_cert_file: Annotated[str | None, option("tls_cert_file")] = None,
    tls_key_file: Annotated[str | None, option("tls_key_file")] = None,
    tls_client_ca_file: Annotated[str | None, option("tls_client_ca_file")] = None,
    tls_client_listen: Annotated[str | None, option("tls_client_listen")] = None,
    allow_plaintext: Annotated[bool, option("allow_plaintext")] = False,
    unsafe_settings: Annotated[bool, option("unsafe_settings")] = False,
    database_connections: Annotated[str | None, option("database_connections")] = None,
    queue_max: Annotated[str | None, option("queue_max")] = None,
    message_bytes_max: Annotated[str | None, option("message_bytes_max")] = None,
    principal_rate_max: Annotated[str | None, option("principal_rate_max")] = None,
    principal_burst_max: Annotated[str | None, option("principal_burst_max")] = None,
    principal_operations_max: Annotated[str | None, option("principal_operations_max")] = None,
    principal_streams_max: Annotated[str | None, option("principal_streams_max")] = None,
    connections_max: Annotated[str | None, option("connections_max")] = None,
    call_seconds_max: Annotated[str | None, option("call_seconds_max")] = None,
    connection_seconds_max: Annotated[str | None, option("connection_seconds_max")] = None,
    sweep_seconds: Annotated[str | None, option("sweep_seconds")] = None,
    signing_key_file: Annotated[str | None, option("signing_key_file")] = None,
    seal_seconds: Annotated[str | None, option("seal_seconds")] = None,
    alert_seconds: Annotated[str | None, option("alert_seconds")] = None,
    webhook_key_file: Annotated[str | None, option("webhook_key_file")] = None,
    webhook_allow: Annotated[str | None, option("webhook_allow")] = None,
    webhook_loopback: Annotated[bool, option("webhook_loopback")] = False,
    drain_seconds: Annotated[str | None, option("drain_seconds")] = None,
    refusal_days: Annotated[str | None, option("refusal_days")] = None,
    freeze_on_reuse_seconds: Annotated[str | None, option("freeze_on_reuse_seconds")] = None,
    balance_roots: Annotated[str | None, option("balance_roots")] = None,
    metrics_listen: Annotated[str | None, option("metrics_listen")] = None,
    log_format: Annotated[str | None, option("log_format")] = None,
    log_level: Annotated[str | None, option("log_level")] = None,
    ready_file: Annotated[str | None, option("ready_file")] = None,
) -> None:
    """Run a server until it is told to stop (SIGTERM, or Ctrl-C).

    With no database configured it keeps a PostgreSQL of its own:

        peculium serve

    For others than this machine it needs a certificate, and keys for who may call (peculium keys bootstrap):

        peculium serve --listen 0.0.0.0:7415 --tls-cert-file tls.crt --tls-key-file tls.key
        --database-url postgresql://…
    """
    # Here, so that the verbs of clients do not wait for the server's modules.
    from peculium_server import app  # noqa: PLC0415
    from peculium_server.telemetry import logs  # noqa: PLC0415

    config = Config.load(
        {
            "listen": listen,
            "database_url": database_url,
            "data_dir": data_dir,
            "keys_file": keys_file,
            "tls_cert_file": tls_cert_file,
            "tls_key_file": tls_key_file,
            "tls_client_ca_file": tls_client_ca_file,
            "tls_client_listen": tls_client_listen,
            "allow_plaintext": "true" if allow_plaintext else None,
            "unsafe_settings": "true" if unsafe_settings else None,
            "database_connections": database_connections,
            "queue_max": queue_max,
            "message_bytes_max": message_bytes_max,
            "principal_rate_max": principal_rate_max,
            "principal_burst_max": principal_burst_max,
            "principal_operations_max": principal_operations_max,
            "principal_streams_max": principal_streams_max,
            "connections_max": connections_max,
            "call_seconds_max": call_seconds_max,
            "connection_seconds_max": connection_seconds_max,
            "sweep_seconds": sweep_seconds,
            "signing_key_file": signing_key_file,
            "seal_seconds": seal_seconds,
            "alert_seconds": alert_seconds,
            "webhook_key_file": webhook_key_file,
            "webhook_allow": webhook_allow,
            "webhook_loopback": "true" if webhook_loopback else None,
            "drain_seconds": drain_seconds,
            "refusal_days": refusal_days,
            "freeze_on_reuse_seconds": freeze_on_reuse_seconds,
            "balance_roots": balance_roots,
            "metrics_listen": metrics_listen,
            "log_format": log_format,
            "log_level": log_level,
            "ready_file": ready_file,
        }
    )
    with logs.written(config.log_format, config.log_level):
        say = logs.tell if config.log_format == "json" else tell
        for variable in unknown_variables():
            say(f"WARNING: {variable} is not a setting")
        for name, value in config.told().items():
            say(f"  {name} = {value or '(none)'}")
        app.run(config, say)


def migrate(
    *,
    database_url: Annotated[str | None, option("database_url")] = None,
    data_dir: Annotated[str | None, option("data_dir")] = None,
) -> None:
    """Bring a database to the schema of this version, or make it there.

    Servers of the version before go on meanwhile.

        peculium migrate --database-url postgresql://ledger@db.example/peculium
    """
    # Here, for the same reason as above.
    from peculium_server.store import migrate as migrations  # noqa: PLC0415

    config = Config.load({"database_url": database_url, "data_dir": data_dir})
    with database_of(config) as dsn:
        missing = migrations.upgrade(dsn)
    tell(f"at the newest schema: {config.told_database}")
    if missing:
        tell("WARNING: roles are missing, which this user may not make. Have somebody who may run")
        for role in missing:
            tell(f"  CREATE ROLE {role} NOLOGIN;")
        tell("and then migrate again, which grants them their rights.")


@contextlib.contextmanager
def database_of(config: Config) -> Iterator[str]:
    """The connection string of the configured database, or of the server's own, which runs meanwhile."""
    from peculium_server.embedded import EmbeddedPostgres  # noqa: PLC0415 - takes long to import

    if config.database_url is not None:
        yield config.database_url
        return
    with EmbeddedPostgres.start(config.data_dir, progress=tell) as postgres:
        yield postgres.dsn


def tell(line: str) -> None:
    """Tell people what happens: beside the output."""
    typer.echo(line, err=True)
