"""A fleet: agents that reserve, think and settle, against one server with settings of its own.

    python -m tests.bench.fleet [--agents 10000] [--seconds 300] [--folder D] [--report]

Each agent replays requests of the demonstration's trace, at the demonstration's prices, from a budget of its
own below one root; one in ten has so little that it runs out, and is refused from then on. The last line of
standard output is the figures as JSON; the exit code is 1 if more was spent than granted, or ledger and
provider disagree.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from peculium import BudgetExhausted, Child, Usage, aio
from peculium._limits import CHILDREN_MAX
from peculium.aio import Budget
from peculium_server.demo import prices, trace
from peculium_server.demo.trace import Request
from tests.bench import machine, report
from tests.bench.cells import summary
from tests.bench.crew import Crew, billed
from tests.bench.jobs import TIMEOUT_SECONDS, Place, Turn, clock, take
from tests.bench.ledgers import HOLDER, Ledger, Postgres

PROCESSES = 4
CYCLE_SECONDS = 10.0
"""From one Reserve of an agent to its next, in the mean: ten thousand agents make a thousand pairs a second,
which two cores carry beside the agents themselves."""
FIRST_TOKEN_SECONDS = 0.4
PROMPT_TOKENS_PER_S = 4_000.0
ANSWER_TOKENS_PER_S = 40.0
"""How fast the provider reads and writes, so that thinking takes as long as the trace's tokens say."""
THINK_SECONDS_MAX = 15.0
WARM_UP_SECONDS_MAX = 20.0
SCARCE_ONE_IN = 10
"""How many agents there are for each that runs out of money."""
SCARCE_PART = 0.5
"""Of what such an agent would spend, it gets about so much."""
AMPLE = 10**12
FIGURES = (
    *("agents", "pairs", "pairs_per_s", "overshoot", "mismatches", "p50_ms", "p99_ms"),
    *("server_rss_mb", "seconds"),
)
_MB = 2**20
_SAMPLE_SECONDS = 1.0


def think_seconds(request: Request) -> float:
    """How long the provider takes."""
    seconds = (
        FIRST_TOKEN_SECONDS
        + request.context_tokens / PROMPT_TOKENS_PER_S
        + request.generated_tokens / ANSWER_TOKENS_PER_S
    )
    return min(seconds, THINK_SECONDS_MAX)


def mean_think_seconds() -> float:
    """In the mean over the trace."""
    requests = trace.read(None)
    return sum(map(think_seconds, requests)) / len(requests)


class Call(NamedTuple):
    """A request of the trace, and what comes of it."""

    upper: int
    thinks: float
    """Seconds that the provider takes."""
    cost: int
    usage: Usage
    reference: str


def _calls() -> list[Call]:
    """Reckoned once, since the agents share their processors with what they ask."""
    made = []
    for one in trace.read(None):
        cost, usage = prices.actual(one.context_tokens, one.generated_tokens)
        made.append(Call(prices.upper(one), think_seconds(one), cost, usage, f"req-{one.number}"))
    return made


@dataclass
class Think:
    """The agents of one process, over one SDK client."""

    address: str
    places: Sequence[Place]
    seed: int
    pace: float
    """How many times faster than the cadence it thinks and pauses."""
    bill: Counter[bytes] = field(default_factory=Counter)

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[Sequence[Turn]]:
        """Connect, and take the budgets over."""
        calls = _calls()
        pause = (CYCLE_SECONDS - mean_think_seconds()) / self.pace
        chance = random.Random(self.seed)
        async with aio.connect(self.address, timeout=TIMEOUT_SECONDS) as client:
            budgets = await take(client, self.places)
            yield [
                self._turn(place.budget_id, budget, random.Random(chance.random()), calls, pause)
                for place, budget in zip(self.places, budgets, strict=True)
            ]

    def billed(self) -> Counter[bytes]:
        """What the provider has billed."""
        return self.bill

    def _turn(
        self,
        budget_id: bytes,
        budget: Budget,
        chance: random.Random,
        calls: Sequence[Call],
        pause: float,
    ) -> Turn:
        # Nobody starts a fleet at one instant: the first pause is anywhere in a cycle.
        waits = iter([chance.uniform(0, CYCLE_SECONDS / self.pace)])

        async def turn() -> float | None:
            await asyncio.sleep(next(waits, chance.uniform(0, 2 * pause)))
            call = chance.choice(calls)
            began = clock()
            try:
                hold = await budget.reserve(call.upper)
            except BudgetExhausted:
                return None
            took = clock() - began
            await asyncio.sleep(call.thinks / self.pace)
            self.bill[budget_id] += call.cost
            await hold.settle(call.cost, usage=call.usage, reference=call.reference)
            return took

        return turn


def run(agents: int, seconds: float, pace: float, folder: Path, seed: int) -> dict[str, Any]:
    """Let a fleet work: its figures, and how it went."""
    begun, load = machine.now(), machine.load()
    with contextlib.ExitStack() as open_:
        crew = open_.enter_context(Crew())
        postgres = open_.enter_context(Postgres.running(folder))
        ledger = Ledger.made(postgres, "fleet")
        [server] = open_.enter_context(ledger.serving())
        warm_up = min(WARM_UP_SECONDS_MAX, seconds / 3)
        amounts = _amounts(agents, (warm_up + seconds) * pace / CYCLE_SECONDS)
        places = asyncio.run(_budgets(server.address, amounts))
        tell(f"{agents} agents, {seconds:g} s after {warm_up:.0f} s of warming up")
        processes = min(PROCESSES, agents)
        jobs = [
            Think(server.address, places[number::processes], seed + number, pace)
            for number in range(processes)
        ]
        with _memory_of(server.process.pid) as memory:
            counted, spans = crew.work(
                jobs,
                warm_up=warm_up,
                seconds=seconds,
                watched={"server": [server.process.pid], "postgres": [postgres.pid]},
            )
        ledger.billed.update(billed(counted))
        problems = ledger.wrong()
        overrun = int(ledger.fetch("SELECT sum(overrun) FROM budgets")[0][0])
        facts = machine.facts(postgres, folder)
    measured = summary(counted, spans, seconds)
    figures = {
        "agents": agents,
        "pairs": measured["count"],
        "pairs_per_s": measured["per_s"],
        "overshoot": overrun + _overspent(places, amounts, ledger.billed),
        "mismatches": len(problems),
        "p50_ms": measured["p50_ms"],
        "p99_ms": measured["p99_ms"],
        "server_rss_mb": round(max(memory) / _MB, 1),
        "seconds": round(seconds, 1),
    }
    for problem in problems[:20]:
        tell(f"WRONG: {problem}")
    return {
        "begun": begun,
        "load_average": {"begin": load, "end": machine.load()},
        "cadence": cadence(agents, pace),
        "figures": {name: figures[name] for name in FIGURES},
        "refused": round(sum(one.refused for one in counted)),
        "cpu": measured["cpu"],
        "p999_ms": measured["p999_ms"],
        "machine": facts,
        "problems": problems,
    }


def cadence(agents: int, pace: float) -> str:
    """How an agent spends its time, and what that asks of the ledger, for people."""
    faster = "" if pace == 1 else f"; all of it {pace:g} times faster"
    pairs = agents * pace / CYCLE_SECONDS
    return (
        f"Agents replay the demonstration's trace from {PROCESSES} processes, each over one SDK client."
        f" An agent reserves, thinks {mean_think_seconds():.1f} s in the mean"
        f" ({FIRST_TOKEN_SECONDS:g} s, and {PROMPT_TOKENS_PER_S:,.0f} tokens read and"
        f" {ANSWER_TOKENS_PER_S:g} written a second), settles, and pauses by chance, so that it reserves"
        f" every {CYCLE_SECONDS:g} s in the mean{faster}: {agents:,} agents ask for {pairs:,.0f} pairs a second, less"
        f" what waiting takes. One in {SCARCE_ONE_IN} has half of what it would spend,"
        " and is refused when that is used up."
    )


def _amounts(agents: int, calls: float) -> list[int]:
    """What each agent gets that makes so many calls."""
    costs = [call.cost for call in _calls()]
    needed = calls * sum(costs) / len(costs)
    scarce = int(needed * SCARCE_PART)
    return [AMPLE if number % SCARCE_ONE_IN else scarce for number in range(agents)]


async def _budgets(address: str, amounts: Sequence[int]) -> list[Place]:
    async with aio.connect(address, timeout=TIMEOUT_SECONDS) as client:
        await client.admin.grant("fleet", unit="usd_nanos", amount=sum(amounts), holder=HOLDER)
        root = await client.open("fleet")
        made = []
        for first in range(0, len(amounts), CHILDREN_MAX):
            made += await root.delegate(
                [
                    Child(f"agent-{first + number}", amount, holder=HOLDER, token=True)
                    for number, amount in enumerate(amounts[first : first + CHILDREN_MAX])
                ]
            )
    return [Place(one.ref.root_id, one.ref.budget_id, str(one.ref), by_token=True) for one in made]


def _overspent(places: Sequence[Place], amounts: Sequence[int], bill: Counter[bytes]) -> int:
    """What was billed to agents beyond what each of them got."""
    return sum(
        max(0, bill[place.budget_id] - amount)
        for place, amount in zip(places, amounts, strict=True)
    )


@contextlib.contextmanager
def _memory_of(pid: int) -> Iterator[list[int]]:
    """Samples of a process's resident memory, in bytes, for the time of the block."""
    process = psutil.Process(pid)
    samples = [process.memory_info().rss]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            samples.append(process.memory_info().rss)

    sampling = threading.Thread(target=sample, daemon=True)
    sampling.start()
    try:
        yield samples
    finally:
        over.set()
        sampling.join()


def tell(text: str) -> None:
    """Tell people."""
    sys.stderr.write(f"fleet: {text}\n")
    sys.stderr.flush()


def main(words: Sequence[str] | None = None) -> int:
    """Let it work, write it down, and say it in one line: 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fleet", description=__doc__)
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument(
        "--pace", type=float, default=1.0, help="how many times faster agents think and pause"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the data; default: a new one")
    parser.add_argument("--report", action="store_true", help="show it in docs/performance.md, too")
    given = parser.parse_args(words)
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="peculium-fleet-"))).absolute()
    machine.prepare(folder)
    data = run(given.agents, given.seconds, given.pace, folder, given.seed)
    file = folder / "fleet.json"
    file.write_text(report.text(data))
    tell(f"{data['refused']} refused, processors used: {data['cpu']}; everything is in {file}")
    if given.report:
        report.write_fleet(file, machine.ROOT / "docs")
    figures = data["figures"]
    sys.stdout.write(json.dumps(figures) + "\n")
    return 1 if figures["overshoot"] or figures["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(main())
