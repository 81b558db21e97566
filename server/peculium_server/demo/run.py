"""One run of the demonstration, from its first process to its report."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

import peculium.aio
from peculium import USD_NANOS, BudgetRef, Verification
from peculium.aio import Client
from peculium_server.core.limits import AMOUNT_MAX
from peculium_server.demo import progress
from peculium_server.demo.channel import Channel, PeerEnded, first_error
from peculium_server.demo.coordinator import Coordinator, WorkerFailed
from peculium_server.demo.messages import Bill, BillPlease, Listening, Start, Work
from peculium_server.demo.prices import actual, upper
from peculium_server.demo.processes import Processes
from peculium_server.demo.report import Plan, Report
from peculium_server.demo.trace import Request

OUTAGE_SECONDS_MAX: Final = 120.0
"""How long a ledger may be away in the middle of a run before the agents give up."""
FIRST_ANSWER_SECONDS_MAX: Final = 5.0
"""How long to wait for a ledger that has not answered at all so far."""

_REQUESTS_PER_MESSAGE: Final = 1_000
_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TooDear(Exception):
    """The trace costs more than a budget can hold."""


class Interrupted(Exception):
    """The run was told to stop, and everything that it had started was ended."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to run."""

    processes: int
    agents: int
    """In each process."""
    cap_percent: int
    """The cap, as a share of what the whole trace would cost."""
    target: str | None = None
    """A ledger that runs already, for which `PECULIUM_API_KEY` is an admin's key; None: start one."""
    data_dir: Path | None = None
    """Where the ledger that is started keeps its data; None: nowhere for long."""


def plan(requests: Sequence[Request], settings: Settings) -> Plan:
    """Decide on the cap.

    It is a share of what the whole trace would cost, so that it binds before the end; but each
    request, taken alone, fits under it.

    Raises:
        TooDear: A budget cannot hold as much.
    """
    cost = sum(
        actual(request.context_tokens, min(request.generated_tokens, request.output_limit))[0]
        for request in requests
    )
    largest = max(upper(request) for request in requests)
    granted = max(cost * settings.cap_percent // 100, largest)
    if granted > AMOUNT_MAX:
        raise TooDear(
            f"the trace needs a cap of {granted} {USD_NANOS}, and 2^62 - 1 is the largest"
        )
    return Plan(
        requests=len(requests),
        cost=cost,
        granted=granted,
        processes=settings.processes,
        agents_per_process=settings.agents,
    )


async def run(
    requests: Sequence[Request], plan: Plan, settings: Settings, console: Console
) -> Report:
    """Spend the plan's cap on the requests. Whatever was started has ended when this returns.

    Args:
        requests: What to replay.
        plan: What `plan` made of them.
        settings: How.
        console: Where to show how far it is.

    Raises:
        ProcessFailed: A process could not go on.
        PeculiumError: The ledger refused something, or was away for too long.
        Interrupted: By a signal.
    """
    with (
        _stop_signals() as stop,
        tempfile.TemporaryDirectory(prefix="peculium-demo-") as logs,
        # Beside the other folder, not in it: for root, PostgreSQL runs as a user who cannot enter that.
        tempfile.TemporaryDirectory(prefix="peculium-demo-data-") as scratch,
    ):
        async with Processes(Path(logs)) as processes:
            one = _Run(requests, plan, settings, console, processes)
            body = asyncio.create_task(one.run(settings.data_dir or Path(scratch)))
            server_ended = asyncio.create_task(processes.server_ended())
            await asyncio.wait((body, stop, server_ended), return_when=asyncio.FIRST_COMPLETED)
            body.cancel()
            server_ended.cancel()
            await asyncio.wait((body, server_ended))
            if stop.done():
                raise Interrupted(stop.result())
            if body.cancelled():
                server_ended.result()
            return _result(body, processes)


class _Run:
    """What the steps of a run share."""

    def __init__(
        self,
        requests: Sequence[Request],
        plan: Plan,
        settings: Settings,
        console: Console,
        processes: Processes,
    ) -> None:
        self._requests = requests
        self._plan = plan
        self._settings = settings
        self._console = console
        self._processes = processes
        self._started = time.monotonic()

    async def run(self, data_dir: Path) -> Report:
        """Do everything."""
        # All start at once: each takes its time to load what it needs.
        if self._settings.target is None:
            self._say("starting a ledger with a PostgreSQL of its own")
            await self._processes.server(data_dir)
        provider = await self._processes.member("provider", "peculium_server.demo.provider")
        workers = [
            await self._processes.member(f"worker-{number}", "peculium_server.demo.worker")
            for number in range(1, self._plan.processes + 1)
        ]
        target = self._settings.target or await self._processes.listening()
        await self._hand_out_work(workers, target, provider)
        async with peculium.aio.connect(target, timeout=OUTAGE_SECONDS_MAX) as client:
            return await self._spend(client, provider, workers)

    async def _hand_out_work(
        self, workers: Sequence[Channel], target: str, provider: Channel
    ) -> None:
        """Deal the requests out like cards, so that every worker gets the same mixture."""
        match await provider.receive():
            case Listening(port=port):
                pass
            case other:
                raise AssertionError(other)
        for number, worker in enumerate(workers):
            await worker.send(
                Start(
                    agents=self._plan.agents_per_process,
                    target=target,
                    provider_port=port,
                    timeout_seconds=OUTAGE_SECONDS_MAX,
                )
            )
            dealt = [list(request) for request in self._requests[number :: len(workers)]]
            for first in range(0, len(dealt), _REQUESTS_PER_MESSAGE):
                await worker.send(Work(requests=dealt[first : first + _REQUESTS_PER_MESSAGE]))

    async def _spend(self, client: Client, provider: Channel, workers: Sequence[Channel]) -> Report:
        plan = self._plan
        name = f"demo-{secrets.token_hex(4)}"
        self._say(f"granting {progress.dollars(plan.granted)} to {name}")
        grant = await client.admin.grant(
            name, unit=USD_NANOS, amount=plan.granted, timeout=FIRST_ANSWER_SECONDS_MAX
        )
        coordinator = Coordinator(await client.accept(grant.capability), plan.granted, workers)
        async with progress.shown(self._console, plan.granted, lambda: coordinator.tally):
            await coordinator.run()
        bill = await _bill(provider)
        self._say("verifying every entry")
        verification = await _verdict(client, grant.ref)
        budgets = [budget async for budget in client.audit.budgets(grant.ref)]
        return Report(
            plan=plan,
            done=coordinator.done,
            bill=bill,
            budgets=budgets,
            verification=verification,
            seconds=time.monotonic() - self._started,
        )

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


async def _bill(provider: Channel) -> Bill:
    await provider.send(BillPlease())
    match await provider.receive():
        case Bill() as bill:
            return bill
        case other:
            raise AssertionError(other)


async def _verdict(client: Client, root: BudgetRef) -> Verification:
    *_, last = [told async for told in client.audit.verify(root)]
    return last


@contextlib.contextmanager
def _stop_signals() -> Iterator[asyncio.Future[int]]:
    """The first signal that tells this process to stop; further ones do not hurry what follows it."""
    loop = asyncio.get_running_loop()
    stop = loop.create_future()

    def note(number: int) -> None:
        if not stop.done():
            stop.set_result(number)

    # What this process was told to ignore, by `nohup` for example, it goes on to ignore.
    heeded = [each for each in _STOP_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    for number in heeded:
        loop.add_signal_handler(number, note, number)
    try:
        yield stop
    finally:
        for number in heeded:
            loop.remove_signal_handler(number)


def _result(body: asyncio.Task[Report], processes: Processes) -> Report:
    """What came of a run; an error of another process with what that has logged."""
    error = body.exception()
    if error is None:
        return body.result()
    cause = first_error(error)
    if isinstance(cause, WorkerFailed | PeerEnded):
        raise processes.failed(cause.peer, str(cause)) from error
    raise cause from error
