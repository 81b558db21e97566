"""The verb `peculium demo`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from peculium import PeculiumError, Unavailable
from peculium_server.config import Exporting
from peculium_server.demo import run as runs, traces
from peculium_server.demo.processes import ProcessFailed
from peculium_server.demo.trace import TraceInvalid, read
from peculium_server.telemetry import providers

FAILED: Final = 1
NO_ANSWER: Final = 3
_SIGNALLED: Final = 128
_WORKERS_MAX: Final = 64
_AGENTS_MAX: Final = 256


def demo(
    *,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Requests to replay: a file with TIMESTAMP,ContextTokens,GeneratedTokens. Default:"
            " 8,819 real ones that come along.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, max=_WORKERS_MAX, help="Worker processes.")] = 4,
    agents: Annotated[
        int, typer.Option(min=1, max=_AGENTS_MAX, help="Agents in each of them.")
    ] = 8,
    cap_percent: Annotated[
        int,
        typer.Option(min=1, max=200, help="The cap, in percent of what all requests would cost."),
    ] = 85,
    target: Annotated[
        str | None,
        typer.Option(
            help="A ledger that runs already, as host:port; PECULIUM_API_KEY is an admin's key for it."
            " Default: one is started for the time of the demonstration.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the ledger that is started keeps its data. Default: nowhere for long.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last line only.")] = False,
) -> int:
    """Spend a real trace of requests from one capped budget, with agents in several processes.

    A coordinator gets the cap as a grant and delegates to worker processes, those to their agents; for
    each request an agent reserves the most that it can cost, calls a provider that keeps its own bill,
    and settles what it has cost. At the end everything is compared and verified.

    The last line is JSON. The exit code is 1 if something does not hold.
    """
    if target is not None and data_dir is not None:
        raise typer.BadParameter("a ledger that runs already has its own", param_hint="--data-dir")
    settings = runs.Settings(
        processes=processes,
        agents=agents,
        cap_percent=cap_percent,
        target=target,
        data_dir=data_dir,
    )
    try:
        requests = read(trace)
        plan = runs.plan(requests, settings)
    except (TraceInvalid, runs.TooDear) as error:
        raise typer.BadParameter(str(error), param_hint="--trace") from error
    steps = Console(stderr=True, quiet=as_json)
    exporting = Exporting.load()
    told = traces.how_to_see(exporting, server_started=target is None)
    steps.print(Text(told), soft_wrap=True)
    telemetry = providers.start_caller(exporting, traces.SERVICE)
    try:
        with traces.TRACER.start_as_current_span("demo"):
            report = asyncio.run(runs.run(requests, plan, settings, steps))
    except (runs.Interrupted, ProcessFailed, PeculiumError) as error:
        Console(stderr=True).print(Text(str(error)), soft_wrap=True)
        return _exit_code(error)
    finally:
        telemetry.shutdown(traces.EXPORT_SECONDS_MAX)
    if not as_json:
        report.show(Console())
    sys.stdout.write(f"{report.line}\n")
    return 0 if report.holds else FAILED


def _exit_code(error: Exception) -> int:
    match error:
        case runs.Interrupted():
            return _SIGNALLED + error.number
        case Unavailable():
            return NO_ANSWER
        case _:
            return FAILED
