"""All verbs put together, and what becomes of an error: a sentence and an exit code."""

from __future__ import annotations

import click
import typer
from rich.console import Console
from rich.text import Text

from peculium_server.cli import ledger, serving
from peculium_server.cli.problems import explain
from peculium_server.demo.command import demo

app = typer.Typer(
    name="peculium",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""
    A hard, delegable, auditable spending limit for fleets of LLM agents.

    Start a server on this machine, make a root budget of 100 dollars for the principal `svc`, and look
    at it:

        peculium serve

        peculium grant acme 100usd --holder svc

        peculium tree acme

    Exit codes: 0 done, 1 refused or not verified, 2 wrong usage, 3 no answer.
    """,
)
app.command()(serving.serve)
app.command()(serving.migrate)
app.command()(ledger.grant)
app.command()(ledger.topup)
budget = typer.Typer(no_args_is_help=True, help="Look at one budget.")
budget.command("show")(ledger.budget_show)
app.add_typer(budget, name="budget")
app.command()(ledger.tree)
app.command()(ledger.entries)
app.command()(ledger.verify)

app.command()(demo)


def run() -> int:
    """Run the command line on the process's arguments, and return the exit code."""
    try:
        result = app(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:
        problem = explain(error)
        if problem is None:
            raise
        console = Console(stderr=True)
        for line in problem.lines:
            console.print(Text(line), soft_wrap=True)
        return problem.exit_code
    return result if isinstance(result, int) else 0
