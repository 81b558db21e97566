"""The verbs that run a server, and prepare its database."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from peculium_server.config import SERVER_SETTINGS, Config, unknown_variables

_BY_NAME = {setting.name: setting for setting in SERVER_SETTINGS}


def _option(name: str) -> Any:
    """A setting as a flag, described in the settings' own words."""
    setting = _BY_NAME[name]
    default = f" Default: {setting.default}." if setting.default else ""
    return typer.Option(
        setting.flag,
        help=f"{setting.meaning.replace('`', '')}{default} Or {setting.variable}.",
        show_default=False,
    )


def serve(
    *,
    listen: Annotated[str | None, _option("listen")] = None,
    database_url: Annotated[str | None, _option("database_url")] = None,
    data_dir: Annotated[str | None, _option("data_dir")] = None,
    keys_file: Annotated[str | None, _option("keys_file")] = None,
    unsafe_settings: Annotated[bool, _option("unsafe_settings")] = False,
    database_connections: Annotated[str | None, _option("database_connections")] = None,
    queue_max: Annotated[str | None, _option("queue_max")] = None,
    message_bytes_max: Annotated[str | None, _option("message_bytes_max")] = None,
    call_seconds_max: Annotated[str | None, _option("call_seconds_max")] = None,
    sweep_seconds: Annotated[str | None, _option("sweep_seconds")] = None,
    signing_key_file: Annotated[str | None, _option("signing_key_file")] = None,
    seal_seconds: Annotated[str | None, _option("seal_seconds")] = None,
    drain_seconds: Annotated[str | None, _option("drain_seconds")] = None,
    ready_file: Annotated[str | None, _option("ready_file")] = None,
) -> None:
    """Run a server until it is told to stop (SIGTERM, or Ctrl-C).

    With no database configured it keeps a PostgreSQL of its own:

        peculium serve

    For others than this machine it needs to know who may call:

        peculium serve --listen 0.0.0.0:7415 --keys-file keys.toml --database-url postgresql://…
    """
    # Here, so that the verbs of clients do not wait for the server's modules.
    from peculium_server import app  # noqa: PLC0415

    config = Config.load(
        {
            "listen": listen,
            "database_url": database_url,
            "data_dir": data_dir,
            "keys_file": keys_file,
            "unsafe_settings": "true" if unsafe_settings else None,
            "database_connections": database_connections,
            "queue_max": queue_max,
            "message_bytes_max": message_bytes_max,
            "call_seconds_max": call_seconds_max,
            "sweep_seconds": sweep_seconds,
            "signing_key_file": signing_key_file,
            "seal_seconds": seal_seconds,
            "drain_seconds": drain_seconds,
            "ready_file": ready_file,
        }
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for variable in unknown_variables():
        _tell(f"WARNING: {variable} is not a setting")
    for name, value in config.told().items():
        _tell(f"  {name} = {value or '(none)'}")
    app.run(config, _tell)


def migrate(
    *,
    database_url: Annotated[str | None, _option("database_url")] = None,
    data_dir: Annotated[str | None, _option("data_dir")] = None,
) -> None:
    """Bring a database to the schema of this version, or make it there.

    Servers of the version before go on meanwhile.

        peculium migrate --database-url postgresql://ledger@db.example/peculium
    """
    # Here, for the same reason as above.
    from peculium_server.embedded import EmbeddedPostgres  # noqa: PLC0415
    from peculium_server.store import migrate as migrations  # noqa: PLC0415

    config = Config.load({"database_url": database_url, "data_dir": data_dir})
    if config.database_url is not None:
        missing = migrations.upgrade(config.database_url)
    else:
        with EmbeddedPostgres.start(config.data_dir, progress=_tell) as postgres:
            missing = migrations.upgrade(postgres.dsn)
    _tell(f"at the newest schema: {config.told_database}")
    if missing:
        _tell("WARNING: roles are missing, which this user may not make. Have somebody who may run")
        for role in missing:
            _tell(f"  CREATE ROLE {role} NOLOGIN;")
        _tell("and then migrate again, which grants them their rights.")


def _tell(line: str) -> None:
    typer.echo(line, err=True)
