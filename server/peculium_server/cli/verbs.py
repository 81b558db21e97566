"""All verbs put together, and what becomes of an error: a sentence and an exit code."""

from __future__ import annotations

import functools
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.main import get_command

from peculium_server.cli import alerts, audit, keys, ledger, operating, serving, top, webhooks
from peculium_server.cli.options import (
    TLS,
    TlsCaFile,
    TlsCertFile,
    TlsKeyFile,
    TlsOptions,
    TlsServerName,
    TlsSwitch,
)
from peculium_server.cli.problems import explain
from peculium_server.demo.command import demo


def _end(result: object, **_: object) -> None:
    """End with the exit code that a verb has returned, if it has."""
    if isinstance(result, int):
        raise typer.Exit(result)


app = typer.Typer(
    name="peculium",
    result_callback=_end,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""
    A hard, delegable, auditable spending limit for fleets of LLM agents.

    Start a server on this machine, grant 100 dollars to the principal `dev`, and look at them:

        peculium serve

        peculium grant acme 100usd --holder dev

        peculium tree acme

    A server with a certificate is called so; or say it with PECULIUM_TLS_CA_FILE and the like:

        peculium --tls-ca-file ca.pem tree acme --target ledger.example:7415

    Exit codes: 0 done, 1 refused or not verified, 2 wrong usage, 3 no answer.
    """,
)


@app.callback()
def _options(
    *,
    tls: TlsSwitch = None,
    tls_ca_file: TlsCaFile = None,
    tls_client_cert_file: TlsCertFile = None,
    tls_client_key_file: TlsKeyFile = None,
    tls_server_name: TlsServerName = None,
) -> None:
    """Options before the verb, for all verbs that call a server."""
    TLS.set(
        TlsOptions(tls, tls_ca_file, tls_client_cert_file, tls_client_key_file, tls_server_name)
    )


app.command()(serving.serve)
app.command()(serving.migrate)
app.command()(operating.doctor)
app.command()(operating.health)
app.command()(operating.restored)
app.command()(ledger.grant)
app.command()(ledger.topup)
budget = typer.Typer(no_args_is_help=True, help="Look at one budget.")
budget.command("show")(ledger.budget_show)
app.add_typer(budget, name="budget")
# What everybody asks has a short name, too.
app.command()(audit.tree)
app.command()(top.top)
app.command()(audit.entries)
app.command()(audit.verify)
app.add_typer(audit.app, name="audit")
app.add_typer(keys.app, name="keys")
app.add_typer(alerts.app, name="alerts")
app.add_typer(webhooks.app, name="webhooks")

app.command()(demo)


@functools.cache
def command() -> Any:
    """What is run on the arguments; it takes longer to make than most verbs take."""
    return get_command(app)


def run() -> int:
    """Run the command line on the process's arguments.

    What is wrong with the arguments themselves typer tells, and ends the process.

    Returns:
        The exit code that goes with what was explained.
    """
    try:
        command()()
    except Exception as error:
        problem = explain(error)
        if problem is None:
            raise
        console = Console(stderr=True)
        for line in problem.lines:
            console.print(Text(line), soft_wrap=True)
        return problem.exit_code
    return 0
