"""All verbs put together, and what becomes of an error: a sentence and an exit code."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.text import Text

from peculium_server.cli import audit, ledger, serving
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
# What everybody asks has a short name, too.
app.command()(audit.tree)
app.command()(audit.entries)
app.command()(audit.verify)
app.add_typer(audit.app, name="audit")

app.command()(demo)


def run() -> int:
    """Run the command line on the process's arguments.

    What is wrong with the arguments themselves typer tells, and ends the process.

    Returns:
        The exit code that goes with what was explained.
    """
    try:
        app()
    except Exception as error:
        problem = explain(error)
        if problem is None:
            raise
        console = Console(stderr=True)
        for line in problem.lines:
            console.print(Text(line), soft_wrap=True)
        return problem.exit_code
    return 0
