"""The scenarios: the eight clusters of the incident catalogue, and faults of a fleet.

Amounts are tokens, of which each costs one unit. Figures are those of the study where it has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from tests.replay.plays import PROCESSES, Act, Agent, Call, Custody, Point, Scenario, Strike
from tests.replay.provider import Fate, Stream

BASE = Call(estimate=31, cost=23)
"""The study's fan-out: what each child expects, and what it is billed."""
UNDERREPORTED = "usage is told too low: only the provider's bill shows it (reconciliation)"


def company(agents: Sequence[Agent], *, processes: int = PROCESSES) -> tuple[Agent, ...]:
    """Agents spread evenly over processes, with their names."""
    return tuple(
        replace(agent, process=number % processes).named(number)
        for number, agent in enumerate(agents)
    )


def alike(count: int, *calls: Call, processes: int = PROCESSES) -> tuple[Agent, ...]:
    """So many agents that make the same calls."""
    return company([Agent(calls=calls)] * count, processes=processes)


def one(*calls: Call) -> tuple[Act, ...]:
    """One agent."""
    return (Act(agents=alike(1, *calls)),)


# --- S1: retry loops ---


def retry_loops() -> Iterator[Scenario]:
    """The provider or a tool fails, and the agent tries again."""
    yield Scenario(
        name="S1",
        title="A tool fails, and the agent asks again and again, each time for more",
        cap=200,
        acts=one(*(Call(estimate=20 + 15 * n, cost=20 + 15 * n, seconds=0.002) for n in range(25))),
    )
    yield Scenario(
        name="S1b",
        title="The client tries again 14 times inside one call, and each attempt is billed",
        cap=600,
        acts=one(Call(estimate=100, cost=100, fates=(Fate.FAILED,), attempts=14, seconds=0.002)),
    )
    yield Scenario(
        name="S1c",
        title="Calls time out after they were billed, and are made again",
        cap=300,
        acts=(
            Act(
                agents=alike(
                    4,
                    *[Call(estimate=31, cost=23, fates=(Fate.DROPPED,), attempts=2, seconds=0.002)]
                    * 8,
                )
            ),
        ),
    )
    yield Scenario(
        name="S1d",
        title="Compaction triggers compaction",
        cap=520,
        acts=one(*[Call(estimate=50, cost=50, seconds=0.002)] * 40),
    )


# --- S2: delegation and fan-out ---


def fan_outs() -> Iterator[Scenario]:
    """Children check at the same moment."""
    for cap in (50, 60, 69, 100):
        for processes in (1, 3):
            several = "one process" if processes == 1 else "three processes"
            yield Scenario(
                name=f"S2-{cap}-{processes}p",
                title=f"Three children of {several} race for {cap}",
                cap=cap,
                acts=(Act(agents=alike(3, BASE, processes=processes)),),
                family="race",
            )
    for agents in (16, 64, 256):
        yield Scenario(
            name=f"S2-{agents}a",
            title=f"{agents} agents of {PROCESSES} processes race for 60",
            cap=60,
            acts=(Act(agents=alike(agents, replace(BASE, seconds=0.05 + agents * 0.002))),),
            family="scale",
        )
    for cap in (124, 248, 496, 744):
        yield Scenario(
            name=f"S2-u{cap}",
            title=f"16 agents share {cap}, and want 32 calls",
            cap=cap,
            acts=(Act(agents=alike(16, BASE, BASE)),),
            family="utilisation",
        )
    yield Scenario(
        name="S2b",
        title="The parent cancels while its children are in the middle of ten calls each",
        cap=2_480,
        acts=(
            Act(
                agents=alike(8, *[replace(BASE, seconds=0.08)] * 10),
                strike=Strike.REVOKED,
                strikes_at=4,
            ),
        ),
        bound=0,
        family="cancel",
    )
    died = Agent(calls=(Call(estimate=1, cost=1, dies=Point.RESERVED),))
    yield Scenario(
        name="S2c",
        title="Sub-agents die without giving their slots back; then others are spawned",
        cap=10,
        acts=(
            Act(agents=company([died] * 10, processes=2)),
            Act(agents=alike(8, Call(estimate=1, cost=1)), after_bill=True),
        ),
        hold_seconds=1.0,
        at_once=6,
    )
    yield Scenario(
        name="S2d",
        title="A group chat calls all four agents for 24 rounds, with the answer there already",
        cap=30,
        acts=(Act(agents=alike(4, *[Call(estimate=1, cost=1, seconds=0.002)] * 24)),),
    )
    child = Call(estimate=25, cost=23)
    yield Scenario(
        name="S2e",
        title="A parent that has given everything to three children goes on spending beside them",
        cap=300,
        custody=Custody.GIVEN,
        acts=(Act(agents=alike(4, *[child] * 4)),),
        lease_seconds=600.0,
        family="authority",
    )
    yield Scenario(
        name="S2f",
        title="A child that has used its share up presents what its parent was handed",
        cap=100,
        custody=Custody.COPIED,
        acts=(
            Act(agents=alike(1, *[child] * 8)),
            Act(agents=(Agent(calls=(child,) * 8, process=1, name="again"),)),
        ),
        family="authority",
    )


# --- S3: context amplification ---


def contexts() -> Iterator[Scenario]:
    """The history grows while estimates are made from what it was."""
    calls = [Call(estimate=100 + 40 * n, cost=105 + 44 * n, seconds=0.01) for n in range(8)]
    more = sum(call.cost - call.estimate for call in calls[-1:]) * 4
    yield Scenario(
        name="S3",
        title="Each call carries the whole history; a sibling has added to it since the estimate",
        cap=4_000,
        acts=(Act(agents=alike(4, *calls)),),
        bound=more,
        why="estimates are too low by up to a tenth: (calls in flight) x (actual - hold)",
    )
    yield Scenario(
        name="S3b",
        title="The same, with estimates that leave room for what siblings add",
        cap=4_000,
        acts=(
            Act(
                agents=alike(
                    4,
                    *(replace(call, estimate=call.estimate * 5 // 4) for call in calls),
                )
            ),
        ),
    )


# --- S4: storage ---


def storages() -> Iterator[Scenario]:
    """Many tiny operations."""
    yield Scenario(
        name="S4",
        title="16 agents embed one text after the other, a unit each, beside model calls",
        cap=130,
        acts=(
            Act(
                agents=company(
                    [Agent(calls=tuple([Call(estimate=1, cost=1, seconds=0.001)] * 9))] * 15
                    + [Agent(calls=(BASE,) * 3)]
                )
            ),
        ),
    )


# --- S5: no budget where it is needed ---


def primitives() -> Iterator[Scenario]:
    """A limit that is no budget."""
    yield Scenario(
        name="S5a",
        title="One turn makes ten calls at once, and the limit is six",
        cap=6,
        acts=(Act(agents=alike(10, Call(estimate=1, cost=1), processes=1)),),
    )
    free = Agent(calls=tuple([Call(estimate=31, cost=23, seconds=0.002)] * 6), obeys=False)
    yield Scenario(
        name="S5b",
        title="An agent ignores the refusal, and calls with a key of its own",
        cap=69,
        acts=(Act(agents=company([free])),),
        bound=None,
        why="whoever has the provider's key can call: put it behind a gateway that reserves",
    )
    yield Scenario(
        name="S5c",
        title="A part is set aside for the final answer, when all the rest is spent",
        cap=124,
        custody=Custody.SHARES,
        acts=(
            Act(
                agents=(
                    *(
                        replace(agent, process=agent.process % 3)
                        for agent in alike(9, BASE, processes=3)
                    ),
                    Agent(calls=(replace(BASE, seconds=0.15), BASE), process=3, name="final"),
                )
            ),
        ),
        lease_seconds=600.0,
    )
    yield Scenario(
        name="S5d",
        title="Eight indexers run for three days, 30 units an hour",
        cap=500,
        acts=(Act(agents=alike(8, *[Call(estimate=30, cost=30, seconds=0.005)] * 9)),),
    )


# --- S6: usage that is told wrongly ---


def observabilities() -> Iterator[Scenario]:
    """A call costs 100, 200 is reserved for it, and usage says something else."""
    told: tuple[tuple[str, int | None, str, int | None, str], ...] = (
        ("true", 100, "", 0, ""),
        ("half", 50, "half of it", None, UNDERREPORTED),
        ("fifth", 20, "a fifth of it", None, UNDERREPORTED),
        ("sixteenth", 6, "a sixteenth of it", None, UNDERREPORTED),
        ("missing", None, "nothing", 0, ""),
        ("zero", 0, "zero", 0, ""),
        ("double", 200, "twice as much", 0, ""),
        ("thirteenfold", 1_300, "thirteen times as much", 0, ""),
        ("negative", -400, "a negative number", 0, ""),
    )
    for name, reports, words, bound, why in told:
        calls = 310 if name == "sixteenth" else 100
        yield Scenario(
            name="D12" if name == "negative" else f"S6-{name}",
            title=f"Usage tells {words or 'the truth'}",
            cap=2_000,
            acts=one(*[Call(estimate=200, cost=100, reports=reports, seconds=0.0)] * calls),
            bound=bound,
            why=why,
        )
    whole = Call(estimate=200, cost=100, seconds=0.0)
    streams: dict[str, tuple[str, Stream, Literal["truth"] | None, Fate]] = {
        "stream": ("is asked of a stream, and told", Stream.WITH_USAGE, "truth", Fate.ANSWERED),
        "unasked": ("is not asked of a stream", Stream.WITHOUT_USAGE, "truth", Fate.ANSWERED),
        "cut": (
            "never comes, since streams are cut in the middle",
            Stream.WITH_USAGE,
            None,
            Fate.CUT,
        ),
    }
    for name, (words, stream, usage, fate) in streams.items():
        yield Scenario(
            name=f"S6-{name}",
            title=f"Usage {words}",
            cap=2_000,
            acts=one(*[replace(whole, stream=stream, reports=usage, fates=(fate,))] * 100),
        )


# --- S7: options that are dropped ---


def options() -> Iterator[Scenario]:
    """The limit that an agent sets does not reach the provider."""
    call = Call(estimate=300, cost=2_100)
    yield Scenario(
        name="S7a",
        title="The adapter drops max_output: eight agents hold 300 each and are billed 2,100",
        cap=2_400,
        acts=(Act(agents=alike(8, call, call)),),
        bound=8 * (2_100 - 300),
        why="the estimate is a seventh of the bill: (calls in flight) x (actual - hold)",
    )
    canary = Agent(calls=(call,))
    yield Scenario(
        name="S7b",
        title="The same, but the adapter's first call runs alone, and estimates learn from it",
        cap=2_400,
        acts=(
            Act(agents=company([canary])),
            Act(agents=alike(8, replace(call, estimate=2_100))),
        ),
    )
    yield Scenario(
        name="S7c",
        title="A fallback answers at three times the price that was reserved",
        cap=400,
        acts=(Act(agents=alike(4, *[Call(estimate=40, cost=120)] * 3)),),
        bound=4 * 80,
        why="reserved at the first provider's price: (calls in flight) x (actual - hold)",
    )


# --- S8: images ---


def images() -> Iterator[Scenario]:
    """What an image costs is guessed from its text."""
    yield Scenario(
        name="S8a",
        title="One image is billed at three thousand times what was estimated",
        cap=10_000,
        acts=(
            Act(
                agents=company(
                    [Agent(calls=(Call(estimate=85, cost=254_201),))]
                    + [Agent(calls=(BASE,) * 4)] * 7
                )
            ),
        ),
        bound=254_201 - 85,
        why="one call costs 25 times the whole cap: (calls in flight) x (actual - hold)",
    )
    yield Scenario(
        name="S8b",
        title="A safe estimate is 300 times too high: images are refused that would have fitted",
        cap=50_000,
        acts=(Act(agents=alike(8, *[Call(estimate=25_500, cost=85)] * 4)),),
    )


# --- faults ---


def faults() -> Iterator[Scenario]:
    """The study's fan-out on 16 agents of four processes, with something that goes wrong."""
    dying = {
        Point.RESERVED: ("D1", "A process dies after it reserved and before it calls"),
        Point.ANSWERED: ("D2", "A process dies after the answer and before it settles"),
    }
    for point, (name, title) in dying.items():
        dies = replace(BASE, dies=point)
        yield Scenario(
            name=name,
            title=title,
            cap=496,
            acts=(
                Act(
                    agents=tuple(
                        replace(agent, calls=(dies,)) if agent.process == 0 else agent
                        for agent in alike(16, BASE)
                    )
                ),
                Act(agents=alike(16, BASE)),
            ),
            hold_seconds=1.0,
            at_once=6,
        )
    yield Scenario(
        name="D3",
        title="Replies to settlements are lost, and they are sent again",
        cap=400,
        acts=(
            Act(
                agents=alike(16, *[replace(BASE, estimate=100, seconds=0.1)] * 3),
                strike=Strike.SETTLE_REPLY_LOST,
                strikes_at=4,
            ),
            Act(agents=alike(16, BASE, BASE)),
        ),
    )
    yield Scenario(
        name="D4",
        title="Replies to reservations are lost, and they are sent again",
        cap=496,
        acts=(Act(agents=alike(16, BASE, BASE), strike=Strike.RESERVE_REPLY_LOST),),
    )
    yield Scenario(
        name="D5",
        title="Calls take longer than their holds live; others spend meanwhile",
        cap=250,
        acts=(
            Act(
                agents=company(
                    [Agent(calls=(replace(BASE, seconds=1.7),))] * 4
                    + [Agent(calls=(replace(BASE, seconds=0.4),) * 4)] * 12
                )
            ),
        ),
        hold_seconds=1.0,
        at_once=6,
    )
    yield Scenario(
        name="D6",
        title="The agents' clock is an hour ahead",
        cap=250,
        acts=(Act(agents=alike(16, BASE)),),
        skew_seconds=3_600.0,
    )
    yield Scenario(
        name="D7",
        title="A queue delivers a job and its share of 100 twice",
        cap=100,
        custody=Custody.TWICE,
        acts=(Act(agents=alike(4, *[replace(BASE, estimate=25)] * 4, processes=2)),),
        lease_seconds=600.0,
    )
    yield Scenario(
        name="D7b",
        title="A job's message, with its share of 100, is delivered again after the job was done",
        cap=100,
        custody=Custody.TWICE,
        acts=(
            Act(agents=alike(2, *[replace(BASE, estimate=25)] * 4, processes=1)),
            Act(
                agents=tuple(
                    replace(agent, process=1)
                    for agent in alike(2, *[replace(BASE, estimate=25)] * 4, processes=1)
                )
            ),
        ),
        lease_seconds=600.0,
        family="authority",
    )
    yield Scenario(
        name="D8",
        title="What keeps the budget is killed with its database while calls are in flight",
        cap=250,
        acts=(
            Act(agents=alike(8, replace(BASE, seconds=0.3)), strike=Strike.KILLED, strikes_at=4),
            Act(agents=alike(16, BASE, BASE)),
        ),
    )
    yield Scenario(
        name="D9",
        title="The agents are cut off from what keeps the budget",
        cap=250,
        acts=(
            Act(agents=alike(8, BASE)),
            Act(agents=alike(16, BASE, BASE), strike=Strike.CUT_OFF),
        ),
    )
    yield Scenario(
        name="D10",
        title="What keeps the budget runs twice, behind one address",
        cap=250,
        custody=Custody.REPLICAS,
        acts=(Act(agents=alike(16, *[BASE] * 3)),),
    )
    yield Scenario(
        name="D11",
        title="Answers fail after they were billed, and every agent goes on",
        cap=250,
        acts=(
            Act(
                agents=alike(
                    16, *[replace(BASE, fates=(Fate.FAILED, Fate.ANSWERED), attempts=2)] * 2
                )
            ),
        ),
    )


def all_scenarios() -> list[Scenario]:
    """Every one, in the order of the report."""
    made = [
        *retry_loops(),
        *fan_outs(),
        *contexts(),
        *storages(),
        *primitives(),
        *observabilities(),
        *options(),
        *images(),
        *faults(),
    ]
    # D12 stands among the tellings of usage, which it is one of.
    return sorted(made, key=lambda scenario: scenario.name == "D12")


SLICE = ("S1b", "S2-60-1p", "S2-60-3p", "S6-zero", "S7a", "D2", "D3", "D7")
"""What shows that everything runs."""
